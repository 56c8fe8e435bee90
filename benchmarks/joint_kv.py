"""One latent for keys and values together against one for each: what is lost, by layer, of a real model.

``[W_k; W_v]`` reads one input, so one truncation of the stack gives a first factor that both share, as multi-head
latent attention has it (DeepSeek-V2, arXiv 2405.04434). A joint latent of rank ``r`` takes ``r`` elements in the
cache and ``r (in + 2 kv)`` parameters; two of ``r_k + r_v = r`` take as many elements and ``r (in + kv)`` parameters.

Both are truncated in the metric of the inputs of a few windows, and measured on other windows. The losses of k and of
v are each divided by the energy of the outputs, and added. The stack is scaled so that it is this sum that its
truncation makes smallest; the separate ranks are equal, or split such that the sum is smallest.

    python benchmarks/joint_kv.py MODEL --text FILE --windows 4 --seqlen 512
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from svdllm.compression.math.linalg import output_spectrum


@torch.no_grad()
def grams(model: Any, windows: Tensor) -> dict[str, Tensor]:
    """Float64 Grams of the inputs of each attention layer's k_proj, by the layer's name."""
    found: dict[str, Tensor] = {}
    handles = []

    def add(name: str, x: Tensor) -> None:
        x = x.flatten(0, -2).double()
        found[name] = found.get(name, 0) + x.mT @ x

    for name, module in model.named_modules():
        if hasattr(module, "k_proj") and hasattr(module, "v_proj"):
            hook = module.k_proj.register_forward_pre_hook(lambda _, args, name=name: add(name, args[0]))
            handles.append(hook)
    for window in windows:
        model.model(input_ids=window[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def energy(weight: Tensor, gram: Tensor) -> Tensor:
    return ((weight @ gram) * weight).sum()


def relative_loss(stack: Tensor, basis: Tensor, rows: int, gram: Tensor) -> float:
    """Of ``stack`` projected on ``basis``, summed over its parts of ``rows`` rows."""
    residual = stack - basis @ (basis.mT @ stack)
    parts = zip(residual.split(rows), stack.split(rows), strict=True)
    return sum((energy(lost, gram) / energy(part, gram)).item() for lost, part in parts)


def losses(w_k: Tensor, w_v: Tensor, gram: Tensor, other: Tensor, removed: float) -> dict[str, float]:
    """Sums of the two relative losses, with ``removed`` of the parameters of k and of v gone in the separate case."""
    kv, width = w_k.shape
    rank = int((1 - removed) * kv * width / (kv + width))
    same_params = int(2 * rank * (width + kv) / (width + 2 * kv))
    scaled = [w.double() / energy(w.double(), gram).sqrt() for w in (w_k, w_v)]
    separate = [output_spectrum(w, gram) for w in scaled]
    bases = [spectrum[1] for spectrum in separate]
    joint = output_spectrum(torch.cat(scaled), gram)[1]
    of_k = int((torch.cat([spectrum[0] for spectrum in separate]).topk(2 * rank).indices < kv).sum())

    def apart(ranks: tuple[int, int]) -> float:
        return sum(relative_loss(w, b[:, :r], kv, other) for w, b, r in zip(scaled, bases, ranks, strict=True))

    return {
        "equal ranks": apart((rank, rank)),
        "best ranks": apart((of_k, 2 * rank - of_k)),
        "joint, same cache": relative_loss(torch.cat(scaled), joint[:, : 2 * rank], kv, other),
        "joint, same parameters": relative_loss(torch.cat(scaled), joint[:, :same_params], kv, other),
        "its cache": same_params / (2 * rank),
    }


def study(args: argparse.Namespace) -> dict[str, Any]:
    model: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(args.model)(Path(args.text).read_text(encoding="utf-8")).input_ids
    windows = torch.tensor(ids[: 2 * args.windows * args.seqlen]).view(2, args.windows, args.seqlen)
    fitted, other = (grams(model, part) for part in windows)
    result: dict[str, Any] = {"model": args.model, "tokens": windows[0].numel(), "layers": len(fitted), "losses": {}}
    for removed in args.ratios:
        rows = []
        for name, gram in fitted.items():
            layer: Any = model.get_submodule(name)
            rows.append(losses(layer.k_proj.weight.detach(), layer.v_proj.weight.detach(), gram, other[name], removed))
        result["losses"][str(removed)] = {key: statistics.mean(row[key] for row in rows) for key in rows[0]} | {
            f"layers won, {key}": sum(row[f"joint, {key}"] < row["best ranks"] for row in rows)
            for key in ("same cache", "same parameters")
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", required=True)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.2, 0.4, 0.6])
    result = study(parser.parse_args())
    table = Table("removed", *next(iter(result["losses"].values())))
    for removed, row in result["losses"].items():
        table.add_row(removed, *(f"{value:.4g}" for value in row.values()))
    Console().print(table)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
