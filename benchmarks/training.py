"""Steps of training as `svdllm recover` does them against the transformers Trainer alone and against a bare loop.

The same distillation-free training of all factors on the same windows, in turns: a loop of ten lines, the Trainer as it
comes, and the Trainer with what this library adds (checks of every loss and gradient, progress). The time of a step is
from the end of the step before it; the first of each turn is left out. Nothing is saved or logged meanwhile.

    python benchmarks/training.py CHECKPOINT --data FILE --steps 6 --repeats 4
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import Trainer, TrainerCallback

from svdllm import load_model
from svdllm.common.device import resolve_device
from svdllm.data import calibration_windows
from svdllm.data.examples import padded
from svdllm.models.open import open_config
from svdllm.recovery import make_recovery, training
from svdllm.recovery.distill import open_for_training
from svdllm.recovery.stage import Rows, Task


class Clock(TrainerCallback):
    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.last = 0.0

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self.last:
            self.seconds.append(now - self.last)
        self.last = now


def bare_steps(model: Any, rows: Rows, batch: int, device: torch.device) -> list[float]:
    """AdamW on cross-entropy, a step for each ``batch`` windows."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0)
    clock = Clock()
    model.train()
    for first in range(0, len(rows), batch):
        inputs = padded([{"input_ids": ids, "labels": labels} for ids, labels in rows[first : first + batch]])
        loss = model(**{name: tensor.to(device) for name, tensor in inputs.items()}).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clock.on_step_end()
    return clock.seconds


def trainer_steps(model: Any, task: Task, ours: bool) -> list[float]:
    arguments = training.training_arguments(task)
    arguments.save_strategy = arguments.logging_strategy = "no"  # type: ignore[assignment]
    clock = Clock()
    kind: Callable[..., Trainer] = training._Trainer if ours else Trainer
    callbacks: list[TrainerCallback] = [*training._callbacks(task), clock] if ours else [clock]
    trainer = kind(
        model=model,
        args=arguments,
        train_dataset=training._Rows(task.rows),
        data_collator=padded,
        callbacks=callbacks,
    )
    trainer.train()
    return clock.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="a folder that svdllm compress made")
    parser.add_argument("--data", required=True, help="training text")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    device = resolve_device(args.device)
    model = load_model(args.checkpoint, dtype=torch.float32).to(device)  # type: ignore[arg-type]
    open_for_training(model, train_norms=False)
    tokenizer = open_config(str(args.checkpoint)).load_tokenizer()
    windows = calibration_windows(args.data, tokenizer, samples=args.steps * args.batch, seqlen=args.seqlen, seed=3)
    rows = [(ids, ids) for ids in windows.ids]
    settings = make_recovery(
        {"methods": ("distill",), "data": args.data, "batch": args.batch, "seqlen": args.seqlen, "device": args.device}
        | {"steps": args.steps, "lr": 1e-4, "micro_batch": args.batch}
    )
    times: dict[str, list[float]] = {"bare": [], "trainer": [], "ours": []}
    with tempfile.TemporaryDirectory() as work:
        task = Task(
            file="steps",
            title="steps",
            rows=rows,
            settings=settings,
            schedule=settings.schedule("distill"),
            folder=Path(work),
        )
        run: dict[str, Callable[[], list[float]]] = {
            "bare": lambda: bare_steps(model, rows, args.batch, device),
            "trainer": lambda: trainer_steps(model, task, ours=False),
            "ours": lambda: trainer_steps(model, task, ours=True),
        }
        bare_steps(model, rows[: args.batch], args.batch, device)  # warm-up
        turns: dict[str, list[float]] = {name: [] for name in run}
        for repeat in range(args.repeats):
            names = list(run)
            for name in names[repeat % 3 :] + names[: repeat % 3]:
                seconds = run[name]()
                times[name] += seconds
                turns[name].append(statistics.median(seconds))
    record: dict[str, Any] = {
        "benchmark": "training",
        "device": str(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "tokens_per_step": args.batch * args.seqlen,
        "steps": args.repeats * (args.steps - 1),
    }
    table = Table(title=f"{args.checkpoint}: steps of {args.batch} x {args.seqlen} tokens, {record['steps']} of each")
    for column in ("loop", "median (s)", "quartiles (s)", "against the bare loop, by turn"):
        table.add_column(column, justify="left" if column == "loop" else "right")
    for name, seconds in times.items():
        low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
        ratios = [a / b for a, b in zip(turns[name], turns["bare"], strict=True)]
        record[name] = {
            "median": middle,
            "quartiles": [low, high],
            "ratios": ratios,
            "ratio": middle / statistics.median(times["bare"]),
        }
        spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
        table.add_row(name, f"{middle:.3f}", f"{low:.3f} to {high:.3f}", f"{record[name]['ratio']:.3f} ({spread})")
    Console(width=140).print(table)
    print(json.dumps(record))


if __name__ == "__main__":
    main()
