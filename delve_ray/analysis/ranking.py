"""Ranking the trials of a sweep: of those that are about as accurate as the best, who uses its width best."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from delve_ray.analysis.bounds import COLUMNS as BOUNDS
from delve_ray.analysis.bounds import Bounds, last_window, metric_bounds, statistic_of
from delve_ray.analysis.keys import matching
from delve_ray.analysis.reading import read_spectra
from delve_ray.analysis.run_files import find_runs
from delve_ray.configs import flatten
from delve_ray.errors import OptionError, ReadError
from delve_ray.storage import Storage
from delve_ray.store.run_file import read_run

MOST_WASTEFUL = 3
"""Layers that are named of each trial."""

WASTED = pa.list_(
    pa.struct(
        [
            ("layer", pa.string()),
            ("features", pa.int32()),
            ("intrinsic_dimensionality", pa.int32()),
            ("saturation", pa.float64()),
            ("sketched", pa.bool_()),
        ]
    )
)
"""Type of the column `wasted`: layers with the most features that the variance does not need, most first; of those that
are sketched, dimension and saturation are the most that they can be."""


@dataclass(frozen=True, slots=True)
class TrialResult:
    """What a sweep says of one trial: its config, the metrics it reported last, and where its run's files are."""

    trial: str
    config: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    path: str | Storage | None = None
    failed: bool = False
    run: str | None = None
    """The run among those in its files; by default all of them are the trial's."""


def rank_trials(
    trials: Iterable[TrialResult],
    by: str = "saturation/eval/mean",
    accuracy: str = "accuracy",
    within: float = 0.01,
    *,
    mode: str = "max",
    by_mode: str = "max",
) -> pa.Table:
    """Trials, best first: those whose `accuracy` is within `within` of the best, by `by`; then the others, by accuracy.

    A layer that is sketched may have an interval of the saturation and no value. Then `by` is an interval as well, and
    such a trial takes the place of the end that is certain: the lower one, with by_mode="min" the upper one, also where
    it has reported no value at all. That holds where `by` is a metric of `saturation` or `intrinsic_dimensionality`;
    the ends are those of the last window in the trial's files.

    Args:
        trials: The trials of one sweep. Those that failed, and those without one of the two metrics, are left out.
        by: Key of the metric that orders the contenders; of two alike, the one with fewer parameters is better.
        accuracy: Key of the metric that makes a contender.
        within: How far from the best a contender may be, in the units of `accuracy`.
        mode: "max", or "min" where `accuracy` is a loss.
        by_mode: "max", or "min" where less of `by` is better.

    Returns:
        One row per trial: `place` int32, `trial`, `contender` bool, the metric (null where it has no value) and the
        accuracy under their keys, `by_low` and `by_high`, between which the metric is, for the mean that over all
        layers (null where that is not known; the value where no layer is sketched), `unresolved`, the sketched layers
        of which there is no value, `num_parameters` int64, one column `config/<key>` for each entry of the configs,
        `wasted` (see `WASTED`, of the phase that `by` names), `path`. The schema's metadata has `left_out`, the names
        of the trials that do not rank.

    Raises:
        OptionError: an option that cannot be used.
        ReadError: no trial ranks; it names the keys that there are.

    >>> trials = [TrialResult("a", {"width": 8}, {"accuracy": 0.99, "saturation/eval/mean": 0.2}),
    ...           TrialResult("b", {"width": 4}, {"accuracy": 0.985, "saturation/eval/mean": 0.6})]
    >>> rank_trials(trials).select(["place", "trial", "config/width"]).to_pylist()
    [{'place': 1, 'trial': 'b', 'config/width': 4}, {'place': 2, 'trial': 'a', 'config/width': 8}]
    """
    for option, value in (("mode", mode), ("by_mode", by_mode)):
        if value not in ("max", "min"):
            raise OptionError(f"{option}={value!r} is neither 'max' nor 'min'")
    if isinstance(within, bool) or not isinstance(within, int | float) or not 0 <= within < math.inf:
        raise OptionError(f"within={within!r} is no distance from the best {accuracy!r}, such as 0.01")
    trials = list(trials)
    known = [(trial, _of_run(trial, by)) for trial in trials if not trial.failed and _has(trial, accuracy)]
    ranked = [(trial, files) for trial, files in known if _has(trial, by) or math.isfinite(files.bounds.low)]
    if not ranked:
        keys = sorted({key for trial in trials for key in trial.metrics if _has(trial, key)})
        raise ReadError(
            f"none of {len(trials)} trials has ended well and reported both {by!r} and {accuracy!r}; "
            f"reported: {', '.join(keys) or 'nothing'}"
        )
    sign, by_sign = (1 if value == "max" else -1 for value in (mode, by_mode))
    best = max(sign * _number(trial, accuracy) for trial, _ in ranked)
    rows = []
    for trial, files in ranked:
        distance = best - sign * _number(trial, accuracy)
        contender = distance <= within + 1e-12  # 0.99 − 0.98 is more than 0.01
        many = math.inf if files.parameters is None else files.parameters
        certain = files.bounds.low if by_sign == 1 else files.bounds.high
        metric = by_sign * (certain if math.isfinite(certain) else _number(trial, by))
        order = (not contender, -metric if contender else distance, many if contender else -metric, trial.trial)
        rows.append((order, trial, contender, files))
    rows.sort(key=lambda row: row[0])
    places = {id(trial) for trial, _ in ranked}
    return _table(rows, by, accuracy, [trial.trial for trial in trials if id(trial) not in places])


def _number(trial: TrialResult, key: str) -> float:
    """A metric as Python's float, also where numpy or torch made it; NaN where there is none."""
    value: Any = trial.metrics.get(key)
    if isinstance(value, bool | str) or not hasattr(value, "__float__"):
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):  # an array of several
        return math.nan


def _has(trial: TrialResult, key: str) -> bool:
    return math.isfinite(_number(trial, key))


@dataclass(frozen=True, slots=True)
class _Files:
    """What the files of a trial say of it: parameters, the layers that waste most, what the metric can be."""

    bounds: Bounds
    parameters: int | None = None
    wasted: Sequence[Mapping[str, Any]] = ()


def _of_run(trial: TrialResult, by: str) -> _Files:
    """What a trial's files say; nothing but its metric where it has none."""
    value = _number(trial, by)
    reported = Bounds(value, value, ())
    try:
        run = find_runs(trial.path or ())[0]
    except ReadError:
        return _Files(reported)
    try:
        model = read_run(run).get("model")
    except ReadError:
        model = None
    parameters = model.get("num_parameters") if isinstance(model, dict) else None
    try:
        window = _last_rows(run, trial.run, by)
    except ReadError:  # nothing of this phase
        return _Files(reported, parameters)
    return _Files(metric_bounds(window, by) or reported, parameters, _wasted(window))


def _last_rows(run: Storage, name: str | None, by: str) -> list[dict[str, Any]]:
    """The rows of the last window of the phase that a metric is of, eval where it does not say."""
    stat, phase = statistic_of(by) or ("saturation", "train" if "/train/" in by else "eval")
    columns = dict.fromkeys([*BOUNDS, "run", "saturation", "intrinsic_dimensionality", stat])
    spectra = read_spectra(run, list(columns), [("phase", "==", phase)])
    rows: list[dict[str, Any]] = last_window(matching(spectra, run=name) if name else spectra, phase).to_pylist()
    return rows


def _wasted(window: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The layers with the most features that the variance of a window does not need."""
    layers = []
    for row in window:
        dimension, saturation = row["intrinsic_dimensionality"], row["saturation"]
        if dimension is None and row["sketched"] and row["saturation_high"] is not None:
            saturation = row["saturation_high"]
            dimension = round(saturation * row["features"])
        if dimension is not None and dimension < row["features"]:
            values = (row["layer"], row["features"], dimension, saturation, bool(row["sketched"]))
            layers.append(dict(zip((field.name for field in WASTED.value_type), values, strict=True)))
    layers.sort(key=lambda layer: layer["intrinsic_dimensionality"] - layer["features"])
    return layers[:MOST_WASTEFUL]


def _table(
    rows: Sequence[tuple[Any, TrialResult, bool, _Files]], by: str, accuracy: str, left_out: Sequence[str]
) -> pa.Table:
    trials, files = [trial for _, trial, *_ in rows], [found for *_, found in rows]
    columns: dict[str, pa.Array] = {
        "place": pa.array(range(1, len(rows) + 1), pa.int32()),
        "trial": pa.array([trial.trial for trial in trials]),
        "contender": pa.array([contender for _, _, contender, _ in rows]),
    }
    for key in dict.fromkeys((by, accuracy)):
        columns[key] = _floats(_number(trial, key) for trial in trials)
    columns["by_low"] = _floats(found.bounds.low for found in files)
    columns["by_high"] = _floats(found.bounds.high for found in files)
    columns["unresolved"] = pa.array([found.bounds.unresolved for found in files], pa.list_(pa.string()))
    columns["num_parameters"] = pa.array([found.parameters for found in files], pa.int64())
    configs = [flatten(trial.config) for trial in trials]
    for key in dict.fromkeys(key for config in configs for key in config):
        columns[f"config/{key}"] = _array([config.get(key) for config in configs])
    columns["wasted"] = pa.array([found.wasted for found in files], WASTED)
    paths = [trial.path.uri if isinstance(trial.path, Storage) else trial.path for trial in trials]
    columns["path"] = pa.array(paths, pa.string())
    return pa.table(columns).replace_schema_metadata({"left_out": "\n".join(left_out)})


def _floats(values: Iterable[float]) -> pa.Array:
    """Numbers, null where there is none."""
    return pa.array([value if math.isfinite(value) else None for value in values], pa.float64())


def _array(values: Sequence[Any]) -> pa.Array:
    """A column of a config's values; as text where they are of different types, or of none that Arrow has."""
    try:
        return pa.array(values)
    except (pa.ArrowException, TypeError, ValueError):
        return pa.array([None if value is None else str(value) for value in values], pa.string())
