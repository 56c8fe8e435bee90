"""Texts of flags as values: amounts, ratios, overrides."""

from __future__ import annotations

import pytest

from svdllm.cli.readers import read_bytes, read_names, read_numbers, read_overrides, read_parameters, read_ratios
from svdllm.common.errors import InputError


@pytest.mark.parametrize(
    ("text", "amount"),
    [
        ("300MB", 300_000_000),
        ("300 mb", 300_000_000),
        ("2GiB", 2 * 2**30),
        ("1.5GB", 1_500_000_000),
        ("8.2GB", 8_200_000_000),  # 8.2 * 1e9 is 8199999999.999999 in floats
        ("512KiB", 512 * 1024),
        (".5KB", 500),
        ("123456", 123_456),
        ("7B", 7),
        ("1TB", 10**12),
        ("2TiB", 2 * 2**40),
        ("3MiB", 3 * 2**20),
    ],
)
def test_amounts_of_bytes(text: str, amount: int):
    assert read_bytes(text, "--target-size") == amount


@pytest.mark.parametrize(
    ("text", "amount"),
    [
        ("1.5B", 1_500_000_000),
        ("100M", 100_000_000),
        ("100m", 100_000_000),
        ("4.35K", 4350),
        ("12", 12),
        (" 8 B ", 8 * 10**9),
    ],
)
def test_amounts_of_parameters(text: str, amount: int):
    assert read_parameters(text, "--target-params") == amount


@pytest.mark.parametrize(
    "text", ["", "MB", "many", "-5MB", "0", "0.0GB", "1e3", "5PB", "3M", "1.2.3GB", "0.4", "nan", "12,5MB"]
)
def test_nonsense_is_no_amount_of_bytes(text: str):
    with pytest.raises(
        InputError, match=rf"--target-size '{text}' is not an amount above zero; write it like 300MB, 1.5GB"
    ):
        read_bytes(text, "--target-size")


@pytest.mark.parametrize("text", ["100MB", "2GiB", "1.5T", "0M", "0.9"])
def test_nonsense_is_no_amount_of_parameters(text: str):
    with pytest.raises(InputError, match=r"is not an amount above zero; write it like 100M or 1\.5B"):
        read_parameters(text, "--target-params")


def test_ratios():
    assert read_ratios("0.2", "--ratio") == 0.2
    assert read_ratios("0.2, 0.4", "--ratio") == (0.2, 0.4)


def test_names_and_numbers():
    assert read_names(" a, b,") == ("a", "b")
    assert read_numbers("1,8,32", "--batch") == (1, 8, 32)
    with pytest.raises(InputError, match=r"--batch '1,x' is not a list of numbers; write it like 1,8,32"):
        read_numbers("1,x", "--batch")


def test_overrides():
    assert read_overrides(["a=b=0.1", "c=0"], "--override") == {"a=b": 0.1, "c": 0.0}
    with pytest.raises(InputError, match=r"--override names a twice"):
        read_overrides(["a=0.1", "a=0.2"], "--override")
    with pytest.raises(InputError, match=r"--override a '1' is not a ratio: expected a number from 0 and below 1"):
        read_overrides(["a=1"], "--override")
