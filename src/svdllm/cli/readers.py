"""Values of settings read from the text of flags. Every reader takes the text and the flag, and raises InputError."""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal
from typing import Any

from svdllm.common.errors import InputError
from svdllm.common.settings import Reader

PARAMETERS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}
BYTES = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
BYTES |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def read_parameters(text: str, flag: str) -> int:
    """``100M`` or ``1.5B`` parameters."""
    return _amount(text, flag, PARAMETERS, "100M or 1.5B")


def read_bytes(text: str, flag: str) -> int:
    """``300MB`` or ``2GiB``, in bytes."""
    return _amount(text, flag, BYTES, "300MB, 1.5GB or 2GiB")


def read_ratios(text: str, flag: str) -> float | tuple[float, ...]:
    """``0.2``, or several ratios as in ``0.2,0.4``."""
    ratios = read_ratio_list(text, flag)
    return ratios[0] if len(ratios) == 1 else ratios


def read_ratio_list(text: str, flag: str) -> tuple[float, ...]:
    """``0.2,0.4``, or one ratio alone."""
    return tuple(_ratio(part, flag) for part in text.split(","))


def read_names(text: str, flag: str = "") -> tuple[str, ...]:
    """``a,b``: names without the blanks around them."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def read_numbers(text: str, flag: str) -> tuple[int, ...]:
    """``1,8,32``."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"{flag} {text!r} is not a list of numbers; write it like 1,8,32.") from None


def read_overrides(texts: list[str], flag: str) -> dict[str, float]:
    """``REGEX=RATIO``, once for each pattern."""
    pairs = [_override(text, flag) for text in texts]
    patterns = [pattern for pattern, _ in pairs]
    twice = sorted({pattern for pattern in patterns if patterns.count(pattern) > 1})
    if twice:
        raise InputError(f"{flag} names {', '.join(twice)} twice; give each pattern one ratio.")
    return dict(pairs)


def read_allocation(text: str, flag: str) -> str | dict[str, int | str]:
    """The name of an allocation, or the explicit ranks in a file."""
    from svdllm.compression.ranks import ALLOCATIONS
    from svdllm.compression.recipe_files import allocation_file

    return text if text in ALLOCATIONS else allocation_file(text)


READERS: dict[Reader, Callable[[Any, str], Any]] = {
    "names": read_names,
    "ratios": read_ratios,
    "ratio list": read_ratio_list,
    "parameters": read_parameters,
    "bytes": read_bytes,
    "overrides": read_overrides,
    "allocation": read_allocation,
}


def _amount(text: str, flag: str, units: dict[str, int], examples: str) -> int:
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", text)
    amount = 0 if match is None else int(Decimal(match[1]) * units.get(match[2].upper(), 0))
    if amount <= 0:
        raise InputError(f"{flag} {text!r} is not an amount above zero; write it like {examples}.")
    return amount


def _ratio(text: str, flag: str, least: str = "above 0") -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not (0 < value < 1 or (value == 0 and least == "from 0")):
        raise InputError(
            f"{flag} {text.strip()!r} is not a ratio: expected a number {least} and below 1, the share of the linears' "
            "parameters to remove (0.2 removes 20 %)."
        )
    return value


def _override(text: str, flag: str) -> tuple[str, float]:
    pattern, equals, ratio = text.rpartition("=")
    if not equals or not pattern:
        raise InputError(f"{flag} {text!r} is not of the form REGEX=RATIO, as in 'mlp.down_proj=0.1'.")
    return pattern, _ratio(ratio, f"{flag} {pattern}", least="from 0")
