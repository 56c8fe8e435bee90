"""SVD-LLM as a library: a smaller model out of any Hugging Face causal language model.

Importing it registers the low-rank model types, so that ``AutoModelForCausalLM.from_pretrained`` loads checkpoints.
"""

from svdllm.modeling import register_all
from svdllm.version import __version__

register_all()

_PUBLIC = {
    "Recipe": "config",
    "CompressionResult": "records",
    "Plan": "plan",
    "plan": "plan",
    "compress": "compress",
    "compress_many": "compress",
    "perplexity": "evaluate",
    "load_model": "checkpoint",
    "verify": "checkpoint",
    "export_dense": "checkpoint",
    "SvdllmError": "errors",
    "InputError": "errors",
    "UnsupportedModelError": "errors",
    "ResourceError": "errors",
    "NumericalError": "errors",
    "CheckpointError": "errors",
}


def __getattr__(name: str):
    """The public names, imported when first used: the command line's help should not wait for them."""
    from importlib import import_module

    if name in _PUBLIC:
        return getattr(import_module(f"svdllm.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module 'svdllm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*_PUBLIC, "__version__"])
