"""Bytes of a compressed model's weight files for any ranks: as they are written, or as they are once quantised.

The one account from which budgets and plans take the size of a model that does not exist yet.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from transformers import PreTrainedModel

from svdllm.checkpoint.quantized import (
    QuantizedLinear,
    Scheme,
    can_quantize,
    file_notes,
    linears_in_blocks,
    make_scheme,
    quantized_linear,
    quantized_tensors,
)
from svdllm.checkpoint.tensors import (
    NO_NOTES,
    Notes,
    Tensors,
    buffer_names,
    compressed_tensors,
    empty_file_bytes,
    file_bytes,
    loaded_tensors,
    num_params,
    share_of_files,
    tied_names,
)
from svdllm.models.structure import Target, linear_ranks


@dataclass(frozen=True)
class WrittenFiles:
    """What ``compress`` writes of a model, or of a part of it, that has these tensors."""

    dense: Tensors
    targets: Sequence[Target]
    buffers: Collection[str] = field(default=(), kw_only=True)  # of the tensors: those that are no parameters

    def content(self, ranks: Mapping[str, int]) -> tuple[Tensors, Notes]:
        """What files and headers hold; targets without a rank stay dense."""
        return compressed_tensors(self.dense, self.targets, ranks), NO_NOTES

    def num_params(self, ranks: Mapping[str, int]) -> int:
        """Parameters in all files."""
        return num_params(self.content(ranks)[0], self.buffers)

    def num_bytes(self, ranks: Mapping[str, int]) -> int:
        """Exact size of all files."""
        tensors, notes = self.content(ranks)
        return file_bytes(tensors, notes=notes)

    def most_bytes(self, ranks: Mapping[str, int], total: int) -> int:
        """The same from above, if it is no more than ``total``: a sum to which each target adds its ``share``."""
        return empty_file_bytes(total) + self.share(ranks, total)

    def share(self, ranks: Mapping[str, int], total: int) -> int:
        """What this part of a model adds to files of ``total`` bytes, at most."""
        tensors, notes = self.content(ranks)
        return share_of_files(tensors, total, notes)

    def part(self, target: Target) -> WrittenFiles:
        """Of this target alone."""
        names = [name for name in self.dense if name.rpartition(".")[0] in target.linears]
        return replace(self, dense={name: self.dense[name] for name in names}, targets=[target])


@dataclass(frozen=True)
class QuantizedFiles(WrittenFiles):
    """What ``quantize`` makes of that. Made of nothing but shapes: torchao is not needed."""

    scheme: Scheme
    dtype: torch.dtype  # of the source: what is not quantised has it
    linears: Mapping[str, QuantizedLinear]  # those of the dense model that are quantised
    tied: Sequence[str]  # tensors that headers name and files do not hold

    @classmethod
    def of(cls, skeleton: PreTrainedModel, targets: Sequence[Target], dtype: torch.dtype, bits: int) -> QuantizedFiles:
        """By the skeleton of the dense model."""
        scheme = make_scheme(bits, None)
        return cls(
            dense=loaded_tensors(skeleton, dtype),
            targets=targets,
            scheme=scheme,
            dtype=dtype,
            linears={linear.name: linear for linear in linears_in_blocks(skeleton, scheme)},
            tied=sorted(tied_names(skeleton)),
            buffers=buffer_names(skeleton),
        )

    def content(self, ranks: Mapping[str, int]) -> tuple[Tensors, Notes]:
        written, _ = super().content(ranks)
        factorised = linear_ranks(self.targets, ranks)
        linears = [linear for name, linear in self.linears.items() if name not in factorised]
        for target in self.targets:
            if (rank := ranks.get(target.name)) is None:
                continue
            linears.append(quantized_linear(f"{target.linears[0]}.svd_v", rank, target.in_features, self.scheme))
            if can_quantize(rank):
                parts = target.parts or ((target.name, target.out_features),)
                linears += [quantized_linear(f"{name}.svd_u", rows, rank, self.scheme) for name, rows in parts]
        return quantized_tensors(written, linears), file_notes([*written, *self.tied], linears, self.dtype)

    def part(self, target: Target) -> QuantizedFiles:
        linears = {name: self.linears[name] for name in target.linears if name in self.linears}
        return replace(self, dense=super().part(target).dense, targets=[target], linears=linears, tied=())
