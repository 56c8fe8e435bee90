"""Talking to a model: what is sent is the template's text of all that was said, and an answer can be stopped."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from threading import Event, Timer
from typing import Any

import pytest
import torch

from families import tiny_model
from runs import save_dense
from svdllm.cli import main
from svdllm.common.errors import InputError
from svdllm.inference.chat import Chat
from tokenizers_local import byte_tokenizer

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "[{{ m['role'][0] }}]{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"
)
TOKENS = 6


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer(chat_template=TEMPLATE)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama", vocab_size=300, max_position_embeddings=256)


def continued(model: Any, tokenizer: Any, text: str, tokens: int = TOKENS) -> str:
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)


def test_turns_follow_each_other(model: Any, tokenizer: Any) -> None:
    chat = Chat(model, tokenizer, system="short", max_new_tokens=TOKENS, temperature=0)
    first = "".join(chat.answer("the fox"))
    assert first == continued(model, tokenizer, "[s]short\n[u]the fox\n[a]")
    second = "".join(chat.answer("and the dog"))
    assert second == continued(model, tokenizer, f"[s]short\n[u]the fox\n[a]{first}\n[u]and the dog\n[a]")
    assert [message["role"] for message in chat.messages] == ["system", "user", "assistant", "user", "assistant"]
    chat.reset()
    assert "".join(chat.answer("the fox")) == first


def test_without_a_template_text_is_continued(model: Any) -> None:
    plain = byte_tokenizer()
    chat = Chat(model, plain, max_new_tokens=TOKENS, temperature=0)
    for _ in range(2):  # nothing of the first is in the second
        assert "".join(chat.answer("the fox")) == continued(model, plain, "the fox")
    with pytest.raises(InputError, match="has no chat template"):
        Chat(model, plain, system="short")


def test_an_answer_can_be_stopped(model: Any, tokenizer: Any) -> None:
    steps, go_on = [], Event()

    def waits(module: Any, arguments: Any) -> None:
        steps.append(1)
        if len(steps) == 3:
            go_on.wait(30)

    chat = Chat(model, tokenizer, max_new_tokens=100, temperature=0)
    hook = model.register_forward_pre_hook(waits)
    try:
        answer = chat.answer("the fox")
        first = next(answer)
        Timer(0.2, go_on.set).start()
        answer.close()  # type: ignore[attr-defined]
    finally:
        hook.remove()
    assert len(steps) <= 3  # of the 100 that it might take
    assert chat.messages == [{"role": "user", "content": "the fox"}, {"role": "assistant", "content": first}]


def test_what_goes_wrong_is_raised_where_the_answer_is_read(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = Chat(model, tokenizer, max_new_tokens=TOKENS)
    with pytest.raises(InputError, match="is beyond the model's context of 256 tokens"):
        list(chat.answer("a" * 300))
    chat.messages = [{"role": "tool", "content": "x"}]
    with pytest.raises(
        InputError, match=r"^the conversation: the tokenizer's chat template refuses the messages \(no tools\)$"
    ):
        list(chat.answer("the fox"))
    chat.reset()

    def fails(**arguments: Any) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr(model, "generate", fails)
    with pytest.raises(RuntimeError, match="boom"):
        list(chat.answer("the fox"))
    assert chat.messages == []
    for wrong in ({"max_new_tokens": 0}, {"temperature": -1.0}):
        with pytest.raises(InputError, match="at least"):
            Chat(model, tokenizer, **wrong)


def test_the_context_bounds_an_answer(model: Any, tokenizer: Any) -> None:
    chat = Chat(model, tokenizer, max_new_tokens=500, temperature=0)
    message = "the fox " * 60
    length = len(tokenizer(f"[u]{message}\n[a]")["input_ids"])
    assert 200 < length < 256
    steps: list[int] = []
    hook = model.register_forward_pre_hook(lambda *_: steps.append(1))
    try:
        list(chat.answer(message))
    finally:
        hook.remove()
    assert len(steps) <= 256 - length


def talk(monkeypatch: pytest.MonkeyPatch, typed: str, *arguments: object) -> int:
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    with pytest.raises(SystemExit) as done:
        main(["chat", *map(str, arguments), "--max-new-tokens", str(TOKENS)])
    return int(done.value.code or 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    return save_dense(tmp_path_factory.mktemp("chat") / "dense", tokenizer=tokenizer)


def test_a_conversation_through_a_pipe(
    folder: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from svdllm import load_model

    typed = "the fox\n\n/reset\nthe fox\n/exit\nnever\n"
    assert talk(monkeypatch, typed, folder, "--temperature", "0") == 0
    said = continued(load_model(folder), tokenizer, "[u]the fox\n[a]")
    assert capsys.readouterr().out == f"{said}\n{said}\n"


def test_a_seed_repeats_what_was_drawn(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    state, said = torch.get_rng_state(), []
    for seed in (3, 3, 4):
        assert talk(monkeypatch, "the fox\n", folder, "--temperature", "1", "--seed", seed) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != said[2]
    assert torch.equal(torch.get_rng_state(), state)


def test_ctrl_c_ends_the_answer_and_not_the_conversation(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def answer(self: Chat, message: str) -> Any:
        yield f"{message}!"
        if message == "one":
            raise KeyboardInterrupt

    monkeypatch.setattr(Chat, "answer", answer)
    assert talk(monkeypatch, "one\ntwo\n", folder) == 0
    captured = capsys.readouterr()
    assert captured.out == "one!\ntwo!\n"
    assert "(stopped)" in captured.err


def test_mistakes_end_with_a_message(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = save_dense(tmp_path / "plain", tokenizer=byte_tokenizer())
    for arguments, message in (
        ((plain, "--system", "short"), "has no chat template, so --system has no place"),
        ((tmp_path,), "no config.json"),
        ((folder, "--device", "abacus"), "--device 'abacus' is not available"),
    ):
        assert talk(monkeypatch, "the fox\n", *arguments) == 2
        assert message in " ".join(capsys.readouterr().err.split())
    assert talk(monkeypatch, f"{'a' * 300}\n", folder) == 2
    assert "begin anew with /reset" in " ".join(capsys.readouterr().err.split())
    assert talk(monkeypatch, "the fox\n", plain) == 0
    assert "continued as plain text" in " ".join(capsys.readouterr().err.split())
