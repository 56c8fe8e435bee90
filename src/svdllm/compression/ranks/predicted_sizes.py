"""Bytes of a compressed model's weight files in any forms: as ``compress`` writes them, or once quantised.

Budgets and plans take the size of a model that does not exist yet from here.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from transformers import PreTrainedModel

from svdllm.checkpoint.quantized import Scheme, can_quantize, linears_in_blocks, make_scheme, quantized_bytes
from svdllm.checkpoint.tensors import (
    Tensors,
    buffer_names,
    empty_files_bytes,
    file_bytes,
    loaded_tensors,
    most_files,
    num_params,
    share_of_files,
)
from svdllm.compression.forms.layout import compressed_tensors
from svdllm.models.chosen import Forms
from svdllm.models.structure import Target

# What torchao adds to the header of a file that names no tensor, and a few tied tensors that are named and in no file.
EMPTY_QUANTIZED_BYTES = 1000


@dataclass(frozen=True)
class WrittenFiles:
    """The files that ``compress`` writes of a model, or of a part of it, that has these tensors."""

    dense: Tensors
    targets: Sequence[Target]
    buffers: Collection[str] = field(default=(), kw_only=True)  # of the tensors: those that are not parameters

    def tensors(self, forms: Forms) -> Tensors:
        """The tensors that ``compress`` writes; targets without a form stay dense."""
        return compressed_tensors(self.dense, self.targets, forms)

    def num_params(self, forms: Forms) -> int:
        """Parameters in all files."""
        return num_params(self.tensors(forms), self.buffers)

    def num_bytes(self, forms: Forms) -> int:
        """Size of all files, exact."""
        return file_bytes(self.tensors(forms))

    def most_bytes(self, forms: Forms, total: int) -> int:
        """An upper limit on the bytes of all files, if it is at most ``total``: the ``share`` of every part, summed."""
        return empty_files_bytes(total) + self.share(forms, total)

    def share(self, forms: Forms, total: int) -> int:
        """An upper limit on the bytes that this part of a model adds to files of ``total`` bytes."""
        return share_of_files(self.tensors(forms), total)

    def part(self, target: Target) -> WrittenFiles:
        """The files of this target alone."""
        names = [name for linear in target.linears for name in self._by_linear.get(linear, ())]
        return replace(self, dense={name: self.dense[name] for name in names}, targets=[target])

    @cached_property
    def _by_linear(self) -> dict[str, list[str]]:
        """Module -> names of its tensors."""
        names: dict[str, list[str]] = {}
        for name in self.dense:
            names.setdefault(name.rpartition(".")[0], []).append(name)
        return names


@dataclass(frozen=True)
class QuantizedFiles(WrittenFiles):
    """The files that ``quantize`` makes of those. Sizes are upper bounds, from shapes alone: torchao is not needed."""

    scheme: Scheme
    linears: Collection[str]  # those of the dense model that are quantised

    @classmethod
    def of(cls, skeleton: PreTrainedModel, targets: Sequence[Target], dtype: torch.dtype, bits: int) -> QuantizedFiles:
        """Made of the skeleton of the dense model; ``dtype`` is that of the source, which unquantised tensors have."""
        scheme = make_scheme(bits, None)
        return cls(
            dense=loaded_tensors(skeleton, dtype),
            targets=targets,
            scheme=scheme,
            linears=frozenset(linear.name for linear in linears_in_blocks(skeleton, scheme)),
            buffers=buffer_names(skeleton),
        )

    def num_bytes(self, forms: Forms) -> int:
        """An upper limit on the bytes of all files, at most 0.5 % above them for models of real size."""
        return self.most_bytes(forms, self.most_bytes(forms, 0))

    def most_bytes(self, forms: Forms, total: int) -> int:
        return most_files(total) * EMPTY_QUANTIZED_BYTES + self.share(forms, total)

    def share(self, forms: Forms, total: int) -> int:
        tensors = self.tensors(forms)
        schemes = {
            name: self.scheme.for_shape(*shape)
            for name, (shape, _) in tensors.items()
            if self._is_quantized(name) and can_quantize(shape[1])
        }
        return quantized_bytes(tensors, schemes, most_files(total))

    def _is_quantized(self, name: str) -> bool:
        owner, _, leaf = name.rpartition(".")
        return leaf == "weight" and (owner in self.linears or owner.endswith((".svd_u", ".svd_v")))
