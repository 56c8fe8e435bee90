"""Flags of earlier versions: a command that has the new one says so."""

from __future__ import annotations

from svdllm.common.errors import InputError

# Old flag -> new flag, and what else the old one may be taken for.
RENAMED = {"--calibration": ("--calibration-mode", "; the calibration text is --calib")}


def renamed_flag(error: Exception) -> InputError | None:
    """The error for a flag that a command had under another name; None if it is another error or flag."""
    old = getattr(error, "option_name", None)
    if old not in RENAMED:
        return None
    new, hint = RENAMED[old]
    command = error.ctx.command  # type: ignore[attr-defined]
    if not any(new in option.opts for option in command.params):
        return None
    return InputError(f"{old} was renamed: use {new}{hint}.")
