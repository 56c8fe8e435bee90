"""A metric, a left metric and an allocation that somebody adds: a row in its table, and whole runs with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel
from torch import Tensor

import svdllm
from families import tiny_model
from runs import digests, run, small_recipe, token_windows
from svdllm.common.settings import setting
from svdllm.compression.after_analysis import AfterAnalysis
from svdllm.compression.math.linalg import tail_energies
from svdllm.compression.math.metrics import METHODS, METRICS
from svdllm.compression.math.metrics.rows import LeftMetric, Method, Metric
from svdllm.compression.math.statistics import Gram, RowFisher
from svdllm.compression.ranks import ALLOCATIONS
from svdllm.compression.ranks.question import Allocation, Evidence, Question
from svdllm.compression.ranks.rows import Row
from svdllm.compression.recipe import Recipe
from svdllm.compression.recipe_files import make_recipe
from svdllm.models.chosen import Chosen


class ScaleSettings(BaseModel):
    """Settings of the method rms."""

    rms_power: float = setting(1.0, "Exponent of the scales of rms.", panel="Method", ge=0, le=1)


def rms_metric(gram_II: Tensor | None, settings: ScaleSettings) -> Tensor:
    """``S = diag(rms(x)^power)``: input channels scaled by the root of their mean square."""
    assert gram_II is not None
    return gram_II.diagonal().clamp_min(1e-12).pow(settings.rms_power)


RMS = Method(
    name="rms",
    summary="input channels scaled by their root mean square",
    source="docs/extending.md",
    statistic=Gram,
    right=rms_metric,
    settings=ScaleSettings,
)
ROW_FISHER = Metric(
    name="row-fisher",
    summary="by the Fisher information of each output's weights",
    source="docs/extending.md",
    left=LeftMetric(statistic=RowFisher, of=lambda target, fisher_O, settings: torch.diag(fisher_O.clamp_min(1e-12))),
)


class EnergySettings(BaseModel):
    """Settings of the allocation equal-energy."""

    energy_steps: AfterAnalysis[int] = setting(40, "Halvings of the share that is lost.", panel="Allocation", ge=1)


def equal_energy(question: Question, evidence: Evidence, settings: EnergySettings) -> Allocation:
    """The least share of the energy that every linear may lose alike within the budget; found by bisection."""

    def forms_at(share: float) -> dict[str, Chosen]:
        forms = {}
        for target in question.targets:
            tails = tail_energies(evidence.energies[target.name])
            needed = int((tails > share * tails[0]).sum())  # the least rank that loses no more than the share
            rank = max(1, -(-needed // question.round_to)) * question.round_to
            if rank <= target.break_even_rank:
                forms[target.name] = Chosen("pair", rank)
        return forms

    low, high = 0.0, 1.0
    for _ in range(settings.energy_steps):
        middle = (low + high) / 2
        fits = question.unit.total(question.targets, forms_at(middle)) <= question.unit.budget
        low, high = (low, middle) if fits else (middle, high)
    return Allocation(forms_at(high))


EQUAL_ENERGY = Row(
    name="equal-energy",
    summary="every linear loses the same share of its energy",
    source="docs/extending.md",
    allocate=equal_energy,
    settings=EnergySettings,
)


class LargerRecipe(ScaleSettings, EnergySettings, Recipe):
    """The recipe with the settings of the rows of this file, as the tables' classes would hand them on."""


@pytest.fixture(autouse=True)
def added(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "rms", RMS)
    monkeypatch.setitem(METRICS, "row-fisher", ROW_FISHER)
    monkeypatch.setitem(ALLOCATIONS, "equal-energy", EQUAL_ENERGY)


def larger(**settings: Any) -> LargerRecipe:
    return LargerRecipe(**small_recipe().model_dump(exclude_unset=True) | settings)


def test_a_method_runs_with_its_own_settings(tmp_path: Path) -> None:
    """With exponent 0 every channel counts alike, which is plain SVD."""
    model, ids = tiny_model("llama").double(), token_windows()
    results = {
        power: run(model, tmp_path / str(power), ids=ids, recipe=larger(method="rms", rms_power=power))
        for power in (0.0, 1.0)
    }
    plain = run(model, tmp_path / "svd", ids=ids, recipe=small_recipe(method="svd"))
    losses = {power: [row.loss for row in result.linears] for power, result in results.items()}
    assert losses[0.0] == pytest.approx([row.loss for row in plain.linears])
    assert losses[1.0] != losses[0.0]
    assert "rms_power: 0.0" in (tmp_path / "0.0" / "svdllm" / "recipe.yaml").read_text()
    assert svdllm.verify(tmp_path / "1.0", "cpu")


def test_a_left_metric_runs(tmp_path: Path) -> None:
    """It is the left side of fwsvd, but for its scale, in the metric of the Gram."""
    model, ids = tiny_model("llama").double(), token_windows()
    weighed = run(model, tmp_path / "weighed", ids=ids, recipe=small_recipe(metric="row-fisher", gradient_samples=4))
    plain = run(model, tmp_path / "plain", ids=ids, recipe=small_recipe(metric="input"))
    assert [row.loss for row in weighed.linears] != [row.loss for row in plain.linears]
    assert "gradients" in weighed.seconds


@pytest.mark.parametrize("budget", [{"ratio": 0.4}, {"target_params": 13_000}, {"target_size": 60_000}])
def test_an_allocation_runs_with_every_budget(budget: dict[str, Any], tmp_path: Path) -> None:
    model, ids, folder = tiny_model("llama"), token_windows(), tmp_path / "analysis"
    recipe = larger(allocation="equal-energy", **{"ratio": None} | budget)
    result = run(model, tmp_path / "out", ids=ids, recipe=recipe, analysis_dir=folder)
    report = json.loads((tmp_path / "out" / "svdllm" / "report.json").read_text())
    assert report["allocation"]["name"] == "equal-energy"
    lost = [1 - row.kept_energy for row in result.linears if row.rank is not None]
    assert result.plan.achieved_ratio >= budget.get("ratio", 0.1)
    assert len(set(result.plan.forms.values())) > 1
    assert max(lost) - min(lost) < 0.1
    (tmp_path / "later").mkdir()
    coarse = larger(allocation="equal-energy", energy_steps=1, **{"ratio": None} | budget)
    again = run(model, tmp_path / "later" / "out", ids=ids, recipe=coarse, analysis_dir=folder)
    assert "analyze" not in again.seconds
    assert digests(tmp_path / "out") != digests(tmp_path / "later" / "out")


def test_the_recipe_reads_the_rows() -> None:
    for settings, reason in (
        ({"method": "rms", "shrinkage": 0.1}, "shrinkage acts on a Gram; method rms has none"),
        ({"method": "rms", "metric": "two-sided"}, "method rms has no Gram"),
        ({"method": "fwsvd", "metric": "row-fisher"}, "method fwsvd and metric row-fisher both weigh the outputs"),
        ({"allocation": "equal-energy", "target_speedup": 1.2}, "which allocation equal-energy does not count"),
        ({"allocation": "equal-energy", "ranks": {"q": 3}}, "allocation equal-energy chooses ranks"),
        ({"allocation": "equal"}, "unknown allocation 'equal'; known are uniform, .*, equal-energy"),
    ):
        with pytest.raises(svdllm.InputError, match=reason):
            make_recipe(settings)
    assert Recipe(method="rms").allocation == "uniform"
    assert Recipe(metric="row-fisher").needs_gradients
    assert Recipe.rows_that_read("rms_power") == {"method": ("rms",)}
    assert Recipe.rows_that_read("energy_steps") == {"allocation": ("equal-energy",)}
    assert Recipe.rows_that_read("probe_share") == {"allocation": ("loss", "strs")}
    assert Recipe.rows_that_read("gradient_samples") == {"metric": ("two-sided", "row-fisher"), "method": ("fwsvd",)}
    assert Recipe.rows_that_read("samples") == {}
    assert set(larger().to_dict()) - set(larger().analysis_settings()) >= {"energy_steps", "strs_ratios", "round_to"}
    assert "probe_share" in larger().analysis_settings()
