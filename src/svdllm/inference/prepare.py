"""What a loaded model is made into before it is run for long."""

from __future__ import annotations

from typing import NamedTuple

from transformers import PreTrainedModel

from svdllm.common.errors import InputError
from svdllm.common.progress import Reporter
from svdllm.inference.fuse import fuse_factors
from svdllm.inference.latent_cache import use_latent_cache

KV_CACHES = ("ordinary", "latent", "latent-values")


class Prepared(NamedTuple):
    """How many groups of first factors became one product, and how many layers keep latents."""

    fused_groups: int
    latent_layers: int


def check_kv_cache(kind: str) -> None:
    """Raises InputError for a kind of cache that there is not."""
    if kind not in KV_CACHES:
        raise InputError(f"--kv-cache {kind!r} is unknown; use {', '.join(KV_CACHES)}.")


def prepare(
    model: PreTrainedModel, *, fuse: bool = True, kv_cache: str = "ordinary", reporter: Reporter | None = None
) -> Prepared:
    """Fuses first factors (``svdllm.inference.fuse``) and chooses the key-value cache (``svdllm.inference.latent_cache``), in place.

    ``kv_cache`` is ``ordinary``, ``latent`` (of keys and values) or ``latent-values``. Nothing is done to a dense model.
    ``reporter`` is told if no layer can keep latents.

    Raises:
        InputError: there is no such cache.
        UnsupportedModelError: the model cannot have it.
    """
    check_kv_cache(kv_cache)
    fused = fuse_factors(model) if fuse else 0
    latent = 0 if kv_cache == "ordinary" else use_latent_cache(model.eval(), keys=kv_cache == "latent")
    if kv_cache != "ordinary" and latent == 0 and reporter is not None:
        reporter.warn(
            f"No layer of {model.name_or_path} has keys or values of a rank below their width: its cache stays ordinary."
        )
    return Prepared(fused, latent)
