"""Loads data sets of the hub, with a network or from its local cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from svdllm.common.errors import InputError, explaining, first_line
from svdllm.data.specs import HubSpec


def load_split(spec: HubSpec, split: str, *, offline: bool) -> Any:
    import datasets
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import LocalEntryNotFoundError

    name = f"{spec.repo}, config {spec.config or 'default'}, split {split}"
    with hub_offline(offline), explaining(f"the data set {name} cannot be loaded"):
        try:
            if spec.data_file is None:
                return datasets.load_dataset(spec.repo, spec.config, split=split)
            kind = "parquet" if spec.data_file.endswith(".parquet") else "json"
            return datasets.load_dataset(kind, data_files={split: _hub_file(spec, spec.data_file)}, split=split)
        except DatasetNotFoundError as err:
            raise InputError(
                f"the data set {spec.repo} does not exist on the hub or may not be read ({first_line(err)}): "
                "check the name, or log in with hf auth login"
            ) from err
        except (ConnectionError, LocalEntryNotFoundError) as err:
            raise InputError(_not_reached(spec, offline, err)) from err
        except ValueError as err:
            if "Couldn't find cache" in str(err):
                raise InputError(_not_reached(spec, offline, err)) from err
            raise


def _hub_file(spec: HubSpec, name: str) -> str:
    """Fetches one file of a repository, or finds it in the hub's cache.

    ``load_dataset(repo, data_files=...)`` does not find offline what it cached.
    """
    from huggingface_hub import hf_hub_download

    local = Path(spec.repo, name)
    if local.is_file():
        return str(local)
    return hf_hub_download(spec.repo, name, repo_type="dataset", revision=spec.revision)


def _not_reached(spec: HubSpec, offline: bool, err: Exception) -> str:
    from datasets import config

    if offline or config.HF_HUB_OFFLINE:
        reason = "is not in the local cache, and offline mode is on"
    else:
        reason = f"cannot be reached on the hub and is not in the local cache ({first_line(err)})"
    return (
        f"the data set {spec.repo} {reason}: run once with a network, or give a local file (.txt .jsonl .parquet) "
        "or the built-in python-docs"
    )


@contextmanager
def hub_offline(offline: bool) -> Iterator[None]:
    """Forbids requests to the hub while the context lasts; ``load_dataset`` uses its cache.

    datasets 5 ignores ``DownloadConfig(local_files_only=True)``, and environment variables are read only at import.
    Both libraries read these two flags during a call, so they are set here and put back.
    """
    if not offline:
        yield
        return
    from datasets import config
    from huggingface_hub import constants

    holders: tuple[Any, ...] = (config, constants)
    before = [holder.HF_HUB_OFFLINE for holder in holders]
    try:
        for holder in holders:
            holder.HF_HUB_OFFLINE = True
        yield
    finally:
        for holder, value in zip(holders, before, strict=True):
            holder.HF_HUB_OFFLINE = value
