"""Waiting for a store, with deadlines: for a window to be published, and for a run to end."""

from __future__ import annotations

import logging
import time

from delve_ray.errors import DelveRayError, StoreError
from delve_ray.shipping import Shipper
from delve_ray.store.protocol import Progress, Store

log = logging.getLogger(__name__)


def wait_published(store: Store, run: str, windows: int, deadline: float, timeout: float) -> Progress:
    """Wait until so many windows of the attempt are published.

    Raises StoreError after the deadline, which is `timeout` seconds after the start, naming the missing ranks.
    """
    pause = 0.005
    while (progress := store.progress(timeout)).published < windows:
        if time.monotonic() >= deadline:
            raise StoreError(
                f"window {progress.published} of run {run!r} is not published after {timeout:g} s: "
                f"ranks {list(progress.missing)} have not closed it; every rank calls add_saturations() as often"
            )
        time.sleep(pause)
        pause = min(2 * pause, 0.25)
    return progress


def leave(shipper: Shipper, deadline: float, *, completed: bool, rejoinable: bool) -> None:
    """Take leave of the store; the last rank waits for the files and releases it.

    A rank that has not `completed` leaves its window open for the next attempt where there can be one.
    """

    def left() -> float:
        return max(1.0, deadline - time.monotonic())

    store, source = shipper.store, shipper.source
    shipper.leaving = True  # from now on a run that has ended is no surprise
    try:
        if not completed and rejoinable:
            store.flush(left())  # the store may end with this process
        shipper.metrics = dict(store.progress(left()).metrics)
        if not store.leave(source, completed=completed or not rejoinable, timeout=left()).finished:
            return
        if not store.wait_finished(left()):
            log.error("run %s: the files are not complete in time; its store goes on", source.run)
            return
        progress = store.progress(left())
        shipper.metrics = dict(progress.metrics)
        for problem in progress.problems:
            log.error("run %s: %s", source.run, problem)
        store.end()
    except DelveRayError as error:
        log.error("rank %d of run %s left without an answer: %s", source.rank, source.run, error)
