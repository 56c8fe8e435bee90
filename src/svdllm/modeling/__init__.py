"""Low-rank model classes: made for every family of transformers, registered with it, and shipped in checkpoints."""

from svdllm.modeling.factory import FamilyClasses, families, family_classes, low_rank_config, register_all
from svdllm.modeling.lowrank import HASHES_FILE, LowRankLinear, LowRankMixin, compare_hashes, swap_linears, write_hashes
from svdllm.modeling.lowrank_config import FORMAT_VERSION, LowRankConfigMixin, check_svdllm
from svdllm.modeling.render import render

__all__ = [
    "FORMAT_VERSION",
    "HASHES_FILE",
    "FamilyClasses",
    "LowRankConfigMixin",
    "LowRankLinear",
    "LowRankMixin",
    "check_svdllm",
    "compare_hashes",
    "families",
    "family_classes",
    "low_rank_config",
    "register_all",
    "render",
    "swap_linears",
    "write_hashes",
]
