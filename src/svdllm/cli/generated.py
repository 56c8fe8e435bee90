"""Options made from the fields of a settings model, and what was given by them."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from inspect import Parameter
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from svdllm.cli.readers import READERS
from svdllm.common.errors import InputError
from svdllm.common.settings import flag_name, flag_of


def options_of(model: type[BaseModel], names: Collection[str] | None = None) -> list[Parameter]:
    """One option for every field of a model, or for those named; a flag that is not given is None.

    Args:
        model: its fields are declared with ``svdllm.common.settings.setting``.
        names: fields; None for all.
    """
    fields = {name: field for name, field in model.model_fields.items() if names is None or name in names}
    return [_option(name, field, help_text(model, name)) for name, field in _own_flags(fields)]


def read_flags(model: type[BaseModel], flags: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that were given by flags, as values of the model's fields.

    Raises:
        InputError: the text of a flag cannot be read.
    """
    given = {}
    for name, value in flags.items():
        if value is None or value == []:
            continue
        field = model.model_fields[name]
        reader = flag_of(name, field).reader
        given[name] = value if reader is None else READERS[reader](value, flag_name(name, field))
    return given


def refuse_idle(
    settings: BaseModel, given: Collection[str], rows: Callable[[str], Mapping[str, Sequence[str]]] = lambda name: {}
) -> None:
    """Raises InputError for the first flag that does nothing with the other settings.

    ``rows`` returns, for a field, other fields and the values with which it does something, as ``only_with`` does.
    """
    fields = type(settings).model_fields
    for name in given:
        needed = flag_of(name, fields[name]).only_with or rows(name)
        if not needed or any(getattr(settings, other) in values for other, values in needed.items()):
            continue
        wanted = " or ".join(f"{other} {' or '.join(values)}" for other, values in needed.items())
        found = " and ".join(f"{other} {getattr(settings, other)}" for other in needed)
        choices = " or ".join(f"{flag_name(other, fields[other])} {values[0]}" for other, values in needed.items())
        raise InputError(
            f"{flag_name(name, fields[name])} does nothing here: it is for {wanted}, and this recipe has {found}. "
            f"Leave it out, or choose {choices}."
        )


def _own_flags(fields: Mapping[str, FieldInfo]) -> Iterator[tuple[str, FieldInfo]]:
    """The fields without those that are given by the flag of another field, as explicit ranks by --allocation."""
    flags = {f"--{name.replace('_', '-')}" for name in fields}
    for name, field in fields.items():
        if flag_of(name, field).name not in flags:
            yield name, field


def help_text(model: type[BaseModel], name: str) -> str:
    """The description of a field, in which names of other fields are written as flags: target_size as --target-size."""
    fields = model.model_fields
    others = "|".join(other for other in fields if "_" in other)
    text = fields[name].description or ""
    return re.sub(rf"\b({others})\b", lambda found: flag_name(found[1], fields[found[1]]), text) if others else text


def _option(name: str, field: FieldInfo, text: str) -> Parameter:
    flag, spelling = flag_of(name, field), flag_name(name, field)
    kind = list[str] if flag.reader == "overrides" else str if flag.reader else _kind(field.annotation)
    option = typer.Option(
        f"{spelling}/--no-{spelling[2:]}" if kind is bool else spelling,
        help=text,
        show_default=flag.shown_default or default_text(field) or False,
        metavar=flag.metavar or _choices(field.annotation),
        rich_help_panel=flag.panel,
    )
    default = Parameter.empty if field.is_required() else None
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind | None, option])


def default_text(field: FieldInfo) -> str:
    """A default as it is written on the command line; empty where the field has none."""
    default = field.default
    if isinstance(default, bool):
        return "yes" if default else "no"
    if field.is_required() or default is None or default in ((), {}):
        return ""
    if isinstance(default, tuple):
        return ",".join(map(str, default))
    return f"{default:g}" if isinstance(default, float) else str(default)


def _kind(annotation: Any) -> Any:
    """The type of a flag's value: bool, int, float, str, or a list of texts for flags that repeat."""
    if get_origin(annotation) is Annotated:
        return _kind(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return _kind(next(part for part in get_args(annotation) if part is not NoneType))
    if get_origin(annotation) is Literal:
        return type(get_args(annotation)[0])
    return list[str] if get_origin(annotation) is tuple else annotation


def _choices(annotation: Any) -> str | None:
    """``input|two-sided`` for a literal, as the placeholder of its value; None for other types."""
    if get_origin(annotation) in (Union, UnionType):
        return next(filter(None, map(_choices, get_args(annotation))), None)
    return "|".join(map(str, get_args(annotation))) if get_origin(annotation) is Literal else None
