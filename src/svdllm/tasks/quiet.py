"""The harness and the library of its data sets write and draw bars while they work; here they do not."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock


@contextmanager
def quiet() -> Iterator[None]:
    """No bars, no remarks; what they were set to before comes back."""
    import datasets
    import lm_eval.api.task

    logger = logging.getLogger("lm_eval")
    level, bars = logger.level, datasets.are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        # the bar of the prompts has no switch
        with mock.patch.object(lm_eval.api.task, "tqdm", lambda rows, **_: rows, create=True):
            yield
    finally:
        logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()
