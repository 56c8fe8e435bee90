from typing import NamedTuple

import torch
from torch import Tensor


class Narrowing(NamedTuple):
    order: Tensor
    tails: Tensor
    root: Tensor

    def to(self, dtype=None, device=None):
        return Narrowing(self.order.to(device), self.tails.to(device), self.root.to(device, dtype))


def narrowing(weight_OI, gram_II, left_OO):
    w = weight_OI.double()
    c = gram_II.double()
    g = w.mT @ w if left_OO is None else w.mT @ left_OO.double() @ w
    order = (c.diagonal() * g.diagonal()).argsort(descending=True)
    root = torch.linalg.cholesky(c[order][:, order])
    m = w[:, order] @ root
    if left_OO is not None:
        m = torch.linalg.cholesky(left_OO.double()).mT @ m
    e = m.square().sum(0)
    tails = torch.cat([e.flip(0).cumsum(0).flip(0), e.new_zeros(1)])
    return Narrowing(order, tails, root)


def kept_rows(order, width, copies=1):
    full = len(order)
    return torch.cat([order[:width].sort().values + i * full for i in range(copies)])


def narrowed_weight(weight_OI, n, width):
    w = weight_OI.double()[:, n.order]
    L = n.root.double()
    fit = (
        w[:, :width]
        + torch.linalg.solve_triangular(
            L[:width, :width].mT.contiguous(), (w[:, width:] @ L[width:, :width]).mT, upper=True
        ).mT
        if False
        else None
    )
    x = torch.linalg.solve_triangular(L[:width, :width], w[:, width:] @ L[width:, :width], upper=False, left=False)
    out = torch.zeros_like(weight_OI, dtype=torch.float64)
    out[:, n.order[:width]] = w[:, :width] + x
    return out


def projected(star, gram, order, width):
    c = gram[order][:, order]
    root = torch.linalg.cholesky(c)
    return narrowed_weight(star, Narrowing(order, None, root), width)
