"""Padded heads: the model computes the same, processes can share its heads, and nothing else is taken for heads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import svdllm
from families import low_rank_model, tiny_config, tiny_model, tiny_tokens
from runs import run, save_dense, small_recipe
from svdllm import export_padded
from svdllm.cli import main
from svdllm.common.errors import CheckpointError, InputError, UnsupportedModelError
from svdllm.export import padded_heads as padding
from svdllm.export.padded_heads import Heads
from svdllm.models.low_rank import compare_hashes

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma3_text", "smollm3", "cohere", "glm", "hunyuan_v1_dense"]


def save_low_rank(folder: Path, family: str = "llama", **settings: Any) -> Path:
    """Pairs of factors of which every bias and norm is random, too."""
    model = low_rank_model(family, **settings)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return folder


def logits_of(folder: Path) -> Tensor:
    with torch.no_grad():
        return svdllm.load_model(folder, dtype=torch.float64)(input_ids=tiny_tokens(2, 20)).logits


def continued(folder: Path) -> list[list[int]]:
    ids = tiny_tokens(2, 5)
    made = svdllm.load_model(folder).generate(ids, do_sample=False, max_new_tokens=12, eos_token_id=None)
    return made.tolist()


@pytest.mark.parametrize(
    ("heads", "processes", "expected"),
    [((9, 3), 2, (12, 4)), ((15, 5), 3, (18, 6)), ((14, 2), 4, (28, 4)), ((7, 7), 2, (8, 8)), ((32, 8), 4, (32, 8))],
)
def test_heads_by_hand(heads: tuple[int, int], processes: int, expected: tuple[int, int]) -> None:
    assert Heads(*heads, 64).for_processes(processes) == (*expected, 64)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_padded_model_computes_the_same(family: str, tmp_path: Path) -> None:
    """Four heads in two groups become six in three. The queries of one layer and the values of the other are dense."""
    small = save_low_rank(tmp_path / "small", family, dense=("0.self_attn.q_proj", "1.self_attn.v_proj"))
    made = export_padded(small, tmp_path / "out", 3)
    assert made.difference < 1e-5
    torch.testing.assert_close(logits_of(tmp_path / "out"), logits_of(small), rtol=1e-10, atol=1e-10)
    assert continued(tmp_path / "out") == continued(small)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (6, 3)
    assert config["head_dim"] == made.before.width == made.after.width


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_new_rows_and_columns_are_zero_and_the_old_ones_as_they_were(family: str, tmp_path: Path) -> None:
    small = save_low_rank(tmp_path / "small", family, dense=("0.self_attn.o_proj", "1.self_attn.k_proj"))
    export_padded(small, tmp_path / "out", 3)
    before, after = (svdllm.load_model(folder).state_dict() for folder in (small, tmp_path / "out"))
    grown = set()
    for name, old in before.items():
        new = after[name]
        assert torch.equal(new[tuple(map(slice, old.shape))], old), name
        assert new.count_nonzero() == old.count_nonzero(), name
        if new.shape != old.shape:
            grown.add(name.split("self_attn.")[1])
            assert len(new) - len(old) in (0, 16, 8), name  # two heads of queries or one of keys and values, 8 wide
    weights = {f"{p}_proj.svd_u.weight" for p in "qkv"} | {"k_proj.weight", "o_proj.weight", "o_proj.svd_v.weight"}
    biases = {f"{p}_proj.svd_u.bias" for p in "qkv"} | {"k_proj.bias"}
    assert grown == (weights | biases if family == "qwen2" else weights)


def test_nine_heads_in_groups_of_three(tmp_path: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """The shape of SmolLM2-135M, by the command. The result loads with and without the library, and saves again."""
    heads = {"hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3, "num_hidden_layers": 1}
    dense = save_dense(tmp_path / "dense", tokenizer=tokenizer, **heads)
    small, out = tmp_path / "small", tmp_path / "out"
    run(str(dense), small, recipe=small_recipe(ignore=["v_proj"]))
    with pytest.raises(SystemExit) as done:
        main(["export", str(small), "-o", str(out), "--format", "padded", "--tensor-parallel", "2", "--json"])
    assert done.value.code == 0
    document = json.loads(capsys.readouterr().out)
    assert document["before"] == {"all": 9, "kv": 3, "width": 8}
    assert document["after"] == {"all": 12, "kv": 4, "width": 8}
    assert document["largest_difference"] < 1e-5
    expected = logits_of(small)
    torch.testing.assert_close(logits_of(out), expected, rtol=1e-10, atol=1e-10)
    alone = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, dtype=torch.float64)
    torch.testing.assert_close(alone(input_ids=tiny_tokens(2, 20)).logits, expected, rtol=1e-10, atol=1e-10)
    svdllm.load_model(out).save_pretrained(tmp_path / "again")
    torch.testing.assert_close(logits_of(tmp_path / "again"), expected, rtol=1e-10, atol=1e-10)
    assert compare_hashes(out) == []
    assert (out / "tokenizer.json").read_bytes() == (small / "tokenizer.json").read_bytes()


def test_a_dense_model_is_padded_too(tmp_path: Path) -> None:
    """A config without a width, in which it follows from the number of heads, gets one."""
    tiny_model("qwen2", num_key_value_heads=4).save_pretrained(tmp_path / "dense")
    assert "head_dim" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    made = export_padded(tmp_path / "dense", tmp_path / "out", 3)
    assert (made.before, made.after) == ((4, 4, 8), (6, 6, 8))
    torch.testing.assert_close(logits_of(tmp_path / "out"), logits_of(tmp_path / "dense"), rtol=1e-10, atol=1e-10)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]


OTHER_FAMILIES: dict[str, Any] = {
    "opt": (3, {}, "embed_dim must be divisible"),
    "gpt2": (3, {}, "`embed_dim` must be divisible"),
    "gpt_neox": (3, {}, "The hidden size is not divisible"),
    "stablelm": (4, {}, "it computes the width of a head from the number of heads"),
    "falcon": (3, {}, "it computes the width of a head from the number of heads"),
    "phi3": (3, {}, r"qkv_proj.weight \(Linear\) would grow from \(64, 32\) to \(96, 32\)"),
    "olmo2": (3, {}, r"q_norm.weight \(Olmo2RMSNorm\) would grow from \(32,\) to \(48,\)"),
    "cohere": (3, {"use_qk_norm": True}, r"q_norm.weight \(CohereLayerNorm\) would grow from \(4, 8\) to \(6, 8\)"),
}


@pytest.mark.parametrize("family", OTHER_FAMILIES)
def test_what_is_not_understood_is_refused(family: str, tmp_path: Path) -> None:
    """By the config alone: nothing is read or written."""
    processes, settings, message = OTHER_FAMILIES[family]
    tiny_config(family, **settings).save_pretrained(tmp_path / "model")
    with pytest.raises(UnsupportedModelError, match=f"of type {family} cannot be padded with heads: .*{message}"):
        export_padded(tmp_path / "model", tmp_path / "out", processes)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_attention_sinks_are_refused(tmp_path: Path) -> None:
    from transformers import GptOssConfig

    shape = {"hidden_size": 32, "head_dim": 8, "num_attention_heads": 4, "num_key_value_heads": 2}
    GptOssConfig(**shape, num_hidden_layers=2, num_local_experts=2, intermediate_size=48).save_pretrained(
        tmp_path / "m"
    )
    with pytest.raises(UnsupportedModelError, match=r"sinks \(GptOssAttention\) would grow from \(4,\) to \(6,\)"):
        export_padded(tmp_path / "m", tmp_path / "out", 3)


def test_other_widths_have_to_be_divisible(tmp_path: Path) -> None:
    save_low_rank(tmp_path / "small", intermediate_size=50, dense=("down_proj",))
    message = "3 processes cannot share the 50 outputs of model.layers.0.mlp.gate_proj.svd_u evenly, and only heads"
    with pytest.raises(UnsupportedModelError, match=message):
        export_padded(tmp_path / "small", tmp_path / "out", 3)
    export_padded(tmp_path / "small", tmp_path / "out", 5)


def test_a_model_that_computes_something_else_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads that are not zero: what a family with another meaning of a head would amount to."""
    small = save_low_rank(tmp_path / "small")
    monkeypatch.setattr(Tensor, "new_zeros", Tensor.new_ones)
    with pytest.raises(UnsupportedModelError, match=r"with them, the logits differ by .* of the largest"):
        export_padded(small, tmp_path / "out", 3)
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


def test_mistakes_are_found_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = save_low_rank(tmp_path / "small")
    monkeypatch.setattr(padding, "write_model", None)  # nothing is written
    for message, folder, output, processes in (
        ("2 processes can share the 4 heads .* evenly; there is nothing to pad", small, "out", 2),
        ("for two processes or more, found 1", small, "out", 1),
        (r"has no config\.json", tmp_path, "out", 3),
        ("nothing is overwritten", small, "small", 3),
    ):
        with pytest.raises(InputError, match=message):
            export_padded(folder, tmp_path / output, processes)
    for options in (["--format", "padded"], ["--tensor-parallel", "2"]):
        with pytest.raises(SystemExit) as done:
            main(["export", str(small), "-o", str(tmp_path / "out"), *options])
        assert done.value.code == 2
        assert "--tensor-parallel and --format padded go together" in " ".join(capsys.readouterr().err.split())
    file = small / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(CheckpointError, match=r"is not as it was written: model\.safetensors"):
        export_padded(small, tmp_path / "out", 3)
