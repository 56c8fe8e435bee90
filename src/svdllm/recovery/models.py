"""Opens the compressed model, as far as it is trained, and the dense one: whole, as weights, or block by block."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from svdllm.checkpoint.load import load_model
from svdllm.common.device import resolve_dtype
from svdllm.common.memory import skeleton_bytes
from svdllm.common.progress import Reporter
from svdllm.models.config_files import load_config
from svdllm.models.discover import discover_blocks
from svdllm.models.low_rank.lowrank import sha256_of
from svdllm.models.open import Source, open_config, open_source
from svdllm.models.safetensors_files import weight_files
from svdllm.models.skeleton import build_skeleton
from svdllm.models.walk import Walk
from svdllm.models.weights import SafetensorsWeights, Weights
from svdllm.recovery.trained_weights import TrainedWeights


@dataclass(frozen=True, kw_only=True)
class Models:
    """The two models of a recovery. Each use opens them anew, with the tensors that finished stages have written."""

    folder: Path
    teacher: str | None
    work: Path
    device: torch.device
    offline: bool
    reporter: Reporter

    @property
    def finished_files(self) -> list[Path]:
        """The files of finished stages: one of tensors for each, or one for every block in the stage's folder."""
        stages = sorted(record.with_suffix("") for record in self.work.glob("*.json"))
        return [
            file
            for stage in stages
            for file in (stage.with_suffix(".safetensors"), *sorted(stage.glob("block-*.safetensors")))
            if file.is_file()
        ]

    @cached_property
    def config(self) -> PreTrainedConfig:
        return load_config(self.folder, str(self.folder))

    @property
    def vocab_size(self) -> int:
        return self.config.get_text_config().vocab_size

    @property
    def stored_dtype(self) -> torch.dtype:
        return self.config.dtype if isinstance(self.config.dtype, torch.dtype) else torch.float32

    @property
    def own_dtype(self) -> torch.dtype:
        """The dtype that the untrained model computes in: float32 on a CPU, the stored dtype on a GPU."""
        return resolve_dtype("auto", self.device, self.stored_dtype)

    @cached_property
    def dense_config(self) -> Source:
        """Opens the teacher's config without its weights."""
        assert self.teacher is not None
        return open_config(self.teacher, offline=self.offline)

    @property
    def dense_dtype(self) -> torch.dtype:
        return resolve_dtype("auto", self.device, self.dense_config.dtype)

    @property
    def dense_bytes(self) -> int:
        """Bytes of the teacher's weights in the dtype that it computes in."""
        return skeleton_bytes(build_skeleton(self.dense_config.config, self.dense_dtype))

    def skeleton(self, dtype: torch.dtype) -> PreTrainedModel:
        """The compressed model without data."""
        return build_skeleton(self.config, dtype)

    def teacher_fingerprint(self) -> list[str] | str | None:
        """Tells teachers at one place apart: the hashes of the files, or the commit of a hub id."""
        if self.teacher is None:
            return None
        place = Path(self.teacher)
        if not place.exists():
            return self.dense_config.revision
        files = [place] if place.is_file() else [place / "config.json", *weight_files(place)]
        return [sha256_of(file) for file in files]

    def weights(self) -> TrainedWeights:
        return TrainedWeights(SafetensorsWeights(self.folder, build_skeleton(self.config)), self.finished_files)

    def compressed(self, dtype: torch.dtype | None = None, *, untrained: bool = False) -> PreTrainedModel:
        with self.reporter.stage("load", 1):
            model = load_model(self.folder, dtype=dtype or self.own_dtype)
            for file in [] if untrained else self.finished_files:
                model.load_state_dict(load_file(file), strict=False)
        return model.requires_grad_(False).to(self.device)  # type: ignore[arg-type]

    def dense(self) -> PreTrainedModel:
        assert self.teacher is not None
        with self.reporter.stage("load", 1):
            model = load_model(self.teacher, dtype=self.dense_dtype, local_files_only=self.offline)
        return model.eval().requires_grad_(False).to(self.device)  # type: ignore[arg-type]

    def walks(self, ids: Tensor, batch: int) -> tuple[Walk, Walk]:
        """Walks through the dense and the compressed model, with the same windows in the same batches."""
        assert self.teacher is not None
        source = open_source(self.teacher, offline=self.offline, gguf_folder=self.work / "teacher")
        assert source.weights is not None
        return self._walk(source.weights, source.config, ids, batch), self._walk(
            self.weights(), self.config, ids, batch
        )

    def _walk(self, weights: Weights, config: PreTrainedConfig, ids: Tensor, batch: int) -> Walk:
        skeleton = build_skeleton(config)
        return Walk(
            weights=weights,
            skeleton=skeleton,
            structure=discover_blocks(skeleton),
            ids=ids,
            device=self.device,
            dtype=torch.float32,
            batch_tokens=batch * ids.shape[1],
        )
