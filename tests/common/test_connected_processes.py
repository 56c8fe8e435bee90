"""What processes tell each other, over gloo."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from svdllm.common import connected_processes
from svdllm.common.connected_processes import connected
from svdllm.common.device import resolve_device
from svdllm.common.errors import InputError
from svdllm.common.processes import is_first, num_local_processes
from together import together


def exchange() -> list[Any]:
    with connected("cpu") as processes:
        rank = processes.rank
        gathered = processes.gather({"rank": rank, "text": "é" * rank})
        first = processes.from_first(lambda: f"made by {rank}")
        pieces = [piece.tolist() for piece in processes.in_turn(torch.full((2, 2), rank, dtype=torch.float64))]
        own = {f"linear {rank}": {"codes": torch.tensor([rank], dtype=torch.int8), "u": torch.ones(rank, 3).bfloat16()}}
        merged = processes.merged(own)
        shapes = {
            name: [(leaf, list(t.shape), str(t.dtype)) for leaf, t in own.items()] for name, own in merged.items()
        }
        return [gathered, first, pieces, shapes, int(merged["linear 1"]["codes"])]


def test_every_process_learns_what_the_others_have() -> None:
    found = together(2, exchange)
    assert found[0][:3] == found[1][:3]
    gathered, first, pieces, shapes, codes = found[1]
    assert gathered == [{"rank": 0, "text": ""}, {"rank": 1, "text": "é"}]
    assert first == "made by 0"
    assert pieces == [[[0.0, 0.0]] * 2, [[1.0, 1.0]] * 2]
    assert shapes == found[0][3]
    assert shapes["linear 0"] == [("codes", [1], "torch.int8"), ("u", [0, 3], "torch.bfloat16")]
    assert codes == 1


def look_for(folder: Path) -> None:
    own = folder / os.environ["RANK"]
    own.mkdir()
    with connected("cpu") as processes:
        processes.require_shared(folder)
        processes.require_shared(own)


def compute_on_different_devices() -> None:
    kinds = {"0": "cpu", "1": "meta"}
    connected_processes.resolve_device = lambda name: torch.device(kinds[os.environ["RANK"]])
    with connected("auto"):
        pass


@pytest.mark.parametrize(
    ("function", "takes_folder", "message"),
    [
        (look_for, True, "all processes of a run need one folder. Choose an output on a disk that the hosts share."),
        (compute_on_different_devices, False, "round differently (process 0 on cpu, process 1 on meta): give --device"),
    ],
)
def test_one_error_for_all(function: Any, takes_folder: bool, message: str, tmp_path: Path) -> None:
    found = together(2, function, *[tmp_path] * takes_folder)
    assert [error[0] for error in found] == ["InputError", "InputError"]
    assert message in found[0][1]
    assert found[0][1] == found[1][1]
    assert sorted(error[2] for error in found) == [False, True]
    assert not list(tmp_path.glob(".*"))


def test_a_process_without_torchrun_is_the_first_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")  # as clusters set it for their own purposes
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert is_first()
    assert num_local_processes() == 1
    with connected("cpu") as processes:
        assert (processes.rank, processes.count) == (0, 1)


def test_several_devices_need_several_processes() -> None:
    with pytest.raises(InputError, match=r"torchrun --nproc-per-node 2 -m svdllm compress \.\.\. --device cuda"):
        resolve_device("cuda:0,cuda:1")
