"""What is accumulated over the calibration tokens of one input: sums in float64, whatever the batches."""

from __future__ import annotations

import torch
from torch import Tensor

# Tokens of one float32 product before it is added to the float64 sum.
TOKENS_PER_PRODUCT = 4096
# Width of a panel of the symmetric product: narrower panels skip more of the lower triangle but multiply slower.
PANEL = 192


class Gram:
    """``C = X X^T`` (``in x in``) of every token seen; ``X`` is never kept. SVD-LLM, Algorithm 2."""

    def __init__(self, in_features: int, device: torch.device | str = "cpu"):
        self.num_tokens = 0
        self._upper_II = torch.zeros(in_features, in_features, dtype=torch.float64, device=device)
        self._product = torch.empty(min(PANEL, in_features) * in_features, dtype=torch.float32, device=device)

    def add(self, inputs: Tensor) -> None:
        """Adds the tokens of ``inputs`` (``..., in``), any float dtype."""
        tokens_TI = inputs.reshape(-1, inputs.shape[-1])
        self.num_tokens += tokens_TI.shape[0]
        for chunk_TI in tokens_TI.split(TOKENS_PER_PRODUCT):
            if chunk_TI.dtype == torch.float64:
                self._upper_II += (chunk_TI.mT @ chunk_TI).triu()
            else:
                self._add_product(chunk_TI.float())

    def value(self) -> Tensor:
        """The symmetric sum, float64."""
        return self._upper_II.triu() + self._upper_II.triu(1).mT

    def _add_product(self, tokens_TI: Tensor) -> None:
        """Upper triangle only, panel by panel: the product is symmetric, so almost half of it need not be computed."""
        in_features = tokens_TI.shape[1]
        for start in range(0, in_features, PANEL):
            stop = min(start + PANEL, in_features)
            panel = self._product[: (stop - start) * (in_features - start)].view(stop - start, -1)
            torch.mm(tokens_TI[:, start:stop].mT, tokens_TI[:, start:], out=panel)
            self._upper_II[start:stop, start:] += panel


class MeanAbsolute:
    """Mean of ``|x|`` per input channel (``in``), float64: what ASVD (arXiv 2312.05821) scales with."""

    def __init__(self, in_features: int, device: torch.device | str = "cpu"):
        self.num_tokens = 0
        self._sum_I = torch.zeros(in_features, dtype=torch.float64, device=device)

    def add(self, inputs: Tensor) -> None:
        """Adds the tokens of ``inputs`` (``..., in``)."""
        tokens_TI = inputs.reshape(-1, inputs.shape[-1])
        self.num_tokens += tokens_TI.shape[0]
        self._sum_I += tokens_TI.abs().sum(0, dtype=torch.float64)

    def value(self) -> Tensor:
        """The mean, float64."""
        return self._sum_I / max(self.num_tokens, 1)


Statistic = Gram | MeanAbsolute
