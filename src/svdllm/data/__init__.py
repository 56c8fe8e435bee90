"""Turns text from any source into windows of tokens, with a fingerprint."""

from __future__ import annotations

from svdllm.data.checks import check_source
from svdllm.data.windows import TokenWindows, calibration_windows, evaluation_tokens

__all__ = ["TokenWindows", "calibration_windows", "check_source", "evaluation_tokens"]
