"""Finds how blocks read the residual and what they add to it, so that it can be turned into another basis.

A block that can be turned has, twice, a norm by the root mean square, linears that read it, and a linear whose output
is added to the residual; nothing else reads the residual or adds to it. A trial run with random outputs of all linears
shows it: the block must return the sum of its input and these outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from svdllm.common.errors import UnsupportedModelError
from svdllm.models.linears import is_linear
from svdllm.models.mlps import Arguments, BlockTrial, signature_of
from svdllm.models.structure import Structure
from svdllm.models.trial_pass import trial_pass

EPSILONS = ("variance_epsilon", "eps", "epsilon")  # names by which norms keep it


@dataclass(frozen=True, kw_only=True)
class Half:
    """A norm, the branch behind it, and the linears of the branch at the residual."""

    norm: str
    branch: str
    readers: tuple[str, ...]
    writer: str


@dataclass(frozen=True, kw_only=True)
class Residual:
    """All that touches the residual of a model: embedding, two halves for each block, last norm and head."""

    embedding: str
    halves: tuple[Half, ...]
    last_norm: str
    head: str


def find_residual(skeleton: PreTrainedModel, structure: Structure) -> Residual:
    """Finds what touches the residual.

    Raises:
        UnsupportedModelError: something does that cannot be turned; says what.
    """
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
    return Residual(halves=tuple(halves), **_outside(skeleton, structure.blocks))


def _in_block(half: Half, block: str) -> Half:
    return Half(
        norm=f"{block}.{half.norm}",
        branch=f"{block}.{half.branch}",
        readers=tuple(f"{block}.{name}" for name in half.readers),
        writer=f"{block}.{half.writer}",
    )


def norm_scale(norm: nn.Module, weight: Tensor) -> Tensor:
    """What a norm by the root mean square multiplies each feature by, for a value of its parameter (float64)."""
    ones = torch.ones(1, len(weight), dtype=torch.float64)
    output: Any = functional_call(norm, {"weight": weight.double()}, (ones,))
    return output[0].double() * (1 + epsilon_of(norm)) ** 0.5


def epsilon_of(norm: nn.Module) -> float:
    return next(float(value) for name in EPSILONS if (value := getattr(norm, name, None)) is not None)


def _is_root_mean_square(norm: nn.Module) -> bool:
    """Whether a module computes ``scale x / rms(x)``, with one parameter, which the scale depends on."""
    parameters = dict(norm.named_parameters())
    if list(parameters) != ["weight"] or not any(hasattr(norm, name) for name in EPSILONS):
        return False
    width = parameters["weight"].numel()
    generator = torch.Generator().manual_seed(0)
    weight, inputs = (torch.randn(shape, generator=generator) + 1 for shape in ((width,), (3, width)))
    try:
        output: Any = functional_call(norm, {"weight": weight}, (inputs,))
        mean = inputs.square().mean(-1, keepdim=True)
        expected = norm_scale(norm, weight) * inputs / (mean + epsilon_of(norm)).sqrt()
    except Exception:  # of any kind, by the class: it is something else
        return False
    return output.shape == inputs.shape and torch.allclose(output.double(), expected, rtol=1e-4, atol=1e-5)


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
        names = [call.child for call in run.calls]
        if run.results is None or len(names) != 4 or len(set(names)) != 4:
            raise _refused(block, f"{name} calls {', '.join(names) or 'nothing'}, expected norm, attention, norm, MLP")
        stream: Tensor = run.stream
        halves = []
        for norm, branch in (run.calls[:2], run.calls[2:]):
            module = block.get_submodule(norm.child)
            if not _is_root_mean_square(module):
                kind = type(module).__name__
                raise _refused(
                    block,
                    f"{name}.{norm.child} ({kind}) is not a norm by the root mean square alone, as is expected in "
                    "front of every branch",
                )
            if not torch.allclose(norm.inputs, stream, atol=1e-5):
                raise _refused(block, f"{name}.{norm.child} does not read the residual, as where branches are parallel")
            halves.append(_half(run, name, norm, branch))
            stream = stream + branch.output
        if not torch.allclose(run.results[0], stream, atol=1e-4):
            raise _refused(block, f"{name} does not return the sum of its input and of what its branches return")
        return halves


def _half(run: _BlockRun, name: str, norm: _Call, branch: _Call) -> Half:
    stubs = {linear: stub for linear, stub in run.trial.stubs.items() if linear.startswith(f"{branch.child}.")}
    readers = [
        linear for linear, stub in stubs.items() if len(stub.inputs) == 1 and _equal(stub.inputs[0], norm.output)
    ]
    writers = [linear for linear, stub in stubs.items() if stub.outputs and _equal(stub.outputs[0], branch.output)]
    if len(writers) != 1 or not readers:
        raise _refused(
            run.block, f"{name}.{branch.child} does not return the output of one of its linears, or reads no norm"
        )
    others = [linear for linear in stubs if linear not in readers]
    if reading := [linear for linear in others if any(map(run.reads_stream, stubs[linear].inputs))]:
        raise _refused(run.block, f"{name}.{reading[0]} reads the residual in another way than behind {norm.child}")
    return Half(norm=norm.child, branch=branch.child, readers=tuple(readers), writer=writers[0])


def _equal(ours: Tensor, theirs: Tensor) -> bool:
    return ours.shape == theirs.shape and torch.equal(ours, theirs)


def _outside(skeleton: PreTrainedModel, blocks: Sequence[str]) -> dict[str, str]:
    """Names of embedding, last norm and head: all that has parameters outside the blocks."""
    inside = tuple(f"{name}." for name in blocks)
    found: dict[str, str] = {}
    for name, module in skeleton.named_modules():
        if name.startswith(inside) or name in blocks or not any(True for _ in module.parameters(recurse=False)):
            continue
        kind = (
            "embedding"
            if isinstance(module, nn.Embedding)
            else "head"
            if module is skeleton.get_output_embeddings() and is_linear(module)
            else "last_norm"
            if _is_root_mean_square(module)
            else None
        )
        if kind is None or kind in found:
            raise _refused(
                skeleton,
                f"{name} ({type(module).__name__}) reads or writes the residual beside embedding, norm and head",
            )
        found[kind] = name
    if missing := {"embedding", "last_norm", "head"} - found.keys():
        raise _refused(skeleton, f"it has no {' and no '.join(sorted(missing))}")
    return found


def _refused(model: nn.Module, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"The residual of {type(model).__name__} cannot be turned into another basis: {why}. Use another method of "
        "pruning."
    )
