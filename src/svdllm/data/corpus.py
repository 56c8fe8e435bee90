"""The text that every Python installation carries: the language reference behind ``help()``."""

from __future__ import annotations

EVALUATION_STRIDE = 5


def python_docs(*, evaluation: bool) -> list[str]:
    """The topics of the interpreter's own ``pydoc_data.topics``, in sorted order of their names.

    Every fifth topic (index 4, 9, ...) belongs to evaluation and the rest to calibration, so the two never share a
    topic. The text differs between Python versions: the fingerprint of the windows tells them apart.
    """
    from pydoc_data.topics import topics

    return [
        topics[name]
        for index, name in enumerate(sorted(topics))
        if (index % EVALUATION_STRIDE == EVALUATION_STRIDE - 1) == evaluation
    ]
