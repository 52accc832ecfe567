"""The covariance store: a plain thread-safe class, used in-process and behind the Ray actor.

Deltas are merged under a lock per layer; the bookkeeping is under one lock, see `windows`.

Memory, see `memory.store_bytes`: 4d² bytes per layer and phase of each open window, up to three times that while it is
published live or saved and deltas go on arriving, and 4d² more for the last published window, which answers
`covariance` and `spectrum`. A window that waits for a late rank lies
in a file. Of each layer that is being decomposed, 24d² bytes: one, or as many as `publisher.DECOMPOSING_BYTES` has room
for where the store has cores to itself. A layer that is sketched with k columns takes 8d(k + 1) bytes in place of 4d².
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from delve_ray import spectrum
from delve_ray.errors import OptionError
from delve_ray.moments import F64, unpack_triangle
from delve_ray.nystrom import head
from delve_ray.sketch import columns_of
from delve_ray.store import answers, registration
from delve_ray.store.attempt import Attempt
from delve_ray.store.door import check_held, check_source
from delve_ray.store.intake import IntakeStore
from delve_ray.store.protocol import Ack, Held, LayerInfo, Progress, Source, StoreConfig, Welcome

log = logging.getLogger(__name__)

SAVE_TIMEOUT_S = 30.0
"""How long a registration waits until it is saved; after that it goes on without."""


class CovarianceStore(IntakeStore):
    """Merges the moments of all workers of one run in float64 and publishes each window when it is complete.

    With `saver`, what it has survives it: workers keep what no snapshot has. Without, it lives and dies with the
    process of its one worker.

    Example:
        >>> import tempfile, numpy as np
        >>> from delve_ray.store.protocol import Delta
        >>> config = StoreConfig(run="doc", savefile=tempfile.mkdtemp() + "/doc", world_size=1)
        >>> store = CovarianceStore(config)
        >>> source = Source("doc", token="", rank=0, source="a", host="localhost", pid=1)
        >>> store.register(source, config, [LayerInfo("fc", "Linear", 1)])
        Welcome(attempt=0, window=0)
        >>> entries = ((0, 0, 4, 0),)  # layer, phase, observations, non-finite rows
        >>> delta = Delta(source, attempt=0, seq=0, window=0, step=0, closes=True, labelled=True, entries=entries)
        >>> moments = np.array([1.5, 8.0])  # mean, scatter
        >>> store.take(delta.sealed(moments), moments).merged
        True
        >>> store.leave(source, completed=True, sent=1).finished, store.wait_finished(10)
        (True, True)
        >>> store.covariance("fc", "train")
        array([[2.]])
    """

    # --- who takes part --------------------------------------------------------------------------------------

    def settings(self) -> StoreConfig:
        """How the run is published."""
        return self.config

    def register(
        self, source: Source, config: StoreConfig, layers: Sequence[LayerInfo], held: Held | None = None
    ) -> Welcome:
        """Join the run. See `protocol.Store.register`."""
        check_source(source, self.config.run)
        if held is not None:
            check_held(held)
        with self._lock:
            while self._opening:
                self._changed.wait()
            current = self.attempts[-1] if self.attempts else None
            known = current.members.get(source.rank) if current is not None else None
            if self.ending is None and current is not None and known is not None and known.source == source:
                known.heard = time.monotonic()
                return Welcome(current.number, known.next_window)
            registration.check(self, source, config, layers, held)
            if self.publisher is None:
                own = self.config
                own = replace(own, recording=own.recording or config.recording, model=own.model or config.model)
                own = replace(
                    own, trial=own.trial or config.trial, trial_config=own.trial_config or config.trial_config
                )
                self._open_first(own, layers)
                current = self.attempts[-1] if self.attempts else None
            begins = current is None or current.token != source.token
            if current is None or begins:
                current = self._begin_attempt(source.token, config.world_size, held)
            member = registration.admit(current, source, held)
            self._touch(member)
            self._advance(current)
            welcome = Welcome(current.number, member.next_window)
        if self._run_file is not None:
            self._run_file.write_if_changed()
        # A restarted store has to know which attempt is the last; everything else its workers would tell it.
        if begins and self.saver is not None and not self.saver.wait_saved(self._version, SAVE_TIMEOUT_S):
            log.error("run %s: the registration of rank %d could not be saved", self.config.run, source.rank)
        return welcome

    def _begin_attempt(self, token: str, world_size: int, held: Held | None) -> Attempt:
        """All workers were started anew: publish what the last attempt left open and begin at window 0.

        What belongs to a window that the last attempt had closed may still arrive, see `check_late`.
        """
        if self.attempts:
            last = self.attempts[-1]
            self._submit(last, [w for _, w in sorted(last.windows.items()) if not w.published or w.changed])
        number = len(self.tokens) if held is None else held.attempt
        self.tokens += [None] * (number + 1 - len(self.tokens))
        self.tokens[number] = token
        attempt = Attempt(number, token, world_size, published=0 if held is None else held.window)
        self.attempts = [*self.attempts[-1:], attempt]
        if self._run_file is not None:
            self._run_file.begin_attempt(number, world_size)
        return attempt

    def heartbeat(self, source: Source, outbox: Mapping[str, int] | None = None) -> Ack:
        """Say that the source is alive. See `protocol.Store.heartbeat`."""
        with self._lock:
            attempt, member = self._find(source)
            member.heard = time.monotonic()
            member.outbox = dict(outbox or {})
            return self._ack(attempt, member)

    def leave(self, source: Source, *, completed: bool, sent: int, timeout: float = 0.0) -> Ack:
        """Deregister. See `protocol.Store.leave`.

        A rank that completed counts as having closed all further windows, without rows. Without `completed` (the
        worker ends by an exception) the run stays open for a next attempt.
        """
        with self._lock:
            attempt, member = self._find(source)
            member.heard = time.monotonic()
            there = member.next_seq >= sent
            if completed and there and not member.left:
                attempt.leave(member)
                for window in attempt.windows.values():
                    if source.rank not in window.closed:
                        window.touch()
                self._touch(member)
                self._advance(attempt)
                if attempt is self.attempts[-1] and len(attempt.left) == attempt.world_size:
                    self._finish("closed")
            if self.saver is not None and self.ending is None:
                self.saver.hurry()
            ack = replace(self._ack(attempt, member), left=member.left or (there and not completed))
            if ack.finished or not (ack.left and ack.saved):
                attempt.waiting.add(source.rank)
            else:
                attempt.waiting.discard(source.rank)
            return ack

    # --- answers -----------------------------------------------------------------------------------------------

    def progress(self, timeout: float = 0.0) -> Progress:
        """How far publication is, with the latest metrics; the answer comes at once."""
        publisher = self.running()
        with self._lock:
            published = self.attempts[-1].published if self.attempts else 0
            missing = self.attempts[-1].first_missing(published) if self.attempts else ()
        return Progress(
            published, publisher.finished.is_set(), missing, publisher.metrics(), tuple(answers.problems(self))
        )

    def covariance(self, layer: str, phase: str) -> F64:
        """The last published population covariance of a layer, float64, shape (d, d).

        Raises KeyError for a layer, phase or combination of which nothing has been published since the store was
        started, OptionError for a layer that is sketched and has none.
        """
        latest = answers.find_latest(self, layer, phase)
        if columns_of(latest.packed.size, latest.mean.size):
            raise OptionError(
                f"layer {layer} has {latest.mean.size} features, more than max_features={self.config.max_features}, "
                f"and is sketched: there is no covariance of it; spectrum() has the head of its spectrum; raise "
                f"max_features for all of it"
            )
        return unpack_triangle(latest.packed, latest.mean.size, divisor=latest.weight or 1.0)

    def spectrum(self, layer: str, phase: str) -> F64:
        """The eigenvalues of `covariance`, float64, descending; of a sketched layer, those that its row has."""
        latest = answers.find_latest(self, layer, phase)
        if columns_of(latest.packed.size, latest.mean.size):
            samples = latest.n or None
            return head(latest.packed, latest.mean.size, latest.weight, self.config.product_eps, samples).eigenvalues
        return spectrum.eigenvalues(self.covariance(layer, phase))

    @property
    def finished(self) -> bool:
        """Whether everything is published and written, and the run has ended."""
        return self.ending is not None if self.publisher is None else self.publisher.finished.is_set()

    @property
    def deserted(self) -> bool:
        """Whether the processes of all workers have ended, as far as this machine can see: nobody will ask."""
        with self._lock:
            return all(member.gone for attempt in self.attempts for member in attempt.members.values())

    @property
    def joined(self) -> bool:
        """Whether a worker has ever registered."""
        return self.publisher is not None

    def status(self) -> dict[str, Any]:
        """Ranks, windows, memory, snapshots and writers, for people and tools."""
        with self._lock:
            return answers.status(self)

    def flush(self, timeout: float) -> bool:
        """Publish what has arrived, open windows as live rows, and wait until it is written; False if not in time."""
        publisher = self.running()
        with self._lock:
            publisher.submit(self._live_jobs())
        return publisher.flush(timeout)

    def abandon(self) -> bool:
        """End the run if nobody has ever joined it; whether it has ended."""
        with self._lock:
            if self.publisher is None and not self._opening:
                self.ending = "nobody joined it"
            unused = self.publisher is None and self.ending is not None
        if unused and self.saver is not None:
            self.saver.stop()
        return self.ending is not None

    def wait_finished(self, timeout: float) -> bool:
        """Wait until everything is published and written after the last `leave`."""
        return self.running().finished.wait(timeout)

    def goodbye(self, source: Source) -> bool:
        """A source has its last answer; whether nobody waits for one any more."""
        with self._lock:
            for attempt in self.attempts:
                member = attempt.members.get(source.rank)
                if member is not None and member.source == source:
                    attempt.waiting.discard(source.rank)
            return not any(attempt.waiting for attempt in self.attempts)

    def end(self, source: Source) -> None:
        """Nothing to release: the threads end by themselves once the run has finished."""
