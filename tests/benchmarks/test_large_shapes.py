"""The benchmark of large shapes on tiny ones: its model, and the time of the whole model."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch

import large_shapes
from svdllm import load_model
from svdllm.compression.recipe_files import preset_settings


def test_a_model_is_written_and_compressed(tmp_path: Path):
    source, output = tmp_path / "dense", tmp_path / "out"
    source.mkdir()
    large_shapes.write_model(source, "tiny", 2)
    settings = preset_settings("balanced") | {"ratio": 0.3, "samples": 4, "seqlen": 64, "gradient_samples": 4}
    found = large_shapes.compress(str(source), str(output), settings)
    assert set(large_shapes.BY_BLOCK) <= set(found["seconds_by_stage"])
    assert load_model(output).config.num_hidden_layers == 2
    weight = load_model(source).get_submodule("model.layers.1.mlp.down_proj").weight
    assert weight.dtype == torch.bfloat16
    assert float(weight.std()) == pytest.approx(192**-0.5, rel=0.02)


def test_the_time_of_the_whole_model_is_that_of_its_blocks_and_the_rest_once(tmp_path: Path):
    found = {
        "seconds": 10.0,
        "seconds_by_stage": {"analyze": 4.0, "allocate": 3.0, "write": 2.0},
        "planned_ram_by_stage": {"analyze": 10**9},
        "peak_ram_bytes": 11 * 10**8,
        "planned_ram_bytes": 10**9,
    }
    file = tmp_path / "found.json"
    large_shapes.report(found, Namespace(shape="tiny", blocks=2, samples=4, seqlen=64, json=file))
    written = json.loads(file.read_text(encoding="utf-8"))
    assert written["seconds_of_all_blocks"] == pytest.approx(16.0)  # 6 s of 2 blocks, 4 blocks in all
    assert written["peak_over_planned"] == pytest.approx(1.1)
