"""What a pruning method works with, and the row of the table of methods."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor

from svdllm.common.errors import InputError, UnsupportedModelError
from svdllm.common.progress import Reporter
from svdllm.compression.recipe import Recipe
from svdllm.compression.subject import Subject
from svdllm.models.channels import Channels, channels_of_mlps
from svdllm.models.heads import HeadsFound, find_heads
from svdllm.models.structure import Target
from svdllm.models.walk import Block, Walk
from svdllm.pruning.made import Made
from svdllm.pruning.settings import Pruning


@dataclass(frozen=True)
class Job:
    """A model to prune.

    Args:
        recipe: text and device of the run.
        work: folder of unfinished work, which is removed in the end.
    """

    subject: Subject
    settings: Pruning
    recipe: Recipe
    work: Path
    reporter: Reporter

    @property
    def ratio(self) -> float:
        return self.settings.ratio

    @cached_property
    def targets(self) -> dict[str, Target]:
        return {target.name: target for target in self.subject.structure.targets}

    @property
    def num_params(self) -> int:
        """Number of the targets' weights, the whole that the ratio is a share of."""
        return self.subject.structure.num_target_params

    @cached_property
    def heads(self) -> HeadsFound:
        return find_heads(self.subject.skeleton, self.subject.structure)

    @cached_property
    def channels(self) -> tuple[Channels, ...]:
        """Heads and inner features that can be removed, in the order of the blocks."""
        return tuple(sorted((*self.heads.heads, *channels_of_mlps(self.subject.structure)), key=lambda c: c.block))

    def require_channels(self, channels: Sequence[Channels]) -> None:
        """Raises unless as many parameters can be removed as the ratio asks for, with a group left of everything.

        Raises:
            UnsupportedModelError: there is nothing that can be removed; says why.
            InputError: the ratio would remove every group of some channels.
        """
        model = type(self.subject.skeleton).__name__
        why = "".join(f" {name}: {reason}." for name, reason in list(self.heads.refused.items())[:2])
        if not channels:
            raise UnsupportedModelError(
                f"{model} has neither heads nor inner features that can be removed by themselves.{why} Use svdllm "
                "compress."
            )
        most = sum((each.num_groups - 1) * each.params_per_group(self.targets) for each in channels)
        if self.ratio * self.num_params > most:
            raise InputError(
                f"Ratio {self.ratio:g} would remove every head or inner feature of a layer: at most "
                f"{most / self.num_params:.3f} of the linears' parameters of {model} can be removed by "
                f"{self.settings.pruning}, with one group left everywhere.{why} Choose a lower ratio."
            )

    @contextmanager
    def walk(self, ids: Tensor | None, *, gradients: bool = False) -> Iterator[Walk]:
        """A walk of the text through the dense model; ``gradients``: what a reverse walk needs is kept."""
        assert ids is not None
        walk = self.subject.walk(ids, self.recipe, self.work / "hidden-states")
        if gradients:
            walk.kept_batches, walk.kept_folder = len(walk.batches), self.work / "inputs"
        try:
            yield walk
        finally:
            if hasattr(walk, "hidden"):
                walk.close()

    def blocks(self, walk: Walk, stage: str) -> Iterator[Block]:
        """The blocks of a walk, with a stage of this name in the report."""
        number = len(self.subject.structure.blocks)
        with self.reporter.stage(stage, number):
            for block in walk.blocks():
                yield block
                self.reporter.advance(block.index + 1, number)


@dataclass(frozen=True, kw_only=True)
class Method:
    """A row of the table of pruning methods.

    Args:
        samples, seqlen: the published calibration, in windows and tokens.
        check: raises InputError or UnsupportedModelError for what cannot be pruned, before anything is computed.
        prune: from a job and its text (``windows x seqlen``) to the pruned model.
    """

    name: str
    summary: str
    source: str
    samples: int
    seqlen: int
    check: Callable[[Job], None]
    prune: Callable[[Job, Tensor], Made]
