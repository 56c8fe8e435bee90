"""No test reaches the network or the user's caches: offline mode before any import, and sockets that refuse."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import ipaddress
import socket
from pathlib import Path

import pytest
from transformers.utils import logging

from runs import TEXT, save_dense
from tokenizers_local import byte_tokenizer


def _is_local(address: object) -> bool:
    if not isinstance(address, tuple):
        return True  # a Unix socket
    host = str(address[0])
    try:
        return host in ("", "localhost") or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests first, so that nothing waits for them in the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Connections to anything but this machine fail at once; returns the addresses that were tried."""
    tried: list[object] = []

    def guard(original):
        def connect(self, address, *args):
            if not _is_local(address):
                tried.append(address)
                raise OSError(f"a test tried to reach {address}")
            return original(self, address, *args)

        return connect

    def resolve(host, *args, **kwargs):
        if host is not None and not _is_local((host,)):
            tried.append(host)
            raise socket.gaierror(f"a test tried to look up {host}")
        return look_up(host, *args, **kwargs)

    look_up = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, guard(getattr(socket.socket, name)))
    return tried


@pytest.fixture(scope="session")
def tokenizer():
    """Byte-level BPE of 290 tokens, no special tokens added, no chat template."""
    return byte_tokenizer()


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory, tokenizer) -> Path:
    """A tiny model on disk, which no test changes."""
    return save_dense(tmp_path_factory.mktemp("model") / "tiny", tokenizer=tokenizer)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small text file, which no test changes."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(TEXT)
    return file


VERBOSITY, BARS = logging.get_verbosity(), logging.is_progress_bar_enabled()


@pytest.fixture(autouse=True)
def transformers_says_what_it_says() -> None:
    """The command line quiets transformers for its own process; here that is the process of the other tests, too."""
    logging.set_verbosity(VERBOSITY)
    (logging.enable_progress_bar if BARS else logging.disable_progress_bar)()
