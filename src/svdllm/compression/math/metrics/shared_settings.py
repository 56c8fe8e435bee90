"""Settings that several metrics read."""

from __future__ import annotations

from pydantic import BaseModel

from svdllm.common.settings import setting

# The loss reaches queries and keys through a softmax only. Their gradients are small and few, and are left out.
QUERY_AND_KEY = (r"\.(q|k)_proj$", r"\.(query|key)$")


class SharedSettings(BaseModel):
    """Settings that several metrics read."""

    gradient_samples: int = setting(
        32, "Calibration windows of the backward pass (two-sided, fwsvd).", panel="Method", ge=1
    )
    input_only: tuple[str, ...] = setting(
        QUERY_AND_KEY,
        "Linears whose error is not weighted by gradients (two-sided); may be repeated.",
        panel="Method",
        metavar="REGEX",
        only_with={"metric": ("two-sided",)},
    )
    shrinkage: float = setting(
        0.1,
        "Share of the Gram's diagonal mixed into the Gram, against over-fitting the text; 0 is the paper.",
        panel="Method",
        ge=0,
        le=1,
    )
