"""Makes a pass over eight tokens through a model without data, and watches blocks and linears in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import PreTrainedModel

from svdllm.common.errors import UnsupportedModelError, said_by
from svdllm.models.experts import experts_tried
from svdllm.models.hooks import experts_computed, first_argument, replaced, to_device
from svdllm.models.linears import linear_shape
from svdllm.models.loaded_weights import tensors_replaced
from svdllm.models.mlps import Arguments
from svdllm.models.shared_state import WrittenArguments
from svdllm.models.stubs import BlockStub

TRIAL_TOKENS = 8


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What a trial pass has shown.

    blocks: the blocks that were run, in their order.
    groups: called linear -> the first linear that read the same tensors.
    read: linears of which something else was asked, such as their weight.
    num_outputs, arguments: of every block; see ``Structure``.
    batch_dim: the dimension of texts in the hidden states.
    idle: inner models of which nothing was called.
    """

    blocks: tuple[str, ...]
    groups: dict[str, str]
    read: frozenset[str]
    num_outputs: tuple[int, ...]
    batch_dim: int
    arguments: list[Arguments]
    written: WrittenArguments
    idle: tuple[str, ...]


def trial_pass(skeleton: PreTrainedModel, blocks: Sequence[str], linears: Mapping[str, nn.Module]) -> Trial:
    """Runs a skeleton over eight tokens; what is around the blocks computes with weights of zeros.

    Blocks run on the meta device. A block that looks at values cannot: then all of them run on the CPU, with weights of
    zeros too. Linears only return zeros, and every expert is called.

    Raises:
        UnsupportedModelError: a block changes an argument in a way that cannot be carried from block to block, or the
            pass fails.
    """
    try:
        return _run(skeleton, blocks, linears, "meta")
    except (UnsupportedModelError, MemoryError):
        raise
    except Exception:  # of any kind, by what the class does with values that are not there
        try:
            return _run(skeleton, blocks, linears, "cpu")
        except (UnsupportedModelError, MemoryError):
            raise
        except Exception as error:
            raise UnsupportedModelError(
                f"{type(skeleton).__name__} is not supported: a trial pass over {TRIAL_TOKENS} tokens fails with "
                f"{type(error).__name__}: {said_by(error)}"
            ) from error


class _Watched(nn.Module):
    """Takes the place of a linear and returns zeros; notes its inputs, and what else is asked of it."""

    def __init__(self, linear: nn.Module):
        super().__init__()
        self.__dict__.update(linear=linear, read=set(), inputs=[])

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        inputs = first_argument(args, kwargs)
        self.__dict__["inputs"].append(inputs)  # held, so that its identity is not another's later
        return inputs.new_zeros((*inputs.shape[:-1], linear_shape(self.__dict__["linear"])[0]))

    def __getattr__(self, name: str) -> Any:
        self.__dict__["read"].add(name)
        return getattr(self.__dict__["linear"], name)


class _Probe(BlockStub):
    """Runs its block and returns random hidden states. Keeps the arguments of the call."""

    given: Arguments | None = None

    def __init__(self, name: str, block: nn.Module, written: WrittenArguments, device: str, generator: torch.Generator):
        super().__init__(block, num_outputs=0)
        self.name, self.written, self.device, self.generator = name, written, device, generator

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.given = args, kwargs
        hidden = args[0] if args else kwargs["hidden_states"]
        self.written.enter(self.name, hidden)
        if 1 not in hidden.shape[:-1]:
            raise UnsupportedModelError(
                f"{self.name} is handed hidden states of shape {tuple(hidden.shape)} for one text of {TRIAL_TOKENS} "
                "tokens, in which no dimension can be that of texts."
            )
        self.batch_dim = list(hidden.shape).index(1)
        block: nn.Module = self.block
        tensors = {name: buffer.to(self.device) for name, buffer in block.named_buffers()}
        if self.device != "meta":
            tensors |= {name: _zeros_like(parameter) for name, parameter in block.named_parameters()}

        def call(*args: Any, **kwargs: Any) -> Any:
            return functional_call(block, tensors, args, kwargs)

        output = self.written.watch(self.name, call, args, kwargs, lambda value: to_device(value, self.device))
        self.num_outputs = len(output) if isinstance(output, tuple | list) else 0
        first = output[0] if self.num_outputs else output
        if not isinstance(first, Tensor) or first.shape != hidden.shape:
            found = tuple(first.shape) if isinstance(first, Tensor) else type(first).__name__
            raise UnsupportedModelError(
                f"{self.name} takes hidden states of shape {tuple(hidden.shape)} and returns {found}; svdllm carries "
                "hidden states of one shape from block to block."
            )
        # Random values are told again where the next block is called.
        made = torch.rand(hidden.shape, generator=self.generator).to(hidden)
        self.written.leave(self.name, made)
        return (made, *output[1:]) if self.num_outputs else made


def _run(skeleton: PreTrainedModel, blocks: Sequence[str], linears: Mapping[str, nn.Module], device: str) -> Trial:
    written = WrittenArguments(type(skeleton).__name__, TRIAL_TOKENS)
    generator = torch.Generator().manual_seed(0)
    probes = {name: _Probe(name, skeleton.get_submodule(name), written, device, generator) for name in blocks}
    watched = {name: _Watched(linear) for name, linear in linears.items()}
    zeros = tensors_replaced(skeleton, _zeros_outside(skeleton, blocks))
    ids = torch.zeros(1, TRIAL_TOKENS, dtype=torch.long)
    experts = experts_computed(skeleton, "batched_mm" if device == "meta" else "eager")
    stubs = replaced(skeleton, watched), replaced(skeleton, probes)
    run_here = set(skeleton.base_model.modules())
    inner = {n: module for n, module in skeleton.named_modules() if isinstance(module, PreTrainedModel)}
    noted = _calls_noted()
    with zeros, experts, experts_tried(skeleton), stubs[0], stubs[1], noted as called, torch.no_grad():
        skeleton.base_model(input_ids=ids, use_cache=False)
    run = [probe for probe in probes.values() if probe.given is not None]
    groups: dict[str, str] = {}
    first: dict[tuple[int, ...], str] = {}
    for name, stub in watched.items():
        if inputs := tuple(map(id, stub.__dict__["inputs"])):
            groups[name] = first.setdefault(inputs, name)
    return Trial(
        blocks=tuple(probe.name for probe in run),
        groups=groups,
        read=frozenset(name for name, stub in watched.items() if stub.__dict__["read"]),
        num_outputs=tuple(probe.num_outputs for probe in run),
        batch_dim=run[0].batch_dim if run else 0,
        arguments=[probe.given for probe in run if probe.given is not None],
        written=written,
        idle=tuple(n for n, module in inner.items() if module in run_here and called.isdisjoint(module.modules())),
    )


@contextmanager
def _calls_noted() -> Iterator[set[nn.Module]]:
    """Collects the modules that are called while the context lasts."""
    called: set[nn.Module] = set()
    handle = register_module_forward_pre_hook(lambda module, _: called.add(module))
    try:
        yield called
    finally:
        handle.remove()


def _zeros_outside(skeleton: nn.Module, blocks: Sequence[str]) -> dict[str, Tensor]:
    """Makes zeros for the parameters outside the blocks."""
    inside = tuple(f"{name}." for name in blocks)
    parameters = skeleton.named_parameters(remove_duplicate=False)
    return {name: _zeros_like(parameter) for name, parameter in parameters if not name.startswith(inside)}


def _zeros_like(parameter: Tensor) -> Tensor:
    """Zeros on the CPU, with stride 0, so that they take no memory."""
    return torch.zeros(1, dtype=parameter.dtype).expand(parameter.shape)
