"""Standard output and standard error that never end a run: what cannot be shown is dropped or replaced.

A character that the terminal's encoding lacks is shown as ``?``. When the reader is gone, as after ``| head``, the rest
is dropped and the run continues: its result may be a file.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

READER_IS_GONE = (errno.EPIPE, errno.EIO)  # a closed pipe, a terminal that was hung up


class LenientStream:
    """A text stream that swallows what it cannot show; everything else is the stream's own."""

    def __init__(self, stream: TextIO | None):
        self._stream: Any = io.StringIO() if stream is None else stream
        self.reader_is_gone = stream is None

    def write(self, text: str) -> int:
        if not self.reader_is_gone:
            try:
                self._write(text)
            except OSError as error:
                self._stop(error)
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._stop(error)

    def settle(self) -> None:
        """Flushes for the last time; by now an error has been told, or cannot be."""
        try:
            self._stream.flush()
        except OSError:
            self._drop_the_rest()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
        except UnicodeEncodeError:
            encoding = self._stream.encoding
            self._stream.write(text.encode(encoding, "replace").decode(encoding))

    def _stop(self, error: OSError) -> None:
        if error.errno not in READER_IS_GONE:
            raise error
        self._drop_the_rest()

    def _drop_the_rest(self) -> None:
        """Redirects the stream to nowhere: its buffer would fail once more when Python ends."""
        self.reader_is_gone = True
        with suppress(OSError):  # of a stream without a file beneath it
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


@contextmanager
def lenient_streams() -> Iterator[None]:
    """Within it, standard output and standard error are lenient."""
    before = sys.stdout, sys.stderr
    streams = LenientStream(before[0]), LenientStream(before[1])
    sys.stdout, sys.stderr = streams  # type: ignore[assignment]
    try:
        yield
    finally:
        for stream in streams:
            stream.settle()
        sys.stdout, sys.stderr = before


def reader_is_gone() -> bool:
    """Whether nobody reads standard output any more."""
    return getattr(sys.stdout, "reader_is_gone", False)
