"""The sender: a thread that takes to the store what the packer has put into the outbox, see `packing_queue`.

It offers one delta at a time until the store has it; meanwhile the rest goes on merging on the device, and closed
windows are packed and wait. What the store has merged but not saved stays in the outbox, too, and is offered again to a
store that was restarted.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping

from delve_ray.errors import StoreError, UnknownSource
from delve_ray.moments import F64
from delve_ray.outbox import Outbox
from delve_ray.packing_queue import PackingQueue
from delve_ray.recorder import Recorder
from delve_ray.store.metrics import Metrics
from delve_ray.store.protocol import Ack, Delta, Held, Progress, Source, Store, StoreConfig, Welcome

log = logging.getLogger(__name__)

HEARTBEAT_S = 5.0
"""Sign of life, and refresh of the metrics that `metrics(wait=False)` answers from, see `heartbeat_s`."""
HEARTBEATS_PER_S = 400
"""Signs of life of all ranks together: each takes a store's process half a millisecond, so that they take a fifth of a
core, however many ranks there are."""
RETRY_S = (0.1, 5.0)
"""First and longest pause before a delta is offered again to a store that did not answer."""
PROGRESS_S = 60.0
"""How long the store may take to say how far it is."""
PACK_S = 10.0
"""How long the end waits for what is still to be packed."""
TELL_S = 60.0
"""A store that does not answer is mentioned this often."""


def heartbeat_s(config: StoreConfig) -> float:
    """Seconds between two signs of life of a rank; a fourth of `silent_after` at most, unless that is less than usual.

    >>> [heartbeat_s(StoreConfig("run", "/runs", ranks, silent_after=300.0)) for ranks in (1, 2000, 10_000, 100_000)]
    [5.0, 5.0, 25.0, 75.0]
    """
    most = config.silent_after / 4 if config.silent_after else float("inf")
    return max(HEARTBEAT_S, min(config.world_size / HEARTBEATS_PER_S, most))


class Shipper(PackingQueue):
    """Sends one worker's deltas to a store; `rejoin` registers again with a store that was started anew.

    The methods may be called from any thread and do not wait, but for those that take a timeout.
    """

    def __init__(
        self,
        store: Store,
        source: Source,
        welcome: Welcome,
        recorder: Recorder,
        outbox: Outbox,
        rejoin: Callable[[Held], Welcome],
        *,
        config: StoreConfig,
        publish_every: float,
        first_step: int,
    ) -> None:
        super().__init__(source, welcome, recorder, outbox, publish_every=publish_every, first_step=first_step)
        self.config = config
        self.store = store
        self.metrics: Mapping[str, float] = Metrics()
        self.leaving = False
        self.last_ack: Ack | None = None
        if hasattr(store, "following"):
            store.following = outbox.following
        self._rejoin = rejoin
        self._heard = -1  # windows that were published when the store told the metrics
        self._asked = self._answered = 0  # questions that have the metrics in their answer
        self._told = float("-inf")
        self._awake = False
        self._threads = [
            threading.Thread(target=self._run, args=(self._pack_all,), name="delve_ray-packer", daemon=True),
            threading.Thread(target=self._run, args=(self._send_all,), name="delve_ray-sender", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # nothing that is foreseen; but nobody shall wait for this thread
            log.exception("rank %d: %s ends", self.source.rank, threading.current_thread().name)
            self._lose(f"{type(error).__name__}: {error}")

    # --- called by the training and at the end -----------------------------------------------------------------

    def flush(self, timeout: float, *, tell_every: float = float("inf")) -> bool:
        """Wait until all that is queued is in the store; False when that takes longer.

        Every `tell_every` seconds the log says what is waited for.
        """
        deadline = time.monotonic() + timeout
        while True:
            with self._state:
                left = deadline - time.monotonic()
                if self._state.wait_for(lambda: self._idle() or self.lost is not None, min(left, tell_every)):
                    return self.lost is None
            if left <= tell_every:
                return False
            log.warning(
                "rank %d of run %s waits for its store, %.0f s more, which has not got: %s",
                self.source.rank,
                self.source.run,
                left - tell_every,
                self.undelivered(),
            )

    def progress(self, timeout: float = PROGRESS_S) -> Progress:
        """Ask the store how far it is, and keep the metrics, unless what was asked later has been answered already."""
        number = self._ask()
        progress = self.store.progress(timeout)
        with self._state:
            self._keep(number, progress.metrics)
        return progress

    def _ask(self) -> int:
        """The number of a question whose answer has the metrics."""
        with self._state:
            self._asked += 1
            return self._asked

    def _keep(self, number: int, metrics: Mapping[str, float]) -> None:
        if number > self._answered:
            self._answered, self.metrics = number, metrics

    def wake(self) -> None:
        """Ask the store at once what it has."""
        with self._state:
            self._awake = True
            self._state.notify_all()

    def stop(self) -> None:
        """End the threads, whatever is queued; what was queued is packed."""
        with self._state:
            self._stopping = True
            self._state.notify_all()
        packer, sender = self._threads
        packer.join(PACK_S)
        sender.join(1.0)  # it may hang in a call to the store; it ends with that

    def undelivered(self) -> str:
        """In words, what is still here."""
        waiting = self.outbox.waiting
        with self._state:
            queued = list(self._queue)
            scalars = len(self._scalars) + sum(len(i.scalars) for i in queued) + sum(len(d.scalars) for d in waiting)
            steps = {delta.step for delta in waiting if delta.entries or delta.closes}
            steps |= {item.step for item in queued if item.harvest or item.closes}
        return f"rows of {_spans(steps)}, {scalars} scalars"

    @property
    def unpacked(self) -> str:
        """In words, what of it has not got as far as the outbox; empty where nothing."""
        with self._state:
            return _spans({item.step for item in self._queue}) if self._queue else ""

    # --- the sender's thread -----------------------------------------------------------------------------------

    def _send_all(self) -> None:
        next_heartbeat = time.monotonic() + heartbeat_s(self.config)
        pause = 0.0
        while True:
            with self._state:
                self._state.wait_for(lambda: self._stopping or self.lost is not None, pause)
                if not pause:
                    self._state.wait_for(
                        lambda: self._stopping or self._awake or self.outbox.unmerged or self.lost is not None,
                        max(0.0, next_heartbeat - time.monotonic()),
                    )
                if self._stopping or self.lost is not None:
                    return
            found = self.outbox.next()
            sent = True
            if found is not None:
                sent = self._offer(*found)
            if sent and (self._awake or time.monotonic() >= next_heartbeat):
                self._awake = False
                self._call(self._heartbeat)
                next_heartbeat = time.monotonic() + heartbeat_s(self.config)
            elif sent and found is not None:  # the answer to a delta says all that a heartbeat's would
                self._call(self._fetch)
            with self._state:
                self._state.notify_all()
            pause = 0.0 if sent else min(max(2 * pause, RETRY_S[0]), RETRY_S[1])

    def _offer(self, delta: Delta, buffer: F64) -> bool:
        """Offer a delta once; whether the store has it now. A refusal is final, silence is not."""
        try:
            number = self._ask()
            ack = self.store.take(delta, buffer)
            self.note(ack, number)
            for layer, features in ack.refused:
                self.recorder.give_up(
                    layer,
                    f"it has {dict(delta.widths)[layer]} features here and {features} in other workers; a layer "
                    f"has one width in all workers and batches (with conv_method='flatten', images of one size)",
                )
            if ack.late:
                log.warning("rank %d: rows of step %d came too late and are left out", self.source.rank, delta.step)
            return not ack.busy
        except UnknownSource:
            return self._register_again()
        except StoreError as error:
            if error.final:
                self._lose(f"{type(error).__name__}: {error}")
            else:
                self._tell_silence(error)
            return False
        except Exception as error:  # the training goes on, whatever happens here
            self._lose(f"{type(error).__name__}: {error}")
            return False
        finally:
            self.outbox.done(delta.seq)

    def note(self, ack: Ack, number: int = 0) -> None:
        """Note what the store has, in answer to a question of that number; what it has lost since is offered again."""
        if self.outbox.acknowledge(ack):
            log.warning("rank %d: the store was restarted; it is offered what it has not saved", self.source.rank)
        with self._state:
            if ack.metrics is not None:
                self._heard = ack.published
                self._keep(number, ack.metrics)
            self.last_ack = ack
            self._told = float("-inf")
            self._state.notify_all()
        if ack.finished and not self.leaving and not ack.left:
            self._lose("its store has ended the run, having heard of no worker for too long")

    def _register_again(self) -> bool:
        """The store was started anew and does not know this worker; what it still has begins with its first delta."""
        with self._state:
            held = self.outbox.held(self.attempt, self.sent, self._packed_window, first=self._first)
        try:
            self._rejoin(held)
        except StoreError as error:
            if not error.final:
                self._tell_silence(error)
                return False
            self._lose(f"{type(error).__name__}: {error}")
        except Exception as error:  # it is turned away: another attempt has begun
            self._lose(f"{type(error).__name__}: {error}")
            return False
        self.outbox.offer_all()
        return False

    def _tell_silence(self, error: StoreError) -> None:
        """Say that the store does not answer: at once, and then now and again."""
        now = time.monotonic()
        if now - self._told >= TELL_S:
            self._told = now
            log.warning(
                "rank %d: the store does not answer (%s); what it has not got waits here: %s",
                self.source.rank,
                error,
                self.outbox.status(),
            )

    def _heartbeat(self) -> None:
        """Say that this worker lives."""
        number = self._ask()
        self.note(self.store.heartbeat(self.source, self.outbox.status()), number)
        self._fetch()

    def _fetch(self) -> None:
        """Fetch the metrics of a window that has been published, where no answer has brought them."""
        ack = self.last_ack
        if ack is not None and ack.published != self._heard:
            self.progress()
            self._heard = ack.published

    def _call(self, question: Callable[[], None]) -> None:
        """Ask the store something, whatever comes of it."""
        try:
            question()
        except UnknownSource:
            self._register_again()
        except StoreError as error:
            if error.final and not (self.leaving and self._idle()):  # then it has ended with its run
                self._lose(f"{type(error).__name__}: {error}")
            log.debug("heartbeat: %s", error)
        except Exception as error:
            self._lose(f"{type(error).__name__}: {error}")


def _spans(steps: set[int]) -> str:
    """Steps in words, however many they are.

    >>> _spans({3}), _spans({5, 3, 4}), _spans({1, 2, 3, 4, 5, 9, 12})
    ('steps [3]', 'steps [3, 4, 5]', '7 steps from 1 to 12')
    """
    return f"steps {sorted(steps)}" if len(steps) <= 5 else f"{len(steps)} steps from {min(steps)} to {max(steps)}"
