"""Integers as compressed-tensors packs them."""

from __future__ import annotations

import re

import pytest
import torch

from svdllm.checkpoint.integers import integer_config, linear_patterns, pack_integers, packed_width
from svdllm.models.low_rank.lowrank import unpacked


def _codes(rows: int, columns: int, bits: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(bits)
    half = 2 ** (bits - 1)
    codes = torch.randint(-half, half, (rows, columns), generator=generator)
    codes[0, :2] = torch.tensor([-half, half - 1])
    return codes.to(torch.int8)


def test_by_hand():
    # 3 bits with an offset of 4: -4 -> 0, 3 -> 7, 0 -> 4; 0 + 7 * 2^3 + 4 * 2^6 = 312
    assert pack_integers(torch.tensor([[-4, 3, 0]], dtype=torch.int8), 3).tolist() == [[312]]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("columns", [32, 48, 64, 7])
def test_unpacking_gives_the_codes_back(bits: int, columns: int):
    codes = _codes(5, columns, bits)
    packed = pack_integers(codes, bits)
    assert packed.shape == (5, packed_width(columns, bits))
    assert packed.dtype == torch.int32
    scales = torch.ones(5, 1)
    assert torch.equal(unpacked(packed, scales, bits, columns, rows_at_once=2), codes.float())


def test_scales_belong_to_groups():
    codes = torch.ones(2, 4, dtype=torch.int8)
    scales = torch.tensor([[1.0, 2.0], [3.0, -4.0]])
    expected = [[1, 1, 2, 2], [3, 3, -4, -4]]
    assert unpacked(pack_integers(codes, 4), scales, 4, 4).tolist() == expected


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_package_packs_alike(bits: int):
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = _codes(6, 96, bits)
    assert torch.equal(pack_integers(codes, bits), helpers.pack_to_int32(codes, bits))


def test_patterns_match_the_names_and_no_others():
    names = ["model.layers.1.mlp.up_proj", "model.layers.11.mlp.up_proj", "lm_head", "model.layers.1.self_attn.o_proj"]
    others = ["model.layers.2.mlp.up_proj", "model.layers.1.mlp.up_proj.svd_u", "lm_head2", "model.layers.11.self_attn"]
    patterns = [pattern.removeprefix("re:") for pattern in linear_patterns(names)]
    matched = [name for name in names + others if any(re.match(pattern, name) for pattern in patterns)]
    assert matched == names


def test_a_config_has_a_group_for_every_scheme():
    config = integer_config({(4, 64): ["a.0.x"], (8, None): ["a.0.y"]})
    schemes = [group["weights"] for group in config["config_groups"].values()]
    assert [(each["num_bits"], each["strategy"], each["group_size"]) for each in schemes] == [
        (4, "group", 64),
        (8, "channel", None),
    ]
    quantization = pytest.importorskip("compressed_tensors.quantization")
    assert quantization.QuantizationConfig.model_validate(config).config_groups["group_1"].weights.num_bits == 8
