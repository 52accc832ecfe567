"""The published row: what one layer did in one window, and its Arrow schemas on disk.

One `LayerRow` is one row of `spectra/*.parquet`. The schemas are the contract with everybody who reads
the files later, so they live here, apart from the code that computes rows and the code that writes them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

import numpy as np
import numpy.typing as npt
import pyarrow as pa

F64 = npt.NDArray[np.float64]

SCHEMA_VERSION = 1
"""Raised when a column changes its meaning; readers refuse a newer one by name. A new column does not raise it: it is
null for the rows of files that were written without it, and readers of before leave it alone."""
VERSION_KEY = b"delve_ray.schema_version"
SHARDS_KEY = b"delve_ray.shards"
"""In the metadata of spectra that shards have published: JSON of [shard, workers, complete] for each."""

PHASES = ("train", "eval")

ALWAYS = ("saturation", "intrinsic_dimensionality")
"""Statistics that every row carries, asked for or not."""
SCALAR_STATS = (
    "saturation",
    "intrinsic_dimensionality",
    "trace",
    "diagonal_trace",
    "determinant",
    "log_determinant",
    "effective_rank",
    "participation_ratio",
    "stable_rank",
    "spectral_entropy",
    "condition_number",
    "alpha",
    "noise_rank",
)
"""Long names of the scalar statistics of Q's own spectrum: Parquet columns and the first part of metric keys."""
EXTRA_STATS = (
    "correlation_saturation",
    "correlation_intrinsic_dimensionality",
    "correlation_effective_rank",
    "rankme",
)
"""Further ones, each from the decomposition of another matrix: computed only where they are asked for by name."""
INTERVAL = ("saturation_low", "saturation_high")
"""What a sketched layer has beside its saturation, or in place of it: also the first part of metric keys."""
INTEGER_STATS = frozenset({"intrinsic_dimensionality", "correlation_intrinsic_dimensionality"})


@dataclass(frozen=True, slots=True)
class LayerRow:
    """One layer in one window of one phase.

    `stats` maps the long names in `SCALAR_STATS` and `EXTRA_STATS` to values; a statistic that was not asked for, or
    is not defined for this spectrum, is absent and becomes null on disk. `eigenvalues` is float64, descending.
    `covariance` is the packed upper triangle (row-major, float64, d(d+1)/2) or None when not asked for.
    `embedding` is float64 (k, 2): k of the rows in the coordinates of the two leading eigenvectors, or None.
    `thresholds` holds all δ where the run has several, `threshold` being the first of them, and
    `intrinsic_dimensionalities` the k(δ) of each; both are empty where there is only one.

    Of a layer that is `sketched`, `eigenvalues` has the head of the spectrum alone, each a lower bound; no eigenvalue
    is more than `unseen_variance`, the variance that the head lacks, above it. The saturation lies between
    `saturation_low` and `saturation_high`; it, and k(δ), are in `stats` as their upper ends where the head explains the
    share δ. Where there are several δ, the k(δ) are upper ends. These three are None for other layers.
    """

    layer: str
    layer_type: str
    phase: str
    features: int
    samples: int
    nonfinite_rows: int
    threshold: float
    stats: Mapping[str, float]
    eigenvalues: F64
    mean: F64
    covariance: F64 | None = None
    embedding: F64 | None = None
    alpha_r2: float | None = None
    alpha_from: int | None = None
    alpha_to: int | None = None
    thresholds: Sequence[float] = ()
    intrinsic_dimensionalities: Sequence[int] = ()
    sketched: bool = False
    saturation_low: float | None = None
    saturation_high: float | None = None
    unseen_variance: float | None = None

    @property
    def mean_norm(self) -> float:
        """Euclidean norm of the mean row."""
        return float(np.linalg.norm(self.mean))

    @property
    def samples_per_feature(self) -> float | None:
        """n/d, the observations there are for each feature; None without features."""
        return samples_per_feature(self.samples, self.features)

    @property
    def undersampled(self) -> bool:
        """Whether n < d, so that n/d is below 1.

        n observations span at most n - 1 directions about their mean. With n < d the covariance lacks rank whatever
        the layer does, and a statistic of rank says more about n than about the layer.
        """
        return self.samples < self.features


def samples_per_feature(samples: int, features: int) -> float | None:
    """Return n/d; None without features.

    >>> samples_per_feature(100, 40)
    2.5
    """
    return samples / features if features else None


@dataclass(frozen=True, slots=True)
class PublishedWindow:
    """All rows of one window at one revision, as handed to every writer.

    `window` is the ordinal of the window within its attempt, `step` its label. `revision` rises with each
    publication of the same window (live rows first, then the final ones, then corrections).
    """

    run: str
    attempt: int
    window: int
    step: int
    revision: int
    final: bool
    workers: int
    world_size: int
    wall_time: datetime
    rows: Sequence[LayerRow] = field(default=())
    trial: str | None = None
    trial_config: str | None = None
    complete: bool = False
    """Whether every rank has closed it, so that no correction is to be expected."""
    shards: Mapping[int, tuple[int, bool]] = field(default_factory=dict)
    """Of one whose rows come from several shards, `workers` and `complete` of each shard's part."""


def _versioned(fields: Sequence[pa.Field]) -> pa.Schema:
    return pa.schema(list(fields), metadata={VERSION_KEY: str(SCHEMA_VERSION).encode()})


def _stat_field(name: str) -> pa.Field:
    return pa.field(name, pa.int32() if name in INTEGER_STATS else pa.float64())


_WINDOW_FIELDS = (
    pa.field("run", pa.string()),
    pa.field("trial", pa.string()),
    pa.field("attempt", pa.int32()),
    pa.field("phase", pa.string()),
    pa.field("step", pa.int64()),
    pa.field("layer", pa.string()),
    pa.field("layer_type", pa.string()),
    pa.field("features", pa.int32()),
    pa.field("samples", pa.int64()),
    pa.field("nonfinite_rows", pa.int64()),
    pa.field("workers", pa.int32()),
    pa.field("world_size", pa.int32()),
    pa.field("revision", pa.int32()),
    pa.field("final", pa.bool_()),
)

SPECTRA_SCHEMA = _versioned(
    [
        *_WINDOW_FIELDS,
        pa.field("samples_per_feature", pa.float64()),
        pa.field("undersampled", pa.bool_()),
        pa.field("threshold", pa.float64()),
        *(_stat_field(name) for name in (*SCALAR_STATS, *EXTRA_STATS)),
        pa.field("alpha_r2", pa.float64()),
        pa.field("alpha_from", pa.int32()),
        pa.field("alpha_to", pa.int32()),
        pa.field("thresholds", pa.list_(pa.float64())),
        pa.field("intrinsic_dimensionalities", pa.list_(pa.int32())),
        pa.field("eigenvalues", pa.list_(pa.float64())),
        pa.field("mean_norm", pa.float64()),
        pa.field("sketched", pa.bool_()),
        pa.field("saturation_low", pa.float64()),
        pa.field("saturation_high", pa.float64()),
        pa.field("unseen_variance", pa.float64()),
        pa.field("trial_config", pa.string()),
        pa.field("wall_time", pa.timestamp("us", tz="UTC")),
    ]
)
"""spectra/*.parquet: one row per (run, attempt, phase, step, layer) and revision."""

COVARIANCES_SCHEMA = _versioned(
    [
        *_WINDOW_FIELDS,
        pa.field("mean", pa.list_(pa.float64())),
        pa.field("covariance", pa.list_(pa.float64())),
        pa.field("wall_time", pa.timestamp("us", tz="UTC")),
    ]
)
"""covariances/*.parquet: the packed upper triangle of the population covariance, row-major."""

EMBEDDINGS_SCHEMA = _versioned(
    [
        *_WINDOW_FIELDS,
        pa.field("point", pa.int32()),
        pa.field("x", pa.float64()),
        pa.field("y", pa.float64()),
        pa.field("wall_time", pa.timestamp("us", tz="UTC")),
    ]
)
"""embeddings/*.parquet: one row per sampled observation, by its number in the layer and window; `x` and `y` are its
coordinates along the two leading eigenvectors, from the mean."""

SCALARS_SCHEMA = _versioned(
    [
        pa.field("run", pa.string()),
        pa.field("trial", pa.string()),
        pa.field("attempt", pa.int32()),
        pa.field("rank", pa.int32()),
        pa.field("name", pa.string()),
        pa.field("step", pa.int64()),
        pa.field("value", pa.float64()),
        pa.field("wall_time", pa.timestamp("us", tz="UTC")),
    ]
)
"""scalars/*.parquet: what `SaturationTracker.add_scalar` recorded."""


def metric_key(stat: str, phase: str, layer: str) -> str:
    """The metric key `<stat>/<phase>/<layer>`.

    A layer called "mean" is written `layer:mean`: `<stat>/<phase>/mean` is the mean over layers.

    >>> metric_key("saturation", "train", "conv1"), metric_key("trace", "eval", "mean")
    ('saturation/train/conv1', 'trace/eval/layer:mean')
    """
    return f"{stat}/{phase}/{'layer:mean' if layer == 'mean' else layer}"


def window_metrics(rows: Sequence[LayerRow]) -> dict[str, float]:
    """Metric keys and values of rows: one key per statistic and layer, and the mean over layers.

    The mean is unweighted over the layers whose value is finite; without any it is left out. Where layers are sketched,
    there are the keys of `interval_metrics` as well.
    """
    metrics: dict[str, float] = {}
    finite: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        for stat, value in row.stats.items():
            metrics[metric_key(stat, row.phase, row.layer)] = value
            if np.isfinite(value):
                finite.setdefault((stat, row.phase), []).append(value)
    for (stat, phase), values in finite.items():
        metrics[f"{stat}/{phase}/mean"] = float(np.mean(values))
    for phase in dict.fromkeys(row.phase for row in rows):
        own = [row for row in rows if row.phase == phase]
        metrics |= interval_metrics(
            phase, [(row.layer, row.stats.get("saturation"), row.saturation_low, row.saturation_high) for row in own]
        )
    return metrics


def interval_metrics(
    phase: str, layers: Iterable[tuple[str, float | None, float | None, float | None]]
) -> dict[str, float]:
    """Metric keys and values of the ends of saturations, for layers as (name, saturation, low, high).

    Each sketched layer has `saturation_low` and `saturation_high`. Their means are over all layers, of which those that
    are not sketched have the saturation for both ends: the mean over all layers lies between them, whether or not
    `saturation/<phase>/mean` could take in all. Nothing where no layer is sketched.

    >>> found = interval_metrics("eval", [("a", 0.5, None, None), ("b", None, 0.1, 0.7)])
    >>> found["saturation_high/eval/b"], found["saturation_low/eval/mean"], found["saturation_high/eval/mean"]
    (0.7, 0.3, 0.6)
    """
    layers = list(layers)
    intervals = {layer: (low, high) for layer, _, low, high in layers if low is not None and high is not None}
    metrics: dict[str, float] = {}
    for place, stat in enumerate(INTERVAL if intervals else ()):
        ends: list[float] = []
        for layer, saturation, *_ in layers:
            if layer in intervals:
                ends.append(intervals[layer][place])
                metrics[metric_key(stat, phase, layer)] = ends[-1]
            elif saturation is not None and math.isfinite(saturation):
                ends.append(saturation)
        metrics[f"{stat}/{phase}/mean"] = float(np.mean(ends))
    return metrics
