"""Few bits as ``compressed-tensors`` packs them (format ``pack-quantized``): the tensors, and what config.json says.

transformers and vLLM read it. Codes lie one after the other, without gaps, in 32-bit integers; each is stored with an
offset of ``2^(bits - 1)``. A scale belongs to a group of inputs of a row; there is no zero point.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

WORD = 32  # bits
CODES_OF_A_SPAN = 32  # so many codes fill whole words, whatever their bits
QUANT_METHOD = "compressed-tensors"
FORMAT = "pack-quantized"


def packed_width(columns: int, bits: int) -> int:
    """The number of 32-bit integers that the codes of a row fill."""
    return -(-columns * bits // WORD)


def pack_integers(codes_OI: Tensor, bits: int) -> Tensor:
    """Packs codes from ``-2^(bits - 1)`` to ``2^(bits - 1) - 1`` into 32-bit integers (``O x packed_width``)."""
    rows, columns = codes_OI.shape
    missing = -columns % CODES_OF_A_SPAN
    values = torch.nn.functional.pad(codes_OI.to(torch.int64) + 2 ** (bits - 1), (0, missing))
    values = values.view(rows, -1, CODES_OF_A_SPAN)
    words = values.new_zeros(rows, values.shape[1], bits + 1)
    for place in range(CODES_OF_A_SPAN):
        word, offset = divmod(place * bits, WORD)
        shifted = values[..., place] << offset
        words[..., word] |= shifted & (2**WORD - 1)
        words[..., word + 1] |= shifted >> WORD
    packed = words[..., :bits].reshape(rows, -1)[:, : packed_width(columns, bits)]
    return torch.where(packed >= 2 ** (WORD - 1), packed - 2**WORD, packed).to(torch.int32)


def integer_config(groups: Mapping[tuple[int, int | None], Sequence[str]]) -> dict[str, Any]:
    """The ``quantization_config`` of a model: (bits, group size, or None for a row) -> the linears stored so."""
    return {
        "quant_method": QUANT_METHOD,
        "format": FORMAT,
        "quantization_status": "compressed",
        "ignore": [],
        "config_groups": {
            f"group_{number}": {
                "targets": linear_patterns(names),
                "format": FORMAT,
                "weights": {
                    "num_bits": bits,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "channel" if group_size is None else "group",
                    "group_size": group_size,
                },
            }
            for number, ((bits, group_size), names) in enumerate(groups.items())
        },
    }


def linear_patterns(names: Sequence[str]) -> list[str]:
    """Regular expressions, each marked by ``re:``, that match exactly these names; one for those of equal place."""
    numbers: dict[tuple[str, str], list[str]] = {}
    plain: list[str] = []
    for name in names:
        parts = re.split(r"(?<=\.)(\d+)(?=\.)", name, maxsplit=1)
        if len(parts) == 3:
            numbers.setdefault((parts[0], parts[2]), []).append(parts[1])
        else:
            plain.append(f"re:{re.escape(name)}$")
    kinds = [f"re:{re.escape(head)}({'|'.join(at)}){re.escape(tail)}$" for (head, tail), at in numbers.items()]
    return plain + kinds
