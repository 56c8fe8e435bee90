"""Low-rank model classes: made for every family of transformers, registered there, and shipped in checkpoints."""

from svdllm.models.low_rank.factory import FamilyClasses, family_classes, low_rank_config, register_all
from svdllm.models.low_rank.families import families
from svdllm.models.low_rank.lowrank import (
    FACTORED,
    HASHES_FILE,
    RANKED,
    LowRankLinear,
    LowRankMixin,
    PackedLinear,
    compare_hashes,
    swap_linears,
    write_hashes,
)
from svdllm.models.low_rank.lowrank_config import FORMAT_VERSION, LowRankConfigMixin, check_svdllm

__all__ = [
    "FACTORED",
    "RANKED",
    "FORMAT_VERSION",
    "HASHES_FILE",
    "FamilyClasses",
    "LowRankConfigMixin",
    "LowRankLinear",
    "LowRankMixin",
    "PackedLinear",
    "check_svdllm",
    "compare_hashes",
    "families",
    "family_classes",
    "low_rank_config",
    "register_all",
    "swap_linears",
    "write_hashes",
]
