"""Sums over the calibration tokens of one linear, in float64; the batches do not matter."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from svdllm.compression.math.symmetric import PANEL, upper_panels

# Tokens of one float32 product before it is added to the float64 sum.
TOKENS_PER_PRODUCT = 4096


class Statistic(Protocol):
    """Accumulated over the inputs of a linear in the forward walk."""

    num_tokens: int

    def __init__(self, in_features: int, device: torch.device | str = "cpu"): ...

    def add(self, inputs: Tensor, weights_T: Tensor | None = None) -> None:
        """Adds the tokens of ``inputs`` (``..., in``), each scaled by its weight."""
        ...

    def value(self) -> Tensor: ...


class BackwardStatistic(Protocol):
    """Accumulated over the inputs of a linear and the gradients of the loss in its outputs, in the reverse walk."""

    def __init__(self, out_features: int, device: torch.device | str = "cpu"): ...

    def add(self, inputs: Tensor, gradients: Tensor) -> None:
        """Adds windows (``windows x tokens x in`` and ``windows x tokens x out``)."""
        ...

    def value(self) -> Tensor: ...


class Gram:
    """``C = X X^T`` (``in x in``) of all tokens; ``X`` is not kept. SVD-LLM, Algorithm 2.

    Where tokens have weights, as routing gives them, it is ``sum p^2 x x^T``.
    """

    def __init__(self, in_features: int, device: torch.device | str = "cpu"):
        self.num_tokens = 0
        self.total_weight = 0.0  # sum of p^2
        self._sum_I = torch.zeros(in_features, dtype=torch.float64, device=device)
        self._upper_II = torch.zeros(in_features, in_features, dtype=torch.float64, device=device)
        self._product = torch.empty(min(PANEL, in_features) * in_features, dtype=torch.float32, device=device)

    def add(self, inputs: Tensor, weights_T: Tensor | None = None) -> None:
        """Adds the tokens of ``inputs`` (``..., in``), any float dtype, each scaled by its weight."""
        tokens_TI = inputs.reshape(-1, inputs.shape[-1])
        self.num_tokens += tokens_TI.shape[0]
        if weights_T is None:
            self.total_weight += tokens_TI.shape[0]
            self._sum_I += tokens_TI.sum(0, dtype=torch.float64)
        else:
            weights_T = weights_T.to(torch.float64)
            self.total_weight += float(weights_T.square().sum())
            self._sum_I += weights_T.square() @ tokens_TI.double()
            tokens_TI = weighted(tokens_TI, weights_T)
        for chunk_TI in tokens_TI.split(TOKENS_PER_PRODUCT):
            if chunk_TI.dtype == torch.float64:
                self._upper_II += (chunk_TI.mT @ chunk_TI).triu()
            else:
                self._add_product(chunk_TI.float())

    def value(self) -> Tensor:
        """The symmetric sum, float64."""
        return self._upper_II.triu() + self._upper_II.triu(1).mT

    def total(self) -> Tensor:
        """The sum of the tokens (``in``), float64, each by the square of its weight."""
        return self._sum_I

    def mean(self) -> Tensor:
        """The mean token (``in``), float64."""
        return self._sum_I / (self.total_weight or 1)

    def centred(self) -> Tensor:
        """``sum (x - mean)(x - mean)^T``."""
        return self.value() - self.total_weight * torch.outer(self.mean(), self.mean())

    def _add_product(self, tokens_TI: Tensor) -> None:
        for start, stop, panel in upper_panels(tokens_TI.mT, tokens_TI, self._product):
            self._upper_II[start:stop, start:] += panel


def weighted(tokens_TI: Tensor, weights_T: Tensor) -> Tensor:
    """Scales each token by its weight, in float32 at least."""
    dtype = tokens_TI.dtype if tokens_TI.dtype == torch.float64 else torch.float32
    return tokens_TI.to(dtype) * weights_T.to(dtype)[:, None]


class CrossGram:
    """``X Y^T`` (``first x second``) of two features of the same tokens."""

    def __init__(self, first_features: int, second_features: int, device: torch.device | str = "cpu"):
        self._sum_FS = torch.zeros(first_features, second_features, dtype=torch.float64, device=device)

    def add(self, first: Tensor, second: Tensor) -> None:
        """Adds the tokens of ``first`` (``..., first``) and ``second`` (``..., second``)."""
        first_TF, second_TS = (features.reshape(-1, features.shape[-1]) for features in (first, second))
        if first_TF.dtype != torch.float64:
            first_TF, second_TS = first_TF.float(), second_TS.float()
        chunks = zip(first_TF.split(TOKENS_PER_PRODUCT), second_TS.split(TOKENS_PER_PRODUCT), strict=True)
        for first_chunk_TF, second_chunk_TS in chunks:
            self._sum_FS += first_chunk_TF.mT @ second_chunk_TS

    def value(self) -> Tensor:
        """The sum, float64; not symmetric."""
        return self._sum_FS


class MeanAbsolute:
    """Mean of ``|x|`` of every input channel (``in``), float64: the scales of ASVD (arXiv 2312.05821)."""

    def __init__(self, in_features: int, device: torch.device | str = "cpu"):
        self.num_tokens = 0
        self._sum_I = torch.zeros(in_features, dtype=torch.float64, device=device)

    def add(self, inputs: Tensor, weights_T: Tensor | None = None) -> None:
        """Adds the tokens of ``inputs`` (``..., in``), each scaled by its weight."""
        tokens_TI = inputs.reshape(-1, inputs.shape[-1])
        tokens_TI = tokens_TI if weights_T is None else weighted(tokens_TI, weights_T)
        self.num_tokens += tokens_TI.shape[0]
        self._sum_I += tokens_TI.abs().sum(0, dtype=torch.float64)

    def value(self) -> Tensor:
        """The mean, float64."""
        return self._sum_I / max(self.num_tokens, 1)


class RowFisher:
    """Empirical Fisher information of every row of a weight (``out``), float64: FWSVD (arXiv 2207.00112).

    ``sum_j (dL/dW_ij)^2`` for the loss ``L`` of one window, summed over the windows.
    """

    def __init__(self, out_features: int, device: torch.device | str = "cpu"):
        self._sum_O = torch.zeros(out_features, dtype=torch.float64, device=device)
        self.num_tokens = 0

    def add(self, inputs: Tensor, gradients: Tensor) -> None:
        """Adds windows: inputs (``windows x tokens x in``), gradients of the outputs (``windows x tokens x out``)."""
        self.num_tokens += gradients.shape[0] * gradients.shape[1]
        for inputs_TI, gradients_TO in zip(inputs, gradients, strict=True):
            gradient_OI = gradients_TO.float().mT @ inputs_TI.float()  # of the weight
            self._sum_O += gradient_OI.double().pow(2).sum(1)

    def value(self) -> Tensor:
        """The sum, float64."""
        return self._sum_O


class GradientGram:
    """``G = sum g g^T`` (``out x out``) of the gradients of the loss in a linear's outputs, float64."""

    def __init__(self, out_features: int, device: torch.device | str = "cpu"):
        self._gram = Gram(out_features, device)

    @property
    def num_tokens(self) -> int:
        return self._gram.num_tokens

    def add(self, inputs: Tensor, gradients: Tensor) -> None:
        """Adds the gradients of windows (``windows x tokens x out``); the inputs are not needed."""
        self._gram.add(gradients)

    def value(self) -> Tensor:
        """The symmetric sum, float64."""
        return self._gram.value()
