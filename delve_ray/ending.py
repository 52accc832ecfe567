"""The end of a worker's part in a run: by `close()`, by an exception, or with the thread that trains."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from delve_ray.recorder import Recorder
from delve_ray.shipping import Shipper
from delve_ray.undelivered import keep_undelivered
from delve_ray.waiting import TELL_S, leave

log = logging.getLogger(__name__)


class Once:
    """Something that is done once, by whoever comes first; safe in signal handlers, too."""

    def __init__(self) -> None:
        self._first: dict[int, tuple[int, object]] = {}
        self._done = threading.Event()

    def begin(self, timeout: float) -> bool:
        """Whether the caller is to do it; else waits until it is done, up to `timeout` seconds.

        Who is doing it already, and was interrupted, does not wait for itself.
        """
        mine = threading.get_ident(), object()
        first = self._first.setdefault(0, mine)  # atomic
        if first is mine:
            return True
        if first[0] != mine[0]:
            self._done.wait(timeout)
        return False

    def end(self) -> None:
        """It is done."""
        self._done.set()


def depart(
    recorder: Recorder, shipper: Shipper, savefile: str, timeout: float, *, completed: bool, rejoinable: bool
) -> None:
    """Remove the hooks, deliver what is there within `timeout` seconds and leave the run; keep what cannot be.

    A worker that has `completed` closes its last window; another shows what it has of it, for where the run is
    `rejoinable`, the next attempt goes on.
    """
    deadline = time.monotonic() + timeout
    safe = False
    try:
        recorder.close()
        if completed and recorder.phases():
            shipper.close_window(None)
        elif recorder.phases():
            shipper.queue_live()
        if shipper.flush(timeout, tell_every=TELL_S):
            safe = leave(shipper, deadline, completed=completed, rejoinable=rejoinable)
    finally:  # also when Ctrl-C ends the waiting
        shipper.stop()
        if safe or keep_undelivered(shipper, savefile):
            shipper.outbox.clear()


def close_with_thread(close: Callable[[], None]) -> bool:
    """Call `close` when the thread that calls this has ended; whether it will.

    Not in the main thread, whose end is the process's. Ray Tune runs a training function in a thread, and may use the
    process for another trial then. A function that ends by an exception, or is stopped by a scheduler, has not closed
    its tracker.
    """
    owner = threading.current_thread()
    if owner is threading.main_thread():
        return False

    def wait() -> None:
        owner.join()
        try:
            close()
        except Exception:
            log.exception("a tracker whose training has ended could not be closed")

    threading.Thread(target=wait, name="delve_ray-closer", daemon=True).start()
    return True
