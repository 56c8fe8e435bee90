"""How a budget is spread over the targets: a map target -> rank; what is not in it stays dense."""

from svdllm.checkpoint.elastic import Probes
from svdllm.compression.ranks.effective_rank import effective_ranks
from svdllm.compression.ranks.evidence import Allocation, Evidence
from svdllm.compression.ranks.loss import loss_ranks
from svdllm.compression.ranks.strs import candidate_ranks, strs_ranks
from svdllm.compression.ranks.uniform import Cost, Ranks, exact_floor, fill_budget, uniform_rank, uniform_ranks
from svdllm.compression.ranks.v2 import v2_ranks

__all__ = [
    "Allocation",
    "Cost",
    "Evidence",
    "Probes",
    "Ranks",
    "candidate_ranks",
    "effective_ranks",
    "exact_floor",
    "fill_budget",
    "loss_ranks",
    "strs_ranks",
    "uniform_rank",
    "uniform_ranks",
    "v2_ranks",
]
