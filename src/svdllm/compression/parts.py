"""Parts of a block whose statistics fit into memory at once: the block is run once for each."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from svdllm.models.structure import Target

# Statistics and bases of one part; a single expert, or a single input, may need more. A block without experts is run
# again for less work per weight, so it is divided at larger sizes (from widths of 70B on).
PART_BYTES = 4 * 2**30
PART_BYTES_WITHOUT_EXPERTS = 12 * 2**30


@dataclass(frozen=True, kw_only=True)
class Part:
    """Some targets of a block.

    Args:
        number: of the part; None for the last one, whose run carries the hidden states on.
        grouped: targets of all parts whose inputs are added up by pool in this run; none but in the first part.
        groups: pool -> the sum over its members, for all parts of the block.
    """

    targets: list[Target]
    number: int | None = None
    grouped: Sequence[Target] = ()
    groups: dict[str, Any] = field(default_factory=dict)

    @property
    def is_last(self) -> bool:
        return self.number is None


def statistics_bytes(target: Target, depth: int, *, pulled_back: bool = False) -> int:
    """Bytes of the Grams of a target's inputs and outputs, and of its basis and narrowing."""
    narrowing = 0 if target.inner is None else 4 * target.inner.width**2
    lefts = len(target.linears) * target.in_features**2 if pulled_back else target.out_features**2
    return 8 * target.in_features**2 + 12 * lefts + 4 * target.out_features * depth + narrowing


def parts_of(
    targets: Sequence[Target], depths: Mapping[str, int], pulled_back: Container[str] = (), *, mixture: bool = True
) -> list[Part]:
    """Divides the targets of a block: as many as fit at a time, everything but experts first.

    An expert is not divided, nor are targets that read the same tensor.

    Args:
        depths: target -> directions of its basis that are kept.
        pulled_back: names of targets whose gradients are added up after their weights.
        mixture: whether the model is a mixture of experts; blocks of other models are divided at larger sizes.
    """
    limit = PART_BYTES if mixture else PART_BYTES_WITHOUT_EXPERTS
    units: dict[str, list[Target]] = {}
    for target in sorted(targets, key=lambda target: target.pool is not None):
        units.setdefault(target.expert or target.group, []).append(target)
    chunks: list[list[Target]] = [[]]
    size = 0
    for members in units.values():
        needed = sum(
            statistics_bytes(target, depths[target.name], pulled_back=target.name in pulled_back) for target in members
        )
        if chunks[-1] and size + needed > limit:
            chunks.append([])
            size = 0
        chunks[-1] += members
        size += needed
    groups: dict[str, Any] = {}
    grouped = [target for target in targets if target.pool is not None] if len(chunks) > 1 else []
    return [
        Part(
            targets=chunk,
            number=None if number == len(chunks) - 1 else number,
            grouped=() if number else grouped,
            groups=groups,
        )
        for number, chunk in enumerate(chunks)
    ]
