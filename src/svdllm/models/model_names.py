"""Names a model for people."""

from __future__ import annotations

import re
from pathlib import Path

_SNAPSHOT = re.compile("models--([^/]+)/snapshots/[0-9a-f]{40}$")


def display_name(model: str | Path) -> str:
    """The hub id of a model, also of a snapshot in the hub's cache, or the last part of any other path."""
    text = str(model)
    if not Path(text).exists() and not text.startswith((".", "/", "~")):
        return text
    return _hub_id(text) or Path(text).resolve().name


def short_name(model: str | Path) -> str:
    """The display name without an owner."""
    return display_name(model).rpartition("/")[2]


def given_name(model: str) -> str:
    """The model as it was given, so that folders of the same name differ; the hub id of a snapshot."""
    return _hub_id(model) or model


def snapshot_commit(folder: Path) -> str | None:
    """The commit of a folder that is a snapshot in the hub's cache, else None."""
    return folder.name if re.fullmatch("[0-9a-f]{40}", folder.name) else None


def _hub_id(path: str) -> str | None:
    # The path as it is given first: the cache may be a link to another place, and a link may lead into the cache.
    for place in (Path(path).absolute(), Path(path).resolve()):
        if snapshot := _SNAPSHOT.search(place.as_posix()):
            return snapshot[1].replace("--", "/")
    return None
