"""The left metric of a tall weight, as far as the weight's own outputs reach.

A fit ``W' = W B`` has the loss ``||L (W - W') S||^2``, which depends on ``G = L^T L`` through ``W^T G W`` alone: the
pullback of ``G`` through ``W``. It has ``in x in`` numbers where ``G`` has ``out x out``, and is a sum over tokens as
``G`` is, ``sum (W^T g) (W^T g)^T``.

Shape suffixes: ``O`` out_features, ``I`` in_features.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from svdllm.compression.math.symmetric import ROWS, symmetric_product


class Pullback(NamedTuple):
    """``W^T G W`` for ``G = H + diag(d)``, where ``H`` is positive semi-definite and ``d`` positive."""

    product_II: Tensor  # W^T H W
    diagonal_O: Tensor  # d

    def gram(self, weight_OI: Tensor) -> Tensor:
        """``W^T G W`` (``in x in``), float64 and exactly symmetric."""
        gram_II = self.product_II.to(torch.float64, copy=True)
        for rows_RI, diagonal_R in zip(weight_OI.split(ROWS), self.diagonal_O.double().split(ROWS), strict=True):
            rows_RI = rows_RI.double()
            gram_II += symmetric_product(rows_RI.mT, diagonal_R[:, None] * rows_RI)
        return gram_II

    def factors(self, weight_OI: Tensor) -> tuple[Tensor, Tensor]:
        """``W = A R`` with ``R^T R = W^T G W`` and ``A^T G A`` the identity; float64, for ``W`` of any rank.

        Nothing is squared: ``R`` is that of the QR factorisation of a root of ``H`` above one of ``diag(d)``.

        Returns:
            ``A`` (``out x in``) and ``R`` (``in x in``). ``A`` is defined for a singular ``R`` too.

        Raises:
            torch.linalg.LinAlgError: the eigenvalue iteration does not converge (non-finite input).
        """
        energies_I, basis_II = torch.linalg.eigh(self.product_II.double())
        root_II = energies_I.clamp_min(0).sqrt()[:, None] * basis_II.mT
        scale_O = self.diagonal_O.double().sqrt()[:, None]
        columns, factor_II = torch.linalg.qr(torch.cat([root_II, scale_O * weight_OI.double()]))
        return columns[len(root_II) :] / scale_O, factor_II

    def after(self, transform_II: Tensor) -> Pullback:
        """The metric of ``W T`` in place of ``W``."""
        half_II = transform_II.double().mT @ self.product_II.double()
        return Pullback(symmetric_product(half_II, transform_II.double()), self.diagonal_O)

    def to(self, device: torch.device | str | None = None) -> Pullback:
        """Moves it to a device."""
        return Pullback(self.product_II.to(device), self.diagonal_O.to(device))
