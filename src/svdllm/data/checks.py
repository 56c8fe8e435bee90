"""Refuses data sources that cannot work, before anything is read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from svdllm.common.errors import InputError
from svdllm.common.extras import require_extra
from svdllm.data.specs import FileSpec, HubSpec, MixtureSpec, NamedSet, Spec, parse_spec


def check_source(source: str | Sequence[str] | Tensor | Any) -> None:
    """Refuses a source that cannot work, before anything is read, tokenised or downloaded.

    Checks the grammar, the names, the existence and kind of files, and that the optional packages for the source are
    installed.

    Raises:
        InputError: says what is wrong and what to do.
    """
    if isinstance(source, str):
        _check_extras(parse_spec(source))
    elif isinstance(source, Tensor):
        check_token_tensor(source)
    elif isinstance(source, (list, tuple)):
        check_texts(source)
    elif not hasattr(source, "column_names"):
        raise InputError(
            f"a data source of type {type(source).__name__}: expected a spec (str), a list of str, "
            "a datasets.Dataset or a 2-D tensor of token ids"
        )


def check_texts(texts: Sequence[object]) -> None:
    """Raises InputError unless ``texts`` is a list of at least one str."""
    if not texts:
        raise InputError("the list of texts is empty: give at least one str")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputError(f"a list of texts must hold str, item {index} is {type(text).__name__}")


def check_token_tensor(ids: Tensor) -> None:
    """Raises InputError unless ``ids`` is a 2-D tensor of non-negative integers."""
    if ids.ndim != 2:
        raise InputError(f"token ids must be 2-D (num_windows, seqlen), found shape {tuple(ids.shape)}")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype.itemsize == 1:
        raise InputError(f"token ids must be integers of 16 bits or more (torch.int64), found {ids.dtype}")
    if ids.numel() and int(ids.min()) < 0:
        raise InputError(f"token ids must not be negative, found {int(ids.min())}: remove padding such as -100")


def _check_extras(spec: Spec) -> None:
    if isinstance(spec, MixtureSpec):
        for part, _, _ in spec.parts:
            _check_extras(part)
    elif isinstance(spec, FileSpec) and spec.path.suffix.lower() == ".parquet":
        require_extra("pyarrow", f"reading {spec.path}")
    elif isinstance(spec, NamedSet) and isinstance(spec.calibration, HubSpec):
        require_extra("datasets", f"the data set '{spec.name}'")
    elif isinstance(spec, HubSpec):
        require_extra("datasets", f"the data set '{spec.repo}'")
