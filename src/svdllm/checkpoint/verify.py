"""Verifies that a checkpoint is as it was written, and computes what it computed then."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from svdllm.checkpoint.load import load_model
from svdllm.checkpoint.reference import REFERENCE_FILE, REFERENCE_POSITIONS
from svdllm.checkpoint.report import REPORT_FILE, ranks_of, read_report
from svdllm.common.device import resolve_device
from svdllm.common.errors import CheckpointError, NumericalError
from svdllm.models.config_files import load_config
from svdllm.models.logits import compare_logits, full_precision
from svdllm.models.low_rank import HASHES_FILE, RANKED, compare_hashes
from svdllm.models.low_rank.info import LowRankInfo


def verify(folder: str | Path, device: str = "auto") -> list[tuple[str, str]]:
    """Checks hashes, shapes, finiteness and the stored reference logits of a checkpoint.

    Returns:
        The checks that were made, as (name, finding).

    Raises:
        CheckpointError: the first check that fails; names the file or tensor.
        NumericalError: a weight or logit is NaN or infinite.
    """
    folder = Path(folder)
    report = read_report(folder)
    if not (folder / HASHES_FILE).is_file():
        raise CheckpointError(f"{folder} has no svdllm/hashes.json: nothing to verify its files against.")
    problems = compare_hashes(folder)
    if problems:
        raise CheckpointError(f"{folder} is not as it was written: {' '.join(problems)} Fetch or write it again.")
    config = load_config(folder, str(folder), allow_quantized=True)
    options = {"check_integrity": False} if LowRankInfo.of(config) else {}  # of our classes; files are checked above
    checks = [("hashes", "every file is as it was written")]
    model = load_model(folder, dtype=torch.float32, **options)
    ranks = {name: m.svd_v.out_features for name, m in model.named_modules() if isinstance(m, RANKED)}
    wanted = ranks_of(report)
    if ranks != wanted:
        different = sorted(name for name in {**ranks, **wanted} if ranks.get(name) != wanted.get(name))
        raise CheckpointError(f"{folder}: the ranks of {', '.join(different[:3])} are not those of {REPORT_FILE}.")
    in_bits = any(name.endswith(".packed_codes") for name, _ in model.named_parameters())  # counted as integers
    if not in_bits and model.num_parameters() != report["params"]:
        raise CheckpointError(f"{folder}: {report['params']:,} parameters expected, {model.num_parameters():,} found.")
    checks.append(("shapes", f"{len(ranks)} low-rank linears, {report['params']:,} parameters"))
    for name, parameter in model.named_parameters():
        values = parameter.dequantize() if hasattr(parameter, "tensor_data_names") else parameter  # of torchao
        if not bool(torch.isfinite(values).all()):
            raise NumericalError(f"{folder}: {name} has NaN or infinite values.")
    checks.append(("finite", "every weight"))
    checks.append(
        ("logits", f"largest difference {_reference_difference(folder, model, device):.1e} of the largest logit")
    )
    return checks


def _reference_difference(folder: Path, model: PreTrainedModel, device: str) -> float:
    reference = load_file(folder / REFERENCE_FILE)
    place = resolve_device(device)
    model.to(place)  # type: ignore[arg-type]
    with torch.no_grad(), full_precision():
        made = model.eval()(input_ids=reference["token_ids"].to(place), use_cache=False).logits
        logits = made[:, -REFERENCE_POSITIONS:].float().cpu()
    if not bool(torch.isfinite(logits).all()):
        raise NumericalError(f"{folder}: the logits are not finite.")
    return compare_logits(
        logits,
        reference["logits"],
        lambda how: CheckpointError(f"{folder} does not compute what was written ({REFERENCE_FILE}): {how}."),
    )
