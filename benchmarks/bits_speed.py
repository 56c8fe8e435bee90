"""Speed of few bits on this CPU: all linears of a model with kernels that exist, beside dense float32.

A pass goes through the linears of every block, as one token (decode) or 256 (prefill) do, so that weights come from
memory and not from a cache. ``int8`` is torch's ``_weight_int8pack_mm`` (a scale for every row), ``int4`` is
``_weight_int4pack_mm_for_cpu`` (a scale for every 64 inputs); both compute in bfloat16. ``pair-int8`` has half of the
parameters; ``int4-corrected`` has rank 16. transformers unpacks the files of compressed-tensors, which then run as a
dense matrix. Forms take turns; figures are medians of the time against dense float32 in the same turn. Weights are
random. The last line is JSON.

    python benchmarks/bits_speed.py --threads 2
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn import functional

from svdllm.compression.math.rounding import Rounded, round_rows

# Of a block of SmolLM2-135M: out_features x in_features.
BLOCK = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]
GROUP, CORRECTION_RANK = 64, 16
RANKS = 32  # ranks are multiples of it: of other numbers of inputs the kernel of 8 bits reads past the end
Call = Callable[[Tensor], Tensor]
OPS = torch.ops.aten


def dense(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Call:
    weight_OI = torch.randn(rows, columns, dtype=dtype)
    return lambda x: functional.linear(x.to(dtype), weight_OI)


def random_codes(rows: int, columns: int, bits: int, group: int) -> Rounded:
    half = 2 ** (bits - 1)
    codes_OI = torch.randint(-half, half, (rows, columns), dtype=torch.int8)
    return Rounded(codes_OI, torch.full((rows, columns // group), 1e-2))


def int8(rounded: Rounded) -> Call:
    scales_O = rounded.scales_OG.flatten().bfloat16()
    return lambda x: OPS._weight_int8pack_mm(x.bfloat16(), rounded.codes_OI, scales_O)


def int4(rounded: Rounded) -> Call:
    packed = OPS._convert_weight_to_int4pack_for_cpu(rounded.codes_OI.to(torch.int32) + 8, 1)
    scales_GO = rounded.scales_OG.mT
    scales_GO2 = torch.stack([scales_GO, torch.zeros_like(scales_GO)], -1).contiguous().bfloat16()
    return lambda x: OPS._weight_int4pack_mm_for_cpu(x.bfloat16(), packed, GROUP, scales_GO2)


def in_8_bits(rows: int, columns: int) -> Call:
    return int8(random_codes(rows, columns, 8, columns))


def in_4_bits(rows: int, columns: int) -> Call:
    return int4(random_codes(rows, columns, 4, GROUP))


def pair_in_8_bits(rows: int, columns: int) -> Call:
    return _pair(rows, columns, rows * columns // (2 * (rows + columns)) // RANKS * RANKS)


def corrected(rows: int, columns: int) -> Call:
    base, correction = in_4_bits(rows, columns), _pair(rows, columns, CORRECTION_RANK)
    return lambda x: base(x) + correction(x)


def _pair(rows: int, columns: int, rank: int) -> Call:
    first, second = in_8_bits(rank, columns), in_8_bits(rows, rank)
    return lambda x: second(first(x))


def torchao_in_8_bits(rows: int, columns: int) -> Call:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    module = nn.Sequential(nn.Linear(columns, rows, bias=False)).requires_grad_(False)
    quantize_(module, Int8WeightOnlyConfig(set_inductor_config=False))
    return module


FORMS: dict[str, Callable[[int, int], Call]] = {
    "dense float32": dense,
    "dense bfloat16": lambda rows, columns: dense(rows, columns, torch.bfloat16),
    "int8": in_8_bits,
    "int4": in_4_bits,
    "pair-int8": pair_in_8_bits,
    "int4-corrected": corrected,
    "torchao int8": torchao_in_8_bits,
}


def require_right() -> None:
    """Stops where a kernel does not compute what the codes of a checkpoint stand for."""
    weight_OI, x = torch.randn(64, 128), torch.randn(3, 128)
    for kernel, bits, group in ((int8, 8, 128), (int4, 4, GROUP)):
        rounded = round_rows(weight_OI, None, torch.full((64,), 2.0 ** (bits - 1)), group, torch.float32)
        expected = functional.linear(x, rounded.matrix)
        error = float((kernel(rounded)(x).float() - expected).abs().max() / expected.abs().max())
        if error > 0.03:
            raise SystemExit(f"{kernel.__name__} does not compute its matrix: {error:.1e}")


def seconds(linears: list[Call], inputs: dict[int, Tensor]) -> float:
    started = time.perf_counter()
    for (_, columns), linear in zip(BLOCK * (len(linears) // len(BLOCK)), linears, strict=True):
        linear(inputs[columns])
    return time.perf_counter() - started


def measured(models: dict[str, list[Call]], tokens: int, repeats: int) -> dict[str, float]:
    """The time of every form against that of dense float32 in the same turn, medians; and that of dense in ms."""
    inputs = {columns: torch.randn(tokens, columns) for _, columns in BLOCK}
    turns = []
    for turn in range(repeats + 1):  # the first warms up
        taken = {name: seconds(linears, inputs) for name, linears in models.items()}
        turns += [taken] if turn else []
    ratios = {name: round(median(turn[name] / turn["dense float32"] for turn in turns), 3) for name in models}
    return ratios | {"dense float32, ms": round(1e3 * median(turn["dense float32"] for turn in turns), 1)}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--blocks", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--prefill-repeats", type=int, default=3)
    parser.add_argument("--forms", default=",".join(FORMS))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    require_right()
    names = dict.fromkeys(["dense float32", *arguments.forms.split(",")])
    models = {name: [FORMS[name](*shape) for shape in BLOCK * arguments.blocks] for name in names}
    rows = []
    for what, tokens, repeats in (("decode", 1, arguments.repeats), ("prefill", 256, arguments.prefill_repeats)):
        rows.append({"what": what, "tokens": tokens, **measured(models, tokens, repeats)})
        print(*(f"{name}: {value}" for name, value in rows[-1].items()), sep="\n", end="\n\n", flush=True)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
