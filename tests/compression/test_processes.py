"""Several processes share a run: the same bytes for any number, and one error for all of them."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import svdllm
from runs import digests, save_dense, small_recipe, token_windows
from svdllm.common.connected_processes import ConnectedProcesses
from svdllm.common.errors import NumericalError
from svdllm.compression import analyze
from together import together

TEXT = {"samples": 16, "batch_tokens": 16}
RICH = TEXT | {
    "metric": "two-sided",
    "gradient_samples": 6,
    "allocation": "loss",
    "calibration_mode": "sequential",
    "sequential_samples": 9,
}


def compress(model: Path, output: Path, settings: dict[str, Any]) -> None:
    svdllm.compress_many(model, small_recipe(**settings), output, calibration=token_windows(samples=16))


def fail(model: Path, output: Path, settings: dict[str, Any], how: str) -> None:
    """Process 1 stops in the second block."""
    plain, calls = analyze.decompose, []

    def decompose(*args: Any) -> Any:
        calls.append(args)
        if os.environ["RANK"] == "1" and len(calls) == 2:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise MemoryError("no room") if how == "memory" else NumericalError("No number.")
        return plain(*args)

    analyze.decompose = decompose
    compress(model, output, settings)


def count(model: Path, output: Path, settings: dict[str, Any]) -> int:
    """The bytes of the sums that the process gets from the others."""
    plain, got = ConnectedProcesses.in_turn, [0]

    def in_turn(self: ConnectedProcesses, tensor: Tensor) -> Iterator[Tensor]:
        got[0] += (self.count - 1) * tensor.nbytes
        return plain(self, tensor)

    ConnectedProcesses.in_turn = in_turn
    compress(model, output, settings)
    return got[0]


def bytes_of(folder: Path) -> dict[str, str]:
    return {name: digest for name, digest in digests(folder, skip=()).items() if not name.endswith("report.json")}


@pytest.mark.parametrize(
    ("family", "settings", "counts"),
    [
        ("qwen3_moe", RICH, (1, 2)),
        ("llama", RICH | {"ratio": (0.2, 0.4), "forms": ("pair", "packed", "narrow")}, (1, 4, 3)),
        ("qwen2", RICH | {"target_size": 60_000, "forms": ("int8", "int4", "int3")}, (1, 2)),
    ],
    ids=["mixture", "forms", "bits"],
)
def test_the_bytes_are_the_same_for_any_number_of_processes(
    family: str, settings: dict[str, Any], counts: tuple[int, ...], tmp_path: Path
) -> None:
    wide = {"hidden_size": 64, "intermediate_size": 96} if "target_size" in settings else {}
    model = save_dense(tmp_path / "dense", family, **wide)
    for count in counts:
        assert together(count, compress, model, tmp_path / f"by-{count}", settings) == [None] * count
    made = [bytes_of(tmp_path / f"by-{count}") for count in counts]
    assert len(made[0]) > 4
    assert all(other == made[0] for other in made[1:])


def test_what_several_processes_have_begun_is_finished_by_another_number(tmp_path: Path) -> None:
    model, output, settings = save_dense(tmp_path / "dense"), tmp_path / "out", TEXT
    found = together(2, fail, model, output, settings, "killed")
    assert found[1] is None  # the killed process
    assert found[0][0] == "EndedError"
    assert found[0][2] is False
    assert (tmp_path / "out.partial/analysis/block-0000.safetensors").is_file()
    assert not (tmp_path / "out.partial/analysis/block-0001.safetensors").is_file()
    assert together(1, compress, model, tmp_path / "straight", settings) == [None]
    assert together(1, compress, model, output, settings) == [None]
    assert bytes_of(output) == bytes_of(tmp_path / "straight")


def test_one_process_tells_the_error_of_all_and_the_first_cleans_up(tmp_path: Path) -> None:
    model = save_dense(tmp_path / "dense")
    found = together(3, fail, model, tmp_path / "out", TEXT, "error")
    assert found == [("NumericalError", "No number.", rank != 1) for rank in range(3)]
    found = together(2, fail, model, tmp_path / "full", TEXT, "memory")
    assert [error[::2] for error in found] == [("ResourceError", True), ("ResourceError", False)]
    assert "Out of memory (no room)" in found[0][1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "full.partial"]  # with a finished block


def test_what_goes_over_the_network_is_planned(tmp_path: Path) -> None:
    model, settings = save_dense(tmp_path / "dense"), TEXT | {"metric": "two-sided", "gradient_samples": 16}
    (planned,) = svdllm.plan(model, small_recipe(**settings), processes=2)
    (alone,) = svdllm.plan(model, small_recipe(**settings))
    first, second = together(2, count, model, tmp_path / "out", settings)
    assert first == second == pytest.approx(planned.needs.network_bytes, rel=0.1)  # beside the sums of tokens
    assert alone.needs.network_bytes == 0
    assert 2 * planned.needs.hidden_states_bytes == alone.needs.hidden_states_bytes
    assert planned.needs.seconds < alone.needs.seconds


def test_more_processes_than_batches(tmp_path: Path) -> None:
    model = save_dense(tmp_path / "dense")
    found = together(2, compress, model, tmp_path / "out", {"batch_tokens": 256})
    message = (
        "2 processes cannot share 1 batch of calibration text: expected at most 1. Start fewer processes, or lower "
        "--batch-tokens."
    )
    assert {error[:2] for error in found} == {("InputError", message)}
    assert [error[2] for error in found].count(False) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]
