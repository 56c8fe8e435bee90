"""The table of allocations: how a budget is spread over the targets.

A new one is a file beside this one, a row, and its settings if it has any.
"""

from svdllm.compression.ranks.effective_rank import EFFECTIVE_RANK
from svdllm.compression.ranks.loss import LOSS, LossSettings
from svdllm.compression.ranks.question import Allocation, Evidence
from svdllm.compression.ranks.rows import Row
from svdllm.compression.ranks.strs import STRS, StrsSettings
from svdllm.compression.ranks.uniform import UNIFORM
from svdllm.compression.ranks.v2 import V2

ALLOCATIONS: dict[str, Row] = {row.name: row for row in (UNIFORM, V2, EFFECTIVE_RANK, LOSS, STRS)}


class AllocationSettings(StrsSettings, LossSettings):
    """The settings of all rows."""


__all__ = ["ALLOCATIONS", "Allocation", "AllocationSettings", "Evidence", "Row"]
