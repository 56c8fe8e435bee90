"""Reads what the config of a low-rank model says beyond the config of its family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from svdllm.common.errors import CheckpointError
from svdllm.models.low_rank.lowrank_config import REMOVED_PARTS, check_svdllm, forms_of


@dataclass(frozen=True, kw_only=True)
class LowRankInfo:
    """The ``svdllm`` entry of a config.

    base_model_type: model type of the family, such as ``llama``.
    forms: linear -> entry of format version 2; linears that are not named are dense.
    shared_factors: linear -> linear whose first factor it uses.
    removed: what a pruned model has beside forms: keys of ``REMOVED_PARTS``.
    embeddings: embedding -> bits and group size, of those in few bits.
    source: what is known of the dense model, such as its hub id under ``id``.
    """

    base_model_type: str
    forms: Mapping[str, Mapping[str, Any]]
    shared_factors: Mapping[str, str]
    source: Mapping[str, Any]
    removed: tuple[str, ...] = ()
    embeddings: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    @classmethod
    def of(cls, config: Any, name: str = "the model") -> LowRankInfo | None:
        """Reads a config, or the content of ``config.json``; None for a dense model.

        Raises:
            CheckpointError: the entry is damaged; says whose it is by ``name``.
        """
        entry = config.get("svdllm") if isinstance(config, Mapping) else getattr(config, "svdllm", None)
        if entry is None:
            return None
        if not isinstance(entry, Mapping) or not isinstance(entry.get("base_model_type"), str):
            raise CheckpointError(
                f"config.json of {name} is damaged: expected 'svdllm' to be an object with a 'base_model_type'. Fetch "
                "or write it again."
            )
        try:
            check_svdllm(entry)
        except ValueError as error:
            raise CheckpointError(f"config.json of {name} cannot be read: {error}") from error
        return cls(
            base_model_type=entry["base_model_type"],
            forms=forms_of(entry),
            shared_factors=entry.get("shared_factors") or {},
            source=entry.get("source") or {},
            removed=tuple(key for key in REMOVED_PARTS if entry.get(key)),
            embeddings=entry.get("embeddings") or {},
        )

    @property
    def ranks(self) -> dict[str, int]:
        """Linear -> rank, of every linear that is a pair or packed."""
        return {name: entry["rank"] for name, entry in self.forms.items() if "rank" in entry}
