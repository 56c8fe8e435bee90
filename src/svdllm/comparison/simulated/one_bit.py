"""OneBit (arXiv 2402.11295): signs and two value vectors for every linear, trained on the dense model's predictions.

``W`` is ``w h^T * sign(L)`` with latent weights ``L``, whose gradients pass through the sign. The start is SVID. Other
than the authors', the linears have no layer norm behind them, so that the first model is as near to the dense one as
its signs allow and the last one an ordinary model; and the training is that of ``svdllm recover --method distill``.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from svdllm.checkpoint.output import new_folder
from svdllm.checkpoint.shards import write_shards
from svdllm.common.errors import InputError
from svdllm.common.files import save_tensors
from svdllm.common.run_options import RunOptions
from svdllm.comparison.simulated.bits import SimulatedBits, bits_of, dense_bytes, write_simulated
from svdllm.comparison.simulated.quantise import copy_beside_weights
from svdllm.compression.math.few_bits.svid import one_bit_bits, value_vectors
from svdllm.compression.subject import Subject
from svdllm.models.discover import discover
from svdllm.models.experts import expert_tensors
from svdllm.models.limits import context_length, require_context, require_known_ids
from svdllm.models.open import Source, open_config, open_source
from svdllm.models.skeleton import build_skeleton
from svdllm.recovery import Recovery
from svdllm.recovery.checks import check_memory, training_dtype
from svdllm.recovery.distill import DistillSettings, distillation_loss
from svdllm.recovery.distributed import own_device
from svdllm.recovery.methods import METHODS
from svdllm.recovery.models import Models
from svdllm.recovery.stage import Task
from svdllm.recovery.trained_weights import TrainedWeights
from svdllm.recovery.training_data import TrainingData

METHOD = "distill"  # whose data, schedule and loss are used
LATENT = 0.01  # size of the latent weights at first: small, so that signs can change
DEFAULTS = {"lr": 4e-4, "kl": 1.0}


class StraightThroughSign(torch.autograd.Function):
    """The sign of latent weights, 1 for zero; gradients pass, less the farther a weight is from zero."""

    @staticmethod
    def forward(ctx: Any, latent: Tensor) -> Tensor:
        ctx.save_for_backward(latent)
        return torch.where(latent < 0, -1.0, 1.0).to(latent)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (latent,) = ctx.saved_tensors
        return gradients[0] * (1.001 - latent.tanh().square())


class SignsAndValues(nn.Module):
    """The parametrisation of a weight, as its module keeps it: two value vectors and the signs of latent weights."""

    def __init__(self, weight: Tensor):
        super().__init__()
        rows, columns = value_vectors(weight.detach())
        self.rows, self.columns = nn.Parameter(rows), nn.Parameter(columns)

    def forward(self, latent: Tensor) -> Tensor:
        return StraightThroughSign.apply(latent) * self.rows[:, None] * self.columns  # type: ignore[no-any-return]

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The latent weights of the start."""
        return torch.where(weight < 0, -LATENT, LATENT).to(weight)


def check_one_bit(model: str, recovery: Recovery, options: RunOptions) -> None:
    """Raises InputError if the model or the length of the sequences does not suit."""
    source = open_config(model, offline=options.offline, revision=options.revision)
    if expert_tensors(build_skeleton(source.config)):
        raise InputError(f"Method onebit: {source.name} has stacked experts, which are no linears. Leave onebit out.")
    within = recovery.within(context_length(source.config))
    require_context(source.config, within.schedule(METHOD).seqlen, "--recover seqlen")
    own_device(recovery.device)


def one_bit(
    model: str, recovery: Recovery, output_dir: Path, options: RunOptions, *, settings: Mapping[str, Any]
) -> SimulatedBits:
    """Trains a model of signs and value vectors, and writes it with dequantised weights.

    A run that was killed while it trained goes on from its last saved step, which lies beside the output.

    Raises:
        InputError: the data cannot be read, are too few or do not suit the model.
        ResourceError: the memory does not suffice.
        NumericalError: a loss or a gradient is not finite.
    """
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    saved = output_dir.with_name(f"{output_dir.name}-training-{digest}")
    with new_folder(output_dir, "a training") as (_, partial):
        work = partial / "work"
        source = open_source(model, offline=options.offline, revision=options.revision, gguf_folder=work / "source")
        skeleton = build_skeleton(source.config)
        subject = Subject(source=source, skeleton=skeleton, structure=discover(skeleton))
        work.mkdir(exist_ok=True)
        save_tensors(_trained(subject, recovery, saved, options), work / "trained.safetensors")
        targets, layout = subject.structure.targets, subject.stored
        bits = sum(one_bit_bits(target.out_features, target.in_features) for target in targets)
        found = bits_of(targets, layout, bits, bits, dense_bytes(targets, layout))
        write_shards(partial, TrainedWeights(subject.weights, [work / "trained.safetensors"]), layout)
        copy_beside_weights(source, partial)
        shutil.rmtree(work)
        write_simulated(partial, dict(settings), found, dict(options.reporter.seconds))
    shutil.rmtree(saved, ignore_errors=True)
    return found


def _trained(subject: Subject, recovery: Recovery, saved: Path, options: RunOptions) -> dict[str, Tensor]:
    """The trained tensors of the blocks, by name; those of the linears dequantised."""
    from svdllm.recovery.training import train  # importing the Trainer takes seconds

    source, blocks = subject.source, subject.structure.blocks
    recovery = recovery.within(context_length(source.config))
    task, models = _task(source, recovery, saved, options)
    check_memory(models, {METHOD: METHODS[METHOD].least_bytes(task, models)})
    student = models.compressed(torch.float32)  # the dense model, before its weights are signs
    linears = [name for target in subject.structure.targets for name in target.linears]
    for block in blocks:
        student.get_submodule(block).requires_grad_(True)
    make_one_bit(student, linears)
    train(student, task, distillation_loss(models.dense(), cast(DistillSettings, recovery).kl))
    for linear in linears:
        parametrize.remove_parametrizations(student.get_submodule(linear), "weight", leave_parametrized=True)
    prefixes = tuple(f"{block}." for block in blocks)
    return {name: p.detach().cpu() for name, p in student.named_parameters() if name.startswith(prefixes)}


def make_one_bit(model: nn.Module, linears: Sequence[str]) -> None:
    """Makes the weights of some linears signs and value vectors, in place."""
    for name in linears:
        linear: Any = model.get_submodule(name)
        parametrize.register_parametrization(linear, "weight", SignsAndValues(linear.weight))


def _task(source: Source, recovery: Recovery, saved: Path, options: RunOptions) -> tuple[Task, Models]:
    """The training, and the dense model, which is the teacher as well."""
    assert source.folder is not None
    models = Models(
        folder=source.folder,
        teacher=str(source.folder),
        work=saved,
        device=own_device(recovery.device),
        offline=options.offline,
        reporter=options.reporter,
    )
    data = TrainingData(
        settings=recovery,
        schedule=recovery.schedule(METHOD),
        tokenizer=source.load_tokenizer(options.offline),
        offline=options.offline,
        reporter=options.reporter,
    )
    rows, _ = METHODS[METHOD].lesson(data)
    for ids, _ in rows:
        require_known_ids(ids, source.config, data.tokenizer)
    task = Task(
        file="onebit",
        title="train",
        rows=rows,
        settings=recovery,
        schedule=data.schedule,
        dtype=training_dtype(models, recovery),
        folder=saved,
        reporter=options.reporter,
    )
    return task, models
