"""Wrappers: the language model in them is compressed on text, everything else stays as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

import svdllm
from families import tiny_tokens
from runs import run, small_recipe
from wrappers import WRAPPERS, tiny_wrapper, with_image


@pytest.fixture(scope="module", params=WRAPPERS)
def source(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Any]:
    """A model type, its folder and the model."""
    folder = tmp_path_factory.mktemp(request.param) / "source"
    model = tiny_wrapper(request.param)
    model.save_pretrained(folder)
    return request.param, folder, model


def test_full_rank_is_the_source_with_an_image(source: tuple[str, Path, Any], tmp_path: Path) -> None:
    model_type, folder, model = source
    out = run(folder, tmp_path / "out", recipe=small_recipe(ratio=None, ranks={".": "full"})).output_dir
    found: Any = AutoModelForImageTextToText.from_pretrained(out).eval()
    image = with_image(model_type)
    with torch.no_grad():
        torch.testing.assert_close(found(**image).logits, model(**image).logits, atol=1e-4, rtol=1e-4)


def test_everything_else_is_copied(source: tuple[str, Path, Any], tmp_path: Path) -> None:
    model_type, folder, model = source
    out = run(folder, tmp_path / "out", recipe=small_recipe(ratio=0.3)).output_dir
    found: Any = AutoModelForImageTextToText.from_pretrained(out).eval()
    assert type(found) is type(AutoModelForCausalLM.from_pretrained(out))
    assert isinstance(found, type(model))
    assert found.num_parameters() < model.num_parameters()
    state, expected = found.state_dict(), model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items() if name in state)
    assert all("language_model" in name for name in expected.keys() - state.keys())
    assert found.generate(**with_image(model_type), max_new_tokens=3, min_new_tokens=3).shape[1] >= 15
    svdllm.verify(out, "cpu")
