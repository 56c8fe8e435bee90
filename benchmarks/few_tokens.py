"""How much of its group's statistics an expert should take: held-out loss of a mixture by ``GROUP_TOKENS``.

Each value is tried with few and many calibration windows: an expert of few tokens needs the other experts' most. All
experts get pairs of one ratio in the two-sided metric, attention stays dense.

    python benchmarks/few_tokens.py FOLDER --calib FILE --eval FILE --work DIR
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from mixture import TWO_SIDED, Watched, calibration
from svdllm import Recipe, compress, load_model
from svdllm.compression import few_tokens
from svdllm.compression.recipe import PLAIN
from svdllm.data import evaluation_tokens
from svdllm.models.open import open_config


def measured(args: argparse.Namespace, ids_NT: torch.Tensor, dense: Watched, samples: int, value: float) -> Any:
    """The model that one value makes of so many windows, beside the dense one."""
    few_tokens.GROUP_TOKENS = value
    args.samples = samples
    form = {"forms": ("packed",), "gradient_samples": samples}
    recipe = Recipe(**{**PLAIN, **TWO_SIDED, **form, **calibration(args)}, ratio=args.ratio)
    shutil.rmtree(args.work / "model", ignore_errors=True)
    made = compress(args.model, recipe, args.work / "model", resume=False)
    tokens = json.loads((made.output_dir / "svdllm/report.json").read_text())["experts"]
    found = Watched(load_model(args.work / "model", dtype=torch.float32).eval(), ids_NT).beside(dense)
    return {"samples": samples, "group_tokens": value, "least": tokens["least"], "median": tokens["median"], **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a mixture, as mixture_training.py writes it")
    parser.add_argument("--calib", required=True, help="calibration text")
    parser.add_argument("--eval", required=True, help="held-out text")
    parser.add_argument("--work", required=True, type=Path, help="folder for compressed models")
    parser.add_argument("--values", default="0.001,0.03125,0.125,0.5,2", help="of GROUP_TOKENS")
    parser.add_argument("--windows-of-calibration", default="2,8,32")
    parser.add_argument("--ratio", type=float, default=0.3)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--windows", type=int, default=64, help="windows of the held-out text")
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    ids = evaluation_tokens(args.eval, open_config(args.model).load_tokenizer())
    ids_NT = ids[: args.windows * args.seqlen].view(-1, args.seqlen)
    dense = Watched(AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval(), ids_NT)
    for samples in map(int, args.windows_of_calibration.split(",")):
        for value in map(float, args.values.split(",")):
            print(json.dumps(measured(args, ids_NT, dense, samples, value)), flush=True)


if __name__ == "__main__":
    main()
