"""Disks that run full: one message and exit 4 whoever writes, finished work kept, nothing half-made left."""

from __future__ import annotations

import errno
import multiprocessing
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

import svdllm
from runs import TEXT, digests, run, small_recipe
from svdllm.cli import main
from svdllm.common.disk import allocate, explain_full_disk
from svdllm.common.errors import InputError, ResourceError, as_ours
from svdllm.common.files import save_atomically, save_tensors, write_atomically
from svdllm.compression.slice import slice_checkpoint
from svdllm.evaluation.document import store_evaluation
from svdllm.export.quantize import quantize
from svdllm.models.hidden_states import HiddenStates
from svdllm.recovery import make_recovery, recover

# Its processes start with the library imported.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["svdllm", "runs"])


def limited(limit: int, pipe: Any, work: Callable[..., object], *arguments: Any) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        work(*arguments)
        pipe.send(None)
    except Exception as error:
        pipe.send((type(error), str(error)))


def within_limit(limit: int, work: Callable[..., object], *arguments: Any) -> tuple[type[Exception], str]:
    """Runs in a process that can write no file of more bytes; returns its error. The process must not be killed."""
    ours, theirs = FORKS.Pipe()
    process = FORKS.Process(target=limited, args=(limit, theirs, work, *arguments))
    process.start()
    theirs.close()
    process.join()
    assert process.exitcode == 0
    return ours.recv()


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), 4, "No space"),
        (SafetensorError("Error while serializing: I/O error: File too large (os error 27)"), 4, "File too large"),
        (Exception("No space left on device (os error 28)"), 4, "No space left on device: a file"),  # of tokenizers
        (Exception("Permission denied (os error 13)"), 2, "Permission denied: a file"),
        (OSError(errno.EFBIG, "File too large", "x"), 4, "File too large: x"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), 4, "Cannot allocate memory"),
        (OSError("no such repository"), 2, "no such repository"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"), 4, "No space left"),
        (
            RuntimeError("[enforce fail at inline_container.cc:858] . PytorchStreamWriter failed writing file data/0"),
            4,
            "No space left",
        ),
        (InputError("model.safetensors is damaged (No such file (os error 2))"), 2, "model.safetensors is damaged"),
    ],
)
def test_what_libraries_say_of_the_disk_is_understood(error: Exception, code: int, message: str) -> None:
    ours = as_ours(error)
    assert ours is not None
    assert ours.exit_code == code
    assert str(ours).startswith(message)


@pytest.mark.parametrize(
    "error",
    [
        SafetensorError("Error while deserializing header: header too large"),
        RuntimeError("PytorchStreamReader failed reading zip archive: inline_container.cc:100"),
        Exception("unknown model"),
    ],
)
def test_other_errors_are_not_taken_for_a_full_disk(error: Exception) -> None:
    assert as_ours(error) is None
    with pytest.raises(type(error)), explain_full_disk(Path("out"), ""):
        raise error


@pytest.mark.parametrize(
    ("number", "todo"),
    [
        (errno.ENOSPC, "Free some room on that disk."),
        (errno.EDQUOT, "Free some of the room that your quota allows."),
        (errno.EFBIG, "Raise the limit on the size of files (`ulimit -f`, or that of the file system)."),
    ],
)
def test_a_full_disk_is_said_with_the_file_and_what_to_do(number: int, todo: str) -> None:
    with pytest.raises(ResourceError) as caught, explain_full_disk(Path("out"), "Blocks are kept."):
        raise OSError(number, os.strerror(number))
    assert str(caught.value) == f"{os.strerror(number)}: out. {todo} Blocks are kept."
    with pytest.raises(ResourceError, match="No space left on device: out"), explain_full_disk(Path("out"), ""):
        raise SafetensorError("I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    "write",
    [
        lambda file: save_tensors({"a": torch.zeros(10_000)}, file),
        lambda file: save_atomically({"a": torch.zeros(10_000)}, file),
        lambda file: write_atomically(file, bytes(40_000)),
        lambda file: allocate(file, 40_000),
        lambda file: store_evaluation({"results": ["x" * 40_000], "tasks": []}, file.with_suffix(".json")),
    ],
)
def test_a_file_that_could_not_be_written_is_named_and_gone(
    write: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit is that of the whole process, whose other files are short."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            write(tmp_path / "file")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert str(tmp_path / "file") in str(caught.value.filename)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("offered", [True, False, "refused"])
def test_spilled_states_take_their_room_when_they_are_made(
    offered: bool | str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    if offered == "refused":
        monkeypatch.setattr("os.posix_fallocate", refuses)
    elif not offered:
        monkeypatch.delattr("os.posix_fallocate")
    states = HiddenStates((3, 100, 1000), torch.float32, tmp_path / "hidden")
    assert (tmp_path / "hidden").stat().st_size == 1_200_000
    assert (tmp_path / "hidden").stat().st_blocks * 512 >= 1_200_000
    states.tensor.fill_(1)
    states.close()
    assert list(tmp_path.iterdir()) == []


def test_no_room_for_spilled_states_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        HiddenStates((10, 10), torch.float32, tmp_path / "hidden")
    assert caught.value.filename == str(tmp_path / "hidden")
    assert list(tmp_path.iterdir()) == []


def compressed(dense: Path, out: Path, options: dict[str, Any]) -> None:
    run(dense, out, **options)


def size_of_largest(folder: Path, pattern: str) -> int:
    return max(file.stat().st_size for file in folder.rglob(pattern))


def test_finished_blocks_are_kept_and_a_half_made_checkpoint_is_not(dense: Path, tmp_path: Path) -> None:
    run(dense, tmp_path / "straight", analysis_dir=tmp_path / "analysis")
    blocks = size_of_largest(tmp_path / "analysis", "block-*.safetensors")
    weights = size_of_largest(tmp_path / "straight", "model.safetensors")
    assert blocks + 1000 < weights
    kind, message = within_limit(blocks + 1000, compressed, dense, tmp_path / "out", {})
    assert kind is ResourceError
    assert "out.partial/finished.writing/model.safetensors" in message
    assert "Finished blocks are kept: the same command goes on with them" in message
    kept = {path.relative_to(tmp_path / "out.partial").as_posix() for path in (tmp_path / "out.partial").iterdir()}
    assert kept == {".svdllm-run", "analysis"}
    assert len(list((tmp_path / "out.partial" / "analysis").glob("block-*.safetensors"))) == 2
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.lock").exists()
    run(dense, tmp_path / "out")
    assert digests(tmp_path / "out") == digests(tmp_path / "straight")


@pytest.mark.parametrize("options", [{}, {"hidden_states_limit": 1}])
def test_nothing_is_left_where_nothing_was_finished(options: dict[str, Any], dense: Path, tmp_path: Path) -> None:
    """With a limit of one byte, it is the spilled hidden states that find no room; that kills no process."""
    kind, message = within_limit(10_000, compressed, dense, tmp_path / "out", options)
    assert kind is ResourceError
    assert message.startswith("File too large: ")
    assert ("hidden-states-0" in message) == bool(options)
    assert list(tmp_path.iterdir()) == []


def sliced(folder: Path, out: Path) -> None:
    slice_checkpoint(folder, 0.5, out)


def trained(folder: Path, out: Path, text: Path) -> None:
    recover(
        folder, out, make_recovery({"methods": ("distill",), "data": str(text), "seqlen": 16, "batch": 4, "steps": 2})
    )


def test_commands_that_write_at_once_leave_nothing(dense: Path, tmp_path: Path) -> None:
    made = run(dense, tmp_path / "elastic", recipe=small_recipe(elastic=True)).output_dir
    (tmp_path / "text.txt").write_text(TEXT)
    before = sorted(tmp_path.iterdir())
    calls: list[tuple[Callable[..., object], Path, list[Any]]] = [
        (sliced, made, []),
        (svdllm.export_dense, made, []),
        (quantize, dense, []),
        (trained, made, [tmp_path / "text.txt"]),
    ]
    for work, folder, more in calls:
        kind, message = within_limit(20_000, work, folder, tmp_path / "out", *more)
        assert kind is ResourceError, message
        assert message.startswith(("File too large: ", "No space left on device: "))
        assert sorted(tmp_path.iterdir()) == before


def test_what_was_measured_is_shown_even_if_it_cannot_be_kept(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "out.json")

    monkeypatch.setattr("svdllm.evaluation.document.store_evaluation", full)
    (tmp_path / "text.txt").write_text(TEXT)
    arguments = ["eval", dense, "--ppl", tmp_path / "text.txt", "--seqlen", 16, "--max-windows", 2, "--offline"]
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in [*arguments, "-o", tmp_path / "out.json"]])
    assert ended.value.code == 4
    printed = capsys.readouterr()
    assert "perplexity" in printed.out
    assert "No space left on device: out.json" in printed.err
