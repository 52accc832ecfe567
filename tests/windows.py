"""Rows, windows and runs as the store publishes them, small and with values that tell them apart."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np

from delve_ray.analysis import read_spectra
from delve_ray.nystrom import Head, head_statistics
from delve_ray.schema import LayerRow, PublishedWindow
from delve_ray.storage import Storage
from delve_ray.writers.base import Scalar
from delve_ray.writers.parquet import ParquetWriter

START = datetime(2024, 5, 6, 7, 8, 9, 123456, tzinfo=UTC)
COVARIANCE = np.array([1.0, 0.5, 0.25, 2.0, -0.5, 3.0])
HOSTILE_NAMES = ("../x", "<b>", "mean", "größe/层", "two words", "a/b", "/root", "a\nb", "%2e", "")


def layer_row(layer: str = "conv1", phase: str = "train", **changes: Any) -> LayerRow:
    values: dict[str, Any] = {
        "layer": layer,
        "layer_type": "Linear",
        "phase": phase,
        "features": 3,
        "samples": 100,
        "nonfinite_rows": 2,
        "threshold": 0.99,
        "stats": {"saturation": 2 / 3, "intrinsic_dimensionality": 2.0, "trace": 6.5},
        "eigenvalues": np.array([4.0, 2.5, 0.0]),
        "mean": np.array([3.0, 0.0, 4.0]),
    }
    return LayerRow(**(values | changes))


HEAD = np.array([6.0, 2.0, 1.0])


def sketched_row(layer: str, unseen: float, phase: str = "train", threshold: float = 0.95, **changes: Any) -> LayerRow:
    """A row of a sketched layer of 40 features as the store publishes one: the head 6, 2, 1, and a variance that it
    lacks. At 0.95 of 9.0625 k is 3; of 18 it is 3 to 37, as 8.1 are wanted of 9 that 37 others may have evenly.
    """
    features = changes.get("features", 40)
    known = head_statistics(Head(HEAD, 9.0 + unseen, unseen, features), features, threshold)
    values: dict[str, Any] = {
        "features": features,
        "samples": 5000,
        "threshold": threshold,
        "stats": known.values,
        "eigenvalues": HEAD,
        "mean": np.zeros(features),
        "sketched": True,
        "saturation_low": known.saturation_low,
        "saturation_high": known.saturation_high,
        "unseen_variance": unseen,
    }
    return layer_row(layer, phase, **(values | changes))


def window(rows: Sequence[LayerRow] = (), **changes: Any) -> PublishedWindow:
    values: dict[str, Any] = {
        "run": "run",
        "attempt": 0,
        "window": 0,
        "step": 0,
        "revision": 0,
        "final": True,
        "workers": 4,
        "world_size": 4,
        "wall_time": START,
        "rows": tuple(rows),
    }
    return PublishedWindow(**(values | changes))


def scalar(name: str = "loss", value: float = 1.5, **changes: Any) -> Scalar:
    values: dict[str, Any] = {"run": "run", "attempt": 0, "rank": 0, "step": 0, "wall_time": START}
    return Scalar(name=name, value=value, **(values | changes))


def later(seconds: float) -> datetime:
    return START + timedelta(seconds=seconds)


def publish(path, layers=("a", "b"), *, value=0.5, phases=("train",), covariance=False, **changes):
    """Write one window by a writer of its own, of which older revisions stay."""
    rows = [
        layer_row(name, phase, stats={"saturation": value}, covariance=COVARIANCE * value if covariance else None)
        for phase in phases
        for name in layers
    ]
    changes.setdefault("window", changes.get("step", 0))
    writer = ParquetWriter(Storage(path))
    writer._revisions = {}  # as if it had been killed before it could delete them
    writer.write(window(rows, **changes))


def found(path, *columns, read=read_spectra, **options):
    """The rows that a reader gives, as tuples."""
    table = read(path, columns=columns or ("step", "layer", "saturation"), **options)
    return [tuple(row.values()) for row in table.to_pylist()]
