"""Names the families that have low-rank classes, and the classes of transformers that these extend."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

from transformers import (
    CONFIG_MAPPING,
    MODEL_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES  # pyright: ignore[reportPrivateImportUsage]

from svdllm.common.errors import UnsupportedModelError

MODEL_TYPE_PREFIX = "svdllm_"
# Auto class -> its tables of classes by config, and of their names by model type. The first that has a type opens it.
_AUTO_CLASSES: dict[type[Any], tuple[Any, Mapping[Any, Any]]] = {
    AutoModelForCausalLM: (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING,
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    ),
    AutoModelForImageTextToText: (
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    ),
    AutoModelForMultimodalLM: (
        modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING,
        modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    ),
}


class Head(NamedTuple):
    """A class with a head over the vocabulary, and the auto classes of transformers that find it, the first to use."""

    cls: type[PreTrainedModel]
    autos: tuple[type[Any], ...]

    @property
    def name(self) -> str:
        """The end of the names of such classes: of a wrapper around a language model, another."""
        alone = AutoModelForCausalLM in self.autos and not self.cls.__name__.endswith("ForConditionalGeneration")
        return "ForCausalLM" if alone else "ForConditionalGeneration"


@functools.cache
def find_head(model_type: str) -> Head | None:
    """Finds the class of transformers for a model that reads text, alone or with images and sound; None without one.

    Where a table gives the class of the language model inside a wrapper, the wrapper's own is in another table.
    """
    if model_type not in CONFIG_MAPPING:
        return None
    config: Any = CONFIG_MAPPING[model_type]
    inner = getattr(config, "sub_configs", {}).get("text_config")
    found = {auto: mapping[config] for auto, (mapping, names) in _AUTO_CLASSES.items() if model_type in names}
    own = {
        auto: cls
        for auto, cls in found.items()
        if (inner is None or cls.config_class is not inner) and (auto is AutoModelForCausalLM or cls.can_generate())
    }
    if not own:
        return None
    chosen = next(iter(own.values()))
    return Head(chosen, tuple(auto for auto, cls in own.items() if cls is chosen))


def families() -> list[str]:
    """Lists the model types that may have low-rank classes: transformers has a bare model and one with a head."""
    with_head = dict.fromkeys(key for _, names in _AUTO_CLASSES.values() for key in names)
    return [key for key in with_head if key in modeling_auto.MODEL_MAPPING_NAMES]


def class_stem(base_model_type: str) -> str:
    """The beginning of the three class names, such as ``SvdllmLlama`` for ``llama``."""
    config_name = CONFIG_MAPPING_NAMES[base_model_type]
    if config_name in _shared_config_names():  # two model types, one config class: tell them apart by type
        config_name = "".join(part.capitalize() for part in base_model_type.replace("-", "_").split("_"))
    return f"Svdllm{config_name.removesuffix('Config')}"


@functools.cache
def _shared_config_names() -> frozenset[str]:
    names = [CONFIG_MAPPING_NAMES[key] for key in families()]
    return frozenset(name for name in names if names.count(name) > 1)


class BaseClasses(NamedTuple):
    """The classes of a family in transformers; ``causal_lm`` has the head, and is a wrapper's where there is one."""

    config: type[PreTrainedConfig]
    model: type[PreTrainedModel]
    causal_lm: type[PreTrainedModel]


def base_classes(base_model_type: str) -> BaseClasses:
    """Finds the three classes of a family in transformers.

    Raises:
        UnsupportedModelError: one of them is missing.
    """
    head = find_head(base_model_type) if base_model_type in families() else None
    if head is None:
        raise UnsupportedModelError(
            f"transformers has no causal language model with a bare model of type {base_model_type!r}; "
            "only such models can be stored in low-rank form. A newer transformers may have it."
        )
    config = CONFIG_MAPPING[base_model_type]
    model: Any = MODEL_MAPPING[config]
    return BaseClasses(config, model[0] if isinstance(model, tuple) else model, head.cls)


def auto_classes(base_model_type: str) -> tuple[type[Any], ...]:
    """The auto classes that find the low-rank class of a family: that of causal LMs finds wrappers too."""
    head = find_head(base_model_type)
    return tuple(dict.fromkeys((*(head.autos if head else ()), AutoModelForCausalLM)))


def head_name(base_model_type: str) -> str:
    """The end of the name of the low-rank class with a head."""
    head = find_head(base_model_type)
    return "ForCausalLM" if head is None else head.name


def auto_class(model_type: str) -> type[Any]:
    """The auto class of transformers that opens a model of a type; that of causal LMs for unknown ones."""
    head = find_head(model_type)
    return AutoModelForCausalLM if head is None else head.autos[0]
