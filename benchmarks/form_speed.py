"""Speed of the forms of linears at equal parameters: dense, pairs, packed, and narrower MLPs, on random weights.

The shapes are those of SmolLM2-135M, or of a config.json. All linears of a model have one form, and sizes are uniform.
``packed`` is packed on the side that ``packed_side`` names, with random orders; ``packed, down in order`` is the same
with an order of ``down_proj`` that changes nothing, as the writer of a checkpoint can leave it. ``narrow`` has narrower
MLPs and dense attention. Models take turns; ratios are of the same turn, with quartiles. The last line is JSON.

    python benchmarks/form_speed.py --removed 0.4 --repeats 11 --threads 2
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig

from svdllm.common.device import resolve_device
from svdllm.compression.math.packing import packed_side
from svdllm.inference.bench import BenchmarkRecord, BenchSettings, Spread, benchmark_loaded
from svdllm.models.config_files import load_config
from svdllm.models.discover import discover
from svdllm.models.low_rank import FORMAT_VERSION, PackedLinear, low_rank_config
from svdllm.models.skeleton import build_skeleton
from svdllm.models.structure import Target

ROUND_TO = 8  # of ranks
WIDTH_TO = 64  # of the width of MLPs
PACKED, PACKED_IN_ORDER = "packed", "packed, down in order"
Forms = dict[str, dict[str, Any]]


def smollm2() -> LlamaConfig:
    """The shapes of SmolLM2-135M."""
    return LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )


def pairs(targets: tuple[Target, ...], removed: float) -> Forms:
    ranks = {t.name: (1 - removed) * t.num_weights / (t.in_features + t.out_features) for t in targets}
    return {name: {"form": "pair", "rank": _rounded(rank, ROUND_TO)} for name, rank in ranks.items()}


def packed(targets: tuple[Target, ...], removed: float) -> Forms:
    """The rank r of which ``r (d + n - r)`` is what remains of ``d n``."""
    forms = {}
    for target in targets:
        both = target.in_features + target.out_features
        rank = (both - (both**2 - 4 * (1 - removed) * target.num_weights) ** 0.5) / 2
        side = packed_side(target.out_features, target.in_features)
        forms[target.name] = {"form": "packed", "rank": _rounded(rank, ROUND_TO), "side": side}
    return forms


def in_order(targets: tuple[Target, ...], removed: float) -> Forms:
    forms = packed(targets, removed)
    return forms | {name: form | {"side": "columns"} for name, form in forms.items() if _is_down(name)}


def narrow(targets: tuple[Target, ...], removed: float) -> Forms:
    sizes = {"gate_proj": "out_features", "up_proj": "out_features", "down_proj": "in_features"}
    mlp = [target for target in targets if target.name.rpartition(".")[2] in sizes]
    all_weights, mlp_weights = (sum(target.num_weights for target in some) for some in (targets, mlp))
    share = 1 - removed * all_weights / mlp_weights
    forms = {}
    for target in mlp:
        size = sizes[target.name.rpartition(".")[2]]
        forms[target.name] = {"form": "narrow", size: _rounded(share * getattr(target, size), WIDTH_TO)}
    return forms


VARIANTS = {"pairs": pairs, PACKED: packed, PACKED_IN_ORDER: in_order, "narrow": narrow}


def random_models(config: PreTrainedConfig, removed: float, dtype: torch.dtype, device: torch.device, seed: int):
    """The dense model and one of every form, of random weights and orders."""
    targets = discover(build_skeleton(config)).targets
    entry = {"format_version": FORMAT_VERSION, "base_model_type": config.model_type}
    configs = {"dense": config} | {
        name: low_rank_config(config, entry | {"forms": forms(targets, removed)}) for name, forms in VARIANTS.items()
    }
    torch.manual_seed(seed)
    with torch.device(device):
        models = {name: AutoModelForCausalLM.from_config(one, dtype=dtype).eval() for name, one in configs.items()}
    for variant, model in models.items():
        for name, module in model.named_modules():
            if isinstance(module, PackedLinear) and not (variant == PACKED_IN_ORDER and _is_down(name)):
                module.order.copy_(torch.randperm(len(module.order)))
    return models


def ratios(record: BenchmarkRecord, base: str) -> list[dict[str, Any]]:
    """Speed of every model over that of ``base`` in the same turns, by phase."""
    seconds = {
        (cell.model, phase): found.seconds.values for cell in record.cells for phase, found in cell.phases.items()
    }
    return [
        {"model": cell.model, "batch": cell.batch, "prompt": cell.prompt, "phase": phase, "over": base}
        | {"ratio": Spread.of([b / own for b, own in zip(seconds[base, phase], found.seconds.values, strict=True)])}
        for cell in record.cells
        for phase, found in cell.phases.items()
    ]


def show(records: list[BenchmarkRecord]) -> None:
    table = Table("model", "linears", "batch x prompt", "phase", "ms", "over pairs", "over dense", "ideal", "reached")
    for record in records:
        linears = {model.name: f"{model.linears / 1e6:.2f} M" for model in record.models}
        over_pairs = {(row["model"], row["phase"]): row["ratio"] for row in ratios(record, "pairs")}
        for cell in record.cells:
            for phase, found in cell.phases.items():
                steps = 1 if phase == "prefill" else cell.gen
                row = [cell.model, linears[cell.model], f"{cell.batch} x {cell.prompt}", phase]
                row += [f"{1e3 * found.seconds.median / steps:.1f}", str(over_pairs[cell.model, phase])]
                if found.ideal and found.reached:
                    row += [str(found.speed_up), f"{found.ideal.model:.2f}", f"{found.reached.model:.0%}"]
                table.add_row(*row)
    Console(width=150).print(table)


def _quotients(seconds: Sequence[float], others: Sequence[float]) -> list[float]:
    return [one / other for one, other in zip(seconds, others, strict=True)]


def _rounded(size: float, multiple: int) -> int:
    return max(1, round(size / multiple)) * multiple


def _is_down(name: str) -> bool:
    return name.endswith("down_proj")


def main(arguments: list[str] | None = None) -> list[BenchmarkRecord]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="folder with a config.json instead of the shapes of SmolLM2-135M")
    parser.add_argument("--removed", type=float, default=0.4, help="share of the weights of the linears")
    parser.add_argument("--gen", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--layers", type=int, help="fewer layers than the config has")
    parser.add_argument("--no-fuse", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    config: Any = smollm2() if args.config is None else load_config(args.config, str(args.config))
    config.num_hidden_layers = args.layers or config.num_hidden_layers
    models = random_models(config, args.removed, getattr(torch, args.dtype), resolve_device(args.device), args.seed)
    settings: dict[str, Any] = {"repeats": args.repeats, "fuse": not args.no_fuse, "seed": args.seed, "prompts": (128,)}
    records = [
        benchmark_loaded(models, "dense", BenchSettings(batch_sizes=(batch,), gen=gen, **settings))
        for batch, gen in ((8, 1), (1, args.gen))
    ]
    show(records)
    print(json.dumps([record.to_dict() for record in records]))
    return records


if __name__ == "__main__":
    main()
