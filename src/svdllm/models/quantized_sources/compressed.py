"""Weights in the formats of compressed-tensors (llm-compressor, vLLM), decompressed by that package."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from svdllm.common.extras import require_extra
from svdllm.models.quantized_sources.layout import FLOAT8, Layout, Parts, Values, require_shape

_PARTS = {
    "weight_scale": (".weight_scale",),
    "weight_zero_point": (".weight_zero_point",),
    "weight_global_scale": (".weight_global_scale",),
    "weight_g_idx": (".weight_g_idx",),
}
_OF_INPUTS = ("input_scale", "input_zero_point", "input_global_scale")


class CompressedTensors:
    """``quant_method: compressed-tensors``: packed integers, or integers and floats of 8 bits with scales.

    Raises:
        InputError: the package is not installed.
        ValueError: its settings are not understood.
    """

    layouts = (
        Layout(
            ".weight_packed",
            ".weight",
            {torch.int32, torch.uint8},
            _PARTS | {"weight_shape": (".weight_shape",)},
            optional={*_PARTS, "weight_shape"} - {"weight_scale"},
        ),
        Layout(".weight", ".weight", {torch.int8} | FLOAT8, _PARTS, optional=set(_PARTS) - {"weight_scale"}),
    )
    of_activations = tuple(
        f".{of}_{part}" for of in ("input", "output", "q", "k", "v") for part in ("scale", "zero_point", "global_scale")
    )

    def __init__(self, settings: Mapping[str, Any]):
        require_extra("compressed_tensors", "A model in a format of compressed-tensors", extra="quantized-sources")
        from compressed_tensors.quantization import QuantizationConfig

        sparsity = settings.get("sparsity_config") or {}
        if settings.get("transform_config") or sparsity.get("format", "dense") != "dense":
            raise ValueError("it has a transform_config or a sparse format, expected quantised weights alone")
        known = QuantizationConfig.model_fields
        self._config = QuantizationConfig.model_validate({k: v for k, v in settings.items() if k in known})
        for scheme in self._schemes:
            self._compressor(scheme)  # raises for a format without one

    @property
    def title(self) -> str:
        return f"compressed-tensors ({', '.join(sorted({self._format(scheme) for scheme in self._schemes}))})"

    def shape(self, name: str, parts: Parts) -> tuple[int, ...]:
        scheme = self._scheme_of(name)
        needed = set(self._compressor(scheme).compression_param_names(scheme)) - {self._main(scheme), *_OF_INPUTS}
        if missing := sorted(needed - set(parts)):
            raise ValueError(f"it is stored without its {missing[0]}")
        if "weight_g_idx" in parts:
            raise ValueError("it has a weight_g_idx (activation order), which compressed-tensors does not decompress")
        shape = self._dense_shape(scheme, parts)
        require_shape(parts["weight_scale"], _scale_shapes(scheme.weights, shape), "weight_scale")
        return shape

    def weight(self, name: str, values: Values) -> Tensor:
        scheme = self._scheme_of(name)
        state = {self._main(scheme): values["main"]} | {part: value for part, value in values.items() if part != "main"}
        return self._compressor(scheme).decompress(state, scheme)["weight"]

    @cached_property
    def _schemes(self) -> list[Any]:
        groups: Any = self._config.config_groups.values()  # schemes, whose config may name them only
        return [scheme for scheme in groups if scheme.weights is not None]

    def _scheme_of(self, name: str) -> Any:
        """The scheme whose targets name a module or match it as ``re:...``; else the first that names a class."""
        from compressed_tensors.utils.match import match_name

        module = name.removesuffix(".weight")
        for scheme in self._schemes:
            if any(match_name(module, target) for target in scheme.targets):
                return scheme
        of_classes = [one for one in self._schemes if any(not target.startswith("re:") for target in one.targets)]
        if not of_classes:
            raise ValueError("it is quantised, but no group of quantization_config has it among its targets")
        return of_classes[0]

    def _format(self, scheme: Any) -> str:
        from compressed_tensors.compressors.format import infer_module_format

        stated = scheme.format or self._config.format
        stated = getattr(stated, "value", stated)
        return infer_module_format(torch.nn.Linear, scheme).value if stated in ("dense", "mixed-precision") else stated

    def _compressor(self, scheme: Any) -> Any:
        from compressed_tensors.compressors import BaseCompressor

        try:
            return BaseCompressor.get_value_from_registry(self._format(scheme))
        except KeyError as error:
            raise ValueError(f"its format {self._format(scheme)!r} is not known to compressed-tensors") from error

    def _main(self, scheme: Any) -> str:
        """The name of the main tensor of a weight."""
        return self._compressor(scheme).compression_param_names(scheme)[0]

    def _dense_shape(self, scheme: Any, parts: Parts) -> tuple[int, ...]:
        main, weights = parts["main"], scheme.weights
        if self._main(scheme) == "weight":
            return main.shape
        if weights.group_size and weights.group_size > 0:
            return (*main.shape[:-1], parts["weight_scale"].shape[-1] * weights.group_size)
        return tuple(parts["weight_shape"].read().tolist())  # as ``shape`` has made sure


def _scale_shapes(weights: Any, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The shapes that the scales of a weight may have, by the strategy of its scheme."""
    rows, columns = shape[-2:]
    if weights.block_structure:
        height, width = weights.block_structure
        return [(-(-rows // height), -(-columns // width))]
    if weights.group_size and weights.group_size > 0:
        return [(rows, -(-columns // weights.group_size))]
    strategy = getattr(weights.strategy, "value", weights.strategy)
    return [(rows, 1), (rows,)] if strategy == "channel" else [(), (1,), (1, 1)]
