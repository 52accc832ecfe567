"""Ranking the trials of a sweep: of those that are about as accurate as the best, who uses its width best."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

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
        ]
    )
)
"""Type of the column `wasted`: layers with the most features that the variance does not need, most first."""


@dataclass(frozen=True, slots=True)
class TrialResult:
    """What a sweep says of one trial: its config, the metrics it reported last, and where its run's files are."""

    trial: str
    config: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    path: str | Storage | None = None
    failed: bool = False


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

    Args:
        trials: The trials of one sweep. Those that failed, and those without one of the two metrics, are left out.
        by: Key of the metric that orders the contenders; of two alike, the one with fewer parameters is better.
        accuracy: Key of the metric that makes a contender.
        within: How far from the best a contender may be, in the units of `accuracy`.
        mode: "max", or "min" where `accuracy` is a loss.
        by_mode: "max", or "min" where less of `by` is better.

    Returns:
        One row per trial: `place` int32, `trial`, `contender` bool, the metric and the accuracy under their keys,
        `num_parameters` int64, one column `config/<key>` for each entry of the configs, `wasted` (see `WASTED`, of the
        phase that `by` names), `path`. The schema's metadata has `left_out`, the names of the trials that do not rank.

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
    ranked = [trial for trial in trials if not trial.failed and _has(trial, by) and _has(trial, accuracy)]
    if not ranked:
        keys = sorted({key for trial in trials for key in trial.metrics if _has(trial, key)})
        raise ReadError(
            f"none of {len(trials)} trials has ended well and reported both {by!r} and {accuracy!r}; "
            f"reported: {', '.join(keys) or 'nothing'}"
        )
    sign, by_sign = (1 if value == "max" else -1 for value in (mode, by_mode))
    best = max(sign * _number(trial, accuracy) for trial in ranked)
    rows = []
    for trial in ranked:
        distance = best - sign * _number(trial, accuracy)
        contender = distance <= within + 1e-12  # 0.99 − 0.98 is more than 0.01
        parameters, wasted = _of_run(trial.path, by)
        many = math.inf if parameters is None else parameters
        metric = by_sign * _number(trial, by)
        order = (not contender, -metric if contender else distance, many if contender else -metric, trial.trial)
        rows.append((order, trial, contender, parameters, wasted))
    rows.sort(key=lambda row: row[0])
    return _table(rows, by, accuracy, [trial.trial for trial in trials if trial not in ranked])


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


def _of_run(path: str | Storage | None, by: str) -> tuple[int | None, list[dict[str, Any]]]:
    """The number of parameters and the layers that waste most, from the files of a trial; nothing where it has none."""
    try:
        run = find_runs(path or ())[0]
    except ReadError:
        return None, []
    try:
        model = read_run(run).get("model")
    except ReadError:
        model = None
    parameters = model.get("num_parameters") if isinstance(model, dict) else None
    try:
        return parameters, _wasted(run, "train" if "/train/" in by else "eval")
    except ReadError:  # nothing of this phase
        return parameters, []


def _wasted(run: Storage, phase: str) -> list[dict[str, Any]]:
    """The layers with the most features that the variance of the last window does not need."""
    names = WASTED.value_type.names
    final = [("final", "==", True), ("phase", "==", phase), ("intrinsic_dimensionality", ">=", 0)]
    spectra = read_spectra(run, ["step", *names], final)
    last = spectra.filter(pc.field("step") == pc.max(spectra.column("step")))
    layers: list[dict[str, Any]] = last.select(names).to_pylist()
    layers = [layer for layer in layers if layer["intrinsic_dimensionality"] < layer["features"]]
    layers.sort(key=lambda layer: layer["intrinsic_dimensionality"] - layer["features"])
    return layers[:MOST_WASTEFUL]


def _table(rows: Sequence[tuple[Any, ...]], by: str, accuracy: str, left_out: Sequence[str]) -> pa.Table:
    trials = [trial for _, trial, *_ in rows]
    columns: dict[str, pa.Array] = {
        "place": pa.array(range(1, len(rows) + 1), pa.int32()),
        "trial": pa.array([trial.trial for trial in trials]),
        "contender": pa.array([contender for _, _, contender, *_ in rows]),
    }
    for key in dict.fromkeys((by, accuracy)):
        columns[key] = pa.array([_number(trial, key) for trial in trials])
    columns["num_parameters"] = pa.array([parameters for *_, parameters, _ in rows], pa.int64())
    configs = [flatten(trial.config) for trial in trials]
    for key in dict.fromkeys(key for config in configs for key in config):
        columns[f"config/{key}"] = _array([config.get(key) for config in configs])
    columns["wasted"] = pa.array([wasted for *_, wasted in rows], WASTED)
    paths = [trial.path.uri if isinstance(trial.path, Storage) else trial.path for trial in trials]
    columns["path"] = pa.array(paths, pa.string())
    return pa.table(columns).replace_schema_metadata({"left_out": "\n".join(left_out)})


def _array(values: Sequence[Any]) -> pa.Array:
    """A column of a config's values; as text where they are of different types, or of none that Arrow has."""
    try:
        return pa.array(values)
    except (pa.ArrowException, TypeError, ValueError):
        return pa.array([None if value is None else str(value) for value in values], pa.string())
