"""The table of systems in few bits (SVD-LLM, Table 8)."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from svdllm.common.errors import InputError
from svdllm.compression.math.few_bits.billm import USUAL_BITS, billm
from svdllm.compression.math.few_bits.gptq import GROUP_SIZES, gptq, gptq_bits
from svdllm.compression.math.few_bits.pb_llm import pb_llm, pb_llm_bits
from svdllm.compression.math.few_bits.quantised import Quantised
from svdllm.compression.math.few_bits.quip import quip, quip_bits
from svdllm.models.structure import Target

# Weight (out x in), Gram of the inputs, and a source of random signs -> the quantised matrix.
Quantise = Callable[[Tensor, Tensor, torch.Generator], Quantised]
SMALL_GROUPS = (16, 8)  # which only somebody who asks for them gets
GROUPED = re.compile(r"(?P<system>.+)-g(?P<size>\d+)")


@dataclass(frozen=True, kw_only=True)
class System:
    """A row of the table.

    bits: bits of a matrix (rows, columns) by the formula of the authors, as far as known before it is quantised.
    with_groups: makes the functions of the row for a group size; None where the system has none.
    """

    name: str
    summary: str
    source: str
    quantise: Quantise
    bits: Callable[[int, int], float]
    with_groups: Callable[[int], tuple[Quantise, Callable[[int, int], float]]] | None = None
    group_size: int | None = None

    def in_groups_of(self, size: int) -> System:
        """The system with a group size.

        Raises:
            InputError: it has no groups, or the size is no number of inputs.
        """
        if self.with_groups is None:
            raise InputError(f"Method {self.name}-g{size}: {self.name} has no groups. Write {self.name}.")
        if size < 1:
            raise InputError(f"Method {self.name}-g{size}: a group has at least 1 input, found {size}.")
        quantise, bits = self.with_groups(size)
        return replace(self, name=f"{self.name}-g{size}", quantise=quantise, bits=bits, group_size=size)

    def check(self, targets: Sequence[Target]) -> None:
        """Raises InputError unless the group size divides the inputs of every linear."""
        if self.group_size is None:
            return
        for target in targets:
            if target.in_features % self.group_size:
                sizes = (*GROUP_SIZES, *SMALL_GROUPS)
                fitting = [str(size) for size in sizes if all(t.in_features % size == 0 for t in targets)]
                use = f"use a group size of {' or '.join(fitting)}" if fitting else "leave the group size out"
                raise InputError(
                    f"Method {self.name}: groups of {self.group_size} inputs do not divide the {target.in_features} "
                    f"inputs of {target.name}; {use}."
                )


def _gptq(bits: int) -> System:
    def with_groups(size: int | None) -> tuple[Quantise, Callable[[int, int], float]]:
        def quantise(weight_OI: Tensor, gram_II: Tensor, generator: torch.Generator) -> Quantised:
            return gptq(weight_OI, gram_II, bits, size)

        return quantise, partial(_grouped_bits, bits=bits, group_size=size)

    quantise, counted = with_groups(None)
    return System(
        name=f"gptq-{bits}",
        summary=f"{bits} bits with error feedback, a scale for each group",
        source="GPTQ, arXiv 2210.17323",
        quantise=quantise,
        bits=counted,
        with_groups=with_groups,
    )


def _grouped_bits(rows: int, columns: int, **settings: Any) -> float:
    return gptq_bits(rows, columns, **settings)


SYSTEMS: dict[str, System] = {
    "pb-llm": System(
        name="pb-llm",
        summary="a tenth of the weights in 8 bits, the others binary",
        source="PB-LLM, arXiv 2310.00034",
        quantise=lambda weight_OI, gram_II, generator: pb_llm(weight_OI, gram_II),
        bits=pb_llm_bits,
    ),
    "billm": System(
        name="billm",
        summary="binary, salient columns twice",
        source="BiLLM, arXiv 2402.04291",
        quantise=lambda weight_OI, gram_II, generator: billm(weight_OI, gram_II),
        bits=lambda rows, columns: USUAL_BITS * rows * columns,
    ),
    **{f"gptq-{bits}": _gptq(bits) for bits in (2, 3, 4)},
    "quip-2": System(
        name="quip-2",
        summary="rotated, by the codebook E8P of 2 bits, without fine-tuning",
        source="QuIP#, arXiv 2402.04396",
        quantise=quip,
        bits=quip_bits,
    ),
}


def find_system(name: str) -> System | None:
    """The system of a name, as ``gptq-2`` or ``gptq-2-g64``; None for another name.

    Raises:
        InputError: a group size for a system without groups, or an impossible one.
    """
    if name in SYSTEMS:
        return SYSTEMS[name]
    if (found := GROUPED.fullmatch(name)) and found["system"] in SYSTEMS:
        return SYSTEMS[found["system"]].in_groups_of(int(found["size"]))
    return None
