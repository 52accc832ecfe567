"""Both trackers, attached the same way: record every batch, on the CPU, nothing published before it is asked for."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from delve_ray import SaturationTracker

DELVE_SCALARS = ("lsat", "idim", "trc", "dtrc", "det")
"""Every scalar that delve computes."""


def attach_ours(
    model: nn.Module, folder: Path, stats: Sequence[str], *, nosave: bool = False, **options: Any
) -> SaturationTracker:
    """Our tracker: without Ray, so its store is in this process and its threads compete for the same cores."""
    save_to = None if nosave else "parquet"
    return SaturationTracker(
        folder / "ours", save_to, model, stats=list(stats), publish_every=0, nosave=nosave, **options
    )


def attach_delve(model: nn.Module, folder: Path, stats: Sequence[str], device: str = "cpu") -> Any:
    """Delve's tracker, with its CSV writer. Raises ImportError without delve."""
    import delve

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return delve.SaturationTracker(
            str(folder / "delve"), "csv", model, stats=list(stats), timeseries_method="timestepwise", device=device
        )


def check_same_layers(ours: SaturationTracker, theirs: Any) -> None:
    """Raises RuntimeError unless both record the same layers: times of different work say nothing."""
    found = sorted(name.replace("-", ".") for name in theirs.layers)
    if found != sorted(ours.layers):
        raise RuntimeError(f"delve records {found}, delve_ray {sorted(ours.layers)}")
