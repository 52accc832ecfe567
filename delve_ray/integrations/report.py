"""Ray Train: a callback of the driver that adds the published metrics to every report."""

from __future__ import annotations

import logging
from typing import Any

import ray

from delve_ray.checks import check_name
from delve_ray.errors import DelveRayError
from delve_ray.integrations.keys import Patterns, check_patterns, select
from delve_ray.integrations.trial import current_trial

try:
    from ray.train import UserCallback
except ImportError as error:
    raise ImportError(
        f"delve_ray.integrations.report needs Ray Train ({error}): pip install 'delve_ray[train]'"
    ) from error

log = logging.getLogger(__name__)

ANSWER_S = 5.0
"""How long a report waits for the store's answer; without one it gets the metrics of before."""


class SaturationReportCallback(UserCallback):
    """Adds the metrics that the run's store has published last to each report, without a line in the training loop.

    They are in `Result.metrics`, and, where it stands before Tune's own callback, in the trial's results. Publishing
    follows the training: a report may have the metrics of the window before. A loop that reports
    `tracker.metrics(wait=True)` itself has those of its own window; what it reports is not overwritten.

    Args:
        metrics: Patterns over metric keys, in which "*" stands for anything; by default all.
        run: Name of the tracker's run; by default that of the Ray Train run, in a Tune trial, the trial's.

    Raises:
        OptionError: patterns that are none.

    Example:
        >>> from ray.train import RunConfig
        >>> config = RunConfig(name="cnn", callbacks=[SaturationReportCallback(metrics="saturation/*")])
    """

    def __init__(self, metrics: Patterns = "*", *, run: str | None = None) -> None:
        self._patterns = check_patterns(metrics)
        trial = current_trial()
        self._run = check_name("run", run) if run is not None else trial.run if trial is not None else None
        self._last: dict[str, float] = {}
        self._told = False

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """Add the metrics to what each rank has reported. Called by Ray Train, in its controller."""
        self._ask(self._run or str(run_context.run_config.name))
        for reported in metrics:
            reported.update({key: value for key, value in self._last.items() if key not in reported})

    def _ask(self, run: str) -> None:
        """Take the store's metrics; where it does not answer, keep those of before: a report must not fail of it."""
        from delve_ray.store import actor

        try:
            progress = actor.RemoteStore(actor.find(run)).progress(ANSWER_S)
        except (DelveRayError, ray.exceptions.RayError) as error:
            level = logging.DEBUG if self._told or self._last else logging.WARNING  # a run that has ended is no news
            log.log(level, "the metrics of run %s are missing in a report: %s", run, error)
            self._told = True
            return
        wanted = select(progress.metrics, self._patterns)
        self._last = wanted or self._last
