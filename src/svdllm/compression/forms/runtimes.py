"""The programs that models are made for, and the forms that each can load."""

from __future__ import annotations

from dataclasses import dataclass

from svdllm.compression.forms import FORMS


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """A program that runs models.

    forms: that it loads beside dense matrices.
    joins: whether it joins linears that read the same tensor (query, key and value; gate and up) to one matrix, so that
        they need one form.
    vocabulary: whether it loads an embedding in few bits.
    """

    name: str
    summary: str
    forms: tuple[str, ...]
    joins: bool = False
    vocabulary: bool = True


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
        Runtime(
            name="vllm",
            summary="8 and 4 bits, equal for linears that it joins, and no embeddings",
            forms=("int8", "int4"),
            joins=True,
            vocabulary=False,
        ),
    )
}
