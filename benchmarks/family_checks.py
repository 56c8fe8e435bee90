"""What must hold for a tiny model of any type: see ``families``."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import svdllm
from family_code import COMPRESSED, EXPECTED
from svdllm.compression.collect import collect_statistics
from svdllm.compression.math.metrics import METHODS
from svdllm.compression.parts import Part
from svdllm.compression.recipe_files import make_recipe, preset_settings
from svdllm.models.discover import discover
from svdllm.models.hooks import first_argument
from svdllm.models.low_rank.lowrank import split_experts
from svdllm.models.open import open_source
from svdllm.models.skeleton import build_skeleton
from svdllm.models.structure import Target
from svdllm.models.walk import Walk
from tiny_models import small_config
from tokenizers_local import byte_tokenizer

TEXT = " ".join(f"the quick brown fox {n} jumps over the lazy dog and {n * 7 % 13} more." for n in range(400))
TOLERANCE = 1e-3  # of the largest value
RECIPES: dict[str, dict[str, Any]] = {
    COMPRESSED: {**preset_settings("paper"), "ratio": 0.3},
    "full": {"ranks": {".": "full"}},
    "balanced": {**preset_settings("balanced"), "ratio": 0.3},
}


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference, as a share of the largest expected value."""
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-9))


class FamilyChecks:
    """The checks of one model, which build on each other."""

    share: float | None = None

    def __init__(self, name: str, folder: Path):
        self.name, self.folder = name, folder

    def steps(self) -> list[tuple[str, Callable[[], None]]]:
        made = [
            step
            for label in RECIPES
            for step in (
                (f"compress, {label}", partial(self.compress, label)),
                (f"load, {label}", partial(self.load, label)),
                (f"generate, {label}", partial(self.generate, label)),
                (f"verify, {label}", partial(self.verify, label)),
            )
        ]
        return [("build", self.build), ("find the blocks", self.find), ("walk", self.walk), *made]

    def build(self) -> None:
        """Saves a random model whose blocks do something, and loads it as transformers does."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(small_config(self.name), dtype=torch.float32).eval()
        spread_weights(model)
        model.save_pretrained(self.folder / "dense")
        vocabulary = model.config.get_text_config().vocab_size
        byte_tokenizer(min(290, vocabulary), max_length=128).save_pretrained(self.folder / "dense")
        (self.folder / "text.txt").write_text(TEXT)
        self.ids = torch.randint(3, min(259, vocabulary), (2, 24), generator=torch.Generator().manual_seed(1))
        self.dense: Any = AutoModelForCausalLM.from_pretrained(self.folder / "dense", dtype=torch.float32).eval()
        self.expected = self.logits(self.dense)
        assert bool(torch.isfinite(self.expected).all())
        try:
            self.own_difference: float | None = self.cache_difference(self.dense)
        except Exception:  # of any kind: a class that cannot generate
            self.own_difference = None

    def find(self) -> None:
        self.structure = discover(build_skeleton(self.dense.config))
        self.share = self.structure.compressible_share

    def walk(self) -> None:
        """The logits and every Gram of the walk are those of the whole model."""
        whole = self.whole_grams()
        source = open_source(self.folder / "dense")
        assert source.weights is not None
        skeleton, cpu = build_skeleton(source.config), torch.device("cpu")
        walk = Walk(source.weights, skeleton, self.structure, self.ids, cpu, torch.float32, batch_tokens=24)
        for block in walk.blocks():
            targets = self.structure.block_targets(block.index)
            if not targets:
                block.run()
                continue
            for name, statistic in collect_statistics(block, Part(targets=targets), METHODS["svd-llm"]).items():
                own: Any = getattr(statistic, "own", statistic)  # of an expert, without the part of its group
                assert (own is None) == (name not in whole), f"{name} is an expert that is handed other tokens"
                found = 0.0 if own is None else difference(own.value(), whole[name])
                assert found < TOLERANCE, f"the Gram of {name} differs by {found:.1e}"
        found = difference(walk.logits(), self.expected)
        assert found < TOLERANCE, f"the logits differ by {found:.1e}"

    def whole_grams(self) -> dict[str, Tensor]:
        """The Gram of the inputs of every target, by hooks on the whole model; tokens of experts by their weights."""
        model = copy.deepcopy(self.dense)
        split_experts(model)
        whole: dict[str, Any] = {}
        weights: dict[str | None, Tensor] = {}

        def note(name: str) -> Any:
            return lambda module, args: weights.update({name: args[1].double()})

        def count(target: Target) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                inputs = first_argument(args, kwargs)
                tokens = inputs.reshape(-1, inputs.shape[-1]).double()
                tokens = tokens * weights[target.expert].reshape(-1, 1) if target.expert else tokens
                whole[target.name] = whole.get(target.name, 0) + tokens.mT @ tokens

            return hook

        for target in self.structure.targets:
            model.get_submodule(target.name).register_forward_pre_hook(count(target), with_kwargs=True)
        for expert in {target.expert for target in self.structure.targets if target.expert}:
            model.get_submodule(expert).register_forward_pre_hook(note(expert))
        found = difference(self.logits(model), self.expected)
        assert found < TOLERANCE, f"with split experts the logits differ by {found:.1e}"
        return whole

    def compress(self, label: str) -> None:
        text = {"calibration": str(self.folder / "text.txt"), "samples": 16, "seqlen": 32, "seed": 1}
        recipe = make_recipe({**RECIPES[label], **text, "allow_partial": True})
        self.result = svdllm.compress(self.folder / "dense", recipe, self.folder / label)

    def load(self, label: str) -> None:
        self.made: Any = AutoModelForCausalLM.from_pretrained(self.folder / label, dtype=torch.float32).eval()
        logits, params = self.logits(self.made), self.made.num_parameters()
        assert bool(torch.isfinite(logits).all()), "logits are not finite"
        assert params == self.result.plan.params, f"{params} parameters, {self.result.plan.params} planned"
        if label == "full":
            found = difference(logits, self.expected)
            assert found < TOLERANCE, f"the logits differ from the dense model's by {found:.1e}"
        else:
            assert params < self.dense.num_parameters(), "no parameter was removed"
        if label == COMPRESSED:
            save_file({"ids": self.ids, "logits": logits.contiguous()}, self.folder / EXPECTED)

    def generate(self, label: str) -> None:
        if self.own_difference is not None:
            found = self.cache_difference(self.made)
            allowed = max(2 * TOLERANCE, 20 * self.own_difference)
            assert found <= allowed, f"logits with a cache differ by {found:.1e}, the dense model's {allowed / 20:.1e}"

    def verify(self, label: str) -> None:
        svdllm.verify(self.folder / label, "cpu")

    def logits(self, model: Any) -> Tensor:
        with torch.no_grad():
            return model(input_ids=self.ids, use_cache=False).logits.float()

    def cache_difference(self, model: Any) -> float:
        """Generates five tokens with and without a cache; compares the logits while the tokens agree.

        No more tokens than an indexer chooses: those that it scores 0 tie, and which of them it takes depends on the
        number of tokens that it is asked for at once.
        """
        prompt = self.ids[:1, :10]
        length = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 2}
        returned = {"output_logits": True, "return_dict_in_generate": True}
        cached, plain = (model.generate(input_ids=prompt, use_cache=u, **length, **returned) for u in (True, False))
        worst = 0.0
        for step, (ours, theirs) in enumerate(zip(cached.logits, plain.logits, strict=True), prompt.shape[1] + 1):
            assert bool(torch.isfinite(ours).all()), "logits are not finite"
            worst = max(worst, difference(ours.float(), theirs.float()))
            if not torch.equal(cached.sequences[:, :step], plain.sequences[:, :step]):
                break
        return worst


@torch.no_grad()
def spread_weights(model: Any) -> None:
    """Gives linears a standard deviation of ``1 / sqrt(inputs)``, as after training; norms and biases some spread."""
    head = model.get_output_embeddings()
    for module in model.modules():
        if module is not head and isinstance(module, nn.Linear | Conv1D) and module.weight.ndim == 2:
            module.weight.normal_(0, module.weight.shape[0 if isinstance(module, Conv1D) else 1] ** -0.5)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 3 and "conv" not in name and parameter.shape[-1] > 4:
            parameter.normal_(0, 0.12)
        elif parameter.ndim == 1 and (name.endswith("bias") or "norm" in name):
            parameter.add_(0.1 * torch.randn_like(parameter))
        elif parameter.is_floating_point() and not bool(torch.isfinite(parameter).all()):
            parameter.normal_(0, 0.1)
