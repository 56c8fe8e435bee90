"""Models as users have them: what is read, what is refused and with which advice, and what they are called."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

import svdllm
from families import low_rank_model, tiny_model, tiny_tokens
from gguf_local import write_gguf
from runs import TEXT, run, save_dense, small_recipe
from svdllm.cli import main
from svdllm.inference.bench.checks import different_names
from svdllm.models.config_files import require_causal_lm
from svdllm.models.model_names import display_name, short_name
from svdllm.models.open import open_config, open_source

COMMIT = "0123456789abcdef0123456789abcdef01234567"
USES: list[Callable[[Any], Any]] = [open_source, open_config, svdllm.load_model]


def with_config(source: Path, folder: Path, **entries: Any) -> Path:
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | entries))
    return folder


@pytest.mark.parametrize("architecture", ["LLaMAForCausalLM", "MistralForCausalLM", "GPT2LMHeadModel"])
def test_the_model_type_decides_not_the_spelling(architecture: str, dense: Path, tmp_path: Path) -> None:
    folder = with_config(dense, tmp_path / "model", architectures=[architecture])
    result = run(folder, tmp_path / "out")
    assert type(svdllm.load_model(folder)).__name__ == "LlamaForCausalLM"
    assert type(result.load()).__name__ == "SvdllmLlamaForCausalLM"
    config: Any = SimpleNamespace(model_type="llama", is_encoder_decoder=False, architectures=architecture)
    require_causal_lm(config, "a name where a list is expected")


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize(
    "architecture",
    ["LlamaForSequenceClassification", "LlamaModel", "LlamaForRewardModel", "LlamaForCausalLMEagle", "BertForMaskedLM"],
)
def test_what_is_no_causal_language_model(
    architecture: str, use: Callable[[Any], Any], dense: Path, tmp_path: Path
) -> None:
    folder = with_config(dense, tmp_path / "model", architectures=[architecture])
    message = f"is not a causal language model: its architecture is {architecture}, expected LlamaForCausalLM"
    with pytest.raises(svdllm.UnsupportedModelError, match=message):
        use(folder)


VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
TEXT_MODEL = {
    "vocab_size": 128,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "head_dim": 8,
}


def multimodal(kind: str) -> Any:
    if kind == "llava":
        vision = CONFIG_MAPPING["clip_vision_model"](**VISION, projection_dim=16)
        return CONFIG_MAPPING["llava"](text_config=CONFIG_MAPPING["llama"](**TEXT_MODEL), vision_config=vision)
    text = TEXT_MODEL | {"query_pre_attn_scalar": 8, "sliding_window": 8}
    vision = VISION | {"model_type": "siglip_vision_model"}
    return CONFIG_MAPPING["gemma3"](text_config=text, vision_config=vision, mm_tokens_per_image=4)


@pytest.mark.parametrize("kind", ["llava", "gemma3"])
def test_the_language_model_in_a_multimodal_one(kind: str, tmp_path: Path) -> None:
    """The way that the documents show makes a model of it that computes the same."""
    folder, alone = tmp_path / "whole", tmp_path / "alone"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForImageTextToText.from_config(multimodal(kind)).save_pretrained(folder)
    whole: Any = AutoModelForImageTextToText.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_config(whole.config.get_text_config(), dtype=whole.dtype)
    model.base_model.load_state_dict(whole.get_decoder().state_dict())
    model.set_output_embeddings(whole.get_output_embeddings())
    model.save_pretrained(alone)
    with torch.no_grad():
        expected = whole.eval()(input_ids=tiny_tokens()).logits
        found = run(alone, tmp_path / "out", recipe=small_recipe(ratio=None, ranks={".": "full"})).load().eval()
        torch.testing.assert_close(found(input_ids=tiny_tokens()).logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("use", USES)
def test_an_adapter_is_to_be_merged(use: Callable[[Any], Any], dense: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(dense)})
    )
    with pytest.raises(
        svdllm.InputError, match=r"is an adapter of PEFT, not a model. Merge the adapter first"
    ) as caught:
        use(adapter)
    assert "merge_and_unload().save_pretrained('merged')" in str(caught.value)
    both = shutil.copytree(dense, tmp_path / "both")
    shutil.copy(adapter / "adapter_config.json", both)
    with pytest.raises(svdllm.InputError, match=r"has an adapter .* beside a model. Merge it into the model first"):
        use(both)


def test_the_way_to_merge_an_adapter_works(dense: Path, tmp_path: Path) -> None:
    import peft

    model: Any = AutoModelForCausalLM.from_pretrained(dense)
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=2)).save_pretrained(tmp_path / "adapter")
    with pytest.raises(svdllm.InputError, match="Merge the adapter first"):
        run(tmp_path / "adapter", tmp_path / "out")
    merged: Any = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    merged.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert run(tmp_path / "merged", tmp_path / "out").plan.forms


@pytest.fixture
def own_code(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A repository with code of its own, and a terminal on which somebody says yes."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run the code"))

    def make(**entries: Any) -> Path:
        names = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model", "AutoTokenizer": ["own.T", None]}
        folder = with_config(dense, tmp_path / "own", auto_map=names, **entries)
        for name in ("own.py", "custom_generate/generate.py"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
        return folder

    return make


def test_own_code_of_an_unknown_type_is_refused(own_code: Callable[..., Path], tmp_path: Path) -> None:
    folder = own_code(model_type="kimi_k9")
    for use in USES:
        with pytest.raises(
            svdllm.UnsupportedModelError, match=r"needs code of its own .*'kimi_k9', .* never runs such"
        ):
            use(folder)
    assert not (tmp_path / "ran").exists()


def test_own_code_of_a_known_type_is_not_run(own_code: Callable[..., Path], tmp_path: Path) -> None:
    folder = own_code()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"auto_map": {"AutoTokenizer": [None, "own.T"]}, "tokenizer_class": "OwnTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert type(svdllm.load_model(folder)).__name__ == "LlamaForCausalLM"
    with pytest.raises(svdllm.InputError, match="no tokenizer that transformers can load"):
        open_source(folder).load_tokenizer(offline=True)
    (tmp_path / "out").mkdir()
    run(folder, tmp_path / "out" / "small")
    assert not (tmp_path / "ran").exists()


CONFIGS: dict[str, tuple[str, str, type[svdllm.SvdllmError]]] = {
    "a list": ("[1]", "config.json is damaged: expected a JSON object, found list", svdllm.CheckpointError),
    "null": ("null", "config.json is damaged: expected a JSON object, found NoneType", svdllm.CheckpointError),
    "cut": ('{"model_type": "lla', "config.json is damaged: Unterminated string", svdllm.CheckpointError),
    "empty": ("", "config.json is damaged: Expecting value", svdllm.CheckpointError),
    "no type": ("{}", "Should have a `model_type` key", svdllm.UnsupportedModelError),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("kind", CONFIGS)
def test_damaged_configs(kind: str, use: Callable[[Any], Any], dense: Path, tmp_path: Path) -> None:
    content, message, error = CONFIGS[kind]
    folder = shutil.copytree(dense, tmp_path / "model")
    (folder / "config.json").write_text(content)
    with pytest.raises(error) as caught:
        use(folder)
    assert message in str(caught.value)


ENTRIES: dict[str, tuple[Any, str]] = {
    "hidden_size": ("many", "'hidden_size': TypeError: Field 'hidden_size' expected int, got str"),
    "num_attention_heads": (0, "cannot be read by transformers: integer modulo by zero"),
    "vocab_size": (None, "Field 'vocab_size' expected int, got NoneType"),
    "model_type": (5, "has model type `5`"),
    "rope_parameters": ([1], "'rope_parameters'"),
    "hidden_act": ("bogus", "KeyError: 'bogus'"),
    "quantization_config": ("x", "cannot be read by transformers: 'str' object"),
    "svdllm": ("x", "expected 'svdllm' to be an object"),
    "tie_word_embeddings": ("yes", "expected bool, got str"),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("entry", ENTRIES)
def test_entries_of_wrong_kinds(entry: str, use: Callable[[Any], Any], dense: Path, tmp_path: Path) -> None:
    value, message = ENTRIES[entry]
    with pytest.raises((svdllm.UnsupportedModelError, svdllm.CheckpointError), match=message):
        use(with_config(dense, tmp_path / "model", **{entry: value}))


def test_a_low_rank_config_without_its_base(tmp_path: Path) -> None:
    low_rank_model("llama").save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    del config["svdllm"]["base_model_type"]
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    for use in USES:
        with pytest.raises(svdllm.CheckpointError, match=r"expected 'svdllm' to be an object with a 'base_model_type'"):
            use(tmp_path / "model")


def gguf_uses(folder: Path) -> list[Callable[[Path], Any]]:
    return [open_config, svdllm.load_model, lambda path: open_source(path, gguf_folder=folder)]


@pytest.mark.parametrize("number", [0, 1])
def test_a_gguf_file_in_parts_is_to_be_joined(number: int, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / f"big-0000{number + 1}-of-00002.gguf", part=(number, 2))
    renamed = shutil.copy(path, tmp_path / "renamed.gguf")
    for use in gguf_uses(tmp_path / "converted"):
        with pytest.raises(svdllm.InputError, match=f"^{path.name} is one of 2 parts of a model") as caught:
            use(path)
        assert str(caught.value).endswith("llama-gguf-split --merge big-00001-of-00002.gguf big-whole.gguf")
        with pytest.raises(svdllm.InputError, match=r"renamed\.gguf is one of 2 parts of a model"):
            use(Path(renamed))
    assert not (tmp_path / "converted").exists()


def test_a_gguf_file_that_is_damaged(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "whole.gguf")
    content = whole.read_bytes()
    cut = tmp_path / "cut.gguf"
    for kept in (
        b"",
        content[:3],
        content[:100],
        content[:2000],
        content[:20000],
        content[:-100],
        b"GGUF" + b"\xff" * 99,
    ):
        cut.write_bytes(kept)
        for use in gguf_uses(tmp_path / "converted"):
            with pytest.raises(svdllm.InputError, match=r"cut\.gguf is not a readable GGUF file, or is cut"):
                use(cut)
    assert not (tmp_path / "converted").exists()


def test_a_gguf_file_without_a_tokenizer(tmp_path: Path) -> None:
    bare = write_gguf(tmp_path / "bare.gguf", tokenizer=False)
    for use in gguf_uses(tmp_path / "converted"):
        with pytest.raises(svdllm.InputError, match=r"bare\.gguf has no tokenizer in it"):
            use(bare)
    damaged = write_gguf(tmp_path / "damaged.gguf", merges=["a", "b"])
    with pytest.raises(svdllm.InputError, match=r"The tokenizer in damaged\.gguf cannot be read"):
        open_source(damaged, gguf_folder=tmp_path / "converted")


def test_a_folder_of_gguf_files(tmp_path: Path) -> None:
    for name in ("b.gguf", "a.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(svdllm.InputError, match=rf"Pass one of the files: {tmp_path}/a.gguf, {tmp_path}/b.gguf\.$"):
        open_config(tmp_path)
    (tmp_path / "b.gguf").unlink()
    with pytest.raises(
        svdllm.InputError, match=rf"no config.json, but GGUF weights. Pass the file: {tmp_path}/a.gguf\."
    ):
        open_config(tmp_path)


@pytest.fixture
def snapshot(tmp_path: Path, tokenizer: Any) -> Path:
    """A model in the hub's cache, given by its path."""
    return save_dense(tmp_path / "hub" / "models--owner--tiny" / "snapshots" / COMMIT, tokenizer=tokenizer)


def test_names(snapshot: Path, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link, cache = tmp_path / "link", tmp_path / "cache"
    link.symlink_to(snapshot)
    cache.symlink_to(tmp_path / "hub")
    places = [snapshot, f"{snapshot}/", link, cache / "models--owner--tiny" / "snapshots" / COMMIT]
    assert {display_name(place) for place in places} == {"owner/tiny"}
    assert {short_name(place) for place in places} == {"tiny"}
    legacy = tmp_path / "hub" / "models--gpt2" / "snapshots" / COMMIT
    legacy.mkdir(parents=True)
    assert (display_name(legacy), short_name(legacy)) == ("gpt2", "gpt2")
    assert (display_name("owner/name"), short_name("owner/name")) == ("owner/name", "name")
    monkeypatch.chdir(dense)
    assert (display_name("."), display_name(dense), display_name("/gone/model")) == ("tiny", "tiny", "model")


def test_a_snapshot_is_called_by_its_name(snapshot: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    result = run(snapshot, tmp_path / "out")
    source = json.loads((tmp_path / "out" / "config.json").read_text())["svdllm"]["source"]
    assert (result.plan.model, source["id"], source["revision"]) == ("owner/tiny", "owner/tiny", COMMIT)
    assert COMMIT not in (tmp_path / "out" / "README.md").read_text().splitlines()[0]
    assert list(different_names([str(tmp_path / "out")], str(snapshot))) == ["tiny", "out"]
    with pytest.raises(SystemExit):
        main(["eval", str(snapshot), "--ppl", str(tmp_path / "text.txt"), "--seqlen", "16", "--max-windows", "2"])
    printed = capsys.readouterr()
    assert "owner/tiny" in printed.out
    assert COMMIT[:8] not in printed.out + printed.err
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(svdllm.InputError, match=r"^owner/tiny has a config.json but no model.safetensors"):
        open_source(snapshot)


def test_a_model_in_memory_of_a_snapshot(snapshot: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(snapshot)
    assert open_source(model).name == "owner/tiny"
    assert open_source(tiny_model("llama")).name == "LlamaForCausalLM"
