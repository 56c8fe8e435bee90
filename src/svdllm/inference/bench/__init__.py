"""Measures speed and memory of compressed models, compared with the dense model and with the hardware's limit."""

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
