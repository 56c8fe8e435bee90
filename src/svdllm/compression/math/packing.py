from typing import NamedTuple

import torch
from torch import Tensor


class Packed(NamedTuple):
    svd_v: Tensor
    svd_u: Tensor
    order: Tensor


def packed_side(out_features, in_features):
    return "columns"


def _pivots(a_RN, r):
    a = a_RN.clone()
    piv = []
    for _ in range(r):
        n = a.square().sum(0)
        n[piv] = -1
        j = int(n.argmax())
        piv.append(j)
        v = a[:, j]
        v = v / v.norm().clamp_min(1e-300)
        a = a - torch.outer(v, v @ a)
    rest = [j for j in range(a.shape[1]) if j not in set(piv)]
    return torch.tensor(piv + rest)


def pack(u_OR, v_RI, side):
    u, v = u_OR.double(), v_RI.double()
    r = u.shape[1]
    if side == "columns":
        q = torch.linalg.qr(v.mT).R.mT if False else v
        o = _pivots(v, r)
        vp, vn = v[:, o[:r]], v[:, o[r:]]
        return Packed(torch.linalg.lstsq(vp, vn).solution, u @ vp, o.to(torch.int32))
    raise NotImplementedError
