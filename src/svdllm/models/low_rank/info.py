"""Reads what the config of a low-rank model says beyond the config of its family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from svdllm.common.errors import CheckpointError


@dataclass(frozen=True, kw_only=True)
class LowRankInfo:
    """The ``svdllm`` entry of a config.

    base_model_type: model type of the family, such as ``llama``.
    ranks: linear -> rank, of every factorised linear.
    shared_factors: linear -> linear whose first factor it uses.
    source: what is known of the dense model, such as its hub id under ``id``.
    """

    base_model_type: str
    ranks: Mapping[str, int]
    shared_factors: Mapping[str, str]
    source: Mapping[str, Any]

    @classmethod
    def of(cls, config: Any, name: str = "the model") -> LowRankInfo | None:
        """Reads a config, or the content of ``config.json``; None for a dense model.

        Raises:
            CheckpointError: the entry is damaged; says whose it is by ``name``.
        """
        entry = config.get("svdllm") if isinstance(config, Mapping) else getattr(config, "svdllm", None)
        if entry is None:
            return None
        wanted = {"base_model_type": str, "ranks": Mapping}
        if not isinstance(entry, Mapping) or not all(isinstance(entry.get(key), of) for key, of in wanted.items()):
            raise CheckpointError(
                f"config.json of {name} is damaged: expected 'svdllm' to be an object with a 'base_model_type' and "
                "'ranks'. Fetch or write it again."
            )
        return cls(
            base_model_type=entry["base_model_type"],
            ranks=entry["ranks"],
            shared_factors=entry.get("shared_factors") or {},
            source=entry.get("source") or {},
        )
