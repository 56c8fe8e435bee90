"""Reads the data of a recovery as a method asks for them: examples, or random windows of a text."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from svdllm.common.errors import InputError
from svdllm.common.progress import Reporter
from svdllm.data import calibration_windows
from svdllm.data.examples import Examples, holds_examples, training_examples
from svdllm.recovery.stage import Rows
from svdllm.recovery.training_settings import Schedule, TrainingSettings

FOR_EXAMPLES = ("template", "train_on", "packing")


class Lesson(NamedTuple):
    """The sequences that a method learns from, and what the record of the recovery says about them."""

    rows: Rows
    record: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """The data of a recovery for one method, whose ``schedule`` decides how long sequences are."""

    settings: TrainingSettings
    schedule: Schedule
    tokenizer: Any
    offline: bool
    reporter: Reporter

    @cached_property
    def holds_examples(self) -> bool:
        """Whether the data are instructions or chats, and not only text."""
        return holds_examples(self.settings.data, self.offline)

    def examples(self) -> Lesson:
        """Instructions and chats one by one; of a text, its windows in order.

        Raises:
            InputError: the data cannot be read, are too few, or are text where a setting is for examples.
        """
        found = self._read(self.settings.data, packing=self.settings.packing)
        if found.kind == "text":
            self.refuse_for_text(FOR_EXAMPLES)
        if found.left_out:
            self.reporter.warn(
                f"{found.left_out} examples are left out: their answers begin beyond --seqlen {self.schedule.seqlen}."
            )
        record = {"source": found.source, "kind": found.kind, "examples": len(found.rows)}
        return Lesson(found.rows, record | {"left_out": found.left_out})

    def random_windows(self, samples: int) -> Lesson:
        """Random windows of a text.

        Raises:
            InputError: the text cannot be read or is too short.
        """
        with self.reporter.stage("tokenise", 1):
            windows = calibration_windows(
                self.settings.data,
                self.tokenizer,
                samples=samples,
                seqlen=self.schedule.seqlen,
                seed=self.settings.seed,
                offline=self.offline,
            )
        record = {"source": windows.source, "kind": "text", "examples": len(windows.ids)}
        return Lesson([(ids, ids) for ids in windows.ids], record)

    def held_out(self) -> Rows:
        """The sequences whose loss is taken during training; none unless ``eval_data`` is given."""
        if self.settings.eval_data is None:
            return []
        return self._read(self.settings.eval_data, evaluation=True).rows[: self.settings.eval_samples]

    def refuse_for_text(self, names: Iterable[str]) -> None:
        """Raises InputError if one of the settings is given: they are for examples, and the data are text."""
        for name in names:
            if getattr(self.settings, name) != type(self.settings).model_fields[name].default:
                raise InputError(
                    f"--{name.replace('_', '-')} is for instructions and chats, and {self.settings.data} is text, "
                    f"which is cut into windows. Leave it out{', and say --steps' * (name == 'epochs')}."
                )

    def _read(self, source: str, *, packing: bool = False, evaluation: bool = False) -> Examples:
        with self.reporter.stage("tokenise", 1):
            return training_examples(
                source,
                self.tokenizer,
                seqlen=self.schedule.seqlen,
                template=self.settings.template,
                completions_only=self.settings.train_on == "completions",
                packing=packing,
                evaluation=evaluation,
                offline=self.offline,
            )
