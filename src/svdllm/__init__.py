"""SVD-LLM as a library: a smaller model out of any Hugging Face causal language model.

Importing it registers the low-rank model types, so that ``AutoModelForCausalLM.from_pretrained`` loads checkpoints.
"""

from svdllm import quiet  # noqa: F401
from svdllm.bench import BenchmarkRecord, BenchSettings, benchmark
from svdllm.byte_count import WeightBytes, weight_bytes
from svdllm.checkpoint import load_model
from svdllm.compress import compress, compress_many
from svdllm.config import Recipe
from svdllm.errors import (
    CheckpointError,
    InputError,
    NumericalError,
    ResourceError,
    SvdllmError,
    UnsupportedModelError,
)
from svdllm.evaluate import Perplexity, perplexity
from svdllm.export import export_dense
from svdllm.fuse import fuse_factors
from svdllm.latent_cache import use_latent_cache, use_ordinary_cache
from svdllm.modeling import register_all
from svdllm.padding import export_padded
from svdllm.plan import Plan, plan
from svdllm.quantize import QuantizationResult, quantize
from svdllm.records import CompressionResult
from svdllm.recover import Recovery, RecoveryResult, recover
from svdllm.side_by_side import evaluate_tasks
from svdllm.slicing import slice_checkpoint
from svdllm.tasks import TaskResults
from svdllm.tested_versions import warn_if_untested
from svdllm.unused_tensors import UnusedTensors, UnusedTensorsWarning
from svdllm.verify import verify
from svdllm.version import __version__

warn_if_untested()
register_all()

__all__ = [
    "BenchSettings",
    "BenchmarkRecord",
    "CheckpointError",
    "CompressionResult",
    "InputError",
    "NumericalError",
    "Perplexity",
    "Plan",
    "QuantizationResult",
    "Recipe",
    "Recovery",
    "RecoveryResult",
    "ResourceError",
    "SvdllmError",
    "TaskResults",
    "UnsupportedModelError",
    "UnusedTensors",
    "UnusedTensorsWarning",
    "WeightBytes",
    "__version__",
    "benchmark",
    "compress",
    "compress_many",
    "evaluate_tasks",
    "export_dense",
    "export_padded",
    "fuse_factors",
    "load_model",
    "perplexity",
    "plan",
    "quantize",
    "recover",
    "slice_checkpoint",
    "use_latent_cache",
    "use_ordinary_cache",
    "verify",
    "weight_bytes",
]
