"""The machines on which the cells of a grid were made: times of different ones do not compare."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch

from svdllm.common.device import device_name, resolve_device

Record = dict[str, Any]


def machine_of(device: str) -> str:
    """Names what time depends on: the processor with its threads, or the GPU."""
    place = resolve_device(device)
    return device_name(place) if place.type == "cuda" else f"{device_name(place)}, {torch.get_num_threads()} threads"


def of_one_machine(records: Iterable[Record]) -> tuple[list[Record], str | None]:
    """The records of the machine that made most of them, and its name if there are several."""
    found = list(records)
    machines = Counter(record.get("machine") for record in found)
    if len(machines) < 2:
        return found, None
    most = machines.most_common(1)[0][0]
    return [record for record in found if record.get("machine") == most], most or "one that older records do not name"
