"""Recovery: a short training after compression, by Algorithm 3 of the paper or by a method that does better."""

from __future__ import annotations

from svdllm.recovery.record import TrainingRecord
from svdllm.recovery.result import RecoveryResult
from svdllm.recovery.run import recover
from svdllm.recovery.settings import Recovery, make_recovery

__all__ = ["Recovery", "RecoveryResult", "TrainingRecord", "make_recovery", "recover"]
