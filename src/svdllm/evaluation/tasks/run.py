"""Runs one model on prepared tasks."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel

from svdllm.common.errors import InputError
from svdllm.common.progress import Reporter
from svdllm.evaluation.tasks.prepare import TaskSuite
from svdllm.evaluation.tasks.record import TaskResults, finite, scores_of
from svdllm.models.model_names import short_name

BATCH_SIZE = 8


def run_tasks(
    model: PreTrainedModel,
    tokenizer: Any,
    suite: TaskSuite,
    *,
    name: str,
    batch_size: int | None = None,
    reporter: Reporter | None = None,
) -> TaskResults:
    """Runs a loaded model on tasks by ``lm_eval.simple_evaluate``, with the harness's own seeds and settings.

    Raises:
        InputError: ``batch_size`` is below 1.
    """
    import lm_eval
    from lm_eval.utils import handle_non_serializable

    from svdllm.evaluation.tasks.harness_model import HarnessModel

    if batch_size is not None and batch_size < 1:
        raise InputError(f"batch_size must be at least 1, found {batch_size}")
    reporter = reporter or Reporter()
    started = time.perf_counter()
    wrapped = HarnessModel(model, tokenizer, batch_size or BATCH_SIZE, reporter, short_name(name))
    with _told(reporter):
        simple_evaluate: Any = lm_eval.simple_evaluate
        results = simple_evaluate(
            model=wrapped,
            tasks=suite.tasks,
            task_manager=suite.manager,
            num_fewshot=suite.num_fewshot,
            batch_size=batch_size or BATCH_SIZE,
            limit=suite.limit,
            log_samples=False,
        )
    harness = json.loads(json.dumps(results, default=handle_non_serializable))
    return TaskResults(
        model=name,
        scores=scores_of(harness, suite.chances),
        limit=suite.limit,
        batch_size=batch_size or BATCH_SIZE,
        files=suite.files,
        seconds=time.perf_counter() - started,
        harness=finite(harness),
    )


@contextmanager
def _told(reporter: Reporter) -> Iterator[None]:
    """Collects the harness's warnings while a model runs, such as cut prompts; reports each kind once, counted."""
    logger = logging.getLogger("lm_eval.models")
    handler = _Collector()
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate
    for messages in handler.messages.values():
        more = f" (and {len(messages) - 1} times more)" if len(messages) > 1 else ""
        reporter.warn(f"lm-evaluation-harness: {messages[0]}{more}")


class _Collector(logging.Handler):
    """Keeps messages by the line of code that logs them."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: dict[tuple[str, int], list[str]] = {}

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.setdefault((record.pathname, record.lineno), []).append(record.getMessage())
