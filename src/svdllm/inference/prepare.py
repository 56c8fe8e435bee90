"""Prepares a loaded model for inference: fused factors and the choice of key-value cache."""

from __future__ import annotations

from typing import NamedTuple

from transformers import PreTrainedModel

from svdllm.common.errors import InputError
from svdllm.common.progress import Reporter
from svdllm.inference.fuse import fuse_factors
from svdllm.inference.latent_cache import use_latent_cache

KV_CACHES = ("ordinary", "latent", "latent-values")


class Prepared(NamedTuple):
    """The number of groups of first factors that became one product, and of layers that keep latents."""

    fused_groups: int
    latent_layers: int


def check_kv_cache(kind: str) -> None:
    """Raises InputError for an unknown kind of cache."""
    if kind not in KV_CACHES:
        raise InputError(f"--kv-cache {kind!r} is unknown; use {', '.join(KV_CACHES)}.")


def prepare(
    model: PreTrainedModel, *, fuse: bool = True, kv_cache: str = "ordinary", reporter: Reporter | None = None
) -> Prepared:
    """Fuses first factors and chooses the key-value cache of a model, in place. A dense model is not changed.

    Args:
        fuse: see ``svdllm.inference.fuse``.
        kv_cache: ``ordinary``, ``latent`` (keys and values) or ``latent-values``; see
            ``svdllm.inference.latent_cache``. reporter: is warned if no layer can keep latents.

    Raises:
        InputError: the kind of cache is unknown.
        UnsupportedModelError: the model cannot have this cache.
    """
    check_kv_cache(kv_cache)
    fused = fuse_factors(model) if fuse else 0
    latent = 0 if kv_cache == "ordinary" else use_latent_cache(model.eval(), keys=kv_cache == "latent")
    if kv_cache != "ordinary" and latent == 0 and reporter is not None:
        reporter.warn(
            f"No layer of {model.name_or_path} has keys or values of a rank below their width: the cache stays "
            "ordinary."
        )
    return Prepared(fused, latent)
