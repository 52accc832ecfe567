"""The sender: a thread per worker that takes what was recorded to the store, so that training never does.

The training thread only swaps accumulators (`close_window`). The sender waits for the device, packs all
layers of a delta into one float64 buffer, and sends one delta at a time; meanwhile the rest goes on merging
on the device. A range that was sent never changes: a delta is repeated as it is until the store has it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from delve_ray.errors import StoreError
from delve_ray.moments import F64
from delve_ray.recorder import Harvest, Recorder
from delve_ray.schema import PHASES
from delve_ray.store.protocol import Ack, Delta, Source, Store, moments_size
from delve_ray.writers.base import Scalar

log = logging.getLogger(__name__)

T = TypeVar("T")

HEARTBEAT_S = 5.0
"""Sign of life, and refresh of the metrics that `metrics(wait=False)` answers from."""
RETRY_S = (0.1, 5.0)
"""First and longest pause before a delta is offered again to a store that did not answer."""


@dataclass(slots=True)
class _Pending:
    """What one delta will carry: harvested, not yet packed."""

    window: int
    step: int
    closes: bool
    labelled: bool
    harvest: Harvest


class Shipper:
    """Sends one worker's deltas to a store.

    Memory: the accumulators of one delta and its buffer; a closed window that waits for the one before it
    keeps its accumulators. The methods may be called from any thread and do not wait, but for those that
    take a timeout.
    """

    def __init__(
        self, store: Store, source: Source, attempt: int, recorder: Recorder, *, publish_every: float, first_step: int
    ) -> None:
        self.store = store
        self.source = source
        self.attempt = attempt
        self.recorder = recorder
        self.publish_every = publish_every
        self.windows = 0
        self.metrics: dict[str, float] = {}
        self.lost: str | None = None
        self.leaving = False
        self._next_step = first_step
        self._seq = 0
        self._queue: deque[_Pending] = deque()
        self._scalars: list[Scalar] = []
        self._busy = False
        self._stopping = False
        self._fetched = 0
        self._lost_steps: set[int] = set()
        self._lost_scalars = 0
        self._warned: set[tuple[int, int]] = set()
        # Guards the queue and the window's ordinal; taken by the training thread for a swap of references.
        self._state = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="delve_ray-sender", daemon=True)
        self._thread.start()

    # --- called by the training --------------------------------------------------------------------------------

    def close_window(self, step: int | None) -> None:
        """Close the window: hand over what was recorded since the last delta. Returns at once.

        Without a `step` the window gets the label that another rank gives it, or else the next step.
        """
        with self.recorder.lock, self._state:  # in this order everywhere: a hook has the first when a signal ends it
            harvest = self.recorder.harvest(end_of_window=True)
            label = self._next_step if step is None else step
            self._queue.append(_Pending(self.windows, label, True, step is not None, harvest))
            self.windows += 1
            self._next_step = label + 1
            self._state.notify_all()

    def queue_live(self) -> None:
        """Hand over what was recorded so far without closing the window. Returns at once."""
        with self.recorder.lock, self._state:
            # The end may have come while a hook had the lock.
            harvest = {} if self._stopping else self.recorder.harvest(end_of_window=False)
            if harvest:
                self._queue.append(_Pending(self.windows, self._next_step, False, False, harvest))
            self._state.notify_all()

    def add_scalar(self, scalar: Scalar) -> None:
        """Queue a user scalar. Returns at once."""
        with self._state:
            self._scalars.append(scalar)
            self._state.notify_all()

    def flush(self, timeout: float) -> bool:
        """Wait until all that is queued is in the store; False when that takes longer."""
        with self._state:
            return self._state.wait_for(lambda: self._idle() or self.lost is not None, timeout) and self.lost is None

    def stop(self) -> None:
        """End the thread, whatever is queued."""
        with self._state:
            self._stopping = True
            self._state.notify_all()
        self._thread.join(1.0)  # it may hang in a call to the store; it ends with that

    def undelivered(self) -> str:
        """In words, what is still here."""
        with self._state:
            steps = sorted(self._lost_steps | {item.step for item in self._queue})
            return f"rows of steps {steps}, {len(self._scalars) + self._lost_scalars} scalars"

    # --- the sender's thread -----------------------------------------------------------------------------------

    def _idle(self) -> bool:
        return not self._queue and not self._scalars and not self._busy

    def _run(self) -> None:
        next_live = time.monotonic() + self.publish_every if self.publish_every else float("inf")
        next_heartbeat = time.monotonic() + HEARTBEAT_S
        while True:
            with self._state:
                wake_at = min(next_live, next_heartbeat)
                self._state.wait_for(
                    lambda: self._stopping or self._queue or self._scalars, max(0.0, wake_at - time.monotonic())
                )
                if self._stopping:
                    return
                live = not self._queue and time.monotonic() >= next_live
            if live:
                self.queue_live()
                next_live = time.monotonic() + self.publish_every
            with self._state:
                item = self._queue[0] if self._queue else None
                scalars, self._scalars = self._scalars, []
                self._busy = bool(item or scalars)
            self._work(item, scalars)
            with self._state:
                if item is not None:
                    self._queue.popleft()
                self._busy = False
                self._state.notify_all()
            if item is not None or time.monotonic() >= next_heartbeat:
                self._heartbeat()
                next_heartbeat = time.monotonic() + HEARTBEAT_S

    def _work(self, item: _Pending | None, scalars: list[Scalar]) -> None:
        if self.lost is not None:  # said once, where it was lost
            self._lost_steps |= {item.step} if item else set()
            self._lost_scalars += len(scalars)
            return
        try:
            if item is not None:
                self._lost_steps.add(item.step)
                delta, buffer = self._pack(item)
                ack = self._persist(lambda: self.store.take(delta, buffer))
                self._seq += 1
                for layer, features in ack.refused:
                    self.recorder.give_up(
                        layer,
                        f"it has {dict(delta.widths)[layer]} features here and {features} in other workers; a layer "
                        f"has one width in all workers and batches (with conv_method='flatten', images of one size)",
                    )
                self._lost_steps.discard(item.step)
            if scalars:
                self._persist(lambda: self.store.add_scalars(scalars))
                scalars.clear()
        except Exception as error:  # the training goes on, whatever happens here
            self._lose(f"{type(error).__name__}: {error}")
        finally:
            self._lost_scalars += len(scalars)

    def _lose(self, why: str) -> None:
        """Nothing more can be delivered: stop recording, so that nothing piles up, and say so."""
        self.recorder.recording = False
        with self._state:
            self.lost = why
            self._state.notify_all()
        log.error(
            "rank %d of run %s cannot deliver its moments and records no more: %s",
            self.source.rank,
            self.source.run,
            why,
        )

    def _pack(self, item: _Pending) -> tuple[Delta, F64]:
        """Wait for the device and pack all layers into one buffer; each accumulator is freed once it is packed."""
        layers = self.recorder.layers
        keys = sorted(item.harvest)
        buffer = np.empty(sum(moments_size(item.harvest[key].features) for key in keys))
        entries = []
        widths: dict[int, int] = {}
        start = 0
        for index, phase in keys:
            features = item.harvest[index, phase].features
            size = moments_size(features)
            n, nonfinite = item.harvest.pop((index, phase)).drain_into(buffer[start : start + size])
            if n or nonfinite:
                start += size
                entries.append((index, phase, n, nonfinite))
                if layers[index].features is None:
                    widths[index] = features
        self._warn_nonfinite(entries, item)
        delta = Delta(
            self.source,
            self.attempt,
            self._seq,
            item.window,
            item.step,
            item.closes,
            item.labelled,
            tuple(entries),
            tuple(widths.items()),
        )
        return delta, buffer[:start]

    def _warn_nonfinite(self, entries: Sequence[tuple[int, int, int, int]], item: _Pending) -> None:
        """Say which layers have non-finite rows, once per layer, phase and window however often it is flushed."""
        for index, phase, n, nonfinite in entries:
            if nonfinite and (index, phase) not in self._warned:
                self._warned.add((index, phase))
                log.warning(
                    "layer %s, %s, step %d: %d of %d rows are not finite and were left out",
                    self.recorder.layers[index].name,
                    PHASES[phase],
                    item.step,
                    nonfinite,
                    nonfinite + n,
                )
        if item.closes:
            self._warned.clear()

    def _persist(self, call: Callable[[], T]) -> T:
        """Repeat a call until the store answers; a refusal is final, silence is not."""
        pause, longest = RETRY_S
        while True:
            try:
                return call()
            except StoreError as error:
                if self._stopping or error.final:
                    raise
                log.warning(
                    "rank %d: the store does not answer (%s); trying again in %.1f s", self.source.rank, error, pause
                )
            with self._state:
                self._state.wait_for(lambda: self._stopping, pause)
            pause = min(2 * pause, longest)

    def _heartbeat(self) -> None:
        """Say that this worker lives; fetch the metrics when a new window has been published."""
        if self.lost is not None:
            return
        try:
            ack: Ack = self.store.heartbeat(self.source)
            if ack.published != self._fetched:
                self.metrics = dict(self.store.progress().metrics)
                self._fetched = ack.published
            if ack.finished and not self.leaving:
                self._lose("its store has ended the run, having heard of no worker for too long")
        except Exception as error:  # the next delta will show whether the store is there
            log.debug("heartbeat: %s", error)
