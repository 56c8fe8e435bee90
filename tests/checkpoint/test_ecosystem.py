"""A checkpoint in the hands of other tools."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, pipeline

import svdllm
from runs import TEXT, digests, save_dense, small_recipe, token_windows

TASK = """
task: tiny_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: word_perplexity
"""
# The command as it is, but for the half minute in which it reads the definitions of all its own tasks.
LM_EVAL = """
import functools
from lm_eval.__main__ import cli_evaluate
from lm_eval.tasks import TaskManager
TaskManager.__init__ = functools.partialmethod(TaskManager.__init__, include_defaults=False)
cli_evaluate()
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("ecosystem")
    dense = save_dense(folder / "dense", tokenizer=tokenizer)
    GenerationConfig(temperature=0.3, do_sample=True, max_length=40).save_pretrained(dense)
    (dense / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    (folder / "text.txt").write_text(TEXT)
    recipe = small_recipe(calibration=str(folder / "text.txt"), ignore=["o_proj"])  # partly factorised
    svdllm.compress(dense, recipe, folder / "out")
    return folder / "out"


def test_companions_are_byte_copies(checkpoint: Path) -> None:
    dense, out = digests(checkpoint.parent / "dense"), digests(checkpoint)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        assert out[name] == dense[name]


def test_saving_a_loaded_model_writes_the_same_files(checkpoint: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(checkpoint).save_pretrained(tmp_path / "again")
    ours, again = digests(checkpoint), digests(tmp_path / "again")
    assert {"config.json", "model.safetensors", "modeling_svdllm_llama.py", "configuration_svdllm_llama.py"} <= set(
        again
    )
    for name in set(again) - {"svdllm/hashes.json"}:
        assert again[name] == ours[name], name
    assert svdllm.load_model(tmp_path / "again").num_parameters() > 0


def test_rope_theta_for_older_readers(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 5e5


def test_device_map_dtype_generate_pipeline(checkpoint: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, device_map="auto", dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    model, ids = AutoModelForCausalLM.from_pretrained(checkpoint), token_windows(1)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    dynamic = model.generate(ids, **options)
    static = model.generate(ids, cache_implementation="static", disable_compile=True, **options)
    assert torch.equal(dynamic, static)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    spoken = pipeline("text-generation", model=str(checkpoint), tokenizer=tokenizer)("the fox", max_new_tokens=3)
    assert spoken[0]["generated_text"].startswith("the fox")


def test_torch_compile(checkpoint: Path) -> None:
    model, ids = AutoModelForCausalLM.from_pretrained(checkpoint), token_windows(2)
    backend = "inductor" if shutil.which("g++") else "aot_eager"  # traced whole in either case
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        torch.testing.assert_close(compiled(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-5)


def test_lm_eval_command_line_without_the_library(checkpoint: Path, tmp_path: Path) -> None:
    """The harness knows nothing of svdllm: it goes by the code files in the folder."""
    pytest.importorskip("lm_eval", reason="lm-eval is in the extra 'eval'")
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": TEXT[:400]}) + "\n")
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "tiny_text.yaml").write_text(TASK.format(file=tmp_path / "text.jsonl"))
    blocker = tmp_path / "site"
    blocker.mkdir()
    (blocker / "svdllm.py").write_text("raise ImportError('svdllm is not importable here')")
    command = [
        *(sys.executable, "-c", LM_EVAL, "run", "--model", "hf", "--tasks", "tiny_text"),
        *("--model_args", f"pretrained={checkpoint},trust_remote_code=True,max_length=64"),
        *("--include_path", str(tasks), "--device", "cpu", "--output_path", str(tmp_path / "results")),
    ]
    environment = os.environ | {
        "PYTHONPATH": str(blocker),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "cache"),
        "HF_DATASETS_CACHE": str(tmp_path / "datasets"),
    }
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    (results,) = (tmp_path / "results").rglob("results_*.json")
    measured = json.loads(results.read_text())["results"]["tiny_text"]["word_perplexity,none"]
    assert measured > 1
