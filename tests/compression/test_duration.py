"""The predicted time of a run: counted from shapes, in speeds that are measured robustly."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from families import tiny_config
from runs import small_recipe
from svdllm.checkpoint.tensors import file_bytes
from svdllm.cli.console import duration_range
from svdllm.compression import duration, machine_speed
from svdllm.compression.duration import FAST_FILES, predicted_seconds
from svdllm.compression.machine_speed import MachineSpeed, busy_share, measure_speed
from svdllm.compression.memory_needs import GPU_RAM_BYTES, GPU_WORKING_BYTES, device_bytes, ram_by_stage
from svdllm.compression.recipe import Recipe
from svdllm.compression.subject import Subject, structure_for
from svdllm.compression.workload import Workload
from svdllm.models.open import Source
from svdllm.models.skeleton import build_skeleton

INSTANT = MachineSpeed(*[1e30] * 5)


def workload(recipe: Recipe, num_outputs: int = 1) -> Workload:
    config = tiny_config("llama")
    skeleton = build_skeleton(config)
    config.dtype = torch.float32
    source = Source(name="tiny", revision=None, config=config, folder=None, weights=None)
    subject = Subject(source=source, skeleton=skeleton, structure=structure_for(skeleton, recipe))
    return Workload(
        subject=subject,
        recipe=recipe,
        device=torch.device("cpu"),
        dtype=torch.float32,
        written_bytes=file_bytes(subject.stored),
        num_outputs=num_outputs,
    )


def seconds(
    monkeypatch: pytest.MonkeyPatch, work: Workload, speed: MachineSpeed, typical: MachineSpeed | None = None
) -> tuple[dict[str, float], tuple[float, float]]:
    monkeypatch.setattr(duration, "measure_speed", lambda *shape: (speed, typical or speed))
    return predicted_seconds(work)


def test_forward_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two operations per weight and token, and three per token, position and feature of every layer's attention."""
    work = workload(small_recipe(samples=8, seqlen=16))
    stages, _ = seconds(monkeypatch, work, replace(INSTANT, multiply=1e6))
    weights, layers, hidden = work.structure.num_target_params, 2, work.hidden_size
    assert stages["analyze"] == pytest.approx(8 * 16 * (2 * weights + 3 * 16 * hidden * layers) / 1e6)


def test_decompositions_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    work = workload(small_recipe())
    stages, _ = seconds(monkeypatch, work, replace(INSTANT, eigh=1e6))
    assert stages["analyze"] == pytest.approx(sum(t.full_rank**3 for t in work.structure.targets) / 1e6)


@pytest.mark.parametrize("speed", [field.name for field in fields(MachineSpeed)])
def test_everything_that_is_measured_counts(speed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    work = workload(small_recipe())
    fast, slow = (seconds(monkeypatch, work, replace(INSTANT, **{speed: value}))[0] for value in (2e6, 1e6))
    assert slow["analyze"] == pytest.approx(2 * fast["analyze"])


@pytest.mark.parametrize(
    ("settings", "stage"),
    [
        ({"metric": "two-sided"}, "gradients"),
        ({"allocation": "loss"}, "probe"),
        ({"calibration_mode": "sequential"}, "sequential"),
    ],
)
def test_a_stage_takes_time_where_a_run_has_it(
    settings: dict[str, Any], stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    speed = MachineSpeed(*[1e9] * 5)
    assert seconds(monkeypatch, workload(small_recipe()), speed)[0][stage] == 0
    assert seconds(monkeypatch, workload(small_recipe(**settings)), speed)[0][stage] > 0


def test_every_output_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    one, three = (seconds(monkeypatch, workload(small_recipe(), count), INSTANT)[0]["write"] for count in (1, 3))
    assert three == pytest.approx(3 * one)


def test_the_range_spans_from_the_best_speed_to_a_busy_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    work, best, typical = workload(small_recipe()), MachineSpeed(*[1e9] * 5), MachineSpeed(*[5e8] * 5)
    monkeypatch.setattr(duration, "busy_share", lambda: 0.5)
    stages, (least, most) = seconds(monkeypatch, work, best, typical)
    files = sum(seconds(monkeypatch, work, INSTANT)[0].values())
    assert least == pytest.approx(sum(seconds(monkeypatch, work, best)[0].values()) - files * (1 - 1 / FAST_FILES))
    assert least < sum(stages.values()) < most
    monkeypatch.setattr(duration, "busy_share", lambda: 10.0)
    assert seconds(monkeypatch, work, best, typical)[1] == pytest.approx((least, 12.5 * least))


def test_an_interruption_does_not_change_the_best_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    durations = iter([0.02, 5.0, 0.02, 0.01, 0.02, 0.02, 0.02, 0.02, 5.0])
    now = [0.0]

    def run() -> torch.Tensor:
        now[0] += next(durations)
        return torch.zeros(1, 1)

    monkeypatch.setattr(machine_speed.time, "perf_counter", lambda: now[0])
    best, typical = machine_speed._work_per_second(run, 1.0)
    assert best == pytest.approx(1 / 0.01)
    assert typical == pytest.approx(1 / 0.02)


def test_the_machine_is_measured_once_per_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    best, typical = measure_speed(torch.device("cpu"), torch.float32, 24, 40)
    assert all(getattr(best, field.name) >= getattr(typical, field.name) > 0 for field in fields(MachineSpeed))
    monkeypatch.setattr(machine_speed, "_work_per_second", None)
    assert measure_speed(torch.device("cpu"), torch.float32, 24, 40) == (best, typical)


def test_busy_share_counts_other_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_speed.os, "getloadavg", lambda: (3.0, 0.0, 0.0), raising=False)
    monkeypatch.setattr(machine_speed.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert busy_share() == 2.5
    monkeypatch.delattr(machine_speed.os, "getloadavg", raising=False)
    assert busy_share() == 1.0


@pytest.mark.parametrize(
    ("least", "most", "text"),
    [
        (200, 550, "3 to 9 minutes"),
        (30, 110, "30 to 110 seconds"),
        (0.1, 0.2, "1 second"),
        (3600, 8 * 3600, "1 to 8 hours"),
        (300, 310, "5 minutes"),
    ],
)
def test_a_range_is_said_in_one_unit(least: float, most: float, text: str) -> None:
    assert duration_range(least, most) == text


def test_a_plan_tells_the_range(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from runs import save_dense
    from svdllm.cli import main

    save_dense(tmp_path / "dense")
    with pytest.raises(SystemExit):
        main(
            ["plan", str(tmp_path / "dense"), "--ratio", "0.3", "--preset", "paper", "--samples", "8", "--seqlen", "16"]
        )
    assert "time about 1 second on cpu in float32" in " ".join(capsys.readouterr().out.split())


def test_threads_are_counted_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def work_per_second(run: object, work: float) -> tuple[float, float]:
        seen.append(torch.get_num_threads())
        return work, work

    monkeypatch.setattr(machine_speed, "_work_per_second", work_per_second)
    before = torch.get_num_threads()
    speeds = []
    try:
        for threads in (1, 4):
            torch.set_num_threads(threads)
            speeds.append(measure_speed(torch.device("cpu"), torch.float32, 20, 28)[0])
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
        machine_speed._measured.cache_clear()
    assert set(seen) == {1}
    assert speeds[1].eigh == pytest.approx(2 * speeds[0].eigh)
    assert speeds[0].multiply < speeds[1].multiply < 4 * speeds[0].multiply


def test_what_a_gpu_takes_for_itself_is_counted() -> None:
    """The same bytes on either device, but those of its driver and libraries."""
    on_cpu = workload(small_recipe())
    on_gpu = replace(on_cpu, device=torch.device("cuda"))
    assert device_bytes(on_cpu) == 0
    assert device_bytes(on_gpu) > GPU_WORKING_BYTES
    assert ram_by_stage(on_gpu, False)["read"] - ram_by_stage(on_cpu, False)["read"] >= GPU_RAM_BYTES // 2


def test_a_gguf_file_takes_time_by_its_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """The vocabulary, the names of all tensors in two blocks, and the weights."""
    work = workload(small_recipe())
    monkeypatch.setattr(Workload, "gguf_bytes", 1)
    stages, _ = seconds(monkeypatch, work, INSTANT)
    names, weights = 2 * len(work.stored), work.num_stored_weights
    assert stages["open"] == pytest.approx(work.vocab_size * 4e-4 + names * 7e-4 + weights / 3e7)
