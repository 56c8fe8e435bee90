"""SliceGPT (arXiv 2401.15024): turns the residual into its principal axes and keeps the first of them.

Between two positions the residual is turned by a small matrix, which the model keeps. The axes of a position are those
of the residual that the model has there when everything before is sliced. Positions are in front of each half of a
block, and at the end.

Norms are by the root mean square in the end: their scales and shifts go into the linears that read them. LayerNorm
subtracts the mean, too; then the axes are those of the residual without its mean, so that nothing writes one.

Legend: D features of the residual, K those that are kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from svdllm.checkpoint.tensors import Tensors, num_params
from svdllm.common.errors import InputError
from svdllm.common.files import save_tensors
from svdllm.models.norms import epsilon_of, scale_and_shift
from svdllm.models.read import read
from svdllm.models.residual import Half, Residual, find_residual
from svdllm.models.walk import Block, Walk
from svdllm.pruning.job import Job, Method
from svdllm.pruning.made import Made

ROUND_TO = 8


def principal_axes(gram_DD: Tensor, width: int) -> Tensor:
    """The leading eigenvectors of a Gram (``D x K``, float64). A ridge, as the authors add, would not change them."""
    _, vectors_DD = torch.linalg.eigh(gram_DD.double())  # ascending
    return vectors_DD.flip(1)[:, :width].contiguous()


class Sliced:
    """The tensors of a sliced model of ``width`` features, by name.

    Args:
        axes: folder of the axes of all positions.
    """

    def __init__(self, job: Job, residual: Residual, width: int, axes: Path):
        self.job, self.residual, self.width, self.axes = job, residual, width, axes
        self.full_width = job.targets[residual.halves[0].readers[0]].in_features
        self.readers = {name: index for index, half in enumerate(residual.halves) for name in half.readers}
        self.readers[residual.head] = len(residual.halves)
        self.writers = {half.writer: index for index, half in enumerate(residual.halves)}
        self.norms = {half.norm: index for index, half in enumerate(residual.halves)}
        stored = job.subject.stored
        self.adds_biases = any(f"{norm}.bias" in stored for norm in (*self.norms, residual.last_norm))
        self._loaded: dict[int, Tensor] = {}

    @property
    def layout(self) -> Tensors:
        """Names, shapes and dtypes of all tensors."""
        stored = self.job.subject.stored
        tied = stored[self._stored_name(f"{self.residual.head}.weight")]
        layout: Tensors = {}
        for name, (shape, dtype) in (stored | {f"{self.residual.head}.weight": tied}).items():
            owner, _, leaf = name.rpartition(".")
            if owner == self.residual.last_norm:
                continue
            if owner in self.norms:
                layout[f"{owner}.shortcut.weight"] = (self.width, self.width), dtype
            elif leaf == "bias":
                layout[name] = (self.width,) if owner in self.writers else shape, dtype
            elif owner in self.writers:
                layout[name] = self._sides(owner, self.width, shape[0 if self._is_conv1d(owner) else 1]), dtype
            elif owner in self.readers:
                outputs = shape[1 if self._is_conv1d(owner) else 0]
                layout[name] = self._sides(owner, outputs, self.width), dtype
                if self.adds_biases:
                    layout[f"{owner}.bias"] = (outputs,), dtype
            elif owner in self.residual.embeddings:
                layout[name] = (shape[0], self.width), dtype
            else:
                layout[name] = shape, dtype
        return layout

    def _stored_name(self, name: str) -> str:
        """The name of a weight in the source: a tied head is the embedding of the tokens."""
        return name if name in self.job.subject.stored else f"{self.residual.embeddings[0]}.weight"

    def _is_conv1d(self, owner: str) -> bool:
        return owner in self.job.targets and self.job.targets[owner].is_conv1d

    def _sides(self, owner: str, outputs: int, inputs: int) -> tuple[int, int]:
        return (inputs, outputs) if self._is_conv1d(owner) else (outputs, inputs)

    @property
    def entry(self) -> dict[str, Any]:
        """What the config says."""
        residual, sizes = self.residual, {"width": self.width, "full_width": self.full_width}
        norm = self.job.subject.skeleton.get_submodule
        return {
            "forms": {name: {"form": "narrow", "in_features": self.width} for name in self.readers}
            | {name: {"form": "narrow", "out_features": self.width} for name in self.writers},
            "embedding_widths": dict.fromkeys(residual.embeddings, self.width),
            "norms": {
                half.norm: {**sizes, "eps": epsilon_of(norm(half.norm)), "branch": half.branch}
                for half in residual.halves
            }
            | {residual.last_norm: {**sizes, "eps": epsilon_of(norm(residual.last_norm))}},
            **({"bias_correction": True} if self.adds_biases else {}),
        }

    def axes_at(self, position: int) -> Tensor:
        """The axes of a position (``D x K``, float64)."""
        if position not in self._loaded:
            while len(self._loaded) > 2:
                del self._loaded[next(iter(self._loaded))]
            self._loaded[position] = load_file(self.axes / f"axes-{position:04d}.safetensors")["axes"]
        return self._loaded[position]

    def get(self, name: str) -> Tensor:
        """A tensor of the sliced model, in the dtype of the source."""
        owner, _, leaf = name.rpartition(".")
        weights = self.job.subject.weights
        if owner.endswith(".shortcut"):
            position = self.norms[owner.removesuffix(".shortcut")]
            turn_KK = self.axes_at(position).mT @ self.axes_at(position + 1)
            tensor = (turn_KK - torch.eye(self.width, dtype=torch.float64)).mT
        elif owner in self.residual.embeddings:
            tensor = weights.get(name).double() @ self.axes_at(0)
        elif owner in self.writers:
            axes_DK = self.axes_at(self.writers[owner] + 1)
            tensor = axes_DK.mT @ (self._weight(owner) if leaf == "weight" else weights.get(name).double())
        elif owner in self.readers:
            position = self.readers[owner]
            scale_D, shift_D = self._norm_at(position)
            weight_OD = self._weight(owner)
            tensor = (weight_OD * scale_D) @ self.axes_at(position) if leaf == "weight" else weight_OD @ shift_D
            if leaf == "bias" and name in self.job.subject.stored:
                tensor += weights.get(name).double()
        else:
            return weights.get(name)
        if leaf == "weight" and self._is_conv1d(owner):
            tensor = tensor.mT
        return tensor.to(self.layout_dtype(name)).contiguous()

    def layout_dtype(self, name: str) -> torch.dtype:
        stored = self.job.subject.stored
        return stored.get(name, stored[f"{self.residual.embeddings[0]}.weight"])[1]

    def _weight(self, owner: str) -> Tensor:
        """The dense weight of a linear (``out x in``, float64)."""
        weight = self.job.subject.weights.get(self._stored_name(f"{owner}.weight")).double()
        return weight.mT if self._is_conv1d(owner) else weight

    def _norm_at(self, position: int) -> tuple[Tensor, Tensor]:
        """Scale and shift of the norm in front of a position."""
        halves = self.residual.halves
        name = halves[position].norm if position < len(halves) else self.residual.last_norm
        norm = self.job.subject.skeleton.get_submodule(name)
        parameters = {leaf: self.job.subject.weights.get(f"{name}.{leaf}") for leaf, _ in norm.named_parameters()}
        return scale_and_shift(norm, parameters)


def width_for(job: Job, residual: Residual) -> int | None:
    """The largest width, a multiple of eight, at which the whole model has as few parameters as the ratio asks for.

    None if there is none. The matrices that turn the residual and an untied head count.
    """
    wanted = num_params(job.subject.stored, job.subject.buffers) - job.ratio * job.num_params
    full = job.targets[residual.halves[0].readers[0]].in_features
    for width in range(full // ROUND_TO * ROUND_TO, 0, -ROUND_TO):
        if num_params(Sliced(job, residual, width, Path()).layout, job.subject.buffers) <= wanted:
            return width
    return None


def prune(job: Job, ids: Tensor) -> Made:
    """Finds the axes position by position, with everything before sliced."""
    stored = job.subject.stored
    if not job.ratio:
        return Made(layout=stored, tensors=job.subject.weights, entry={}, removed=0, details={"width": None})
    residual = find_residual(job.subject.skeleton, job.subject.structure)
    width = width_for(job, residual)
    assert width is not None
    sliced = Sliced(job, residual, width, job.work / "axes")
    sliced.axes.mkdir(parents=True, exist_ok=True)
    with job.walk(ids) as walk:
        for block in job.blocks(walk, "axes"):
            halves = residual.halves[2 * block.index : 2 * block.index + 2]
            if not block.index:
                _slice(walk, sliced, 0, (walk.hidden.tensor[batch] for batch in walk.batches))
            _slice(walk, sliced, 2 * block.index + 1, _after_first(block, halves))
            _slice(walk, sliced, 2 * block.index + 2, _after_second(block, halves[0]))
    layout = sliced.layout
    removed = num_params(stored, job.subject.buffers) - num_params(layout, job.subject.buffers)
    return Made(
        layout=layout,
        tensors=sliced,
        entry=sliced.entry,
        fields={"tie_word_embeddings": False},
        removed=removed,
        details={"width": width, "full_width": sliced.full_width},
    )


def _slice(walk: Walk, sliced: Sliced, position: int, states: Iterator[Tensor]) -> None:
    """Finds the axes of the residual (batches of ``windows x seqlen x D``), and keeps its part along them."""
    gram_DD = torch.zeros(sliced.full_width, sliced.full_width, dtype=torch.float64, device=walk.device)
    for batch, state in zip(walk.batches, states, strict=True):
        own = walk.hidden.tensor[batch]
        if sliced.residual.centred:
            state = state - state.mean(-1, keepdim=True)
        tokens = state.to(walk.device).flatten(end_dim=-2).double()
        gram_DD += tokens.mT @ tokens
        walk.hidden.tensor[batch] = state.reshape(own.shape).to("cpu", walk.dtype)
    axes_DK = principal_axes(gram_DD, sliced.width)
    if sliced.residual.centred:
        axes_DK -= axes_DK.mean(0)  # where the mean itself is among the last axes
    save_tensors({"axes": axes_DK.cpu()}, sliced.axes / f"axes-{position:04d}.safetensors")
    for batch in walk.batches:
        state = walk.hidden.tensor[batch].to(walk.device).double()
        walk.hidden.tensor[batch] = (state @ axes_DK @ axes_DK.mT).to("cpu", walk.dtype)


def _after_first(block: Block, halves: tuple[Half, ...]) -> Iterator[Tensor]:
    """The residual that the second norm reads, batch by batch."""
    norm = block.walk.skeleton.get_submodule(halves[1].norm)
    for number in range(len(block.walk.batches)):
        yield read(block, norm, block.walk.hidden, number).inputs


def _after_second(block: Block, first: Half) -> Iterator[Tensor]:
    """The output of the block whose first half adds nothing to the residual, batch by batch."""
    branch = block.walk.skeleton.get_submodule(first.branch)

    def add_nothing(module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (torch.zeros_like(output[0]), *output[1:])
        return torch.zeros_like(output)

    for number in range(len(block.walk.batches)):
        handle = branch.register_forward_hook(add_nothing, with_kwargs=True)
        try:
            with torch.no_grad():
                yield block.run_on(block.walk.hidden, number).hidden
        finally:
            handle.remove()


def check(job: Job) -> None:
    """Raises unless the residual can be turned and sliced to as few parameters as the ratio asks for.

    Raises:
        UnsupportedModelError: something reads or writes the residual that cannot be turned.
        InputError: no width is small enough.
    """
    residual = find_residual(job.subject.skeleton, job.subject.structure)
    if job.ratio and width_for(job, residual) is None:
        raise InputError(
            f"Ratio {job.ratio:g} would leave no feature of the residual of {type(job.subject.skeleton).__name__}: its "
            "embedding, its head and the matrices that turn the residual are too large. Choose a lower ratio."
        )


SLICE_GPT = Method(
    name="slicegpt",
    summary="the residual in its principal axes, of which the last are left out",
    source="SliceGPT, arXiv 2401.15024",
    samples=128,
    seqlen=2048,
    check=check,
    prune=prune,
)
