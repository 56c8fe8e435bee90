"""Finds the embedding and the head of a model: the two matrices that have a row for every token of the vocabulary."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn
from transformers import PreTrainedModel

from svdllm.models.structure import Target
from svdllm.models.ties import other_names


def vocabulary_targets(skeleton: PreTrainedModel) -> tuple[Target, ...]:
    """The embedding, and the head where that has a matrix of its own; what is tied to anything else is left out."""
    embedding, head = skeleton.get_input_embeddings(), skeleton.get_output_embeddings()
    names = {id(module): name for name, module in skeleton.named_modules()}
    ties = other_names(skeleton)
    found: list[Target] = []
    known: set[str] = set()
    kinds: tuple[tuple[Any, type[nn.Module], Literal["embedding", "head"]], ...] = (
        (embedding, nn.Embedding, "embedding"),
        (head, nn.Linear, "head"),
    )
    for module, kind, called in kinds:
        if not isinstance(module, kind) or id(module) not in names or module.weight.ndim != 2:
            continue
        name = names[id(module)]
        tied = set(ties.get(f"{name}.weight", ()))
        if f"{name}.weight" not in known and tied <= {f"{names.get(id(head), '')}.weight"}:
            rows, columns = module.weight.shape
            found.append(
                Target(
                    name=name,
                    block=0,
                    in_features=columns,
                    out_features=rows,
                    has_bias=getattr(module, "bias", None) is not None,
                    is_conv1d=False,
                    group=name,
                    vocabulary=called,
                )
            )
        known |= {f"{name}.weight"} | tied
    return tuple(found)
