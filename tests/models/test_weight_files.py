"""Which files hold a model's weights: those that transformers loads, whatever else lies beside them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import svdllm
from families import low_rank_model, tiny_model, tiny_tokens
from runs import run, save_dense, small_recipe
from svdllm.models.low_rank.lowrank import check_weight_files
from svdllm.models.open import open_config, open_source
from svdllm.models.safetensors_files import weight_files

INDEX = "model.safetensors.index.json"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=tiny_tokens()).logits


def as_transformers_loads_it(folder: Path) -> Tensor:
    return logits(AutoModelForCausalLM.from_pretrained(folder))


def sharded(folder: Path, seed: int = 7) -> Path:
    tiny_model("llama", seed, vocab_size=300).save_pretrained(folder, max_shard_size="20KB")
    return folder


def renamed(dense: Path, folder: Path, name: str) -> Path:
    """Weights under a name that the config tells, and others under the usual one."""
    shutil.copytree(dense, folder)
    shutil.copy(dense / "model.safetensors", folder / name)
    tiny_model("llama", 9, vocab_size=300).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"transformers_weights": name}))
    return folder


@pytest.fixture
def stale_index(dense: Path, tmp_path: Path) -> Path:
    """New weights in one file, and an index with old shards that was left behind."""
    folder = shutil.copytree(dense, tmp_path / "model")
    for file in sharded(tmp_path / "old").glob("model*"):
        shutil.copy(file, folder)
    return folder


def full_rank(folder: Path, out: Path) -> Any:
    return run(folder, out, recipe=small_recipe(method="svd", ratio=None, ranks={".": "full"})).load()


def test_a_single_file_is_taken_before_an_index(stale_index: Path, dense: Path, tmp_path: Path) -> None:
    expected = as_transformers_loads_it(stale_index)
    assert weight_files(stale_index) == [stale_index / "model.safetensors"]
    torch.testing.assert_close(logits(full_rank(stale_index, tmp_path / "out")), expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(logits(svdllm.load_model(stale_index)), expected)
    size = (dense / "model.safetensors").stat().st_size
    assert svdllm.weight_bytes(stale_index).files == open_source(stale_index).weight_bytes == size


def test_an_index_without_its_shards_beside_a_good_file(stale_index: Path, dense: Path) -> None:
    for shard in stale_index.glob("model-*"):
        shard.unlink()
    for index in (None, "[1]", "{"):
        if index is not None:
            (stale_index / INDEX).write_text(index)
        stored, expected = open_source(stale_index).weights, load_file(dense / "model.safetensors")
        assert stored is not None
        assert all(torch.equal(stored.get(name), expected[name]) for name in expected)


def test_the_file_that_the_config_names(dense: Path, tmp_path: Path) -> None:
    folder = renamed(dense, tmp_path / "model", "other.safetensors")
    expected = as_transformers_loads_it(folder)
    assert torch.equal(expected, as_transformers_loads_it(dense))
    torch.testing.assert_close(logits(full_rank(folder, tmp_path / "out")), expected, atol=1e-4, rtol=1e-4)
    assert "transformers_weights" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_the_index_that_the_config_names(dense: Path, tmp_path: Path) -> None:
    folder = renamed(dense, tmp_path / "model", "other.safetensors.index.json")
    content = {"metadata": {}, "weight_map": {"lm_head.weight": "b.safetensors", "model.norm.weight": "a.safetensors"}}
    (folder / "other.safetensors.index.json").write_text(json.dumps(content))
    with pytest.raises(svdllm.CheckpointError, match=r"model lacks a.safetensors, b.safetensors, named by its index"):
        weight_files(folder)


@pytest.mark.parametrize("name", ["../tiny/model.safetensors", "/model.safetensors", 5])
def test_the_config_names_no_file_elsewhere(dense: Path, tmp_path: Path, name: object) -> None:
    folder = shutil.copytree(dense, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"transformers_weights": name}))
    with pytest.raises(svdllm.CheckpointError, match=r"transformers_weights is .*, expected a file of the folder"):
        open_source(folder)


def test_checkpoints_are_checked_by_the_same_rule(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    model = low_rank_model("llama")
    model.save_pretrained(folder, max_shard_size="10KB")
    low_rank_model("llama", 3).save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "model.safetensors", folder)
    with pytest.raises(ValueError, match=r"model\.safetensors is not in svdllm/hashes\.json"):
        AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(svdllm.CheckpointError, match=r"model\.safetensors is not in svdllm/hashes\.json"):
        svdllm.load_model(folder)
    (folder / "svdllm" / "hashes.json").unlink()
    next(folder.glob("model-*")).unlink()
    check_weight_files(folder)  # the single file is read, and whole
    assert torch.equal(as_transformers_loads_it(folder), as_transformers_loads_it(tmp_path / "other"))
    os.truncate(folder / "model.safetensors", 5000)
    with pytest.raises(ValueError, match=r"model\.safetensors: expected \d+ bytes, found 5000"):
        check_weight_files(folder)


def test_verify_finds_weights_that_it_has_no_hash_of(tmp_path: Path) -> None:
    run(tiny_model("llama"), tmp_path / "out")
    out = tmp_path / "out"
    svdllm.verify(out)
    (out / "model.safetensors").rename(out / "model-1.safetensors")
    shutil.copy(out / "model-1.safetensors", out / "model.safetensors")
    svdllm.verify(out)  # what is not read does not matter
    config = json.loads((out / "config.json").read_text())
    hashes = json.loads((out / "svdllm" / "hashes.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"transformers_weights": "model-1.safetensors"}))
    del hashes["files"]["config.json"]
    (out / "svdllm" / "hashes.json").write_text(json.dumps(hashes))
    with pytest.raises(svdllm.CheckpointError, match=r"model-1\.safetensors is not in svdllm/hashes\.json"):
        svdllm.verify(out)


DAMAGE: dict[str, tuple[str, str]] = {
    "a list": ("[1]", "expected a JSON object, found list"),
    "cut": ('{"metadata": {', "model.safetensors.index.json is damaged: Expecting"),
    "no map": ('{"metadata": {}}', "expected a 'weight_map' from tensors to names of files"),
    "a map of lists": (
        '{"metadata": {}, "weight_map": ["a"]}',
        "expected a 'weight_map' from tensors to names of files",
    ),
    "a map to numbers": ('{"metadata": {}, "weight_map": {"a": 1}}', "from tensors to names of files"),
    "no metadata": ('{"weight_map": {}}', "transformers wants a 'metadata' object in it; an empty one will do"),
    "not text": ("\udcff", "model.safetensors.index.json is damaged: 'utf-8' codec"),
}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("use", [open_source, svdllm.load_model, svdllm.weight_bytes])
def test_damaged_indexes(tmp_path: Path, kind: str, use: Callable[[Path], Any]) -> None:
    content, expected = DAMAGE[kind]
    folder = sharded(tmp_path / "model")
    (folder / INDEX).write_text(content, errors="surrogateescape")
    with pytest.raises(svdllm.CheckpointError) as caught:
        use(folder)
    assert expected in str(caught.value)
    assert str(caught.value).startswith("model cannot be read: ")
    assert "Fetch or write it again." in str(caught.value)


def broken_files(file: Path) -> dict[str, Callable[[], Any]]:
    """Ways to break a safetensors file."""
    size = file.stat().st_size
    return {
        "empty": lambda: os.truncate(file, 0),
        "in the header": lambda: os.truncate(file, 500),
        "in the tensors": lambda: os.truncate(file, size - 7),
        "longer": lambda: file.write_bytes(file.read_bytes() + b"x"),
        "noise": lambda: file.write_bytes(b"\xff" * size),
        "a header that is a list": lambda: file.write_bytes((3).to_bytes(8, "little") + b"[1]"),
    }


@pytest.mark.parametrize("kind", broken_files(Path(__file__)))
@pytest.mark.parametrize("use", [open_source, svdllm.load_model, svdllm.weight_bytes])
def test_damaged_weights(dense: Path, tmp_path: Path, kind: str, use: Callable[[Path], Any]) -> None:
    folder = shutil.copytree(dense, tmp_path / "model")
    broken_files(folder / "model.safetensors")[kind]()
    with pytest.raises(svdllm.CheckpointError, match=r"^model\.safetensors in model is truncated or damaged"):
        use(folder)


@pytest.mark.parametrize("use", [open_source, svdllm.load_model])
def test_weights_under_another_name(dense: Path, tmp_path: Path, use: Callable[[Path], Any]) -> None:
    folder = shutil.copytree(dense, tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")
    with pytest.raises(svdllm.UnsupportedModelError, match=r"has no model\.safetensors, only model\.fp16\.safetensors"):
        use(folder)
    (folder / "model.fp16.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(svdllm.UnsupportedModelError, match="pickled files are never read"):
        use(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(svdllm.InputError, match="its weights are missing"):
        use(folder)


def test_a_loaded_model_never_has_random_weights(dense: Path, tmp_path: Path) -> None:
    """transformers only logs what is missing or of another shape, and the command line hides its log."""
    folder = shutil.copytree(dense, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(
        svdllm.CheckpointError, match=r"9 tensors of LlamaForCausalLM are missing, .*model\.layers\.2\."
    ):
        svdllm.load_model(folder)
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 40}))
    with pytest.raises(
        svdllm.CheckpointError, match=r"6 tensors .* are of another shape, .*\[32, 48\], by the config \[32, 40\]"
    ):
        svdllm.load_model(folder)


class Hub:
    """A repository on a hub, and what was fetched of it."""

    def __init__(self, repository: Path, cache: Path):
        self.repository, self.fetched = repository, set()
        self.snapshot = cache / "models--owner--tiny" / "snapshots" / COMMIT
        self.snapshot.mkdir(parents=True)

    def download(self, name: str, *, allow_patterns: Any, ignore_patterns: Any = (), **_: Any) -> str:
        for file in self.repository.iterdir():
            wanted = any(fnmatch(file.name, pattern) for pattern in allow_patterns)
            if wanted and not any(fnmatch(file.name, pattern) for pattern in ignore_patterns or ()):
                self.fetched.add(file.name)
                shutil.copy(file, self.snapshot)
        return str(self.snapshot)

    @property
    def weights(self) -> list[str]:
        return sorted(name for name in self.fetched if "safetensors" in name)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    (tmp_path / "repository").mkdir()
    made = Hub(tmp_path / "repository", tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.snapshot_download", made.download)
    return made


def test_from_the_hub_the_weights_of_transformers_come_alone(hub: Hub, stale_index: Path, dense: Path) -> None:
    shutil.copytree(stale_index, hub.repository, dirs_exist_ok=True)
    for other in ("consolidated.safetensors", "model.fp16.safetensors", "adapter_model.safetensors"):
        shutil.copy(dense / "model.safetensors", hub.repository / other)
    open_config("owner/tiny")
    assert hub.weights == []
    source = open_source("owner/tiny")
    assert hub.weights == ["model.safetensors"]
    assert (source.name, source.revision) == ("owner/tiny", COMMIT)
    loaded = svdllm.load_model("owner/tiny")
    assert hub.weights == ["model.safetensors"]
    assert torch.equal(logits(loaded), as_transformers_loads_it(dense))


@pytest.mark.parametrize("load", [open_source, svdllm.load_model])
def test_from_the_hub_the_shards_of_an_index(hub: Hub, tmp_path: Path, load: Callable[[str], Any]) -> None:
    sharded(hub.repository)
    shutil.copy(next(hub.repository.glob("model-*")), hub.repository / "model-of-another.safetensors")
    load("owner/tiny")
    assert hub.weights == sorted({INDEX, *json.loads((hub.repository / INDEX).read_text())["weight_map"].values()})


def test_from_the_hub_the_file_that_the_config_names(hub: Hub, dense: Path, tmp_path: Path) -> None:
    shutil.copytree(renamed(dense, tmp_path / "model", "other.safetensors"), hub.repository, dirs_exist_ok=True)
    assert torch.equal(logits(svdllm.load_model("owner/tiny")), as_transformers_loads_it(dense))
    assert hub.weights == ["other.safetensors"]


def test_pickled_weights_are_not_loaded_from_the_hub(hub: Hub, tmp_path: Path) -> None:
    save_dense(hub.repository)
    (hub.repository / "model.safetensors").rename(hub.repository / "pytorch_model.bin")
    with pytest.raises(svdllm.InputError, match="its weights are missing"):
        svdllm.load_model("owner/tiny")
    assert "pytorch_model.bin" not in hub.fetched


def test_an_index_on_the_hub_cannot_ask_for_more_than_files_of_its_names(hub: Hub, dense: Path) -> None:
    shutil.copytree(dense, hub.repository, dirs_exist_ok=True)
    (hub.repository / "model.safetensors").rename(hub.repository / "other.safetensors")
    (hub.repository / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": "*.safetensors"}}))
    with pytest.raises(svdllm.CheckpointError, match=r"owner/tiny lacks \*\.safetensors, named by its index"):
        open_source("owner/tiny")
    assert hub.weights == [INDEX]
