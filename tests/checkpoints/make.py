"""Makes the checkpoints that later versions must still read: ``python tests/checkpoints/make.py FOLDER``.

The folders beside this file were made with svdllm 0.1, format version 1. They are not made anew when the code changes:
what they hold is what users have on their disks.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from runs import TEXT, run, save_dense, small_recipe
from svdllm import quantize, recover
from svdllm.recovery import make_recovery
from tokenizers_local import byte_tokenizer


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    folder = folder.absolute()
    work = folder / "work"
    work.mkdir(parents=True)
    os.chdir(work)  # no path of this machine is in what is written
    text = Path("text.txt")
    text.write_text(TEXT)
    dense = save_dense(Path("dense"), tokenizer=byte_tokenizer(), tie_word_embeddings=True)
    # Ranks by an allocation, biases corrected: a bias where the dense model has none.
    run(dense, folder / "bias-corrected", recipe=small_recipe(allocation="effective-rank", bias_correction=True))
    # Every smaller size in it, and one first factor for keys and values.
    run(dense, folder / "elastic-joint-kv", recipe=small_recipe(elastic=True, joint_kv=True, ratio=0.2))
    # Trained by LoRA, then quantised.
    settings = {"methods": ("sequential-lora",), "data": str(text), "seqlen": 16, "batch": 4, "steps": 2, "r": 2}
    recover(run(dense, Path("pairs")).output_dir, Path("trained"), make_recovery(settings))
    quantize(Path("trained"), folder / "trained-quantized", bits=8, format="torchao")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
