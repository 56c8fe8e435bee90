"""Quantises the linears of a model, one block in memory, and writes them dequantised.

The Grams of a block are those of the inputs that the quantised blocks before it make, as in GPTQ. Embeddings, norms and
the head stay as they are.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from svdllm.checkpoint.finish import copy_companions
from svdllm.checkpoint.output import new_folder
from svdllm.checkpoint.shards import write_shards
from svdllm.common.errors import NumericalError
from svdllm.common.files import save_tensors
from svdllm.common.progress import Reporter
from svdllm.common.run_options import RunOptions
from svdllm.comparison.simulated.bits import DenseBytes, SimulatedBits, bits_of, dense_bytes, write_simulated
from svdllm.comparison.simulated.systems import System
from svdllm.compression.collect import collect_statistics, right_metric
from svdllm.compression.inputs import read_windows
from svdllm.compression.math.few_bits.quantised import Quantised
from svdllm.compression.math.metrics import METHODS
from svdllm.compression.parts import parts_of
from svdllm.compression.recipe import Recipe
from svdllm.compression.subject import Subject
from svdllm.models.companions import copy_companion_files
from svdllm.models.discover import discover
from svdllm.models.experts import Stacked, stacked_layout
from svdllm.models.loaded_weights import tensors_replaced
from svdllm.models.low_rank.info import LowRankInfo
from svdllm.models.open import Source, open_config, open_source
from svdllm.models.skeleton import build_skeleton
from svdllm.models.structure import Target, weight_of, weights_by_name
from svdllm.models.walk import Block, Walk
from svdllm.models.wrapped import require_part
from svdllm.recovery.trained_weights import TrainedWeights

SIGNS_SEED = 0  # of the random signs of rotations


def check_simulation(model: str, system: System, recipe: Recipe, options: RunOptions) -> None:
    """Raises InputError or UnsupportedModelError for what is wrong, from the config of the model alone."""
    system.check(dense_linears(model, recipe, options).targets)


def simulate(
    model: str,
    system: System,
    recipe: Recipe,
    output_dir: Path,
    options: RunOptions,
    *,
    settings: Mapping[str, object],
    dense: DenseBytes,
) -> SimulatedBits:
    """Quantises a model by a system and writes a model of the same class with the dequantised weights.

    Args:
        model: hub id, folder or GGUF file, dense or low-rank: factors are quantised then.
        recipe: its calibration is used.
        settings: are kept beside the model.
        dense: the bytes of the dense model, which ``model`` need not be.

    Raises:
        InputError: the text or the output is wrong, or a group size does not divide.
        UnsupportedModelError: the structure of the model is not understood.
        NumericalError: a NaN or infinity; names the linear or the block.
    """
    with new_folder(output_dir, "a simulation") as (_, partial):
        work = partial / "work"
        work.mkdir()
        source = open_source(model, offline=options.offline, revision=options.revision, gguf_folder=work / "source")
        subject = _subject(source, recipe)
        system.check(subject.structure.targets)
        with options.reporter.stage("tokenise", 1):
            tokenizer = source.load_tokenizer(options.offline)
            ids = read_windows(recipe.calibration, tokenizer, recipe, source, options).ids
        run = _Run(walk=subject.walk(ids, recipe), system=system, recipe=recipe, work=work, reporter=options.reporter)
        made = run.execute()
        layout = subject.stored
        found = (sum(each.bits for each in made), sum(each.stored_bits for each in made))
        bits = bits_of(subject.structure.targets, layout, *found, dense)
        weights = TrainedWeights(subject.weights, sorted(work.glob("block-*.safetensors")))
        stacks = subject.expert_tensors
        write_shards(partial, Stacked(weights, stacks), stacked_layout(layout, stacks))
        copy_beside_weights(source, partial)
        shutil.rmtree(work)
        write_simulated(partial, dict(settings), bits, dict(options.reporter.seconds))
    return bits


def copy_beside_weights(source: Source, folder: Path) -> None:
    """Copies config, code and tokenizer of a model."""
    assert source.folder is not None
    if LowRankInfo.of(source.config) is None:
        source.config.save_pretrained(folder)
        copy_companion_files(source.folder, folder)
    else:
        copy_companions(source.folder, folder)
        shutil.copyfile(source.folder / "config.json", folder / "config.json")


def _subject(source: Source, recipe: Recipe) -> Subject:
    """The linears of a model; unlike ``discover_subject`` it takes the factors of a low-rank one, and all sizes."""
    skeleton = build_skeleton(source.config)
    require_part(skeleton, recipe.part)
    return Subject(source=source, skeleton=skeleton, structure=discover(skeleton, recipe.ignore))


@dataclass(frozen=True, kw_only=True)
class _Run:
    """The walk through a model; every finished block is a file in ``work``."""

    walk: Walk
    system: System
    recipe: Recipe
    work: Path
    reporter: Reporter

    def execute(self) -> list[Quantised]:
        made: list[Quantised] = []
        blocks = self.walk.structure.blocks
        generator = torch.Generator().manual_seed(SIGNS_SEED)
        with self.reporter.stage("quantise", len(blocks)):
            for block in self.walk.blocks():
                tensors = self._quantised(block, generator, made)
                save_tensors(tensors, self.work / f"block-{block.index:04d}.safetensors")
                place = {name: tensor.to(self.walk.device, self.walk.dtype) for name, tensor in tensors.items()}
                with tensors_replaced(self.walk.skeleton, place):
                    block.run()
                self.reporter.advance(block.index + 1, len(blocks))
        self.walk.close()
        return made

    def _quantised(self, block: Block, generator: torch.Generator, made: list[Quantised]) -> dict[str, Tensor]:
        """The dequantised weights of a block, by name; adds the quantised matrices, without values, to ``made``."""
        targets = self.walk.structure.block_targets(block.index)
        method = METHODS[self.recipe.method]
        tensors: dict[str, Tensor] = {}
        for part in parts_of(targets, dict.fromkeys((target.name for target in targets), 0)):
            stays = replace(part, number=part.number or 0)  # hidden states go on when the block is quantised
            statistics = collect_statistics(block, stays, method)
            for target in part.targets:
                gram_II = right_metric(target, statistics, method, self.recipe)
                assert gram_II is not None
                quantised = self._matrix(target, gram_II, generator)
                made.append(quantised._replace(weight_OI=torch.empty(0)))
                for name, weight in weights_by_name(target, quantised.weight_OI).items():
                    tensors[name] = weight.to("cpu", self.walk.weights.shape_and_dtype(name)[1])
        return tensors

    def _matrix(self, target: Target, gram_II: Tensor, generator: torch.Generator) -> Quantised:
        weight_OI = weight_of(self.walk.skeleton, target).float()
        try:
            quantised = self.system.quantise(weight_OI, gram_II, generator)
        except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]
            raise NumericalError(f"{target.name} cannot be quantised: {error}") from error
        if not bool(torch.isfinite(quantised.weight_OI).all()):
            raise NumericalError(f"{self.system.name} makes NaN or infinite values of {target.name}.")
        return quantised


@dataclass(frozen=True, kw_only=True)
class DenseLinears:
    """The linears of a dense model, and its bytes."""

    targets: tuple[Target, ...]
    bytes: DenseBytes


def dense_linears(model: str, recipe: Recipe, options: RunOptions) -> DenseLinears:
    """Finds the linears of a model by its config.

    Raises:
        InputError, UnsupportedModelError: there is no such model, or its structure is not understood.
    """
    subject = _subject(open_config(model, offline=options.offline, revision=options.revision), recipe)
    targets = subject.structure.targets
    return DenseLinears(targets=targets, bytes=dense_bytes(targets, subject.stored))
