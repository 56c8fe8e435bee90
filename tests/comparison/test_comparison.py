"""Grids of models: every cell is what a run of its own makes, a killed grid goes on, a cell that fails fails alone."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import svdllm
from runs import TEXT, digests, save_dense
from svdllm.cli import main
from svdllm.common.errors import InputError
from svdllm.common.progress import Reporter
from svdllm.comparison import Grid, Measures, Trained, compressed, run_grid, study, variants_of
from svdllm.comparison import run as grid_run
from svdllm.comparison.plots import _errors
from svdllm.comparison.report import GridReport, write_report
from svdllm.comparison.table import _relative, columns_of, groups_of
from svdllm.data import evaluation_tokens
from svdllm.evaluation.perplexity import perplexity_text
from svdllm.recovery.memory import require_memory_of_methods

LORA = "svd-llm+sequential-lora"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A folder with a dense model and a text."""
    folder = tmp_path_factory.mktemp("grid")
    save_dense(folder / "dense", tokenizer=tokenizer)
    (folder / "text.txt").write_text(TEXT)
    return folder


def make_grid(place: Path, methods: list[str], ratios: tuple[float, ...] = (0.3,), **training: Any) -> Grid:
    text = str(place / "text.txt")
    calibration = {"calibration": text, "samples": 8, "seqlen": 16, "seed": 1}
    recover = (
        {"data": text, "steps": 2, "seqlen": 16, "batch": 2} | training if any("+" in m for m in methods) else None
    )
    return Grid(
        model=str(place / "dense"),
        variants=variants_of(methods, calibration, recover, teacher=str(place / "dense")),
        ratios=ratios,
        measures=Measures(texts=(text,), seqlen=16, windows=6, prompts=("the quick",), new_tokens=4),
        title="A grid",
    )


@pytest.fixture(scope="module")
def made(place: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Grid, Path, list[dict[str, Any]]]:
    grid = make_grid(place, ["svd", "svd-llm", LORA], (0.3, 0.5))
    folder = tmp_path_factory.mktemp("out") / "report"
    return grid, folder, run_grid(grid, folder, keep=True)


def by_name(records: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {record["name"]: record for record in records}


def measured(model: Any, place: Path) -> float:
    """Perplexity of the first windows, by a loop over transformers' own loss."""
    from transformers import AutoTokenizer

    ids = evaluation_tokens(str(place / "text.txt"), AutoTokenizer.from_pretrained(place / "dense"))
    with torch.no_grad():
        losses = [model(input_ids=w[None], labels=w[None]).loss.double() for w in ids[: 6 * 16].view(6, 16)]
    return float(torch.stack(losses).mean().exp())


def test_cells_are_what_runs_of_their_own_make(made: Any, place: Path, tmp_path: Path) -> None:
    grid, folder, records = made
    assert [record["name"] for record in records] == [cell.name for cell in grid.cells]
    assert [record["status"] for record in records] == ["done"] * 7
    cells = by_name(records)
    recipe = svdllm.Recipe(**{**grid.variants[1].recipe.to_dict(), "ratio": 0.5})
    alone = svdllm.compress(place / "dense", recipe, tmp_path / "alone")
    ours, theirs = (digests(path) for path in (folder / "checkpoints" / "svd-llm-0.5", alone.output_dir))
    assert ours == theirs  # the second ratio, which found calibration and decomposition done
    expected = measured(alone.load(), place)
    found = cells["svd-llm 0.5"]["perplexity"][str(place / "text.txt")]["perplexity"]
    assert found == pytest.approx(expected, rel=1e-5)
    reported = json.loads((alone.output_dir / "svdllm/report.json").read_text())["linears"]
    without_times = ({**row, "seconds": 0} for row in cells["svd-llm 0.5"]["linears"])
    assert list(without_times) == [{**row, "seconds": 0} for row in reported]
    assert cells["dense"]["params"] > cells["svd 0.3"]["params"] > cells["svd 0.5"]["params"]
    row, dense = (cells[name]["perplexity"][str(place / "text.txt")] for name in ("svd-llm 0.5", "dense"))
    assert row["log_ratio"] == pytest.approx(math.log(row["perplexity"] / dense["perplexity"]), rel=1e-6)


def test_trained_cells_begin_with_the_untrained_model(made: Any, place: Path) -> None:
    _, folder, records = made
    cells = by_name(records)
    before, after = cells["svd-llm 0.3"], cells[f"{LORA} 0.3"]
    assert before["recovery"] is None
    assert [stage["steps"] for stage in after["recovery"][0]["stages"]] == [2, 2]
    assert [row["rank"] for row in before["linears"]] == [row["rank"] for row in after["linears"]]
    weights = [svdllm.load_model(folder / "checkpoints" / f"{name}-0.3").state_dict() for name in ("svd-llm", LORA)]
    changed = {name.rsplit(".", 2)[1] for name in weights[0] if not torch.equal(weights[0][name], weights[1][name])}
    assert changed == {"svd_u", "svd_v"}
    assert after["perplexity"] != before["perplexity"]


def test_generations_are_greedy(made: Any, place: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _, folder, records = made
    tokenizer = AutoTokenizer.from_pretrained(place / "dense")
    model = AutoModelForCausalLM.from_pretrained(folder / "checkpoints" / "svd-0.5")
    ids = tokenizer("the quick", return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    for _ in range(4):
        ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    written = {"prompt": "the quick", "text": tokenizer.decode(ids[0, start:], skip_special_tokens=True)}
    assert by_name(records)["svd 0.5"]["generations"] == [written]


def test_spectra_are_those_of_the_weights(made: Any, place: Path) -> None:
    _, folder, _ = made
    spectra = json.loads((folder / "spectra" / "svd.json").read_text())
    for name, parameter in svdllm.load_model(place / "dense").named_parameters():
        if (linear := name.removesuffix(".weight")) in spectra:
            values = torch.linalg.svdvals(parameter.double())
            expected = values[torch.tensor(spectra[linear]["positions"]) - 1]
            torch.testing.assert_close(
                torch.tensor(spectra[linear]["singular_values"], dtype=torch.float64), expected, rtol=1e-3, atol=1e-6
            )
    assert len(spectra) == 14


def test_all_ratios_share_one_calibration(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from svdllm.compression import analyze as calibration

    blocks: list[int] = []
    decompose = calibration.Calibration._decompose

    def counted(self: Any, block: Any, *args: Any) -> None:
        blocks.append(block.index)
        decompose(self, block, *args)

    monkeypatch.setattr(calibration.Calibration, "_decompose", counted)
    run_grid(make_grid(place, ["svd-llm"], (0.3, 0.5, 0.7)), tmp_path / "r")
    assert blocks == [0, 1]


def test_checkpoints_of_other_settings_are_not_taken(place: Path, tmp_path: Path) -> None:
    """That of an untrained model, which the second grid has no record of."""
    run_grid(make_grid(place, ["svd-llm"]), tmp_path / "r", keep=True)
    grid = make_grid(place, [LORA])
    (variant,) = grid.variants
    assert isinstance(variant, Trained)
    assert isinstance(variant.compressed, compressed.Compressed)
    other_recipe = variant.compressed.recipe.model_copy(update={"samples": 4})
    other = replace(variant, compressed=replace(variant.compressed, recipe=other_recipe))
    with pytest.raises(InputError, match=r"svd-llm-0\.3 was made with other settings"):
        run_grid(replace(grid, variants=(other,)), tmp_path / "r", keep=True)
    records = run_grid(grid, tmp_path / "r", keep=True)
    assert [record["status"] for record in records] == ["done", "done"]


def test_a_killed_grid_goes_on(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = make_grid(place, ["svd", "asvd"])
    measure = grid_run.measure

    def killed_at_the_third(*args: Any, **kwargs: Any) -> Any:
        if len(list((tmp_path / "r" / "cells").iterdir())) == 2:
            raise KeyboardInterrupt
        return measure(*args, **kwargs)

    monkeypatch.setattr(grid_run, "measure", killed_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        run_grid(grid, tmp_path / "r")
    before = {file: file.read_bytes() for file in (tmp_path / "r" / "cells").iterdir()}
    assert len(before) == 2
    compressions: list[str] = []
    monkeypatch.setattr(grid_run, "measure", measure)
    monkeypatch.setattr(compressed, "compress", lambda *args, **kwargs: compressions.append(args[1].method))
    records = run_grid(grid, tmp_path / "r")
    assert [record["status"] for record in records] == ["done"] * 3
    assert compressions == []  # the model that was made was only to be measured
    assert {file: file.read_bytes() for file in before} == before
    assert not (tmp_path / "r" / "work").exists()


def test_more_methods_are_added_and_other_settings_refused(place: Path, tmp_path: Path) -> None:
    grid = make_grid(place, ["svd"])
    run_grid(grid, tmp_path / "r")
    first = (tmp_path / "r/cells/svd-0.3.json").read_bytes()
    records = run_grid(make_grid(place, ["svd", "asvd"]), tmp_path / "r")
    assert [record["name"] for record in records] == ["dense", "svd 0.3", "asvd 0.3"]
    assert (tmp_path / "r/cells/svd-0.3.json").read_bytes() == first
    other = replace(grid, measures=replace(grid.measures, windows=5))
    with pytest.raises(InputError, match="'dense' made with other settings: measures: windows was 6, is now 5"):
        run_grid(other, tmp_path / "r")


def test_another_model_at_the_same_place_is_refused(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "dense", tmp_path / "dense")
    grid = replace(make_grid(place, ["svd"]), model=str(tmp_path / "dense"))
    records = run_grid(grid, tmp_path / "r")
    (digest,) = records[0]["settings"]["weights"]
    assert digest == digests(tmp_path / "dense")["model.safetensors"]
    assert run_grid(grid, tmp_path / "r") == records
    half = replace(grid, measures=replace(grid.measures, dtype="float64"))
    with pytest.raises(InputError, match=r"measured in was \"torch\.float32\", is now \"torch\.float64\""):
        run_grid(half, tmp_path / "r")
    save_dense(tmp_path / "dense", seed=5)
    with pytest.raises(InputError, match="'dense' made with other settings: weights was"):
        run_grid(grid, tmp_path / "r")
    for file in (tmp_path / "r" / "cells").iterdir():  # as older versions wrote them
        record = json.loads(file.read_text())
        for name in ("weights", "commit", "measured in"):
            del record["settings"][name]
        if recipe := record["settings"]["recipe"]:
            del recipe["speedup_tokens"]
        file.write_text(json.dumps(record))
    assert len(run_grid(grid, tmp_path / "r")) == 2


def test_a_cell_that_fails_fails_alone(place: Path, tmp_path: Path) -> None:
    grid = make_grid(place, [LORA, "svd", "svd-llm"], lr=1e30)
    reporter = Reporter()
    records = by_name(run_grid(grid, tmp_path / "r", reporter=reporter))
    assert {name: record["status"] for name, record in records.items()} == {
        "dense": "done",
        f"{LORA} 0.3": "failed",
        "svd 0.3": "done",
        "svd-llm 0.3": "done",
    }
    error = records[f"{LORA} 0.3"]["error"]
    assert (error["type"], error["exit_code"]) == ("NumericalError", 5)
    assert re.match(r".*step \d", error["message"])
    assert "traceback" not in error
    assert any(warning.startswith(f"{LORA} 0.3 failed: ") for warning in reporter.warnings)
    page = written(grid, list(records.values()), tmp_path / "r")[0]
    assert "NumericalError" in page


def test_a_full_disk_and_a_mistake_of_ours_are_told_apart(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(model: str, recipe: svdllm.Recipe, *_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device", "f") if recipe.method == "svd" else ZeroDivisionError("by zero")

    monkeypatch.setattr(compressed, "compress", fails)
    cells = by_name(run_grid(make_grid(place, ["svd", "asvd"]), tmp_path / "r"))
    assert cells["svd 0.3"]["error"] == {
        "type": "ResourceError",
        "message": "No space left on device: f",
        "exit_code": 4,
    }
    error = cells["asvd 0.3"]["error"]
    assert (error["type"], error["message"], error["exit_code"]) == ("ZeroDivisionError", "by zero", 1)
    assert "in fails" in error["traceback"]


def test_what_to_do_about_memory_is_what_a_grid_can_do(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from svdllm.compression import analyze as calibration
    from svdllm.recovery import checks

    monkeypatch.setattr(
        checks,
        "require_memory_of_methods",
        lambda *_: require_memory_of_methods({"distill": 2**60}, torch.device("cpu")),
    )
    grid = make_grid(place, ["svd-llm+distill"])
    trained = by_name(run_grid(grid, tmp_path / "trained"))["svd-llm+distill 0.3"]["error"]

    def no_memory(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(calibration, "decompose", no_memory)
    compressed = by_name(run_grid(make_grid(place, ["svd"]), tmp_path / "compressed"))["svd 0.3"]["error"]
    monkeypatch.setattr("svdllm.common.memory.available_bytes", lambda: 0)
    planned = by_name(run_grid(make_grid(place, ["svd"]), tmp_path / "planned"))["svd 0.3"]["error"]
    assert compressed["message"].startswith("Out of memory (MemoryError). When there is more memory")
    assert re.match(r"At its peak .* cpu\. When there is more memory", planned["message"])
    assert re.match(
        r"Weights, .* of --method distill need more than .* cpu\. When there is more memory", trained["message"]
    )
    for error, setting in ((compressed, "batch_tokens"), (planned, "batch_tokens"), (trained, "micro_batch")):
        assert (error["type"], error["exit_code"]) == ("ResourceError", 4)
        assert setting in error["message"]
        assert not re.search("--(no-resume|batch-tokens|micro-batch|samples)", error["message"])


def written(grid: Grid, records: list[dict[str, Any]], folder: Path) -> tuple[str, str, Any]:
    write_report(GridReport(grid=grid, records=records, command="svdllm compare ..."), folder)
    page, markdown, document = ((folder / f"report.{kind}").read_text() for kind in ("html", "md", "json"))
    return page, markdown, json.loads(document)


def test_the_report_is_one_page_without_a_network(made: Any, tmp_path: Path) -> None:
    grid, _, records = made
    page, markdown, document = written(grid, records, tmp_path)
    assert all(source.startswith("data:") for source in re.findall(r'(?:src|href)="([^"]*)"', page))
    assert "http" not in re.sub(r'"data:[^"]*"', "", page)
    rows = [row for record in records for row in record["perplexity"].values()]
    assert {len(row["window_nll"]) for row in rows} == {6}
    short = [{key: value for key, value in row.items() if key != "window_nll"} for row in rows]
    assert [row for cell in document["cells"] for row in cell["perplexity"].values()] == short
    assert [cell | {"perplexity": 0} for cell in document["cells"]] == [r | {"perplexity": 0} for r in records]
    assert "text.txt, ln(ppl / dense) ↓" in markdown
    for record in records:
        shown = perplexity_text(next(iter(record["perplexity"].values()))["perplexity"])
        assert shown in page
        assert shown in markdown
    for figure in re.findall(r"\((figures/[^)]*)\)", markdown):
        assert (tmp_path / figure).read_text().lstrip().startswith("<?xml")
    assert markdown.count("figures/") == 5
    assert "change against the best of svd at the same ratio, or what part of it is left" in page


def test_tasks_are_those_of_the_model_alone(place: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is in the extra 'eval'")
    data = tmp_path / "data"
    data.mkdir()
    rows = [{"goal": f"count {n}", "sol1": "jump", "sol2": "run fast", "label": n % 2} for n in range(6)]
    (data / "piqa.validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    grid = make_grid(place, ["svd"])
    grid = replace(grid, measures=replace(grid.measures, tasks=("piqa",), task_data=data, limit=5))
    records = run_grid(grid, tmp_path / "r", keep=True)
    for record, model in zip(records, [place / "dense", tmp_path / "r/checkpoints/svd-0.3"], strict=True):
        alone = svdllm.evaluate_tasks(str(model), ["piqa"], task_data=data, limit=5).to_dict()
        assert record["tasks"]["scores"] == alone["scores"]
        assert record["tasks"]["harness"]["config"]["limit"] == 5
    page, _, document = written(grid, records, tmp_path / "r")
    assert "piqa ↑" in page
    assert "harness" not in document["cells"][0]["tasks"]
    with pytest.raises(InputError, match="winogrande"):  # which has no file
        run_grid(replace(grid, measures=replace(grid.measures, tasks=("winogrande",))), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_an_unfinished_grid_says_so(made: Any, tmp_path: Path) -> None:
    grid, _, records = made
    assert "4 of 7 models are not made yet" in written(grid, records[:3], tmp_path)[1]


def cell(variant: str | None, ratio: float | None, ppl: float, acc: float, bleu: float) -> dict[str, Any]:
    def score(task: str, metric: str, value: float) -> dict[str, Any]:
        return {"task": task, "main": {"name": metric, "value": value, "stderr": 0.03, "higher_is_better": True}}

    return {
        "name": f"{variant} {ratio}",
        "variant": variant,
        "ratio": ratio,
        "status": "done",
        "params": 1.35e8,
        "weight_bytes": 5e8,
        "perplexity": {"a/wiki.txt": {"perplexity": ppl, "stderr": ppl / 10}},
        "tasks": {
            "scores": [score("piqa", "acc", acc), score("arc", "acc", acc / 2), score("truth", "bleu_acc", bleu)]
        },
    }


def test_the_table_is_in_the_layout_of_the_papers_first() -> None:
    records = [
        cell(None, None, 36.0, 0.6, 0.3),
        cell("svd", 0.2, 2.2e7, 0.4, 0.1),
        cell("asvd", 0.2, 400.0, 0.5, 0.2),
        cell("svd-llm", 0.2, 100.0, 0.55, 0.15),
        {
            "name": "balanced 0.2",
            "variant": "balanced",
            "ratio": 0.2,
            "status": "failed",
            "error": {"type": "X", "message": "y"},
        },
    ]
    columns = columns_of(records)
    assert [column.heading for column in columns] == ["wiki.txt ↓", "piqa ↑", "arc ↑", "average ↑", "truth ↑"]
    dense, group = groups_of(records, columns)
    assert (dense.title, group.title) == ("0 %", "20 %")
    assert not any(entry.best or entry.gain for entry in dense.rows[0].entries)
    svd, asvd, ours, failed = group.rows
    assert [entry.text for entry in svd.entries] == ["2.2e7", "0.400", "0.200", "0.300", "0.100"]
    assert [entry.best for entry in ours.entries] == [True, True, True, True, False]
    assert [entry.gain for entry in ours.entries] == ["(↓75%)", "", "", "(↑10%)", "(-0.050)"]
    assert [entry.is_gain for entry in ours.entries] == [True, False, False, True, False]
    assert asvd.entries[4].best
    assert not any(entry.gain for entry in asvd.entries)
    assert ours.entries[3].stderr == "± 0.021"  # of the mean of two independent errors of 0.03
    assert failed.error == "X: y"


def test_error_bars_are_of_the_log_likelihood() -> None:
    down, up = _errors([{"perplexity": 100.0, "stderr": 50.0}, {"perplexity": 3.0, "stderr": None}])
    assert [100 - down[0], 100 + up[0]] == pytest.approx([100 * math.exp(-0.5), 100 * math.exp(0.5)])
    assert (down[1], up[1]) == (0, 0)


def test_studies_vary_one_thing() -> None:
    calibration = {"samples": 8, "seqlen": 16}
    for name, setting, values in (
        ("samples", "samples", [4, 16]),
        ("seed", "seed", [1, 2]),
        ("data", "calibration", ["c4", "ptb"]),
    ):
        rest = {key: value for key, value in calibration.items() if key != setting}
        variants = study(name, [str(value) for value in values], None, rest, None, teacher="x")
        recipes = [variant.recipe.to_dict() for variant in variants]
        assert [recipe[setting] for recipe in recipes] == values
        assert len({json.dumps(recipe | {setting: None}) for recipe in recipes}) == 1
        assert len({variant.key for variant in variants}) == 2
    orders = study("order", [], None, calibration, {"data": "python-docs"}, teacher="x")
    assert [variant.recovery.order for variant in orders if isinstance(variant, Trained)] == [
        "u-first",
        "v-first",
        "joint",
    ]
    assert len({variant.key for variant in orders}) == 1
    assert {variant.base.name for variant in orders if variant.base} == {"svd-llm"}
    parts = study("parts", [], None, calibration, {"data": "python-docs"}, teacher="x")
    assert [variant.name for variant in parts] == ["asvd", "svd-llm", "svd+sequential-lora", LORA]


def test_models_are_trained_where_they_are_compressed(place: Path, tmp_path: Path) -> None:
    def devices(calibration: dict[str, Any], **settings: Any) -> list[str]:
        methods = [LORA, "svd-llm+blockwise+distill"]
        variants = variants_of(methods, calibration, {"data": "python-docs", **settings}, teacher="x")
        variants += study("order", ["joint"], None, calibration, {"data": "python-docs", **settings}, teacher="x")
        return [variant.recovery.device for variant in variants if isinstance(variant, Trained)]

    assert devices({}) == ["auto"] * 3
    assert devices({"device": "cuda:1"}) == ["cuda:1"] * 3
    assert devices({"device": "cuda:1"}, device="cpu") == ["cpu"] * 3
    text = place / "text.txt"
    asked = ["--calib", text, "--samples", 8, "--seqlen", 16, "--ppl", text, "--ppl-seqlen", 16, "--ppl-windows", 2]
    asked += ["--methods", LORA, "--recover", f"data: {text}, steps: 1, seqlen: 16, batch: 2", "--device", "cpu"]
    assert cli("compare", place / "dense", "-o", tmp_path / "r", "--ratios", 0.3, "--new-tokens", 0, *asked) == 0
    (record,) = (json.loads(file.read_text()) for file in (tmp_path / "r" / "cells").glob(f"{LORA}*"))
    assert record["recovery"][0]["settings"]["device"] == "cpu"


def test_texts_may_be_paths(place: Path, tmp_path: Path) -> None:
    text = str(place / "text.txt")
    variants = study("data", [text], None, {"samples": 4, "seqlen": 16}, None, teacher="x")
    grid = replace(make_grid(place, ["svd"]), variants=variants)
    before = sorted(place.iterdir())
    records = run_grid(grid, tmp_path / "r")
    assert [record["status"] for record in records] == ["done", "done"]
    assert sorted(place.iterdir()) == before
    assert len(list((tmp_path / "r" / "spectra").iterdir())) == 1
    page, _, _ = written(grid, records, tmp_path / "r")
    assert f"4 windows of 16 tokens of {text}" in page


def cli(*arguments: object) -> int:
    with pytest.raises(SystemExit) as done:
        main([str(argument) for argument in arguments])
    return int(done.value.code or 0)


def test_ablate_from_the_command_line(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = place / "text.txt"
    small = ["--calib", text, "--seqlen", 16, "--ppl", text, "--ppl-seqlen", 16, "--ppl-windows", 4, "--offline"]
    asked = ["ablate", place / "dense", "-o", tmp_path / "r", "--study", "samples", "--values", "2,8", *small]
    assert cli(*asked, "--json") == 0
    cells = json.loads(capsys.readouterr().out)["cells"]
    assert [cell["name"] for cell in cells] == ["dense", "samples 2 0.2", "samples 8 0.2"]
    assert (tmp_path / "r" / "figures" / "study.svg").is_file()
    assert cli(*asked) == 0  # nothing is left to do but to show it
    assert "samples 8" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "svdllm"], "Unknown method 'svdllm', did you mean 'svd-llm'? Known are svd,"),
        (["--methods", "svd,svd"], "Method 'svd' is given twice"),
        (["--methods", "svd-llm+lora"], "Unknown method 'svd-llm+lora', did you mean 'sequential-lora'?"),
        (["--methods", LORA], "needs data to learn from"),
        (["--methods", "svd", "--recover", "data: x.txt"], "no method is trained"),
        (["--methods", LORA, "--recover", "data: python-docs, stps: 3"], "stps"),
        (["--methods", LORA, "--recover", "data: nowhere.json"], "nowhere.json"),
        (["--methods", LORA, "--recover", "data: python-docs, device: cuda:77"], "cuda:77"),
        (["--ratios", "0.2,2"], "--ratios '2' is not a ratio"),
        (["--ratios", "0.2,0.2"], "names a ratio twice"),
        (["--ppl", "nowhere.txt"], "nowhere.txt"),
        (["--limit", "3"], "do nothing without --tasks"),
        (["--prompts", "nowhere.txt"], "--prompts nowhere.txt cannot be read"),
        (["--ppl", "none", "--new-tokens", "0"], "Nothing to measure"),
        (["--seqlen", "4096"], "4096"),
        (["--ppl-seqlen", "4096"], "4096"),
        (["--prompts", "x.txt", "--new-tokens", "0"], "--prompts does nothing"),
        (
            ["--methods", LORA, "--recover", "data: python-docs, methods: [distill]"],
            "write methods of training behind the method",
        ),
    ],
)
def test_mistakes_are_found_before_any_work(
    arguments: list[str], message: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "report"
    given = ["--calib", place / "text.txt", "--samples", 8, "--seqlen", 16, "--offline", "--ppl-seqlen", 32, *arguments]
    assert cli("compare", place / "dense", "-o", output, *given) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not output.exists()


def test_nothing_is_written_into_a_folder_of_others(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.txt").write_text("x")
    assert cli("compare", place / "dense", "-o", tmp_path, "--methods", "svd") == 2
    assert "is no report of an earlier run" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--study", "samples", "--samples", 8], "Study samples varies samples"),
        (["--study", "samples", "--values", "4,4"], "give each method and value once"),
        (["--study", "samples", "--values", "some"], "'some' is not a whole number"),
        (["--study", "order", "--values", "sideways"], "Unknown order 'sideways'"),
        (["--study", "order", "--recover", "data: python-docs, order: joint"], "leave it out of --recover"),
        (["--study", "seed", "--recover", "data: python-docs"], "trains nothing"),
        (["--study", "parts", "--method", "svd"], "no --method"),
    ],
)
def test_mistakes_in_studies(
    arguments: list[object], message: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--calib", place / "text.txt", "--seqlen", 16, "--ppl-seqlen", 32, "--offline", *arguments]
    assert cli("ablate", place / "dense", "-o", tmp_path / "r", *given) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "r").exists()


def test_unknown_studies_are_named(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli("ablate", place / "dense", "-o", tmp_path / "r", "--study", "sample") == 2
    assert "Unknown study 'sample', did you mean 'samples'?" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("value", "words"), [(30.0, "(↓70%)"), (120.0, "(↑20%)"), (100.2, "(0%)"), (1.0, "(↓99%)"), (0.02, "(1/5,000)")]
)
def test_changes_in_words(value: float, words: str) -> None:
    assert _relative(value, 100.0) == words
