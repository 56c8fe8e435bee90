"""Locks: one holder at a time, whatever becomes of it, with and without locks of the kernel."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import socket
from pathlib import Path
from typing import Any

import pytest

from svdllm.common import locks
from svdllm.common.errors import InputError
from svdllm.common.locks import locked

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["svdllm", "runs"])
ELSEWHERE = {"process": 7, "host": "elsewhere", "since": "2026-01-01 00:00:00"}


def in_process(work: Any, *arguments: Any) -> int:
    process = FORKS.Process(target=work, args=arguments)
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def hold_and_die(file: Path) -> None:
    with locked(file, file):
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "made" / "for" / "out.lock"


@pytest.fixture
def no_kernel_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("svdllm.common.locks.fcntl.flock", flock)


def left_by(file: Path, **holder: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(holder))


def assert_held(file: Path, ending: str = "") -> None:
    with pytest.raises(InputError) as caught, locked(file, Path("out")):
        pass
    assert str(caught.value).endswith(f"Wait for it, stop it, or choose another output.{ending}")
    assert "is writing to out" in str(caught.value)


def test_the_second_is_told_of_the_first(file: Path) -> None:
    with locked(file, Path("out")) as warning:
        assert warning is None
        with pytest.raises(InputError, match=rf"\(process {os.getpid()} on {socket.gethostname()} since 20") as caught:
            locked(file, Path("out")).__enter__()
        assert "remove" not in str(caught.value)
        assert_held(file)
        assert in_process(assert_held, file) == 0
    with locked(file, Path("out")):
        pass


@pytest.mark.parametrize("error", [None, ValueError(), KeyboardInterrupt()])
def test_nothing_is_left_however_it_ends(error: BaseException | None, file: Path, tmp_path: Path) -> None:
    try:
        with locked(file, Path("out")):
            assert file.is_file()
            if error is not None:
                raise error
    except (ValueError, KeyboardInterrupt):
        pass
    assert list(tmp_path.iterdir()) == []


def test_folders_with_something_in_them_stay(file: Path) -> None:
    with locked(file, Path("out")):
        (file.parent / "out").mkdir()
    assert [path.name for path in file.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("kernel", [True, False])
def test_a_killed_holder_locks_nothing(kernel: bool, file: Path, request: pytest.FixtureRequest) -> None:
    if not kernel:
        request.getfixturevalue("no_kernel_locks")
    assert in_process(hold_and_die, file) == -signal.SIGKILL
    assert file.is_file()
    with locked(file, Path("out")) as warning:
        assert warning is None
        assert_held(file, "" if kernel else f" If that run has ended, remove {file}.")
    assert not file.exists()


def test_without_kernel_locks_another_host_is_believed(file: Path, no_kernel_locks: None) -> None:
    left_by(file, **ELSEWHERE)
    assert_held(file, f" If that run has ended, remove {file}.")
    assert json.loads(file.read_text()) == ELSEWHERE
    file.unlink()
    with locked(file, Path("out")):
        pass


def test_a_run_of_another_host_that_holds_it_is_named_with_a_way_out(file: Path) -> None:
    left_by(file, **ELSEWHERE)
    with file.open("r+") as held:
        locks.fcntl.flock(held, locks.fcntl.LOCK_EX)
        assert_held(file, f" If that run has ended, remove {file}.")


def test_a_free_lock_of_another_host_is_a_warning(file: Path) -> None:
    left_by(file, **ELSEWHERE)
    with locked(file, Path("out")) as warning:
        assert warning is not None
        assert "(process 7 on elsewhere since 2026-01-01 00:00:00) was stopped while it wrote to out" in warning


@pytest.mark.parametrize("content", ["", "no json", "[1, 2]", "\x00" * 2000])
def test_what_is_in_the_file_does_not_matter_to_the_kernel(content: str, file: Path) -> None:
    file.parent.mkdir(parents=True)
    file.write_text(content)
    with locked(file, Path("out")) as warning:
        assert warning is None


def test_a_file_that_its_holder_has_just_removed_is_not_held(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between opening and locking the file, its holder ends and a third process makes it anew."""
    left_by(file, **ELSEWHERE)
    flock, swapped = locks.fcntl.flock, []

    def swap_then_lock(handle: int, flags: int) -> None:
        if not swapped:
            file.rename(file.with_name("gone"))
            swapped.append(file.write_text("{}"))
        flock(handle, flags)

    monkeypatch.setattr("svdllm.common.locks.fcntl.flock", swap_then_lock)
    with locked(file, Path("out")):
        assert json.loads(file.read_text())["process"] == os.getpid()


def hold_for_a_while(file: Path, barrier: Any, others: Any, overlaps: Any) -> None:
    barrier.wait()
    for _ in range(50):
        try:
            with locked(file, Path("out")):
                with others.get_lock():
                    others.value += 1
                    overlaps.value += others.value > 1
                with others.get_lock():
                    others.value -= 1
        except InputError:
            pass


def test_many_at_once_never_hold_it_together(file: Path) -> None:
    file.parent.mkdir(parents=True)
    barrier, others, overlaps = FORKS.Barrier(4), FORKS.Value("i", 0), FORKS.Value("i", 0)
    work = [FORKS.Process(target=hold_for_a_while, args=(file, barrier, others, overlaps)) for _ in range(4)]
    for process in work:
        process.start()
    for process in work:
        process.join()
    assert [process.exitcode for process in work] == [0] * 4
    assert overlaps.value == 0
    assert not file.exists()
