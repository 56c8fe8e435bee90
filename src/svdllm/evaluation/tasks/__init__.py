"""Runs tasks of lm-evaluation-harness, with its definitions, prompts and metrics, on dense and compressed models."""

from __future__ import annotations

from svdllm.evaluation.tasks.prepare import TaskSuite, check_models, open_tasks
from svdllm.evaluation.tasks.record import Comparison, Metric, TaskResults, TaskScore, compare_scores
from svdllm.evaluation.tasks.run import run_tasks

__all__ = [
    "Comparison",
    "Metric",
    "TaskResults",
    "TaskScore",
    "TaskSuite",
    "check_models",
    "compare_scores",
    "open_tasks",
    "run_tasks",
]
