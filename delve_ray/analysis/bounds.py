"""What a metric of a run's last window can be where layers are sketched, and their share of it is an interval alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from delve_ray.analysis.keys import matching
from delve_ray.analysis.windows import steps_of
from delve_ray.schema import EXTRA_STATS, PHASES, SCALAR_STATS, metric_key

COLUMNS = ("phase", "step", "layer", "features", "final", "sketched", "saturation_low", "saturation_high")
"""What `metric_bounds` needs of the spectra, beside the statistic itself."""
_STATS = (*SCALAR_STATS, *EXTRA_STATS)

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Bounds:
    """A metric lies between `low` and `high`, which are NaN where nothing is known.

    `unresolved` names the sketched layers of which the rows have no value of the statistic.
    """

    low: float
    high: float
    unresolved: tuple[str, ...]


def statistic_of(key: str) -> tuple[str, str] | None:
    """The statistic and the phase of a metric key; None for a key of another kind.

    >>> statistic_of("saturation/eval/mean"), statistic_of("accuracy")
    (('saturation', 'eval'), None)
    """
    stat, _, rest = key.partition("/")
    phase = rest.partition("/")[0]
    return (stat, phase) if stat in _STATS and phase in PHASES else None


def last_window(spectra: pa.Table, phase: str) -> pa.Table:
    """The rows of a phase's last window, final ones before live ones, of one run."""
    rows = spectra.filter(spectra.column("final")) if spectra.num_rows else spectra
    rows = rows if steps_of(rows, phase) else spectra
    steps = steps_of(rows, phase)
    return matching(rows, phase=phase, step=steps[-1]) if steps else rows.slice(0, 0)


def metric_bounds(window: Sequence[Row], key: str) -> Bounds | None:
    """What a metric, a layer's or the mean over layers, can be, from the rows of its window.

    A layer that is not sketched has its value for both ends. One that is has the ends of its interval: of `saturation`
    and `intrinsic_dimensionality`, and of no other statistic, so that there the ends are NaN as soon as one layer is
    unresolved. None for a key that is no metric of such rows, and where no row that it is of is sketched.
    """
    said = statistic_of(key)
    if said is None:
        return None
    stat, phase = said
    of_mean = key == f"{stat}/{phase}/mean"
    rows = [row for row in window if of_mean or metric_key(stat, phase, row["layer"]) == key]
    if not any(row["sketched"] for row in rows):
        return None
    unresolved = tuple(row["layer"] for row in rows if row["sketched"] and row[stat] is None)
    ends = [end for row in rows if (end := _ends(row, stat)) is not None]
    if not ends:
        return Bounds(math.nan, math.nan, unresolved)
    low, high = np.mean(ends, axis=0).tolist()
    return Bounds(low, high, unresolved)


def _ends(row: Row, stat: str) -> tuple[float, float] | None:
    """Both ends of a row's value; None for a row that has no part in a mean."""
    value, interval = row[stat], (row["saturation_low"], row["saturation_high"])
    if row["sketched"] and stat in ("saturation", "intrinsic_dimensionality") and None not in interval:
        scale = row["features"] if stat == "intrinsic_dimensionality" else 1.0
        return interval[0] * scale, interval[1] * scale
    if value is not None and math.isfinite(value):
        return float(value), float(value)
    return (math.nan, math.nan) if row["sketched"] else None
