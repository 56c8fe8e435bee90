"""The libraries below, made ready for a command: registered model types, no bars and remarks of their own."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from svdllm.cli.console import print_warning
from svdllm.common.processes import is_first


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Imports large libraries in four fifths of the time: nothing that they make is garbage."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def prepared_libraries() -> Iterator[None]:
    """Registers the low-rank model types and silences libraries; a warning of svdllm is shown like those of a run."""
    with without_garbage_collection():
        from svdllm.models.low_rank import register_all
        from svdllm.models.unused_tensors import UnusedTensorsWarning

        register_all()
        _silence()
    if is_first():
        _warn_if_untested()
    with warnings.catch_warnings():
        warnings.simplefilter("default", UnusedTensorsWarning)
        show_as_python = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
            if issubclass(category, UnusedTensorsWarning):
                print_warning(str(message))
            else:
                show_as_python(message, category, *place, **more)

        warnings.showwarning = show
        yield


def _warn_if_untested() -> None:
    from svdllm.common.tested_versions import warn_if_untested

    with warnings.catch_warnings(record=True) as found:
        warn_if_untested()
    for warning in found:
        print_warning(str(warning.message))


def _silence() -> None:
    """Bars and remarks of transformers would tear the bars of svdllm apart; errors still come through."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
