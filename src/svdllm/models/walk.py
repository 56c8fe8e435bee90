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
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from svdllm.common.files import save_tensors
from svdllm.common.processes import ALONE, Processes
from svdllm.models.batches import Batches, windows_per_batch
from svdllm.models.experts_on_disk import experts_given_back, placed_by, watched_experts_only
from svdllm.models.finite import require_finite
from svdllm.models.hidden_states import HiddenStates
from svdllm.models.hooks import replaced
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
        ids: token ids (windows x seqlen) of this process.
        spill_file: keeps the hidden states in this file, instead of in memory.
        on_batch: called as ``on_batch(block, batches done, batches)`` after each batch of each block.
        kept_batches: number of the text's first batches whose inputs of every block are kept for a reverse walk.
        kept_folder: the folder for these inputs; all blocks' together are many times what the walk itself carries.
        two_streams: carry a second set of hidden states, for the compressed model, from the same embeddings.
        scratch: a folder for the weights of the experts of the loaded block, in place of the memory.
        processes: share the text, of which ``dealt`` are the batches of this one; by default it has all of them.
    """

    weights: Weights
    skeleton: PreTrainedModel
    structure: Structure
    ids: Tensor
    device: torch.device
    dtype: torch.dtype
    batch_tokens: int = 4096
    spill_file: Path | None = None
    on_batch: Callable[[int, int, int], None] = lambda block, done, of: None
    kept_batches: int = 0
    kept_folder: Path | None = None
    two_streams: bool = False
    scratch: Path | None = None
    processes: Processes = ALONE
    dealt: Batches | None = None
    hidden: HiddenStates = field(init=False)
    compressed: HiddenStates | None = field(init=False, default=None)
    calls: list[list[Call]] = field(init=False)  # per batch, per block
    state_gradients: StateGradients = field(init=False, default_factory=StateGradients)

    @property
    def text(self) -> Batches:
        """The batches and their places in the text."""
        return self.dealt or Batches.of(len(self.ids), windows_per_batch(self.batch_tokens, self.ids.shape[1]))

    @property
    def batches(self) -> list[slice]:
        """The windows of every batch."""
        return self.text.slices

    @property
    def kept(self) -> list[int]:
        """The batches that a reverse walk follows."""
        return [batch for batch, number in enumerate(self.text.numbers) if number < self.kept_batches]

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

    def kept_file(self, block: int) -> Path:
        assert self.kept_folder is not None
        return self.kept_folder / f"inputs-{block:04d}.safetensors"

    def reversed_blocks(self, gradient: Callable[[slice, Tensor], Tensor]) -> Iterator[Block]:
        """Yields each block again, loaded, from the last to the first, after a forward walk with kept batches.

        ``gradient(windows, logits)`` gives the gradient of the loss in the logits. The caller calls ``run_backward`` of
        every block.
        """
        with self.head() as head:
            for number in [window for batch in self.kept for window in range(len(self.ids))[self.batches[batch]]]:
                window = slice(number, number + 1)  # logits are wide: one window at a time
                hidden = self.hidden.tensor[window].to(self.device).requires_grad_()
                with torch.enable_grad():
                    logits = head(window, hidden)
                logits.backward(gradient(window, logits.detach()))
                where = f"the last block, window {self.text.windows[number]}"
                self.hidden.tensor[window] = self._finite_gradient(hidden, where)
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

    def run(self, *, advance: bool = True, after_round: Callable[[], None] = lambda: None) -> None:
        """Runs every batch; the outputs replace the inputs, unless ``advance`` is False.

        ``after_round`` is called after each round of batches, as often in every process.

        Raises:
            NumericalError: a hidden state is NaN or infinite; names block and batch.
        """
        walk = self.walk
        if walk.kept_batches and advance:
            path = walk.kept_file(self.index)
            path.parent.mkdir(parents=True, exist_ok=True)
            save_tensors({str(number): walk.hidden.tensor[walk.batches[number]] for number in walk.kept}, path)
        in_part = walk.scratch is not None and not advance
        for numbers in walk.text.rounds:
            for number in numbers:
                with torch.no_grad(), watched_experts_only(self.module) if in_part else nullcontext():
                    ran = self.run_on(walk.hidden, number)
                self.keep(walk.hidden, number, ran, advance=advance)
            after_round()

    def run_on(self, states: HiddenStates, number: int) -> Ran:
        """Runs the block on a batch of a stream, which is not changed."""
        walk = self.walk
        hidden = states.tensor[walk.batches[number]].to(walk.device)
        return walk.calls[number][self.index].run(self.module, hidden, states.shared.before(number, self.index))

    def keep(self, states: HiddenStates, number: int, ran: Ran, *, advance: bool = True) -> None:
        """Carries a batch of a stream on, of which the block made this; else only checks it. Raises as ``run``."""
        walk, which = self.walk, "the compressed " if states is self.walk.compressed else ""
        require_finite(ran.hidden, f"The output of {which}block {self.index} ({self.name}), {walk.text.where(number)}")
        if advance:
            states.tensor[walk.batches[number]] = ran.hidden.to("cpu", walk.dtype)
            states.share(number, self.index, ran.written)
            walk.on_batch(self.index, number + 1, len(walk.batches))

    def run_backward(self, *, advance: bool = True, after_round: Callable[[], None] = lambda: None) -> None:
        """Runs every kept batch with gradients; the gradient of the inputs replaces the gradient of the outputs.

        With ``advance`` False, both stay as they are. Inputs are the hidden states and the shared state that the block
        finds. Outputs are the hidden states and the entries that it writes into the shared state. ``after_round`` is
        called as by ``run``.

        Raises:
            NumericalError: a gradient is NaN or infinite; names block and batch.
        """
        walk = self.walk
        with safe_open(walk.kept_file(self.index), framework="pt") as inputs:
            for numbers in walk.text.rounds:
                for number in numbers:
                    if number in walk.kept:
                        self._run_back(number, inputs.get_tensor(str(number)), advance=advance)
                after_round()
        if advance:
            walk.kept_file(self.index).unlink()

    def _run_back(self, number: int, inputs: Tensor, *, advance: bool) -> None:
        walk, batch = self.walk, self.walk.batches[number]
        hidden = inputs.to(walk.device, copy=True).requires_grad_()
        found = differentiable(walk.hidden.shared.before(number, self.index), walk.device)
        with torch.enable_grad():
            output, written = walk.calls[number][self.index].run(self.module, hidden, found)
        pairs = [(output, walk.hidden.tensor[batch].to(walk.device))]
        pairs += walk.state_gradients.of_written(number, written)
        torch.autograd.backward([made for made, _ in pairs], [gradient for _, gradient in pairs])
        if not advance:
            return
        walk.state_gradients.step_back(number, found, written)
        where = f"block {self.index} ({self.name}), {walk.text.where(number)[:-1]}"
        walk.hidden.tensor[batch] = walk._finite_gradient(hidden, where)
        walk.on_batch(len(walk.structure.blocks) - 1 - self.index, walk.kept.index(number) + 1, len(walk.kept))
