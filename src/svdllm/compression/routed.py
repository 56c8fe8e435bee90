"""Counts the work of experts by the tokens that are routed to them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel

from svdllm.models.structure import Structure, Target

TokenShares = Mapping[str | None, float]  # pool -> share of the tokens that each of its experts is handed


def token_shares(structure: Structure, skeleton: PreTrainedModel) -> dict[str | None, float]:
    """The share of the tokens that the linears of each pool are handed, if all experts are routed to alike.

    Linears that belong to no pool are handed every token.
    """
    shares: dict[str | None, float] = {None: 1.0}
    for pool in dict.fromkeys(target.pool for target in structure.targets):
        if pool is not None:
            experts: Any = skeleton.get_submodule(pool.rpartition(".")[0])
            shares[pool] = experts.top_k / experts.split_count
    return shares


def weights_per_token(structure: Structure, shares: TokenShares) -> float:
    """Number of weights of the targets that a token is multiplied with."""
    return sum(target.num_weights * shares[target.pool] for target in structure.targets)


def gram_values_per_token(structure: Structure, shares: TokenShares) -> float:
    """Number of values in the Grams that a token is added to."""
    leaders: dict[str, Target] = {target.group: target for target in structure.targets}
    return sum(target.in_features**2 * shares[target.pool] for target in leaders.values())
