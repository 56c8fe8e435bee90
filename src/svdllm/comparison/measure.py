"""Measures one model of a comparison: perplexity, tasks and the texts that it writes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from svdllm.common.device import resolve_device
from svdllm.common.run_options import RunOptions
from svdllm.comparison.paired import WINDOW_NLL
from svdllm.comparison.settings import Measures
from svdllm.data.tokens import encode
from svdllm.evaluation.bytes import bits_per_byte, bytes_per_token
from svdllm.evaluation.perplexity import evaluation_mode
from svdllm.evaluation.side_by_side import OpenedModel, evaluate_loaded
from svdllm.evaluation.tasks import TaskSuite
from svdllm.models.limits import require_context, require_known_ids, within_context


def measure(
    name: str | Path,
    measures: Measures,
    suite: TaskSuite | None,
    options: RunOptions,
) -> dict[str, Any]:
    """Loads one model and measures everything asked for; ``suite`` are the tasks, made ready.

    Raises:
        InputError, CheckpointError: the model or a text cannot be read.
        NumericalError: a logit is not finite.
    """
    device = resolve_device(measures.device)
    model = OpenedModel.of(str(name), device, measures.dtype, options.offline, options.revision)
    ids = model.token_ids(measures.texts, options.offline)
    loaded = model.load(device, options.offline, options.reporter)
    found = evaluate_loaded(
        loaded,
        model,
        ids,
        tasks=suite,
        seqlen=measures.seqlen,
        max_windows=measures.windows,
        offline=options.offline,
        reporter=options.reporter,
    )
    rows = {
        text: row.to_dict()
        | bits_per_byte(row, bytes_per_token(row.measured(ids[text]), model.tokenizer))
        | {WINDOW_NLL: list(row.window_nll)}
        for text, row in found.perplexity.items()
    }
    record: dict[str, Any] = {"params": found.params, "weight_bytes": found.weight_bytes, "perplexity": rows}
    if found.tasks is not None:
        record["tasks"] = found.tasks.to_dict()
    if measures.prompts:
        with options.reporter.stage("generate", len(measures.prompts)):
            record["generations"] = continuations(loaded, model.tokenizer, measures.prompts, measures.new_tokens)
    return record


def continuations(
    model: PreTrainedModel, tokenizer: Any, prompts: Sequence[str], new_tokens: int
) -> list[dict[str, str]]:
    """Continues every prompt with the most likely token each time, so that models can be compared."""
    written = []
    with evaluation_mode(model), torch.no_grad():
        for prompt in prompts:
            ids = encode(prompt, tokenizer, f"the prompt {prompt!r}", add_special_tokens=True)
            require_known_ids(ids, model.config, tokenizer)
            require_context(model.config, len(ids) + 1, f"the prompt {prompt!r}: its length with one more token,")
            room = within_context(model.config, len(ids) + new_tokens) - len(ids)
            ids = ids.unsqueeze(0).to(model.device)
            output = model.generate(  # type: ignore[operator]
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                num_beams=1,
                max_new_tokens=room,
                pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id or 0,
            )
            text = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
            written.append({"prompt": prompt, "text": text})
    return written
