"""Products that are known to be symmetric: almost half of their operations are left out.

Shape suffixes: ``N`` size of the product, ``M`` and ``I`` the features that are summed.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Width of a panel of a symmetric product: narrower panels skip more of the lower triangle but multiply slower.
PANEL = 192
# Rows or columns of a weight or metric that are converted to float64 at once.
ROWS = 1024


def congruence(weight_NI: Tensor, gram: Tensor | None) -> Tensor:
    """``W C W^T`` for ``C`` in one of its forms (``None``, ``(I,)``, ``(I, I)``), float64 and exactly symmetric."""
    weight_NI = weight_NI.double()
    if gram is None:
        return symmetric_product(weight_NI, weight_NI.mT)
    weighted_NI = weight_NI * gram.double() if gram.ndim == 1 else _times(weight_NI, gram)
    return symmetric_product(weighted_NI, weight_NI.mT)


def _times(weight_NI: Tensor, gram_II: Tensor) -> Tensor:
    """``W C``, float64, without all of ``C`` in float64."""
    if gram_II.dtype == torch.float64:
        return weight_NI @ gram_II
    product_NI = torch.empty_like(weight_NI)
    for columns_NC, columns_IC in zip(product_NI.split(ROWS, dim=1), gram_II.split(ROWS, dim=1), strict=True):
        columns_NC.copy_(weight_NI @ columns_IC.double())
    return product_NI


def symmetric_product(left_NM: Tensor, right_MN: Tensor) -> Tensor:
    """A product that is known to be symmetric; only its upper triangle is multiplied."""
    size = left_NM.shape[0]
    product_NN = left_NM.new_empty(size, size)
    for start, stop, panel in upper_panels(left_NM, right_MN):
        corner = panel[:, : stop - start].triu_()
        corner += corner.triu(1).mT
        product_NN[start:stop, start:] = panel
        product_NN[stop:, start:stop] = panel[:, stop - start :].mT
    return product_NN


def cholesky_in_place(matrix_NN: Tensor) -> tuple[Tensor, bool]:
    """The lower Cholesky factor of a contiguous symmetric matrix, in its memory, and whether there is one.

    LAPACK wants columns that are contiguous, which the rows of a symmetric matrix are.
    """
    root_NN = matrix_NN.mT
    info = torch.empty((), dtype=torch.int32, device=matrix_NN.device)
    torch.linalg.cholesky_ex(root_NN, out=(root_NN, info))
    return root_NN, not info.item()


def solved_by_root(root_NN: Tensor, product_RN: Tensor) -> Tensor:
    """``P C^-1`` (``R x N``) for ``C`` with the lower Cholesky factor ``root_NN``."""
    half_NR = torch.linalg.solve_triangular(root_NN, product_RN.mT, upper=False)
    return torch.linalg.solve_triangular(root_NN.mT, half_NR, upper=True).mT


def upper_panels(left_NM: Tensor, right_MN: Tensor, buffer: Tensor | None = None) -> Iterator[tuple[int, int, Tensor]]:
    """Computes the upper triangle of a symmetric product in panels.

    Yields ``start, stop, product[start:stop, start:]``. With a ``buffer`` of ``PANEL`` rows, each panel overwrites the
    previous one.
    """
    size = left_NM.shape[0]
    for start in range(0, size, PANEL):
        stop = min(start + PANEL, size)
        out = None if buffer is None else buffer[: (stop - start) * (size - start)].view(stop - start, -1)
        yield start, stop, torch.mm(left_NM[start:stop], right_MN[:, start:], out=out)
