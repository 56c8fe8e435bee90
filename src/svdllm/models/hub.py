"""Fetches the files of a model from the hub, or finds them in its local cache."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from glob import escape
from pathlib import Path
from typing import Any

from svdllm.common.errors import InputError, first_line
from svdllm.models.companions import DECIDING_FILES, companion_patterns, has_own_code
from svdllm.models.config_files import ADAPTER_FILE, read_config
from svdllm.models.low_rank.lowrank import WEIGHT_FILE, WEIGHT_INDEX_FILE, weight_file_names
from svdllm.models.model_names import snapshot_commit


def hub_folder(name: str, revision: str | None, offline: bool, *, weights: bool) -> Path:
    """Returns a local folder with the config and tokenizer of a hub repository, and with its weights if asked for.

    Raises:
        InputError: there is no such repository, or it cannot be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith((".gguf", "/")):
        raise InputError(f"No such model: {name} does not exist here, and it is not a hub id (owner/name).")
    fetch = partial(snapshot_download, name, local_files_only=offline)
    try:
        folder = Path(fetch(revision=revision, allow_patterns=[*DECIDING_FILES, ADAPTER_FILE]))
        fetch = partial(fetch, revision=snapshot_commit(folder) or revision)
        code = ["*.py"] if has_own_code(folder) else []  # is copied, never run
        fetch(allow_patterns=companion_patterns(folder) + code, ignore_patterns=["*/*"])
        if weights:
            _fetch_weights(fetch, folder)
        return folder
    except GatedRepoError as error:
        raise InputError(
            f"{name} is gated: accept its terms on its page on the hub, then log in with `hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise InputError(f"{name} has no revision {revision!r}; --revision takes a branch, tag or commit.") from error
    except (HFValidationError, RepositoryNotFoundError) as error:
        raise InputError(f"No such model: {name} is neither a folder or file here nor a model on the hub.") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        how = (
            "and --offline keeps from asking the hub"
            if offline
            else f"and the hub gave no answer ({first_line(error)})"
        )
        raise InputError(
            f"No such model: {name} is neither a folder or file here nor in the local cache, {how}."
        ) from error


def _fetch_weights(fetch: Callable[..., Any], folder: Path) -> None:
    """Fetches the weight files that transformers reads (``weight_file_names``), and no other variants."""
    with suppress(ValueError):  # opening the folder reports what is missing or damaged
        named = read_config(folder, folder.name).get("transformers_weights")
        fetch(allow_patterns=[escape(named) if isinstance(named, str) else WEIGHT_FILE])
        if not weight_file_names(folder):
            fetch(allow_patterns=[WEIGHT_INDEX_FILE])
        if missing := [escape(name) for name in weight_file_names(folder) if not (folder / name).is_file()]:
            fetch(allow_patterns=missing)
