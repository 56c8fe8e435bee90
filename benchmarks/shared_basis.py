"""One first factor for several matrices: ``W_e ~ U_e V``, each matrix in its own two-sided metric.

Minimises ``sum_e ||G_e^(1/2) (W_e - U_e V) C_e^(1/2)||^2`` by alternating least squares. Half a step is exact and the
other descends, so the error never rises. The start is the best common row space if all matrices had the summed Gram.
With ``side`` "out" it is the columns that the matrices share, ``W_e ~ U V_e``: the same problem, transposed.

Legend: ``E`` matrices, ``O`` rows and ``I`` columns of each, ``R`` rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Operator = Callable[[Tensor], Tensor]
ROUNDS = 12
STEPS = 8  # of conjugate gradients in a round
LEAST_GAIN = 1e-4  # of the error; a round that gains less is the last


class SharedBasis(NamedTuple):
    """``v_RI``, ``u_OR`` of each matrix (float64), and the error (squared, in the metrics) after every round."""

    v_RI: Tensor
    us_OR: list[Tensor]
    errors: list[float]


def shared_basis(
    weights_OI: Sequence[Tensor], grams_II: Sequence[Tensor], lefts_OO: Sequence[Tensor], rank: int
) -> SharedBasis:
    """Finds the factors of rank ``rank``, at most ``I``.

    Args:
        grams_II: right metrics ``C_e``, positive definite.
        lefts_OO: left metrics ``G_e``, positive definite.

    Raises:
        torch.linalg.LinAlgError: a Gram is not positive definite; shrink it.
    """
    problem = _Problem([w.double() for w in weights_OI], [c.double() for c in grams_II], [g.double() for g in lefts_OO])
    v_RI = problem.start(rank)
    us_OR = problem.coefficients(v_RI)
    errors = [problem.error(us_OR, v_RI)]
    for _ in range(ROUNDS):
        v_RI = problem.orthonormal(problem.improved(us_OR, v_RI))
        us_OR = problem.coefficients(v_RI)
        errors.append(problem.error(us_OR, v_RI))
        if errors[-2] - errors[-1] <= LEAST_GAIN * errors[-2]:
            break
    return SharedBasis(v_RI, us_OR, errors)


def products_with_shared_basis(
    weights_OI: Sequence[Tensor], grams_II: Sequence[Tensor], lefts_OO: Sequence[Tensor], params: int, side: str
) -> list[Tensor] | None:
    """The matrices multiplied out again, of the largest rank within ``params``; None if that is beyond full rank.

    Args:
        params: of the shared factor and all others together.
        side: "in" or "out", whose factor is shared.
    """
    rank = shared_rank(weights_OI, params, side)
    if rank > weights_OI[0].shape[side == "in"]:
        return None
    if side == "out":
        made = shared_basis([w.mT for w in weights_OI], lefts_OO, grams_II, rank)
        return [(u_IR @ made.v_RI).mT for u_IR in made.us_OR]
    made = shared_basis(weights_OI, grams_II, lefts_OO, rank)
    return [u_OR @ made.v_RI for u_OR in made.us_OR]


def shared_rank(weights_OI: Sequence[Tensor], params: int, side: str) -> int:
    """The largest rank ``k`` with ``k (I + E O)`` parameters, or ``k (O + E I)``, at most ``params``."""
    out_features, in_features = weights_OI[0].shape
    one, others = (in_features, out_features) if side == "in" else (out_features, in_features)
    return params // (one + len(weights_OI) * others)


class _Problem(NamedTuple):
    weights_OI: list[Tensor]
    grams_II: list[Tensor]
    lefts_OO: list[Tensor]

    @property
    def gram_II(self) -> Tensor:
        return torch.stack(self.grams_II).sum(0)

    def start(self, rank: int) -> Tensor:
        """Leading right singular vectors of all ``G_e^(1/2) W_e`` in the summed Gram ``L L^T``.

        Singular vectors ``q`` of ``L^T M L``, with ``M = sum_e W_e^T G_e W_e``, give the rows ``L^-T q``.
        """
        root_II = torch.linalg.cholesky(self.gram_II)
        both_II = sum((w.mT @ g @ w for w, g in zip(self.weights_OI, self.lefts_OO, strict=True)), torch.zeros(()))
        vectors_II = torch.linalg.eigh(root_II.mT @ both_II @ root_II).eigenvectors
        leading_IR = vectors_II[:, vectors_II.shape[1] - rank :]
        return torch.linalg.solve_triangular(root_II.mT, leading_IR, upper=True).mT

    def coefficients(self, v_RI: Tensor) -> list[Tensor]:
        """The best ``U_e = W_e C_e V^T (V C_e V^T)^-1``: the left metrics do not matter."""
        found = []
        for weight_OI, gram_II in zip(self.weights_OI, self.grams_II, strict=True):
            seen_RI = v_RI @ gram_II
            root_RR = torch.linalg.cholesky(seen_RI @ v_RI.mT)
            found.append(torch.cholesky_solve(seen_RI @ weight_OI.mT, root_RR).mT)
        return found

    def improved(self, us_OR: list[Tensor], v_RI: Tensor) -> Tensor:
        """Conjugate gradients for ``sum_e A_e V C_e = sum_e U_e^T G_e W_e C_e`` with ``A_e = U_e^T G_e U_e``.

        The preconditioner takes the sums: ``(sum_e A_e) V (sum_e C_e)``.
        """
        left = [u.mT @ g for u, g in zip(us_OR, self.lefts_OO, strict=True)]
        inner_RR = [ug @ u for ug, u in zip(left, us_OR, strict=True)]
        right = sum(
            (ug @ w @ c for ug, w, c in zip(left, self.weights_OI, self.grams_II, strict=True)), torch.zeros(())
        )
        gram_root = torch.linalg.cholesky(self.gram_II)
        sum_RR = torch.stack(inner_RR).sum(0)
        damping = 1e-12 * sum_RR.diagonal().mean()
        inner_root = torch.linalg.cholesky(sum_RR + damping * torch.eye(len(sum_RR), dtype=sum_RR.dtype))

        def applied(x_RI: Tensor) -> Tensor:
            return sum((a @ x_RI @ c for a, c in zip(inner_RR, self.grams_II, strict=True)), torch.zeros(()))

        def preconditioned(x_RI: Tensor) -> Tensor:
            return torch.cholesky_solve(torch.cholesky_solve(x_RI, inner_root).mT, gram_root).mT

        return conjugate_gradients(applied, preconditioned, right, v_RI, STEPS)

    def orthonormal(self, v_RI: Tensor) -> Tensor:
        """Other rows of the same span, orthonormal in the summed Gram: the product ``U_e V`` does not change."""
        root_RR = torch.linalg.cholesky(v_RI @ self.gram_II @ v_RI.mT)
        return torch.linalg.solve_triangular(root_RR, v_RI, upper=False)

    def error(self, us_OR: list[Tensor], v_RI: Tensor) -> float:
        total = 0.0
        for w, u, c, g in zip(self.weights_OI, us_OR, self.grams_II, self.lefts_OO, strict=True):
            rest_OI = w - u @ v_RI
            total += ((g @ rest_OI) * (rest_OI @ c)).sum().item()
        return total


def conjugate_gradients(
    applied: Operator, preconditioned: Operator, right: Tensor, start: Tensor, steps: int
) -> Tensor:
    """Some steps of preconditioned conjugate gradients for ``applied(x) = right``."""
    x, rest = start, right - applied(start)
    z = preconditioned(rest)
    direction, product = z, (rest * z).sum()
    for _ in range(steps):
        image = applied(direction)
        curvature = (direction * image).sum()
        if curvature <= 0 or product <= 0:
            break
        step = product / curvature
        x, rest = x + step * direction, rest - step * image
        z = preconditioned(rest)
        product, before = (rest * z).sum(), product
        direction = z + (product / before) * direction
    return x
