"""A mixture without the experts that add least, as a row beside low-rank models: REAP (arXiv 2510.13999)."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from svdllm.common.run_options import RunOptions
from svdllm.comparison.variant import Variant, calibrated_on
from svdllm.compression.drop_experts import check_drop, drop_experts
from svdllm.compression.recipe import Recipe
from svdllm.data import check_source

RECORD = "svdllm-dropped-experts.json"


@dataclass(frozen=True, kw_only=True)
class FewerExperts(Variant):
    """A mixture with fewer experts, chosen on the calibration text of a recipe, which has no budget of its own."""

    recipe: Recipe

    @property
    def calibration(self) -> str:
        return calibrated_on(self.recipe)

    def within(self, context: int | None) -> FewerExperts:
        return replace(self, recipe=self.recipe.within(context))

    def at(self, ratio: float) -> Recipe:
        return self.recipe.model_copy(update={"ratio": ratio})

    def check(self, model: str, ratios: tuple[float, ...], options: RunOptions) -> None:
        check_source(self.recipe.calibration)
        check_drop(model, self.at(max(ratios)), offline=options.offline, revision=options.revision)

    def settings(self, ratio: float | None) -> dict[str, Any]:
        read = ("calibration", "samples", "seqlen", "seed", "device", "dtype")
        recipe = {name: getattr(self.recipe, name) for name in read}
        return super().settings(ratio) | {"made by": "drop_experts", "ratio": ratio, "calibrated with": recipe}

    def make(self, model: str, ratio: float | None, folder: Path, analysis: Path, options: RunOptions) -> Path:
        assert ratio is not None
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
        made = drop_experts(
            model,
            self.at(ratio),
            folder,
            offline=options.offline,
            revision=options.revision,
            reporter=options.reporter,
        )
        (folder / RECORD).write_text(json.dumps({"achieved_ratio": made.achieved_ratio, "kept": made.kept}))
        return folder

    def record(self, folder: str | Path) -> dict[str, Any]:
        made = json.loads((Path(folder) / RECORD).read_text(encoding="utf-8"))
        return super().record(folder) | {"achieved_ratio": made["achieved_ratio"], "kept_experts": made["kept"]}

    def describe(self) -> str:
        return f"experts dropped: those of the lowest score\ncalibrated on: {self.calibration}\n"
