"""Makes an attention layer of transformers keep latents in its cache: its own forward, with three parts replaced.

``k_proj`` and ``v_proj`` hand over ``V x``; the object that the layer takes for its cache stores it; and the attention
function rebuilds ``U V x``, or works with the latents where this takes fewer multiplications.

Shapes: ``B`` batch, ``H`` heads, ``T`` new tokens, ``S`` slots of the cache, ``D`` width of a head, ``R`` rank.
"""

from __future__ import annotations

import copy
import functools
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from svdllm.inference.cache_names import cache_name
from svdllm.inference.fuse import FusedFactors, is_plain
from svdllm.inference.latent_keys import KeyPath
from svdllm.inference.packed import bias_of, expanded_u, is_packed, latent_of, out_features_of, output_of

ATTENTION_FUNCTION = "svdllm_latent"


class _Tapped(nn.Module):
    """A pair or a packed linear that keeps its latent for the attention layer.

    keeps: the next call keeps the latent.
    gives_nothing: the next call returns zeros, because nobody reads the output.
    """

    kept: Tensor | None
    keeps: bool
    gives_nothing: bool
    expanded_OR: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        nothing = x.new_zeros(()).expand(*x.shape[:-1], out_features_of(self))
        if self.gives_nothing and not self.keeps:
            return nothing
        latent = self.latent(x) if isinstance(self, FusedFactors) else latent_of(self, x)
        self.kept = latent if self.keeps else None
        return nothing if self.gives_nothing else self.output(latent)

    def output(self, latent: Tensor) -> Tensor:
        """The output (..., out) from a latent (..., rank)."""
        if is_packed(self, "rows") and is_plain(self.svd_u):
            return F.linear(latent, self.u_OR, bias_of(self))
        return output_of(self, latent)

    @property
    def u_OR(self) -> Tensor:
        """``U`` (out, rank). That of a linear packed by rows is made once."""
        if not is_packed(self, "rows"):
            return expanded_u(self)
        if self.expanded_OR is None:
            self.expanded_OR = expanded_u(self)
        return self.expanded_OR

    def expect(self, keeps: bool, gives_nothing: bool) -> None:
        self.kept, self.keeps, self.gives_nothing = None, keeps, gives_nothing

    def take(self) -> Tensor:
        """Returns and forgets the kept latent, as one head: (B, 1, T, R)."""
        latent, self.kept = self.kept, None
        assert latent is not None
        return latent[:, None]

    def install(self) -> None:
        self.expanded_OR = None
        self.expect(keeps=False, gives_nothing=False)
        if isinstance(self, FusedFactors):
            self.shared.give_latent(self.index, True)

    def remove(self) -> None:
        if isinstance(self, FusedFactors):
            self.shared.give_latent(self.index, False)
        del self.kept, self.keeps, self.gives_nothing, self.expanded_OR

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.expanded_OR = None
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any) -> None:
        self.expanded_OR = None
        super()._load_from_state_dict(*args)


@functools.cache
def _tapped(cls: type[nn.Module]) -> type[nn.Module]:
    return type(cls.__name__, (_Tapped, cls), {"__module__": cls.__module__})


class LatentAttention:
    """Makes one attention layer keep latents; ``install`` and ``remove`` change the layer in place.

    Keys are kept as latents if there is a ``key_path``, values with ``latent_values``. If both are and share one first
    factor, its latent is kept once, in the place of the keys.
    """

    def __init__(self, layer: Any, heads: int, key_path: KeyPath | None, latent_values: bool):
        self.layer, self.heads = layer, heads
        self.key_path = key_path
        self.taps = [layer.k_proj] * (key_path is not None) + [layer.v_proj] * latent_values
        self.latent_values = latent_values
        self.joint = len(self.taps) == 2 and layer.k_proj.svd_v is layer.v_proj.svd_v
        self.config = layer.config
        self.cache_name = cache_name(layer)
        self.cache: Any = None
        self.kept: tuple[Tensor, Tensor] | None = None

    def install(self) -> None:
        AttentionInterface.register(ATTENTION_FUNCTION, attention_function)
        for linear in self.taps:
            linear.__class__ = _tapped(type(linear))
            linear.install()
        self.layer.config = copy.copy(self.config)
        self.layer.config._attn_implementation_internal = ATTENTION_FUNCTION
        self.layer.latent_attention = self
        self.hook = self.layer.register_forward_pre_hook(self._enter, with_kwargs=True)

    def remove(self) -> None:
        self.hook.remove()
        del self.layer.latent_attention
        self.layer.config = self.config
        for linear in self.taps:
            linear.remove()
            linear.__class__ = type(linear).__bases__[1]

    def _enter(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Takes the place of the layer's cache, and uses the slots of the cache as positions.

        With rotary embeddings, scores depend only on the distance of two positions. Tokens that see each other are as
        far apart in the cache as in the text.
        """
        self.cache, self.kept = kwargs.get(self.cache_name), None
        if self.cache is None:
            for linear in self.taps:
                linear.expect(keeps=False, gives_nothing=False)
            return args, kwargs
        hidden_states = args[0] if args else kwargs["hidden_states"]
        self.new = hidden_states.shape[1]
        past = self.cache.get_seq_length(self.layer.layer_idx)
        self.past = past.clone() if isinstance(past, Tensor) else past  # a static cache counts on in place
        self.empty = not isinstance(past, Tensor) and past == 0
        for linear in self.taps:
            repeats = self.joint and linear is layer.v_proj
            linear.expect(keeps=not repeats, gives_nothing=not self.empty)
        kwargs = {**kwargs, self.cache_name: self}
        if self.key_path is not None and self.key_path.positions is not None:
            kwargs["position_embeddings"] = self._turns_of_new(hidden_states)
        return args, kwargs

    def _turns_of_new(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        new = hidden_states.shape[1]
        if isinstance(self.past, Tensor):
            cos, sin = self._turns(self.cache.layers[self.layer.layer_idx].max_cache_len, hidden_states)
            slots = torch.arange(new, device=cos.device) + self.past
            return cos[slots][None], sin[slots][None]
        cos, sin = self._turns(self.past + new, hidden_states)
        return cos[None, self.past : self.past + new], sin[None, self.past : self.past + new]

    def _turns(self, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
        assert self.key_path is not None
        if self.key_path.positions is None:
            return like.new_empty(length, 0), like.new_empty(length, 0)
        return self.key_path.positions.table(length, like)

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Called by the layer as its cache's ``update``, with the keys and values (B, H, T, D) of new tokens.

        The cache keeps one head of latents (B, 1, T, R), or one head of the whole width (B, 1, T, H * D). With a joint
        latent, the values in the cache are empty (B, 1, T, 0).
        """
        new_keys = _as_one_head(keys) if self.key_path is None else self.layer.k_proj.take()
        if self.joint:
            new_values = new_keys[..., :0]
        else:
            new_values = self.layer.v_proj.take() if self.latent_values else _as_one_head(values)
        kept = self.cache.update(new_keys, new_values, *args, **kwargs)
        if self.joint:
            kept = kept[0], kept[0]
        self.cache = None
        if self.empty and kept[0].shape[-2] == keys.shape[-2]:
            return keys, values
        self.kept = kept
        return kept

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        kept, self.kept = self.kept, None
        if kept is not None and self._works_with_latents(query, mask, kwargs):
            return self._attend_to_latents(query, *kept, mask, kwargs.get("scaling"))
        if kept is not None:
            key, value = self._keys(kept[0]), self._values(kept[1])
        eager: Any = getattr(sys.modules[type(self.layer).__module__], "eager_attention_forward", None)
        ordinary: Any = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager)
        return ordinary(self.layer, query, key, value, mask, **kwargs)

    def _works_with_latents(self, query: Tensor, mask: Any, kwargs: dict[str, Any]) -> bool:
        """Whether attention works on latents: fewer multiplications than with ``U`` times latents, for few tokens."""
        _, heads, new, width = query.shape
        return (
            new * heads < self.heads * width
            and ((mask is None and new == 1) or (isinstance(mask, Tensor) and mask.ndim == 4))
            and self.config._attn_implementation in ("sdpa", "eager")
            and kwargs.get("softcap") is None
            and kwargs.get("s_aux") is None
            and all(is_plain(linear.svd_u) for linear in self.taps)
        )

    def _attend_to_latents(
        self, query: Tensor, kept_keys: Tensor, kept_values: Tensor, mask: Tensor | None, scaling: float | None
    ) -> tuple[Tensor, Tensor]:
        batch, heads, new, width = query.shape
        grouped = query.reshape(batch, self.heads, -1, width) * (width**-0.5 if scaling is None else scaling)
        scores = self._scores(grouped, kept_keys).view(batch, heads, new, -1)
        if mask is not None:
            lowest = torch.finfo(scores.dtype).min
            scores = scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask
        weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
        output = self._weighted(weights, kept_values).reshape(batch, heads, new, -1)
        return output.transpose(1, 2).contiguous(), weights

    def _scores(self, query: Tensor, kept: Tensor) -> Tensor:
        """Scores (B, H, N, S) of all queries of a head of keys (B, H, N, D) with every slot."""
        if self.key_path is None:
            return query @ self._heads(kept[:, 0]).mT
        if not self.key_path.steps:  # softmax does not see the bias, which adds the same to all scores of a query
            latent_query = query @ self.layer.k_proj.u_OR.unflatten(0, (self.heads, -1))
            return (latent_query.flatten(1, 2) @ kept[:, 0].mT).unflatten(1, (self.heads, -1))
        keys = _transposed_output(self.layer.k_proj, kept[:, 0])
        return query @ self._stepped(keys.unflatten(1, (self.heads, -1)).mT).mT

    def _weighted(self, weights: Tensor, kept: Tensor) -> Tensor:
        """Sums of values (B, H, N, D) weighted by ``weights`` (B, all heads, T, S)."""
        if not self.latent_values:
            return weights.reshape(weights.shape[0], self.heads, -1, weights.shape[-1]) @ self._heads(kept[:, 0])
        sums = (weights.flatten(1, 2) @ kept[:, 0]).unflatten(1, (self.heads, -1))
        values = sums @ self.layer.v_proj.u_OR.unflatten(0, (self.heads, -1)).mT
        bias = bias_of(self.layer.v_proj)
        return values if bias is None else values + bias.view(self.heads, 1, -1)  # weights sum to one

    def _keys(self, kept: Tensor) -> Tensor:
        if self.key_path is None:
            return self._heads(kept[:, 0])
        return self._stepped(self._heads(self.layer.k_proj.output(kept[:, 0])))

    def _stepped(self, keys: Tensor) -> Tensor:
        """Applies norm and rotation to the keys (B, H, S, D) of all slots that the cache returned."""
        assert self.key_path is not None
        slots, first = keys.shape[-2], 0
        if not isinstance(self.past, Tensor):  # a sliding window has dropped the slots before it
            first = max(0, self.past + self.new - slots)
        cos, sin = (part[first : first + slots] for part in self._turns(first + slots, keys))
        for step in self.key_path.steps:
            keys = step(keys, cos, sin)
        return keys

    def _values(self, kept: Tensor) -> Tensor:
        return self._heads(self.layer.v_proj.output(kept[:, 0]) if self.latent_values else kept[:, 0])

    def _heads(self, joined: Tensor) -> Tensor:
        """Splits ``(B, S, H * D)`` into heads ``(B, H, S, D)``."""
        return joined.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def _as_one_head(parts: Tensor) -> Tensor:
    """Joins heads ``(B, H, T, D)`` into one ``(B, 1, T, H * D)``."""
    return parts.transpose(1, 2).flatten(-2)[:, None]


def _transposed_output(linear: _Tapped, latents: Tensor) -> Tensor:
    """``U m + b`` of latents (B, S, R), transposed to (B, out, S): a rotation then reads contiguous rows."""
    product = torch.bmm(linear.u_OR.expand(latents.shape[0], -1, -1), latents.mT)
    bias = bias_of(linear)
    return product if bias is None else product.add_(bias[:, None])


def attention_function(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
    """The attention function that is registered with transformers for layers that keep latents."""
    return module.latent_attention.attend(query, key, value, mask, **kwargs)
