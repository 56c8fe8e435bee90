"""The folder of a comparison: a record for every finished cell, spectra, and checkpoints while they are needed."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svdllm.common.errors import InputError
from svdllm.common.files import write_atomically
from svdllm.common.progress import Reporter
from svdllm.common.settings_file import differences
from svdllm.comparison.compressed import with_new_fields, with_new_recovery
from svdllm.comparison.paired import with_log_ratios
from svdllm.comparison.settings import Cell, Grid, file_name_of
from svdllm.comparison.spectra import read_spectra
from svdllm.comparison.variant import Variant

Record = dict[str, Any]
GRID_FILE = "grid.json"


@dataclass(frozen=True, kw_only=True)
class Cells:
    """The cells of a grid in its folder; ``identity`` tells the dense model from another one at its place."""

    grid: Grid
    folder: Path
    keep: bool
    identity: Record

    @property
    def work(self) -> Path:
        return self.folder / "work"

    def make_folders(self) -> None:
        for name in ("cells", "spectra"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        about = json.dumps({"title": self.grid.title, "model": self.grid.model}, indent=2)
        write_atomically(self.folder / GRID_FILE, about.encode())

    def records(self) -> list[Record]:
        """The records so far, in the grid's order, with speeds, compared with the dense model window by window."""
        found = ((cell, self.read(cell)) for cell in self.grid.cells)
        return with_log_ratios([r | {"speed": self.read_speed(cell)} for cell, r in found if r is not None])

    def read_speed(self, cell: Cell) -> Record | None:
        """Prefill and decode of a cell beside the dense model; None if they were not measured."""
        file = self._speed_file(cell)
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None

    def write_speed(self, cell: Cell, speed: Record) -> None:
        self._speed_file(cell).parent.mkdir(exist_ok=True)
        write_atomically(self._speed_file(cell), json.dumps(speed, indent=1).encode())

    def read(self, cell: Cell) -> Record | None:
        file = self._file(cell)
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None

    def write(self, cell: Cell, record: Record) -> None:
        write_atomically(self._file(cell), json.dumps(record, indent=1).encode())

    def is_done(self, cell: Cell) -> bool:
        found = self.read(cell)
        return found is not None and found["status"] == "done"

    def settings_of(self, cell: Cell) -> Record:
        """Everything that decides what a cell holds, as it is read back from JSON."""
        return json.loads(json.dumps(self.identity | self.grid.settings_of(cell)))

    def checkpoint(self, cell: Cell) -> Path:
        return (self.folder / "checkpoints" if self.keep else self.work) / cell.file_name

    def analysis(self, variant: Variant) -> Path:
        return self.work / f"analysis-{file_name_of(variant.key)}"

    def holds_model(self, cell: Cell) -> bool:
        """Whether the checkpoint of a cell is there; one that an earlier run left with other settings is removed."""
        assert cell.variant is not None
        folder = self.checkpoint(cell)
        made = cell.variant.is_made(folder, self.settings_of(cell))
        if made is None:
            shutil.rmtree(folder)
        return bool(made)

    def write_spectra(self, variant: Variant) -> None:
        """Keeps what plots show of the analysis of a variant, if there is one."""
        if (analysis := self.analysis(variant)).is_dir():
            name = file_name_of((variant.base or variant).name)
            write_atomically(self.folder / "spectra" / f"{name}.json", json.dumps(read_spectra(analysis)).encode())

    def discard(self, cell: Cell) -> None:
        """Removes the models of a cell that was measured, unless they are kept."""
        if not self.keep:
            for made in filter(None, (cell, cell.base)):
                shutil.rmtree(self.checkpoint(made), ignore_errors=True)

    def refuse_other_settings(self, reporter: Reporter) -> None:
        """Raises InputError if a finished cell or a kept checkpoint was made with other settings."""
        for cell in self.grid.cells:
            if (found := self.read(cell)) is not None and found["status"] == "done":
                self._refuse_other(found["settings"], cell)
                if self.keep and cell.ratio is not None and found["checkpoint"] is None:
                    reporter.warn(f"{cell.name} was measured before and not kept: --keep is too late for it.")
            if self.keep and cell.variant is not None:
                for made in filter(None, (cell, cell.base)):
                    self._refuse_other_checkpoint(made)

    def _refuse_other(self, found: Record, cell: Cell) -> None:
        # Records of older versions have fewer settings.
        wanted = {key: value for key, value in self.settings_of(cell).items() if key in found}
        known = {"recipe": with_new_fields(found["recipe"]), "recovery": with_new_recovery(found["recovery"])}
        if different := differences(_flat(found | known), _flat(wanted)):
            raise InputError(
                f"{self._file(cell)} holds '{cell.name}' made with other settings: {different}. Give the same settings "
                "to continue, or name another folder."
            )

    def _refuse_other_checkpoint(self, cell: Cell) -> None:
        assert cell.variant is not None
        folder = self.checkpoint(cell)
        if cell.variant.is_made(folder, self.settings_of(cell)) is None:
            raise InputError(
                f"{folder} was made with other settings than those of '{cell.name}'. Give the same settings to "
                "continue, or name another folder."
            )

    def _speed_file(self, cell: Cell) -> Path:
        return self.folder / "speeds" / f"{cell.file_name}.json"

    def _file(self, cell: Cell) -> Path:
        return self.folder / "cells" / f"{cell.file_name}.json"


def _flat(settings: Record, prefix: str = "") -> Record:
    flat: Record = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}: ") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
