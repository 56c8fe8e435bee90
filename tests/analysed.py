"""A model with its analysis, and the Grams of the same model by autograd."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from svdllm import Recipe
from svdllm.common.progress import Reporter
from svdllm.compression.analysis import Analysis
from svdllm.compression.analyze import Calibration
from svdllm.compression.subject import structure_for
from svdllm.models.skeleton import build_skeleton
from svdllm.models.walk import Walk
from svdllm.models.weights import MemoryWeights


def analysed(model: Any, folder: Path, ids: Tensor, **settings: Any) -> SimpleNamespace:
    """A model, analysed in float64; batches of two windows."""
    model = model.double().eval()
    skeleton = build_skeleton(model.config, torch.float64)
    recipe = Recipe(**({"ratio": 0.3, "shrinkage": 0.0, "round_to": 1, "input_only": ()} | settings))
    structure = structure_for(skeleton, recipe)
    walk = Walk(
        weights=MemoryWeights(model, skeleton),
        skeleton=skeleton,
        structure=structure,
        ids=ids,
        device=torch.device("cpu"),
        dtype=torch.float64,
        batch_tokens=2 * ids.shape[1],
    )
    walk.kept_folder = folder
    walk.kept_batches = -(-recipe.gradient_samples // 2)
    analysis = Analysis(folder, {})
    analysis.open()
    depths = {target.name: target.full_rank for target in structure.targets}
    Calibration(
        walk=walk,
        recipe=recipe,
        analysis=analysis,
        depths=depths,
        narrows="narrow" in recipe.analysed_forms,
        keeps_metrics=False,
        reporter=Reporter(),
    ).run()
    return SimpleNamespace(model=model, structure=structure, analysis=analysis, walk=walk, recipe=recipe)


def grams_by_autograd(
    model: Any, names: list[str], ids: Tensor, gradient_ids: Tensor
) -> dict[str, tuple[Tensor, Tensor]]:
    """``(C, G)`` of each linear from one pass over the whole model."""
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def hook(name: str):
        def keep(module: Any, args: Any, output: Tensor) -> None:
            inputs[name], outputs[name] = args[0].detach(), output

        return keep

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    grams = {name: x.flatten(0, -2).T @ x.flatten(0, -2) for name, x in inputs.items()}
    logits = model(input_ids=gradient_ids, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), gradient_ids[:, 1:].flatten(), reduction="sum"
    )
    gradients = torch.autograd.grad(loss, [outputs[name] for name in names])
    for handle in handles:
        handle.remove()
    flat = [gradient.flatten(0, -2) for gradient in gradients]
    return {name: (grams[name], g.T @ g) for name, g in zip(names, flat, strict=True)}
