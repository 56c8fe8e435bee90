"""Refuses a run that the disk or the memory has no room for."""

from __future__ import annotations

from svdllm.checkpoint.output import Output, size_of
from svdllm.common.errors import ResourceError
from svdllm.common.memory import available_bytes
from svdllm.compression.plan import Plan


def require_room(output: Output, plan: Plan) -> None:
    """Raises ResourceError unless there is as much free disk and memory as the plan predicts the run to need."""
    needs = plan.needs
    output.require_disk(needs.disk_bytes, "the run needs", there=size_of(output.work))
    memory = available_bytes()
    more = needs.peak_ram_bytes - needs.ram_by_stage["now"]
    if memory is not None and more > memory:
        stage = max(needs.ram_by_stage, key=lambda name: needs.ram_by_stage[name])
        raise ResourceError(
            f"The run needs {more / 1e9:.2f} GB more memory at its peak (stage {stage!r}), {memory / 1e9:.2f} GB "
            "are free.",
            f"Lower --{'probe-share' if stage == 'probe' else 'batch-tokens'}, or free some memory.",
        )
