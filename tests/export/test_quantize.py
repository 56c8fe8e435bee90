"""Factors in few bits: what is rounded and how far, what files hold, and what a quantised folder can be used for."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, TorchAoConfig

import svdllm
from families import tiny_model, tiny_tokens
from runs import TEXT, digests, run, save_dense, small_recipe
from svdllm.checkpoint.quantized import (
    ENTRY_BYTES,
    NOTE_BYTES,
    Scheme,
    choose_schemes,
    make_scheme,
    quantized_bytes,
    weights_pattern,
)
from svdllm.checkpoint.tensors import stored_tensors
from svdllm.checkpoint.weight_sizes import weight_bytes
from svdllm.cli import main
from svdllm.common.errors import InputError, ResourceError
from svdllm.export.quantize import quantize
from svdllm.models.open import open_config
from svdllm.models.skeleton import build_skeleton

# Of blocks of width 64 with 96 inner: ranks in sixteens and not, and linears that stay dense.
RANKS = {"q_proj": 16, "v_proj": 9, "up_proj": 32, "down_proj": 32}
WIDTHS = {"hidden_size": 64, "intermediate_size": 96}
QUANTIZE = importlib.import_module("svdllm.export.quantize")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    folder = tmp_path_factory.mktemp("quantize") / "dense"
    return save_dense(folder, "qwen2", tokenizer=tokenizer, **WIDTHS)  # which has biases


@pytest.fixture(scope="module")
def checkpoint(dense: Path) -> Path:
    run(dense, dense.with_name("small"), recipe=small_recipe(ranks=RANKS))
    return dense.with_name("small")


@pytest.fixture(scope="module")
def in8(checkpoint: Path) -> Path:
    quantize(checkpoint, checkpoint.with_name("in8"))
    return checkpoint.with_name("in8")


@pytest.fixture(scope="module")
def in4(checkpoint: Path) -> Path:
    quantize(checkpoint, checkpoint.with_name("in4"), bits=4)
    return checkpoint.with_name("in4")


def cli(*arguments: object) -> int:
    with pytest.raises(SystemExit) as done:
        main([str(argument) for argument in arguments])
    return int(done.value.code or 0)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(tiny_tokens()).logits


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def rounded(folder: Path) -> dict[str, Tensor]:
    """The weights in few bits, as numbers."""
    found = load(folder).named_parameters()
    return {name: weight.dequantize() for name, weight in found if hasattr(weight, "tensor_data_names")}


def by_hand(weight_OI: Tensor) -> Tensor:
    """Symmetric, a scale per row: 256 steps from the negative of its largest magnitude to one step below that."""
    scale_O1 = 2 * weight_OI.abs().amax(dim=1, keepdim=True) / 255
    return (weight_OI / scale_O1).round().clamp(-128, 127) * scale_O1


# numbers


def test_eight_bits_are_those_of_a_quantiser_made_by_hand(checkpoint: Path, in8: Path) -> None:
    weights = dict(load(checkpoint).named_parameters())
    found = rounded(in8)
    assert len(found) == 2 * (4 * 2 + 3)  # of two blocks: four pairs of factors, three dense linears
    for name, values in found.items():
        weight = weights[name].detach()
        # The errors, not the values: the largest of a row lies half-way between two steps.
        torch.testing.assert_close((values - weight).abs(), (by_hand(weight) - weight).abs(), rtol=1e-4, atol=1e-6)
        assert 0.001 < (values - weight).norm() / weight.norm() < 0.01


def test_groups_of_inputs_have_scales_of_their_own(checkpoint: Path, tmp_path: Path) -> None:
    result = quantize(checkpoint, tmp_path / "out", group_size=16)
    weights = dict(load(checkpoint).named_parameters())
    for name, values in rounded(tmp_path / "out").items():
        weight = weights[name].detach()
        width = 16 if weight.shape[1] % 16 == 0 else weight.shape[1]
        steps = weight.unflatten(1, (-1, width)).abs().amax(dim=2, keepdim=True) / 127.5
        errors = (values - weight).abs().unflatten(1, (-1, width))
        assert bool((errors <= 0.501 * steps).all()), name
    others = {linear.name: linear for linear in result.linears if linear.reason}
    assert set(others) == {f"model.layers.{block}.self_attn.v_proj.svd_u" for block in (0, 1)}  # of rank 9
    assert {linear.scheme for linear in others.values()} == {Scheme(8)}


def test_four_bits_are_within_the_steps_of_their_format(checkpoint: Path, in4: Path) -> None:
    """Of E2M1 the widest gap is a third of the largest number; a scale of E4M3 is off by a sixteenth at most."""
    weights = dict(load(checkpoint).named_parameters())
    packed = {name.rpartition(".")[0] for name in few_bits(in4, "NVFP4Tensor")}
    assert not any("v_proj" in name for name in packed)
    assert "model.layers.1.mlp.down_proj.svd_u" in packed
    for name, values in rounded(in4).items():
        if name.rpartition(".")[0] not in packed:
            continue
        weight = weights[name].detach()
        groups = weight.unflatten(1, (-1, 16))
        largest = groups.abs().amax(dim=2, keepdim=True)
        errors = (values - weight).unflatten(1, (-1, 16))
        assert bool((errors.abs() <= (1 / 6 + 1 / 16) * largest).all()), name
        assert 0.05 < (values - weight).norm() / weight.norm() < 0.15
        assert all(len(row.abs().unique()) <= 8 for row in values.unflatten(1, (-1, 16)).flatten(0, 1))


def few_bits(folder: Path, kind: str) -> set[str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    return {name for name in json.loads(metadata["tensor_names"]) if json.loads(metadata[name])["_type"] == kind}


@pytest.mark.parametrize("form", ["in8", "in4"])
def test_the_model_computes_with_the_rounded_weights(
    form: str, checkpoint: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(form)
    expected = load(checkpoint)
    missing = expected.load_state_dict(rounded(folder), strict=False).missing_keys
    assert all("proj" not in name or name.endswith("bias") for name in missing)
    torch.testing.assert_close(logits(load(folder)), logits(expected), rtol=1e-4, atol=1e-5)


# files


@pytest.mark.parametrize("form", ["in8", "in4"])
def test_a_second_round_trip_changes_nothing(form: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(form)
    model = load(folder)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again")), logits(model))
    assert (tmp_path / "again" / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    kinds = {path.suffix for path in folder.rglob("*") if path.is_file()}
    assert kinds <= {".safetensors", ".json", ".py", ".md", ".yaml", ".jinja"}


def test_the_folder_is_the_checkpoint_with_other_weights(checkpoint: Path, in8: Path) -> None:
    before, after = digests(checkpoint), digests(in8)
    assert set(before) == set(after)
    differing = {name for name in before if before[name] != after[name]}
    expected = {"model.safetensors", "config.json", "README.md", "svdllm/hashes.json", "svdllm/reference.safetensors"}
    assert differing == expected
    assert (in8 / "model.safetensors").stat().st_mode == (in8 / "config.json").stat().st_mode
    reference = load_file(in8 / "svdllm/reference.safetensors")
    with torch.no_grad():
        found = load(in8)(reference["token_ids"]).logits[:, -4:]
    torch.testing.assert_close(found, reference["logits"])


def test_several_files(checkpoint: Path, in8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(QUANTIZE, "SHARD_BYTES", 40_000)
    quantize(checkpoint, tmp_path / "out")
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    assert weight_bytes(tmp_path / "out").files == sum(path.stat().st_size for path in files)
    assert weight_bytes(tmp_path / "out").quantized == weight_bytes(in8).quantized
    assert torch.equal(logits(load(tmp_path / "out")), logits(load(in8)))
    svdllm.verify(tmp_path / "out")


@pytest.mark.parametrize(
    ("bits", "group_size", "dtype"),
    [(8, None, "float32"), (8, 16, "bfloat16"), (4, None, "bfloat16"), (8, None, "float16")],
)
def test_bytes_are_known_beforehand(
    bits: int, group_size: int | None, dtype: str, tmp_path: Path, tokenizer: Any
) -> None:
    folder = tmp_path / "dense"
    model = tiny_model("llama", vocab_size=300, hidden_size=144, intermediate_size=200).to(getattr(torch, dtype))
    model.save_pretrained(folder)
    source = open_config(folder)
    skeleton = build_skeleton(source.config)
    linears, _ = choose_schemes(skeleton, make_scheme(bits, group_size))
    schemes = {f"{linear.name}.weight": linear.scheme for linear in linears}
    predicted = quantized_bytes(stored_tensors(source, skeleton), schemes, num_files=1)
    quantize(folder, tmp_path / "out", bits=bits, group_size=group_size)
    file = tmp_path / "out" / "model.safetensors"
    counted = weight_bytes(tmp_path / "out")
    assert counted.files == file.stat().st_size
    headers = sum(ENTRY_BYTES + NOTE_BYTES + 5 * len(name) for name in stored_tensors(source, skeleton))
    assert predicted - headers == counted.quantized + counted.other
    assert 0.35 * headers < counted.headers < headers
    assert counted.headers == 8 + int.from_bytes(file.read_bytes()[:8], "little")


def test_bytes_by_hand(dense: Path, tmp_path: Path) -> None:
    """Two blocks of 64, 96 and half as many keys; weights of one byte, five more for every row."""
    quantize(dense, tmp_path / "out")
    rows = 64 + 32 + 32 + 64 + 96 + 96 + 64
    weights = 64 * (64 + 32 + 32 + 64 + 96 + 96) + 64 * 96
    others = 300 * 64 + 2 * (64 + 32 + 32 + 2 * 64) + 64  # the tied embedding, biases and norms
    counted = weight_bytes(tmp_path / "out")
    assert counted.quantized == 2 * (weights + 5 * rows)
    assert counted.other == 4 * others
    assert counted.files_at_16_bits == counted.files - 2 * others
    assert weight_bytes(dense).quantized == 0
    assert weight_bytes(dense).files_at_16_bits == weight_bytes(dense).files - 2 * (others + 2 * weights)


# which linears


def test_what_is_left_is_said(dense: Path) -> None:
    skeleton = build_skeleton(open_config(dense).config)
    linears, left = choose_schemes(skeleton, Scheme(8), skip=[r"layers\.0\.mlp", "k_proj"])
    names = {linear.name for linear in linears}
    assert left.pop("model.embed_tokens") == left.pop("lm_head") == "outside the blocks"
    assert set(left.values()) == {"--skip"}
    assert set(left) == {f"model.layers.0.mlp.{kind}_proj" for kind in ("gate", "up", "down")} | {
        f"model.layers.{block}.self_attn.k_proj" for block in (0, 1)
    }
    assert len(names) == 14 - 5
    assert not names & set(left)


def test_a_skipped_linear_is_stored_as_it_was(checkpoint: Path, tmp_path: Path) -> None:
    quantize(checkpoint, tmp_path / "out", skip=["down_proj.svd_u"])
    before, after = load_file(checkpoint / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    kept = {name for name in before if name in after}
    assert "model.layers.0.mlp.down_proj.svd_u.weight" in kept
    assert "model.layers.0.self_attn.q_proj.svd_u.bias" in kept  # no bias is rounded
    assert "model.layers.0.mlp.down_proj.svd_v.weight" not in kept
    assert all(torch.equal(before[name], after[name]) for name in kept)


def test_linears_of_another_kind_are_left(tmp_path: Path) -> None:
    dense = save_dense(tmp_path / "gpt2", "gpt2")
    with pytest.raises(InputError, match=r"Nothing is left to quantise: 8 linears in the blocks \(Conv1D, of which"):
        quantize(dense, tmp_path / "out")
    run(dense, tmp_path / "small", recipe=small_recipe(ranks={"c_fc": 8}))
    result = quantize(tmp_path / "small", tmp_path / "small8")
    assert {linear.name for linear in result.linears} == {
        f"transformer.h.{block}.mlp.c_fc.svd_{factor}" for block in (0, 1) for factor in "uv"
    }
    assert torch.isfinite(logits(load(tmp_path / "small8"))).all()


def test_the_pattern_is_of_these_weights_only() -> None:
    pattern = weights_pattern(["m.layers.0.a.b", "m.layers.11.a.b", "m.layers.1.a"])
    matched = re.compile(pattern.removeprefix("re:"))
    for name in ("m.layers.0.a.b.weight", "m.layers.11.a.b.weight", "m.layers.1.a.weight"):
        assert matched.fullmatch(name)
    for name in (
        "m.layers.1.a.b.weight",
        "m.layers.0.a.b",
        "m.layers.0.a.b.bias",
        "m.layers.0.a.weight",
        "mxlayers.1.a",
    ):
        assert not matched.fullmatch(name)


# uses


def test_a_dense_model_loads_everywhere(dense: Path, tmp_path: Path) -> None:
    result = quantize(dense, tmp_path / "out", bits=4)
    assert result.by_scheme() == {"4 bits, a scale per 16 inputs": 14}
    assert result.bytes_after == (tmp_path / "out" / "model.safetensors").stat().st_size < result.bytes_before
    model = load(tmp_path / "out")
    assert type(model).__module__.startswith("transformers.")
    assert not (tmp_path / "out" / "svdllm").exists()
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (dense / "tokenizer.json").read_bytes()


def test_four_bits_of_bfloat16_compute_in_float32(dense: Path, tmp_path: Path) -> None:
    load(dense, dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    quantize(tmp_path / "half", tmp_path / "out", bits=4)
    assert logits(load(tmp_path / "out")).dtype == torch.bfloat16
    found = logits(svdllm.load_model(tmp_path / "out", dtype=torch.float32))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, logits(load(tmp_path / "out")).float(), rtol=0.1, atol=0.1)


def test_without_the_library(in8: Path, tmp_path: Path) -> None:
    script = (
        "import sys, torch\n"
        "sys.modules['svdllm'] = None\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "torch.save(model(torch.arange(8)[None]).logits, sys.argv[2])\n"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    command = [sys.executable, "-c", script, str(in8), str(tmp_path / "logits")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    with torch.no_grad():
        torch.testing.assert_close(torch.load(tmp_path / "logits"), load(in8)(torch.arange(8)[None]).logits)


def test_eval_verify_inspect(in4: Path, dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    assert cli("eval", in4, "--base", dense, "--ppl", tmp_path / "text.txt", "--seqlen", "16", "--json") == 0
    ours, theirs = json.loads(capsys.readouterr().out)["results"]
    assert ours["weight_bytes"] == (in4 / "model.safetensors").stat().st_size < theirs["weight_bytes"]
    assert ours["params"] == svdllm.load_model(in4).num_parameters() < theirs["params"]
    assert cli("verify", in4) == 0
    assert "largest difference" in capsys.readouterr().out
    assert cli("inspect", in4) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "quantised 4 bits, a scale per 16 inputs (18 linears); 8 bits, a scale per row (4 linears)" in said
    assert cli("inspect", in4, "--json") == 0
    entry = json.loads(capsys.readouterr().out)["quantization"]
    assert entry["bits"] == 4
    assert entry["other_schemes"]["model.layers.0.self_attn.v_proj.svd_u"] == "32 x 9 is not in groups of 16"
    assert "4 bits" in (in4 / "README.md").read_text()
    altered = shutil.copytree(in4, tmp_path / "altered")
    content = bytearray((altered / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (altered / "model.safetensors").write_bytes(bytes(content))
    assert cli("verify", altered) == 2
    assert "model.safetensors: expected SHA-256" in " ".join(capsys.readouterr().err.split())


def test_command_line(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli("quantize", checkpoint, "-o", tmp_path / "a", "--bits", "4", "--skip", "q_proj") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "14 in 4 bits, a scale per 16 inputs" in said
    assert "4 of them for their shape, as model.layers.0.self_attn.v_proj.svd_v: 9 x 64 is not in groups of 16" in said
    assert "model.embed_tokens, lm_head (outside the blocks)" in said
    assert cli("quantize", checkpoint, "-o", tmp_path / "b", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["by_scheme"] == {"8 bits, a scale per row": 22}
    assert result["bytes_after"] == (tmp_path / "b" / "model.safetensors").stat().st_size


# refusals


@pytest.mark.parametrize(
    "arguments",
    [
        ("compress", "-o", "OUT", "--ratio", "0.3", "--calib", "python-docs"),
        ("plan", "--ratio", "0.3"),
        ("slice", "-o", "OUT", "--ratio", "0.5"),
        ("export", "-o", "OUT"),
        ("recover", "-o", "OUT", "--data", "python-docs"),
        ("quantize", "-o", "OUT", "--bits", "4"),
        ("compare", "-o", "OUT", "--methods", "svd", "--ratios", "0.3", "--ppl", "python-docs"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_what_needs_the_weights_refuses_a_quantised_model(
    arguments: tuple[str, ...], in8: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert cli(arguments[0], in8, *(out if word == "OUT" else word for word in arguments[1:])) == 3
    assert "is quantised (torchao). Quantisation comes last" in " ".join(capsys.readouterr().err.split())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 5}, "--bits 5 is not possible"),
        ({"bits": 4, "group_size": 32}, "--group-size 32 is not possible with --bits 4"),
        ({"group_size": 0}, "--group-size must be at least 1"),
        ({"skip": ["nothing"]}, "--skip 'nothing' matches none of the 22 linears"),
        ({"skip": ["proj"]}, "Nothing is left to quantise: 22 linears"),
        ({"device": "cuda:9"}, "--device 'cuda:9' is not available"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str, checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        quantize(checkpoint, tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_other_things_that_cannot_be(
    dense: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(dense, dtype=torch.float16).save_pretrained(tmp_path / "half")
    with pytest.raises(InputError, match=r"stored in float16; 4 bits can be made of bfloat16 and float32 only"):
        quantize(tmp_path / "half", tmp_path / "out", bits=4)
    with pytest.raises(InputError, match="exists and is a folder with other things"):
        quantize(checkpoint, tmp_path)
    (tmp_path / "out.writing").mkdir()
    with pytest.raises(InputError, match=r"out\.writing is in the way"):
        quantize(checkpoint, tmp_path / "out")
    (tmp_path / "out.writing").rmdir()
    bare = shutil.copytree(checkpoint, tmp_path / "bare", ignore=shutil.ignore_patterns("svdllm"))
    with pytest.raises(InputError, match="download the whole repository first"):
        quantize(bare, tmp_path / "out")
    monkeypatch.setattr(QUANTIZE, "available_bytes", lambda: 1000)
    with pytest.raises(ResourceError, match=r"GB of memory, 0\.00 GB are free"):
        quantize(checkpoint, tmp_path / "out")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=10_000))
    with pytest.raises(ResourceError, match="GB free, the weights need"):
        quantize(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_missing_library_is_named(
    checkpoint: Path, in8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("svdllm.common.extras.importlib.util.find_spec", lambda name: None)
    for command in (
        ("quantize", checkpoint, "-o", tmp_path / "out"),
        ("eval", in8, "--ppl", "python-docs"),
        ("verify", in8),
    ):
        assert cli(*command) == 2
        assert "needs the package 'torchao': pip install 'svdllm[quantize]'" in " ".join(
            capsys.readouterr().err.split()
        )


def test_a_failure_leaves_nothing(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(QUANTIZE, "finish_checkpoint", fail)
    with pytest.raises(KeyboardInterrupt):
        quantize(checkpoint, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_elastic_checkpoint_loses_its_sizes(dense: Path, tmp_path: Path) -> None:
    run(dense, tmp_path / "elastic", recipe=small_recipe(elastic=True))
    reporter = svdllm.common.progress.Reporter()
    quantize(tmp_path / "elastic", tmp_path / "out", reporter=reporter)
    assert "smaller sizes of this elastic checkpoint are not carried over" in reporter.warnings[0]
    assert not list((tmp_path / "out").rglob("elastic*"))
    assert "svdllm slice" not in (tmp_path / "out" / "README.md").read_text()


def test_quantised_on_loading_is_the_same(checkpoint: Path, in8: Path) -> None:
    """What transformers makes of the checkpoint with torchao's own default is what is stored."""
    from torchao.quantization import Int8WeightOnlyConfig

    config = TorchAoConfig(Int8WeightOnlyConfig(set_inductor_config=False), modules_to_not_convert=["lm_head"])
    assert torch.equal(logits(load(checkpoint, quantization_config=config)), logits(load(in8)))
