"""Commands with options made late: listing all of them imports neither torch nor a model of settings."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import typer
from typer.core import TyperCommand, TyperGroup

from svdllm.cli.libraries import prepared_libraries, without_garbage_collection
from svdllm.common.settings import PANELS

Function = TypeVar("Function", bound=Callable[..., None])
# How every command looks and is asked for help.
STYLE: dict[str, Any] = {"rich_markup_mode": "rich", "context_settings": {"help_option_names": ["-h", "--help"]}}


def takes(options: Callable[[], list[inspect.Parameter]]) -> Callable[[Function], Function]:
    """Gives a command more options, which ``options`` makes when the command is called.

    Their values arrive as keyword arguments: None for a flag that is not given.
    """

    def decorate(function: Function) -> Function:
        function.options = options  # type: ignore[attr-defined]
        return function

    return decorate


def group_of(functions: dict[str, Callable[..., None]]) -> type[TyperGroup]:
    """A group of commands, which are built when they are called and listed by name and docstring before."""

    class Commands(TyperGroup):
        def __init__(self, **settings: Any) -> None:
            super().__init__(**settings)
            for name, function in functions.items():
                self.add_command(TyperCommand(name, help=inspect.getdoc(function), rich_markup_mode="rich"))

        def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
            name, command, rest = super().resolve_command(ctx, args)
            if command is None:
                return name, None, rest
            with without_garbage_collection():
                return name, build(command.name or "", functions[command.name or ""]), rest

    return Commands


def _place(option: inspect.Parameter) -> int:
    """Where an option stands in the help, by its panel; options without one stand first."""
    panel = option.annotation.__metadata__[0].rich_help_panel
    return -1 if panel is None else PANELS.index(panel)


def build(name: str, function: Callable[..., None]) -> Any:
    """The command that a function is: its own options and those that it ``takes``."""
    own = inspect.signature(function, eval_str=True).parameters.values()
    options = [parameter for parameter in own if parameter.kind is not parameter.VAR_KEYWORD]
    options += getattr(function, "options", list)()
    options.sort(key=_place)

    @functools.wraps(function)
    def run(**arguments: Any) -> None:
        with prepared_libraries():
            function(**arguments)

    as_keywords = [option.replace(kind=inspect.Parameter.KEYWORD_ONLY) for option in options]
    run.__signature__ = inspect.Signature(as_keywords)  # type: ignore[attr-defined]
    single = typer.Typer(add_completion=False, **STYLE)
    single.command(name)(run)
    return typer.main.get_command(single)
