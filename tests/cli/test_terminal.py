"""What is shown: a terminal without a character, or a reader that is gone, ends no run."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from runs import save_dense
from svdllm.cli import main
from svdllm.cli.terminal import LenientStream


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as done:
        main([str(argument) for argument in arguments])
    return int(done.value.code or 0)


@pytest.fixture
def closed_pipe() -> Iterator[io.TextIOWrapper]:
    """A pipe whose reader is gone."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:
        yield stream


@pytest.mark.parametrize(("encoding", "shown"), [("ascii", b"0.5 ?0.1 ?"), ("latin-1", b"0.5 \xb10.1 ?")])
def test_what_the_encoding_lacks_is_a_question_mark(encoding: str, shown: bytes) -> None:
    beneath = io.BytesIO()
    stream = LenientStream(io.TextIOWrapper(beneath, encoding=encoding))
    stream.write("0.5 ±0.1 β")
    stream.flush()
    assert beneath.getvalue() == shown
    assert stream.encoding == encoding


def test_half_a_character_is_shown_in_any_encoding() -> None:
    beneath = io.BytesIO()
    stream = LenientStream(io.TextIOWrapper(beneath, encoding="utf-8"))
    stream.write("name\udce9")
    stream.flush()
    assert beneath.getvalue() == b"name?"


def test_what_nobody_reads_is_dropped(closed_pipe: io.TextIOWrapper) -> None:
    stream = LenientStream(closed_pipe)
    for _ in range(3):
        stream.write("text")
        stream.flush()
    assert stream.reader_is_gone
    nothing = LenientStream(None)  # standard output that was closed before the start
    nothing.write("text")
    nothing.flush()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_told(dense: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert run("plan", dense, "--ratio", "0.3", "--json") == 4
        monkeypatch.undo()
    assert "No space left on device" in capsys.readouterr().err


def test_a_table_with_a_name_that_the_terminal_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer
) -> None:
    folder = save_dense(tmp_path / "modèle", tokenizer=tokenizer)
    beneath = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(beneath, encoding="ascii"))
    assert run("plan", folder, "--ratio", "0.3") == 0
    assert b"mod?le" in beneath.getvalue()
    assert b"weight files" in beneath.getvalue()


@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_a_command_whose_reader_is_gone_ends_as_it_would(
    arguments: list[str], dense: Path, closed_pipe: io.TextIOWrapper, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", closed_pipe)
    monkeypatch.setattr(sys, "stderr", closed_pipe)
    assert run("plan", dense, "--ratio", "0.3", *arguments) == 0
    assert run("plan", dense, "--ratio", "0.3", "--seqlen", "4096", *arguments) == 2
    assert sys.stdout is closed_pipe
