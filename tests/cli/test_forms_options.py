"""Forms on the command line: what may be used, explicit ones from a file, what is printed and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from svdllm.cli import main
from svdllm.compression.recipe_files import load_settings, make_recipe

SMALL = ["--preset", "paper", "--samples", "8", "--seqlen", "16"]
BY_LOSS = [*SMALL, "--allocation", "loss", "--ratio", "0.4", "--round-to", "2"]


def cli(*arguments: object) -> int:
    with pytest.raises(SystemExit) as done:
        main([str(argument) for argument in arguments])
    return int(done.value.code or 0)


def said(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize(
    ("flags", "used"),
    [
        ([], {"packed", "narrow"}),
        (["--forms", "packed"], {"packed"}),
        (["--forms", "narrow"], {"narrow"}),
        (["--forms", "pair"], {"pair"}),
        (["--forms", "pair,narrow"], {"pair", "narrow"}),
    ],
    ids=lambda value: " ".join(sorted(value)),
)
def test_the_forms_that_may_be_used(
    flags: list[str], used: set[str], dense: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert cli("plan", dense, *BY_LOSS, *flags, "--json") == 0
    planned = json.loads(capsys.readouterr().out)
    assert not planned["ranks_known"]
    assert cli("compress", dense, "-o", out, "--calib", text, *BY_LOSS, *flags, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert {entry["form"] for entry in result["forms"].values()} <= used
    assert result["achieved_ratio"] >= 0.4
    assert result["params"] == AutoModelForCausalLM.from_pretrained(out).num_parameters()
    assert set(result["ranks"]) == {name for name, entry in result["forms"].items() if entry["form"] != "narrow"}
    recipe = make_recipe(load_settings(out / "svdllm" / "recipe.yaml"))
    assert recipe.forms == (tuple(flags[1].split(",")) if flags else None)
    assert cli("inspect", out) == 0
    printed = said(capsys.readouterr().out)
    for form, count in counts(result).items():
        assert f"{count} {form}" in printed


def counts(result: dict[str, Any]) -> dict[str, int]:
    forms = [entry["form"] for entry in result["forms"].values()]
    return {form: forms.count(form) for form in set(forms)}


def test_explicit_forms_from_a_file(
    dense: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "forms.yaml", tmp_path / "out"
    file.write_text("0.mlp: {narrow: 20}\ndown_proj: {packed: 7}\nq_proj: 5\nk_proj: dense\n")
    asked = (dense, *SMALL, "--allocation", file, "--json")
    assert cli("plan", *asked) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["ranks_known"]
    assert cli("compress", *asked, "-o", out, "--calib", text) == 0
    result = json.loads(capsys.readouterr().out)
    forms = {row["name"]: (row["form"], row["size"]) for row in planned["targets"] if row["size"] is not None}
    first, second = (f"model.layers.{block}" for block in (0, 1))
    assert forms == {
        **{f"{first}.mlp.{leaf}_proj": ("narrow", 20) for leaf in ("gate", "up", "down")},
        **{f"{block}.self_attn.q_proj": ("pair", 5) for block in (first, second)},
        f"{second}.mlp.down_proj": ("packed", 7),
    }
    assert {name: (entry["form"], entry["size"]) for name, entry in result["forms"].items()} == forms
    assert planned["file_bytes"] == (out / "model.safetensors").stat().st_size
    assert cli("plan", *asked[:-1]) == 0
    printed = said(capsys.readouterr().out)
    assert "20 narrow" in printed
    assert "7 packed" in printed


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--forms", "packt"], "unknown form 'packt'; known are dense, pair, packed, narrow"),
        (["--forms", "dense"], "forms dense leave every linear as it is; name at least one of pair, packed, narrow"),
        (["--forms", "packed", "--elastic"], "form packed cannot be used"),
        (["--forms", "narrow", "--bias-correction"], "form narrow cannot be used: bias_correction"),
        (["--forms", "narrow", "--method", "svd"], "it is fitted to the Gram of the inputs, and method svd has none"),
        (["--forms", "narrow", "--ignore", "up_proj"], "--forms narrow needs MLPs"),
        (
            ["--forms", "narrow", "--allocation", "uniform"],
            "allocation uniform does not choose it; use allocation loss",
        ),
    ],
    ids=str,
)
def test_forms_that_cannot_be_are_refused_before_work(
    flags: list[str], message: str, dense: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [flag for flag in BY_LOSS if flag not in ("--allocation", "loss") or "--allocation" not in flags]
    for command in (("plan", dense), ("compress", dense, "-o", tmp_path / "out", "--calib", text)):
        assert cli(*command, *asked, *flags) == 2
        assert message in said(capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("q_proj: {packt: 4}", "found q_proj: {'packt': 4}"),
        ("q_proj: {packed: 0}", "found q_proj: {'packed': 0}"),
        ("q_proj: {packed: 4, pair: 4}", "found q_proj: {'packed': 4, 'pair': 4}"),
        ("q_proj: {packed: 32}", "'q_proj' asks for packed 32 of"),
        ("mlp: {narrow: 480}", "which can have 1 to 47"),
        ("up_proj: 4\nmlp: {narrow: 4}", "Put the pattern of the MLP first"),
        ("k_proj: {narrow: 4}", "matches none of the 2 MLPs"),
    ],
    ids=str,
)
def test_a_file_of_forms_that_cannot_be(
    content: str, message: str, dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "forms.yaml"
    file.write_text(content)
    assert cli("plan", dense, *SMALL, "--allocation", file) == 2
    assert message in said(capsys.readouterr().err)
