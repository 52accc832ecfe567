"""The digits, a small network for them, and what its layers put out, gathered beside the tracker."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from tests.helpers import dimensionality, two_pass_covariance

DIGITS = load_digits()
IMAGES = torch.tensor(DIGITS.images / 16, dtype=torch.float32)[:, None]
LABELS = torch.tensor(DIGITS.target)
Bounds = dict[tuple[str, str], tuple[float, float]]
"""Lowest and highest saturation by phase and layer."""


def cnn() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(216, 24), nn.ReLU(), nn.Linear(24, 10))


class Rows:
    """What layers put out, by phase and name of the layer, gathered by hooks of its own until it is asked for."""

    def __init__(self, layers: dict[str, nn.Module], most: int | None = None) -> None:
        self.most, self.rows = most, dict[tuple[str, str], list[Tensor]]()
        for name, layer in layers.items():
            layer.register_forward_hook(lambda layer, _, output, name=name: self.keep(layer, output, name))

    def keep(self, layer: nn.Module, output: Any, name: str) -> None:
        rows = (output[0] if isinstance(output, tuple) else output).detach().double()
        rows = (rows.movedim(1, -1) if rows.dim() == 4 else rows).flatten(0, -2)
        self.rows.setdefault(("train" if layer.training else "eval", name), []).append(rows)

    def take(self) -> Bounds:
        """Bounds of each saturation: its definition for thresholds a little below and above 0.99."""
        kept, self.rows = self.rows, {}
        found: Bounds = {}
        for key, rows in kept.items():
            covariance = two_pass_covariance(torch.cat(rows)[: self.most])
            values = np.linalg.eigvalsh(covariance)[::-1].clip(0)
            low, high = (dimensionality(values, share) / values.size for share in (0.99 - 1e-5, 0.99 + 1e-5))
            found[key] = low, high
        return found


def check_saturations(frame: pd.DataFrame, windows: dict[int, Bounds]) -> None:
    """Whether a table has the rows of these windows and no others, each with its saturation."""
    wanted = {(step, *key): bounds for step, window in windows.items() for key, bounds in window.items()}
    frame["layer"] = frame["layer"].astype(str)
    found = frame.set_index(["step", "phase", "layer"])["saturation"].to_dict()
    assert found.keys() == wanted.keys()
    for key, (low, high) in wanted.items():
        assert low - 1e-12 <= found[key] <= high + 1e-12, key
    assert found, "there is something to compare"
