"""SVD-LLM as a library: a smaller model out of any Hugging Face causal language model.

Importing it registers the low-rank model types, so that ``AutoModelForCausalLM.from_pretrained`` loads checkpoints. The
command line, which shall print its help at once, registers them when a command is called (``svdllm.cli.libraries``).
"""

from svdllm.common import silence_torchao  # noqa: F401
from svdllm.common.program import is_command_line
from svdllm.common.version import __version__

if not is_command_line():
    from svdllm.checkpoint.verify import verify
    from svdllm.checkpoint.weight_sizes import WeightBytes, weight_bytes
    from svdllm.common.errors import (
        CheckpointError,
        InputError,
        NumericalError,
        ResourceError,
        SvdllmError,
        UnsupportedModelError,
    )
    from svdllm.common.tested_versions import warn_if_untested
    from svdllm.compression.plan import Plan, plan
    from svdllm.compression.recipe import Recipe
    from svdllm.compression.records import CompressionResult
    from svdllm.compression.run import compress, compress_many
    from svdllm.compression.slice import load_model, slice_checkpoint
    from svdllm.evaluation.perplexity import Perplexity, perplexity
    from svdllm.evaluation.side_by_side import evaluate_tasks
    from svdllm.evaluation.tasks import TaskResults
    from svdllm.export.dense import export_dense
    from svdllm.export.padded_heads import export_padded
    from svdllm.export.pairs import PairsExport, export_pairs
    from svdllm.export.quantize import QuantizationResult, quantize
    from svdllm.inference.bench import BenchmarkRecord, BenchSettings, benchmark
    from svdllm.inference.fuse import fuse_factors
    from svdllm.inference.latent_cache import use_latent_cache, use_ordinary_cache
    from svdllm.models.low_rank import register_all
    from svdllm.models.unused_tensors import UnusedTensors, UnusedTensorsWarning
    from svdllm.pruning.run import PruningResult, prune
    from svdllm.pruning.settings import Pruning
    from svdllm.recovery import Recovery, RecoveryResult, recover

    warn_if_untested()
    register_all()

__all__ = [
    "BenchSettings",
    "BenchmarkRecord",
    "CheckpointError",
    "CompressionResult",
    "InputError",
    "NumericalError",
    "PairsExport",
    "Perplexity",
    "Plan",
    "Pruning",
    "PruningResult",
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
    "export_pairs",
    "fuse_factors",
    "load_model",
    "perplexity",
    "plan",
    "prune",
    "quantize",
    "recover",
    "slice_checkpoint",
    "use_latent_cache",
    "use_ordinary_cache",
    "verify",
    "weight_bytes",
]
