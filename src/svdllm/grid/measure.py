"""One model of a grid: perplexity, tasks and what it writes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from svdllm.checkpoint import load_model
from svdllm.data import evaluation_tokens
from svdllm.data.sources import hub_offline
from svdllm.evaluate import evaluation_mode, perplexity
from svdllm.grid.settings import Measures
from svdllm.plan import resolve_device, resolve_dtype
from svdllm.progress import Reporter
from svdllm.protocols import prefix_token
from svdllm.source import open_config
from svdllm.tasks import TaskSuite, run_tasks


def measure(
    model_name: str | Path, measures: Measures, suite: TaskSuite | None, *, offline: bool, reporter: Reporter
) -> dict[str, Any]:
    """Everything asked for, of one model, which is in memory meanwhile; ``suite`` are the tasks, made ready.

    Raises:
        InputError, CheckpointError: the model or a text cannot be read.
        NumericalError: a logit is not finite.
    """
    source = open_config(model_name, offline=offline)
    tokenizer = source.load_tokenizer(offline)
    device = resolve_device(measures.device)
    dtype = resolve_dtype(measures.dtype, device, source.dtype)
    with reporter.stage("load", 1):
        model = load_model(model_name, dtype=dtype, local_files_only=offline).to(device)  # type: ignore[arg-type]
    record: dict[str, Any] = {"params": model.num_parameters(), "weight_bytes": source.weight_bytes, "perplexity": {}}
    for text in measures.texts:
        ids = evaluation_tokens(text, tokenizer, offline=offline)
        with reporter.stage("perplexity", 1):
            found = perplexity(
                model,
                ids,
                seqlen=measures.seqlen,
                prefix_token_id=prefix_token(tokenizer),
                max_windows=measures.windows,
                source=text,
                progress=reporter.advance,
            )
        record["perplexity"][text] = found.to_dict()
    if measures.prompts:
        with reporter.stage("generate", len(measures.prompts)):
            record["generations"] = continuations(model, tokenizer, measures.prompts, measures.new_tokens)
    if suite is not None:
        with evaluation_mode(model), hub_offline(offline or measures.task_data is not None):
            results = run_tasks(model, tokenizer, suite, name=str(model_name), reporter=reporter)
        record["tasks"] = results.to_dict()
    return record


def continuations(
    model: PreTrainedModel, tokenizer: Any, prompts: Sequence[str], new_tokens: int
) -> list[dict[str, str]]:
    """What a model writes after every prompt: the most likely token each time, so that models can be compared."""
    written = []
    with evaluation_mode(model), torch.no_grad():
        for prompt in prompts:
            inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
            output = model.generate(  # type: ignore[operator]
                **inputs,
                do_sample=False,
                num_beams=1,
                max_new_tokens=new_tokens,
                pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id or 0,
            )
            text = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            written.append({"prompt": prompt, "text": text})
    return written
