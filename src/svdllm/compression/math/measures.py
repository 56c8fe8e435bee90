"""Measures of how a model's predictions differ from the dense model's on one window of text.

Legend: ``T`` tokens of the window, ``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Takes the dense model's log probabilities of a window (T x V) and its tokens (T); returns a function that measures
# another model's log probabilities (T x V).
Measure = Callable[[Tensor, Tensor], Callable[[Tensor], float]]


def divergence(dense_TV: Tensor, ids_T: Tensor) -> Callable[[Tensor], float]:
    """Mean KL divergence of other predictions from the dense model's (nats per token)."""
    probabilities_TV = dense_TV.exp()

    def measure(other_TV: Tensor) -> float:
        difference_TV = dense_TV - other_TV
        # Equal to p log(p/q) summed, but no term is negative: small divergences do not drown in rounding.
        terms_TV = probabilities_TV * (difference_TV + torch.expm1(-difference_TV))
        return float(terms_TV.sum(dtype=torch.float64)) / len(ids_T)

    return measure


def cross_entropy(dense_TV: Tensor, ids_T: Tensor) -> Callable[[Tensor], float]:
    """Mean loss of the text (nats per token): the logarithm of the perplexity."""
    following = ids_T[1:, None].to(dense_TV.device)
    return lambda other_TV: -float(other_TV[:-1].gather(-1, following).mean(dtype=torch.float64))
