"""The protocol of a recovery method: its settings, what it needs, what it learns from, and its stages."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import ClassVar, Literal

from svdllm.common.extras import require_extra
from svdllm.data.examples import refuse_mixture
from svdllm.recovery.models import Models
from svdllm.recovery.stage import Rows, Stage, Task, Trained
from svdllm.recovery.training_data import Lesson, TrainingData
from svdllm.recovery.training_settings import OF_THE_TRAINER, Schedule, TrainingSettings


class Method(ABC):
    """A way to train a compressed model: one row of the table in ``methods.py``, and a file of its own.

    Only ``name``, ``summary``, ``defaults`` and ``train`` must be given; everything else has a default.
    """

    name: ClassVar[str]
    summary: ClassVar[str]  # for --help, in one line
    defaults: ClassVar[Schedule]
    Settings: ClassVar[type[TrainingSettings]] = TrainingSettings  # a subclass adds the method's own settings
    # Whether the transformers Trainer runs it, which micro-batches, held-out data, logs and several processes need.
    uses_trainer: ClassVar[bool] = True
    teacher: ClassVar[Literal["unused", "optional", "required"]] = "unused"
    same_as_teacher: ClassVar[Mapping[str, str]] = {}  # fields of the config, and what they count
    takes_mixtures: ClassVar[bool] = False
    whole_epochs: ClassVar[bool] = False  # whether it can only make whole passes over its data
    trains_factors_only: ClassVar[bool] = False  # so that a checkpoint must have some, in pairs or packed
    extra: ClassVar[tuple[str, str] | None] = None  # a module that it imports, and the extra that installs it
    memory_advice: ClassVar[str] = ""  # what needs less memory, as the beginning of a sentence that ends with "; "

    @property
    def unused(self) -> tuple[str, ...]:
        """The shared settings that the method does not look at."""
        return () if self.uses_trainer else OF_THE_TRAINER

    def check_data(self, settings: TrainingSettings) -> None:
        """Raises InputError if the method cannot learn from data of this kind; reads no file."""
        if not self.takes_mixtures:
            refuse_mixture(settings.data)

    def check_extra(self, asked_by: str) -> None:
        """Raises InputError if a package is missing; ``asked_by`` is the flag or setting that needs it."""
        if self.extra is not None:
            module, extra = self.extra
            require_extra(module, asked_by, extra=extra)

    def lesson(self, data: TrainingData) -> Lesson:
        """The sequences to learn from; by default examples, or the windows of a text in order."""
        return data.examples()

    def held_out(self, data: TrainingData) -> Rows:
        """The sequences whose loss is taken during training."""
        return data.held_out() if self.uses_trainer else []

    def stages(self, settings: TrainingSettings) -> Iterable[Stage]:
        """The stages, in order; by default one, which ``train`` runs."""
        return [Stage(title=self.name, file=self.name, train=self.train)]

    def least_bytes(self, task: Task, models: Models) -> int:
        """A lower bound of the memory that a stage needs, in bytes; 0 if nothing is known."""
        return 0

    @abstractmethod
    def train(self, task: Task, models: Models) -> Trained:
        """Runs a stage: opens the model by ``models.compressed``, trains it, and returns the tensors that changed.

        Raises:
            NumericalError: the loss or a gradient is not finite.
        """
