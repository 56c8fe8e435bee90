"""Options of a run that decide no numbers: how to reach the hub, and whom to report to."""

from __future__ import annotations

from dataclasses import dataclass, field

from svdllm.common.progress import Reporter


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Options of a run that decide no numbers.

    Public functions take them as the keywords ``offline``, ``revision`` and ``reporter``, and pass this object on.

    Args:
        offline: never ask the hub; its local cache is used.
        revision: branch, tag or commit of a hub id.
        reporter: receives stages, progress and warnings; silent by default.
    """

    offline: bool = False
    revision: str | None = None
    reporter: Reporter = field(default_factory=Reporter)

    @classmethod
    def of(cls, *, offline: bool = False, revision: str | None = None, reporter: Reporter | None = None) -> RunOptions:
        """The options that a public function was given; no ``reporter`` means a silent one."""
        return cls(offline=offline, revision=revision, reporter=reporter or Reporter())
