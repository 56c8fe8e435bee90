"""What a method learns from: examples, windows of a text in its order, or random ones."""

from __future__ import annotations

from typing import Any

from svdllm.common.errors import InputError
from svdllm.common.progress import Reporter
from svdllm.data import calibration_windows
from svdllm.data.examples import holds_examples, training_examples
from svdllm.recovery.settings import Recovery
from svdllm.recovery.stage import Rows

FOR_EXAMPLES = ("template", "train_on", "packing")


def training_rows(
    method: str, settings: Recovery, tokenizer: Any, offline: bool, reporter: Reporter
) -> tuple[Rows, dict[str, Any]]:
    """The sequences, and what the record says of them; random windows where blocks or all factors are trained on text.

    Raises:
        InputError: the data cannot be read, are too few, or are text where a setting is for examples.
    """
    seqlen = settings.of(method, "seqlen")
    with reporter.stage("tokenise", 1):
        if method == "blockwise" or (method == "distill" and not holds_examples(settings.data, offline)):
            samples = settings.of(method, "samples")
            if method == "distill":
                counted = ("epochs",) if settings.of(method, "steps") is None else ()
                _refuse_for_text(settings, settings.data, (*FOR_EXAMPLES, *counted))
                samples = settings.of(method, "steps") * settings.of(method, "batch")
            windows = calibration_windows(
                settings.data, tokenizer, samples=samples, seqlen=seqlen, seed=settings.seed, offline=offline
            )
            said = {"source": windows.source, "kind": "text", "examples": len(windows.ids)}
            return [(ids, ids) for ids in windows.ids], said
        examples = training_examples(
            settings.data,
            tokenizer,
            seqlen=seqlen,
            template=settings.template,
            completions_only=settings.train_on == "completions",
            packing=settings.packing,
            offline=offline,
        )
    if examples.kind == "text":
        _refuse_for_text(settings, settings.data, FOR_EXAMPLES)
    if examples.left_out:
        reporter.warn(f"{examples.left_out} examples are left out: their answers begin beyond --seqlen {seqlen}.")
    said = {"source": examples.source, "kind": examples.kind, "examples": len(examples.rows)}
    return examples.rows, said | {"left_out": examples.left_out}


def held_out_rows(method: str, settings: Recovery, tokenizer: Any, offline: bool, reporter: Reporter) -> Rows:
    """The sequences whose loss is taken while a method trains."""
    if settings.eval_data is None or method == "blockwise":
        return []
    with reporter.stage("tokenise", 1):
        examples = training_examples(
            settings.eval_data,
            tokenizer,
            seqlen=settings.of(method, "seqlen"),
            template=settings.template,
            completions_only=settings.train_on == "completions",
            evaluation=True,
            offline=offline,
        )
    return examples.rows[: settings.eval_samples]


def _refuse_for_text(settings: Recovery, source: str, names: tuple[str, ...]) -> None:
    for name in names:
        if getattr(settings, name) != Recovery.model_fields[name].default:
            raise InputError(
                f"--{name.replace('_', '-')} is for instructions and chats, and {source} is text, of which windows are "
                f"taken. Leave it out{', and say --steps' * (name == 'epochs')}."
            )
