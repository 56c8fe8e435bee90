"""Runs whose experts are on disk while their block is loaded give the same bytes, and leave nothing behind."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from families import tiny_config, tiny_model
from runs import run, small_recipe, token_windows, walk_of
from svdllm import plan, verify
from svdllm.checkpoint.tensors import file_bytes
from svdllm.compression import needs, parts
from svdllm.compression.collect import collect_backward, collect_statistics
from svdllm.compression.math.metrics import METHODS
from svdllm.compression.math.statistics import GradientGram
from svdllm.compression.parts import parts_of
from svdllm.compression.subject import Subject, structure_for
from svdllm.compression.workload import Workload
from svdllm.models import experts_on_disk
from svdllm.models.experts_on_disk import PREFIX, give_back, on_disk
from svdllm.models.low_rank.lowrank import Expert
from svdllm.models.open import Source
from svdllm.models.skeleton import build_skeleton

OPTIONS: dict[str, dict[str, Any]] = {"gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2}}
FULL = {"metric": "two-sided", "allocation": "loss", "calibration_mode": "sequential", "ratio": 0.4, "round_to": 1}


def model_of(family: str) -> Any:
    return tiny_model(family, **OPTIONS.get(family, {}))


def weights_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def test_a_tensor_on_disk_is_read_again_after_it_was_given_back(tmp_path: Path) -> None:
    tensor = torch.randn(300, 40, generator=torch.Generator().manual_seed(0))
    kept = on_disk(tensor, tmp_path)
    assert kept.untyped_storage().filename is not None
    for _ in range(2):
        torch.testing.assert_close(kept, tensor, atol=0, rtol=0)
        give_back(kept)
    assert on_disk(tensor, None) is tensor
    give_back(tensor)  # in memory: stays as it is
    assert bool(tensor.any())
    del kept
    gc.collect()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_the_result_has_the_same_bytes(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(family)
    monkeypatch.setattr(parts, "PART_BYTES", 1)
    recipe = small_recipe(**FULL)
    whole = run(model, tmp_path / "whole", recipe=recipe)
    written: list[int] = []

    def noted(tensor: torch.Tensor, folder: Path | None) -> torch.Tensor:
        written.extend([tensor.numel()] * (folder is not None))
        return on_disk(tensor, folder)

    monkeypatch.setattr(needs, "_spill_experts", lambda work, hidden: True)
    monkeypatch.setattr(experts_on_disk, "on_disk", noted)
    made = run(model, tmp_path / "disk", recipe=recipe)
    linears = len([target for target in made.plan.structure.targets if target.pool])
    assert len(written) >= 4 * linears  # the forward and the reverse walk, the probes, the sequential walk
    assert made.plan.forms == whole.plan.forms
    assert weights_in(tmp_path / "disk") == weights_in(tmp_path / "whole")
    assert not list(tmp_path.rglob(f"{PREFIX}*"))
    verify(tmp_path / "disk", "cpu")


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_statistics_of_parts_are_those_of_blocks_in_memory(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "PART_BYTES", 1)
    found = []
    for scratch in (None, tmp_path):
        walk = walk_of(model_of(family), token_windows(), scratch=scratch, kept_batches=4, kept_folder=tmp_path / "in")
        sums: dict[str, torch.Tensor] = {}
        depths = {target.name: 4 for target in walk.structure.targets}
        for block in walk.blocks():
            for part in parts_of(walk.structure.block_targets(block.index), depths):
                collected = collect_statistics(block, part, METHODS["svd-llm"])
                sums |= {name: statistic.value() for name, statistic in collected.items()}
        for block in walk.reversed_blocks(lambda windows, logits: logits / 100):
            for part in parts_of(walk.structure.block_targets(block.index), depths):
                lefts = collect_backward(block, part, GradientGram)
                sums |= {f"{name} left": statistic.value() for name, statistic in lefts.items()}
        found.append(sums)
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, atol=0, rtol=0)


def test_an_expert_is_given_back_when_it_was_called_and_when_its_gradients_are_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    walk = walk_of(model_of("mixtral"), token_windows(2), scratch=tmp_path)
    given: list[int] = []
    for block in walk.blocks():
        experts = [module for module in block.module.modules() if isinstance(module, Expert)]
        assert all(p.untyped_storage().filename for expert in experts for p in expert.parameters())
        monkeypatch.setattr(experts_on_disk, "give_back", lambda *tensors: given.append(len(tensors)))
        hidden = walk.hidden.tensor.clone().requires_grad_()
        output, _ = walk.calls[0][block.index].run(block.module, hidden)
        called = len(given)
        output.sum().backward()
        assert len(given) == 2 * called > 0
        given.clear()
        monkeypatch.undo()
        block.run()
    with torch.no_grad():
        expected = model_of("mixtral")(input_ids=token_windows(2), use_cache=False).logits
    torch.testing.assert_close(walk.logits(), expected, atol=1e-5, rtol=1e-4)


def test_a_plan_puts_experts_on_disk_where_they_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    model, recipe = model_of("qwen3_moe"), small_recipe(**FULL)
    whole = plan(model, recipe)[0].needs
    assert not whole.experts_on_disk
    monkeypatch.setattr(needs, "available_bytes", lambda: 2**20)
    spilled = plan(model, recipe, hidden_states_limit=2**30)[0].needs
    assert spilled.experts_on_disk
    assert spilled.disk_bytes > whole.disk_bytes


def test_with_experts_on_disk_a_block_takes_the_memory_of_few_of_them() -> None:
    recipe = small_recipe(**FULL)
    config = tiny_config("qwen3_moe", num_experts=16)
    skeleton = build_skeleton(config)
    config.dtype = torch.float32
    source = Source(name="tiny", revision=None, config=config, folder=None, weights=None)
    subject = Subject(source=source, skeleton=skeleton, structure=structure_for(skeleton, recipe))
    whole = Workload(
        subject=subject,
        recipe=recipe,
        device=torch.device("cpu"),
        dtype=torch.float32,
        written_bytes=file_bytes(subject.stored),
        num_outputs=1,
    )
    spilled = replace(whole, experts_on_disk=True)
    expert = 3 * 32 * 24 * 4  # gate, up and down
    assert max(whole.experts_bytes) == max(spilled.experts_bytes) == 16 * expert
    assert sum(whole.experts_bytes) == 2 * 16 * expert
    assert whole.block_bytes - spilled.block_bytes == (16 - 4) * expert
