"""Multiplies the factors of a checkpoint out to a plain model."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from svdllm.checkpoint.output import new_folder
from svdllm.checkpoint.shards import write_shards
from svdllm.checkpoint.tensors import Tensors, tensor_bytes
from svdllm.common.errors import CheckpointError, InputError, UnsupportedModelError
from svdllm.models.companions import copy_companion_files
from svdllm.models.config_files import load_config
from svdllm.models.low_rank import HASHES_FILE, compare_hashes
from svdllm.models.low_rank.factory import dense_config
from svdllm.models.low_rank.info import LowRankInfo
from svdllm.models.skeleton import build_skeleton
from svdllm.models.weights import SafetensorsWeights


def export_dense(folder: str | Path, output_dir: str | Path) -> None:
    """Writes a plain model of the base family, which loads everywhere and is as large as the original.

    Raises:
        InputError: ``folder`` is not a checkpoint, or ``output_dir`` is not empty.
        CheckpointError: a file is truncated or altered.
        ResourceError: the disk is too small.
        UnsupportedModelError: the base family has no biases where bias correction added some.
    """
    folder = Path(folder)
    config = config_to_export(folder)
    if (info := LowRankInfo.of(config)) is None:
        raise InputError(f"{folder} is already a dense model ({config.model_type}); it has no factors to multiply out.")
    with new_folder(output_dir, "an export") as (output, partial):
        require_intact(folder)
        base = dense_config(config)
        dense = _Products(SafetensorsWeights(folder, build_skeleton(config)), build_skeleton(base), info)
        dense.require_places()
        output.require_disk(tensor_bytes(dense.tensors), "the weights need")
        write_shards(partial, dense, dense.tensors)
        base.save_pretrained(partial)
        copy_companion_files(folder, partial)


def config_to_export(folder: Path) -> PreTrainedConfig:
    """Reads the config in a model's folder. Raises InputError if there is none."""
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} is not an svdllm checkpoint: it has no config.json.")
    return load_config(folder, str(folder))


def require_intact(folder: Path) -> None:
    """Raises CheckpointError if the weights differ from the hashes in the folder."""
    problems = compare_hashes(folder, weights_only=True) if (folder / HASHES_FILE).is_file() else []
    if problems:
        raise CheckpointError(f"{folder} is not as it was written: {' '.join(problems)}")


class _Products:
    """The tensors of the dense model, made one at a time from those of a low-rank model."""

    def __init__(self, weights: SafetensorsWeights, skeleton: PreTrainedModel, info: LowRankInfo):
        self._weights, self._skeleton, self._info = weights, skeleton, info
        self.tensors: Tensors = {}
        for name in weights.names():
            shape, dtype = weights.shape_and_dtype(name)
            owner = name.rpartition(".")[0].removesuffix(".svd_u").removesuffix(".svd_v")
            if owner not in info.ranks:
                self.tensors[name] = (shape, dtype)
            elif name.endswith(".svd_u.weight"):
                shape = tuple(skeleton.get_parameter(f"{owner}.weight").shape)
                self.tensors[f"{owner}.weight"] = (shape, dtype)
            elif name.endswith(".svd_u.bias"):
                self.tensors[f"{owner}.bias"] = (shape, dtype)

    def require_places(self) -> None:
        """Raises UnsupportedModelError if the base family has no tensor of a name: transformers would drop it."""
        dropped = sorted(self.tensors.keys() - self._skeleton.state_dict().keys())
        if dropped:
            raise UnsupportedModelError(
                f"{type(self._skeleton).__name__} has no place for {len(dropped)} biases that --bias-correction added, "
                f"such as {dropped[0]}: a plain model would compute without them. Use the checkpoint as it is, or "
                "compress without --bias-correction."
            )

    def get(self, name: str) -> Tensor:
        owner, _, leaf = name.rpartition(".")
        if owner not in self._info.ranks:
            return self._weights.get(name)
        if leaf == "bias":
            return self._weights.get(f"{owner}.svd_u.bias")
        u_OR = self._weights.get(f"{owner}.svd_u.weight")
        v_RI = self._weights.get(f"{self._info.shared_factors.get(owner, owner)}.svd_v.weight")
        product_OI = u_OR.double() @ v_RI.double()
        is_conv1d = isinstance(self._skeleton.get_submodule(owner), Conv1D)  # its weight is stored as (in, out)
        return (product_OI.mT if is_conv1d else product_OI).to(u_OR.dtype)
