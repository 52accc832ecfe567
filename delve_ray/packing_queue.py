"""What a worker's training hands over, and the thread that packs it into deltas, so that the training never does.

The training thread only swaps accumulators (`close_window`). The packer waits for the device and packs all layers of a
delta into one float64 buffer, which then waits in the outbox, in memory or on disk.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque

from delve_ray.errors import StoreError
from delve_ray.outbox import Outbox
from delve_ray.packing import Packer, Pending
from delve_ray.recorder import Recorder
from delve_ray.store.protocol import Source, Welcome
from delve_ray.writers.base import Scalar

log = logging.getLogger(__name__)

BUSY_S = 0.1
"""How long live rows wait for a hook before the packer looks for something else to do."""


class PackingQueue:
    """The windows of one worker on their way into its outbox; `Shipper` takes them to the store from there.

    Memory: the accumulators of one delta and its buffer; what is packed, up to the outbox's bound; closed windows that
    wait to be packed, up to what `max_memory` leaves. Beyond that the rows of a window are given up, and it says so.
    The methods may be called from any thread and do not wait.
    """

    def __init__(
        self,
        source: Source,
        welcome: Welcome,
        recorder: Recorder,
        outbox: Outbox,
        *,
        publish_every: float,
        first_step: int,
    ) -> None:
        self.source = source
        self.attempt = welcome.attempt
        self.recorder = recorder
        self.outbox = outbox
        self.publish_every = publish_every
        self.windows = welcome.window
        self.sent = 0
        """Deltas that were packed: the store has to have so many in the end."""
        self.lost: str | None = None
        self._pack = Packer(recorder.layers)
        self._next_step = first_step
        self._packed_window = welcome.window
        self._first = True  # whether the next delta is the first of its window
        self._queue: deque[Pending] = deque()
        self._scalars: list[Scalar] = []
        self._packing = False
        self._stopping = False
        # Guards the queue and the window's ordinal; taken by the training thread for a swap of references.
        self._state = threading.Condition()

    # --- called by the training --------------------------------------------------------------------------------

    def close_window(self, step: int | None) -> None:
        """Close the window: hand over what was recorded since the last delta. Returns at once.

        Without a `step` the window gets the label that another rank gives it, or else the next step.
        """
        with self.recorder.lock, self._state:  # in this order everywhere: a hook has the first when a signal ends it
            harvest = self.recorder.harvest(end_of_window=True)
            label = self._next_step if step is None else step
            item = Pending(self._open_window(), label, True, step is not None, harvest, self._take_scalars())
            spare = self.recorder.spare_bytes - max(0, self.outbox.memory_bytes - self.recorder.outbox_bytes)
            if self._queue and sum(other.nbytes for other in (*self._queue, item)) > spare:
                item.harvest, item.complete = {}, False
            self._queue.append(item)
            self.windows = item.window + 1
            self._next_step = label + 1
            self._state.notify_all()
        if not item.complete:  # said without a lock: what a handler of the user's does is not known
            log.error(
                "rank %d: rows of step %d are given up: windows close faster than they can be packed, and more "
                "would exceed max_memory=%d; close fewer windows, or raise it",
                self.source.rank,
                label,
                self.recorder.options.max_memory,
            )

    def number_from(self, step: int) -> None:
        """The label of the next window that is given none."""
        with self._state:
            self._next_step = step

    def queue_live(self, timeout: float = -1.0) -> bool:
        """Hand over what was recorded so far without closing the window. Returns at once.

        With a `timeout` in seconds, False where a hook has the accumulators for longer.
        """
        if not self.recorder.lock.acquire(timeout=timeout):
            return False
        try:
            with self._state:
                # The end may have come while a hook had the lock.
                harvest = {} if self._stopping else self.recorder.harvest(end_of_window=False)
                scalars = self._take_scalars()
                if harvest or scalars:
                    self._queue.append(Pending(self._open_window(), self._next_step, False, False, harvest, scalars))
                self._state.notify_all()
        finally:
            self.recorder.lock.release()
        return True

    def resume(self) -> None:
        """Record again. Raises StoreError where nothing more can be delivered."""
        with self._state:
            if self.lost is not None:
                raise StoreError(f"nothing more can be delivered, so nothing is recorded: {self.lost}")
            self.recorder.recording = True

    def add_scalar(self, scalar: Scalar) -> None:
        """Queue a user scalar. Returns at once."""
        with self._state:
            self._scalars.append(scalar)
            self._state.notify_all()

    def _open_window(self) -> int:
        """Ordinal of the open window, also after a close that Ctrl-C has interrupted halfway."""
        last = self._queue[-1] if self._queue else None
        closed = 0 if last is None else last.window + last.closes
        self.windows = max(self.windows, self._packed_window, closed)
        return self.windows

    def _take_scalars(self) -> list[Scalar]:
        scalars, self._scalars = self._scalars, []
        return scalars

    # --- the packer's thread -----------------------------------------------------------------------------------

    def _idle(self) -> bool:
        return not (self._queue or self._scalars or self._packing or self.outbox.unmerged)

    def _pack_all(self) -> None:
        every = self.publish_every or threading.TIMEOUT_MAX / 2
        next_live = time.monotonic() + every
        while True:
            with self._state:
                self._state.wait_for(
                    lambda: self._stopping or self._queue or self._scalars, max(0.0, next_live - time.monotonic())
                )
                if self._stopping and not self._queue and not self._scalars:
                    return
                item = self._queue[0] if self._queue else None
                if item is None and self._scalars:
                    item = Pending(self._open_window(), self._next_step, False, False, {}, self._take_scalars())
                    self._queue.append(item)
                if item is not None:
                    item.hand_over()
                    self._packing = True
            if item is not None:
                self._pack_next(item)
            elif time.monotonic() >= next_live:
                # What was never sent goes on merging. A hook that a signal has interrupted may hold the accumulators
                # until this thread has packed what the signal's handler closes.
                if not self.outbox.unmerged and not self.queue_live(BUSY_S):
                    continue
                next_live = time.monotonic() + every

    def _pack_next(self, item: Pending) -> None:
        try:
            delta, buffer = self._pack(item, self.source, self.attempt, self.sent)
            memory = self.recorder.outbox_bytes
            with self._state:
                waiting = sum(other.nbytes for other in self._queue if other is not item)
            limit = memory + max(0, self.recorder.spare_bytes - waiting)
            delta = delta.sealed(buffer)
            with self._state:  # together: a store that is started anew is told where this worker is
                self.outbox.put(delta, buffer, first=self._first)
                self.sent += 1
                self._first = item.closes
                self._packed_window = item.window + item.closes
            self.outbox.make_room(memory=memory, limit=limit)
        except Exception as error:  # the training goes on, whatever happens here
            log.exception("rank %d: rows of step %d are lost", self.source.rank, item.step)
            self._lose(f"{type(error).__name__}: {error}")
        finally:
            with self._state:
                self._queue.popleft()
                self._packing = False
                self._state.notify_all()

    def _lose(self, why: str) -> None:
        """Nothing more can be delivered: stop recording, so that nothing piles up, and say so."""
        with self._state:
            if self.lost is not None:
                return
            self.lost = why
            self.recorder.recording = False
            self._state.notify_all()
        log.error(
            "rank %d of run %s cannot deliver its moments and records no more: %s",
            self.source.rank,
            self.source.run,
            why,
        )
