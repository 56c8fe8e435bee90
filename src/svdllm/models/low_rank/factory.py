"""Makes the classes of each low-rank family from the mappings of transformers, when they are first needed."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, PreTrainedConfig
from transformers.models.auto import tokenization_auto

from svdllm.models.low_rank.families import (
    MODEL_TYPE_PREFIX,
    auto_classes,
    base_classes,
    class_stem,
    families,
    head_name,
)
from svdllm.models.low_rank.info import LowRankInfo
from svdllm.models.low_rank.lowrank import LowRankMixin
from svdllm.models.low_rank.lowrank_config import LowRankConfigMixin
from svdllm.models.low_rank.render import render


class FamilyClasses(NamedTuple):
    config: type[Any]
    model: type[Any]
    causal_lm: type[Any]


@functools.cache
def _families_by_stem() -> dict[str, str]:
    return {class_stem(family): family for family in families()}


@functools.cache
def family_classes(base_model_type: str) -> FamilyClasses:
    """Makes the low-rank config, bare model and causal LM of a family, and registers them with the auto classes.

    The causal LM of a wrapper is the wrapper.

    Raises:
        UnsupportedModelError: transformers has no causal LM of type ``base_model_type``.
    """
    base = base_classes(base_model_type)
    stem = class_stem(base_model_type)
    model_type = MODEL_TYPE_PREFIX + base_model_type
    head, autos = head_name(base_model_type), auto_classes(base_model_type)
    names = {"low_rank_head": head, "low_rank_auto_classes": [auto.__name__ for auto in autos]}
    config = _make_class(f"{stem}Config", (LowRankConfigMixin, base.config), {"model_type": model_type, **names})
    members = {"config_class": config, "code_files": classmethod(_code_files)}
    model = _make_class(f"{stem}Model", (LowRankMixin, base.model), members)
    causal_lm = _make_class(f"{stem}{head}", (LowRankMixin, base.causal_lm), members)
    AutoConfig.register(model_type, config, exist_ok=True)
    AutoModel.register(config, model, exist_ok=True)
    for auto in autos:
        auto.register(config, causal_lm, exist_ok=True)
    _share_tokenizer(base_model_type, model_type)
    return FamilyClasses(config, model, causal_lm)


def _make_class(name: str, bases: tuple[type, ...], members: dict[str, Any]) -> type[Any]:
    return type(name, bases, {"__module__": __name__, "__qualname__": name, **members})


def _code_files(cls: type[Any]) -> dict[str, str]:
    config = cls.config_class
    return render(config.model_type.removeprefix(MODEL_TYPE_PREFIX), config.code_modules())


def _share_tokenizer(base_model_type: str, model_type: str) -> None:
    """Gives a low-rank model type the tokenizer class of its family, for folders whose files do not name a class."""
    names = tokenization_auto.TOKENIZER_MAPPING_NAMES
    if base_model_type in names:
        names.setdefault(model_type, names[base_model_type])
    mistrusted = getattr(tokenization_auto, "MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS", None)
    if isinstance(mistrusted, set) and base_model_type in mistrusted:
        mistrusted.add(model_type)


class _LazyConfig(type):
    """Takes the place of a config class, and makes the real one when it is first used.

    To make the config classes of all families would import every config module of transformers, which takes seconds.
    """

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(cls.real(), name)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls.real()(*args, **kwargs)

    def real(cls) -> type[Any]:
        return family_classes(cls.__dict__["model_type"].removeprefix(MODEL_TYPE_PREFIX)).config


def register_all() -> None:
    """Registers every low-rank model type with ``AutoConfig``; the models follow when a config is first made."""
    for family in families():
        model_type = MODEL_TYPE_PREFIX + family
        if model_type not in CONFIG_MAPPING:
            members = {"__module__": __name__, "model_type": model_type}
            AutoConfig.register(model_type, _LazyConfig(f"{class_stem(family)}Config", (), members), exist_ok=True)


def low_rank_config(base_config: PreTrainedConfig, svdllm: dict[str, Any]) -> Any:
    """Makes the low-rank config of a model: every field of ``base_config``, and ``svdllm``.

    Raises:
        UnsupportedModelError: there is no such family.
        ValueError: ``svdllm`` is not a valid entry, see ``check_svdllm``.
    """
    classes = family_classes(base_config.model_type)
    fields = base_config.to_dict()
    for key in ("model_type", "architectures", "auto_map", "transformers_version"):
        fields.pop(key, None)
    config = classes.config(**fields, svdllm=svdllm, architectures=[classes.causal_lm.__name__])
    config.auto_map = config.full_auto_map()
    config._attn_implementation = base_config._attn_implementation
    return config


def __getattr__(name: str) -> Any:
    """Makes a class by its name, so that pickle finds it in a process that has not made it yet."""
    suffixes = {
        "ForCausalLM": "causal_lm",
        "ForConditionalGeneration": "causal_lm",
        "Model": "model",
        "Config": "config",
    }
    for suffix, field in suffixes.items():
        if name.startswith("Svdllm") and name.endswith(suffix):
            family = _families_by_stem().get(name.removesuffix(suffix))
            if family is not None:
                return getattr(family_classes(family), field)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def dense_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Makes the config of the dense model that a low-rank config was made of; returns a dense config as it is."""
    if (info := LowRankInfo.of(config)) is None:
        return config
    base = base_classes(info.base_model_type)
    fields = config.to_dict()
    for key in ("svdllm", "auto_map", "model_type", "architectures", "transformers_version", "rope_scaling"):
        fields.pop(key, None)
    return base.config(**fields, architectures=[base.causal_lm.__name__])
