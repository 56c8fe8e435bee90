"""Speed of linears in few bits on this CPU: the kernels of torch beside dense products, by shape and number of tokens.

``int8`` is ``_weight_int8pack_mm`` (a scale for every row), ``int4`` is ``_weight_int4pack_mm_for_cpu`` (a scale for
every 64 inputs). Both compute what the integers of a checkpoint stand for. Kernels take turns; figures are medians of
the time against dense float32 in the same turn. The last line is JSON.

    python benchmarks/bits_speed.py --threads 2 --repeats 31
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor
from torch.nn import functional

from svdllm.compression.math.rounding import round_rows

SHAPES = {"q_proj": (576, 576), "up_proj": (1536, 576), "down_proj": (576, 1536), "2048 x 2048": (2048, 2048)}
GROUP = 64
Call = Callable[[Tensor], Tensor]


def kernels(weight_OI: Tensor) -> dict[str, Call]:
    """Every way to multiply by a matrix, as a function of float32 inputs (tokens x in_features)."""
    rows, columns = weight_OI.shape
    eight = round_rows(weight_OI, None, torch.full((rows,), 128.0), columns, torch.float32)
    four = round_rows(weight_OI, None, torch.full((rows,), 8.0), GROUP, torch.float32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(four.codes_OI.to(torch.int32) + 8, 1)
    scales_GO2 = torch.stack([four.scales_OG.mT, torch.zeros_like(four.scales_OG.mT)], -1).contiguous()
    eight_O, half = eight.scales_OG.flatten(), weight_OI.bfloat16()
    ops = torch.ops.aten
    calls: dict[str, Call] = {
        "dense float32": lambda x: functional.linear(x, weight_OI),
        "dense bfloat16": lambda x: functional.linear(x.bfloat16(), half),
        "int8": lambda x: ops._weight_int8pack_mm(x.bfloat16(), eight.codes_OI, eight_O.bfloat16()),
        "int4": lambda x: ops._weight_int4pack_mm_for_cpu(x.bfloat16(), packed, GROUP, scales_GO2.bfloat16()),
        "int4, unpacked in every call": lambda x: functional.linear(x, four.matrix),
    }
    inputs = torch.randn(3, columns)
    for name, matrix in (("int8", eight.matrix), ("int4", four.matrix)):
        expected = functional.linear(inputs, matrix)
        error = (calls[name](inputs).float() - expected).abs().max() / expected.abs().max()
        assert error < 0.03, f"{name} does not compute its matrix: {error:.1e}"
    return calls


def measured(calls: dict[str, Call], inputs: Tensor, repeats: int) -> dict[str, float]:
    """Median seconds of every call against that of the first in the same turn."""
    ratios: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        seconds = {}
        for name, call in calls.items():
            call(inputs)
            started = time.perf_counter()
            call(inputs)
            seconds[name] = time.perf_counter() - started
        for name in calls:
            ratios[name].append(seconds[name] / seconds["dense float32"])
    return {name: median(found) for name, found in ratios.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 256])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    rows = []
    for name, (out_features, in_features) in SHAPES.items():
        calls = kernels(torch.randn(out_features, in_features))
        for tokens in arguments.tokens:
            with torch.no_grad():
                found = measured(calls, torch.randn(tokens, in_features), arguments.repeats)
            rows.append({"linear": name, "tokens": tokens} | found)
            print(name, tokens, {kernel: round(value, 2) for kernel, value in found.items()}, flush=True)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
