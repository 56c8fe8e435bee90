"""Speed and memory of compressed models, beside the dense one and beside what is possible at the most."""

from svdllm.inference.bench.records import BenchmarkRecord, CellRecord, MemoryUse, ModelRecord, PhaseRecord, Spread
from svdllm.inference.bench.roofline import Ideal, ModelShape, ideal, shape_of
from svdllm.inference.bench.run import benchmark, benchmark_loaded
from svdllm.inference.bench.settings import BenchSettings

__all__ = [
    "BenchSettings",
    "BenchmarkRecord",
    "CellRecord",
    "Ideal",
    "MemoryUse",
    "ModelRecord",
    "ModelShape",
    "PhaseRecord",
    "Spread",
    "benchmark",
    "benchmark_loaded",
    "ideal",
    "shape_of",
]
