"""Low-rank models: factored linears, and how models with them are built, loaded and saved.

This file is copied into every checkpoint, so it imports nothing but torch, transformers and the standard library.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import json
import os
import re
import struct
import sys
import types
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.pytorch_utils import Conv1D

if TYPE_CHECKING:
    _Model = PreTrainedModel
else:
    _Model = object

HASHES_FILE = "svdllm/hashes.json"
# The report has times, and users may edit the model card.
UNHASHED_FILES = (HASHES_FILE, "svdllm/report.json", "README.md")
HASHED_FOLDERS = ("", "svdllm", "additional_chat_templates")  # not folders of other programs, such as a trainer
WEIGHT_FILE = "model.safetensors"
WEIGHT_INDEX_FILE = "model.safetensors.index.json"


class LowRankLinear(nn.Module):
    """``y = U (V x) + b``: a linear of rank ``rank`` as two plain linears, ``svd_v`` and then ``svd_u``.

    It has no ``weight``, so code that wants the dense matrix fails loudly instead of multiplying it out.

    Shapes: ``svd_v.weight`` is ``(rank, in_features)``, ``svd_u.weight`` ``(out_features, rank)``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.svd_v = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.svd_u = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.svd_u(self.svd_v(x))


class PackedLinear(nn.Module):
    """``y = W x + b`` for a ``W`` of rank ``rank`` as ``rank`` of its rows, or columns, and coefficients of the others.

    ``side`` is ``rows`` or ``columns``. ``order`` is a permutation, kept as a buffer of 32-bit integers.

    - rows: ``h = svd_v x`` is the output of the pivot rows, ``svd_u h`` that of the others; ``order`` says where each
      output feature is found in the two. Shapes: ``svd_v.weight`` ``(rank, in_features)``, ``svd_u.weight``
      ``(out_features - rank, rank)``, ``order`` ``(out_features,)``.
    - columns: ``order`` lists the input features, those of the pivot columns first. Shapes: ``svd_v.weight``
      ``(rank, in_features - rank)``, ``svd_u.weight`` ``(out_features, rank)``, ``order`` ``(in_features,)``.

    It has no ``weight``, as a ``LowRankLinear``.
    """

    order: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool,
        side: str,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.rank, self.side = rank, side
        by_rows = side == "rows"
        others_in, others_out, length = (0, rank, out_features) if by_rows else (rank, 0, in_features)
        self.svd_v = nn.Linear(in_features - others_in, rank, bias=False, device=device, dtype=dtype)
        self.svd_u = nn.Linear(rank, out_features - others_out, bias=False, device=device, dtype=dtype)
        # vLLM puts parameters on the meta device and buffers where they belong.
        place = None if self.svd_v.weight.is_meta else device
        self.register_buffer("order", torch.arange(length, dtype=torch.int32, device=place))
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])  # on a CPU, a gather of columns is many times as fast in a matrix
        if self.side == "rows":
            pivots = self.svd_v(tokens)
            y = torch.cat((pivots, self.svd_u(pivots)), dim=-1).index_select(1, self.order)
        else:
            tokens = tokens.index_select(1, self.order)
            y = self.svd_u(tokens[:, : self.rank] + self.svd_v(tokens[:, self.rank :]))
        y = y.view(*x.shape[:-1], y.shape[-1])
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"rank={self.rank}, side={self.side}"


class CorrectedLinear(nn.Module):
    """``y = W x + b + U (V x)``: a linear whose weight is stored in few bits, and what corrects it.

    Shapes: ``base.weight`` is ``(out_features, in_features)``, ``svd_v.weight`` ``(rank, in_features)`` and
    ``svd_u.weight`` ``(out_features, rank)``. It has no ``weight``, as a ``LowRankLinear``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.base = nn.Linear(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.svd_v = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.svd_u = nn.Linear(rank, out_features, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.svd_u(self.svd_v(x))


FACTORED = (LowRankLinear, PackedLinear)
RANKED = (*FACTORED, CorrectedLinear)


class DroppedBranch(nn.Module):
    """Takes the place of an attention or MLP that was removed: it has no weights and adds zeros to the residual.

    An attention keeps one zero for each token in the cache, whose length is that of its first layer.

    Args:
        num_outputs: outputs of the branch in a tuple; 0 if it returns a tensor.
    """

    def __init__(self, branch: nn.Module, num_outputs: int) -> None:
        super().__init__()
        self.layer_idx, self.num_outputs = getattr(branch, "layer_idx", None), num_outputs

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = (*args, *kwargs.values())
        hidden = args[0] if args else kwargs.get("hidden_states", given[0])
        cache: Any = next((value for value in given if isinstance(value, Cache)), None)
        if cache is not None and self.layer_idx is not None:
            nothing = hidden.new_zeros(hidden.shape[0], 1, hidden.shape[1], 1)
            cache.update(nothing, nothing, self.layer_idx)
        zeros = torch.zeros_like(hidden)
        return (zeros, *[None] * (self.num_outputs - 1)) if self.num_outputs else zeros


class SlicedNorm(nn.Module):
    """A norm by the root mean square over ``full_width`` features, of which the first ``width`` are there.

    The residual that it reads is turned into another basis for the branch that it feeds: ``shortcut`` is the change of
    basis less the identity, and its output is added to that of the branch. The last norm has none.
    """

    def __init__(self, width: int, full_width: int, eps: float, has_shortcut: bool, **place: Any) -> None:
        super().__init__()
        self.width, self.full_width, self.eps = width, full_width, eps
        self.shortcut = nn.Linear(width, width, bias=False, **place) if has_shortcut else None

    def forward(self, x: Tensor) -> Tensor:
        if self.shortcut is not None:
            self.__dict__["turned"] = self.shortcut(x)
        wide = x.float() if x.dtype.itemsize < 4 else x
        mean = wide.square().sum(-1, keepdim=True) / self.full_width
        return (wide * torch.rsqrt(mean + self.eps)).to(x.dtype)

    def add_turned(self, branch: nn.Module, args: Any, output: Any) -> Any:
        """A forward hook of the branch: adds the change of the residual to its output."""
        turned = self.__dict__.pop("turned")
        return (output[0] + turned, *output[1:]) if isinstance(output, tuple) else output + turned

    def extra_repr(self) -> str:
        return f"{self.width} of {self.full_width}, eps={self.eps}"


class Expert(nn.Module):
    """One expert as an MLP of linears: ``gate_up_proj``, or ``up_proj`` without a gate, and ``down_proj``."""

    def __init__(self, linears: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for name, linear in linears.items():
            self.add_module(name, linear)

    def forward(self, x_TI: Tensor, weights_T: Tensor, experts: SplitExperts) -> Tensor:
        """Computes the expert's share of the output for the tokens that are routed to it, with their weights."""
        made_TF, consumer = self._modules.values()
        output_TO = consumer(experts.activated(made_TF(x_TI)))  # type: ignore[misc]
        return experts.normalised(output_TO) * weights_T.unsqueeze(-1).to(output_TO.dtype)


class SplitExperts(nn.Module):
    """The experts of a layer one by one, where transformers stacks their weights: children ``0``, ``1``, ...

    It takes over the attributes of the module that it replaces, and calls the methods of its class.

    Attributes:
        stacked_class: class of the module that it replaces.
        linear_names: of the linears of each expert.
        split_count: number of experts.
        top_k: number of experts that a token is routed to; known after a trial.
        tried: number of experts that are handed every token, and no others, in a trial without data; 0 in use.
        grouped: computes the linears of all experts by grouped products, where they are alike; None: except on a CPU.
    """

    top_k = 1
    tried = 0
    grouped: bool | None = None

    def __init__(self, stacked: Any) -> None:
        super().__init__()
        names = stacked_names(stacked)
        assert names is not None
        own = vars(nn.Module())
        self.__dict__.update({name: value for name, value in vars(stacked).items() if name not in own})
        self.stacked_class, self.linear_names = type(stacked), names
        self.has_post_expert_norm = getattr(stacked, "has_post_expert_norm", False)
        self.split_count = len(getattr(stacked, names[0]))
        if _takes_repeated_tokens(stacked):
            self.has_gate = self.is_transposed = self.is_concatenated = True
            self.has_bias = False
            self.register_forward_pre_hook(_routed_by_values)
        for name, child in stacked.named_children():
            self.add_module(name, child)
        for index in range(self.split_count):
            linears = {name: self._linear_of(stacked, name, index) for name in names}
            self.add_module(str(index), Expert(linears))
        if not stacked.training:  # modules are made for training
            self.eval()

    def _linear_of(self, stacked: Any, name: str, index: int) -> nn.Linear:
        """A linear of one expert, whose weight is a slice of the stacked one."""
        weight = getattr(stacked, name)[index].detach()
        weight = weight.mT.contiguous() if self.is_transposed else weight
        linear = nn.Linear.__new__(nn.Linear)  # its initialisation takes seconds for thousands of experts
        nn.Module.__init__(linear)
        linear.out_features, linear.in_features = weight.shape
        needs_grad = getattr(stacked, name).requires_grad
        linear.weight = nn.Parameter(weight, needs_grad)
        bias = getattr(stacked, f"{name}_bias")[index].detach() if self.has_bias else None
        linear.register_parameter("bias", None if bias is None else nn.Parameter(bias, needs_grad))
        return linear

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            member = getattr(self.__dict__.get("stacked_class"), name)
            return types.MethodType(member, self) if callable(member) else member

    @property
    def experts(self) -> list[Any]:
        return [self._modules[str(index)] for index in range(self.split_count)]

    def activated(self, made: Tensor) -> Tensor:
        """The inner features of an expert."""
        if not self.has_gate:
            return self.act_fn(made)
        if hasattr(self.stacked_class, "_apply_gate"):
            return self._apply_gate(made)
        gate, up = made.chunk(2, dim=-1)
        return self.act_fn(gate) * up

    def normalised(self, output: Tensor) -> Tensor:
        return self.post_expert_norm(output) if self.has_post_expert_norm else output

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Adds up the outputs of the experts that each token is routed to.

        Shapes: ``hidden_states`` ``(tokens, features)``; ``top_k_index`` and ``top_k_weights`` ``(tokens, k)``.
        """
        if self.tried:
            return self._of_all(hidden_states, top_k_index, top_k_weights)
        wanted = hidden_states.device.type != "cpu" if self.grouped is None else self.grouped
        if wanted and (groups := self._groups()) is not None:
            return self._in_groups(hidden_states, top_k_index, top_k_weights, groups)
        result = torch.zeros_like(hidden_states)
        for index in top_k_index.unique().tolist():
            if index < self.split_count:  # more marks tokens of other processes
                token, place = torch.where(top_k_index == index)
                expert: Any = self._modules[str(index)]
                output = expert(hidden_states[token], top_k_weights[token, place], self)
                result.index_add_(0, token, output.to(result.dtype))
        return result

    def _groups(self) -> list[LinearGroup] | None:
        """The linears of all experts as groups, made when they are first needed; None if they cannot be."""
        ends = [self._modules["0"], self._modules[str(self.split_count - 1)]]
        if any(_is_watched(module) for end in ends for module in end.modules()):  # type: ignore[union-attr]
            return None
        known: Any = self.__dict__.get("linear_groups")
        if known is None or any(group is None or not group.is_current() for group in known):
            linears = [[expert._modules[name] for expert in self.experts] for name in self.linear_names]
            known = [LinearGroup(of_each) if can_be_grouped(of_each) else None for of_each in linears]
            self.__dict__["linear_groups"] = known
        return None if None in known else known

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "linear_groups"}

    def _in_groups(
        self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, groups: list[LinearGroup]
    ) -> Tensor:
        tokens, k = top_k_index.shape
        experts_S, places_S = top_k_index.reshape(-1).sort(stable=True)
        bounds = torch.arange(self.split_count, device=experts_S.device, dtype=experts_S.dtype)
        ends_E = torch.searchsorted(experts_S, bounds, right=True).to(torch.int32)
        absent_S = (experts_S >= self.split_count).unsqueeze(-1)  # rows that a grouped product leaves unset
        owners_S = experts_S.clamp(max=self.split_count - 1)
        values = hidden_states[places_S // k].masked_fill(absent_S, 0)
        values = self.activated(groups[0](values, owners_S, ends_E).masked_fill(absent_S, 0))
        values = self.normalised(groups[1](values, owners_S, ends_E).masked_fill(absent_S, 0))
        weighted = values * top_k_weights.reshape(-1)[places_S].unsqueeze(-1).to(values.dtype)
        in_order = torch.empty_like(weighted).index_copy(0, places_S, weighted)
        return in_order.view(tokens, k, -1).sum(1).to(hidden_states.dtype)

    def _of_all(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        self.top_k = top_k_index.shape[-1]
        result = torch.zeros_like(hidden_states)
        for index, expert in enumerate(self.experts[: self.tried]):
            weights_T = (top_k_weights * (top_k_index == index)).sum(-1)
            result = result + expert(hidden_states[:], weights_T, self).to(result.dtype)
        return result


def can_be_grouped(linears: list[Any]) -> bool:
    """Whether linears of one class, in plain memory, have sizes that one grouped product takes."""
    kinds = {type(linear) for linear in linears}
    parameters = [parameter for linear in linears for parameter in linear.parameters()]
    if len(kinds) > 1 or not kinds < {nn.Linear, *FACTORED} or any(type(p.data) is not Tensor for p in parameters):
        return False
    first = linears[0]
    if isinstance(first, LowRankLinear):  # ranks may differ
        sizes = {(linear.svd_v.in_features, linear.svd_u.out_features) for linear in linears}
    else:
        sizes = {tuple(tuple(p.shape) for p in linear.parameters() if p.ndim == 2) for linear in linears}
    if isinstance(first, PackedLinear) and len({linear.side for linear in linears}) > 1:
        return False
    shapes = [size for shape in next(iter(sizes)) for size in (shape if isinstance(shape, tuple) else (shape,))]
    return len(sizes) == 1 and all(size % 8 == 0 for size in shapes)  # 16 bytes in two-byte dtypes


class LinearGroup:
    """The same linear of all experts of a layer, in one form: its matrices become views of one stack each.

    Ranks are filled up with zeros to a multiple of 16, and to the largest. With gradients, stacks are made anew.
    """

    def __init__(self, linears: list[Any]) -> None:
        self.linears = linears
        first = linears[0]
        self.leaves = ("svd_v", "svd_u") if isinstance(first, FACTORED) else ("",)
        self.pads = isinstance(first, LowRankLinear)
        self.stacks = {leaf: self._stack(leaf) for leaf in self.leaves}
        for leaf, stack in self.stacks.items():
            for weight, view in zip(self._weights(leaf), stack, strict=True):
                weight.data = view[: weight.shape[0], : weight.shape[1]]
        biases = [_bias_of(linear) for linear in linears]
        self.bias = None if biases[0] is None else torch.stack([bias.detach() for bias in biases])
        for bias, view in zip(biases, () if self.bias is None else self.bias, strict=self.bias is not None):
            bias.data = view
        self.order = (
            torch.stack([linear.order for linear in linears]).long() if isinstance(first, PackedLinear) else None
        )

    def __call__(self, x_SI: Tensor, owners_S: Tensor, ends_E: Tensor) -> Tensor:
        """Multiplies rows, sorted by expert, by the matrix of their expert; ``ends_E`` says where each expert ends."""
        from transformers.integrations.moe import _grouped_linear

        stacks = self._with_gradients() if torch.is_grad_enabled() and self._trained() else self.stacks
        bias = (
            None
            if self.bias is None
            else torch.stack([_bias_of(x) for x in self.linears])
            if stacks is not self.stacks
            else self.bias
        )

        def product(x: Tensor, leaf: str) -> Tensor:
            return _grouped_linear(x, stacks[leaf], ends_E)

        first = self.linears[0]
        if not isinstance(first, PackedLinear):
            for leaf in self.leaves:
                x_SI = product(x_SI, leaf)
            y_SO = x_SI
        elif first.side == "rows":
            pivots = product(x_SI, "svd_v")
            y_SO = torch.cat((pivots, product(pivots, "svd_u")), dim=-1).gather(1, self.order[owners_S])  # type: ignore[index]
        else:
            x_SI = x_SI.gather(1, self.order[owners_S])  # type: ignore[index]
            pivots, others = (part.contiguous() for part in x_SI.split((first.rank, x_SI.shape[1] - first.rank), 1))
            y_SO = product(pivots + product(others, "svd_v"), "svd_u")
        return y_SO if bias is None else y_SO + bias[owners_S]

    def is_current(self) -> bool:
        """Whether the linears still are views of the stacks: not moved, cast or replaced."""
        ends = [(leaf, at) for leaf in self.leaves for at in (0, -1)]
        return all(
            self._weight(self.linears[at], leaf).data_ptr() == self.stacks[leaf][at].data_ptr() for leaf, at in ends
        )

    @staticmethod
    def _weight(linear: Any, leaf: str) -> Any:
        return (getattr(linear, leaf) if leaf else linear).weight

    def _weights(self, leaf: str) -> list[Any]:
        return [self._weight(linear, leaf) for linear in self.linears]

    def _trained(self) -> bool:
        return any(self._weight(self.linears[0], leaf).requires_grad for leaf in self.leaves)

    def _padded(self, leaf: str) -> Iterator[Tensor]:
        """The weights of a leaf, those of pairs filled up with zeros to one rank."""
        weights = self._weights(leaf)
        side = 1 if leaf == "svd_u" else 0
        most = -(-max(weight.shape[side] for weight in weights) // 16) * 16
        for weight in weights:
            missing = (most - weight.shape[side]) if self.pads else 0
            yield nn.functional.pad(weight, (0, missing, 0, 0) if side else (0, 0, 0, missing))

    def _stack(self, leaf: str) -> Tensor:
        with torch.no_grad():
            return torch.stack(list(self._padded(leaf)))

    def _with_gradients(self) -> dict[str, Tensor]:
        return {leaf: torch.stack(list(self._padded(leaf))) for leaf in self.leaves}


def _is_watched(module: nn.Module) -> bool:
    """Whether something wants to see the calls of a module, or brings its weights for them."""
    return bool(module._forward_hooks or module._forward_pre_hooks) or hasattr(module, "_hf_hook")


def _bias_of(linear: Any) -> Any:
    return (linear.svd_u if isinstance(linear, LowRankLinear) else linear).bias


class FewBits:
    """Makes an embedding keep its weight as packed integers: ``weight`` is unpacked when it is first asked for.

    Codes of ``bits`` bits, with an offset of ``2^(bits - 1)``, lie one after the other in 32-bit integers. Shapes:
    ``packed_codes`` ``(rows, ceil(columns * bits / 32))``, ``packed_scales`` ``(rows, columns / group_size)``.
    """

    packed_codes: Tensor
    packed_scales: Tensor
    bits: int
    embedding_dim: int
    _unpacked: tuple[Any, Tensor] | None = None

    @property
    def weight(self) -> Tensor:
        stored = (self.packed_codes, self.packed_scales)
        state = [(tensor.data_ptr(), tensor.device, tensor.dtype) for tensor in stored]  # moving a module changes it
        if self._unpacked is None or self._unpacked[0] != state:
            self.__dict__["_unpacked"] = (state, unpacked(*stored, self.bits, self.embedding_dim))
        return self._unpacked[1]  # type: ignore[index]


class TiedHead:
    """Makes a head use the weight of an embedding in few bits."""

    @property
    def weight(self) -> Tensor:
        return self.__dict__["_tied_to"].weight


def unpacked(packed: Tensor, scales: Tensor, bits: int, columns: int, rows_at_once: int = 4096) -> Tensor:
    """The matrix (``rows x columns``) that packed integers and the scales of their groups stand for."""
    places = torch.arange(columns, device=packed.device) * bits
    words, offsets = places // 32, places % 32
    following = (words + 1).clamp(max=packed.shape[1] - 1)
    parts = []
    for stored, scale in zip(packed.split(rows_at_once), scales.split(rows_at_once), strict=True):
        unsigned = stored.long() & 0xFFFFFFFF
        codes = (unsigned[:, words] >> offsets) | (unsigned[:, following] << (32 - offsets))
        codes = (codes & (2**bits - 1)) - 2 ** (bits - 1)
        parts.append((codes.unflatten(1, (scale.shape[1], -1)).to(scale) * scale.unsqueeze(-1)).flatten(1))
    return torch.cat(parts)


def pack_embeddings(model: Any, embeddings: Mapping[str, Mapping[str, int]]) -> None:
    """Gives the named embeddings packed weights, uninitialised, in place, and ties the head to them where it was."""
    head = model.get_output_embeddings()
    for name, entry in embeddings.items():
        embedding = model.get_submodule(name)
        weight = embedding._parameters.pop("weight")
        rows, columns = weight.shape
        width = -(-columns * entry["bits"] // 32)
        empty = {"packed_codes": weight.new_zeros(rows, width, dtype=torch.int32)}
        empty["packed_scales"] = weight.new_zeros(rows, columns // entry["group_size"])
        for leaf, tensor in empty.items():
            embedding.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
        embedding.bits = entry["bits"]
        embedding.__class__ = _with(FewBits, type(embedding))
        if head is not None and model.config.get_text_config().tie_word_embeddings:
            head._parameters.pop("weight")
            head.__dict__["_tied_to"] = embedding
            head.__class__ = _with(TiedHead, type(head))


@functools.cache
def _with(mixin: type, base: type[nn.Module]) -> type[nn.Module]:
    return types.new_class(
        base.__name__, (mixin, base), exec_body=lambda members: members.update(_copied_by(_with, mixin, base))
    )


def _copied_by(make: Callable[..., type[nn.Module]], *arguments: Any) -> dict[str, Any]:
    """The member that copies and pickles a module by ``make(*arguments)``: its class has no name to be found by."""

    def reduce_ex(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        state = {name: value for name, value in self.__dict__.items() if name != "_unpacked"}  # that is made anew
        return _new, (make, *arguments), state

    return {"__reduce_ex__": reduce_ex}


def _new(make: Callable[..., type[nn.Module]], *arguments: Any) -> nn.Module:
    cls = make(*arguments)
    return cls.__new__(cls)


def stacked_names(module: Any) -> tuple[str, str] | None:
    """Names of the weights of a module of stacked experts, the last that of the second linear; None for any other.

    Such modules are those of classes that transformers decorates by ``use_experts_implementation``, and those that are
    handed repeated tokens.
    """
    flags = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
    if isinstance(module, SplitExperts):
        return None
    if not all(name in vars(module) for name in flags):
        return ("gate_up_proj", "down_proj") if _takes_repeated_tokens(module) else None
    names = ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
    weights = [module._parameters.get(name) for name in names]
    return names if all(weight is not None and weight.ndim == 3 for weight in weights) else None


def _takes_repeated_tokens(module: Any) -> bool:
    """Whether stacked experts are handed all tokens once for each of them, times their routing weights (Llama 4)."""
    made, read = (module._parameters.get(name) for name in ("gate_up_proj", "down_proj"))
    if made is None or read is None or made.ndim != 3 or read.ndim != 3 or not hasattr(module, "act_fn"):
        return False
    experts, width, features = read.shape
    fits = made.shape == (experts, features, 2 * width)
    return fits and len(inspect.signature(module.forward).parameters) == 1


def _routed_by_values(experts: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Routes each row of repeated tokens to the expert whose turn it is, unless its routing weight has made it zero."""
    rows = args[0].reshape(-1, args[0].shape[-1])
    owners = torch.arange(experts.split_count, device=rows.device).repeat_interleave(len(rows) // experts.split_count)
    indices = torch.where(rows.any(-1), owners, experts.split_count)
    return rows, indices.unsqueeze(-1), rows.new_ones(len(rows), 1)


def split_experts(model: nn.Module, names: Collection[str] | None = None) -> None:
    """Replaces modules of stacked experts (all, or the named ones) by ``SplitExperts`` with the same weights."""
    for name, module in list(model.named_modules()):
        if stacked_names(module) is not None and (names is None or name in names):
            model.set_submodule(name, SplitExperts(module))


def swap_linears(model: nn.Module, forms: Mapping[str, Mapping[str, Any]], add_biases: bool = False) -> None:
    """Gives the named linears (``nn.Linear``, its subclasses, ``Conv1D``) their forms, uninitialised, in place.

    Args:
        forms: linear -> its entry in ``config.svdllm["forms"]``.
        add_biases: gives a bias to every linear that is only approximated: pairs, packed ones, and those with fewer
            inputs. A linear with fewer outputs has some of the rows, unchanged.

    Device, dtype and bias are those of the linear that is replaced.

    Raises:
        ValueError: a name is not a linear of the model, or its size does not fit; names them all, and nothing is
            replaced.
    """
    modules = dict(model.named_modules())
    missing = [name for name in forms if name not in modules]
    found = {name: modules[name] for name in forms if name in modules}
    other = [f"{name} ({type(module).__name__})" for name, module in found.items() if not _shape(module)]
    if missing or other:
        raise ValueError(
            f"Cannot factor {len(missing) + len(other)} of {len(forms)} modules of {type(model).__name__}: "
            f"not in the model: {_some(missing)}; not a linear: {_some(other)}. "
            "Names are those of the causal LM's named_modules()."
        )
    if problems := [f"{name}: {why}" for name, module in found.items() if (why := _misfit(module, forms[name]))]:
        raise ValueError(f"config.svdllm.forms does not fit {type(model).__name__}: {_some(problems)}.")
    parents: dict[str, None] = {}
    for name, entry in forms.items():
        parent_name, _, child_name = name.rpartition(".")
        setattr(modules[parent_name], child_name, _in_form(modules[name], entry, add_biases))
        parents[parent_name] = None
    for parent_name in filter(None, parents):  # the root keeps its class: it is the one that is saved by name
        _mark_factored(modules[parent_name])


def remove_parts(model: nn.Module, settings: Mapping[str, Any], prefix: str = "") -> None:
    """Takes out of a model what was pruned beside the rows and columns of its linears.

    Args:
        settings: the ``svdllm`` entry of a config: ``counts``, ``dropped``, ``embedding_widths`` and ``norms``; see
            ``LowRankConfigMixin``.
        prefix: the beginning of names that the model has not.

    Raises:
        ValueError: a name is not in the model.
    """

    def entries(key: str) -> Iterator[tuple[str, Any]]:
        for name, value in settings.get(key, {}).items():
            if name.startswith(prefix):
                yield name.removeprefix(prefix), value

    modules = {"", *(name for name, _ in model.named_modules())}
    named = [name for key in ("dropped", "embedding_widths", "norms") for name, _ in entries(key)]
    named += [name.rpartition(".")[0] for name, _ in entries("counts")]
    if missing := [name for name in named if name not in modules]:
        raise ValueError(f"config.svdllm does not fit {type(model).__name__}: not in the model: {_some(missing)}.")
    for name, value in entries("counts"):
        holder, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(holder), leaf, value)
    for name, num_outputs in entries("dropped"):
        model.set_submodule(name, DroppedBranch(model.get_submodule(name), num_outputs))
    for name, width in entries("embedding_widths"):
        embedding: Any = model.get_submodule(name)
        old = embedding.weight
        embedding.embedding_dim = width
        embedding.weight = nn.Parameter(old.new_zeros(len(old), width), old.requires_grad)
    for name, entry in entries("norms"):
        place: dict[str, Any] = {}
        if (old := next(model.get_submodule(name).parameters(), None)) is not None:
            place = {"device": old.device, "dtype": old.dtype}
        branch = entry.get("branch")
        norm = SlicedNorm(entry["width"], entry["full_width"], entry["eps"], branch is not None, **place)
        model.set_submodule(name, norm)
        if branch is not None:
            model.get_submodule(branch.removeprefix(prefix)).register_forward_hook(norm.add_turned)


def share_first_factors(model: nn.Module, shared: Mapping[str, str]) -> None:
    """Makes low-rank linears (keys) use the first factor of others (values): both have the same ``svd_v`` then."""
    for name, first in shared.items():
        linear, other = model.get_submodule(name), model.get_submodule(first)
        linear.svd_v = other.svd_v


def _shape(module: nn.Module) -> tuple[int, int] | None:
    """``(in_features, out_features)`` of a linear, or None for any other module."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):
        return module.weight.shape[0], module.weight.shape[1]
    return None


def _misfit(linear: nn.Module, entry: Mapping[str, Any]) -> str | None:
    """Says why a linear cannot have a form, or None."""
    shape = _shape(linear)
    assert shape is not None
    sizes = _sizes(shape, entry)
    if sizes[0] > shape[0] or sizes[1] > shape[1]:
        return f"expected at most {shape[0]} inputs and {shape[1]} outputs, found {sizes[0]} and {sizes[1]}"
    if entry["form"] == "packed" and entry["rank"] >= min(sizes):
        return f"expected a packed rank below {min(sizes)}, the smaller of inputs and outputs, found {entry['rank']}"
    return None


def _sizes(shape: tuple[int, int], entry: Mapping[str, Any]) -> tuple[int, int]:
    """``(in_features, out_features)`` of a form of a linear of this shape."""
    return entry.get("in_features", shape[0]), entry.get("out_features", shape[1])


def _in_form(linear: nn.Module, entry: Mapping[str, Any], add_bias: bool) -> nn.Module:
    shape, weight = _shape(linear), linear.weight
    assert shape is not None
    assert isinstance(weight, Tensor)
    sizes = _sizes(shape, entry)
    bias = linear.bias is not None or (add_bias and (entry["form"] != "narrow" or "in_features" in entry))
    place: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
    if entry["form"] == "narrow":
        return _narrow(linear, *sizes, bias)
    if entry["form"] == "packed":
        factored = PackedLinear(*sizes, entry["rank"], bias, entry["side"], **place)
    elif entry["form"] == "corrected":
        factored = CorrectedLinear(*sizes, entry["rank"], bias, **place)
    else:
        factored = LowRankLinear(*sizes, entry["rank"], bias, **place)
    return factored.train(linear.training).requires_grad_(weight.requires_grad)


def _narrow(linear: Any, in_features: int, out_features: int, bias: bool) -> nn.Module:
    """Makes a linear smaller in place, so that it keeps its class."""
    weight: Tensor = linear.weight
    if hasattr(linear, "nf"):  # Conv1D
        linear.nx, linear.nf = in_features, out_features
        shape = (in_features, out_features)
    else:
        linear.in_features, linear.out_features = in_features, out_features
        shape = (out_features, in_features)
    linear.weight = nn.Parameter(weight.new_zeros(shape), weight.requires_grad)
    linear.bias = nn.Parameter(weight.new_zeros(out_features), weight.requires_grad) if bias else None
    return linear


def _mark_factored(module: nn.Module) -> None:
    """Gives ``module`` a class of its own that tells which of its children are factored.

    vLLM decides once per class how to fuse a module's projections, and fails if one instance of a class is dense and
    another is factored.
    """
    children = tuple(sorted(name for name, child in module.named_children() if isinstance(child, RANKED)))
    module.__class__ = _factored_class(getattr(type(module), "_svdllm_dense_class", type(module)), children)


@functools.cache
def _factored_class(dense_class: type[nn.Module], children: tuple[str, ...]) -> type[nn.Module]:
    # The name stays: `_no_split_modules` and output recorders look modules up by the name of their class.
    members = {
        "__module__": dense_class.__module__,
        "__qualname__": dense_class.__qualname__,
        "__doc__": dense_class.__doc__,
        **_copied_by(_factored_class, dense_class, children),
        "_svdllm_dense_class": dense_class,
        "_svdllm_factored": children,
    }
    return types.new_class(dense_class.__name__, (dense_class,), exec_body=lambda namespace: namespace.update(members))


class LowRankMixin(_Model):
    """Makes a model class of transformers low-rank: ``class M(LowRankMixin, LlamaForCausalLM)``.

    The base class builds the model, then the linears in ``config.svdllm["forms"]`` are replaced. Loading checks the
    files, and that every weight came from them. Saving writes a complete folder, with code.
    """

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        _share_weight_conversions(type(self))
        super().__init__(config, *args, **kwargs)
        settings = getattr(config, "svdllm", None) or {}
        forms, shared = config.svdllm_forms, settings.get("shared_factors", {})
        prefix = ""
        if _is_bare(self):  # linears are named as in the causal LM, whose base model this is
            prefix = f"{self.base_model_prefix}."
            forms = {name.removeprefix(prefix): entry for name, entry in forms.items() if name.startswith(prefix)}
            shared = {name.removeprefix(prefix): first.removeprefix(prefix) for name, first in shared.items()}
        split_experts(self, {name.rpartition(".")[0].rpartition(".")[0] for name in forms})
        swap_linears(self, forms, settings.get("bias_correction", False))
        share_first_factors(self, shared)
        pack_embeddings(self, self._packed_embeddings())
        remove_parts(self, settings, prefix)
        check_tensor_parallel(self, _processes_of_vllm())
        self.register_load_state_dict_post_hook(_expect_once)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Returns torch's state dict with a shared first factor once, under the name of the linear that owns it."""
        state = super().state_dict(*args, **kwargs)
        repeated = repeated_factors(self, kwargs.get("prefix", args[1] if len(args) > 1 else ""))
        for name in [name for name in state if name.startswith(repeated)]:
            del state[name]
        return state

    def _packed_embeddings(self) -> dict[str, Mapping[str, int]]:
        """The embeddings in few bits, as they are named here."""
        entries = (getattr(self.config, "svdllm", None) or {}).get("embeddings", {})
        prefix = f"{self.base_model_prefix}." if _is_bare(self) else ""
        return {name.removeprefix(prefix): entry for name, entry in entries.items()}

    def get_expanded_tied_weights_keys(self, *args: Any, **kwargs: Any) -> dict[str, str]:
        """Returns what transformers finds, without what is tied to an embedding in few bits: a head reads it there."""
        tied = super().get_expanded_tied_weights_keys(*args, **kwargs)
        packed = {f"{name}.weight" for name in (getattr(self.config, "svdllm", None) or {}).get("embeddings", {})}
        return {name: origin for name, origin in tied.items() if packed.isdisjoint((name, origin))}

    @classmethod
    def is_custom_code(cls) -> bool:
        """Returns False: else transformers initialises few modules, and leaves buffers without a file unset."""
        return False

    def mark_tied_weights_as_initialized(self, loading_info: Any) -> None:
        """Does what transformers does, and removes the other names of shared first factors from the missing keys."""
        super().mark_tied_weights_as_initialized(loading_info)
        repeated = repeated_factors(self)
        loading_info.missing_keys = {key for key in loading_info.missing_keys if not key.startswith(repeated)}

    def initialize_weights(self) -> None:
        """Does what transformers does, except for loaded modules with factored linears.

        ``_init_weights`` of some families would ask such modules for the weights of their linears, or take a factor for
        the linear of its name.
        """
        parts = {part for module in self.modules() if isinstance(module, RANKED) for part in module.modules()}
        for module in self.modules():
            own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
            factored = module in parts or any(isinstance(child, RANKED) for child in module.children())
            factored = factored or isinstance(module, FewBits | TiedHead)
            if factored and all(getattr(tensor, "_is_hf_initialized", False) for tensor in own):
                module._is_hf_initialized = True  # type: ignore[assignment]
        super().initialize_weights()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Loads a model as transformers does, but never with random weights.

        ``check_integrity=False`` skips the comparison of a local folder's weight files with ``svdllm/hashes.json``.

        Raises:
            ValueError: a weight file is missing, truncated or altered; a weight of the model is in no file; or a weight
                in a file is not in the model.
        """
        check = kwargs.pop("check_integrity", True)
        want_info = kwargs.pop("output_loading_info", False)
        if check and pretrained_model_name_or_path is not None:
            folder = Path(str(pretrained_model_name_or_path), kwargs.get("subfolder") or "")
            if folder.is_dir():
                check_weight_files(folder)
        kwargs["ignore_mismatched_sizes"] = True  # an error below names them; transformers only logs the names
        with unpacking_one_by_one():
            loaded: Any = super().from_pretrained(
                pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
            )
        model, info = loaded
        _check_loading_info(model, info, pretrained_model_name_or_path)
        _check_orders(model, pretrained_model_name_or_path)
        return (model, info) if want_info else model

    def save_pretrained(self, save_directory: Any, is_main_process: bool = True, *args: Any, **kwargs: Any) -> None:
        """Saves a model as transformers does, with the code files and the hashes, so that the folder is complete."""
        push_to_hub = kwargs.pop("push_to_hub", False)
        hub_kwargs = {key: kwargs.pop(key) for key in _HUB_KEYS if key in kwargs} if push_to_hub else {}
        # A model that was never loaded has no other layout, and a quantised one cannot be converted back to it.
        if not hasattr(self, "_weight_conversions") or getattr(self, "hf_quantizer", None) is not None:
            kwargs.setdefault("save_original_format", False)
        compressor = getattr(getattr(self, "hf_quantizer", None), "compressor", None)
        if compressor is not None:  # what was unpacked to be run is packed again
            compressor.compress_model(self, skip_compressed=True)
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
        if is_main_process and _is_first_process() and not getattr(self, "_hf_peft_config_loaded", False):
            self.write_code_files(Path(save_directory))
            write_hashes(Path(save_directory))
        if push_to_hub:
            repo_id = hub_kwargs.pop("repo_id", Path(save_directory).name)
            self.push_to_hub(repo_id, **hub_kwargs)

    @classmethod
    def code_files(cls) -> dict[str, str]:
        """The code files of a checkpoint (name -> text), read from the files that define this class."""
        config_class: Any = cls.config_class
        files = (str(sys.modules[c.__module__].__file__) for c in (config_class, cls))
        texts = (Path(file).read_text(encoding="utf-8") for file in files)
        return {f"{name}.py": text for name, text in zip(config_class.code_modules(), texts, strict=True)}

    @classmethod
    def write_code_files(cls, folder: Path) -> None:
        """Writes the code files of a checkpoint into its folder."""
        for name, text in cls.code_files().items():
            (folder / name).write_text(text, encoding="utf-8", newline="\n")

    def _expand_parallel_plan(self, plan: dict[str, str]) -> dict[str, str]:
        """Gives the rule for a factored linear to its factors, and none to the low-rank linear itself."""
        factored = [name for name, module in self.named_modules() if isinstance(module, LowRankLinear)]
        plan = dict(plan)
        for rule in {re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in factored}:
            if style := plan.get(rule):  # a rule that the config does not know, such as one of the caller
                for factor, factor_style in self.config.factor_styles(style).items():
                    plan.setdefault(f"{rule}.{factor}", factor_style)
        expanded = super()._expand_parallel_plan(plan)
        for name in factored:
            expanded.pop(name, None)
        return expanded

    @classmethod
    def maybe_distribute_model(cls, model: Any, distributed_config: Any, *args: Any, **kwargs: Any) -> Any:
        """Distributes a model as transformers does. Up to 5.19 that hooks low-rank linears and knows no "replicate"."""
        if distributed_config is not None:
            check_tensor_parallel(model, distributed_config.tp_size or 1)
        if distributed_config is not None and model._tp_plan:  # without a rule, a weight is replicated
            model._tp_plan = {rule: style for rule, style in model._tp_plan.items() if style != "replicate"}
        model = super().maybe_distribute_model(model, distributed_config, *args, **kwargs)
        for module in model.modules():
            if isinstance(module, LowRankLinear):
                vars(module).pop("forward", None)
        return model


_SIZES = ("in_features", "out_features")


def check_tensor_parallel(model: Any, processes: int) -> None:
    """Raises ``ValueError`` if the linears of a low-rank model cannot be split between processes."""
    corrected = [name for name, module in model.named_modules() if isinstance(module, CorrectedLinear)]
    if corrected and processes > 1:
        raise ValueError(
            f"Corrected linears cannot be split between {processes} processes, and this model has {len(corrected)}: "
            f"{_some(corrected, 3)}. Use one process, or `svdllm export MODEL -o OUT --format adapter`."
        )
    packed = [name for name, module in model.named_modules() if isinstance(module, PackedLinear)]
    if packed and processes > 1:
        raise ValueError(
            f"Packed linears cannot be split between {processes} processes, and this model has {len(packed)}: "
            f"{_some(packed, 3)}. Store pairs in place of them by `svdllm export MODEL -o OUT --format pairs`, or use "
            "one process."
        )
    split = [name for name, module in model.named_modules() if isinstance(module, SplitExperts)]
    if split and processes > 1:
        raise ValueError(
            f"Low-rank experts cannot be split between {processes} processes, and {len(split)} layers of this model "
            f"have some: {_some(split, 3)}. Use one process."
        )
    sizes = [(name, entry.get(key, 0)) for name, entry in model.config.svdllm_forms.items() for key in _SIZES]
    if uneven := [f"{name} ({size})" for name, size in sizes if size % processes]:
        raise ValueError(
            f"Narrower linears can be split between {processes} processes if their width is a multiple of that. It is "
            f"not in {_some(uneven, 3)}. Use another number of processes, or compress with `--round-to`."
        )


def _processes_of_vllm() -> int:
    """The number of processes between which vLLM splits the model that is being built; 1 in other programs."""
    state = sys.modules.get("vllm.distributed.parallel_state")
    return state.get_tensor_model_parallel_world_size() if state and state.model_parallel_is_initialized() else 1


def _is_bare(model: Any) -> bool:
    """Whether a model has no head. A causal LM is its own base model if its body is not named as the class says."""
    return model.base_model is model and model.get_output_embeddings() is None


def repeated_factors(model: nn.Module, prefix: str = "") -> tuple[str, ...]:
    """The prefixes of the names of weights that are the first factor of another linear and are named there."""
    firsts: set[nn.Module] = set()
    repeated = []
    for name, module in model.named_modules():
        if isinstance(module, FACTORED):
            if module.svd_v in firsts:
                repeated.append(f"{prefix}{name}.svd_v.")
            firsts.add(module.svd_v)
    return tuple(repeated)


def _expect_once(model: nn.Module, keys: Any) -> None:
    """Removes the other names of shared first factors from the missing keys, after ``load_state_dict``."""
    repeated = repeated_factors(model)
    keys.missing_keys[:] = [key for key in keys.missing_keys if not key.startswith(repeated)]


_HUB_KEYS = ("repo_id", "commit_message", "commit_description", "private", "create_pr", "revision", "token", "tags")


def _share_weight_conversions(cls: type) -> None:
    """Makes a low-rank class read every layout of weights that its base class reads.

    transformers looks up the renamings and fusions of weights by class name and model type, and skips them for custom
    code unless they are registered.
    """
    try:
        from transformers import conversion_mapping as conversions
    except ImportError:
        return
    base = next(c for c in cls.__mro__ if c.__module__.startswith("transformers.") and issubclass(c, PreTrainedModel))
    config_class: Any = cls.config_class
    base_config = next(c for c in config_class.__mro__ if c.__module__.startswith("transformers."))
    for own, theirs in ((cls.__name__, base.__name__), (config_class.model_type, base_config.model_type)):
        if mapping := conversions.get_checkpoint_conversion_mapping(theirs):
            conversions.register_checkpoint_conversion_mapping(own, mapping, overwrite=True)


@contextmanager
def unpacking_one_by_one() -> Iterator[None]:
    """Makes the time to load quantised weights grow with their number, not with its cube.

    For each weight that transformers assembles, torchao 0.18 searches the metadata of all weights. Here it gets the
    metadata of one module only.
    """
    try:
        integration: Any = importlib.import_module("transformers.integrations.torchao")
    except ImportError:
        integration = None
    unflatten = getattr(integration, "unflatten_tensor_state_dict", None)
    if unflatten is None:
        yield
        return

    def of_one_module(tensors: dict[str, Tensor], metadata: dict[str, str]) -> Any:
        owners = {key.rpartition(".")[0] for key in tensors}
        own = {name: entry for name, entry in metadata.items() if name.rpartition(".")[0] in owners}
        return unflatten(tensors, {**own, "tensor_names": json.dumps(list(own))})

    integration.unflatten_tensor_state_dict = of_one_module
    try:
        yield
    finally:
        integration.unflatten_tensor_state_dict = unflatten


def _check_loading_info(model: Any, info: dict[str, Any], source: Any) -> None:
    missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    mismatched = sorted(str(key) for key in info["mismatched_keys"])
    if _is_bare(model):  # the bare model has no head
        prefix = f"{model.base_model_prefix}."
        unexpected = [key for key in unexpected if hasattr(model, key.removeprefix(prefix).partition(".")[0])]
    if getattr(model, "hf_quantizer", None) is not None:  # a quantiser stores tensors of its own
        unexpected = []
    if missing or unexpected or mismatched:
        raise ValueError(
            f"The weights in {source} are not those of {type(model).__name__}: missing: {_some(missing)}; "
            f"unexpected: {_some(unexpected)}; of another shape: {_some(mismatched)}. The files and config.json do "
            "not belong together, or a file is incomplete: fetch or write the checkpoint again."
        )


def _check_orders(model: nn.Module, source: Any) -> None:
    """Raises ``ValueError`` that names the packed linears whose ``order`` is not a permutation."""
    packed = [(name, module.order) for name, module in model.named_modules() if isinstance(module, PackedLinear)]
    wrong = [
        name
        for name, order in packed
        if order.device.type != "meta" and not torch.equal(order.sort().values, torch.arange(len(order)).to(order))
    ]
    if wrong:
        raise ValueError(
            f"The weights in {source} are damaged: the order of {_some(wrong)} is not a permutation of the features. "
            "Fetch or write the checkpoint again."
        )


def _some(names: list[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more if names else "none"


def write_hashes(folder: str | os.PathLike[str]) -> None:
    """Writes ``svdllm/hashes.json``: size and SHA-256 of every file in ``HASHED_FOLDERS`` but ``UNHASHED_FILES``."""
    root = Path(folder)
    folders = [root / name for name in HASHED_FOLDERS if (root / name).is_dir()]
    files = [path for folder in folders for path in folder.iterdir() if path.is_file()]
    names = sorted(path.relative_to(root).as_posix() for path in files)
    names = [name for name in names if name not in UNHASHED_FILES]
    entries = zip(names, _sha256_all([root / name for name in names]), strict=True)
    files = {name: {"size": (root / name).stat().st_size, "sha256": digest} for name, digest in entries}
    target = root / HASHES_FILE
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps({"files": files}, indent=2) + "\n", encoding="utf-8", newline="\n")


def compare_hashes(folder: str | os.PathLike[str], *, weights_only: bool = False) -> list[str]:
    """Compares a folder with its ``svdllm/hashes.json``: one sentence for each file that differs, none if all agree.

    Sizes are compared before contents. ``weights_only`` compares the model's safetensors files and their index only.
    """
    root = Path(folder)
    try:
        entries = json.loads((root / HASHES_FILE).read_text(encoding="utf-8"))["files"]
        entries = {name: {key: entry[key] for key in ("size", "sha256")} for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return [f"{HASHES_FILE} is damaged."]
    if weights_only:
        entries = {
            name: entry
            for name, entry in entries.items()
            if name.endswith((".safetensors", WEIGHT_INDEX_FILE)) and "/" not in name  # those in svdllm/ are not loaded
        }
    problems, right_size = [], []
    for name, entry in entries.items():
        path = root / name
        if not path.is_file():
            problems.append(f"{name} is missing.")
        elif (size := path.stat().st_size) != entry["size"]:
            problems.append(f"{name}: expected {entry['size']} bytes, found {size}.")
        else:
            right_size.append(name)
    for name, digest in zip(right_size, _sha256_all([root / name for name in right_size]), strict=True):
        if digest != entries[name]["sha256"]:
            problems.append(f"{name}: expected SHA-256 {entries[name]['sha256']}, found {digest}.")
    return problems or [f"{name} is not in {HASHES_FILE}." for name in weight_file_names(root) if name not in entries]


def check_weight_files(folder: str | os.PathLike[str]) -> None:
    """Raises ``ValueError`` that names each weight file of ``folder`` that is missing, truncated or altered.

    With ``svdllm/hashes.json`` the first process of a machine compares contents. Without it, the files that the index
    names must exist and be as long as their headers say. Other files are not checked.
    """
    root = Path(folder)
    if (root / HASHES_FILE).is_file() and int(os.environ.get("LOCAL_RANK", "0")) == 0:
        problems = compare_hashes(root, weights_only=True)
        advice = f"If the change was intended, delete {HASHES_FILE}."
    else:
        problems, advice = _compare_headers(root), ""
    if problems:
        raise ValueError(f"{root}: {' '.join(problems)} Fetch or write the checkpoint again. {advice}".rstrip())


def _compare_headers(root: Path) -> list[str]:
    problems = []
    for name in weight_file_names(root):
        path = root / name
        if not path.is_file():
            problems.append(f"{name} is missing.")
        elif (expected := _size_by_header(path)) != (size := path.stat().st_size):
            problems.append(f"{name}: expected {expected or 'a safetensors header'} bytes, found {size}.")
    return problems


def weight_file_names(folder: str | os.PathLike[str]) -> list[str]:
    """Names the safetensors files that transformers reads from ``folder``; they may be missing.

    These are the files that ``transformers_weights`` in ``config.json`` names, else ``model.safetensors``, else those
    that ``model.safetensors.index.json`` lists, else none.

    Raises:
        ValueError: ``config.json`` or the index is damaged.
    """
    root = Path(folder)
    config = read_object(root / "config.json") if (root / "config.json").is_file() else {}
    present = [name for name in (WEIGHT_FILE, WEIGHT_INDEX_FILE) if (root / name).is_file()]
    first = config.get("transformers_weights") or next(iter(present), None)
    if first is None:
        return []
    if not isinstance(first, str) or ".." in Path(first).parts or Path(first).is_absolute():
        raise ValueError(f"config.json is damaged: transformers_weights is {first!r}, expected a file of the folder.")
    if not first.endswith(".index.json"):
        return [first]
    index = read_object(root / first) if (root / first).is_file() else {}
    files = index.get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise ValueError(f"{first} is missing or damaged: expected a 'weight_map' from tensors to names of files.")
    if not isinstance(index.get("metadata"), dict):
        raise ValueError(f"{first} is damaged: transformers wants a 'metadata' object in it; an empty one will do.")
    return sorted(set(files.values()))


def read_object(path: Path) -> dict[str, Any]:
    """Reads the object in a JSON file. Raises ``ValueError`` if the file is cut, or holds anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path.name} is damaged: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} is damaged: expected a JSON object, found {type(content).__name__}.")
    return content


def _size_by_header(path: Path) -> int | None:
    """The length of a safetensors file by its header (8 bytes, the header, the tensors); None if it has no header."""
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            return None
        (header_size,) = struct.unpack("<Q", prefix)
        header = file.read(min(header_size, 100_000_000))
    try:
        ends = [entry["data_offsets"][1] for key, entry in json.loads(header).items() if key != "__metadata__"]
        return 8 + header_size + max(ends, default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        return None


def _sha256_all(paths: list[Path]) -> list[str]:
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:  # hashlib releases the GIL
        return list(pool.map(sha256_of, paths))


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def _is_first_process() -> bool:
    distributed = torch.distributed
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0
