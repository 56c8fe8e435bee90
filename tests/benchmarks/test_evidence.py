"""The benchmarks behind the record of a model, on tiny models: their figures by other ways, and that they go on."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import calibration_text
import code_text
import draft
import latent_cache
import prediction
import record
from runs import TEXT, save_dense
from svdllm import load_model
from svdllm.checkpoint.report import read_report


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A folder with a dense model and two texts."""
    folder = tmp_path_factory.mktemp("evidence")
    save_dense(folder / "dense", tokenizer=tokenizer)
    (folder / "text.txt").write_text(TEXT)
    (folder / "other.txt").write_text(TEXT[::-1])
    return folder


@pytest.fixture(scope="module")
def predicted(place: Path) -> Path:
    """The folder of a prediction: two checkpoints and the result."""
    arguments = ["--calib", place / "text.txt", "--eval", place / "other.txt", "--work", place / "prediction"]
    sizes = ["--ratios", "0.2,0.5", "--samples", 8, "--seqlen", 16, "--windows", 4]
    prediction.main([*map(str, (place / "dense", *arguments, *sizes))])
    return place / "prediction"


def test_code_is_without_documentation_and_its_halves_share_no_module(tmp_path: Path):
    for number in range(20):
        (tmp_path / f"package{number}").mkdir()
        (tmp_path / f"package{number}" / "a.py").write_text(f'"""About it."""\n\n\ndef f{number}():\n    """Doc."""\n')
        (tmp_path / f"package{number}" / "b.py").write_text(f"x{number} = '''kept'''\n")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "a.py").write_text("left_out = 1\n")
    (tmp_path / "broken.py").write_text("def (\n")
    texts = {half: code_text.code_text(half, 10**6, tmp_path) for half in code_text.HALVES}
    for number in range(20):
        holders = [half for half, text in texts.items() if f"x{number} = '''kept'''" in text]
        assert len(holders) == 1
        assert f"def f{number}():" in texts[holders[0]]
    joined = "".join(texts.values())
    assert all(text and text not in ("", "\n") for text in texts.values())
    assert not [text for text in ("About", "Doc", "left_out", "def (") if text in joined]


def test_code_of_the_interpreters_library_parses_up_to_its_cut():
    text = code_text.code_text("held-out", 20_000)
    assert 19_000 < len(text.encode()) <= 20_000
    first = next(code_text.modules("held-out", Path(ast.__file__).parent))
    assert text.startswith(code_text.without_docstrings(first.read_text(encoding="utf-8"))[:200])


def test_the_record_is_commands_that_name_all_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    common = ["m", "-o", str(tmp_path / "out"), "--calib", "a.txt", "--ppl", "b.txt", "--limit", "5", "--dry-run"]
    record.main(common)
    report, second = capsys.readouterr().out.splitlines()
    assert " svdllm compare m " in report
    assert "balanced,best,flap" in report
    assert "distill" not in report
    assert "onebit" not in report
    assert report.endswith("--limit 5")
    assert f"--ppl b.txt --ppl {tmp_path / 'out' / record.CODE}" in report
    assert "prediction.py m" in second
    record.main([*common, "--recover", "data: a.json", "--calib-texts", "w=a.txt", "--steps", "report,calibration"])
    report, second = capsys.readouterr().out.splitlines()
    assert "best+distill" in report
    assert "onebit" in report
    assert "calibration_text.py m" in second
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit):
        record.main([*common, "--steps", "reports"])


def test_steps_of_the_record_go_on_and_the_first_failure_is_its_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    ran: list[list[str]] = []

    def run(command: list[str], check: bool) -> SimpleNamespace:
        ran.append(command)
        return SimpleNamespace(returncode=4 if "compare" in command else 0)

    monkeypatch.setattr(record.subprocess, "run", run)
    with pytest.raises(SystemExit) as ended:
        record.main(["m", "-o", str(tmp_path), "--calib", "a.txt", "--ppl", "b.txt", "--code-bytes", "2000"])
    assert ended.value.code == 4
    assert [command[0] for command in ran] == [sys.executable] * 2
    assert 0 < len((tmp_path / record.CODE).read_bytes()) <= 2000


def test_calibration_texts_make_a_table_that_grows(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    def made(tokens: str) -> tuple[str, dict[str, Any]]:
        calibration_text.main(
            [
                *(str(place / "dense"), "-o", str(tmp_path / "out"), "--method", "svd-llm", "--tokens", tokens),
                *("--calib", f"text={place / 'text.txt'}", "--window", "16", "--ratios", "0.3", "--seqlen", "16"),
                *("--calib", f"half={place / 'text.txt'}:0.5,{place / 'other.txt'}:0.5", "--windows", "4"),
                *("--ppl", str(place / "other.txt")),
            ]
        )
        found = json.loads((tmp_path / "out" / "calibration_text.json").read_text())
        return capsys.readouterr().out, {cell["name"]: cell for cell in found["cells"]}

    _, few = made("64")
    shown, more = made("8,64")
    assert list(more) == ["dense", *(f"{t}, {n} tokens 0.3" for t in ("text", "half") for n in (8, 64))]
    assert {name: more[name] for name in few} == few
    row = more["half, 64 tokens 0.3"]["perplexity"][str(place / "other.txt")]
    assert f"{row['log_ratio']:.3f} ± {row['log_ratio_stderr']:.3f}" in shown
    assert "| calibration text | 8 tokens | 64 tokens |" in shown
    assert len({cell["perplexity"][str(place / "other.txt")]["perplexity"] for cell in more.values()}) == 5


def test_predicted_loss_stands_beside_the_models_own(place: Path, predicted: Path):
    found = json.loads((predicted / "prediction.json").read_text())
    small, large = found["ratios"]
    for row in found["ratios"]:
        report = read_report(predicted / f"ratio-{row['ratio']:g}")
        assert row["predicted"] == report["allocation"]["predicted_loss"]
        assert row["one by one"] > 0
        assert row["held out stderr"] > 0
    assert small["together"] < large["together"]
    models = [load_model(folder).eval() for folder in (place / "dense", predicted / "ratio-0.5")]
    ids_NT = torch.arange(48).view(3, 16)
    with torch.no_grad():
        dense, other = (model(input_ids=ids_NT).logits.double().log_softmax(-1) for model in models)
    expected = (dense.exp() * (dense - other)).sum(-1).mean(1)
    (values,) = prediction.divergences(models[0], [lambda: prediction.exchanged(models[1], models[1], [])], ids_NT)
    assert values == pytest.approx(expected.tolist(), rel=1e-4)


def test_exchanging_every_linear_makes_the_compressed_model_and_is_undone(place: Path, predicted: Path):
    folder = predicted / "ratio-0.5"
    dense, compressed = load_model(place / "dense").eval(), load_model(folder).eval()
    names = [row["name"] for row in read_report(folder)["linears"]]
    ids_NT, before = torch.arange(16)[None], load_model(place / "dense").eval()
    with torch.no_grad(), prediction.exchanged(dense, compressed, names) as whole:
        assert torch.equal(whole(input_ids=ids_NT).logits, compressed(input_ids=ids_NT).logits)
    with torch.no_grad():
        assert torch.equal(dense(input_ids=ids_NT).logits, before(input_ids=ids_NT).logits)


def test_units_are_what_is_changed_at_once():
    rows = [
        {"name": "b.q", "size": 4, "form": "pair", "parts": []},
        {"name": "b.kv", "size": 4, "form": "pair", "parts": ["b.k", "b.v"]},
        {"name": "b.o", "size": None, "form": "dense", "parts": []},
        {"name": "b.mlp.up", "size": 8, "form": "narrow", "parts": []},
        {"name": "b.mlp.down", "size": 8, "form": "narrow", "parts": []},
    ]
    assert prediction.units(rows) == [["b.q"], ["b.k", "b.v"], ["b.mlp.up", "b.mlp.down"]]


def test_proposals_are_counted_by_the_passes_of_the_dense_model():
    """A prompt of 5 with 3 proposals, then 4 = 1 + 3 tokens: 6 proposed. 6 written in 2 passes: 4 of them kept."""
    assert draft.proposed_and_kept([5 + 3, 1 + 3], prompt=5, written=6) == (6, 4)


def test_the_dense_model_as_its_own_draft_is_always_right(
    place: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]
):
    save_dense(place / "stranger", tokenizer=tokenizer, seed=7, tie_word_embeddings=False)
    models = [str(place / name) for name in ("dense", "dense", "stranger")]
    (place / "prompts.txt").write_text("the quick\nbrown fox\n")
    draft.main([*models, "--prompts", str(place / "prompts.txt"), "--draft-tokens", "3", "--new-tokens", "12"])
    own, other = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert own["accepted"] == 1.0
    assert own["tokens"] == pytest.approx(4.0)  # three proposed and one of its own
    assert own["same_text"] == other["same_text"] == 1.0
    assert 0 <= other["accepted"] < 1
    assert own["pays_below_cost_if_a_check_is_a_step"] == pytest.approx(1.0)


def test_a_quantised_cache_stands_beside_the_others(predicted: Path, capsys: pytest.CaptureFixture[str]):
    folder = str(predicted / "ratio-0.5")
    latent_cache.main([folder, "--context", "24", "--repeats", "3", "--warmup", "1", "--quantised", "fp8"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    sizes = found["cache_bytes"]
    assert sizes["ordinary"] == 2 * 2 * 2 * 8 * 24 * 4  # layers, keys and values, heads, features, tokens, bytes
    assert sizes["ordinary"] / 4 <= sizes["fp8"] <= sizes["ordinary"] / 4 + 2 * 2 * 4
    assert set(found["step_milliseconds"]) == set(found["prefill_seconds"]) == set(sizes)


def test_bytes_are_those_of_all_tensors_inside():
    parts = {"a": torch.zeros(3), "b": (torch.zeros(2, dtype=torch.int8), [torch.zeros(1)], None, 5)}
    assert sum(tensor.numel() for tensor in latent_cache.tensors_in(parts)) == 6
