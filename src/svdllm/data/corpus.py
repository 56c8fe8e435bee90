"""Reads the text that every Python installation has: the language reference behind ``help()``."""

from __future__ import annotations

EVALUATION_STRIDE = 5


def python_docs(*, evaluation: bool) -> list[str]:
    """The topics of the interpreter's ``pydoc_data.topics``, sorted by name.

    Every fifth topic (index 4, 9, ...) belongs to evaluation and the rest to calibration, so that they never
    share a topic. The text differs between Python versions, and so does the fingerprint of the windows.
    """
    from pydoc_data.topics import topics

    return [
        topics[name]
        for index, name in enumerate(sorted(topics))
        if (index % EVALUATION_STRIDE == EVALUATION_STRIDE - 1) == evaluation
    ]
