"""What decides a recovery: complete, serialisable, stored in what the run makes."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, PrivateAttr, ValidationError, model_validator

from svdllm.common.errors import InputError
from svdllm.common.settings import DEVICE, problems_of, setting

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

    methods: tuple[Method, ...] = setting(
        ("sequential-lora",),
        "sequential-lora (the paper's), blockwise (each block's output matched to the dense model's) or distill (end "
        "to end, on all factors); several, as in blockwise,distill, run one after the other.",
        panel="Training",
        flag="--method",
        reader="names",
        min_length=1,
    )
    data: str = setting(
        ...,
        "What to learn from: a .json, .jsonl or .parquet file or a hub data set with instruction/input/output, "
        "prompt/completion or messages; or text, as for --calib of `svdllm compress`.",
        panel="Data",
    )
    order: Literal["u-first", "v-first", "joint"] = setting(
        "u-first",
        "Which factor is trained first; joint trains both at once (the paper's ablation).",
        panel="Sequential LoRA",
    )
    r: int = setting(8, "Rank of the LoRA adapters.", panel="Sequential LoRA", ge=1)
    alpha: float = setting(16, "Scale of the LoRA adapters: alpha / r.", panel="Sequential LoRA", gt=0)
    lr: float | None = setting(None, "Highest learning rate.", panel="Training", gt=0)
    epochs: float | None = setting(None, "Passes over the examples, where steps are not given.", panel="Training", gt=0)
    samples: int | None = setting(None, "Random windows of a text (blockwise).", panel="Data", ge=1)
    steps: int | None = setting(None, "Optimizer steps of each stage, instead of epochs.", panel="Training", ge=1)
    batch: int | None = setting(None, "Sequences of one step.", panel="Training", ge=1)
    micro_batch: int | None = setting(
        None,
        "Sequences in memory at once; the gradients of a step add up.",
        panel="Training",
        shown_default=str(MICRO_BATCH),
        ge=1,
    )
    seqlen: int | None = setting(
        None, "Longest sequence, in tokens; by default at most the model's context.", panel="Data", ge=2
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
    kl: float = setting(
        0.5,
        "Share of the divergence from the teacher in the loss; the rest is the loss of the text (distill).",
        panel="Training",
        ge=0,
        le=1,
    )
    train_norms: bool = setting(False, "Also train the norms (distill).", panel="Training")
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
