"""Ways to make the experts of a mixture smaller, at equal numbers of parameters: factors, a shared basis, REAP.

Attention stays dense, and every way removes the same share of the experts' weights; REAP drops whole experts, so that
ratios are best multiples of one of them. Perplexities have a standard error over windows, and the difference to the
dense model one over pairs of windows. Routing is the share of tokens, over all layers, whose set of experts is another.

    python benchmarks/mixture_training.py --text FILE FOLDER
    python benchmarks/mixture.py FOLDER --calib FILE --eval FILE --work DIR --json FILE
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

from mixture_training import RECORD
from shared_basis import products_with_shared_basis
from svdllm import Recipe, __version__, compress, load_model
from svdllm.common.settings_file import read_settings
from svdllm.compression.analysis import Analysis
from svdllm.compression.drop_experts import drop_experts
from svdllm.compression.forms import FORMS
from svdllm.compression.math.linalg import factorise
from svdllm.compression.recipe import PLAIN
from svdllm.data import evaluation_tokens
from svdllm.models.discover import discover
from svdllm.models.low_rank.lowrank import SplitExperts, split_experts, stacked_names
from svdllm.models.open import open_config
from svdllm.models.skeleton import build_skeleton
from svdllm.models.structure import Target, weight_of, weights_by_name

ATTENTION = r"attn"
TWO_SIDED = {"metric": "two-sided", "shrinkage": 0.1, "calibration_mode": "dense"}
BY_KL = {**TWO_SIDED, "allocation": "loss", "round_to": 4}
# Rows that are recipes: name -> settings.
RECIPES: dict[str, dict[str, Any]] = {
    "svd": {"method": "svd", **PLAIN},
    "svd-llm": {**PLAIN},
    "own pairs, uniform": {**PLAIN, **TWO_SIDED},
    "own packed, uniform": {**PLAIN, **TWO_SIDED, "forms": ("packed",)},
    "own pairs by KL": {**BY_KL, "forms": ("pair",)},
    "own forms by KL": BY_KL,
    "own forms by KL, ranks of each expert": {**BY_KL, "expert_ranks": "own"},
    "balanced": {"round_to": 4},
}
SHARED = "shared basis, uniform"
BETTER = "shared basis or own packed, by error"
REAP = "reap"
SETTINGS = ("samples", "seqlen", "windows", "seed")


def calibration(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "calibration": args.calib,
        "samples": args.samples,
        "seqlen": args.seqlen,
        "seed": args.seed,
        "device": args.device,
        "ignore": (ATTENTION,),
        "allow_partial": True,
    }


class Watched:
    """What a model makes of a text: losses by window, log probabilities, and the experts of every token by layer."""

    def __init__(self, model: Any, ids_NT: Tensor, numbers: Mapping[str, list[int]] | None = None):
        self._numbers = numbers or {}
        self.sets: dict[str, Tensor] = {}
        with torch.no_grad(), self._noted(model):
            self.log_probs = torch.cat(
                [model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1) for ids in ids_NT.split(8)]
            )
        losses = F.nll_loss(self.log_probs[:, :-1].transpose(1, 2), ids_NT[:, 1:], reduction="none")
        self.losses_N = losses.double().mean(1)

    @contextmanager
    def _noted(self, model: Any) -> Iterator[None]:
        def on(name: str) -> Any:
            numbers = self._numbers.get(name)

            def note(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                chosen_TK = (*args, *kwargs.values())[1]
                chosen_TK = chosen_TK if numbers is None else torch.tensor(numbers)[chosen_TK]
                seen = self.sets.get(name, chosen_TK.new_zeros(0, chosen_TK.shape[1]))
                self.sets[name] = torch.cat([seen, chosen_TK.sort(dim=1).values])

            return note

        experts = [
            (name, module)
            for name, module in model.named_modules()
            if isinstance(module, SplitExperts) or stacked_names(module) is not None
        ]
        handles = [module.register_forward_pre_hook(on(name), with_kwargs=True) for name, module in experts]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def beside(self, dense: Watched) -> dict[str, float]:
        """Perplexity, how far it is from the dense model's, the KL divergence, and the tokens routed elsewhere."""
        count = len(self.losses_N)
        gaps_N = self.losses_N - dense.losses_N
        perplexity = self.losses_N.mean().exp().item()
        moved = [(self.sets[name] != own).any(dim=1).float().mean().item() for name, own in dense.sets.items()]
        kl = (dense.log_probs.exp() * (dense.log_probs - self.log_probs)).sum(-1).mean().item()
        return {
            "perplexity": perplexity,
            "stderr": perplexity * self.losses_N.std().item() / math.sqrt(count),
            "gap": gaps_N.mean().item(),
            "gap_stderr": gaps_N.std().item() / math.sqrt(count),
            "kl": kl,
            "routed_elsewhere": sum(moved) / len(moved),
        }


class SharedBases:
    """The dense model with the experts' matrices replaced by what a shared basis, or own factors, make of them."""

    def __init__(self, model: str, recipe: Recipe, work: Path):
        folder = work / "analysis-shared"
        if not folder.is_dir():
            compress(model, recipe, work / "shared", analysis_dir=folder)
            shutil.rmtree(work / "shared")
        self._analysis = Analysis(folder, read_settings(folder) or {})
        self.model: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        split_experts(self.model)
        self.pools: dict[str, list[Target]] = {}
        for target in discover(build_skeleton(self.model.config)).targets:
            if target.pool is not None:
                self.pools.setdefault(target.pool, []).append(target)
        self._weights = {
            target.name: weight_of(self.model, target).double() for pool in self.pools.values() for target in pool
        }

    def put(self, ratio: float, *, or_own: bool) -> int:
        """Puts the products into the model; returns the number of pools that have a shared basis."""
        shared = 0
        for members in self.pools.values():
            products, with_basis = self._products(members, ratio, or_own=or_own)
            shared += with_basis
            parameters = dict(self.model.named_parameters())
            with torch.no_grad():
                for target, product in zip(members, products, strict=True):
                    for name, value in weights_by_name(target, product).items():
                        parameters[name].copy_(value)
        return shared

    def _products(self, members: list[Target], ratio: float, *, or_own: bool) -> tuple[list[Tensor], bool]:
        weights = [self._weights[target.name] for target in members]
        grams = [self._of(self._analysis.metric(target), target.in_features) for target in members]
        lefts = [self._of(self._analysis.left_metric(target), target.out_features) for target in members]
        params = int((1 - ratio) * sum(target.num_weights for target in members))
        found = [products_with_shared_basis(weights, grams, lefts, params, side) for side in ("in", "out")]
        shared = [products for products in found if products is not None]
        own = [self._own(target, weight, ratio) for target, weight in zip(members, weights, strict=True)]

        def error(products: list[Tensor]) -> float:
            terms = zip(weights, products, grams, lefts, strict=True)
            return sum(((g @ (w - p)) * ((w - p) @ c)).sum().item() for w, p, c, g in terms)

        best = min([*shared, own] if or_own else shared, key=error)
        return best, best is not own

    def _own(self, target: Target, weight_OI: Tensor, ratio: float) -> Tensor:
        exact_rank = FORMS["packed"].exact_rank
        assert exact_rank is not None
        rank = max(1, int(exact_rank(target, (1 - ratio) * target.num_weights)))
        u_OR, v_RI = factorise(weight_OI, self._analysis.spectrum(target), rank)
        return u_OR @ v_RI

    @staticmethod
    def _of(metric: Tensor | None, size: int) -> Tensor:
        return torch.eye(size, dtype=torch.float64) if metric is None else metric.double()


def rows(args: argparse.Namespace, ids_NT: Tensor, dense: Watched) -> Iterator[dict[str, Any]]:
    """Makes and measures every model, the ratios of a row one after the other."""
    shared = None
    for name in args.rows:
        for ratio in args.ratios:
            row: dict[str, Any] = {"row": name, "ratio": ratio}
            if name in RECIPES:
                recipe = Recipe(**{**RECIPES[name], **calibration(args)}, ratio=ratio)
                folder = args.work / "model"
                shutil.rmtree(folder, ignore_errors=True)
                made = compress(args.model, recipe, folder, analysis_dir=args.work / f"analysis-{name}")
                model: Any = load_model(folder, dtype=torch.float32).eval()
                row |= {"achieved": made.plan.achieved_ratio} | Watched(model, ids_NT).beside(dense)
            elif name == REAP:
                recipe = Recipe(**calibration(args), ratio=ratio)
                shutil.rmtree(args.work / "model", ignore_errors=True)
                dropped = drop_experts(args.model, recipe, args.work / "model")
                model = AutoModelForCausalLM.from_pretrained(args.work / "model", dtype=torch.float32).eval()
                row |= {"achieved": dropped.achieved_ratio}
                row |= Watched(model, ids_NT, dropped.kept).beside(dense)
            else:
                whole = {**PLAIN, **TWO_SIDED, **calibration(args), "forms": ("packed",)}
                shared = shared or SharedBases(args.model, Recipe(**whole, ratio=ratio), args.work)
                row |= {"achieved": ratio, "shared_pools": shared.put(ratio, or_own=name == BETTER)}
                row |= Watched(shared.model, ids_NT).beside(dense)
            yield row


def page(found: list[dict[str, Any]], dense: Watched, args: argparse.Namespace, params: int) -> str:
    """The results as a page of the documentation."""
    record = Path(args.model, RECORD)
    trained = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {"tokens": 0, "text": []}
    measured = f"{args.windows} windows of {Path(args.eval).name}"
    text = f"""# Ways to make experts smaller

A mixture of {params:,} parameters, trained on {trained["tokens"]:,} tokens of {", ".join(trained["text"])}.
The experts are made smaller, attention stays dense. Calibrated on {args.samples} windows of {args.seqlen} tokens,
measured on {measured}. ± is the standard error over windows, that of ln(ppl / dense)
over pairs of windows. *Routed elsewhere* is the share of tokens, over all layers, whose set of experts is not that
of the dense model. `benchmarks/mixture.py`; the model is made by `benchmarks/mixture_training.py`.

"""
    return text + markdown(found, dense) + "\n"


def markdown(found: list[dict[str, Any]], dense: Watched) -> str:
    lines = ["| | removed | perplexity | ln(ppl / dense) | KL | routed elsewhere |", "|---|---|---|---|---|---|"]
    lines.append(f"| dense | 0 % | {dense.losses_N.mean().exp().item():.2f} | | | |")
    for row in found:
        cells = [
            row["row"],
            f"{row['achieved']:.1%}",
            f"{row['perplexity']:.2f} ± {row['stderr']:.2f}",
            f"{row['gap']:.4f} ± {row['gap_stderr']:.4f}",
            f"{row['kl']:.4f}",
            f"{row['routed_elsewhere']:.1%}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a mixture, as mixture_training.py writes it")
    parser.add_argument("--calib", required=True, help="calibration text")
    parser.add_argument("--eval", required=True, help="text for perplexity")
    parser.add_argument("--work", required=True, type=Path, help="folder for analyses and compressed models")
    parser.add_argument("--json", required=True, type=Path, help="results")
    parser.add_argument("--page", type=Path, help="results as a page of the documentation")
    parser.add_argument("--ratios", default="0.25,0.375,0.5", help="of the experts' weights")
    parser.add_argument("--rows", default=";".join([*RECIPES, SHARED, BETTER, REAP]), help="separated by semicolons")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--windows", type=int, default=128, help="windows of the evaluation text")
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    args.ratios = [float(ratio) for ratio in args.ratios.split(",")]
    args.rows = args.rows.split(";")
    if unknown := [name for name in args.rows if name not in (*RECIPES, SHARED, BETTER, REAP)]:
        parser.error(f"unknown rows {', '.join(unknown)}")
    args.work.mkdir(parents=True, exist_ok=True)
    ids = evaluation_tokens(args.eval, open_config(args.model).load_tokenizer())
    ids_NT = ids[: args.windows * args.seqlen].view(-1, args.seqlen)
    model: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    dense = Watched(model, ids_NT)
    print(f"{model.num_parameters():,} parameters, perplexity {dense.losses_N.mean().exp().item():.2f}", flush=True)
    found: list[dict[str, Any]] = []
    settings = {key: getattr(args, key) for key in SETTINGS} | {"versions": [__version__, torch.__version__]}
    for row in rows(args, ids_NT, dense):
        found.append(row)
        print(json.dumps(row), flush=True)
        if args.page is not None:
            args.page.write_text(page(found, dense, args, model.num_parameters()), encoding="utf-8")
        args.json.write_text(json.dumps({"benchmark": "mixture", **settings, "rows": found}, indent=1) + "\n")
    print(markdown(found, dense))


if __name__ == "__main__":
    main()
