"""What the callbacks of trainers share: where files lie, and a window's metrics without a risk for the training."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

from delve_ray.checks import check_integer
from delve_ray.connect import SAVEFILE
from delve_ray.errors import StoreError
from delve_ray.integrations.keys import Patterns, check_patterns, select
from delve_ray.integrations.ray_train import current_worker
from delve_ray.integrations.trial import current_trial
from delve_ray.storage import Storage
from delve_ray.tracker import SaturationTracker
from delve_ray.writers import SaveTo

log = logging.getLogger(__name__)

LOCAL, REMOTE = ("parquet", "tensorboard"), ("parquet",)
"""Writers where none are named: event files grow, which only local ones can."""


def on_ray() -> bool:
    """Whether Ray Train or Ray Tune says which run this is, and where its results lie."""
    return current_worker() is not None or current_trial() is not None


def writers(save_to: SaveTo | None) -> SaveTo:
    """What to write to, where `save_to` leaves it open."""
    if save_to is not None:
        return save_to
    home = current_trial() or current_worker()
    local = home is None or Storage(home.storage_path, home.storage_filesystem).is_local
    return LOCAL if local else REMOTE


def free_savefile(folder: str, *, again: bool) -> str:
    """A directory for the files of a fit below `folder`: the first that is not there, or, with `again`, the last."""
    last = path = os.path.join(folder, SAVEFILE)
    number = 0
    while os.path.exists(path):
        number += 1
        last, path = path, os.path.join(folder, f"{SAVEFILE}-{number}")
    return last if again else path


class Fit:
    """What the callbacks of trainers have in common: their options, the tracker of a fit, the end of its windows."""

    tracker: SaturationTracker | None

    def __init__(
        self,
        savefile: str | os.PathLike[str] | None = None,
        save_to: SaveTo | None = None,
        *,
        every_n_steps: int | None = None,
        metrics: Patterns | None = "*",
        **options: Any,
    ) -> None:
        super().__init__()
        self.tracker = None
        self._savefile, self._save_to, self._options = savefile, save_to, options
        self._every = None if every_n_steps is None else check_integer("every_n_steps", every_n_steps, at_least=1)
        self._patterns = None if metrics is None else check_patterns(metrics)
        self._last = -1  # the step of the last window of this fit

    def _end_window(self, step: int) -> dict[str, float]:
        """Close the window, once a step; the metrics to log, if any."""
        if self.tracker is None or step <= self._last:
            return {}
        self._last = step
        self.tracker.add_saturations(step=step)
        return {} if self._patterns is None else published(self.tracker, self._patterns)

    def _end_fit(self) -> None:
        tracker, self.tracker = self.tracker, None
        if tracker is not None:
            tracker.close()


def published(tracker: SaturationTracker, patterns: Sequence[str]) -> dict[str, float]:
    """The metrics of the window that was closed; those of before where the store is away, with a word.

    A training goes on without its store, so it must not fail of this.
    """
    try:
        metrics = tracker.metrics(wait=True)
    except StoreError as error:
        log.warning("the metrics of the last window are missing: %s", error)
        metrics = tracker.metrics()
    return select(metrics, patterns)
