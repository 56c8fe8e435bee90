"""Tells the language model in a wrapper from the parts that read images or sound, which stay as they are."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from svdllm.common.errors import InputError, UnsupportedModelError
from svdllm.models.limits import text_config
from svdllm.models.linears import language_model, listing, stacks_of

LANGUAGE = "language"


@dataclass(frozen=True, kw_only=True)
class OutsidePart:
    """A part of a wrapper outside its language model.

    share: of all parameters of the wrapper.
    """

    name: str
    params: int
    share: float

    @property
    def text(self) -> str:
        return f"{self.share:.1%} {self.name}"


def is_wrapper(config: PreTrainedConfig) -> bool:
    """Whether a model holds a language model with a config of its own."""
    return text_config(config) is not config


def refuse_wrapper(config: PreTrainedConfig, name: str, what: str) -> None:
    """Raises UnsupportedModelError for a wrapper, with which ``what`` (an option) cannot be used."""
    if is_wrapper(config):
        raise UnsupportedModelError(
            f"{what} is for language models, and {name} (model_type {config.model_type!r}) also reads images or sound. "
            "Save its language model alone and use that: see docs/faq.md."
        )


def outside_parts(model: PreTrainedModel) -> tuple[OutsidePart, ...]:
    """Lists what a wrapper has beside its language model and the head over the vocabulary, the largest first."""
    name, _ = language_model(model)
    if not name or not is_wrapper(model.config):
        return ()
    head = model.get_output_embeddings()
    inside = {id(parameter) for parameter in model.get_submodule(name).parameters()}
    inside |= set() if head is None else {id(parameter) for parameter in head.parameters()}
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    sizes: dict[str, int] = {}
    total = 0
    for parameter_name, parameter in model.named_parameters():
        total += parameter.numel() * (parameter_name not in tied)
        if id(parameter) not in inside:
            part = _beside(parameter_name, name)
            sizes[part] = sizes.get(part, 0) + parameter.numel()
    parts = (OutsidePart(name=part, params=params, share=params / total) for part, params in sizes.items())
    return tuple(sorted(parts, key=lambda part: -part.params))


def _beside(name: str, inner: str) -> str:
    """The outermost module on the way to a parameter in which ``inner`` is not."""
    steps = name.split(".")
    ways = (".".join(steps[:count]) for count in range(1, len(steps) + 1))
    return next((way for way in ways if not f"{inner}.".startswith(f"{way}.")), name)


def require_part(model: PreTrainedModel, part: str) -> None:
    """Checks that a part of a model can be compressed.

    Raises:
        UnsupportedModelError: the model holds several language models.
        InputError: the part is not the language model; lists the parts.
    """
    kind = type(model).__name__
    if len(several := language_models(model)) > 1:
        raise UnsupportedModelError(
            f"{kind} holds {len(several)} language models ({', '.join(several)}), expected one. Save the one that is "
            "meant as a model of its own and compress that folder."
        )
    if part != LANGUAGE:
        others = [outside.name.rpartition(".")[2] for outside in outside_parts(model)]
        copied = f", and {listing(others)}, which are copied as they are" if others else ""
        raise InputError(
            f"--part {part!r} cannot be compressed: {kind} has the part {LANGUAGE!r}{copied}. Use --part {LANGUAGE}, "
            "which is the default."
        )


def language_models(model: PreTrainedModel) -> list[str]:
    """Names the language models in a wrapper: the innermost decoders with a vocabulary and a stack of blocks."""
    if not is_wrapper(model.config):
        return [language_model(model)[0]]
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, PreTrainedModel) and _has_vocabulary(module) and stacks_of(module, "")
    }
    innermost = [name for name in found if not any(_is_within(other, name) for other in found)]
    decoders = [name for name in innermost if any(_is_causal(module) for module in found[name].modules())]
    return decoders or innermost


def _is_within(name: str, outer: str) -> bool:
    return name != outer and (not outer or name.startswith(f"{outer}."))


def _has_vocabulary(model: PreTrainedModel) -> bool:
    try:
        return isinstance(model.get_input_embeddings(), nn.Embedding)
    except (NotImplementedError, AttributeError):  # a tower has none
        return False


def _is_causal(module: nn.Module) -> bool:
    return getattr(module, "is_causal", False) is True
