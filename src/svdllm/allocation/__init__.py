"""How a budget is spread over the targets: a map target -> rank; what is not in it stays dense."""

from svdllm.allocation.uniform import Ranks, fill_budget, uniform_rank, uniform_ranks

__all__ = ["Ranks", "fill_budget", "uniform_rank", "uniform_ranks"]
