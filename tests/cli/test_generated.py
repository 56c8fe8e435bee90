"""Flags are made of the fields of settings models: none is missing, and all say what their field says."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, Field

import svdllm.cli
from svdllm.cli.commands import build, takes
from svdllm.cli.generated import default_text, help_text, options_of, read_flags, refuse_idle
from svdllm.common.errors import InputError
from svdllm.common.settings import flag_name, flag_of, setting
from svdllm.compression.recipe import Recipe
from svdllm.recovery import Recovery

FIELDS = [
    pytest.param(command, model, name, id=f"{command} {name}")
    for command, model in (("compress", Recipe), ("plan", Recipe), ("recover", Recovery))
    for name in model.model_fields
]
COMMANDS = {name: build(name, function) for name, function in svdllm.cli.COMMANDS.items()}


def flags_of(command: str) -> dict[str, Any]:
    """Spelling -> option, of a command as it is called."""
    return {spelling: option for option in COMMANDS[command].params for spelling in option.opts}


@pytest.mark.parametrize(("command", "model", "name"), FIELDS)
def test_every_setting_has_a_flag_that_says_what_its_field_says(command: str, model: type[BaseModel], name: str):
    field = model.model_fields[name]
    option = flags_of(command)[flag_name(name, field)]
    if option.name != name:  # explicit ranks are given by --allocation
        assert flag_of(option.name, model.model_fields[option.name]).reader == "allocation"
        return
    assert field.description
    assert option.help == help_text(model, name)
    assert option.rich_help_panel == flag_of(name, field).panel
    assert option.default is None
    assert option.required == field.is_required()
    shown = default_text(field) or flag_of(name, field).shown_default or option.show_default or ""
    assert (option.show_default or "") == shown


@pytest.mark.parametrize("model", [Recipe, Recovery])
def test_no_two_settings_share_a_flag_by_mistake(model: type[BaseModel]):
    names = [flag_name(name, field) for name, field in model.model_fields.items() if name != "ranks"]
    assert len(set(names)) == len(names)


def test_help_shows_descriptions_and_defaults(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "3000")
    with pytest.raises(SystemExit):
        svdllm.cli.main(["compress", "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    for name, field in Recipe.model_fields.items():
        if name != "ranks":
            shown = default_text(field) or flag_of(name, field).shown_default
            told = f"{help_text(Recipe, name)}{f' [default: ({shown})]' if shown else ''}"
            assert " ".join(told.split()) in printed, name


def test_plan_takes_what_compress_takes():
    assert set(flags_of("plan")) == {*flags_of("compress"), "--processes"}


@pytest.mark.parametrize("command", ["compare", "ablate"])
def test_settings_of_the_calibration_are_those_of_a_recipe(command: str):
    for name in ("calibration", "samples", "seqlen", "seed", "device", "dtype"):
        option = flags_of(command)[flag_name(name, Recipe.model_fields[name])]
        assert option.help == help_text(Recipe, name)


def test_device_and_dtype_stand_in_one_panel_everywhere():
    for command in COMMANDS:
        for flag, option in flags_of(command).items():
            if flag in ("--device", "--dtype"):
                assert option.rich_help_panel == "Machine", (command, flag)


class Sample(BaseModel):
    count: int = setting(3, "How many.", panel="Machine", ge=1)
    names: tuple[str, ...] = setting(("a", "b"), "Names of it; may be repeated.", panel="Machine")
    limit_size: int | None = setting(None, "Bytes of count.", panel="Data", reader="bytes", shown_default="none")
    kind: str = setting("plain", "Kind, see limit_size.", panel="Data", flag="--type", metavar="KIND")
    fast: bool = setting(False, "Fast.", panel="Data", only_with={"kind": ("plain", "bare"), "count": ("1",)})


def test_options_of_a_model():
    @takes(lambda: options_of(Sample))
    def command(**settings: Any) -> None:
        """Takes a sample."""

    found = {option.name: option for option in build("sample", command).params}
    assert {name: (option.opts, option.secondary_opts) for name, option in found.items()} == {
        "count": (["--count"], []),
        "names": (["--names"], []),
        "limit_size": (["--limit-size"], []),
        "kind": (["--type"], []),
        "fast": (["--fast"], ["--no-fast"]),
    }
    assert {name: option.show_default for name, option in found.items()} == {
        "count": "3",
        "names": "a,b",
        "limit_size": "none",
        "kind": "plain",
        "fast": "no",
    }
    assert found["kind"].help == "Kind, see --limit-size."
    assert found["kind"].metavar == "KIND"
    assert [option.name for option in options_of(Sample, ("count",))] == ["count"]


def test_values_arrive_by_the_names_of_fields():
    given: dict[str, Any] = {}

    @takes(lambda: options_of(Sample))
    def command(**settings: Any) -> None:
        given.update(settings)

    build("sample", command).main(
        ["--count", "2", "--names", "x", "--names", "y", "--type", "t", "--no-fast"], standalone_mode=False
    )
    assert given == {"count": 2, "names": ["x", "y"], "limit_size": None, "kind": "t", "fast": False}


def test_flags_that_are_not_given_stay_unset():
    flags = {"count": None, "names": [], "limit_size": "2KB", "fast": False}
    assert read_flags(Sample, flags) == {"limit_size": 2000, "fast": False}


def test_a_flag_that_does_nothing_is_refused():
    refuse_idle(Sample(kind="bare", fast=True), ["fast"])
    refuse_idle(Sample(kind="other", fast=True), ["kind"])
    message = (
        "--fast does nothing here: it is for kind plain or bare or count 1, and this recipe has kind other and count "
        "3. Leave it out, or choose --type plain or --count 1."
    )
    with pytest.raises(InputError) as refused:
        refuse_idle(Sample(kind="other", fast=True), ["fast"])
    assert str(refused.value) == message


def test_a_field_without_a_flag_is_a_mistake_of_ours():
    class Forgotten(BaseModel):
        size: int = Field(3, description="Size.")

    with pytest.raises(TypeError, match="size has no flag"):
        options_of(Forgotten)


def test_no_function_of_the_command_line_is_long():
    for path in Path(svdllm.cli.__file__).parent.glob("*.py"):
        module = __import__(f"svdllm.cli.{path.stem}", fromlist=["_"]) if path.stem != "__init__" else svdllm.cli
        for name, function in inspect.getmembers(module, inspect.isfunction):
            assert len(inspect.getsource(function).splitlines()) <= 60, name
