"""Compress a model on disk by 20 % without a network, load the result and let it write.

python examples/compress.py MODEL_FOLDER OUT
"""

import sys

from transformers import AutoTokenizer

import svdllm


def main(model_path: str, output_dir: str) -> None:
    recipe = svdllm.Recipe(ratio=0.2, calibration="python-docs", samples=64, seqlen=512)
    result = svdllm.compress(model_path, recipe, output_dir, offline=True)
    print(f"{result.plan.dense_params:,} -> {result.plan.params:,} parameters in {result.output_dir}")

    model, tokenizer = result.load(), AutoTokenizer.from_pretrained(output_dir)
    inputs = tokenizer("A list in Python is", return_tensors="pt")
    print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20, do_sample=False)[0]))


if __name__ == "__main__":
    main(*sys.argv[1:])
