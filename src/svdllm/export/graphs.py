"""Exports a model as one graph for ONNX Runtime or OpenVINO, and compares the two before the graph is kept."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from svdllm.checkpoint.load import load_model
from svdllm.checkpoint.output import new_folder
from svdllm.common.errors import InputError, NumericalError, UnsupportedModelError, first_line
from svdllm.common.extras import require_extra
from svdllm.common.memory import parameter_bytes
from svdllm.export.copies import config_to_export
from svdllm.inference.cache_names import cache_name, cache_of
from svdllm.models.companions import copy_companion_files
from svdllm.models.logits import compare_logits, full_precision
from svdllm.models.low_rank.factory import dense_config
from svdllm.models.wrapped import refuse_wrapper

GRAPH_FORMATS = ("onnx", "openvino")
PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("openvino",)}
# (sequences, tokens) to trace and to check with: they differ, so that a graph with a fixed length fails the check.
TRACED, CHECKED = (2, 7), (3, 20)
PIECES = (13, 1, 6)  # the checked tokens with a cache: a prompt, one token, several tokens


def export_graph(folder: str | Path, output_dir: str | Path, format: str) -> tuple[float, bool]:
    """Writes a float32 graph of a model, compressed or not.

    The graph takes ``input_ids`` and ``attention_mask`` of any size and a key-value cache, and returns logits and
    cache. It has no cache if some layers of the model keep only the last tokens.

    Returns:
        The largest difference of a logit from the model's, as a share of the largest logit; and whether the graph has a
        cache.

    Raises:
        InputError: ``folder`` is not a model, ``output_dir`` is not empty, or a package is missing.
        CheckpointError: a file is truncated or altered.
        UnsupportedModelError: the exporter cannot trace the model.
        NumericalError: the graph and the model compute different logits; nothing is written.
    """
    folder = Path(folder)
    if format not in GRAPH_FORMATS:
        raise InputError(f"There is no graph format {format!r}; use {' or '.join(GRAPH_FORMATS)}.")
    config = config_to_export(folder)
    refuse_wrapper(config, str(folder), f"--format {format}")
    with new_folder(output_dir, "an export") as (output, partial):
        _check_packages(format)
        model = load_model(folder, dtype=torch.float32).eval()
        output.require_disk(parameter_bytes(model), "the graph needs")
        past = _past(model, _token_ids(model, TRACED))
        with torch.no_grad(), full_precision(), _quiet():
            graph = _traced(model, past, format)
            # The factors are inside the graph, so the dense config describes its inputs without this library.
            graph.config = dense_config(config)
            graph.save_pretrained(partial)
            copy_companion_files(folder, partial)
            logits = _both_logits(model, _opened(partial, format), cached=past is not None)
        difference = compare_logits(
            *logits,
            lambda how: NumericalError(
                f"The {format} graph of {folder} is not kept: {how}. Other versions of {', '.join(PACKAGES[format])} "
                "may do better."
            ),
        )
    return difference, past is not None


def _check_packages(format: str) -> None:
    for package in PACKAGES[format]:
        require_extra(package, f"--format {format}", extra=format)
    try:
        from transformers.exporters.base import ExportedModel  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"--format {format} needs transformers 5.23 or newer (and Python 3.11), found {transformers.__version__}."
        ) from error


def _traced(model: PreTrainedModel, past: DynamicCache | None, format: str) -> Any:
    exporters: Any = importlib.import_module("transformers.exporters")
    exporter, settings = {
        "onnx": (exporters.OnnxExporter, exporters.OnnxConfig(dynamic=True)),
        # Not stateful, so that the inputs and outputs are the same in both formats.
        "openvino": (exporters.OpenVINOExporter, exporters.OpenVINOConfig(dynamic=True, stateful=False)),
    }[format]
    ids = _token_ids(model, TRACED)
    try:
        return exporter().export(model, _inputs(model, ids, past), config=settings)
    except Exception as error:  # torch, the runtimes and transformers raise errors of many kinds
        raise UnsupportedModelError(
            f"transformers' exporter cannot make an {format} graph of {type(model).__name__}: {first_line(error)}"
        ) from error


def _opened(folder: Path, format: str) -> Any:
    from transformers.exporters.base import ExportedModel

    # By default OpenVINO computes in bfloat16 on processors that can, with errors above the tolerance.
    settings: dict[str, Any] = {"config": {"INFERENCE_PRECISION_HINT": "f32"}} if format == "openvino" else {}
    return ExportedModel.from_pretrained(folder, device="cpu", **settings)


def _inputs(model: PreTrainedModel, ids: Tensor, past: DynamicCache | None) -> dict[str, Any]:
    if past is None:
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    mask = ids.new_ones(ids.shape[0], past.get_seq_length() + ids.shape[1])
    return {"input_ids": ids, "attention_mask": mask, cache_name(model): past, "use_cache": True}


def _past(model: PreTrainedModel, ids: Tensor) -> DynamicCache | None:
    """The cache after some tokens, or None if a layer forgets tokens, since a graph cannot describe its shape."""
    with torch.no_grad():
        past = cache_of(model(input_ids=ids, use_cache=True))
    keeps_all = type(past) is DynamicCache and all(type(layer) is DynamicLayer for layer in past.layers)
    return past if keeps_all else None


def _empty(past: DynamicCache) -> DynamicCache:
    for layer in past.layers:
        layer.keys, layer.values = layer.keys[..., :0, :], layer.values[..., :0, :]  # type: ignore[index]
    return past


def _both_logits(model: PreTrainedModel, graph: Any, *, cached: bool) -> tuple[Tensor, Tensor]:
    """The logits of the graph and of the model for tokens and sizes that were not traced.

    With a cache the graph gets the tokens in several pieces.
    """
    ids = _token_ids(model, CHECKED)
    expected = model(input_ids=ids, use_cache=False).logits
    past = _past(model, ids) if cached else None
    past = None if past is None else _empty(past)
    found = []
    for piece in ids.split(PIECES if cached else CHECKED[1], dim=1):
        output = graph(**_inputs(model, piece, past))
        past = cache_of(output) if cached else None
        found.append(output.logits)
    return torch.cat(found, dim=1), expected


def _token_ids(model: PreTrainedModel, shape: tuple[int, int]) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randint(model.config.get_text_config().vocab_size, shape, generator=generator)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences torch, onnxscript and the exporters, which report every step on standard output and in the log."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
