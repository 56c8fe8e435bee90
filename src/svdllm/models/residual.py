"""Finds how blocks read the residual and what they add to it, so that it can be turned into another basis.

A block that can be turned has, twice, a norm, linears that read it, and a linear whose output is added to the residual;
nothing else reads the residual or adds to it. A trial run with random outputs of all linears shows it: the block must
return the sum of its input and these outputs. What enters the first block must turn with the embeddings.

LayerNorm subtracts the mean. Where all norms do, nothing reads the mean of the residual: a residual without it is the
same to the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from svdllm.common.errors import UnsupportedModelError
from svdllm.models.linears import is_linear
from svdllm.models.mlps import Arguments, BlockTrial, signature_of
from svdllm.models.norms import subtracts_mean
from svdllm.models.structure import Structure
from svdllm.models.trial_pass import trial_pass


@dataclass(frozen=True, kw_only=True)
class Half:
    """A norm, the branch behind it, and the linears of the branch at the residual.

    ``branch`` is the module whose output is added; the last linear where a block calls those of a branch itself.
    """

    norm: str
    branch: str
    readers: tuple[str, ...]
    writer: str


@dataclass(frozen=True, kw_only=True)
class Residual:
    """All that touches the residual of a model: embeddings, two halves for each block, last norm and head.

    Args:
        embeddings: that of the tokens, which a head may be tied to, then those of positions.
        centred: whether all norms subtract the mean.
    """

    embeddings: tuple[str, ...]
    halves: tuple[Half, ...]
    last_norm: str
    head: str
    centred: bool


def find_residual(skeleton: PreTrainedModel, structure: Structure) -> Residual:
    """Finds what touches the residual.

    Raises:
        UnsupportedModelError: something does that cannot be turned; says what.
    """
    outside = _outside(skeleton, structure.blocks)
    with _embeddings_given(skeleton, outside["embeddings"]):
        arguments = trial_pass(skeleton, structure.blocks, {}).arguments
    targets = {target.name for target in structure.targets}
    known: dict[str, list[Half]] = {}
    halves: list[Half] = []
    for name, given in zip(structure.blocks, arguments, strict=True):
        block = skeleton.get_submodule(name)
        if (key := signature_of(block)) not in known:
            known[key] = _halves_of(block, given, name)
        own = [_in_block(half, name) for half in known[key]]
        if dense := [linear for half in own for linear in (*half.readers, half.writer) if linear not in targets]:
            raise _refused(skeleton, f"{dense[0]} stays dense, and it reads or writes the residual")
        halves += own
    _require_turned_entry(skeleton, structure, outside["embeddings"], arguments[0])
    kinds = {name: subtracts_mean(skeleton.get_submodule(name)) for name in (*_norms(halves), outside["last_norm"])}
    if len(set(kinds.values())) > 1:
        raise _refused(
            skeleton,
            f"{', '.join(name for name, centres in kinds.items() if centres)} subtract the mean, "
            "and the other norms do not",
        )
    return Residual(halves=tuple(halves), centred=any(kinds.values()), **outside)


def _norms(halves: Sequence[Half]) -> list[str]:
    return [half.norm for half in halves]


def _in_block(half: Half, block: str) -> Half:
    return Half(
        norm=f"{block}.{half.norm}",
        branch=f"{block}.{half.branch}",
        readers=tuple(f"{block}.{name}" for name in half.readers),
        writer=f"{block}.{half.writer}",
    )


class _Call(NamedTuple):
    """A call of a child of a block, in a trial."""

    child: str
    inputs: Tensor
    output: Tensor


class _BlockRun:
    """A trial run of a block that notes the calls of its children, in their order."""

    def __init__(self, block: nn.Module, given: Arguments):
        self.block = block
        self.trial = trial = BlockTrial(block, given)
        args, kwargs = trial.given
        self.stream: Tensor = (args[0] if args else kwargs["hidden_states"]).clone().requires_grad_()
        trial.given = ((self.stream, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": self.stream})
        self.calls: list[_Call] = []
        handles = [self._noted(name) for name, child in block.named_children() if any(True for _ in child.parameters())]
        try:
            self.results = trial.run()
        finally:
            for handle in handles:
                handle.remove()

    def _noted(self, child: str) -> Any:
        def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            inputs = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
            self.calls.append(_Call(child, inputs, output[0] if isinstance(output, tuple) else output))

        module = self.trial.stubs.get(child) or self.block.get_submodule(child)
        return module.register_forward_hook(note, with_kwargs=True)

    def reads_stream(self, tensor: Tensor) -> bool:
        """Whether a tensor was computed from the input of the block in another way than through linears."""
        if not tensor.requires_grad:
            return False
        return torch.autograd.grad(tensor.sum(), self.stream, retain_graph=True, allow_unused=True)[0] is not None


def _halves_of(block: nn.Module, given: Arguments, name: str) -> list[Half]:
    """The halves of a block, with names in the block."""
    with torch.enable_grad():
        run = _BlockRun(block, given)
        stream: Tensor = run.stream
        halves = []
        for norm, *branch in _grouped(run, name):
            if not _close(norm.inputs, stream):
                raise _refused(block, f"{name}.{norm.child} does not read the residual, as where branches are parallel")
            halves.append(_half(run, name, norm, branch))
            stream = stream + branch[-1].output.reshape(stream.shape)
        if run.results is None or not _close(run.results[0], stream):
            raise _refused(block, f"{name} does not return the sum of its input and of what its branches return")
        return halves


def _grouped(run: _BlockRun, name: str) -> list[list[_Call]]:
    """The calls of a block: twice a norm and what is called behind it."""
    groups: list[list[_Call]] = []
    for call in run.calls:
        module = run.block.get_submodule(call.child)
        if subtracts_mean(module) is not None:
            groups.append([call])
        elif groups:
            groups[-1].append(call)
        else:
            kind = type(module).__name__
            raise _refused(
                run.block,
                f"{name}.{call.child} ({kind}) is not a norm by the root mean square or LayerNorm, as is expected in "
                "front of every branch",
            )
    names = [call.child for call in run.calls]
    if len(groups) != 2 or min(map(len, groups)) < 2 or len(set(names)) < len(names):
        raise _refused(run.block, f"{name} calls {', '.join(names) or 'nothing'}, expected norm, attention, norm, MLP")
    return groups


def _half(run: _BlockRun, name: str, norm: _Call, branch: Sequence[_Call]) -> Half:
    children, last = {call.child for call in branch}, branch[-1]
    stubs = {linear: stub for linear, stub in run.trial.stubs.items() if linear.split(".")[0] in children}
    readers = [
        linear for linear, stub in stubs.items() if len(stub.inputs) == 1 and _equal(stub.inputs[0], norm.output)
    ]
    writers = [linear for linear, stub in stubs.items() if stub.outputs and _equal(stub.outputs[0], last.output)]
    if len(writers) != 1 or not readers:
        raise _refused(
            run.block, f"{name}.{last.child} does not return the output of one of its linears, or reads no norm"
        )
    others = [linear for linear in stubs if linear not in readers]
    if reading := [linear for linear in others if any(map(run.reads_stream, stubs[linear].inputs))]:
        raise _refused(run.block, f"{name}.{reading[0]} reads the residual in another way than behind {norm.child}")
    return Half(norm=norm.child, branch=last.child, readers=tuple(readers), writer=writers[0])


def _equal(ours: Tensor, theirs: Tensor) -> bool:
    return ours.shape == theirs.shape and torch.equal(ours, theirs)


def _close(ours: Tensor, stream: Tensor) -> bool:
    """Whether a tensor is the residual, whose tokens some blocks put into one dimension."""
    return ours.numel() == stream.numel() and torch.allclose(ours.reshape(stream.shape), stream, atol=1e-4)


def _outside(skeleton: PreTrainedModel, blocks: Sequence[str]) -> dict[str, Any]:
    """Names of embeddings, last norm and head: all that has parameters outside the blocks."""
    inside = tuple(f"{name}." for name in blocks)
    tokens: Any = skeleton.get_input_embeddings()
    embeddings: list[str] = []
    found: dict[str, Any] = {}
    for name, module in skeleton.named_modules():
        if name.startswith(inside) or name in blocks or not any(True for _ in module.parameters(recurse=False)):
            continue
        if isinstance(module, nn.Embedding) and module.embedding_dim == tokens.embedding_dim:
            embeddings.insert(0 if module is tokens else len(embeddings), name)
            continue
        kind = (
            "head"
            if module is skeleton.get_output_embeddings() and is_linear(module)
            else "last_norm"
            if subtracts_mean(module) is not None
            else None
        )
        if kind is None or kind in found:
            raise _refused(
                skeleton,
                f"{name} ({type(module).__name__}) reads or writes the residual beside embedding, norm and head",
            )
        found[kind] = name
    if missing := {"last_norm", "head"} - found.keys():
        raise _refused(skeleton, f"it has no {' and no '.join(sorted(missing))}")
    return found | {"embeddings": tuple(embeddings)}


@contextmanager
def _embeddings_given(skeleton: nn.Module, embeddings: Sequence[str], turn_DD: Tensor | None = None) -> Iterator[None]:
    """Embeddings return random values while the context lasts, the same each time, or these values times a matrix."""

    def give(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(places[module])
        values = torch.randn(output.shape, generator=generator)
        return values if turn_DD is None else values @ turn_DD

    places = {skeleton.get_submodule(name): place for place, name in enumerate(embeddings)}
    handles = [module.register_forward_hook(give) for module in places]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _require_turned_entry(
    skeleton: PreTrainedModel, structure: Structure, embeddings: Sequence[str], entered: Arguments
) -> None:
    """Raises unless what enters the first block is linear in the embeddings, turns with them, and depends on each."""

    def entry(names: Sequence[str], turn_DD: Tensor | None = None) -> Tensor:
        with _embeddings_given(skeleton, names, turn_DD):
            return _hidden(trial_pass(skeleton, structure.blocks, {}).arguments[0])

    states = _hidden(entered)
    vector_D = torch.randn(states.shape[-1], generator=torch.Generator().manual_seed(0))
    vector_D /= vector_D.norm()
    turn_DD = 2 * (torch.eye(len(vector_D)) - 2 * vector_D[:, None] * vector_D)
    if not torch.allclose(entry(embeddings, turn_DD), states @ turn_DD, rtol=0.02, atol=0.02):
        raise _refused(
            skeleton,
            f"{structure.blocks[0]} is handed more than the sum of {' and '.join(embeddings)}, as where positions have "
            "no weights or a norm follows",
        )
    for number, name in enumerate(embeddings[1:], start=1):
        if torch.allclose(entry(embeddings[:number]), entry(embeddings[: number + 1])):
            raise _refused(skeleton, f"{name} is an embedding that {structure.blocks[0]} is not handed")


def _hidden(arguments: Arguments) -> Tensor:
    args, kwargs = arguments
    return (args[0] if args else kwargs["hidden_states"]).float()


def _refused(model: nn.Module, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"The residual of {type(model).__name__} cannot be turned into another basis: {why}. Use another method of "
        "pruning."
    )
