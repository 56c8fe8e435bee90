"""Progress without a terminal: few lines, told by time, that count what is done and the time that is left."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from runs import run, small_recipe
from svdllm.cli.console import ConsoleReporter
from svdllm.common.progress import Reporter, SubReporter


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def stage_of(reporter: Reporter, clock: Clock, name: str, steps: int, seconds: float, first: int = 1) -> None:
    """A stage in which every step takes equally long."""
    with reporter.stage(name, steps):
        for done in range(first, steps + 1):
            clock.now += seconds
            reporter.advance(done, steps)


def lines_of(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_a_line_after_ten_seconds_and_then_at_growing_pauses(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    stage_of(ConsoleReporter(clock), clock, "probe", 100, 1.0)
    assert lines_of(capsys) == [
        "probe ...",
        "probe: 10 % done, about 1 min 30 s left",
        "probe: 30 % done, about 1 min 10 s left",
        "probe: 70 % done, about 30.0 s left",
        "probe took 1 min 40 s",
    ]


def test_a_day_is_less_than_two_hundred_lines(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    stage_of(ConsoleReporter(clock), clock, "lora", 24 * 3600, 1.0)
    lines = lines_of(capsys)
    assert 144 < len(lines) < 160
    assert lines[-2].endswith("left")


def test_short_stages_have_no_lines_between(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    stage_of(ConsoleReporter(clock), clock, "write", 500, 0.0001)
    assert lines_of(capsys) == ["write ..."]


def test_the_time_left_is_not_taken_from_what_an_earlier_run_did(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    """Step 501 is the first one told of; it took as long as each of the 499 that follow."""
    stage_of(ConsoleReporter(clock), clock, "lora", 1000, 10.0, first=501)
    assert lines_of(capsys)[1:3] == ["lora: 50 % done", "lora: 50 % done, about 1 h 22 min left"]


def test_a_part_of_a_larger_run_is_told_in_the_same_way(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    stage_of(SubReporter(ConsoleReporter(clock), "balanced: "), clock, "gradients", 30, 4.0)
    percent = [int(found[1]) for line in lines_of(capsys) if (found := re.search(r"gradients: (\d+) % done", line))]
    assert percent == [10, 26, 60]


class Told(Reporter):
    """Keeps what each stage was said to have done."""

    def __init__(self) -> None:
        super().__init__()
        self.told: dict[str, list[float]] = {}
        self._name = ""

    def start_stage(self, name: str, steps: int) -> None:
        self._name = name

    def advance(self, done: int, steps: int) -> None:
        self.told.setdefault(self._name, []).append(done / steps)


def test_every_walk_counts_up_to_its_end(dense: Path, tmp_path: Path) -> None:
    reporter = Told()
    settings = {"metric": "two-sided", "gradient_samples": 4, "allocation": "loss", "calibration_mode": "sequential"}
    run(dense, tmp_path / "out", recipe=small_recipe(**settings, batch_tokens=32), reporter=reporter)
    for stage in ("analyze", "gradients", "probe", "sequential"):
        told = reporter.told[stage]
        assert told == sorted(told)
        assert len(set(told)) == len(told) > 1
        assert told[-1] == 1


def test_a_reverse_walk_has_less_and_less_time_left(
    dense: Path, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every batch takes 15 seconds."""
    printed = ConsoleReporter(clock)
    advance = printed.advance

    def slowly(done: int, steps: int) -> None:
        clock.now += 15
        advance(done, steps)

    monkeypatch.setattr(printed, "advance", slowly)
    recipe = small_recipe(metric="two-sided", gradient_samples=8, batch_tokens=16)
    run(dense, tmp_path / "out", recipe=recipe, reporter=SubReporter(printed, "balanced: "))
    told = re.findall(r"balanced: gradients: (\d+) % done(?:, about (.*) left)?", capsys.readouterr().err)
    assert told == [("6", ""), ("18", "3 min 15 s"), ("37", "2 min 30 s"), ("75", "1 min 00 s")]
