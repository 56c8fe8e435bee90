"""Systems in few bits that are simulated: their models, bytes, rows and errors."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from runs import TEXT, save_dense
from svdllm.cli import main
from svdllm.common.errors import InputError
from svdllm.comparison import SIMULATED_SYSTEMS, Grid, Measures, run_grid, variants_of
from svdllm.comparison.report import GridReport, write_report
from svdllm.comparison.simulated import quantise
from svdllm.comparison.simulated.one_bit import make_one_bit
from svdllm.compression.math.few_bits.gptq import gptq
from svdllm.data import calibration_windows

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A folder with a dense model and a text."""
    folder = tmp_path_factory.mktemp("simulated")
    save_dense(folder / "dense", tokenizer=tokenizer)
    (folder / "text.txt").write_text(TEXT)
    return folder


def make_grid(place: Path, methods: list[str], dense: str = "dense", **training: Any) -> Grid:
    text = str(place / "text.txt")
    calibration = {"calibration": text, "samples": 8, "seqlen": 16, "seed": 1}
    recover = {"data": text, "steps": 2, "seqlen": 16, "batch": 2} | training if "onebit" in methods else None
    return Grid(
        model=str(place / dense),
        variants=variants_of(methods, calibration, recover, teacher=str(place / dense)),
        ratios=(0.3,),
        measures=Measures(texts=(text,), seqlen=16, windows=6, prompts=()),
        title="A grid",
    )


@pytest.fixture(scope="module")
def made(place: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Grid, Path, dict[str, dict[str, Any]]]:
    methods = [*SIMULATED_SYSTEMS, "svd-llm", "svd-llm+quip-2", "svd-llm+gptq-2"]
    grid, folder = make_grid(place, methods), tmp_path_factory.mktemp("out") / "report"
    records = run_grid(grid, folder, keep=True)
    assert [record["name"] for record in records] == [cell.name for cell in grid.cells]
    return grid, folder, {record["name"]: record for record in records}


def linear_sizes(folder: Path) -> dict[str, torch.Size]:
    weights = load_file(folder / "model.safetensors")
    return {name: w.shape for name, w in weights.items() if name.split(".")[-2] in (*LINEARS, "svd_u", "svd_v")}


def test_every_system_makes_a_model_that_transformers_loads(made: Any, place: Path) -> None:
    _, folder, records = made
    assert {record["status"] for record in records.values()} == {"done"}
    dense = AutoModelForCausalLM.from_pretrained(place / "dense")
    changed = {f"model.layers.{block}" for block in range(2)}
    for name, record in records.items():
        if "simulated" not in record or name.startswith("svd-llm"):
            continue
        model = AutoModelForCausalLM.from_pretrained(folder / record["checkpoint"])
        before = dense.state_dict()
        same = {key for key, value in model.state_dict().items() if torch.equal(value, before[key])}
        linears = {key for key in before if key.split(".")[-2] in LINEARS}
        assert not same & linears
        if not name.startswith("onebit"):  # whose norms are trained
            assert same == before.keys() - linears
        assert all(key.rpartition(".")[0].startswith(tuple(changed)) for key in before.keys() - same)


def test_bytes_are_counted_by_the_formulas(made: Any, place: Path) -> None:
    _, _, records = made
    sizes = linear_sizes(place / "dense")
    count = sum(size.numel() for size in sizes.values())
    tensors = load_file(place / "dense" / "model.safetensors")
    others = sum(t.numel() * t.element_size() for t in tensors.values()) - 4 * count
    expected = {
        "pb-llm": sum(8 * round(s.numel() / 10) + s.numel() - round(s.numel() / 10) for s in sizes.values()),
        "gptq-2": sum(2 * s.numel() + 16 * s[0] * (s[1] // 32) for s in sizes.values()),
        "gptq-4": sum(4 * s.numel() + 16 * s[0] * (s[1] // 32) for s in sizes.values()),
        "quip-2": 2 * count,
        "onebit, 2 steps": sum(s.numel() + 16 * sum(s) for s in sizes.values()),
    }
    for name, bits in expected.items():
        record = records[name]
        assert record["weight_bytes"] == others + round(bits / 8)
        assert record["simulated"]["bits_per_weight"] == pytest.approx(bits / count)
        assert record["achieved_ratio"] == pytest.approx(1 - bits / 8 / (4 * count), abs=1e-4)
    assert 1 < records["billm"]["simulated"]["bits_per_weight"] < 1.5
    for name, record in records.items():
        if "simulated" in record:
            assert record["simulated"]["stored_bits_per_weight"] >= record["simulated"]["bits_per_weight"], name


def test_factors_are_quantised_where_a_compressed_model_is_named(made: Any, place: Path) -> None:
    _, folder, records = made
    record = records["svd-llm+quip-2"]
    sizes = linear_sizes(folder / record["checkpoint"])
    assert len(sizes) == 28  # two factors of 14 linears
    factors = sum(size.numel() for size in sizes.values())
    dense = sum(size.numel() for size in linear_sizes(place / "dense").values())
    assert factors / dense == pytest.approx(0.6, abs=0.04)  # 40 % removed, as in the paper
    padded = sum(size[0] * math.ceil(size[1] / 8) * 16 for size in sizes.values())
    assert record["achieved_ratio"] == pytest.approx(1 - padded / 8 / (4 * dense), abs=1e-3)
    assert records["svd-llm 0.3"]["params"] > record["params"]


def test_a_block_is_quantised_for_the_inputs_that_the_quantised_blocks_make(made: Any, place: Path) -> None:
    _, folder, records = made
    model = AutoModelForCausalLM.from_pretrained(place / "dense").eval()
    tokenizer = AutoTokenizer.from_pretrained(place / "dense")
    ids = calibration_windows(str(place / "text.txt"), tokenizer, samples=8, seqlen=16, seed=1).ids
    quantised = AutoModelForCausalLM.from_pretrained(folder / records["gptq-3"]["checkpoint"]).eval()
    first = model.model.layers[0].mlp.down_proj.weight
    dense_second = model.model.layers[1].self_attn.q_proj.weight.detach().clone()
    inputs: list[torch.Tensor] = []
    down = model.model.layers[0].mlp.down_proj
    handle = down.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, 1).double()))
    with torch.no_grad():
        model(ids)
    handle.remove()
    expected = gptq(first.detach(), inputs[0].mT @ inputs[0], 3).weight_OI
    torch.testing.assert_close(quantised.model.layers[0].mlp.down_proj.weight.detach(), expected, rtol=1e-4, atol=1e-5)
    inputs.clear()
    handle = quantised.model.layers[1].self_attn.q_proj.register_forward_pre_hook(
        lambda _, args: inputs.append(args[0].flatten(0, 1).double())
    )
    with torch.no_grad():
        quantised(ids)
    handle.remove()
    expected = gptq(dense_second, inputs[0].mT @ inputs[0], 3).weight_OI
    found = quantised.model.layers[1].self_attn.q_proj.weight.detach()
    assert float((found - expected).norm() / expected.norm()) < 0.02  # codes at ties may differ


def test_signs_and_value_vectors_are_of_rank_one_and_trained(made: Any, place: Path) -> None:
    _, folder, records = made
    model = AutoModelForCausalLM.from_pretrained(folder / records["onebit, 2 steps"]["checkpoint"])
    dense = AutoModelForCausalLM.from_pretrained(place / "dense")
    for name in ("self_attn.q_proj", "mlp.down_proj"):
        weight = model.model.layers[1].get_submodule(name).weight.detach()
        values = torch.linalg.svdvals(weight.abs().double())
        assert float(values[1] / values[0]) < 1e-5
        start = torch.linalg.svd(dense.model.layers[1].get_submodule(name).weight.detach().abs().double())
        untrained = start[1][0] * start[0][:, :1] @ start[2][:1]
        assert float((weight.abs() - untrained).norm()) > 1e-6
    more = {"training": json.loads((folder / records["onebit, 2 steps"]["checkpoint"] / "simulated.json").read_text())}
    assert more["training"]["settings"]["training"]["steps"] == 2


def test_signs_and_values_learn_through_the_sign() -> None:
    linear = torch.nn.Linear(3, 2, bias=False).double()
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1.0, -2.0, 0.0], [-3.0, 6.0, 0.0]]))
    make_one_bit(torch.nn.ModuleDict({"linear": linear}), ["linear"])
    expected = torch.tensor([[1.0, -2.0, 0.0], [-3.0, 6.0, 0.0]], dtype=torch.float64)  # of rank 1 already
    torch.testing.assert_close(linear.weight.detach(), expected)
    latent, signs = linear.parametrizations.weight.original, linear.parametrizations.weight[0]
    assert torch.equal(latent.detach(), torch.tensor([[0.01, -0.01, 0.01], [-0.01, 0.01, 0.01]]).double())
    linear.weight.sum().backward()
    values = signs.rows.detach()[:, None] * signs.columns.detach()
    torch.testing.assert_close(latent.grad, values * (1.001 - math.tanh(0.01) ** 2))
    torch.testing.assert_close(signs.rows.grad, latent.detach().sign() @ signs.columns.detach())


def test_a_training_that_was_killed_goes_on(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from svdllm.recovery import training

    grid = make_grid(place, ["onebit"], steps=4)
    whole = run_grid(grid, tmp_path / "whole", keep=True)
    step, steps = training._Trainer.training_step, []

    def killed_in_the_third(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        steps.append(self.state.global_step)
        if steps == [0, 1, 2]:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(training._Trainer, "training_step", killed_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        run_grid(grid, tmp_path / "r", keep=True)
    again = run_grid(grid, tmp_path / "r", keep=True)
    assert steps == [0, 1, 2, 2, 3]
    assert [path.name for path in (tmp_path / "r" / "checkpoints").iterdir()] == ["onebit-4-steps"]
    text = str(place / "text.txt")
    found, expected = (records[1]["perplexity"][text]["perplexity"] for records in (again, whole))
    assert found == pytest.approx(expected, rel=1e-5)


def test_the_report_says_what_is_simulated(made: Any, tmp_path: Path) -> None:
    grid, _, records = made
    write_report(GridReport(grid=grid, records=list(records.values())), tmp_path)
    markdown, page = ((tmp_path / f"report.{kind}").read_text() for kind in ("md", "html"))
    for text in (markdown, page):
        assert "(simulated, 2.00 bits)" in text
        assert "onebit, 2 steps" in text
        assert "Simulated: the model ran with dequantised weights" in text
    row = next(line for line in markdown.splitlines() if "| quip-2 " in line)
    assert row.count("±") == 2  # of the perplexity, and beside the dense model's
    assert "svd-llm |" not in row


def test_finished_models_are_kept_and_other_settings_refused(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = make_grid(place, ["gptq-2", "svd-llm+gptq-3"])
    records = run_grid(grid, tmp_path / "r", keep=True)
    monkeypatch.setattr(quantise._Run, "execute", lambda self: pytest.fail("made twice"))
    assert run_grid(grid, tmp_path / "r", keep=True) == records
    for file in (tmp_path / "r" / "cells").iterdir():
        if not file.stem.startswith("dense"):
            file.unlink()
    again = run_grid(grid, tmp_path / "r", keep=True)  # measured again, not made again
    assert [r["perplexity"] for r in again] != []
    assert [r["weight_bytes"] for r in again] == [r["weight_bytes"] for r in records]
    other = variants_of(["gptq-2"], {"calibration": str(place / "text.txt"), "samples": 4, "seqlen": 16}, teacher="x")
    with pytest.raises(InputError, match="made with other settings"):
        run_grid(Grid(**(grid.__dict__ | {"variants": other})), tmp_path / "r", keep=True)


def test_what_fails_fails_alone(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise torch.linalg.LinAlgError("the Gram is not finite")

    monkeypatch.setattr("svdllm.compression.math.few_bits.pb_llm.feedback_factor", fails)
    records = run_grid(make_grid(place, ["pb-llm", "gptq-2"]), tmp_path / "r")
    assert [record["status"] for record in records] == ["done", "failed", "done"]
    assert "layers.0.self_attn.q_proj cannot be quantised: the Gram is not finite" in records[1]["error"]["message"]
    assert records[1]["error"]["exit_code"] == 5


@pytest.mark.parametrize("family", ["gpt2", "opt", "qwen2", "mixtral"])
def test_other_families(family: str, place: Path, tmp_path: Path, tokenizer: Any) -> None:
    save_dense(place / family, family, tokenizer=tokenizer)
    methods = ["quip-2", "gptq-2"] if family == "mixtral" else ["quip-2", "onebit"]
    records = run_grid(make_grid(place, methods, family), tmp_path / "r")
    assert [(record["status"], record.get("error")) for record in records] == [("done", None)] * 3
    assert records[1]["perplexity"] != records[0]["perplexity"]


def cli(place: Path, output: Path, methods: str, *more: object) -> int:
    text = place / "text.txt"
    small = ["--calib", text, "--samples", 8, "--seqlen", 16, "--ppl", text, "--ppl-seqlen", 16, "--ppl-windows", 4]
    arguments = ["compare", place / "dense", "-o", output, "--methods", methods, *small, "--new-tokens", 0, "--offline"]
    with pytest.raises(SystemExit) as done:
        main([str(argument) for argument in (*arguments, *more)])
    return int(done.value.code or 0)


def test_low_rank_at_the_bytes_of_the_simulated(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli(place, tmp_path / "r", "gptq-3,gptq-4,svd-llm", "--ratios", "equal-bytes", "--json") == 0
    cells = {cell["name"]: cell for cell in json.loads(capsys.readouterr().out)["cells"]}
    low_rank = [cell for name, cell in cells.items() if name.startswith("svd-llm ")]
    assert len(low_rank) == 2
    others = sorted(cells[name]["weight_bytes"] for name in ("gptq-3", "gptq-4"))
    for cell, simulated in zip(sorted(low_rank, key=lambda cell: cell["params"]), others, strict=True):
        assert 0.95 * simulated < 4 * cell["params"] <= simulated


@pytest.mark.parametrize(
    ("methods", "more", "message"),
    [
        ("gptq-2-g24", (), "groups of 24 inputs do not divide the 32 inputs of model.layers.0.self_attn.q_proj"),
        ("gptq-2-g24", (), "use a group size of 16 or 8"),
        ("quip-2-g64", (), "quip-2 has no groups. Write quip-2."),
        ("gptq-2-g0", (), "a group has at least 1 input, found 0"),
        ("onebit", (), "Method onebit needs data to learn from: --recover 'data: alpaca.json'"),
        ("onebit", ("--recover", "data: nowhere.json"), "nowhere.json"),
        ("svd-llm+sequential-lora+quip-2", ("--recover", "data: x.json"), "only the factors of such a model"),
        ("quip-2=somewhere", (), "quip-2 is the name of another method"),
        ("gptq-5", (), "Unknown method 'gptq-5'"),
        ("svd-llm", ("--ratios", "equal-bytes"), "none of the methods is simulated"),
    ],
)
def test_what_is_wrong_is_said_before_any_work(
    methods: str, more: tuple[str, ...], message: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli(place, tmp_path / "r", methods, *more) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "r").exists()
