"""The form and size in which a linear is stored and run, in place of its dense matrix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Chosen:
    """A form of the table ``svdllm.compression.forms.FORMS``, and its size.

    size: the rank, or for ``narrow`` the width: the number of inner features of an MLP that are kept.
    """

    form: str
    size: int


# Target -> its form and size. A target that is not in it stays dense.
Forms = Mapping[str, Chosen]
