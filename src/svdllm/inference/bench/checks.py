"""Checks a benchmark before a model is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from svdllm.common.errors import InputError
from svdllm.common.memory import require_memory, skeleton_bytes
from svdllm.inference.bench.settings import BenchSettings
from svdllm.models.limits import context_length, require_context
from svdllm.models.low_rank.factory import dense_config
from svdllm.models.low_rank.info import LowRankInfo
from svdllm.models.model_names import short_name
from svdllm.models.open import Source, open_config
from svdllm.models.skeleton import build_skeleton


def different_names(models: Sequence[str | Path], base: str | Path | None) -> dict[str, str]:
    """Maps short names to models, the dense model first: the last parts of paths, or whole paths where those repeat.

    Raises:
        InputError: there is no model to measure, or one is named twice.
    """
    if not models:
        raise InputError("Nothing to measure: name a checkpoint.")
    given = [str(model) for model in ([] if base is None else [base]) + list(models)]
    places = [str(Path(model).resolve()) if Path(model).exists() else model for model in given]
    if twice := sorted({place for place in places if places.count(place) > 1}):
        raise InputError(f"{', '.join(twice)} is named twice; give every model once.")
    short = [short_name(place) for place in places]
    return dict(zip(short if len(set(short)) == len(short) else given, given, strict=True))


def open_compressed(model: str, offline: bool) -> Source:
    """Opens a checkpoint of svdllm. Raises InputError for a dense model."""
    source = open_config(model, offline=offline)
    if LowRankInfo.of(source.config) is None:
        raise InputError(
            f"{model} is not an svdllm checkpoint, it is a dense model ({source.config.model_type}). Give the dense "
            "model with --base, and beside it a checkpoint that `svdllm compress` made."
        )
    return source


def open_base(model: str, offline: bool) -> Source:
    """Opens a dense model. Raises InputError for a compressed one."""
    source = open_config(model, offline=offline)
    if LowRankInfo.of(source.config):
        raise InputError(f"--base {model} is compressed; give the dense model that it was made of.")
    return source


def check_alike(base: Source, models: Sequence[Source]) -> None:
    """Raises InputError unless family and shapes of the dense model are those that the others were made of."""
    shapes = _shapes(base)
    for model in models:
        family = dense_config(model.config).model_type
        if family != base.config.model_type:
            raise InputError(
                f"--base {base.name} is of the family {base.config.model_type}, {model.name} was made of a {family}: "
                "give the dense model that it was made of."
            )
        wanted = _shapes(model)
        for name in [*wanted, *shapes]:
            if wanted.get(name) != shapes.get(name):
                raise InputError(
                    f"--base {base.name} has {_shown(shapes.get(name))} as {name}, {model.name} was made of a model "
                    f"with {_shown(wanted.get(name))}: give the dense model that it was made of."
                )


def shortest_context(configs: Iterable[PreTrainedConfig]) -> int | None:
    """The shortest context of the models; None where no config has a limit."""
    limits = [limit for config in configs if (limit := context_length(config)) is not None]
    return min(limits, default=None)


def check_context(sources: Mapping[str, Source], settings: BenchSettings) -> None:
    """Raises InputError if the longest prompt and its decode steps are beyond the context of a model."""
    what = f"--prompt {max(settings.prompt_lengths)} plus --gen {settings.gen} ="
    for name, source in sources.items():
        require_context(source.config, settings.longest, what, model=name, advice="lower one of them")


def check_room(sources: Iterable[Source], dtype: torch.dtype, device: torch.device) -> None:
    """Raises ResourceError if the weights of all models together do not fit into memory."""
    needed = sum(skeleton_bytes(build_skeleton(source.config, dtype)) for source in sources)
    advice = "They are measured in turns: give fewer models, or a smaller --dtype."
    require_memory(needed, "The weights of all models together need", device, advice)


def _shapes(source: Source) -> dict[str, tuple[int, ...]]:
    """The shapes of the parameters of a dense model, or of the dense model that a compressed one was made of."""
    skeleton = build_skeleton(dense_config(source.config))
    return {name: tuple(parameter.shape) for name, parameter in skeleton.named_parameters()}


def _shown(shape: tuple[int, ...] | None) -> str:
    return "nothing" if shape is None else " x ".join(map(str, shape))
