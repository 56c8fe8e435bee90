"""Integers of a checkpoint as blocks of GGUF: 32 of a row share a scale in float16.

Legend: ``B`` blocks of all rows.

| bits | type | a block |
|---|---|---|
| up to 4 | Q4_0 | a scale, and two codes in a byte with an offset of 8: the first half of the block in the lower bits |
| 5 | Q5_0 | a scale, the highest bits of all codes, and the others as in Q4_0; offset 16 |
| up to 8 | Q8_0 | a scale, and a byte for every code |

The values are those of the checkpoint, unless a scale is not a number of float16.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

BLOCK = 32
Bytes = NDArray[Any]  # of uint8


def block_type(bits: int) -> Any:
    """The type of GGUF that holds codes of so many bits."""
    from gguf import GGMLQuantizationType as Type

    return Type.Q4_0 if bits <= 4 else Type.Q5_0 if bits == 5 else Type.Q8_0


def blocks_of(codes_OI: NDArray[np.int8], scales_OG: NDArray[np.float32], bits: int) -> Bytes:
    """The blocks of a matrix (``O x bytes of a row``). The group of a scale is a multiple of 32 inputs."""
    rows, columns = codes_OI.shape
    repeats = columns // scales_OG.shape[1] // BLOCK
    scales_B1 = scales_OG.repeat(repeats, axis=1).reshape(-1, 1).astype(np.float16).view(np.uint8)
    codes_BK = codes_OI.reshape(-1, BLOCK)
    if bits <= 4:
        body = _nibbles((codes_BK + 8).astype(np.uint8))
    elif bits == 5:
        offset_BK = (codes_BK + 16).astype(np.uint8)
        body = np.concatenate(
            [np.packbits(offset_BK >> 4, axis=1, bitorder="little"), _nibbles(offset_BK & 15)], axis=1
        )
    else:
        body = codes_BK.astype(np.int8).view(np.uint8)
    return np.concatenate([scales_B1, body], axis=1).reshape(rows, -1)


def _nibbles(codes_BK: Bytes) -> Bytes:
    return codes_BK[:, : BLOCK // 2] | (codes_BK[:, BLOCK // 2 :] << 4)
