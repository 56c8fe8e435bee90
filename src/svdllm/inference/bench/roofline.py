"""Computes the largest possible speed-up of a smaller model from its shapes.

A prefill multiplies many tokens with every weight and is bound by operations. A decode step multiplies one token of
each sequence and is bound by the bytes of weights and cache that it reads. Matrix products and attention count, with
two operations for a multiplication and its addition. Norms, activations and rotations do not.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from svdllm.common.errors import UnsupportedModelError
from svdllm.inference.cache_names import cache_of
from svdllm.models.linears import find_blocks, linear_shape, linears_of
from svdllm.models.low_rank import PackedLinear


@dataclass(frozen=True, kw_only=True)
class CachedLayer:
    """The attention of one layer, with sizes from its cache.

    head_features: width of a key and a value together.
    token_bytes: bytes in the cache per token of a sequence.
    window: number of keys that a token sees, with its own; None for all keys up to it.
    """

    query_heads: int
    head_features: int
    token_bytes: int
    window: int | None

    def keys(self, position: int) -> int:
        """Number of keys that the token at ``position`` (from 1) sees, which are also the cached ones."""
        return position if self.window is None else min(position, self.window)

    def prefill_operations(self, prompt: int) -> int:
        """Operations of one sequence: products of queries with visible keys, and of attention weights with values."""
        return 2 * self.query_heads * self.head_features * sum(map(self.keys, range(1, prompt + 1)))


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes of a model. Sizes of linears are numbers of weights, without biases.

    block_linears, other_linears: linears inside and outside the blocks, without the head.
    head: the matrix that makes logits.
    read_bytes: what a decode step reads of the weights: parameters, except embeddings that are looked up, and the
        orders of packed linears.
    widest_bytes: one token in the widest output of a linear in the blocks.
    last_logits: a prefill makes the logits of the last position only.
    """

    block_linears: int
    other_linears: int
    head: int
    read_bytes: int
    widest_bytes: int
    last_logits: bool
    layers: tuple[CachedLayer, ...]

    def with_cache_of(self, model: PreTrainedModel) -> ModelShape:
        """Returns the shape with the bytes that the model's cache takes now."""
        pairs = zip(self.layers, _cached_layers(model), strict=True)
        return replace(self, layers=tuple(replace(layer, token_bytes=now.token_bytes) for layer, now in pairs))

    def prefill_operations(self, batch: int, prompt: int) -> int:
        products = prompt * (self.block_linears + self.other_linears) + (1 if self.last_logits else prompt) * self.head
        return batch * (2 * products + sum(layer.prefill_operations(prompt) for layer in self.layers))

    def decode_bytes(self, batch: int, prompt: int, gen: int) -> float:
        """Bytes that a decode step reads, in the mean over ``gen`` steps after the prompt."""
        steps = range(prompt + 1, prompt + gen + 1)
        cached = sum(layer.token_bytes * layer.keys(position) for layer in self.layers for position in steps)
        return self.read_bytes + batch * cached / gen

    def cache_bytes(self, batch: int, tokens: int) -> int:
        """Bytes of the cache with ``tokens`` tokens of every sequence."""
        return batch * sum(layer.token_bytes * layer.keys(tokens) for layer in self.layers)


@dataclass(frozen=True, kw_only=True)
class Ideal:
    """The largest possible speed-up of a compressed model over the dense one.

    linears: of the linears in the blocks alone, as in the paper: the quotient of their weights.
    model: of the whole model with head, attention and cache, at the same batch size and context.
    """

    linears: float
    model: float


def ideal(phase: str, dense: ModelShape, compressed: ModelShape, batch: int, prompt: int, gen: int) -> Ideal:
    """Computes the largest speed-up of the phase ``prefill`` (by operations) or ``decode`` (by bytes read)."""
    if phase == "prefill":
        model = dense.prefill_operations(batch, prompt) / compressed.prefill_operations(batch, prompt)
    else:
        model = dense.decode_bytes(batch, prompt, gen) / compressed.decode_bytes(batch, prompt, gen)
    return Ideal(linears=dense.block_linears / compressed.block_linears, model=model)


def shape_of(model: PreTrainedModel) -> ModelShape:
    """Measures the shape of a model in memory, dense or low-rank; runs one token through it to see its cache.

    Raises:
        UnsupportedModelError: its cache has no keys and values by layer.
    """
    blocks = [linear for name in find_blocks(model) for _, linear in linears_of(model.get_submodule(name))]
    head: Any = model.get_output_embeddings()
    others = [linear for _, linear in linears_of(model) if linear is not head and linear not in blocks]
    looked_up = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)} - {id(head.weight)}
    orders = [module.order for module in model.modules() if isinstance(module, PackedLinear)]
    return ModelShape(
        block_linears=_weights(blocks),
        other_linears=_weights(others),
        head=head.weight.numel(),
        read_bytes=sum(tensor.nbytes for tensor in (*model.parameters(), *orders) if id(tensor) not in looked_up),
        widest_bytes=max(linear_shape(linear)[0] for linear in blocks) * model.dtype.itemsize,
        last_logits=takes_logits_to_keep(type(model)),
        layers=_cached_layers(model),
    )


@functools.cache
def takes_logits_to_keep(model_class: type[nn.Module]) -> bool:
    """Whether models of a class can make the logits of the last positions only."""
    return "logits_to_keep" in inspect.signature(model_class.forward).parameters


def _weights(linears: list[nn.Module]) -> int:
    return sum(linear.weight.numel() for linear in linears)  # type: ignore[union-attr, operator, misc]


@torch.inference_mode()
def _cached_layers(model: PreTrainedModel) -> tuple[CachedLayer, ...]:
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    layers = getattr(cache_of(model(input_ids=token, use_cache=True)), "layers", ())
    if not layers or any(getattr(layer, "keys", None) is None or layer.keys.ndim != 4 for layer in layers):
        raise UnsupportedModelError(
            f"{type(model).__name__} keeps no keys and values by layer, so its decoding cannot be measured and "
            "compared: expected a model with attention in every block and a cache."
        )
    return tuple(
        CachedLayer(
            query_heads=model.config.get_text_config().num_attention_heads,
            head_features=layer.keys.shape[-1] + layer.values.shape[-1],
            token_bytes=layer.keys.nbytes + layer.values.nbytes,
            window=getattr(layer, "sliding_window", None),
        )
        for layer in layers
    )
