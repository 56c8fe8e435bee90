"""Writes files so that a reader finds them whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from svdllm.common.disk import naming


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Writes a safetensors file with the permissions of an ordinary new file (the library gives it to its owner only).

    Raises:
        OSError: the file cannot be written, for instance because the disk is full. Nothing is left of it.
    """
    path.touch()
    mode = path.stat().st_mode
    try:
        with naming(path):
            save_file(tensors, path, metadata={"format": "pt"})
    except OSError:
        path.unlink(missing_ok=True)
        raise
    path.chmod(mode)


def save_atomically(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Writes a file of tensors that appears under its name only when it is complete."""
    with _appearing(path) as partial:
        save_tensors({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, partial)


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file that appears under its name only when it is complete."""
    with _appearing(path) as partial, naming(path):
        partial.write_bytes(content)


@contextmanager
def _appearing(path: Path) -> Iterator[Path]:
    """Yields a temporary path, which is renamed at the end, or removed after an error."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        yield partial
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    partial.replace(path)
