"""What a model can take: unknown ids are found by every command, and defaults keep to the context."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from families import tiny_model
from runs import TEXT, run, save_dense
from svdllm import InputError, load_model, perplexity
from svdllm.cli import main
from svdllm.comparison.measure import continuations
from svdllm.inference.bench import BenchSettings
from svdllm.inference.chat import Chat
from svdllm.models.limits import context_length, guard_embeddings, require_known_ids, within_context
from tokenizers_local import byte_tokenizer

UNKNOWN = r"token id 305 \('<x15>'\) is beyond the model's vocabulary of 300: the tokenizer does not fit the model"
CONTEXT = 64  # of the tiny models


@pytest.fixture(scope="module")
def outgrown() -> Any:
    """A tokenizer of 290 tokens and 20 added ones, for models of 300."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([f"<x{number}>" for number in range(20)])
    return tokenizer


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, outgrown: Any) -> Path:
    """A dense and a compressed model, a text that they know, and others with a token that they do not."""
    folder = tmp_path_factory.mktemp("limits")
    run(save_dense(folder / "dense", tokenizer=outgrown), folder / "small")
    (folder / "good.txt").write_text(TEXT)
    (folder / "bad.txt").write_text(f"{TEXT} <x15> {TEXT}")
    rows = [{"prompt": "the fox ", "completion": word} for word in ("jumps", "<x15>")]
    (folder / "bad.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def cli(place: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> int:
    monkeypatch.chdir(place)
    with pytest.raises(SystemExit) as done:
        main(command.split())
    return int(done.value.code or 0)


@pytest.mark.parametrize(
    "command",
    [
        "compress dense -o out --ratio 0.3 --preset paper --samples 400 --seqlen 64 --calib bad.txt",
        "eval small --base dense --ppl bad.txt --seqlen 32",
        "recover small -o out --data bad.txt --steps 1 --ppl none",
        "recover small -o out --data bad.jsonl --steps 1 --ppl none",
        "recover small -o out --data good.txt --eval-data bad.jsonl --eval-samples 2 --steps 1 --ppl none",
        "recover small -o out --data good.txt --steps 1 --ppl bad.txt",
        "compare dense -o out --methods svd --ratios 0.3 --ppl bad.txt --new-tokens 0",
        "chat small",
    ],
)
def test_ids_beyond_the_embedding_are_found_by_every_command(
    command: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("the <x15>\n"))
    before = {path.name for path in place.iterdir()}
    assert cli(place, monkeypatch, f"{command} --offline") == 2
    assert "token id 305 ('<x15>') is beyond the model's vocabulary of 300" in " ".join(capsys.readouterr().err.split())
    if "compare" not in command:  # whose folder is a report that the same command goes on in
        assert {path.name for path in place.iterdir()} == before


def test_ids_beyond_the_embedding_from_python(outgrown: Any) -> None:
    model = tiny_model("llama", vocab_size=300)
    with pytest.raises(InputError, match=UNKNOWN):
        next(Chat(model, outgrown).answer("the <x15>"))
    with pytest.raises(InputError, match=UNKNOWN):
        continuations(model, outgrown, ["the <x15>"], 2)
    stream = torch.tensor(outgrown("the fox <x15>")["input_ids"])
    for ids, settings in (
        (stream, {"seqlen": len(stream)}),
        (stream[:6], {"seqlen": 6, "protocol": "rolling", "prefix_token_id": 305}),
        (stream[-3:], {"seqlen": 1, "protocol": "rolling", "prefix_token_id": 1}),
    ):
        with pytest.raises(InputError, match="token id 305 is beyond the model's vocabulary of 300"):
            perplexity(model, ids, **settings)
    guard_embeddings(model)
    with pytest.raises(InputError, match="token id 305 is beyond"):
        model.generate(stream.unsqueeze(0), max_new_tokens=1)
    assert model.generate(stream[:4].unsqueeze(0), max_new_tokens=2, do_sample=False).shape[1] <= 6


def test_continuations_keep_to_the_context(outgrown: Any) -> None:
    model = tiny_model("gpt2", vocab_size=300)  # whose positions are a table
    (written,) = continuations(model, outgrown, ["0" * 60], 40)
    assert len(outgrown(written["text"])["input_ids"]) <= CONTEXT - 60 + 2
    with pytest.raises(InputError, match=r"the prompt '0+': its length with one more token, 65 is beyond the .* 64"):
        continuations(model, outgrown, ["0" * 64], 40)


def test_ids_beyond_the_embedding_in_tasks(place: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is in the extra 'eval'")
    import svdllm

    rows = [{"goal": "To run", "sol1": "use legs", "sol2": second, "label": 0} for second in ("use <x15>", "sit")]
    (tmp_path / "piqa.validation.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(InputError, match=UNKNOWN):
        svdllm.evaluate_tasks(str(place / "dense"), ["piqa"], task_data=tmp_path, offline=True)


def test_which_ids_are_known() -> None:
    config = tiny_model("llama", vocab_size=300).config
    require_known_ids(torch.tensor([0, 299]), config)
    require_known_ids(torch.empty(0, dtype=torch.int64), config)
    require_known_ids(torch.tensor([10**6]), None)  # a model without a config
    with pytest.raises(InputError, match="must not be negative, found -1"):
        require_known_ids(torch.tensor([-1]), config)


@pytest.mark.parametrize(("longest", "context"), [(128, 128), (-1, None), (0, None), (None, None)])
def test_a_context_without_a_limit(longest: int | None, context: int | None) -> None:
    config: Any = SimpleNamespace(max_position_embeddings=longest)
    config.get_text_config = lambda: config
    assert context_length(config) == context
    assert within_context(config, 2048) == (context or 2048)


@pytest.mark.parametrize(
    ("context", "prompts"), [(2048, (128, 512)), (None, (128, 512)), (256, (128,)), (100, (36,)), (64, (1,))]
)
def test_prompts_that_nobody_asked_for_fit_the_context(context: int | None, prompts: tuple[int, ...]) -> None:
    assert BenchSettings().within(context).prompts == prompts
    asked = BenchSettings(prompts=(512,))
    assert asked.within(context) is asked


def document(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out)


def test_windows_that_nobody_asked_for_fit_the_context(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli(place, monkeypatch, "eval small --ppl good.txt --offline --json") == 0
    assert document(capsys)["results"][0]["seqlen"] == CONTEXT
    assert (
        cli(place, monkeypatch, "compress dense -o made --ratio 0.3 --samples 8 --preset paper --calib good.txt") == 0
    )
    assert json.loads((place / "made/svdllm/report.json").read_text())["recipe"]["seqlen"] == CONTEXT
    assert "Calibration windows have 64 tokens" in capsys.readouterr().err
    assert cli(place, monkeypatch, "plan dense --ratio 0.3 --json") == 0
    small = document(capsys)["hidden_states_bytes"]
    assert cli(place, monkeypatch, f"plan dense --ratio 0.3 --json --seqlen {CONTEXT}") == 0
    assert document(capsys)["hidden_states_bytes"] == small


def test_training_that_nobody_measured_fits_the_context(
    place: Path, outgrown: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli(place, monkeypatch, "recover small -o trained --data good.txt --steps 1 --ppl good.txt --json") == 0
    found = document(capsys)
    assert found["perplexity"]["good.txt"]["after"]["seqlen"] == CONTEXT
    assert found["examples"]["sequential-lora"]["examples"] == len(outgrown(TEXT)["input_ids"]) // CONTEXT
    for option in ("--seqlen", "--ppl-seqlen"):
        assert (
            cli(place, monkeypatch, f"recover small -o none --data good.txt --steps 1 --ppl good.txt {option} 65") == 2
        )
        said = " ".join(capsys.readouterr().err.split())
        assert said == f"Error: {option} 65 is beyond the model's context of 64 tokens: lower it to 64 or less"
    assert not (place / "none.partial").exists()


def test_a_comparison_that_nobody_measured_fits_the_context(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is in the extra 'report'")
    command = (
        "compare dense -o report --methods svd-llm --ratios 0.3 --samples 8 --calib good.txt --ppl good.txt "
        "--ppl-windows 2 --new-tokens 0 --keep --json"
    )
    for _ in range(2):  # the second finds what the first made
        assert cli(place, monkeypatch, command) == 0
        models = document(capsys)
    made = json.loads((place / "report/checkpoints/svd-llm-0.3/svdllm/report.json").read_text())
    assert made["recipe"]["seqlen"] == CONTEXT
    assert f'"seqlen": {CONTEXT}' in json.dumps(models)
    assert load_model(place / "report/checkpoints/svd-llm-0.3").config.max_position_embeddings == CONTEXT
