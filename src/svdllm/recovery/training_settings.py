"""The settings that all methods of recovery share, and the schedule in which their defaults differ."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from pydantic import BaseModel, ConfigDict

from svdllm.common.settings import DEVICE, setting

MICRO_BATCH = 4
# Of AdamW. The usual 0.999 still remembers the first, largest gradients after a few hundred steps.
BETA2 = 0.95
# Settings that only a method trained by the transformers Trainer looks at.
OF_THE_TRAINER = (
    *("steps", "micro_batch", "dtype", "gradient_checkpointing", "packing", "template", "train_on"),
    *("eval_data", "eval_samples", "eval_steps"),
)
# Settings that change nothing but the memory a run takes: an unfinished run may go on with other values.
OF_MEMORY = ("micro_batch", "gradient_checkpointing")


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long and how fast a method trains. It ends after ``steps`` or, where they are None, after ``epochs``."""

    lr: float
    batch: int
    seqlen: int
    epochs: float | None = None
    steps: int | None = None

    def within(self, context: int | None) -> Schedule:
        """The same schedule with sequences no longer than a model's context."""
        return self if context is None else replace(self, seqlen=min(self.seqlen, context))

    def sequences_at_once(self, micro_batch: int | None, processes: int) -> int:
        """The largest divisor of a process's share of a batch that is at most the micro-batch."""
        share = self.batch // processes
        wanted = min(share, micro_batch or MICRO_BATCH)
        return next(size for size in range(wanted, 0, -1) if share % size == 0)


class TrainingSettings(BaseModel):
    """Settings of every method; a method with settings of its own declares a subclass."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    data: str = setting(
        ...,
        "What to learn from: a .json, .jsonl or .parquet file or a hub data set with instruction/input/output, "
        "prompt/completion or messages; or text, as for --calib of `svdllm compress`.",
        panel="Data",
    )
    micro_batch: int | None = setting(
        None,
        "Sequences in memory at once; the gradients of a step add up.",
        panel="Training",
        shown_default=str(MICRO_BATCH),
        ge=1,
    )
    warmup: float = setting(
        0.05,
        "Share of the steps in which the learning rate rises; it then falls as a cosine.",
        panel="Training",
        ge=0,
        lt=1,
    )
    weight_decay: float = setting(0.0, "Weight decay of AdamW.", panel="Training", ge=0)
    clip: float = setting(
        1.0, "Largest norm of the gradient; greater ones are scaled down to it.", panel="Training", gt=0
    )
    template: Literal["alpaca", "chat"] = setting(
        "alpaca", "How instructions are put to the model: alpaca, or chat (the tokenizer's template).", panel="Data"
    )
    train_on: Literal["completions", "everything"] = setting(
        "completions", "Which tokens are learnt: completions (only the answers) or everything.", panel="Data"
    )
    packing: bool = setting(False, "Put examples one after the other in rows of full length.", panel="Data")
    teacher: str | None = setting(
        None,
        "The dense model. distill learns its predictions and the text (without it the text only); blockwise needs it.",
        panel="Training",
    )
    seed: int = setting(3, "Seed of the order, of the adapters and of random windows.", panel="Training", ge=0)
    gradient_checkpointing: bool = setting(
        False, "Recompute activations in the backward pass: less memory, about a third more work.", panel="Training"
    )
    eval_data: str | None = setting(
        None, "Held-out examples or text, whose loss is measured during training.", panel="Measuring"
    )
    eval_samples: int = setting(32, "First sequences of eval_data that are measured.", panel="Measuring", ge=1)
    eval_steps: int | None = setting(
        None,
        "Steps between two measurements of eval_data.",
        panel="Measuring",
        shown_default="a fifth of a stage",
        ge=1,
    )
    device: str = setting("auto", DEVICE, panel="Machine")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto",
        "What products are computed in: auto is bfloat16 on a GPU that has it, else float32. Sums are in float32.",
        panel="Machine",
    )

    @property
    def given(self) -> set[str]:
        """The settings that were given with another value than their default."""
        fields = type(self).model_fields
        return {name for name in self.model_fields_set if getattr(self, name) != fields[name].default}
