"""Refuses a run that the disk or the memory has no room for."""

from __future__ import annotations

import torch

from svdllm.checkpoint.output import Output, size_of
from svdllm.common.memory import require_memory
from svdllm.common.processes import num_local_processes
from svdllm.compression.plan import Plan


def require_room(output: Output, plan: Plan) -> None:
    """Raises ResourceError unless there is as much free disk and memory as the plan predicts the run to need."""
    needs = plan.needs
    output.require_disk(needs.disk_bytes, "the run needs", there=size_of(output.work))
    stage = max(needs.ram_by_stage, key=lambda name: needs.ram_by_stage[name])
    require_memory(
        num_local_processes() * (needs.peak_ram_bytes - needs.ram_by_stage["now"]),
        f"At its peak (stage {stage!r}) the run needs another",
        torch.device("cpu"),
        f"Lower --{'probe-share' if stage == 'probe' else 'batch-tokens'}, or free some memory.",
    )
