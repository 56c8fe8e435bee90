"""Settings of the allocations that truncate linears on trial."""

from __future__ import annotations

from pydantic import BaseModel

from svdllm.common.settings import setting


class ProbeSettings(BaseModel):
    """Settings of the allocations that truncate linears on trial."""

    probe_share: float = setting(
        0.5,
        "Upper limit on probing, as a share of the work of calibration and probing together (loss, strs).",
        panel="Allocation",
        gt=0,
        lt=1,
    )
