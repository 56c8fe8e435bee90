"""Sums over the calibration tokens of one linear, in float64; the batches do not matter."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from svdllm.common.processes import Processes
from svdllm.compression.math.symmetric import PANEL, upper_panels
from svdllm.compression.math.totals import Total, Totals

# Tokens of one float32 product before it is added to the float64 sum.
TOKENS_PER_PRODUCT = 4096


class Statistic(Protocol):
    """Accumulated over the inputs of a linear in the forward walk."""

    def __init__(self, in_features: int, device: torch.device | str = "cpu"): ...

    @property
    def num_tokens(self) -> int: ...

    @property
    def is_folded(self) -> bool: ...

    def add(self, inputs: Tensor, weights_T: Tensor | None = None) -> None:
        """Adds the tokens of ``inputs`` (``..., in``), each scaled by its weight."""
        ...

    def fold(self, processes: Processes) -> None:
        """Adds what the processes have collected since they last did; see ``Total.fold``."""
        ...

    def value(self) -> Tensor: ...


class BackwardStatistic(Protocol):
    """Accumulated over the inputs of a linear and the gradients of the loss in its outputs, in the reverse walk.

    Most are made from ``(out_features, device)``; see ``LeftMetric``.
    """

    @property
    def is_folded(self) -> bool: ...

    def add(self, inputs: Tensor, gradients: Tensor) -> None:
        """Adds windows (``windows x tokens x in`` and ``windows x tokens x out``)."""
        ...

    def fold(self, processes: Processes) -> None:
        """Adds what the processes have collected since they last did; see ``Total.fold``."""
        ...

    def value(self) -> Any: ...


class Gram(Totals):
    """``C = X X^T`` (``in x in``) of all tokens; ``X`` is not kept. SVD-LLM, Algorithm 2.

    Where tokens have weights, as routing gives them, it is ``sum p^2 x x^T``. Only the upper triangle is kept, in
    panels of rows.
    """

    def __init__(self, in_features: int, device: torch.device | str = "cpu"):
        self._size, self._device = in_features, device
        starts = range(0, in_features, PANEL)
        self._panels = [Total(min(PANEL, in_features - start), in_features - start, device=device) for start in starts]
        self._sums = Total(in_features + 2, device=device)  # of the tokens, their number, and their weights p^2
        self._totals = (*self._panels, self._sums)
        self._product = torch.empty(min(PANEL, in_features) * in_features, dtype=torch.float32, device=device)

    @property
    def num_tokens(self) -> int:
        return int(self._sums.value()[-2])

    @property
    def total_weight(self) -> float:
        """The sum of ``p^2``: the number of tokens where they have no weights."""
        return float(self._sums.value()[-1])

    def add(self, inputs: Tensor, weights_T: Tensor | None = None) -> None:
        """Adds the tokens of ``inputs`` (``..., in``), any float dtype, each scaled by its weight."""
        tokens_TI = inputs.reshape(-1, inputs.shape[-1])
        sums = self._sums.shard
        sums[-2] += tokens_TI.shape[0]
        if weights_T is None:
            sums[-1] += tokens_TI.shape[0]
            sums[:-2] += tokens_TI.sum(0, dtype=torch.float64)
        else:
            weights_T = weights_T.to(torch.float64)
            sums[-1] += weights_T.square().sum()
            sums[:-2] += weights_T.square() @ tokens_TI.double()
            tokens_TI = weighted(tokens_TI, weights_T)
        for chunk_TI in tokens_TI.split(TOKENS_PER_PRODUCT):
            self._add_product(chunk_TI if chunk_TI.dtype == torch.float64 else chunk_TI.float())

    def value(self) -> Tensor:
        """The symmetric sum, float64."""
        value_II = torch.empty(self._size, self._size, dtype=torch.float64, device=self._device)
        start = 0
        for total in self._panels:
            panel = total.value()
            stop = start + len(panel)
            square, rest = panel.tensor_split([len(panel)], dim=1)
            value_II[start:stop, start:stop] = square.triu() + square.triu(1).mT
            value_II[start:stop, stop:] = rest
            value_II[stop:, start:stop] = rest.mT
            start = stop
        return value_II

    def total(self) -> Tensor:
        """The sum of the tokens (``in``), float64, each by the square of its weight."""
        return self._sums.value()[:-2]

    def mean(self) -> Tensor:
        """The mean token (``in``), float64."""
        return self.total() / (self.total_weight or 1)

    def centred(self) -> Tensor:
        """``sum (x - mean)(x - mean)^T``."""
        return self.value() - self.total_weight * torch.outer(self.mean(), self.mean())

    def _add_product(self, tokens_TI: Tensor) -> None:
        buffer = self._product if tokens_TI.dtype == torch.float32 else None
        panels = upper_panels(tokens_TI.mT, tokens_TI, buffer)
        for total, (_, _, panel) in zip(self._panels, panels, strict=True):
            total.shard.add_(panel)


def weighted(tokens_TI: Tensor, weights_T: Tensor) -> Tensor:
    """Scales each token by its weight, in float32 at least."""
    dtype = tokens_TI.dtype if tokens_TI.dtype == torch.float64 else torch.float32
    return tokens_TI.to(dtype) * weights_T.to(dtype)[:, None]


@cache
def gram_values(in_features: int) -> int:
    """Numbers that a Gram keeps of a shard."""
    starts = range(0, in_features, PANEL)
    return sum(min(PANEL, in_features - start) * (in_features - start) for start in starts)


class CrossGram(Totals):
    """``X Y^T`` (``first x second``) of two features of the same tokens."""

    def __init__(self, first_features: int, second_features: int, device: torch.device | str = "cpu"):
        self._sum_FS = Total(first_features, second_features, device=device)
        self._totals = (self._sum_FS,)

    def add(self, first: Tensor, second: Tensor) -> None:
        """Adds the tokens of ``first`` (``..., first``) and ``second`` (``..., second``)."""
        first_TF, second_TS = (features.reshape(-1, features.shape[-1]) for features in (first, second))
        if first_TF.dtype != torch.float64:
            first_TF, second_TS = first_TF.float(), second_TS.float()
        chunks = zip(first_TF.split(TOKENS_PER_PRODUCT), second_TS.split(TOKENS_PER_PRODUCT), strict=True)
        for first_chunk_TF, second_chunk_TS in chunks:
            self._sum_FS.shard.add_(first_chunk_TF.mT @ second_chunk_TS)

    def value(self) -> Tensor:
        """The sum, float64; not symmetric."""
        return self._sum_FS.value()


class MeanAbsolute(Totals):
    """Mean of ``|x|`` of every input channel (``in``), float64: the scales of ASVD (arXiv 2312.05821)."""

    def __init__(self, in_features: int, device: torch.device | str = "cpu"):
        self._sums = Total(in_features + 1, device=device)  # of the channels, and the number of tokens
        self._totals = (self._sums,)

    @property
    def num_tokens(self) -> int:
        return int(self._sums.value()[-1])

    def add(self, inputs: Tensor, weights_T: Tensor | None = None) -> None:
        """Adds the tokens of ``inputs`` (``..., in``), each scaled by its weight."""
        tokens_TI = inputs.reshape(-1, inputs.shape[-1])
        tokens_TI = tokens_TI if weights_T is None else weighted(tokens_TI, weights_T)
        self._sums.shard[-1] += tokens_TI.shape[0]
        self._sums.shard[:-1] += tokens_TI.abs().sum(0, dtype=torch.float64)

    def value(self) -> Tensor:
        """The mean, float64."""
        return self._sums.value()[:-1] / max(self.num_tokens, 1)


class RowFisher(Totals):
    """Empirical Fisher information of every row of a weight (``out``), float64: FWSVD (arXiv 2207.00112).

    ``sum_j (dL/dW_ij)^2`` for the loss ``L`` of one window, summed over the windows.
    """

    def __init__(self, out_features: int, device: torch.device | str = "cpu"):
        self._sums = Total(out_features + 1, device=device)  # of the rows, and the number of tokens
        self._totals = (self._sums,)

    @property
    def num_tokens(self) -> int:
        return int(self._sums.value()[-1])

    def add(self, inputs: Tensor, gradients: Tensor) -> None:
        """Adds windows: inputs (``windows x tokens x in``), gradients of the outputs (``windows x tokens x out``)."""
        self._sums.shard[-1] += gradients.shape[0] * gradients.shape[1]
        for inputs_TI, gradients_TO in zip(inputs, gradients, strict=True):
            gradient_OI = gradients_TO.float().mT @ inputs_TI.float()  # of the weight
            self._sums.shard[:-1] += gradient_OI.double().pow(2).sum(1)

    def value(self) -> Tensor:
        """The sum, float64."""
        return self._sums.value()[:-1]


class GradientGram(Totals):
    """``G = sum g g^T`` (``out x out``) of the gradients of the loss in a linear's outputs, float64."""

    def __init__(self, out_features: int, device: torch.device | str = "cpu"):
        self._gram = Gram(out_features, device)
        self._totals = self._gram._totals

    @property
    def num_tokens(self) -> int:
        return self._gram.num_tokens

    def add(self, inputs: Tensor, gradients: Tensor) -> None:
        """Adds the gradients of windows (``windows x tokens x out``); the inputs are not needed."""
        self._gram.add(gradients)

    def value(self) -> Tensor:
        """The symmetric sum, float64."""
        return self._gram.value()


class PulledBack(NamedTuple):
    """What is known of the gradients in the outputs of some linears, after their weights."""

    products: list[Tensor]  # of each linear, W^T (sum g g^T) W (in x in)
    traces_P: Tensor  # of each linear, sum g^T g


class GradientPullback(Totals):
    """``W^T G W`` (``in x in``) and ``tr G`` of ``G = sum g g^T``, for every linear of a target; float64."""

    def __init__(self, weights: Sequence[Tensor]):
        """Takes the weights (each ``out x in``), which must not change while gradients are added."""
        self._weights, device = weights, weights[0].device
        self._grams = [Gram(weight.shape[1], device) for weight in weights]
        self._traces = Total(len(weights), device=device)
        self._totals = (*(total for gram in self._grams for total in gram._totals), self._traces)

    def add(self, inputs: Tensor, gradients: Tensor) -> None:
        """Adds the gradients of windows (``windows x tokens x out``); the inputs are not needed."""
        gradients_TO = gradients.flatten(0, -2)
        for chunk_TO in gradients_TO.split(TOKENS_PER_PRODUCT):
            chunk_TO = chunk_TO if chunk_TO.dtype == torch.float64 else chunk_TO.float()
            own = chunk_TO.split([len(weight) for weight in self._weights], dim=1)
            for number, (weight_OI, own_TO) in enumerate(zip(self._weights, own, strict=True)):
                self._grams[number].add(own_TO @ weight_OI.to(own_TO))
                self._traces.shard[number] += own_TO.square().sum(dtype=torch.float64)

    def value(self) -> PulledBack:
        """The sums, float64."""
        return PulledBack([gram.value() for gram in self._grams], self._traces.value())
