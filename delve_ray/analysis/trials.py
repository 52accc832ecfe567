"""The trials of a sweep from their files alone: what each was, and the metrics of its last windows."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from delve_ray.analysis.bounds import COLUMNS as BOUNDS
from delve_ray.analysis.bounds import last_window
from delve_ray.analysis.keys import matching
from delve_ray.analysis.ranking import TrialResult
from delve_ray.analysis.reading import read_scalars, read_spectra
from delve_ray.analysis.windows import distinct
from delve_ray.errors import ReadError
from delve_ray.schema import EXTRA_STATS, INTERVAL, PHASES, SCALAR_STATS, interval_metrics, metric_key
from delve_ray.storage import Storage
from delve_ray.store.run_file import read_run

_STATS = (*SCALAR_STATS, *EXTRA_STATS)
_COLUMNS = ["run", "trial", "trial_config", *BOUNDS, *_STATS]


def read_trials(run: Storage, keys: Sequence[str] = ()) -> list[TrialResult]:
    """A run's directory as trials for `rank_trials`; one, unless several runs lie in it.

    The metrics are `<stat>/<phase>/mean` of the last window of each phase, final ones before live ones, where layers
    are sketched also `saturation_low/<phase>/mean` and `saturation_high/<phase>/mean`, those of single layers that
    `keys` name, and the last value of each scalar that `add_scalar` has recorded, its mean over ranks. A key that is
    both is the scalar. The name is the trial's id, or the run's where it is no trial. Raises ReadError.
    """
    described = _described(run)
    options = described.get("options")
    options = options if isinstance(options, Mapping) else {}
    spectra, scalars = read_spectra(run, _COLUMNS), read_scalars(run, ["run", "name", "step", "value"])
    names = distinct(spectra.column("run")) or [str(described.get("run", run.uri))]
    trials = []
    for name in names:
        own = matching(spectra, run=name)
        last = own.slice(max(own.num_rows - 1, 0)).to_pylist()
        row = last[0] if last else options
        trials.append(
            TrialResult(
                trial=str(row.get("trial") or name),
                config=_config(row.get("trial_config")),
                metrics=_spectra_metrics(own, keys) | _scalar_metrics(matching(scalars, run=name)),
                path=run,
                run=name,
            )
        )
    return trials


def _described(run: Storage) -> Mapping[str, Any]:
    """What run.json says; nothing where it is not there or damaged, since the rows say most of it."""
    try:
        return read_run(run)
    except ReadError:
        return {}


def _config(text: object) -> Mapping[str, Any]:
    """A trial's config; nothing where it is none."""
    try:
        config = json.loads(str(text)) if text else {}
    except ValueError:
        return {}
    return config if isinstance(config, Mapping) else {}


def _spectra_metrics(spectra: pa.Table, keys: Sequence[str]) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for phase in PHASES:
        window = last_window(spectra, phase)
        layers = window.column("layer").to_pylist()
        for stat in _STATS:
            values = dict(zip(layers, window.column(stat).to_pylist(), strict=True))
            finite = [value for value in values.values() if value is not None and math.isfinite(value)]
            if finite:
                metrics[f"{stat}/{phase}/mean"] = sum(finite) / len(finite)
            of_layers = {metric_key(stat, phase, layer): value for layer, value in values.items()}
            metrics |= {key: of_layers[key] for key in keys if of_layers.get(key) is not None}
        saturations = [window.column(name).to_pylist() for name in ("saturation", *INTERVAL)]
        intervals = interval_metrics(phase, zip(layers, *saturations, strict=True))
        wanted = {*keys, *(f"{stat}/{phase}/mean" for stat in INTERVAL)}
        metrics |= {key: value for key, value in intervals.items() if key in wanted}
    return metrics


def _scalar_metrics(scalars: pa.Table) -> dict[str, float]:
    last: dict[str, tuple[int, list[float]]] = {}
    for row in scalars.to_pylist():  # by name and step
        step, values = last.get(row["name"], (row["step"], []))
        last[row["name"]] = (row["step"], [row["value"]] if row["step"] != step else [*values, row["value"]])
    return {name: sum(values) / len(values) for name, (_, values) in last.items()}
