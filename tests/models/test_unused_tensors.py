"""Tensors that a model's files hold and its config does not ask for are counted, named and told of."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import svdllm
from families import FAMILIES, tiny_model
from gguf_local import write_gguf
from runs import TEXT, run, save_dense, small_recipe
from svdllm import UnusedTensorsWarning
from svdllm.cli import main
from svdllm.models.open import open_config, open_source
from svdllm.models.unused_tensors import UnusedTensors, grouped_names

BIASES = [f"model.layers.0-1.self_attn.{name}_proj.bias" for name in "kqvo"]


def edit_config(folder: Path, **entries: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | entries))


def add_tensors(folder: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    tensors = load_file(folder / "model.safetensors") | {name: torch.ones(shape) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def biased(tmp_path: Path, tokenizer: Any) -> Path:
    """Biases in the files of a model whose config says that it has none."""
    folder = save_dense(tmp_path / "biased", tokenizer=tokenizer, attention_bias=True)
    edit_config(folder, attention_bias=False)
    return folder


def unused_of(folder: Path, use: Callable[[Path], Any] = open_source) -> UnusedTensors:
    """What is unused, which must be warned of."""
    with pytest.warns(UnusedTensorsWarning):
        use(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = open_source(folder).unused
    assert found is not None
    return found


def test_biases_that_the_config_does_not_ask_for(biased: Path) -> None:
    unused = unused_of(biased)
    assert (unused.tensors, unused.params, unused.ignored) == (8, 2 * (32 + 16 + 16 + 32), 0)
    assert sorted(unused.names) == sorted(BIASES)


def test_a_layer_that_the_config_does_not_ask_for(tmp_path: Path) -> None:
    folder = save_dense(tmp_path / "deep", num_hidden_layers=4)
    edit_config(folder, num_hidden_layers=2)
    unused = unused_of(folder)
    per_layer = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32 + 2 * 32
    assert (unused.tensors, unused.params) == (18, 2 * per_layer)
    assert unused.names == ["model.layers.2-3.*"]


def test_the_same_is_told_of_a_loaded_model(biased: Path) -> None:
    said = []
    for use in (open_source, open_config, svdllm.load_model):
        with pytest.warns(UnusedTensorsWarning) as caught:
            use(biased)
        said.append(str(caught[0].message))
    assert len(set(said)) == 1
    assert said[0].startswith("biased has 8 unused tensors of 192 parameters (model.layers.0-1.self_attn.")
    assert "transformers leaves them out as well. If the model needs them, correct its config.json" in said[0]
    _, info = AutoModelForCausalLM.from_pretrained(biased, output_loading_info=True)
    assert len(info["unexpected_keys"]) == 8


def test_plan_and_report_count_and_name_them(biased: Path, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnusedTensorsWarning)
        (planned,) = svdllm.plan(biased, small_recipe())
        result = run(biased, tmp_path / "out", recipe=small_recipe(elastic=True))
    expected = {"tensors": 8, "params": 192, "ignored": 0}
    reports = [
        planned.to_dict(),
        result.to_dict(),
        json.loads((tmp_path / "out" / "svdllm" / "report.json").read_text()),
    ]
    svdllm.slice_checkpoint(tmp_path / "out", 0.6, tmp_path / "slice")
    reports.append(json.loads((tmp_path / "slice" / "svdllm" / "report.json").read_text()))
    for report in reports:
        names = report["unused_tensors"].pop("names")
        assert sorted(names) == sorted(BIASES)
        assert report["unused_tensors"] == expected
    assert svdllm.load_model(tmp_path / "out").num_parameters() == planned.params


def test_nothing_is_said_where_all_is_used(dense: Path, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnusedTensorsWarning)
        svdllm.load_model(dense)
        result = run(dense, tmp_path / "out")
        result.load()
    assert result.plan.unused_tensors is None
    assert json.loads((tmp_path / "out" / "svdllm" / "report.json").read_text())["unused_tensors"] is None


MIXTURES = {
    "mixtral": {"num_local_experts": 2, "num_key_value_heads": 2},
    "qwen3_moe": {"num_experts": 2, "num_key_value_heads": 2, "moe_intermediate_size": 16, "head_dim": 8},
}


@pytest.mark.parametrize("family", [*FAMILIES, *MIXTURES])
def test_every_family_uses_what_it_saves(family: str, tmp_path: Path) -> None:
    """Also where transformers renames, stacks or splits what the files hold."""
    if family in FAMILIES:
        model = tiny_model(family)
    else:
        common = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = CONFIG_MAPPING[family](**common, intermediate_size=48, **MIXTURES[family])
        model: Any = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnusedTensorsWarning)
        svdllm.load_model(tmp_path)
    add_tensors(tmp_path, {"extra.weight": (3, 2)})
    with pytest.warns(UnusedTensorsWarning, match=r"has 1 unused tensor of 6 parameters \(extra\.\*\), which"):
        svdllm.load_model(tmp_path)


def test_tables_that_models_compute_now_are_no_loss(tmp_path: Path) -> None:
    folder = tmp_path / "gpt2"
    tiny_model("gpt2").save_pretrained(folder)
    add_tensors(folder, {f"transformer.h.{n}.attn.bias": (1, 1, 64, 64) for n in range(2)})
    save_dense(tmp_path / "llama")
    add_tensors(tmp_path / "llama", {"model.layers.0.self_attn.rotary_emb.inv_freq": (4,)})
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnusedTensorsWarning)
        assert open_source(folder).unused is None
        assert open_source(tmp_path / "llama").unused is None
        svdllm.load_model(folder)


def test_layers_for_drafting_are_counted_though_transformers_ignores_them(tmp_path: Path) -> None:
    """They are weights, and lost; but nothing is wrong with the config."""
    config = CONFIG_MAPPING["ernie4_5_moe"](
        vocab_size=128,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        moe_intermediate_size=16,
        moe_num_experts=2,
        moe_k=1,
    )
    model: Any = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    shapes = {"model.mtp_block.0.self_attn.q_proj.weight": (32, 32), "model.mtp_block.0.norm.weight": (32,)}
    add_tensors(tmp_path, shapes)
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["unexpected_keys"]
    with pytest.warns(UnusedTensorsWarning) as caught:
        svdllm.load_model(tmp_path)
    said = str(caught[0].message)
    assert "2 unused tensors of 1,056 parameters (model.mtp_block.*)" in said
    assert said.endswith(" They are left out; transformers ignores them on purpose.")


def test_a_model_in_memory_with_more_than_a_language_model(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.value_head = torch.nn.Linear(32, 1)
    with pytest.warns(
        UnusedTensorsWarning, match=r"LlamaForCausalLM has 2 unused tensors of 33 parameters \(value_head\.\*\)"
    ):
        result = run(model, tmp_path / "out")
    assert result.plan.unused_tensors is not None
    assert result.load().num_parameters() == result.plan.params


def test_gguf_tensors_that_transformers_passes_over(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "more.gguf", more={"blk.2.attn_q.weight": (32, 32), "rope_freqs.weight": (4,)})
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    for use in (open_config, svdllm.load_model, lambda path: svdllm.plan(path, small_recipe())):
        with pytest.warns(UnusedTensorsWarning) as caught:
            use(path)
        assert "more.gguf has 2 unused tensors of 1,028 parameters (blk.2.*, rope_freqs.*)" in str(caught[0].message)
    result = svdllm.compress(path, small_recipe(calibration=str(text)), tmp_path / "out")
    assert result.plan.unused_tensors == UnusedTensors(
        tensors=2, params=1028, ignored=0, names=["blk.2.*", "rope_freqs.*"]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnusedTensorsWarning)
        assert open_config(write_gguf(tmp_path / "whole.gguf")).unused is None


COMMANDS = {
    "plan": ("--ratio", "0.3", "--seqlen", "16"),
    "eval": ("--ppl", "TEXT", "--seqlen", "16"),
    "compress": (
        "-o",
        "OUT",
        "--ratio",
        "0.3",
        "--seqlen",
        "16",
        "--samples",
        "8",
        "--preset",
        "paper",
        "--calib",
        "TEXT",
    ),
    "quantize": ("-o", "OUT"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_command_line_says_it_once(
    command: str, biased: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    places = {"TEXT": str(tmp_path / "text.txt"), "OUT": str(tmp_path / "out")}
    with pytest.raises(SystemExit) as ended:
        main([command, str(biased), *(places.get(argument, argument) for argument in COMMANDS[command])])
    assert ended.value.code == 0
    printed = capsys.readouterr()
    said = " ".join(printed.err.split())
    assert said.count("Warning: biased has 8 unused tensors of 192 parameters") == 1
    assert "UnusedTensorsWarning" not in said
    if command == "plan":
        assert "its files hold 8 unused tensors of 192 parameters (model.layers.0-1.self" in " ".join(
            printed.out.split()
        )


def test_inspect_shows_them(biased: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.warns(UnusedTensorsWarning):
        run(biased, tmp_path / "out")
    with pytest.raises(SystemExit):
        main(["inspect", str(tmp_path / "out")])
    assert "source files hold 8 unused tensors of 192 parameters" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("names", "others", "expected"),
    [
        (
            ["h.0.a.bias", "h.1.a.bias", "h.3.a.bias"],
            ["h.0.a.weight", "h.1.a.weight", "h.3.a.weight"],
            ["h.0-1,3.a.bias"],
        ),
        (["h.2.a.weight", "h.2.b.weight"], ["h.0.a.weight"], ["h.2.*"]),
        (["mtp.0.a.weight", "mtp.1.a.weight", "x"], ["h.0.a.weight"], ["mtp.*", "x"]),
        (["h.0.e.0.b", "h.0.e.1.b", "h.1.e.0.b"], ["h.0.e.0.w", "h.0.e.1.w", "h.1.e.0.w"], ["h.0-1.e.0-1.b"]),
        (["h.0.{x}.bias", "h.²"], ["h.0.{x}.weight"], ["h.0.{x}.bias", "h.²"]),
    ],
)
def test_names_alike_are_said_as_one(names: list[str], others: list[str], expected: list[str]) -> None:
    assert grouped_names(names, others) == expected


def test_many_names_are_cut_in_what_people_read(tmp_path: Path) -> None:
    folder = shutil.copytree(save_dense(tmp_path / "tiny"), tmp_path / "many")
    add_tensors(folder, {f"extra_{letter}.weight": (1,) for letter in "abcdefghij"})
    with pytest.warns(UnusedTensorsWarning, match=r"extra_e\.\*, extra_f\.\* and 4 more\)"):
        unused = open_source(folder).unused
    assert unused is not None
    assert len(unused.names) == 10
