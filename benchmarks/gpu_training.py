"""The steps of ``gpu_suite.py`` that train: tokens per second of distillation on one GPU and, by FSDP2, on two."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import svdllm
from gpu_base import Record, Skipped, Suite, random_ids, random_model, save_with_tokenizer


def distillation(suite: Suite) -> Record:
    """A few blocks of LLaMA-7B's shapes with 40 % removed, taught by the dense ones."""
    return _distilled(suite, 1)


def two_gpus(suite: Suite) -> Record:
    """The same in two processes."""
    if (found := torch.cuda.device_count()) < 2:
        raise Skipped(f"two GPUs are needed, and there are {found}")
    return _distilled(suite, 2)


def _distilled(suite: Suite, processes: int) -> Record:
    steps, batch, seqlen = (1, 2, 16) if suite.tiny else (10, 16, 1024)
    with tempfile.TemporaryDirectory() as folder:
        dense, low_rank, out = (Path(folder) / name for name in ("dense", "low-rank", "out"))
        text = save_with_tokenizer(random_model(suite.config(suite.blocks), suite), dense)
        recipe = svdllm.Recipe(
            ratio=0.4, metric="input", allocation="uniform", samples=4, seqlen=suite.seqlen, device=str(suite.device)
        )
        svdllm.compress(dense, recipe, low_rank, calibration=random_ids(suite, 4, suite.seqlen))
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command = [sys.executable, *(launcher if processes > 1 else []), "-m", "svdllm", "recover", str(low_rank)]
        command += ["-o", str(out), "--method", "distill", "--teacher", str(dense), "--data", str(text), "--offline"]
        command += ["--steps", str(steps), "--batch", str(batch), "--seqlen", str(seqlen)]
        command += ["--device", suite.device.type]
        _run(command)
        report = json.loads((out / "svdllm" / "report.json").read_text(encoding="utf-8"))
    (stage,) = report["recovery"][-1]["stages"]
    row = {key: stage[key] for key in ("steps", "tokens", "seconds", "trained_params")}
    return row | {"processes": processes, "tokens_per_second": stage["tokens"] / stage["seconds"]}


def _run(command: list[str]) -> None:
    """Runs a command that finds the package's sources; asks it to end if this process is."""
    sources = str(Path(svdllm.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([sources, os.environ.get("PYTHONPATH", "")])}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        try:
            said, _ = process.communicate()
        except BaseException:
            process.terminate()  # torchrun then ends its workers
            raise
    if process.returncode:
        raise RuntimeError(f"svdllm recover: {said[-1500:]}")
