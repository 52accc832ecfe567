"""What the callbacks of trainers share: where files lie, and a window's metrics without a risk for the training."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

from delve_ray.connect import SAVEFILE
from delve_ray.errors import StoreError
from delve_ray.integrations.keys import select
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
    names = [SAVEFILE, *(f"{SAVEFILE}-{number}" for number in range(1, 10_000))]
    index = next(index for index, name in enumerate(names) if not os.path.exists(os.path.join(folder, name)))
    return os.path.join(folder, names[max(0, index - 1) if again else index])


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
