"""What decides a recovery: complete, serialisable, stored in what the run makes."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, model_validator

from svdllm.common.errors import InputError
from svdllm.compression.recipe import problems_of

Method = Literal["sequential-lora", "blockwise", "distill"]
# Which factors each stage trains; joint is the paper's ablation (NFT).
ORDERS = {"u-first": (("svd_u",), ("svd_v",)), "v-first": (("svd_v",), ("svd_u",)), "joint": (("svd_u", "svd_v"),)}
# What a method takes where nothing is said. The first is the paper's (its batch, rank and rate).
DEFAULTS: dict[str, dict[str, Any]] = {
    "sequential-lora": {"lr": 1e-4, "batch": 64, "seqlen": 256, "epochs": 1},
    "blockwise": {"lr": 1e-4, "batch": 4, "seqlen": 512, "samples": 64, "epochs": 4},
    "distill": {"lr": 1.5e-4, "batch": 2, "seqlen": 256, "steps": 400},
}
# Settings that only some methods look at.
TRAINER = ("sequential-lora", "distill")
ONLY_FOR: dict[str, tuple[str, ...]] = {
    "order": ("sequential-lora",),
    "r": ("sequential-lora",),
    "alpha": ("sequential-lora",),
    "samples": ("blockwise",),
    "train_norms": ("distill",),
    "kl": ("distill",),
    **dict.fromkeys(
        ("steps", "micro_batch", "dtype", "gradient_checkpointing", "packing", "template", "train_on"), TRAINER
    ),
    **dict.fromkeys(("eval_data", "eval_samples", "eval_steps"), TRAINER),
}
# Settings that change nothing but the memory a run takes: an unfinished one may go on with others.
OF_MEMORY = ("micro_batch", "gradient_checkpointing")
MICRO_BATCH = 4
# Of AdamW. The usual 0.999 still remembers the first, largest gradients after a few hundred steps.
BETA2 = 0.95


class Recovery(BaseModel):
    """Settings of a recovery; keyword-only, frozen, unknown keys are errors. None is the method's own default."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)
    _context: int | None = PrivateAttr(None)

    methods: tuple[Method, ...] = Field(("sequential-lora",), min_length=1, description="Run one after the other.")
    data: str = Field(description="Examples or text: a file, a hub data set or a named text.")
    order: Literal["u-first", "v-first", "joint"] = Field(
        "u-first", description="Which factor is trained first; joint trains both at once (sequential-lora)."
    )
    r: int = Field(8, ge=1, description="Rank of the LoRA adapters.")
    alpha: float = Field(16, gt=0, description="Scale of the LoRA adapters: alpha / r.")
    lr: float | None = Field(None, gt=0, description="Highest learning rate.")
    epochs: float | None = Field(None, gt=0, description="Passes over the examples, where no steps are given.")
    samples: int | None = Field(None, ge=1, description="Random windows of a text (blockwise).")
    steps: int | None = Field(None, ge=1, description="Optimizer steps of each stage.")
    batch: int | None = Field(None, ge=1, description="Sequences of one step.")
    micro_batch: int | None = Field(None, ge=1, description="Sequences at once; the gradients of a step add up.")
    seqlen: int | None = Field(None, ge=2, description="Longest sequence, in tokens.")
    warmup: float = Field(
        0.05, ge=0, lt=1, description="Share of the steps in which the rate rises; it then falls as a cosine."
    )
    weight_decay: float = Field(0.0, ge=0)
    clip: float = Field(1.0, gt=0, description="Largest norm of the gradient.")
    template: Literal["alpaca", "chat"] = Field("alpaca", description="How instructions are put to the model.")
    train_on: Literal["completions", "everything"] = Field("completions", description="Which tokens are learnt.")
    packing: bool = Field(False, description="Put examples one after the other in rows of full length.")
    teacher: str | None = Field(None, description="The dense model, whose predictions are learnt (distill).")
    kl: float = Field(
        0.5,
        ge=0,
        le=1,
        description="Share of the divergence from the teacher in the loss; the rest is the text's (distill).",
    )
    train_norms: bool = Field(False, description="Also train the norms (distill).")
    seed: int = Field(3, ge=0, description="Seed of the order, of the adapters and of random windows.")
    gradient_checkpointing: bool = Field(False, description="Less memory, a third more work.")
    eval_data: str | None = Field(None, description="Held-out examples or text, whose loss is taken during training.")
    eval_samples: int = Field(32, ge=1, description="Its first sequences.")
    eval_steps: int | None = Field(None, ge=1, description="Steps between two looks at it; a fifth of a stage.")
    device: str = Field("auto", description="auto, cpu, cuda, ...")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Of the products: bfloat16 on a GPU that has it, else float32. Sums are in float32."
    )

    @model_validator(mode="after")
    def _every_setting_does_something(self) -> Recovery:
        given = {name for name in self.model_fields_set if getattr(self, name) != type(self).model_fields[name].default}
        for name in sorted(given & set(ONLY_FOR)):
            if not set(ONLY_FOR[name]) & set(self.methods):
                raise ValueError(
                    f"{name} does nothing to {', '.join(self.methods)}: it is for {', '.join(ONLY_FOR[name])}"
                )
        for name in ("eval_samples", "eval_steps"):
            if name in given and self.eval_data is None:
                raise ValueError(f"{name} needs eval_data: the held-out examples or text")
        if self.steps is not None and self.epochs is not None and "blockwise" not in self.methods:
            raise ValueError("steps and epochs are given; steps alone decide how long it trains, give one of them")
        if "kl" in given and self.teacher is None:
            raise ValueError("kl needs a teacher: the dense model")
        if "blockwise" in self.methods and self.epochs is not None and self.epochs != int(self.epochs):
            raise ValueError(f"epochs is {self.epochs}; blockwise makes whole passes over its windows")
        return self

    def of(self, method: str, name: str) -> Any:
        """A setting, or the method's own default where nothing was said; steps are None where epochs decide."""
        value = getattr(self, name)
        if value is None and name == "seqlen":
            default = DEFAULTS[method][name]
            return min(default, self._context or default)
        if value is None and name == "steps" and self.epochs is not None and "blockwise" not in self.methods:
            return None
        return DEFAULTS[method].get(name) if value is None else value

    def within(self, context: int | None) -> Recovery:
        """The same, whose defaults keep to the context of a model; what was asked for stays as it is."""
        bounded = self.model_copy()
        bounded._context = context
        return bounded

    def sequences_at_once(self, method: str, processes: int) -> int:
        """The largest part of a process's share of a batch that is no more than the micro-batch."""
        share = self.of(method, "batch") // processes
        wanted = min(share, self.micro_batch or MICRO_BATCH)
        return next(size for size in range(wanted, 0, -1) if share % size == 0)


def make_recovery(settings: dict[str, Any]) -> Recovery:
    """A validated recovery.

    Raises:
        InputError: names each setting that is wrong, and what was expected.
    """
    try:
        return Recovery(**settings)
    except ValidationError as error:
        raise InputError(f"Recovery: {problems_of(error)}") from error
