"""The walk through a model with one decoder block resident.

A *skeleton pass* runs the model with its blocks replaced by recorders, so only embeddings and position machinery do
work: it yields the hidden states that enter the first block and, for every block, the arguments it is called with.
Then each block is loaded, run over all batches (its outputs take the place of its inputs) and freed. Masks, rotary
tables and per-layer variants are thus right for any architecture without knowing it.

The *reverse walk* goes from the last block to the first: each is loaded again, run with gradients on the input that the
forward walk kept, and handed the gradient of its output; that yields the gradient of the block before.

A *stream* is what is carried from block to block: hidden states, and the entries of the mappings that blocks write into
for later ones (``shared_state``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from svdllm.common.errors import UnsupportedModelError
from svdllm.common.files import save_tensors
from svdllm.models.added import Added, Followed, Read
from svdllm.models.experts_on_disk import experts_given_back, placed_by, watched_experts_only
from svdllm.models.finite import require_finite
from svdllm.models.hidden_states import HiddenStates
from svdllm.models.hooks import first_argument, replaced
from svdllm.models.loaded_weights import weights_loaded
from svdllm.models.shared_state import Ports, StateGradients, differentiable
from svdllm.models.structure import Structure
from svdllm.models.stubs import Call, Ran, Recorder, Replay, Skip
from svdllm.models.ties import other_names
from svdllm.models.weights import Weights


@dataclass
class Walk:
    """Carries windows of tokens through a model, block by block. Inner models that a text does not run are not loaded.

    Args:
        ids: token ids (windows x seqlen).
        spill_file: keeps the hidden states in this file, instead of in memory.
        on_batch: called as ``on_batch(block, batches done, batches)`` after each batch of each block.
        kept_batches: number of batches whose inputs of every block are kept for a reverse walk.
        kept_folder: the folder for these inputs; all blocks' together are many times what the walk itself carries.
        two_streams: carry a second set of hidden states, for the compressed model, from the same embeddings.
        scratch: a folder for the weights of the experts of the loaded block, in place of the memory.
    """

    weights: Weights
    skeleton: PreTrainedModel
    structure: Structure
    ids: Tensor
    device: torch.device
    dtype: torch.dtype
    batch_tokens: int = 4096
    spill_file: Path | None = None
    on_batch: Callable[[int, int, int], None] | None = None
    kept_batches: int = 0
    kept_folder: Path | None = None
    two_streams: bool = False
    scratch: Path | None = None
    hidden: HiddenStates = field(init=False)
    compressed: HiddenStates | None = field(init=False, default=None)
    calls: list[list[Call]] = field(init=False)  # per batch, per block
    state_gradients: StateGradients = field(init=False, default_factory=StateGradients)

    @property
    def batches(self) -> list[slice]:
        size = max(1, self.batch_tokens // self.ids.shape[1])
        return [slice(start, min(start + size, len(self.ids))) for start in range(0, len(self.ids), size)]

    @cached_property
    def ties(self) -> dict[str, tuple[str, ...]]:
        """Parameter -> other names of the same tensor."""
        return other_names(self.skeleton)

    def blocks(self) -> Iterator[Block]:
        """Runs the skeleton pass, then yields each block, loaded. Its memory is freed before the next block."""
        self._skeleton_pass()
        yield from self._loaded(range(len(self.structure.blocks)))

    def _loaded(self, indices: Iterable[int]) -> Iterator[Block]:
        for index in indices:
            name = self.structure.blocks[index]
            module = self.skeleton.get_submodule(name)
            place = placed_by(module, name, self.scratch)
            with (
                weights_loaded(module, name, self.weights, self.device, self.dtype, ties=self.ties, place=place),
                nullcontext() if self.scratch is None else experts_given_back(module),
            ):
                yield Block(walk=self, index=index, name=name, module=module)

    @property
    def kept_windows(self) -> int:
        return self.batches[: self.kept_batches][-1].stop if self.kept_batches else 0

    def kept_file(self, block: int) -> Path:
        assert self.kept_folder is not None
        return self.kept_folder / f"inputs-{block:04d}.safetensors"

    def reversed_blocks(self, gradient: Callable[[slice, Tensor], Tensor]) -> Iterator[Block]:
        """Yields each block again, loaded, from the last to the first, after a forward walk with kept batches.

        ``gradient(windows, logits)`` gives the gradient of the loss in the logits. The caller calls ``run_backward`` of
        every block.
        """
        with self.head() as head:
            for number in range(self.kept_windows):
                window = slice(number, number + 1)  # logits are wide: one window at a time
                hidden = self.hidden.tensor[window].to(self.device).requires_grad_()
                with torch.enable_grad():
                    logits = head(window, hidden)
                logits.backward(gradient(window, logits.detach()))
                self.hidden.tensor[window] = self._finite_gradient(hidden, f"the last block, window {number}")
        yield from self._loaded(reversed(range(len(self.structure.blocks))))

    def close(self) -> None:
        """Frees the hidden states and removes their files."""
        for states in (self.hidden, self.compressed):
            if states is not None:
                states.close()
        for block in range(len(self.structure.blocks) if self.kept_batches else 0):
            self.kept_file(block).unlink(missing_ok=True)

    def logits(self) -> Tensor:
        """The logits of all windows (windows x seqlen x vocabulary, float32), after the walk."""
        with self.head() as head, torch.no_grad():
            outputs = [head(batch, self.hidden.tensor[batch]).float().cpu() for batch in self.batches]
        return torch.cat(outputs)

    @contextmanager
    def head(self) -> Iterator[Callable[[slice, Tensor], Tensor]]:
        """Loads what follows the blocks; yields a function from windows and their last hidden states to logits."""
        blocks = self.structure.blocks
        counts = dict(zip(blocks, self.structure.num_outputs, strict=True))
        modules = {name: self.skeleton.get_submodule(name) for name in blocks}
        stubs: dict[str, nn.Module] = {name: Skip(module, counts[name]) for name, module in modules.items()}
        stubs[blocks[-1]] = last = Replay(modules[blocks[-1]], counts[blocks[-1]], self.structure.batch_dim)

        def logits_of(windows: slice, hidden: Tensor) -> Tensor:
            last.replay(hidden)
            return self.skeleton(input_ids=self.ids[windows].to(self.device), use_cache=False).logits

        with self.outside_loaded(everything=True), replaced(self.skeleton, stubs):
            yield logits_of

    def _finite_gradient(self, hidden: Tensor, where: str) -> Tensor:
        assert hidden.grad is not None
        return require_finite(hidden.grad, f"The gradient at {where},").to("cpu", self.dtype)

    def _skeleton_pass(self) -> None:
        self.calls = []
        recorders = self.recorders()
        with self.outside_loaded(everything=False), replaced(self.skeleton, recorders), torch.no_grad():
            for batch in self.batches:
                self.skeleton.base_model(input_ids=self.ids[batch].to(self.device), use_cache=False)
                recorded = list(recorders.values())
                first = recorded[0].hidden
                if not self.calls:
                    self._make_room(first.shape[1:])
                self.hidden.tensor[batch] = first.cpu()
                if self.compressed is not None:
                    self.compressed.tensor[batch] = first.cpu()
                self.calls.append(self._shared([recorder.taken() for recorder in recorded]))

    def recorders(self) -> dict[str, Recorder]:
        """Stand-ins for the blocks that note what they are called with."""
        structure = self.structure
        markers = {link.key: torch.empty(0) for link in structure.handed}
        return {
            name: Recorder(
                self.skeleton.get_submodule(name),
                num_outputs,
                structure.batch_dim,
                Ports.of(name, structure.shared_arguments, structure.handed),
                markers,
            )
            for name, num_outputs in zip(structure.blocks, structure.num_outputs, strict=True)
        }

    def _make_room(self, shape: torch.Size) -> None:
        self.hidden = HiddenStates((len(self.ids), *shape), self.dtype, self.spill_file)
        if self.two_streams:
            spill = self.spill_file
            file = None if spill is None else spill.with_name(f"{spill.name}-compressed")
            self.compressed = HiddenStates((len(self.ids), *shape), self.dtype, file)

    def _shared(self, calls: list[Call]) -> list[Call]:
        """Replaces calls by equal ones of the first batch, to keep one copy: arguments rarely depend on the text."""
        known = [call for batch in self.calls[:1] for call in batch]
        return [next((other for other in known if other.same_as(call)), call) for call in calls]

    @contextmanager
    def outside_loaded(self, *, everything: bool):
        """Loads the weights outside the blocks while the context lasts; those of the head with ``everything`` only."""
        skip = tuple(f"{name}." for name in (*self.structure.blocks, *self.structure.idle))
        root = self.skeleton if everything else self.skeleton.base_model
        prefix = "" if root is self.skeleton else f"{self.skeleton.base_model_prefix}."
        with weights_loaded(root, prefix[:-1], self.weights, self.device, self.dtype, skip=skip, ties=self.ties):
            yield


@dataclass(frozen=True)
class Block:
    """A loaded block of a walk."""

    walk: Walk
    index: int
    name: str
    module: nn.Module

    def run(self, *, advance: bool = True) -> None:
        """Runs every batch; the outputs replace the inputs, unless ``advance`` is False.

        Raises:
            NumericalError: a hidden state is NaN or infinite; names block and batch.
        """
        walk = self.walk
        if walk.kept_batches and advance:
            path = walk.kept_file(self.index)
            path.parent.mkdir(parents=True, exist_ok=True)
            save_tensors({"inputs": walk.hidden.tensor[: walk.kept_windows].contiguous()}, path)
        in_part = walk.scratch is not None and not advance
        for number, batch in enumerate(walk.batches):
            with torch.no_grad(), watched_experts_only(self.module) if in_part else nullcontext():
                output, written = self.run_on(walk.hidden, number)
            where = f"batch {number}, windows {batch.start} to {batch.stop - 1},"
            require_finite(output, f"The output of block {self.index} ({self.name}), {where}")
            if not advance:
                continue
            walk.hidden.tensor[batch] = output.to("cpu", walk.dtype)
            walk.hidden.share(number, self.index, written)
            if walk.on_batch is not None:
                walk.on_batch(self.index, number + 1, len(walk.batches))

    def read(self, module: nn.Module, states: HiddenStates, number: int) -> Read:
        """What a module of the block reads for a batch of a stream, and what its output is added to.

        The block is run no further than that takes.
        """
        inputs: list[Tensor] = []
        added = Added()
        before = module.register_forward_pre_hook(
            lambda _, args, kwargs: inputs.append(first_argument(args, kwargs)), with_kwargs=True
        )
        after = module.register_forward_hook(lambda _module, _args, output: added.follow(output))
        try:
            with suppress(Followed), torch.no_grad(), added:
                self.run_on(states, number)
        finally:
            before.remove()
            after.remove()
        if not inputs:
            raise UnsupportedModelError(f"{self.name} ran without calling one of its linears, which it called before.")
        return Read(inputs[0], added.total)

    def run_on(self, states: HiddenStates, number: int) -> Ran:
        """Runs the block on a batch of a stream, which is not changed."""
        walk = self.walk
        hidden = states.tensor[walk.batches[number]].to(walk.device)
        return walk.calls[number][self.index].run(self.module, hidden, states.shared.before(number, self.index))

    def run_backward(self, *, advance: bool = True) -> None:
        """Runs every kept batch with gradients; the gradient of the inputs replaces the gradient of the outputs.

        With ``advance`` False, both stay as they are. Inputs are the hidden states and the shared state that the block
        finds. Outputs are the hidden states and the entries that it writes into the shared state.

        Raises:
            NumericalError: a gradient is NaN or infinite; names block and batch.
        """
        walk = self.walk
        inputs = load_file(walk.kept_file(self.index))["inputs"]
        for number, batch in enumerate(walk.batches[: walk.kept_batches]):
            hidden = inputs[batch].to(walk.device, copy=True).requires_grad_()
            found = differentiable(walk.hidden.shared.before(number, self.index), walk.device)
            with torch.enable_grad():
                output, written = walk.calls[number][self.index].run(self.module, hidden, found)
            pairs = [(output, walk.hidden.tensor[batch].to(walk.device))]
            pairs += walk.state_gradients.of_written(number, written)
            torch.autograd.backward([made for made, _ in pairs], [gradient for _, gradient in pairs])
            if not advance:
                continue
            walk.state_gradients.step_back(number, found, written)
            walk.hidden.tensor[batch] = walk._finite_gradient(
                hidden, f"block {self.index} ({self.name}), batch {number}"
            )
            if walk.on_batch is not None:
                walk.on_batch(len(walk.structure.blocks) - 1 - self.index, number + 1, walk.kept_batches)
        if advance:
            walk.kept_file(self.index).unlink()
