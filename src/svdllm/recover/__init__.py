"""Recovery: a little training after compression, by Algorithm 3 of the paper or by what beats it."""

from __future__ import annotations

from svdllm.recover.record import RecoveryResult, TrainingRecord
from svdllm.recover.run import recover
from svdllm.recover.settings import Recovery, make_recovery

__all__ = ["Recovery", "RecoveryResult", "TrainingRecord", "make_recovery", "recover"]
