"""The rows of the table of forms."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from svdllm.models.structure import Target

Shapes = dict[str, tuple[int, ...]]  # name within a linear -> shape
# A target before it is stored: ``svd_u.weight`` (out x rank) and ``svd_v.weight`` (rank x in), or ``weight``
# (out x in); and ``bias`` (out) if it has one.
Fitted = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Form:
    """A row of ``FORMS``: what may take the place of a dense matrix.

    A form is applied to single linears, or ``of_mlps`` to all linears of an MLP together. Several forms may share one
    ``curve`` of error against size, and then one probe: ``truncation`` is a linear's spectrum, ``narrowing`` the error
    of an MLP by its width, ``rounding`` that of a matrix by its bits.

    Args:
        sizes: ``(target, round_to)`` -> the sizes that the form can have for a target, ascending; none if it cannot.
        shapes: ``(target, linear, size)`` -> the tensors that take the place of a linear's weight and bias.
        entry: ``(target, linear, size)`` -> what ``config.json`` says about the linear.
        store: ``(target, fitted, size, order)`` -> linear -> name -> tensor. ``order`` lists the inner features of the
            target's MLP, those first that are kept longest; None outside an MLP.
        exact_rank: ``(target, params)`` -> the rank, as a real number, at which a target has so many parameters.
        orders_inputs: whether the stored tensors take the inputs in an order of their own, which ``order`` holds, where
            the inputs are the inner features of an MLP.
        nested: whether the tensors of a smaller size are parts of those of a larger one.
        needs_gram: whether it is fitted to the Gram of the inputs.
        adds_bias: whether it can take a bias that corrects the mean output.
        bits: of a weight, where they are fewer than the source's. Such a form has as many parameters as the dense
            matrix, and its size is the number of inputs that share a scale.
        base: the form whose factors are stored in ``factor_bits`` bits, with a scale for each row.
    """

    name: str
    summary: str
    source: str
    curve: str
    sizes: Callable[[Target, int], Sequence[int]]
    shapes: Callable[[Target, str, int], Shapes]
    entry: Callable[[Target, str, int], dict[str, Any]]
    store: Callable[[Target, Fitted, int, Tensor | None], dict[str, dict[str, Tensor]]]
    exact_rank: Callable[[Target, float], float] | None = None
    of_mlps: bool = False
    orders_inputs: bool = False
    nested: bool = False
    needs_gram: bool = False
    adds_bias: bool = True
    bits: int | None = None
    base: Form | None = None
    factor_bits: int | None = None


def out_features_of(target: Target, linear: str) -> int:
    """The out_features of one linear of a target."""
    return dict(target.parts).get(linear, target.out_features)
