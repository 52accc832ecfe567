"""Ray Tune: which trial this is, and the ranking of a sweep's results.

In the function or class that Tune runs, `SaturationTracker` needs to be told nothing: it finds the trial.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa

from delve_ray.analysis.ranking import TrialResult, rank_trials
from delve_ray.analysis.ranking_table import ranking_table
from delve_ray.configs import plain
from delve_ray.errors import OptionError
from delve_ray.integrations.trial import Trial, current_trial
from delve_ray.storage import Storage

__all__ = ["Trial", "current_trial", "rank", "ranking_table"]


def rank(
    results: Any,
    by: str = "saturation/eval/mean",
    accuracy: str = "accuracy",
    within: float = 0.01,
    *,
    mode: str = "max",
    by_mode: str = "max",
) -> pa.Table:
    """The trials of a sweep, best first: of those about as accurate as the best, who uses its width best.

    Args:
        results: What `Tuner.fit()` returned, or several of them. Of each trial, its last report counts.
        by: Key of the reported metric that orders those about as accurate as the best.
        accuracy: Key of the metric that says which ones these are.
        within: How far from the best they may be, in the units of `accuracy`.
        mode: "max", or "min" where `accuracy` is a loss.
        by_mode: "max", or "min" where less of `by` is better.

    Returns:
        One row per trial that ended well, see `rank_trials`, which also says where a trial with sketched layers stands;
        `ranking_table` prints it.

    Raises:
        OptionError: an option that cannot be used.
        ReadError: no trial ranks.
    """
    grids = results if isinstance(results, list | tuple) else [results]
    trials = [trial for grid in grids for trial in _trials(grid)]
    return rank_trials(trials, by, accuracy, within, mode=mode, by_mode=by_mode)


def _trials(results: Iterable[Any]) -> Iterator[TrialResult]:
    try:
        found = [(r.path, r.filesystem, r.metrics, r.config, r.error) for r in results]
    except (TypeError, AttributeError):
        raise OptionError(
            f"results is a {type(results).__name__}, not the ResultGrid that Tuner.fit() returns"
        ) from None
    for path, filesystem, metrics, config, error in found:
        name = (metrics or {}).get("trial_id") or os.path.basename(str(path).rstrip("/"))
        yield TrialResult(
            str(name), plain(config or {}), metrics or {}, Storage(path, filesystem), failed=error is not None
        )
