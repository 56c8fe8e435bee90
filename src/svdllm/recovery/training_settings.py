"""The settings that all methods of recovery share, and the schedule in which their defaults differ."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

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

    data: str = Field(description="Examples or text: a file, a hub data set or a named text.")
    micro_batch: int | None = Field(None, ge=1, description="Sequences at once; the gradients of a step add up.")
    warmup: float = Field(
        0.05, ge=0, lt=1, description="Share of the steps in which the rate rises; it then falls as a cosine."
    )
    weight_decay: float = Field(0.0, ge=0)
    clip: float = Field(1.0, gt=0, description="Largest norm of the gradient.")
    template: Literal["alpaca", "chat"] = Field("alpaca", description="How instructions are put to the model.")
    train_on: Literal["completions", "everything"] = Field("completions", description="Which tokens are learnt.")
    packing: bool = Field(False, description="Put examples one after the other in rows of full length.")
    teacher: str | None = Field(None, description="The dense model, whose predictions are learnt (distill).")
    seed: int = Field(3, ge=0, description="Seed of the order, of the adapters and of random windows.")
    gradient_checkpointing: bool = Field(False, description="Less memory, a third more work.")
    eval_data: str | None = Field(None, description="Held-out examples or text, whose loss is taken during training.")
    eval_samples: int = Field(32, ge=1, description="Its first sequences.")
    eval_steps: int | None = Field(None, ge=1, description="Steps between two looks at it; a fifth of a stage.")
    device: str = Field("auto", description="auto, cpu, cuda, ...")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Of the products: bfloat16 on a GPU that has it, else float32. Sums are in float32."
    )

    @property
    def given(self) -> set[str]:
        """The settings that were given with another value than their default."""
        fields = type(self).model_fields
        return {name for name in self.model_fields_set if getattr(self, name) != fields[name].default}
