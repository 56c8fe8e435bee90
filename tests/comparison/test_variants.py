"""Models that are made in another way: by a function in the table, or by somebody else (``--methods name=MODEL``)."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig

from runs import TEXT, save_dense
from svdllm.cli import main
from svdllm.common.errors import InputError
from svdllm.comparison import VARIANTS, Foreign, Grid, MadeBy, Measures, run_grid, variants_of
from svdllm.comparison.report import GridReport, write_report
from svdllm.comparison.table import columns_of, groups_of
from svdllm.comparison.variants import Row
from svdllm.data import evaluation_tokens
from tokenizers_local import byte_tokenizer


def shallower(model: str, ratio: float, folder: Path) -> Path:
    """Leaves out the last blocks: as many as come nearest to the ratio, at least one."""
    pruned = AutoModelForCausalLM.from_pretrained(model)
    layers = pruned.model.layers
    kept = max(1, round(len(layers) * (1 - ratio)))
    pruned.model.layers = layers[:kept]
    pruned.config.num_hidden_layers = kept
    pruned.config.layer_types = None
    pruned.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A folder with a dense model, a text, and a model made elsewhere of half the dense one's blocks."""
    folder = tmp_path_factory.mktemp("variants")
    save_dense(folder / "dense", tokenizer=tokenizer)
    (folder / "text.txt").write_text(TEXT)
    shallower(str(folder / "dense"), 0.5, folder / "shallow")
    return folder


def make_grid(place: Path, methods: list[str], ratios: tuple[float, ...] = (0.3,)) -> Grid:
    text = str(place / "text.txt")
    calibration = {"calibration": text, "samples": 8, "seqlen": 16, "seed": 1}
    return Grid(
        model=str(place / "dense"),
        variants=variants_of(methods, calibration, teacher=str(place / "dense")),
        ratios=ratios,
        measures=Measures(texts=(text,), seqlen=16, windows=6, prompts=()),
        title="A grid",
    )


def measured(folder: Path, text: Path) -> float:
    """Perplexity of the first windows, by a loop over transformers' own loss."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = evaluation_tokens(str(text), AutoTokenizer.from_pretrained(folder))
    with torch.no_grad():
        losses = [model(input_ids=w[None], labels=w[None]).loss.double() for w in ids[: 6 * 16].view(6, 16)]
    return float(torch.stack(losses).mean().exp())


def pages(grid: Grid, records: list[dict[str, Any]], folder: Path) -> list[str]:
    write_report(GridReport(grid=grid, records=records), folder)
    return [(folder / f"report.{kind}").read_text() for kind in ("html", "md")]


def test_a_model_made_elsewhere_is_a_row_beside_ours(place: Path, tmp_path: Path) -> None:
    grid = make_grid(place, ["svd", f"shallow={place / 'shallow'}"], (0.3, 0.505))
    records = run_grid(grid, tmp_path / "r")
    assert [record["name"] for record in records] == ["dense", "svd 0.3", "svd 0.505", "shallow"]
    assert [record["status"] for record in records] == ["done"] * 4
    record, text = records[3], place / "text.txt"
    dense, shallow = (AutoModelForCausalLM.from_pretrained(place / name) for name in ("dense", "shallow"))
    assert record["params"] == shallow.num_parameters()
    assert record["weight_bytes"] == (place / "shallow" / "model.safetensors").stat().st_size
    assert record["perplexity"][str(text)]["perplexity"] == pytest.approx(measured(place / "shallow", text), rel=1e-5)
    linears = sum(p.numel() for name, p in dense.named_parameters() if "proj" in name)
    expected = (dense.num_parameters() - shallow.num_parameters()) / linears
    assert record["achieved_ratio"] == pytest.approx(expected)
    assert record["ratio"] is None
    assert expected == pytest.approx(0.5, abs=0.01)
    page, markdown = pages(grid, records, tmp_path / "r")
    last = markdown.split("| 50.5 % |")[1].splitlines()  # in the group of the nearest ratio, after ours
    assert last[0].startswith(" svd |")
    assert last[1].startswith(f"|  | shallow ({expected * 100:.4g} %) | {shallow.num_parameters() / 1e6:,.1f} M |")
    assert f"shallow ({expected * 100:.4g} %)" in page


def test_its_folder_is_left_alone_and_another_model_in_it_is_refused(place: Path, tmp_path: Path) -> None:
    folder = shallower(str(place / "dense"), 0.5, tmp_path / "theirs")
    before = {file: file.read_bytes() for file in folder.iterdir()}
    grid = make_grid(place, ["svd", f"theirs={folder}"])
    records = run_grid(grid, tmp_path / "r", keep=True)
    assert {file: file.read_bytes() for file in folder.iterdir()} == before
    assert records[2]["checkpoint"] is None
    assert run_grid(make_grid(place, ["svd", f"theirs={folder}"]), tmp_path / "r", keep=True) == records
    save_dense(folder, seed=7)
    with pytest.raises(InputError, match="'theirs' made with other settings: made elsewhere: weights was"):
        run_grid(make_grid(place, ["svd", f"theirs={folder}"]), tmp_path / "r", keep=True)


def test_a_model_with_more_parameters_has_no_ratio(place: Path, tmp_path: Path, tokenizer: Any) -> None:
    save_dense(tmp_path / "deeper", tokenizer=tokenizer, num_hidden_layers=3)
    grid = make_grid(place, [f"deeper={tmp_path / 'deeper'}"])
    records = run_grid(grid, tmp_path / "r")
    assert records[1]["achieved_ratio"] is None
    assert "| unknown | deeper |" in pages(grid, records, tmp_path / "r")[1]


def test_a_model_with_its_own_tokenizer_is_compared_by_bytes_of_text(place: Path, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(261)  # hardly a merge
    other = save_dense(tmp_path / "other", tokenizer=tokenizer, seed=5, num_hidden_layers=1)
    grid = make_grid(place, ["svd", f"other={other}"])
    records = run_grid(grid, tmp_path / "r")
    assert [record.get("own_tokenizer", False) for record in records] == [False, False, True]
    text = place / "text.txt"
    for record, folder in ((records[0], place / "dense"), (records[2], other)):
        found = record["perplexity"][str(text)]
        encoded = AutoTokenizer.from_pretrained(folder)(text.read_text(), return_offsets_mapping=True)
        letters = encoded["offset_mapping"][6 * 16 - 1][1]  # a byte each
        nats = math.log(measured(folder, text))
        assert found["perplexity"] == pytest.approx(math.exp(nats), rel=1e-5)
        assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) * (6 * 16) / letters, rel=1e-5)
        assert found["bits_per_byte_stderr"] > 0
    markdown = pages(grid, records, tmp_path / "r")[1]
    assert "text.txt ↓ | text.txt, ln(ppl / dense) ↓ | text.txt, bits per byte ↓ |" in markdown
    assert "log_ratio" not in records[2]["perplexity"][str(text)]
    row = next(line for line in markdown.splitlines() if "| other" in line)
    assert f"{records[2]['perplexity'][str(text)]['bits_per_byte']:.3f}" in row
    assert "perplexity by token does not compare" in markdown
    assert "bits per byte" not in pages(grid, records[:2], tmp_path / "r")[1]


def test_perplexities_of_other_tokens_are_never_the_best() -> None:
    def record(name: str, perplexity: float, bits: float, **more: Any) -> dict[str, Any]:
        measured = {"perplexity": perplexity, "stderr": 0.1, "bits_per_byte": bits, "bits_per_byte_stderr": 0.01}
        common = {"name": name, "variant": name, "ratio": 0.5, "status": "done", "params": 1, "weight_bytes": 1}
        return common | {"perplexity": {"text": measured}} | more

    records = [record("svd-llm", 9.0, 1.5), record("balanced", 8.0, 1.4), record("x", 3.0, 1.2, own_tokenizer=True)]
    columns = columns_of(records)
    (group,) = groups_of(records, columns)
    assert [[entry.best for entry in row.entries] for row in group.rows] == [
        [False, False],
        [True, False],
        [False, True],
    ]


def test_a_function_makes_a_model_at_every_ratio(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VARIANTS, "shallower", Row(make=shallower))
    grid = make_grid(place, ["svd", "shallower"], (0.1, 0.5))
    records = run_grid(grid, tmp_path / "r", keep=True)
    assert [record["name"] for record in records[3:]] == ["shallower 0.1", "shallower 0.5"]
    assert records[3]["params"] == records[0]["params"]
    assert records[4]["achieved_ratio"] == pytest.approx(0.5, abs=0.01)
    assert records[4]["checkpoint"] == "checkpoints/shallower-0.5"
    found = records[4]["perplexity"][str(place / "text.txt")]["perplexity"]
    assert found == pytest.approx(measured(tmp_path / "r/checkpoints/shallower-0.5", place / "text.txt"), rel=1e-5)
    monkeypatch.setitem(VARIANTS, "shallower", Row(make=lambda *_: pytest.fail("made twice")))
    assert isinstance(grid.variants[1], MadeBy)
    assert run_grid(grid, tmp_path / "r", keep=True) == records
    assert "shallower" in pages(grid, records, tmp_path / "r")[1]


def test_a_function_that_fails_fails_alone(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(model: str, ratio: float, folder: Path) -> Path:
        raise InputError("cannot")

    monkeypatch.setitem(VARIANTS, "fails", Row(make=fails))
    records = run_grid(make_grid(place, ["fails", "svd"]), tmp_path / "r")
    assert [record["status"] for record in records] == ["done", "failed", "done"]
    assert not (tmp_path / "r/checkpoints").exists()


def cli(*arguments: object) -> int:
    with pytest.raises(SystemExit) as done:
        main([str(argument) for argument in arguments])
    return int(done.value.code or 0)


def compare(place: Path, output: Path, methods: str, *more: object) -> int:
    text = place / "text.txt"
    small = ["--calib", text, "--samples", 8, "--seqlen", 16, "--ppl", text, "--ppl-seqlen", 16, "--ppl-windows", 4]
    small += ["--ratios", 0.5, "--new-tokens", 0, "--offline"]
    return cli("compare", place / "dense", "-o", output, "--methods", methods, *small, *more)


def test_from_the_command_line(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare(place, tmp_path / "r", f"svd,pruned={place / 'shallow'}", "--json") == 0
    cells = json.loads(capsys.readouterr().out)["cells"]
    assert [cell["name"] for cell in cells] == ["dense", "svd 0.5", "pruned"]


@pytest.fixture
def wrong(tmp_path: Path) -> Path:
    """Folders that cannot be compared with the dense model."""
    save_dense(tmp_path / "no-tokenizer")
    BertConfig(vocab_size=300, architectures=["BertModel"]).save_pretrained(tmp_path / "encoder")
    return tmp_path


@pytest.mark.parametrize(
    ("method", "code", "message"),
    [
        ("theirs=nowhere/at-all", 2, "No such model: nowhere/at-all"),
        ("theirs={wrong}/no-tokenizer", 2, "no-tokenizer has no tokenizer"),
        ("theirs={wrong}/encoder", 3, "encoder is not a causal language model"),
        ("svd-llm={wrong}/encoder", 2, "svd-llm is the name of another method. Choose another name"),
        ("dense={wrong}/encoder", 2, "dense is the name of another method"),
        ("theirs=", 2, "expected NAME=MODEL"),
        ("a={wrong}/encoder,a={wrong}/encoder", 2, "Method 'a' is given twice"),
    ],
)
def test_what_cannot_be_compared_is_named_before_any_work(
    method: str, code: int, message: str, wrong: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare(place, wrong / "r", method.format(wrong=wrong)) == code
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (wrong / "r").exists()


def test_only_models_of_a_recipe_are_trained(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VARIANTS, "shallower", Row(make=shallower))
    with pytest.raises(InputError, match="shallower is made by a function, and only models"):
        variants_of(["shallower+distill"], {}, {"data": "python-docs"}, teacher="x")
    assert isinstance(variants_of(["a=b+c"], {}, teacher="x")[0], Foreign)


def test_a_mixture_with_fewer_experts_is_a_row(tmp_path: Path, tokenizer: Any) -> None:
    save_dense(tmp_path / "dense", "mixtral", tokenizer=tokenizer)
    (tmp_path / "text.txt").write_text(TEXT)
    records = run_grid(make_grid(tmp_path, ["reap"], (0.2,)), tmp_path / "r", keep=True)
    assert [(record["name"], record["status"]) for record in records] == [("dense", "done"), ("reap 0.2", "done")]
    made = records[1]
    assert 0.2 <= made["achieved_ratio"] < 0.3  # one of four experts
    assert [len(kept) for kept in made["kept_experts"].values()] == [3, 3]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "r" / made["checkpoint"]).num_parameters() == made["params"]
    with pytest.raises(InputError, match="of 4 experts remain"):
        run_grid(make_grid(tmp_path, ["reap"], (0.2, 0.8)), tmp_path / "r2")
