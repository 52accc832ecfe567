"""Waiting for a store, with deadlines: for a window to be published, and for a run to end."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping

from delve_ray.errors import DelveRayError, StoreError, UnknownSource
from delve_ray.shipping import Shipper
from delve_ray.store.protocol import Progress, ranks_text

log = logging.getLogger(__name__)

TELL_S = 10.0
"""A wait at the end says this often what it waits for."""
_PAUSE_S = (0.01, 0.5)
"""First and longest pause between two questions to the store."""


def wait_metrics(shipper: Shipper, timeout: float) -> Mapping[str, float]:
    """The metrics that contain the window that this rank closed last. Raises StoreError after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    if not shipper.flush(timeout):
        raise StoreError(shipper.lost or f"rank {shipper.source.rank} could not deliver within {timeout:g} s")
    return wait_published(shipper, shipper.windows, deadline, timeout).metrics


def wait_written(shipper: Shipper, timeout: float) -> None:
    """Wait until all that is recorded is in the files. Raises StoreError after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    shipper.queue_live()
    if not shipper.flush(timeout) or not shipper.store.flush(max(0.0, deadline - time.monotonic())):
        raise StoreError(shipper.lost or f"run {shipper.source.run!r} is not written after {timeout:g} s")


def wait_published(shipper: Shipper, windows: int, deadline: float, timeout: float) -> Progress:
    """Wait until so many windows of the attempt are published.

    Raises StoreError after the deadline, which is `timeout` seconds after the start, naming the missing ranks.
    """
    run, pause = shipper.source.run, 0.005
    progress, problem = None, ""
    while True:
        try:
            progress = shipper.progress(timeout)
            if progress.published >= windows:
                return progress
        except StoreError as error:
            if error.final:
                raise
            problem = f"; {error}"
        if time.monotonic() >= deadline:
            if progress is None:
                raise StoreError(f"run {run!r} did not answer within {timeout:g} s{problem}")
            why = "; ".join(progress.problems) or "its store has all of it and is at work"
            if progress.missing:
                who = ranks_text(progress.missing)
                why = f"ranks {who} have not closed it; every rank calls add_saturations() as often"
            raise StoreError(f"window {progress.published} of run {run!r} is not published after {timeout:g} s: {why}")
        time.sleep(pause)
        pause = min(2 * pause, 0.25)


def leave(shipper: Shipper, deadline: float, *, completed: bool, rejoinable: bool) -> bool:
    """Take leave of the store; the last rank waits for the files and releases it.

    A rank that has not `completed` leaves its window open for the next attempt where there can be one. Any rank waits
    until what it has sent survives a loss of the store. Returns whether that was so before the deadline.
    """
    shipper.leaving = True  # from now on a run that has ended is no surprise
    if not completed and rejoinable:
        _show(shipper, deadline)  # the store may end with this process
    pause, tell_at = _PAUSE_S[0], time.monotonic() + TELL_S
    problem = "the store does not answer"
    while True:
        left = deadline - time.monotonic()
        try:
            if _left(shipper, max(1.0, left), completed=completed or not rejoinable):
                return True
            problem = "the store has not saved what it has"
        except UnknownSource:
            problem = "the store was started anew"
            shipper.wake()
        except DelveRayError as error:
            problem = str(error)
            if getattr(error, "final", True):
                log.error(
                    "rank %d of run %s left without an answer: %s", shipper.source.rank, shipper.source.run, error
                )
                return False
        if left <= 0:
            log.error(
                "rank %d of run %s did not take leave in time: %s", shipper.source.rank, shipper.source.run, problem
            )
            return False
        if time.monotonic() >= tell_at:
            tell_at += TELL_S
            log.warning(
                "rank %d of run %s waits to take leave, %.0f s more: %s",
                shipper.source.rank,
                shipper.source.run,
                left,
                problem,
            )
        time.sleep(pause)
        pause = min(2 * pause, _PAUSE_S[1])


def _left(shipper: Shipper, left: float, *, completed: bool) -> bool:
    """Ask once; whether nothing more is to be waited for."""
    store = shipper.store
    ack = store.leave(shipper.source, completed=completed, sent=shipper.sent, timeout=left)
    shipper.note(ack)
    if not ack.left:
        return False
    if not ack.finished:
        shipper.progress(left)
        return ack.saved
    done = store.wait_finished(min(left, TELL_S))
    progress = shipper.progress(left)
    if not done:
        raise StoreError(f"the files are not complete yet ({'; '.join(progress.problems) or 'publishing'})")
    for problem in progress.problems:
        log.error("run %s: %s", shipper.source.run, problem)
    store.end(shipper.source)
    return True


def _show(shipper: Shipper, deadline: float) -> None:
    """Publish what the open window has so far."""
    try:
        shipper.store.flush(max(1.0, deadline - time.monotonic()))
    except DelveRayError as error:
        log.error("run %s: its open window could not be published: %s", shipper.source.run, error)
