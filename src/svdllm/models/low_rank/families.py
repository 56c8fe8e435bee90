"""Names the families that have low-rank classes, and the classes of transformers that these extend."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES  # pyright: ignore[reportPrivateImportUsage]
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

from svdllm.common.errors import UnsupportedModelError

MODEL_TYPE_PREFIX = "svdllm_"


def families() -> list[str]:
    """Lists the model types that have low-rank classes: transformers has a bare model and a causal LM of them."""
    return [key for key in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if key in MODEL_MAPPING_NAMES]


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
    config: type[PreTrainedConfig]
    model: type[PreTrainedModel]
    causal_lm: type[PreTrainedModel]


def base_classes(base_model_type: str) -> BaseClasses:
    """Finds the three classes of a family in transformers.

    Raises:
        UnsupportedModelError: one of them is missing.
    """
    if base_model_type not in families():
        raise UnsupportedModelError(
            f"transformers has no causal language model with a bare model of type {base_model_type!r}; "
            "only such models can be stored in low-rank form. A newer transformers may have it."
        )
    config = CONFIG_MAPPING[base_model_type]
    causal_lm: Any = MODEL_FOR_CAUSAL_LM_MAPPING[config]
    model: Any = MODEL_MAPPING[config]
    return BaseClasses(config, model[0] if isinstance(model, tuple) else model, causal_lm)
