"""A small network trained on the digits, tracked without Ray: the same to the bit each time, but for the options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import nn

from delve_ray import SaturationTracker


def train_digits(
    savefile: Path | str,
    *,
    run: str = "digits",
    epochs: int = 3,
    width: int = 24,
    metrics: dict[str, float] | None = None,
    **options: Any,
) -> str:
    """Train, evaluate and record some epochs; the savefile. `metrics` gets those of the end."""
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 16
    labels = torch.tensor(digits.target)
    model = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    options = {"save_to": "parquet", "modules": model, "run": run} | options
    with SaturationTracker(str(savefile), **options) as tracker:
        for epoch in range(epochs):
            model.train()
            for batch in torch.arange(512).split(128):
                loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            model.eval()
            with torch.no_grad():
                accuracy = (model(images[512:1024]).argmax(1) == labels[512:1024]).float().mean().item()
            tracker.add_scalar("accuracy", accuracy, step=epoch)
            tracker.add_saturations(step=epoch)
        if metrics is not None:
            metrics |= tracker.metrics(wait=True) | {"accuracy": accuracy}
    return str(savefile)
