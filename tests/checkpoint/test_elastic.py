"""Elastic checkpoints: every smaller size is in them, bit for bit what a run of its own makes."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import svdllm
from families import stored_ranks, tiny_model
from runs import TEXT, digests, pairs, run, small_recipe, token_windows
from svdllm.checkpoint.elastic import ELASTIC_FILE
from svdllm.cli import main
from svdllm.compression.ranks import Allocation
from svdllm.compression.recipe_files import make_recipe

LOSS_AWARE = {"metric": "two-sided", "shrinkage": 0.1, "allocation": "loss", "round_to": 2}
# What an elastic checkpoint has of its own, beside the elastic files.
OWN = ("svdllm/recipe.yaml", "svdllm/hashes.json", "README.md", "svdllm/report.json")


def same_model(left: Any, right: Any) -> bool:
    ours, theirs = left.state_dict(), right.state_dict()
    return list(ours) == list(theirs) and all(
        tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]) for name, tensor in ours.items()
    )


@pytest.mark.parametrize(
    ("family", "dtype", "settings"),
    [
        ("llama", torch.float32, {}),
        ("llama", torch.float32, {**LOSS_AWARE, "ignore": ["k_proj"]}),
        ("gpt2", torch.bfloat16, LOSS_AWARE),
        ("qwen2", torch.bfloat16, {"metric": "two-sided", "allocation": "effective-rank", "round_to": 2}),
        ("opt", torch.float16, {"allocation": "v2", "overrides": {"fc1": 0.5, "fc2": 0.0}}),
        ("gemma3_text", torch.float32, {"method": "asvd", "round_to": 2}),
        ("gpt_neox", torch.bfloat16, {"method": "svd"}),
        ("llama", torch.float32, {"method": "asvd", "allocation": "strs", "round_to": 2}),
        ("gpt2", torch.float32, {"method": "svd", "allocation": "strs", "overrides": {"c_fc": 0.4}}),
    ],
)
def test_a_slice_is_the_run_at_its_ratio_byte_for_byte(
    family: str, dtype: torch.dtype, settings: dict[str, Any], tmp_path: Path, tokenizer: Any
) -> None:
    model = tiny_model(family, 0, vocab_size=300).to(dtype)
    model.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    elastic = run(tmp_path / "dense", tmp_path / "elastic", recipe=small_recipe(ratio=0.2, elastic=True, **settings))
    direct = run(tmp_path / "dense", tmp_path / "direct", recipe=small_recipe(ratio=0.5, forms=("pair",), **settings))
    before = digests(tmp_path / "elastic", skip=())
    result = svdllm.slice_checkpoint(tmp_path / "elastic", 0.5, tmp_path / "sliced")
    assert digests(tmp_path / "sliced") == digests(tmp_path / "direct")
    assert digests(tmp_path / "elastic", skip=()) == before
    assert result.plan.forms == direct.plan.forms
    assert [row.loss for row in result.linears] == [row.loss for row in direct.linears]
    assert elastic.plan.sizes.elastic_bytes == (tmp_path / "elastic" / "svdllm" / "elastic.safetensors").stat().st_size
    svdllm.verify(tmp_path / "sliced", "cpu")

    loaded, in_memory = result.load(), svdllm.load_model(tmp_path / "elastic", ratio=0.5)
    assert same_model(in_memory, loaded)
    assert in_memory.config.svdllm == loaded.config.svdllm
    assert in_memory._tp_plan == loaded._tp_plan
    assert in_memory.generation_config.to_dict() == loaded.generation_config.to_dict()
    with torch.no_grad():
        ids = token_windows(2)
        assert torch.equal(in_memory(input_ids=ids).logits, loaded(input_ids=ids).logits)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, dense: Path) -> Path:
    folder = tmp_path_factory.mktemp("elastic") / "whole"
    run(dense, folder, recipe=small_recipe(ratio=0.3, elastic=True, **LOSS_AWARE))
    return folder


@pytest.fixture
def elastic(made: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(made, tmp_path / "elastic"))


def test_an_elastic_checkpoint_is_the_ordinary_one_and_more(dense: Path, made: Path, tmp_path: Path) -> None:
    run(dense, tmp_path / "plain", recipe=small_recipe(ratio=0.3, forms=("pair",), **LOSS_AWARE))
    plain, whole = digests(tmp_path / "plain", skip=OWN), digests(made, skip=OWN)
    assert set(whole) - set(plain) == {ELASTIC_FILE, "svdllm/elastic.safetensors"}
    assert plain.items() <= whole.items()
    assert same_model(AutoModelForCausalLM.from_pretrained(made), svdllm.load_model(tmp_path / "plain"))
    assert {"svdllm/elastic.safetensors", ELASTIC_FILE} <= set(hashes_of(made))
    assert svdllm.verify(made, "cpu")
    svdllm.export_dense(made, tmp_path / "export")
    svdllm.slice_checkpoint(made, 0.3, tmp_path / "same")
    assert digests(tmp_path / "same") == digests(tmp_path / "plain")
    stored = load_file(made / "svdllm" / "elastic.safetensors")
    ranks = stored_ranks(json.loads((made / "config.json").read_text()))
    factors = {name.removesuffix(".svd_u.weight") for name in stored if name.endswith("svd_u.weight")}
    assert factors
    assert not factors & set(ranks)


def test_a_slice_may_be_packed(made: Path, tmp_path: Path) -> None:
    """Larger ranks at the same ratio: the leading parts of the stored pairs, packed."""
    stored = load_file(made / "model.safetensors") | load_file(made / "svdllm" / "elastic.safetensors")
    results = {
        forms: svdllm.slice_checkpoint(made, 0.5, tmp_path / forms[-1], forms=forms)
        for forms in (("pair",), ("pair", "packed"))
    }
    pair, packed = (result.plan for result in results.values())
    assert {chosen.form for chosen in packed.forms.values()} == {"packed"}
    assert packed.achieved_ratio >= 0.5
    sizes = [sum(chosen.size for chosen in plan.forms.values()) for plan in (pair, packed)]
    assert sizes[0] < sizes[1]
    tensors = load_file(tmp_path / "packed" / "model.safetensors")
    entries = json.loads((tmp_path / "packed" / "config.json").read_text())["svdllm"]["forms"]
    for name, chosen in packed.forms.items():
        u_OR, v_RI = (stored[f"{name}.{leaf}.weight"].double() for leaf in ("svd_u", "svd_v"))
        expected = u_OR[:, : chosen.size] @ v_RI[: chosen.size]
        found = multiplied_out({leaf: tensors[f"{name}.{leaf}"] for leaf in PACKED_TENSORS}, entries[name]["side"])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    loaded = results["pair", "packed"].load()
    assert loaded.num_parameters() == packed.params
    assert svdllm.verify(tmp_path / "packed", "cpu")
    for forms in (("narrow",), ("pair", "other"), ()):
        with pytest.raises(
            svdllm.InputError, match="an elastic checkpoint holds pairs; give pair, packed or pair,packed"
        ):
            svdllm.slice_checkpoint(made, 0.5, tmp_path / "other", forms=forms)
    assert not (tmp_path / "other").exists()


PACKED_TENSORS = ("svd_v.weight", "svd_u.weight", "order")


def multiplied_out(packed: dict[str, Any], side: str) -> torch.Tensor:
    """The matrix of packed factors, by the formula of docs/checkpoint.md."""
    svd_v, svd_u, order = (packed[leaf] for leaf in PACKED_TENSORS)
    svd_v, svd_u, one = svd_v.double(), svd_u.double(), torch.eye(len(svd_v), dtype=torch.float64)
    if side == "rows":
        return torch.cat((one, svd_u))[order.long()] @ svd_v
    product = torch.empty(len(svd_u), len(order), dtype=torch.float64)
    product[:, order.long()] = svd_u @ torch.cat((one, svd_v), dim=1)
    return product


def hashes_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "svdllm" / "hashes.json").read_text())["files"]


def test_several_files_in_the_order_of_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model("llama", 0).save_pretrained(tmp_path / "dense", max_shard_size="20KB")
    monkeypatch.setattr("svdllm.checkpoint.shards.SHARD_BYTES", 15_000)
    whole = run(tmp_path / "dense", tmp_path / "elastic", recipe=small_recipe(ratio=0.2, elastic=True, **LOSS_AWARE))
    run(tmp_path / "dense", tmp_path / "direct", recipe=small_recipe(ratio=0.5, forms=("pair",), **LOSS_AWARE))
    files = sorted((tmp_path / "elastic" / "svdllm").glob("elastic-*.safetensors"))
    assert len(files) > 1
    assert whole.plan.sizes.elastic_bytes <= sum(file.stat().st_size for file in files)
    svdllm.slice_checkpoint(tmp_path / "elastic", 0.5, tmp_path / "sliced")
    assert len(list((tmp_path / "sliced").glob("model-*.safetensors"))) > 1
    assert digests(tmp_path / "sliced") == digests(tmp_path / "direct")


def test_a_model_in_memory_with_its_tokenizer(tmp_path: Path, tokenizer: Any) -> None:
    model = tiny_model("gpt2", 0, vocab_size=300)
    for name, ratio, elastic in (("elastic", 0.2, True), ("direct", 0.4, False)):
        recipe = small_recipe(ratio=ratio, elastic=elastic, forms=("pair",))
        run(model, tmp_path / name, recipe=recipe, tokenizer=tokenizer)
    svdllm.slice_checkpoint(tmp_path / "elastic", 0.4, tmp_path / "sliced")
    assert digests(tmp_path / "sliced") == digests(tmp_path / "direct")


def test_loading_options_are_from_pretraineds(made: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device_map": "cpu", "attn_implementation": "eager"}
    model = svdllm.load_model(made, ratio=0.5, **options)
    svdllm.slice_checkpoint(made, 0.5, tmp_path / "sliced")
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"
    assert same_model(model, svdllm.load_model(tmp_path / "sliced", **options))
    model.save_pretrained(tmp_path / "saved")
    assert same_model(model, AutoModelForCausalLM.from_pretrained(tmp_path / "saved"))
    _, info = svdllm.load_model(made, ratio=0.5, output_loading_info=True)  # type: ignore[misc]
    assert not info["missing_keys"]


def test_the_report_tells_where_a_slice_is_from(made: Path, tmp_path: Path) -> None:
    svdllm.slice_checkpoint(made, 0.5, tmp_path / "sliced")
    whole, sliced = (
        json.loads((folder / "svdllm" / "report.json").read_text()) for folder in (made, tmp_path / "sliced")
    )
    assert sliced["sliced_from"] == {"ratio": 0.3}
    assert (sliced["recipe"]["ratio"], sliced["recipe"]["elastic"]) == (0.5, False)
    assert sliced["elastic_bytes"] == 0 < whole["elastic_bytes"]
    assert (sliced["source"], sliced["versions"]) == (whole["source"], whole["versions"])
    assert {row["name"]: row["seconds"] for row in sliced["linears"]} == {
        row["name"]: row["seconds"] for row in whole["linears"]
    }
    assert "svdllm slice" in (made / "README.md").read_text()
    assert "svdllm slice" not in (tmp_path / "sliced" / "README.md").read_text()


@pytest.mark.parametrize("allocation", ["uniform", "v2", "effective-rank", "loss", "strs"])
def test_the_plan_counts_the_elastic_files(allocation: str, dense: Path, tmp_path: Path) -> None:
    recipe = small_recipe(ratio=0.2, elastic=True, allocation=allocation, round_to=2)
    (planned,) = svdllm.plan(dense, recipe)
    result = run(dense, tmp_path / "out", recipe=recipe)
    actual = (tmp_path / "out" / "svdllm" / "elastic.safetensors").stat().st_size
    predicted = planned.sizes.elastic_bytes
    assert result.plan.sizes.elastic_bytes == actual
    assert predicted == actual if allocation in ("uniform", "v2") else predicted >= actual
    (plain,) = svdllm.plan(dense, recipe.model_copy(update={"elastic": False, "forms": recipe.used_forms}))
    assert planned.needs.disk_bytes == plain.needs.disk_bytes + predicted
    assert plain.sizes.elastic_bytes == 0


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"ratio": [0.2, 0.4]}, r"2 ratios are given; give the smallest \(0.2\) and slice the others"),
        ({"target_params": 10**6}, "the budget is target_params; give a ratio"),
        ({"target_size": 10**6}, "the budget is target_size; give a ratio"),
        ({"ranks": {"q_proj": 8}}, "the budget is ranks; give a ratio"),
        ({"ratio": 0.2, "calibration_mode": "sequential"}, "a sequential calibration fits the factors of every size"),
    ],
)
def test_what_is_not_nested_is_refused(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(svdllm.InputError, match=f"every smaller ratio is sliced, but {reason}"):
        make_recipe(settings | {"elastic": True})


@pytest.mark.parametrize(
    ("ratio", "message"),
    [
        (
            0.2,
            r"holds models of ratio 0\.3 or more; ratio 0\.2 is a larger model.*compress with --ratio 0\.2 --elastic",
        ),
        (0.0, r"ratio 0\.0 is not between 0 and 1"),
        (1.0, r"ratio 1\.0 is not between 0 and 1"),
        (40, "ratio 40 is not between 0 and 1"),
        (float("nan"), "ratio nan is not between 0 and 1"),
        (0.999, "cannot be met"),
    ],
)
def test_ratios_that_are_not_in_it(ratio: float, message: str, made: Path, tmp_path: Path) -> None:
    with pytest.raises(svdllm.InputError, match=message):
        svdllm.slice_checkpoint(made, ratio, tmp_path / "out")
    with pytest.raises(svdllm.InputError, match=message):
        svdllm.load_model(made, ratio=ratio)
    assert list(tmp_path.iterdir()) == []


def test_folders_that_cannot_be_sliced(dense: Path, made: Path, tmp_path: Path) -> None:
    run(dense, tmp_path / "plain")
    svdllm.load_model(made).save_pretrained(tmp_path / "saved")
    shutil.copytree(
        made / "svdllm",
        tmp_path / "saved" / "svdllm",
        ignore=shutil.ignore_patterns("elastic*", "hashes*"),
        dirs_exist_ok=True,
    )
    for name in ("plain", "saved"):
        with pytest.raises(svdllm.InputError, match=r"is not elastic: it has no svdllm/elastic\.json.*--elastic"):
            svdllm.slice_checkpoint(tmp_path / name, 0.5, tmp_path / "out")
    with pytest.raises(svdllm.InputError, match="is not an svdllm checkpoint"):
        svdllm.slice_checkpoint(dense, 0.5, tmp_path / "out")
    with pytest.raises(
        svdllm.InputError, match=r"is not a folder\. Download the whole repository of a model on the hub"
    ):
        svdllm.load_model("owner/name", ratio=0.5)
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten(made: Path, tmp_path: Path) -> None:
    for name in ("out", "other.writing"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.tex").write_text("years of work")
    with pytest.raises(svdllm.InputError, match="out exists and is a folder with other things in it"):
        svdllm.slice_checkpoint(made, 0.5, tmp_path / "out")
    with pytest.raises(svdllm.InputError, match=r"other\.writing is in the way"):
        svdllm.slice_checkpoint(made, 0.5, tmp_path / "other")
    with pytest.raises(svdllm.InputError, match="is a finished checkpoint; nothing is overwritten"):
        svdllm.slice_checkpoint(made, 0.5, made)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["other.writing", "out", "thesis.tex", "thesis.tex"]


@pytest.mark.parametrize(
    ("error", "kind"),
    [(KeyboardInterrupt(), KeyboardInterrupt), (OSError(28, "No space left on device"), svdllm.ResourceError)],
)
def test_an_interrupted_slice_leaves_nothing(
    error: BaseException, kind: type[BaseException], made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        assert (tmp_path / "out.writing" / "model.safetensors").is_file()
        raise error

    monkeypatch.setattr("svdllm.compression.slice.finish_checkpoint", stop)
    with pytest.raises(kind):
        svdllm.slice_checkpoint(made, 0.5, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_rank_more_than_is_held_is_one_too_many(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = stored_ranks(json.loads((made / "config.json").read_text()))
    first, rank = next(iter(ranks.items()))
    for wanted in (rank + 1, rank):
        allocation = Allocation(pairs(ranks | {first: wanted}))
        monkeypatch.setattr(sys.modules["svdllm.compression.plan"], "choose_forms", lambda *_, of=allocation: of)
        if wanted == rank:
            svdllm.slice_checkpoint(made, 0.31, tmp_path / "out")
        else:
            with pytest.raises(svdllm.InputError, match=rf"{first} is stored at rank {rank}, wanted {rank + 1}\. The"):
                svdllm.slice_checkpoint(made, 0.31, tmp_path / "out")


def test_ranks_that_are_not_stored_are_refused(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = stored_ranks(json.loads((made / "config.json").read_text()))
    (first, rank), *_, (last, _) = ranks.items()

    def allocate(wanted: dict[str, int]) -> None:
        monkeypatch.setattr(
            sys.modules["svdllm.compression.plan"], "choose_forms", lambda *_: Allocation(pairs(wanted))
        )

    allocate(ranks | {first: rank + 4})
    with pytest.raises(
        svdllm.InputError, match=rf"{first} is stored at rank {rank}, wanted {rank + 4}\. The best ranks"
    ):
        svdllm.slice_checkpoint(made, 0.31, tmp_path / "out")
    allocate({name: kept for name, kept in ranks.items() if name not in (first, last)})
    with pytest.raises(svdllm.InputError, match=rf"{first} is stored at rank {rank}, wanted dense \(and 1 more\)"):
        svdllm.load_model(made, ratio=0.31)
    assert list(tmp_path.iterdir()) == []


def flip_last_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize("name", ["svdllm/elastic.safetensors", ELASTIC_FILE, "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("damage", [flip_last_byte, cut_short, Path.unlink])
def test_damage_is_found(name: str, damage: Callable[[Path], None], elastic: Path, tmp_path: Path) -> None:
    damage(elastic / name)
    message = "is not elastic" if (name, damage) == (ELASTIC_FILE, Path.unlink) else name
    for use in (
        lambda: svdllm.slice_checkpoint(elastic, 0.5, tmp_path / "out"),
        lambda: svdllm.load_model(elastic, ratio=0.5),
    ):
        with pytest.raises(svdllm.InputError, match=message):
            use()
    with pytest.raises(svdllm.CheckpointError, match=name):
        svdllm.verify(elastic, "cpu")
    if name.startswith("svdllm/"):
        svdllm.load_model(elastic)  # which needs none of it
    assert not (tmp_path / "out").exists()


def test_damage_without_the_comparison_of_hashes(elastic: Path) -> None:
    cut_short(elastic / "svdllm" / "elastic.safetensors")
    with pytest.raises(svdllm.CheckpointError, match=r"elastic\.safetensors is truncated or damaged"):
        svdllm.load_model(elastic, ratio=0.5, check_integrity=False)
    (elastic / "svdllm" / "elastic.safetensors").unlink()
    with pytest.raises(svdllm.CheckpointError, match=r"\.energies is missing"):
        svdllm.load_model(elastic, ratio=0.5, check_integrity=False)
    content = json.loads((elastic / ELASTIC_FILE).read_text())
    (elastic / ELASTIC_FILE).write_text(json.dumps(content | {"format_version": 99}))
    with pytest.raises(svdllm.CheckpointError, match="has format_version 99, this version of svdllm reads 2"):
        svdllm.load_model(elastic, ratio=0.5, check_integrity=False)
    (elastic / ELASTIC_FILE).write_text(json.dumps({"format_version": 2}))
    with pytest.raises(svdllm.CheckpointError, match=r"elastic\.json is damaged"):
        svdllm.load_model(elastic, ratio=0.5, check_integrity=False)


def test_weights_that_were_trained_since_are_refused(elastic: Path, tmp_path: Path) -> None:
    model = svdllm.load_model(elastic)
    with torch.no_grad():
        next(iter(model.parameters())).add_(1)
    model.save_pretrained(elastic)
    with pytest.raises(svdllm.CheckpointError, match="do not belong to its elastic files"):
        svdllm.slice_checkpoint(elastic, 0.5, tmp_path / "out")
    (elastic / "svdllm" / "hashes.json").unlink()
    with pytest.raises(svdllm.CheckpointError, match=r"has no svdllm/hashes\.json: its files cannot be checked"):
        svdllm.slice_checkpoint(elastic, 0.5, tmp_path / "out")
    recipe = elastic / "svdllm" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("elastic: true", "elastic: false"))
    with pytest.raises(svdllm.CheckpointError, match="does not belong to an elastic checkpoint"):
        svdllm.load_model(elastic, ratio=0.5, check_integrity=False)


def cli(*arguments: object) -> int:
    with pytest.raises(SystemExit) as done:
        main([str(argument) for argument in arguments])
    return int(done.value.code or 0)


def test_command_line(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    settings = ["--ratio", "0.3", "--samples", "8", "--seqlen", "16", "--round-to", "2", "--elastic"]
    assert cli("plan", dense, *settings) == 0
    assert "elastic files" in capsys.readouterr().out
    assert cli("compress", dense, "-o", tmp_path / "out", "--calib", tmp_path / "text.txt", *settings) == 0
    printed = capsys.readouterr().out
    assert "elastic files" in printed
    assert "svdllm slice" in printed
    assert cli("slice", tmp_path / "out", "--ratio", "0.5", "-o", tmp_path / "half") == 0
    printed = capsys.readouterr().out
    for word in (str(tmp_path / "half"), "weight files", "kept energy"):
        assert word in printed.replace("\n", "")
    assert cli("slice", tmp_path / "out", "--ratio", "0.6", "-o", tmp_path / "less", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["output_dir"] == str(tmp_path / "less")
    assert document["achieved_ratio"] >= 0.6
    assert document["recipe"]["ratio"] == 0.6
    assert cli("inspect", tmp_path / "less") == 0
    assert "an elastic checkpoint of ratio 0.3" in capsys.readouterr().out
    assert cli("verify", tmp_path / "less", "--device", "cpu") == 0
    assert cli("slice", tmp_path / "less", "--ratio", "0.7", "-o", tmp_path / "no") == 2
    assert "is not elastic" in capsys.readouterr().err
    assert cli("slice", tmp_path / "out", "--ratio", "0.5", "-o", tmp_path / "half") == 2
    assert "nothing is overwritten" in capsys.readouterr().err
    assert cli("slice", tmp_path / "out", "--ratio", "half", "-o", tmp_path / "no") == 2
    assert cli("slice", tmp_path / "out", "--ratio", "0.5", "-o", tmp_path / "no", "--device", "cuda:9") == 2
    assert "is not available here" in capsys.readouterr().err
    assert cli("compress", dense, "-o", tmp_path / "no", "--ratio", "0.2,0.4", "--elastic") == 2
    assert "2 ratios are given; give the smallest (0.2)" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
