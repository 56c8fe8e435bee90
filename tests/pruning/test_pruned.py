"""Pruned checkpoints of several families by every method: equal at ratio 0, as small as said, loaded as any other."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from families import tiny_model, tiny_tokens
from runs import TEXT, token_windows
from svdllm import (
    CheckpointError,
    InputError,
    Pruning,
    ResourceError,
    UnsupportedModelError,
    export_dense,
    load_model,
    prune,
    recover,
    verify,
)
from svdllm.checkpoint.report import read_report
from svdllm.pruning.methods import METHODS
from svdllm.recovery import make_recovery

ALL = {"flap", "llm-pruner", "slicegpt", "blockpruner"}
# The methods that can prune a family.
CAN = {
    "llama": ALL,
    "qwen2": ALL,
    "qwen3": ALL,
    "gpt2": ALL,
    "opt": ALL - {"blockpruner"},
    "gpt_neox": ALL - {"slicegpt"},
    "stablelm": ALL,
    "gemma3_text": ALL - {"slicegpt"},
    "phi3": ALL,
}
LAYERS = {"num_hidden_layers": 3}
CASES = [(family, method) for family, methods in CAN.items() for method in sorted(methods)]


def settings(method: str, ratio: float) -> Pruning:
    return Pruning(pruning=method, ratio=ratio, samples=8, seqlen=16, batch_tokens=32)


def pruned(family: str, method: str, ratio: float, folder: Path, **overrides: Any) -> tuple[Any, Any, Any]:
    """The dense model, the pruned one and the result."""
    dense = tiny_model(family, **overrides)
    result = prune(dense, settings(method, ratio), folder, calibration=token_windows())
    return dense, load_model(folder), result


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("method", sorted(ALL))
def test_ratio_0_is_the_dense_model(method: str, tmp_path: Path) -> None:
    dense, model, result = pruned("llama", method, 0.0, tmp_path / "out")
    assert torch.equal(logits(model, tiny_tokens()), logits(dense, tiny_tokens()))
    assert result.sizes.params == result.sizes.dense_params


@pytest.mark.parametrize(("family", "method"), CASES)
def test_a_pruned_model_is_as_small_as_said_and_writes_as_it_reads(family: str, method: str, tmp_path: Path) -> None:
    dense, model, result = pruned(family, method, 0.25, tmp_path / "out")
    sizes = result.sizes
    assert sizes.achieved_ratio >= 0.25
    assert sizes.params == model.num_parameters() < sizes.dense_params == dense.num_parameters()
    assert sizes.file_bytes == sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert verify(tmp_path / "out")[-1][0] == "logits"
    ids = tiny_tokens()
    expected = logits(model, ids)
    assert not torch.allclose(expected, logits(dense, ids))
    steps, cache = [], None
    with torch.no_grad():
        for part in ids.split([5, 1, 3, 3], dim=1):  # a prompt, a token, and several at once
            output = model(input_ids=part, past_key_values=cache, use_cache=True)
            steps, cache = [*steps, output.logits], output.past_key_values
    torch.testing.assert_close(torch.cat(steps, dim=1), expected, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load_model(tmp_path / "again"), ids), expected)


@pytest.mark.parametrize(("family", "method"), [*(("llama", method) for method in sorted(ALL)), ("opt", "slicegpt")])
def test_a_checkpoint_loads_without_the_library(family: str, method: str, tmp_path: Path) -> None:
    _, model, _ = pruned(family, method, 0.25, tmp_path / "out")
    name = json.loads((tmp_path / "out/config.json").read_text())["auto_map"]["AutoModelForCausalLM"]
    shipped = get_class_from_dynamic_module(name, str(tmp_path / "out"))
    assert shipped.__module__.startswith("transformers_modules")
    loaded = shipped.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(loaded, tiny_tokens()), logits(model, tiny_tokens()))


def test_a_report_tells_what_is_left(tmp_path: Path) -> None:
    pruned("llama", "flap", 0.3, tmp_path / "out")
    report = read_report(tmp_path / "out")
    kept = report["pruning"]["kept"]
    totals = {"self_attn": 2, "mlp": 48}
    assert kept
    assert all(number < total == totals[name.split(".")[3]] for name, (number, total) in kept.items())
    rows = {row["name"]: row for row in report["linears"]}
    for name, (number, _) in kept.items():
        if "mlp" in name:
            assert rows[f"{name.split('.mlp')[0]}.mlp.down_proj"]["size"] == number
    assert "flap" in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize(
    ("method", "ratio", "text"),
    [
        ("flap", 0.99, "would remove every head or inner feature of a layer"),
        ("llm-pruner", 0.99, "would remove every head or inner feature of a layer"),
        ("blockpruner", 0.99, "would remove every attention and MLP"),
        ("slicegpt", 0.99, "would leave no feature of the residual"),
    ],
)
def test_a_ratio_that_leaves_nothing_is_refused(method: str, ratio: float, text: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=text):
        prune(tiny_model("llama"), settings(method, ratio), tmp_path / "out", calibration=token_windows())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("family", "method", "text"),
    [
        ("gpt_neox", "slicegpt", "post_attention_layernorm does not read the residual, as where branches are parallel"),
        (
            "olmo2",
            "slicegpt",
            "self_attn .* is not a norm by the root mean square or LayerNorm",
        ),  # norms behind branches
        ("cohere", "slicegpt", "expected norm, attention, norm, MLP"),  # parallel branches
        ("bloom", "slicegpt", "word_embeddings_layernorm|ln_f"),
        ("gemma3_text", "slicegpt", "expected norm, attention, norm, MLP"),
        ("bloom", "blockpruner", "does not return what it is given"),
        ("gemma4_text", "blockpruner", "hand values to later blocks"),
        ("mamba", "flap", "neither heads nor inner features"),
    ],
)
def test_what_cannot_be_pruned_says_why(family: str, method: str, text: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=text):
        prune(tiny_model(family), settings(method, 0.2), tmp_path / "out", calibration=token_windows())
    assert not list(tmp_path.iterdir())


def test_a_run_without_memory_keeps_nothing_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*_: Any) -> Any:
        raise MemoryError("no room")

    monkeypatch.setitem(METHODS, "flap", replace(METHODS["flap"], prune=out_of_memory))
    with pytest.raises(ResourceError, match=r"Nothing is kept, .* Lower --batch-tokens \(now 32\)"):
        prune(tiny_model("llama"), settings("flap", 0.2), tmp_path / "out", calibration=token_windows())
    assert not list(tmp_path.iterdir())


def test_fewer_heads_become_a_plain_model_filled_up_with_zeros(tmp_path: Path) -> None:
    _, model, _ = pruned("llama", "llm-pruner", 0.4, tmp_path / "out")
    assert model.model.layers[1].self_attn.o_proj.in_features == 16
    export_dense(tmp_path / "out", tmp_path / "plain")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert type(plain) is LlamaForCausalLM
    torch.testing.assert_close(logits(plain, tiny_tokens()), logits(model, tiny_tokens()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "method", "text"),
    [
        ("llama", "blockpruner", "no place for what pruning changed .dropped"),
        ("llama", "slicegpt", "no place for what pruning changed .embedding_widths, norms"),
        ("gpt2", "llm-pruner", "no place for what pruning changed .counts"),
        ("llama", "flap", "no place for .* biases"),
    ],
)
def test_what_no_plain_model_can_hold_is_refused(family: str, method: str, text: str, tmp_path: Path) -> None:
    pruned(family, method, 0.4, tmp_path / "out")
    with pytest.raises(UnsupportedModelError, match=text):
        export_dense(tmp_path / "out", tmp_path / "plain")
    assert not (tmp_path / "plain").exists()


def test_hidden_states_of_a_sliced_model_are_not_compared_with_the_teachers(tmp_path: Path) -> None:
    dense, _, _ = pruned("llama", "slicegpt", 0.25, tmp_path / "out")
    dense.save_pretrained(tmp_path / "dense")
    (tmp_path / "text.txt").write_text(TEXT)
    settings = make_recovery(
        {
            "methods": ("blockwise",),
            "data": str(tmp_path / "text.txt"),
            "teacher": str(tmp_path / "dense"),
            "seqlen": 16,
        }
    )
    with pytest.raises(InputError, match="its residual was sliced"):
        recover(tmp_path / "out", tmp_path / "trained", settings)


def test_a_damaged_entry_of_a_pruned_model_is_told(tmp_path: Path) -> None:
    pruned("llama", "blockpruner", 0.25, tmp_path / "out")
    file = tmp_path / "out/config.json"
    config = json.loads(file.read_text())
    for key, value, text in (
        ("dropped", {"model.layers.0.mlp": -1}, "numbers of outputs"),
        ("counts", {"model.layers.0.self_attn.num_heads": 0}, "positive integers"),
        ("norms", {"model.norm": {"width": 4}}, "objects with width"),
        ("embedding_widths", [], "a mapping from names"),
        ("dropped", {"model.layers.7.mlp": 0}, "not in the model: model.layers.7.mlp"),
    ):
        config["svdllm"] |= {key: value}
        file.write_text(json.dumps(config))
        with pytest.raises((UnsupportedModelError, CheckpointError), match=text):
            load_model(tmp_path / "out")
        del config["svdllm"][key]


def test_an_unknown_method_is_told_with_the_known_ones() -> None:
    from svdllm.pruning.settings import make_pruning

    with pytest.raises(InputError, match="known are flap"):
        make_pruning({"pruning": "flab"})
    assert set(METHODS) == ALL
