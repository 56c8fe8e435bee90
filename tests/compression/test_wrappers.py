"""Wrappers: the language model in them is compressed on text, everything else stays as it was."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

import svdllm
from runs import run, small_recipe, token_windows, walk_of
from svdllm.models.companions import PROCESSORS
from svdllm.models.low_rank.families import auto_class
from svdllm.models.skeleton import build_skeleton
from svdllm.models.wrapped import outside_parts
from svdllm.recovery import make_recovery
from wrappers import WRAPPERS, tiny_wrapper, with_image

# Where the language model is, and what reads images.
PLACES = {
    "gemma3": ("model.language_model.layers", "model.vision_tower"),
    "gemma4": ("model.language_model.layers", "model.vision_tower"),
    "qwen2_5_vl": ("model.language_model.layers", "model.visual"),
    "qwen3_vl": ("model.language_model.layers", "model.visual"),
    "mistral3": ("model.language_model.layers", "model.vision_tower"),
    "llava": ("model.language_model.layers", "model.vision_tower"),
    "qwen3_5": ("model.language_model.layers", "model.visual"),
    "llama4": ("language_model.model.layers", "vision_model"),
}


class Compressed(NamedTuple):
    """A wrapper, its folder, and its checkpoint at 30 %."""

    model_type: str
    model: Any
    folder: Path
    out: Path


def compressed(model_type: str, place: Path, tokenizer: Any = None, **text: Any) -> Compressed:
    model = tiny_wrapper(model_type, **text)
    model.save_pretrained(place / "source")
    if tokenizer is not None:
        tokenizer.save_pretrained(place / "source")
    for name in PROCESSORS:
        (place / "source" / name).write_text(json.dumps({"file": name}))
    out = run(place / "source", place / "out", recipe=small_recipe(ratio=0.3)).output_dir
    return Compressed(model_type, model, place / "source", out)


@pytest.fixture(scope="module", params=WRAPPERS)
def wrapper(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Compressed:
    try:
        logits(tiny_wrapper(request.param), with_image(request.param))
    except AttributeError as error:  # Llama 4 in 5.24.0
        pytest.skip(f"this version of transformers cannot run its own model: {error}")
    return compressed(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Compressed:
    return compressed("gemma3", tmp_path_factory.mktemp("gemma"), tokenizer, vocab_size=300)


def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model.eval()(**inputs).logits


def loaded(folder: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)


def test_full_rank_is_the_source_with_an_image(wrapper: Compressed, tmp_path: Path) -> None:
    out = run(wrapper.folder, tmp_path / "out", recipe=small_recipe(ratio=None, ranks={".": "full"})).output_dir
    inputs = with_image(wrapper.model_type)
    expected = logits(wrapper.model, inputs)
    torch.testing.assert_close(logits(loaded(out), inputs), expected, atol=1e-4, rtol=1e-4)
    other = with_image(wrapper.model_type, seed=5) | {"input_ids": inputs["input_ids"]}
    assert (logits(wrapper.model, other) - expected).abs().max() > 0.01  # the image matters


def test_everything_else_is_copied(wrapper: Compressed) -> None:
    found = loaded(wrapper.out)
    assert type(found) is type(AutoModelForCausalLM.from_pretrained(wrapper.out))
    assert isinstance(found, type(wrapper.model))
    state, expected = found.state_dict(), wrapper.model.state_dict()
    changed = expected.keys() - state.keys()
    assert changed
    assert all(name.startswith(PLACES[wrapper.model_type][0]) for name in changed)
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items() if name in state)
    assert all((wrapper.out / name).read_bytes() == (wrapper.folder / name).read_bytes() for name in PROCESSORS)
    inputs = with_image(wrapper.model_type)
    length = inputs["input_ids"].shape[1]
    assert found.generate(**inputs, max_new_tokens=3, min_new_tokens=3).shape == (1, length + 3)
    svdllm.verify(wrapper.out, "cpu")


def test_the_walk_is_the_text_side_of_the_wrapper(wrapper: Compressed) -> None:
    """Positions and masks are those that its own forward makes; what reads images is not loaded."""
    ids = token_windows(vocab=110)
    walk = walk_of(wrapper.model, ids)
    blocks, encoder = PLACES[wrapper.model_type]
    assert set(walk.structure.idle) == {encoder}
    assert {name.rpartition(".")[0] for name in walk.structure.blocks} == {blocks}
    for block in walk.blocks():
        block.run()
    with walk.head():
        reading = walk.skeleton.get_submodule(encoder)
        assert all(parameter.is_meta for parameter in reading.parameters())
    torch.testing.assert_close(walk.logits(), logits(wrapper.model, {"input_ids": ids}), atol=1e-4, rtol=1e-4)


def test_what_is_outside_is_counted(wrapper: Compressed) -> None:
    (plan,) = svdllm.plan(wrapper.folder, small_recipe(part="language"))
    model, inside = wrapper.model, PLACES[wrapper.model_type][0].partition("language_model")[0] + "language_model."
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    outside = sum(size for name, size in sizes.items() if not name.startswith((inside, "lm_head")))
    parts = plan.to_dict()["outside_parts"]
    assert sum(part["params"] for part in parts) == outside
    assert sum(part["share"] for part in parts) == pytest.approx(outside / sum(sizes.values()))
    assert parts == json.loads((wrapper.out / "svdllm" / "report.json").read_text())["outside_parts"]


def test_a_language_model_alone_has_nothing_outside() -> None:
    assert outside_parts(build_skeleton(tiny_wrapper("gemma3").config.text_config)) == ()


def test_loads_by_its_code_files_alone(gemma: Compressed, tmp_path: Path) -> None:
    inputs = with_image("gemma3")
    torch.save(inputs, tmp_path / "inputs.pt")
    code = (
        "import sys, torch\n"
        "from transformers import AutoModelForImageTextToText\n"
        "load = AutoModelForImageTextToText.from_pretrained\n"
        "model = load(sys.argv[1], trust_remote_code=True, dtype=torch.float32)\n"
        "assert 'svdllm' not in sys.modules\n"
        "with torch.no_grad():\n"
        "    torch.save(model.eval()(**torch.load(sys.argv[2])).logits, sys.argv[3])\n"
        "model.save_pretrained(sys.argv[4])\n"
    )
    places = [gemma.out, tmp_path / "inputs.pt", tmp_path / "logits.pt", tmp_path / "saved"]
    subprocess.run([sys.executable, "-c", code, *map(str, places)], check=True, cwd=tmp_path, capture_output=True)
    expected = logits(loaded(gemma.out), inputs)
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected)
    torch.testing.assert_close(logits(svdllm.load_model(tmp_path / "saved"), inputs), expected)


def test_made_into_a_plain_wrapper(gemma: Compressed, tmp_path: Path) -> None:
    svdllm.export_dense(gemma.out, tmp_path / "dense")
    plain, inputs = loaded(tmp_path / "dense"), with_image("gemma3")
    assert type(plain) is type(gemma.model)
    torch.testing.assert_close(logits(plain, inputs), logits(loaded(gemma.out), inputs), atol=1e-4, rtol=1e-4)


def test_sliced(gemma: Compressed, tmp_path: Path) -> None:
    elastic = run(gemma.folder, tmp_path / "elastic", recipe=small_recipe(ratio=0.2, elastic=True)).output_dir
    svdllm.slice_checkpoint(elastic, 0.3, tmp_path / "sliced")
    inputs = with_image("gemma3")
    torch.testing.assert_close(logits(loaded(tmp_path / "sliced"), inputs), logits(loaded(gemma.out), inputs))


def test_trained_on_text(gemma: Compressed, tmp_path: Path, text: Path) -> None:
    settings = {"data": str(text), "methods": ["distill"], "seqlen": 16, "batch": 4, "steps": 2, "lr": 1e-3}
    settings |= {"teacher": str(gemma.folder), "device": "cpu"}
    svdllm.recover(gemma.out, tmp_path / "trained", make_recovery(settings))
    before, after = loaded(gemma.out).state_dict(), loaded(tmp_path / "trained").state_dict()
    moved = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert moved
    assert all(".language_model." in name or name.startswith("lm_head") for name in moved)


def test_another_part_is_refused_with_those_that_there_are(gemma: Compressed, tmp_path: Path) -> None:
    for part in ("vision_tower", "audio"):
        with pytest.raises(
            svdllm.InputError, match=rf"--part '{part}' .* has the part 'language', and vision_tower, multi_modal"
        ):
            run(gemma.folder, tmp_path / "out", recipe=small_recipe(part=part))
    assert not (tmp_path / "out").exists()


def test_two_language_models_are_refused(tmp_path: Path) -> None:
    config = CONFIG_MAPPING["qwen2_5_omni"]()
    for text in (config.thinker_config.text_config, config.talker_config):
        text.num_hidden_layers = 1
        text.layer_types = text.layer_types[:1]
    config.save_pretrained(tmp_path / "omni")
    with pytest.raises(svdllm.UnsupportedModelError, match=r"holds 2 language models \(thinker.*, talker.*\)"):
        svdllm.plan(tmp_path / "omni", small_recipe())


@pytest.mark.parametrize("use", [lambda d, o: svdllm.export_padded(d, o, 3)])
def test_what_takes_language_models_only_says_so(use: Any, gemma: Compressed, tmp_path: Path) -> None:
    with pytest.raises(svdllm.UnsupportedModelError, match=r"is for language models, and .* also reads images"):
        use(gemma.out, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_auto_class_is_the_wrappers_own() -> None:
    assert auto_class("gemma3") is AutoModelForCausalLM  # transformers has it there
    assert auto_class("llava") is AutoModelForImageTextToText
    assert auto_class("qwen3_5") is AutoModelForImageTextToText  # its causal LM is the language model alone
    assert auto_class("qwen3_5_text") is AutoModelForCausalLM


def test_the_card_says_how_a_wrapper_is_used(gemma: Compressed) -> None:
    card = (gemma.out / "README.md").read_text()
    assert "pipeline_tag: image-text-to-text" in card
    assert "processor = AutoProcessor.from_pretrained" in card
    assert "Only its language model was compressed" in card
