"""The command line as a user meets it: what it prints, how it exits, what a mistake costs."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import svdllm.cli
from families import tiny_model
from runs import TEXT
from svdllm.cli import main
from svdllm.common.errors import NumericalError


@pytest.fixture(scope="session")
def compressed(tmp_path_factory: pytest.TempPathFactory, dense: Path, text: Path) -> Path:
    folder = tmp_path_factory.mktemp("out") / "small"
    with pytest.raises(SystemExit) as done:
        main(["compress", str(dense), "-o", str(folder), "--ratio", "0.3", "--calib", str(text), *SMALL])
    assert done.value.code == 0
    return folder


SMALL = ["--preset", "paper", "--samples", "8", "--seqlen", "16"]


def cli(*arguments: object) -> int:
    with pytest.raises(SystemExit) as done:
        main([str(argument) for argument in arguments])
    return int(done.value.code or 0)


def test_plan_agrees_with_what_compress_makes(
    dense: Path, compressed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli("plan", dense, "--ratio", "0.3", *SMALL, "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["file_bytes"] == (compressed / "model.safetensors").stat().st_size
    assert plan["params"] == AutoModelForCausalLM.from_pretrained(compressed).num_parameters()
    assert plan["achieved_ratio"] >= 0.3
    assert cli("plan", dense, "--ratio", "0.3", *SMALL) == 0
    printed = capsys.readouterr().out
    for word in ("mlp.down_proj", "peak memory", "disk", "time", "weight files"):
        assert word in printed


def test_plan_reads_only_the_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A 70B model is planned from its config alone, in the time of a small one."""
    config = AutoConfig.for_model(
        "llama",
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    snapshot = fake_hub_repository(tmp_path, "owner/giant")
    config.save_pretrained(snapshot)
    assert cli("plan", "owner/giant", "--ratio", "0.2", "--json", "--offline") == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["dense_params"] == 70_553_706_496
    assert plan["dtype"] == "bfloat16"
    assert plan["ram_by_stage"]["analyze"] < 60e9


@pytest.fixture(autouse=True)
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def fake_hub_repository(tmp_path: Path, name: str) -> Path:
    """The cache as a download leaves it."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    return snapshot


def test_hub_id_from_the_cache(dense: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    snapshot = fake_hub_repository(tmp_path, "owner/tiny")
    shutil.copytree(dense, snapshot, dirs_exist_ok=True)
    out = tmp_path / "out"
    assert cli("compress", "owner/tiny", "-o", out, "--ratio", "0.3", "--calib", text, *SMALL, "--offline") == 0
    source = json.loads((out / "config.json").read_text())["svdllm"]["source"]
    assert (source["id"], source["revision"]) == ("owner/tiny", snapshot.name)
    capsys.readouterr()
    assert cli("eval", "owner/tiny", "--ppl", text, "--seqlen", "32", "--offline", "--json") == 0
    assert json.loads(capsys.readouterr().out)["results"][0]["perplexity"] > 1


def test_compress_prints_a_summary_and_json(
    dense: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("compress", dense, "--ratio", "0.2,0.4", "--calib", text, *SMALL)
    assert cli(*arguments, "-o", tmp_path / "a") == 0
    printed = capsys.readouterr()
    assert "ratio-0.4" in printed.out.replace("\n", "")
    assert "svdllm eval" in printed.out
    assert "analyze ..." in printed.err
    assert len(printed.err.splitlines()) < 10
    assert cli(*arguments, "-o", tmp_path / "b", "--json") == 0
    both = json.loads(capsys.readouterr().out)
    assert [entry["recipe"]["ratio"] for entry in both] == [0.2, 0.4]
    assert all(entry["peak_ram_bytes"] > 0 for entry in both)


def test_eval_shows_the_base_beside_it(
    dense: Path, compressed: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("eval", compressed, "--base", dense, "--ppl", text, "--seqlen", "32", "--max-windows", "4")
    assert cli(*arguments, "--json") == 0
    ours, base = json.loads(capsys.readouterr().out)["results"]
    assert ours["params"] < base["params"]
    assert ours["num_tokens"] == base["num_tokens"] == 4 * 31
    assert ours["weight_bytes"] < base["weight_bytes"]
    assert (ours["protocol"], ours["begins_with_bos"]) == ("windows", False)
    assert cli(*arguments) == 0
    assert "protocol windows: 4 windows of 32 tokens, no BOS" in capsys.readouterr().out


def test_eval_of_several_texts_by_another_protocol(
    dense: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.txt"
    other.write_text(TEXT[:500])
    arguments = ("--seqlen", "32", "--protocol", "rolling", "--output", tmp_path / "kept.json", "--json")
    assert cli("eval", dense, "--ppl", f"{text},{other}", *arguments) == 0
    document = json.loads(capsys.readouterr().out)
    assert [row["text"] for row in document["results"]] == [str(text), str(other)]
    assert {row["protocol"] for row in document["results"]} == {"rolling"}
    assert document["tasks"] == document["comparison"] == []
    assert json.loads((tmp_path / "kept.json").read_text()) == document
    assert cli("eval", dense, "--ppl", f"{text}:0.5,{other}:0.5", "--seqlen", "32") == 2
    assert "a mixture, which has no perplexity of its own" in capsys.readouterr().err


def test_inspect_verify_export(compressed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli("inspect", compressed) == 0
    assert "model.layers.*.mlp.up_proj" in capsys.readouterr().out
    assert cli("inspect", compressed, "--linears", "--json") == 0
    assert len(json.loads(capsys.readouterr().out)["linears"]) == 14
    assert cli("verify", compressed) == 0
    assert "logits" in capsys.readouterr().out
    assert cli("export", compressed, "-o", tmp_path / "plain", "--format", "dense") == 0
    assert AutoConfig.from_pretrained(tmp_path / "plain").model_type == "llama"
    assert (tmp_path / "plain" / "tokenizer.json").is_file()
    assert cli("export", compressed, "-o", tmp_path / "plain") == 2


def test_a_recipe_file_is_overridden_by_flags(
    dense: Path, compressed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = compressed / "svdllm" / "recipe.yaml"
    assert cli("plan", dense, "--recipe", recipe, "--target-params", "20K", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["params"] <= 20_000 < plan["dense_params"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--ratio", "0"], "--ratio '0' is not a ratio: expected a number above 0 and below 1"),
        (["--ratio", "1"], "--ratio '1' is not a ratio"),
        (["--ratio", "-0.2"], "--ratio '-0.2' is not a ratio"),
        (["--ratio", "much"], "--ratio 'much' is not a ratio"),
        (["--ratio", "nan"], "--ratio 'nan' is not a ratio"),
        (["--ratio", "0.2,0.2"], "names a value twice"),
        ([], "exactly one of --ratio"),
        (["--ratio", "0.2", "--target-params", "20K"], "exactly one budget"),
        (["--target-size", "lots"], "--target-size 'lots' is not an amount"),
        (["--target-size", "1TB"], "nothing to compress"),
        (["--target-params", "5K"], "cannot be met"),
        (["--ratio", "0.99"], "leaves rank 0"),
        (["--ratio", "0.3", "--round-to", "64"], "ranks are multiples of 64"),
        (["--ratio", "0.3", "--method", "svdllm"], "unknown method 'svdllm'; known are svd-llm"),
        (["--ratio", "0.3", "--calib", "wikitxt2"], "wikitext2"),
        (["--ratio", "0.3", "--calib", "missing.txt"], "missing.txt"),
        (["--ratio", "0.3", "--ignore", "nothing_like_this"], "matches none"),
        (["--ratio", "0.3", "--ignore", "("], "not a regular expression"),
        (["--ratio", "0.3", "--override", "mlp"], "not of the form REGEX=RATIO"),
        (["--ratio", "0.3", "--override", "mlp=2"], "is not a ratio"),
        (["--ratio", "0.3", "--device", "cuda:99"], "is not available here; there is cpu"),
        (
            ["--ratio", "0.3", "--seqlen", "100"],
            "--seqlen 100 is beyond the model's context of 64 tokens: lower it to 64 or less",
        ),
        (["--ratio", "0.3", "--samples", "0"], "samples: Input should be greater than or equal to 1"),
        (["--ratio", "0.3", "--recipe", "no-such.yaml"], "no-such.yaml cannot be read"),
        (["--ratio", "0.3", "--preset", "fast"], "Unknown preset 'fast'"),
        (["--ratio", "0.3", "--dtype", "int8"], "dtype"),
    ],
)
def test_bad_options(
    arguments: list[str], said: str, dense: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calibration = [] if "--calib" in arguments else ["--calib", str(text)]
    defaults = [] if "--samples" in arguments or "--seqlen" in arguments else SMALL
    code = cli("compress", dense, "-o", tmp_path / "out", *calibration, *defaults, *arguments)
    printed = capsys.readouterr()
    assert said in " ".join(printed.err.split())
    assert code == 2
    assert "Traceback" not in printed.err
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_bad_texts(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes("Käse".encode("latin-1"))
    (tmp_path / "short.txt").write_text("too short")
    for name, said in (("empty.txt", "empty"), ("latin.txt", "UTF-8"), ("short.txt", "tokens")):
        out = tmp_path / "out"
        assert cli("compress", dense, "-o", out, "--ratio", "0.3", "--calib", tmp_path / name, *SMALL) == 2
        message = capsys.readouterr().err
        assert name in message
        assert said in message
        assert not out.exists()
        assert not (tmp_path / "out.partial").exists()


def test_bad_models(dense: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def failing(model: object, *more: str) -> tuple[int, str]:
        common = ("--ratio", "0.3", "--calib", text, *SMALL, *more)
        code = cli("compress", model, "-o", tmp_path / "out", *common)
        printed = capsys.readouterr().err
        assert "Traceback" not in printed
        assert not (tmp_path / "out").exists()
        assert not (tmp_path / "out.partial").exists()
        return code, " ".join(printed.split())

    assert failing(tmp_path / "nowhere")[0] == 2
    code, message = failing("nobody/nothing", "--offline")
    assert code == 2
    assert "No such model: nobody/nothing" in message

    bert = tmp_path / "bert"
    AutoConfig.for_model("bert", architectures=["BertForMaskedLM"]).save_pretrained(bert)
    code, message = failing(bert)
    assert code == 3
    assert "is not a causal language model: its architecture is BertForMaskedLM" in message
    AutoConfig.for_model("t5", architectures=["T5ForConditionalGeneration"]).save_pretrained(bert)
    assert failing(bert)[0] == 3

    (tmp_path / "empty").mkdir()
    code, message = failing(tmp_path / "empty")
    assert code == 2
    assert "no config.json" in message

    moe = shutil.copytree(dense, tmp_path / "moe")
    tiny_model("dbrx").save_pretrained(moe)
    code, message = failing(moe)
    assert code == 3
    assert "parameters in the blocks of DbrxForCausalLM are linears that can" in message
    assert "Pass --allow-partial" in message

    pickled = shutil.copytree(dense, tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    code, message = failing(pickled)
    assert code == 3
    assert "pickled files are never read" in message

    poisoned = shutil.copytree(dense, tmp_path / "poisoned")
    tensors = load_file(poisoned / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, poisoned / "model.safetensors", metadata={"format": "pt"})
    code, message = failing(poisoned)
    assert code == 5
    assert "model.layers.1.mlp.up_proj.weight has 1 values" in message

    cut = shutil.copytree(dense, tmp_path / "cut")
    os.truncate(cut / "model.safetensors", 1000)
    code, message = failing(cut)
    assert code == 2
    assert "model.safetensors in cut is truncated or damaged" in message

    lacking = shutil.copytree(dense, tmp_path / "lacking")
    del (tensors := load_file(dense / "model.safetensors"))["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, lacking / "model.safetensors", metadata={"format": "pt"})
    code, message = failing(lacking)
    assert code == 2
    assert "model.layers.0.mlp.up_proj.weight" in message


def test_compressing_twice_is_refused(
    compressed: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli("compress", compressed, "-o", tmp_path / "out", "--ratio", "0.3", "--calib", text, *SMALL) == 2
    assert "is compressed already; compress its dense source (tiny)" in " ".join(capsys.readouterr().err.split())


def test_a_full_disk_is_seen_beforehand(
    dense: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=10_000))
    out = tmp_path / "out"
    assert cli("compress", dense, "-o", out, "--ratio", "0.3", "--calib", text, *SMALL) == 4
    assert "GB free, the run needs" in " ".join(capsys.readouterr().err.split())
    assert not out.exists()
    assert not (tmp_path / "out.partial").exists()


def test_too_little_memory_is_seen_beforehand(
    dense: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("svdllm.common.memory.available_bytes", lambda: 1000)
    assert cli("compress", dense, "-o", tmp_path / "out", "--ratio", "0.3", "--calib", text, *SMALL) == 4
    said = " ".join(capsys.readouterr().err.split())
    assert "the run needs another" in said
    assert "Lower --batch-tokens" in said
    strs = ("--allocation", "strs", "--probe-share", "0.99", "--samples", "2000", "--ratio", "0.3", "--seqlen", "64")
    assert cli("compress", dense, "-o", tmp_path / "out", "--calib", text, "--method", "asvd", *strs) == 4
    assert "0.00 GB are free on cpu. Lower --probe-share" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("command", ["verify", "inspect", "eval", "export"])
def test_commands_refuse_what_is_no_checkpoint(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = {"eval": ["--ppl", "python-docs"], "export": ["-o", tmp_path / "x"]}.get(command, [])
    assert cli(command, tmp_path, *more) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_tampered_checkpoints_are_named(
    compressed: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flipped = shutil.copytree(compressed, tmp_path / "flipped")
    content = bytearray((flipped / "model.safetensors").read_bytes())
    content[-5] ^= 1
    (flipped / "model.safetensors").write_bytes(content)
    cut = shutil.copytree(compressed, tmp_path / "cut")
    os.truncate(cut / "model.safetensors", len(content) - 4)
    for folder in (flipped, cut):
        for arguments in (
            ("verify", folder),
            ("eval", folder, "--ppl", text, "--seqlen", "32"),
            ("export", folder, "-o", tmp_path / "x"),
        ):
            assert cli(*arguments) == 2
            printed = capsys.readouterr().err
            assert "model.safetensors" in printed
            assert "Traceback" not in printed


def test_a_wrong_model_is_found_by_its_logits(
    compressed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Hashes made anew over an altered file do not fool verify: the logits are compared, too."""
    from svdllm.models.low_rank import write_hashes

    changed = shutil.copytree(compressed, tmp_path / "changed")
    tensors = load_file(changed / "model.safetensors")
    tensors["model.norm.weight"] *= 1.01
    save_file(tensors, changed / "model.safetensors", metadata={"format": "pt"})
    write_hashes(changed)
    assert cli("verify", changed) == 2
    assert "does not compute what was written (svdllm/reference.safetensors): the logits differ" in " ".join(
        capsys.readouterr().err.split()
    )


def test_the_current_folder_is_no_output(
    dense: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for place in (".", "..", "/"):
        assert cli("compress", dense, "-o", place, "--ratio", "0.3", "--calib", text, *SMALL) == 2
    assert [path.name for path in tmp_path.iterdir()] == []


def test_an_edited_config_that_transformers_refuses(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = shutil.copytree(dense, tmp_path / "broken")
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"hidden_size": "many"}))
    assert cli("plan", broken, "--ratio", "0.3") == 3
    assert "The config of" in capsys.readouterr().err


def test_damaged_records_are_named(compressed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damaged = shutil.copytree(compressed, tmp_path / "damaged")
    records = ("report.json", "inspect", "{}"), ("hashes.json", "verify", "{}")
    for name, command, content in (*records, ("hashes.json", "verify", '{"files": ["x"]}')):
        kept = (damaged / "svdllm" / name).read_text()
        (damaged / "svdllm" / name).write_text(content)
        assert cli(command, damaged) == 2
        assert f"svdllm/{name}" in capsys.readouterr().err
        (damaged / "svdllm" / name).write_text(kept)


def test_eval_needs_something_to_measure(dense: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli("eval", dense) == 2
    assert cli("eval", dense, "--ppl", text, "--seqlen", "1") == 2
    assert cli("eval", dense, "--ppl", text, "--seqlen", "100000") == 2
    assert cli("eval", dense, "--ppl", text, "--seqlen", "32", "--max-windows", "0") == 2
    assert cli("eval", dense, "--ppl", text, "--seqlen", "32", "--dtype", "bf16") == 2
    assert "--dtype 'bf16' is unknown" in capsys.readouterr().err


def test_errors_are_json_where_json_was_asked_for(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli("compress", dense, "-o", tmp_path / "out", "--ratio", "7", "--json") == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["type"] == "InputError"
    assert error["exit_code"] == 2


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (MemoryError("no room"), 4, "Out of memory: no room"),
        (torch.OutOfMemoryError("CUDA out of memory.\nA second line"), 4, "Out of memory: CUDA out of memory."),
        (OSError(errno.ENOSPC, "No space left on device", "out.bin"), 4, "No space left on device: out.bin"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), 4, "Disk quota exceeded: a file"),
        (PermissionError(errno.EACCES, "Permission denied", "x.json"), 2, "Permission denied: x.json"),
        (NumericalError("a NaN"), 5, "a NaN"),
    ],
)
def test_memory_disk_and_files_end_with_one_message(
    error: Exception, code: int, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(**_: object) -> None:
        raise error

    monkeypatch.setattr(svdllm.cli, "app", fails)
    assert cli("inspect", "x") == code
    assert capsys.readouterr().err == f"Error: {message}\n"


def test_a_mistake_of_ours_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(**_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(svdllm.cli, "app", fails)
    with pytest.raises(ZeroDivisionError):
        main(["inspect", "x"])


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli("--help") == 0
    assert "Exit codes" in capsys.readouterr().out
    for command in ("plan", "compress", "eval", "inspect", "verify", "export", "demo"):
        assert cli(command, "--help") == 0
        assert len(capsys.readouterr().out) > 300


def test_the_versions_are_those_that_are_imported(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli("--version") == 0
    lines = [f"svdllm {svdllm.__version__}", f"torch {torch.__version__}", f"transformers {transformers.__version__}"]
    assert capsys.readouterr().out.splitlines() == lines


@pytest.mark.parametrize("started", [["-m", "svdllm"], [str(Path(sys.executable).with_name("svdllm"))]])
def test_help_imports_no_torch(started: list[str]) -> None:
    """The list of commands comes at once: what they need is imported when they are called."""
    listing = subprocess.run(
        [sys.executable, "-X", "importtime", *started, "--help"], capture_output=True, text=True, check=True
    )
    assert "compress" in listing.stdout
    imported = {line.rpartition("|")[2].strip() for line in listing.stderr.splitlines()}
    assert "svdllm.cli" in imported
    assert not {"torch", "transformers"} & imported


def test_a_program_that_imports_the_library_has_it_all() -> None:
    """The command line is told by how Python was started; everybody else gets the names and the model types."""
    code = "import svdllm; from transformers import AutoConfig; print(AutoConfig.for_model('svdllm_llama').model_type)"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; svdllm.compress"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip().startswith("svdllm")


@pytest.mark.parametrize("command", ["compress", "plan"])
@pytest.mark.parametrize("flag", [["--calibration", "sequential"], ["--calibration=sequential"]])
def test_a_renamed_flag_says_what_it_is_called_now(
    command: str, flag: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli(command, "model", "-o", tmp_path / "out", "--ratio", "0.3", *flag) == 2
    said = capsys.readouterr().err
    assert said == "Error: --calibration was renamed: use --calibration-mode; the calibration text is --calib.\n"
    assert cli(command, "model", "-o", tmp_path / "out", "--json", *flag) == 2
    assert json.loads(capsys.readouterr().out)["error"]["type"] == "InputError"


def test_a_flag_that_a_command_never_had_is_no_renamed_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli("eval", "model", "--calibration", "sequential") == 2
    assert "No such option: --calibration" in capsys.readouterr().err


def test_a_command_of_compress_with_another_verb_is_its_plan(
    dense: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Everything that compress takes, at once."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("ratio: 0.5\nbatch_tokens: 64\n")
    out = tmp_path / "out"
    arguments = [dense, "-o", out, "--preset", "balanced", "--recipe", recipe, "--ratio", "0.3", "--calib", text]
    arguments += ["--samples", "8", "--seqlen", "16", "--seed", "7", "--metric", "two-sided", "--gradient-samples", "2"]
    arguments += [
        "--gradient-shrinkage",
        "0.2",
        "--input-only",
        "q_proj",
        "--input-only",
        "k_proj",
        "--shrinkage",
        "0.05",
    ]
    arguments += [
        "--calibration-mode",
        "sequential",
        "--sequential-samples",
        "4",
        "--beta",
        "0.5",
        "--no-bias-correction",
    ]
    arguments += ["--allocation", "loss", "--probe-share", "0.5", "--ignore", "down_proj", "--override", "up_proj=0.1"]
    arguments += ["--round-to", "2", "--no-joint-kv", "--no-elastic", "--device", "cpu", "--dtype", "float32"]
    arguments += ["--hidden-states-limit", "1GB", "--no-resume", "--offline", "--json"]
    assert cli("plan", *arguments) == 0
    plan = json.loads(capsys.readouterr().out)
    assert not out.exists()
    assert list(tmp_path.glob("out*")) == []
    assert cli("compress", *arguments) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["recipe"]["input_only"] == ["q_proj", "k_proj"]
    assert made["recipe"]["gradient_shrinkage"] == 0.2
    assert (made["recipe"]["calibration_mode"], made["recipe"]["sequential_samples"]) == ("sequential", 4)
    assert made["recipe"]["batch_tokens"] == 64
    assert plan["peak_ram_bytes"] > 0
    assert cli("plan", *arguments) == 2
    assert "is a finished checkpoint; nothing is overwritten" in " ".join(capsys.readouterr().out.split())


def test_as_a_program(dense: Path) -> None:
    """The installed entry point, in a process of its own."""
    program = Path(sys.executable).with_name("svdllm")
    done = subprocess.run([program, "plan", dense, "--ratio", "2"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("Error: --ratio '2' is not a ratio")


def test_the_default_preset_compresses_and_says_how_forms_were_chosen(
    dense: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ("--ratio", "0.3", "--samples", "8", "--seqlen", "16", "--gradient-samples", "4")
    assert cli("plan", dense, *common) == 0
    assert "loss: forms follow from the analysis" in " ".join(capsys.readouterr().out.split())
    assert cli("compress", dense, "-o", tmp_path / "out", "--calib", text, *common, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["recipe"]["metric"] == "two-sided"
    assert {"analyze", "gradients", "probe", "allocate"} <= set(result["seconds"])
    assert result["achieved_ratio"] >= 0.3
    assert cli("inspect", tmp_path / "out") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "allocation loss" in said
    assert "nats per token" in said
    assert cli("verify", tmp_path / "out") == 0


def test_strs_of_asvd(dense: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = ("--method", "asvd", "--allocation", "strs", "--strs-ratios", "0.3,0.6", "--probe-share", "0.9")
    common = ("--ratio", "0.3", "--samples", "8", "--seqlen", "16", *chosen)
    assert cli("plan", dense, *common) == 0
    assert "strs: forms follow from the analysis" in " ".join(capsys.readouterr().out.split())
    assert cli("compress", dense, "-o", tmp_path / "out", "--calib", text, *common, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["recipe"]["strs_ratios"] == [0.3, 0.6]
    assert result["achieved_ratio"] >= 0.3
    assert cli("inspect", tmp_path / "out") == 0
    threshold = json.loads((tmp_path / "out" / "svdllm" / "report.json").read_text())["allocation"]["threshold"]
    said = " ".join(capsys.readouterr().out.split())
    assert f"none alone takes the loss above {threshold:.3f} nats per token" in said


def test_ranks_from_a_file(dense: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ranks = tmp_path / "ranks.yaml"
    ranks.write_text("'layers\\.0\\.': dense\ndown_proj: 5\nq_proj: full\n")
    assert cli("compress", dense, "-o", tmp_path / "out", "--calib", text, *SMALL, "--allocation", ranks, "--json") == 0
    found = json.loads(capsys.readouterr().out)["ranks"]
    assert found == {"model.layers.1.mlp.down_proj": 5, "model.layers.1.self_attn.q_proj": 32}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "is neither one of uniform, v2, effective-rank, loss, strs nor a file"),
        ("down_proj: -3", "found down_proj: -3"),
        ("down_proj: many", "found down_proj: 'many'"),
        ("[1, 2]", "expected a mapping"),
        ("nothing_proj: 4", "matches none of the"),
    ],
)
def test_a_bad_allocation_is_refused_before_work(
    content: str | None, said: str, dense: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "ranks.yaml"
    if content is not None:
        path.write_text(content)
    assert cli("compress", dense, "-o", tmp_path / "out", "--calib", text, *SMALL, "--allocation", path) == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out.partial").exists()


def test_a_switch_of_another_method_is_refused_with_a_reason(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--ratio", "0.3", "--method", "svd", "--metric", "two-sided")
    assert cli("compress", dense, "-o", tmp_path / "out", *arguments) == 2
    assert "method svd has no Gram" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gradient-samples", "4", "--metric", "input"], "--gradient-samples does nothing here"),
        (["--probe-share", "0.2", "--allocation", "uniform"], "--probe-share does nothing here"),
        (
            ["--gradient-samples", "4", "--method", "svd"],
            "it is for metric two-sided or method fwsvd, and this recipe has",
        ),
        (["--gradient-shrinkage", "0.2", "--metric", "input"], "--gradient-shrinkage does nothing here"),
        (["--input-only", "q_proj", "--metric", "input"], "--input-only does nothing here"),
        (
            ["--sequential-samples", "4", "--calibration-mode", "dense"],
            "--sequential-samples does nothing here: it is for calibration_mode sequential",
        ),
        (["--asvd-alpha", "0.2"], "--asvd-alpha does nothing here"),
        (["--strs-ratios", "0.2,0.5"], "--strs-ratios does nothing here: it is for allocation strs, and this recipe"),
        (["--allocation", "strs", "--strs-ratios", "0.2,2"], "--strs-ratios '2' is not a ratio"),
    ],
)
def test_flags_that_would_do_nothing_are_refused(
    flags: list[str], message: str, dense: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli("plan", dense, "--ratio", "0.3", *flags) == 2
    assert message in capsys.readouterr().err
