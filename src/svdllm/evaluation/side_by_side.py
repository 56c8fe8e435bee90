"""Measures models one after the other on the same texts and tasks; one model is in memory at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from svdllm.checkpoint.load import load_model
from svdllm.common.device import resolve_device, resolve_dtype
from svdllm.common.progress import Reporter
from svdllm.data import check_source, evaluation_tokens
from svdllm.data.hub_datasets import hub_offline
from svdllm.evaluation.perplexity import Perplexity, check_counts, perplexity
from svdllm.evaluation.tasks import TaskResults, TaskSuite, check_models, open_tasks, run_tasks
from svdllm.evaluation.windows import check_protocol, prefix_token
from svdllm.models.limits import require_context, require_known_ids, within_context
from svdllm.models.model_names import short_name
from svdllm.models.open import Source, open_config

SEQLEN = 2048  # default length of the windows of perplexity


@dataclass(frozen=True, kw_only=True)
class ModelPerplexity:
    """The perplexity of one model on one text, with the size of the model; ``weight_bytes`` are of its weight files."""

    model: str
    text: str
    params: int
    weight_bytes: int
    perplexity: Perplexity

    def to_dict(self) -> dict[str, Any]:
        sizes = {"model": self.model, "text": self.text, "params": self.params, "weight_bytes": self.weight_bytes}
        return sizes | self.perplexity.to_dict()


@dataclass(frozen=True, kw_only=True)
class ModelEvaluation:
    """The measurements of one model: perplexity by text, and the tasks if there were any."""

    model: str
    params: int
    weight_bytes: int
    perplexity: dict[str, Perplexity]
    tasks: TaskResults | None


@dataclass(frozen=True)
class OpenedModel:
    """A model that was opened, but not loaded."""

    name: str
    source: Source
    tokenizer: Any
    dtype: torch.dtype
    revision: str | None

    @classmethod
    def of(cls, name: str, place: torch.device, dtype: str, offline: bool, revision: str | None = None) -> OpenedModel:
        source = open_config(name, offline=offline, revision=revision, allow_quantized=True)
        return cls(name, source, source.load_tokenizer(offline), resolve_dtype(dtype, place, source.dtype), revision)

    def token_ids(self, texts: Sequence[str], offline: bool) -> dict[str, Tensor]:
        """Tokenises every text: text -> ids (num_tokens,).

        Raises:
            InputError: a text cannot be read, or has an id beyond the model's vocabulary.
        """
        ids = {text: evaluation_tokens(text, self.tokenizer, offline=offline) for text in texts}
        for text_ids in ids.values():
            require_known_ids(text_ids, self.source.config, self.tokenizer)
        return ids

    def load(self, place: torch.device, offline: bool, reporter: Reporter) -> PreTrainedModel:
        with reporter.stage(f"load {short_name(self.name)}", 1):
            revision: dict[str, Any] = {} if self.revision is None else {"revision": self.revision}
            model = load_model(self.name, dtype=self.dtype, local_files_only=offline, **revision)
            return model.to(place)  # type: ignore[arg-type]


def evaluate_models(
    models: Sequence[str],
    texts: Sequence[str] = (),
    *,
    tasks: TaskSuite | None = None,
    seqlen: int | None = None,
    protocol: str = "windows",
    max_windows: int | None = None,
    batch_size: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    offline: bool = False,
    reporter: Reporter | None = None,
) -> list[ModelEvaluation]:
    """Measures every model on every text and on the tasks; one model is in memory at a time.

    All models and texts are checked before the first model is loaded.

    Args:
        models: hub ids, folders (compressed or not) or GGUF files; each is measured with its own tokenizer.
        tasks: of ``svdllm.evaluation.tasks.open_tasks``.
        seqlen: 2048 by default, or the smallest context of the models where that is less.
        batch_size: number of windows, or of requests of tasks.

    Raises:
        InputError, UnsupportedModelError, CheckpointError: a model or text cannot be used; names it.
        NumericalError: a logit is not finite.
    """
    reporter = reporter or Reporter()
    check_protocol(protocol, seqlen or SEQLEN)
    check_counts(batch_size=batch_size, max_windows=max_windows)
    for text in texts:
        check_source(text)
    place = resolve_device(device)
    opened = [OpenedModel.of(model, place, dtype, offline) for model in models]
    if seqlen is None:
        seqlen = min(within_context(model.source.config, SEQLEN) for model in opened)
    for model in opened if texts else ():
        require_context(model.source.config, seqlen)
    if tasks is not None:
        check_models(tasks, {model.name: model.source.config for model in opened})
    evaluations = []
    for model in opened:
        ids = model.token_ids(texts, offline)
        loaded = model.load(place, offline, reporter)
        settings: dict[str, Any] = {"max_windows": max_windows, "batch_size": batch_size, "protocol": protocol}
        evaluations.append(
            evaluate_loaded(
                loaded, model, ids, tasks=tasks, seqlen=seqlen, offline=offline, reporter=reporter, **settings
            )
        )
        del loaded
    return evaluations


def evaluate_loaded(
    loaded: PreTrainedModel,
    model: OpenedModel,
    ids: Mapping[str, Tensor],
    *,
    tasks: TaskSuite | None,
    seqlen: int,
    protocol: str = "windows",
    max_windows: int | None = None,
    batch_size: int | None = None,
    offline: bool,
    reporter: Reporter,
) -> ModelEvaluation:
    """Measures one model in memory, on the token ids of every text and on the tasks."""
    measured, results = {}, None
    for text, text_ids in ids.items():
        with reporter.stage(f"eval {short_name(model.name)}", 1):
            measured[text] = perplexity(
                loaded,
                text_ids,
                seqlen=seqlen,
                protocol=protocol,
                prefix_token_id=prefix_token(model.tokenizer),
                max_windows=max_windows,
                batch_size=batch_size,
                progress=reporter.advance,
                source=text,
            )
    if tasks is not None:
        with hub_offline(offline or bool(tasks.files)):
            results = run_tasks(
                loaded, model.tokenizer, tasks, name=model.name, batch_size=batch_size, reporter=reporter
            )
    return ModelEvaluation(
        model=model.name,
        params=loaded.num_parameters(),
        weight_bytes=model.source.weight_bytes,
        perplexity=measured,
        tasks=results,
    )


def evaluate_tasks(
    model: str,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    task_data: str | Path | None = None,
    batch_size: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    offline: bool = False,
    reporter: Reporter | None = None,
) -> TaskResults:
    """Measures one model on tasks of lm-evaluation-harness; arguments as in ``open_tasks`` and ``evaluate_models``.

    Raises:
        InputError, UnsupportedModelError, CheckpointError: the model, a task or its data cannot be used; names it.
    """
    with open_tasks(
        tasks, limit=limit, num_fewshot=num_fewshot, task_data=task_data, offline=offline, reporter=reporter
    ) as suite:
        (evaluation,) = evaluate_models(
            [model], tasks=suite, batch_size=batch_size, device=device, dtype=dtype, offline=offline, reporter=reporter
        )
    assert evaluation.tasks is not None
    return evaluation.tasks


def perplexity_rows(evaluations: Sequence[ModelEvaluation]) -> list[ModelPerplexity]:
    """Makes a row for every text and model, ordered by text and then by model."""
    texts = evaluations[0].perplexity if evaluations else ()
    return [
        ModelPerplexity(
            model=evaluation.model,
            text=text,
            params=evaluation.params,
            weight_bytes=evaluation.weight_bytes,
            perplexity=evaluation.perplexity[text],
        )
        for text in texts
        for evaluation in evaluations
    ]
