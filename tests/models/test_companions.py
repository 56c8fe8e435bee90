"""What belongs to a tokenizer is kept by every command, whatever its files are called, and nothing else is copied."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from transformers import AutoTokenizer, GenerationConfig

import svdllm
from runs import TEXT, run, save_dense, small_recipe
from svdllm.cli import main
from svdllm.common.errors import CheckpointError, InputError
from svdllm.data import evaluation_tokens
from svdllm.data.chat_template import has_chat_template
from svdllm.export import graphs
from svdllm.inference import serve as serving
from svdllm.inference.chat import Chat
from svdllm.models.companions import companion_files, copy_companion_files
from svdllm.models.open import Source, open_source
from svdllm.recovery import make_recovery
from tokenizers_local import CHAT_TEMPLATE, byte_tokenizer

TEMPLATES = {"default": CHAT_TEMPLATE, "tool_use": "tools " + CHAT_TEMPLATE, "rag": "documents " + CHAT_TEMPLATE}
NOT_A_TOKENIZERS = (
    "config.json",
    "README.md",
    "LICENSE.txt",
    "model.safetensors",
    "model.safetensors.index.json",
    "consolidated.00.pth",
    "tokenizer_backup.bin",
    "tokenizer_old.py",
    "training_args.bin",
    "tokenizer/tokenizer.json",
    "additional_chat_templates/notes.md",
    "custom_generate/generate.py",
)


JAPANESE = {"format_version": 2, "base_model_type": "gpt_neox_japanese", "forms": {}}


def write_files(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"content of {name}")


def write_json(file: Path, **content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


def found_in(folder: Path) -> set[str]:
    return {path.as_posix() for path in companion_files(folder)}


@pytest.mark.parametrize(
    ("config", "tokenizer_config", "files"),
    [
        ({}, {}, ["tokenizer.json", "special_tokens_map.json", "added_tokens.json", "generation_config.json"]),
        ({}, {}, ["chat_template.jinja", "additional_chat_templates/rag.jinja", "additional_chat_templates/x.jinja"]),
        ({"model_type": "gpt2"}, {}, ["vocab.json", "merges.txt"]),
        ({"model_type": "bert"}, {}, ["vocab.txt"]),
        ({"model_type": "xglm"}, {}, ["sentencepiece.bpe.model"]),
        ({}, {"tokenizer_class": "T5TokenizerFast"}, ["spiece.model"]),
        ({}, {"tokenizer_class": "BertweetTokenizer"}, ["bpe.codes", "vocab.txt"]),
        ({"tokenizer_class": "GPTNeoXJapaneseTokenizer"}, {}, ["emoji.json"]),
        (
            {"model_type": "svdllm_x", "svdllm": JAPANESE},
            {},
            ["emoji.json"],
        ),
        ({}, {"tokenizer_class": "NeverHeardOfTokenizer"}, ["qwen.tiktoken", "tiktoken.model", "tokenizer.model"]),
        ({}, {}, ["tekken.json", "tokenizer.model.v3"]),
        (
            {},
            {"fast_tokenizer_files": ["tokenizer.4.0.0.json", "../secret.json", "config.json", "*"]},
            ["tokenizer.4.0.0.json"],
        ),
    ],
)
def test_files_are_those_that_the_class_reads(
    config: dict[str, Any], tokenizer_config: dict[str, Any], files: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    write_files(folder, *NOT_A_TOKENIZERS, *files)
    write_files(tmp_path, "secret.json")
    write_json(folder / "config.json", **config)
    write_json(folder / "tokenizer_config.json", **tokenizer_config)
    assert found_in(folder) == {"tokenizer_config.json", *files}
    target = tmp_path / "target"
    target.mkdir()
    copy_companion_files(folder, target)
    for name in files:
        assert (target / name).read_text() == f"content of {name}"


def test_a_config_that_is_none_does_not_stop_a_finished_run(tmp_path: Path) -> None:
    write_files(tmp_path, "config.json", "tokenizer_config.json", "tokenizer.json")
    assert found_in(tmp_path) == {"tokenizer_config.json", "tokenizer.json"}


@pytest.mark.parametrize("form", ["mapping", "list"])
def test_code_of_a_tokenizer_is_copied_with_what_it_imports_and_not_run(form: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    references = ["tokenization_x.XTokenizer", None]
    write_json(
        folder / "tokenizer_config.json", auto_map={"AutoTokenizer": references} if form == "mapping" else references
    )
    write_files(folder, "modeling_svdllm_llama.py")  # the name of a file that every result has
    (folder / "tokenization_x.py").write_text(
        "from .helper import a\nfrom .modeling_svdllm_llama import e\nfrom ..outside import b\nraise SystemExit(9)\n"
    )
    (folder / "helper.py").write_text("from .deeper import c\nfrom .missing import d\nimport json\n")
    (folder / "deeper.py").write_bytes(b"\xff\xfe from .helper import a\n")
    write_files(folder, "modeling_x.py", "json.py")
    write_files(tmp_path, "outside.py")
    assert found_in(folder) == {"tokenizer_config.json", "tokenization_x.py", "helper.py", "deeper.py"}


@pytest.mark.parametrize("reference", ["owner/other--tokenization_x.X", "../outside.X", 3, None])
def test_code_elsewhere_is_left_there(reference: Any, tmp_path: Path) -> None:
    write_files(tmp_path, "outside.py", "model/tokenization_x.py")
    write_json(tmp_path / "model" / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, reference]})
    assert found_in(tmp_path / "model") == {"tokenizer_config.json"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Elastic, of a model with named chat templates and a vocabulary of another form beside ``tokenizer.json``."""
    folder = tmp_path_factory.mktemp("companions")
    dense = save_dense(folder / "dense", tokenizer=byte_tokenizer(chat_template=dict(TEMPLATES)))
    GenerationConfig(max_length=40).save_pretrained(dense)
    write_files(dense, "sentencepiece.bpe.model", "tokenizer_backup.bin", "custom_generate/generate.py")
    run(dense, folder / "small", recipe=small_recipe(ratio=0.2, elastic=True))
    return folder / "small"


def assert_companions(folder: Path, dense: Path) -> None:
    names = {
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "sentencepiece.bpe.model"),
        *("additional_chat_templates/tool_use.jinja", "additional_chat_templates/rag.jinja", "generation_config.json"),
    }
    assert found_in(folder) == names
    for name in names:
        assert (folder / name).read_bytes() == (dense / name).read_bytes()
    assert AutoTokenizer.from_pretrained(folder).chat_template == TEMPLATES
    assert not (folder / "tokenizer_backup.bin").exists()
    assert not (folder / "custom_generate").exists()


def recovered(small: Path, out: Path) -> None:
    (out.parent / "text.txt").write_text(TEXT)
    settings = {"methods": ["sequential-lora"], "seqlen": 16, "batch": 2, "steps": 1}
    svdllm.recover(small, out, make_recovery(settings | {"data": str(out.parent / "text.txt")}))


def in_a_graph(small: Path, out: Path) -> None:
    """The graph itself is a stub."""
    stub, logits = SimpleNamespace(save_pretrained=lambda folder: None), (torch.ones(1), torch.ones(1))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"_check_packages": None, "_traced": stub, "_opened": None, "_both_logits": logits}.items():
            patch.setattr(graphs, name, lambda *args, value=value, **kwargs: value)
        graphs.export_graph(small, out, "onnx")


COMMANDS: dict[str, Callable[[Path, Path], Any]] = {
    "slice": lambda small, out: svdllm.slice_checkpoint(small, 0.5, out),
    "recover": recovered,
    "quantize": lambda small, out: svdllm.quantize(small, out),
    "export dense": lambda small, out: svdllm.export_dense(small, out),
    "export padded": lambda small, out: svdllm.export_padded(small, out, 3),
    "export onnx": in_a_graph,
}


def test_compress_keeps_them(checkpoint: Path) -> None:
    assert_companions(checkpoint, checkpoint.with_name("dense"))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_other_command_keeps_them(command: str, checkpoint: Path, tmp_path: Path) -> None:
    if command == "quantize":
        pytest.importorskip("torchao")
    COMMANDS[command](checkpoint, tmp_path / "out")
    assert_companions(tmp_path / "out", checkpoint.with_name("dense"))
    if command in ("slice", "recover", "quantize"):
        svdllm.verify(tmp_path / "out", "cpu")


def test_templates_in_their_folder_are_verified(checkpoint: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    with (copy / "additional_chat_templates" / "rag.jinja").open("a") as file:
        file.write("more")
    with pytest.raises(CheckpointError, match=r"additional_chat_templates/rag\.jinja: expected \d+ bytes"):
        svdllm.verify(copy, "cpu")


def test_a_tokenizer_that_is_given_replaces_that_of_the_folder(checkpoint: Path, tmp_path: Path) -> None:
    given = byte_tokenizer(chat_template=CHAT_TEMPLATE)
    run(checkpoint.with_name("dense"), tmp_path / "out", tokenizer=given)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == CHAT_TEMPLATE
    assert found_in(tmp_path / "out") == {
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"),
    }


def test_a_model_of_the_hub_brings_them(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is fetched is told by the hub's own filter; the cache has a folder for each commit."""
    repository, snapshot = tmp_path / "repository", tmp_path / "snapshots" / ("c0ffee" + 34 * "0")
    shutil.copytree(checkpoint.with_name("dense"), repository)
    others = ["onnx/model.safetensors", "onnx/tokenizer.json", "consolidated.safetensors", "a.bin", "modeling_x.py"]
    write_files(repository, *others, "tokenization_x.py")
    revisions = []

    def snapshot_download(name: str, *, revision: str | None, local_files_only: bool, **patterns: Any) -> str:
        revisions.append(revision)
        files = [path.relative_to(repository).as_posix() for path in repository.rglob("*") if path.is_file()]
        for file in filter_repo_objects(files, **patterns):
            (snapshot / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(repository / file, snapshot / file)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    source = open_source("owner/name", revision="v1")
    assert source.folder == snapshot
    # All of one commit, should the branch move meanwhile.
    assert revisions == ["v1", *[snapshot.name] * (len(revisions) - 1)]
    assert_companions(snapshot, repository)
    fetched = {path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file()}
    assert fetched == {"config.json", "model.safetensors", *found_in(repository)}

    settings = json.loads((repository / "tokenizer_config.json").read_text())
    write_json(repository / "tokenizer_config.json", **settings, auto_map={"AutoTokenizer": ["tokenization_x.X", None]})
    open_source("owner/name")
    assert "tokenization_x.py" in found_in(snapshot)


WITHOUT_DEFAULT = "has chat templates named rag, tool_use, but none named default"


def test_chats_are_written_by_the_default_template(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": chat}))
    named, single = byte_tokenizer(chat_template=dict(TEMPLATES)), byte_tokenizer(chat_template=CHAT_TEMPLATE)
    ids = [evaluation_tokens(str(tmp_path / "chat.jsonl"), tokenizer).tolist() for tokenizer in (named, single)]
    assert ids[0] == ids[1]
    del named.chat_template["default"]  # type: ignore[attr-defined]
    with pytest.raises(InputError, match=rf"chat\.jsonl:messages, row 0: The tokenizer {WITHOUT_DEFAULT}"):
        evaluation_tokens(str(tmp_path / "chat.jsonl"), named)
    with pytest.raises(InputError, match=WITHOUT_DEFAULT):
        Chat(None, named)  # type: ignore[arg-type]
    assert not has_chat_template(named)
    assert has_chat_template(single)
    assert not has_chat_template(byte_tokenizer())


def test_chat_without_a_default_template_ends_before_the_model_is_loaded(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(checkpoint.with_name("dense"), tmp_path / "copy")
    (copy / "chat_template.jinja").unlink()
    monkeypatch.setattr("svdllm.checkpoint.load.load_model", None)
    with pytest.raises(SystemExit) as done:
        main(["chat", str(copy)])
    assert done.value.code == 2
    assert WITHOUT_DEFAULT in " ".join(capsys.readouterr().err.split())


def test_vllm_runs_no_tokenizer_code_that_nobody_trusts(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is told to run the model's code, which is ours, and would run that of the tokenizer, too."""
    monkeypatch.setattr(serving, "vllm_program", lambda: "/opt/vllm")
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    write_json(copy / "tokenizer_config.json", **settings, auto_map={"AutoTokenizer": [None, "owner/other--x.X"]})
    monkeypatch.setattr(Source, "load_tokenizer", lambda self, offline=False: byte_tokenizer())
    service = {"port": 0, "backend": "vllm"}
    assert "--trust-remote-code" in serving.prepare_service(str(checkpoint), **service).vllm_command
    with pytest.raises(InputError, match="vLLM would run the code that copy names for its tokenizer"):
        serving.prepare_service(str(copy), **service)
    trusted = serving.prepare_service(str(copy), **service, trust_remote_code=True)
    assert "--trust-remote-code" in trusted.vllm_command
