"""Fields of settings models that carry what the command line shows of them: panel, spelling, how text is read."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from pydantic import Field, ValidationError
from pydantic.fields import FieldInfo

Panel = Literal[
    "Budget (exactly one)",
    "Recipe",
    "Method",
    "Allocation",
    "Calibration",
    "Data",
    "Training",
    "Sequential LoRA",
    "Perplexity",
    "Tasks",
    "Measuring",
    "What is measured",
    "Output",
    "Machine",
]
PANELS: tuple[Panel, ...] = get_args(Panel)  # in the order of the help
# How the text of a flag becomes the value of a field whose type does not say it.
Reader = Literal["names", "ratios", "ratio list", "parameters", "bytes", "overrides", "allocation"]

DEVICE = "Device to compute on: auto, cpu, cuda, cuda:1, ..."


@dataclass(frozen=True, kw_only=True)
class Flag:
    """The command line's part of a field.

    Args:
        panel: heading of the help under which the flag stands.
        name: spelling, if it is not that of the field. Fields that share a spelling share the flag.
        metavar: placeholder of the value in the help.
        shown_default: what holds without the flag, if the default of the field does not say it.
        reader: how the text becomes a value; None for the field's own type.
        only_with: other fields and their values; without any of these the flag does nothing, and is refused.
    """

    panel: Panel
    name: str | None = None
    metavar: str | None = None
    shown_default: str | None = None
    reader: Reader | None = None
    only_with: dict[str, tuple[str, ...]] | None = None


def setting(
    default: Any,
    description: str,
    *,
    panel: Panel,
    flag: str | None = None,
    metavar: str | None = None,
    shown_default: str | None = None,
    reader: Reader | None = None,
    only_with: dict[str, tuple[str, ...]] | None = None,
    **constraints: Any,
) -> Any:
    """A field of a pydantic model with its flag; ``constraints`` are those of ``pydantic.Field``.

    ``default`` is ``...`` for a field that must be given.
    """
    cli = Flag(panel=panel, name=flag, metavar=metavar, shown_default=shown_default, reader=reader, only_with=only_with)
    return Field(default, description=description, json_schema_extra=asdict(cli), **constraints)


def flag_of(name: str, field: FieldInfo) -> Flag:
    """The flag of a field of this name.

    Raises:
        TypeError: the field was not made by ``setting``.
    """
    if not isinstance(field.json_schema_extra, dict):
        raise TypeError(f"{name} has no flag: declare it with svdllm.common.settings.setting")
    return Flag(**field.json_schema_extra)  # type: ignore[arg-type]


def flag_name(name: str, field: FieldInfo) -> str:
    """The spelling on the command line, as in ``--target-size``."""
    return flag_of(name, field).name or f"--{name.replace('_', '-')}"


def problems_of(error: ValidationError) -> str:
    """Every problem that pydantic found, in one line: the setting if it is one alone, what is wrong, what was found."""
    lines = []
    problems = error.errors()
    for problem in problems:
        place = problem["loc"]
        if any(len(other["loc"]) > len(place) and other["loc"][: len(place)] == place for other in problems):
            continue  # a list is also called too short where it has items that are wrong
        where = ".".join(str(part) for part in place if not str(part).startswith(("constrained", "tuple", "float")))
        message = problem["msg"].removeprefix("Value error, ")
        found = problem.get("input")
        shown = f" (found {found!r})" if isinstance(found, str | int | float) else ""
        line = f"{where}: {message}{shown}" if where else f"{message}{shown}"
        if line not in lines:
            lines.append(line)
    return "; ".join(lines)
