"""Reads the spectra of an analysis, thinned out for plots (the paper's Figure 6)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

POINTS = 48  # of each spectrum, evenly spaced on a logarithmic axis


def read_spectra(analysis: Path) -> dict[str, Any]:
    """The singular values of every ``L W S`` (``W`` in the metrics of the method), by linear.

    Returns ``{linear: {"positions": [1-based], "singular_values": [...]}}``, both descending in the spectrum's order.
    """
    spectra = {}
    for block in sorted(analysis.glob("block-*.safetensors")):
        with safe_open(block, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                name, leaf = key.rsplit(".", 1)
                if leaf == "energies":
                    spectra[name] = _thinned(file.get_tensor(key))
    return spectra


def _thinned(energies_K: torch.Tensor) -> dict[str, list[float]]:
    count = len(energies_K)
    positions = sorted({round(count ** (step / (POINTS - 1))) for step in range(POINTS)})
    values = energies_K.double().clamp_min(0).sqrt()
    return {"positions": positions, "singular_values": [float(f"{values[p - 1]:.4g}") for p in positions]}
