"""Silences the harness, and the library of its data sets, while they work."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock


@contextmanager
def quiet() -> Iterator[None]:
    """Turns off progress bars and remarks, and restores the settings afterwards."""
    import datasets
    import lm_eval.api.task
    import lm_eval.evaluator

    logger = logging.getLogger("lm_eval")
    level, bars = logger.level, datasets.are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        with (
            # the bar of the prompts has no switch
            mock.patch.object(lm_eval.api.task, "tqdm", lambda rows, **_: rows, create=True),
            # the commit would be that of whatever repository the user is in, and outside of one git complains
            mock.patch.object(lm_eval.evaluator, "get_git_commit_hash", return_value=None),
        ):
            yield
    finally:
        logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()
