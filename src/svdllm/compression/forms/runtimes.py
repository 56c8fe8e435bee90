"""The programs that models are made for, and the forms that each can load."""

from __future__ import annotations

from dataclasses import dataclass

from svdllm.compression.forms import FORMS


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """A program that runs models.

    forms: that it loads beside dense matrices.
    """

    name: str
    summary: str
    forms: tuple[str, ...]


DEFAULT_RUNTIME = "transformers"
RUNTIMES = {
    row.name: row
    for row in (
        Runtime(
            name="transformers",
            summary="every form",
            forms=tuple(name for name, form in FORMS.items() if form.curve),
        ),
        Runtime(
            name="llama.cpp",
            summary="what `svdllm export --format gguf` writes without loss",
            forms=("int8", "int5", "int4"),
        ),
    )
}
