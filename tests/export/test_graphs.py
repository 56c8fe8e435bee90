"""Graphs for other runtimes compute what the model does, at sizes that were not traced, or are not kept."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig

import svdllm
from families import tiny_model, tiny_tokens
from runs import run, save_dense, small_recipe
from svdllm.cli import main
from svdllm.common.errors import InputError, NumericalError, UnsupportedModelError
from svdllm.export import graphs
from svdllm.inference.cache_names import cache_name

GRAPHS = "transformers.exporters.runners"
OLD = "transformers before 5.23 has no graphs that can be saved and run"


def logits_of(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return svdllm.load_model(folder)(input_ids=ids).logits


def test_onnx_takes_a_prompt_and_what_follows(tmp_path: Path, tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip(GRAPHS, reason=OLD)
    onnxruntime = pytest.importorskip("onnxruntime")
    small, out = tmp_path / "small", tmp_path / "onnx"
    dense = save_dense(tmp_path / "dense", tokenizer=tokenizer, num_hidden_layers=1)
    run(str(dense), small, recipe=small_recipe(ignore=["o_proj"]))
    with pytest.raises(SystemExit) as done:
        main(["export", str(small), "-o", str(out), "--format", "onnx", "--json"])
    assert done.value.code == 0
    document = json.loads(capsys.readouterr().out)
    assert document["past_key_values"] is True
    assert 0 < document["largest_difference"] < 1e-5
    assert AutoConfig.from_pretrained(out).model_type == "llama"
    assert (out / "tokenizer.json").read_bytes() == (small / "tokenizer.json").read_bytes()

    session = onnxruntime.InferenceSession(out / "model.onnx", providers=["CPUExecutionProvider"])
    ids = tiny_tokens(1, 9)
    state = [entry.name for entry in session.get_inputs()[2:]]
    assert all(entry.startswith(f"input.{cache_name(tiny_model('llama'))}.layers.0.") for entry in state)
    assert [entry.name.replace("output.", "input.") for entry in session.get_outputs()[1:]] == state
    past = dict.fromkeys(state, np.zeros((1, 2, 0, 8), np.float32))
    found = []
    for begin, end in ((0, 6), (6, 7), (7, 9)):
        mask = np.ones((1, end), np.int64)
        logits, *after = session.run(None, {"input_ids": ids[:, begin:end].numpy(), "attention_mask": mask, **past})
        past = dict(zip(state, after, strict=True))
        found.append(torch.from_numpy(logits))
    torch.testing.assert_close(torch.cat(found, dim=1), logits_of(small, ids), rtol=1e-4, atol=1e-5)
    # The factors are in the graph, not their product.
    assert (out / "model.onnx.data").stat().st_size < 4 * svdllm.load_model(dense).num_parameters()


def test_openvino_of_a_model_with_sliding_windows(tmp_path: Path) -> None:
    pytest.importorskip(GRAPHS, reason=OLD)
    openvino = pytest.importorskip("openvino")
    run(tiny_model("gemma3_text"), tmp_path / "small")
    difference, has_past = graphs.export_graph(tmp_path / "small", tmp_path / "openvino", "openvino")
    assert difference < 1e-5
    assert not has_past
    precision = {"INFERENCE_PRECISION_HINT": "f32"}  # else bfloat16 where the processor has it
    graph = openvino.Core().compile_model(tmp_path / "openvino" / "openvino_model.xml", "CPU", precision)
    ids = tiny_tokens(1, 17)  # more than a window
    found = graph({"input_ids": ids.numpy(), "attention_mask": np.ones((1, 17), np.int64)})["logits"]
    torch.testing.assert_close(torch.from_numpy(found), logits_of(tmp_path / "small", ids), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 1.01])
def test_a_graph_that_differs_is_not_kept(scale: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tiny_model("llama"), tmp_path / "small")
    model = svdllm.load_model(tmp_path / "small")

    def graph(**inputs: Any) -> Any:
        output = model(**inputs)
        output.logits = output.logits * scale
        return output

    written = SimpleNamespace(save_pretrained=lambda folder: (folder / "model.onnx").touch())
    monkeypatch.setattr(graphs, "_traced", lambda model, past, format: written)
    monkeypatch.setattr(graphs, "_opened", lambda folder, format: graph)
    monkeypatch.setattr(graphs, "_check_packages", lambda format: None)
    if scale == 1.0:
        difference, _ = graphs.export_graph(tmp_path / "small", tmp_path / "out", "onnx")
        assert difference < 1e-6  # the pieces are put together as the model would be asked at once
        assert (tmp_path / "out" / "model.onnx").is_file()
        return
    with pytest.raises(NumericalError, match=r"is not kept: the logits differ by 1\.0e-02 of the largest"):
        graphs.export_graph(tmp_path / "small", tmp_path / "out", "onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


def test_what_is_missing_or_in_the_way_is_found_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    monkeypatch.setattr(graphs, "load_model", None)  # nothing is loaded
    with pytest.raises(InputError, match="no graph format 'tflite'; use onnx or openvino"):
        graphs.export_graph(tmp_path / "dense", tmp_path / "out", "tflite")
    with pytest.raises(InputError, match=r"has no config\.json"):
        graphs.export_graph(tmp_path, tmp_path / "out", "onnx")
    with pytest.raises(InputError, match="nothing is overwritten"):
        graphs.export_graph(tmp_path / "dense", tmp_path / "dense", "onnx")
    monkeypatch.setattr("svdllm.common.extras.importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        InputError, match=r"--format openvino needs the package 'openvino': pip install 'svdllm\[openvino\]"
    ):
        graphs.export_graph(tmp_path / "dense", tmp_path / "out", "openvino")


def test_biases_that_a_plain_model_has_no_place_for_are_not_dropped(tmp_path: Path) -> None:
    """Llama has none, GPT-2 has one for every linear."""
    ids = tiny_tokens()
    run(tiny_model("llama"), tmp_path / "llama", recipe=small_recipe(bias_correction=True))
    with pytest.raises(
        UnsupportedModelError, match=r"LlamaForCausalLM has no place for 14 biases .* model\.layers\.0\.mlp\.down"
    ):
        svdllm.export_dense(tmp_path / "llama", tmp_path / "dense")
    assert not (tmp_path / "dense").exists()
    run(tiny_model("gpt2"), tmp_path / "gpt2", recipe=small_recipe(bias_correction=True))
    svdllm.export_dense(tmp_path / "gpt2", tmp_path / "dense")
    found, wanted = (logits_of(tmp_path / name, ids) for name in ("dense", "gpt2"))
    torch.testing.assert_close(found, wanted)
