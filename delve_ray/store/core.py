"""The covariance store: a plain thread-safe class, used in-process and behind the Ray actor.

Deltas are merged under a lock per layer; bookkeeping is done under one lock that is never held while merging,
decomposing or writing. The publisher's thread turns complete windows (and, every `publish_every` seconds, open
ones) into rows; each writer has a thread of its own behind it.

Memory: 4d² bytes per layer and phase of each open window, and 4d² more for the last published window, which
answers `covariance` and `spectrum`.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from delve_ray import spectrum
from delve_ray.errors import DeltaRefused, OptionError, RegistrationError, StoreError
from delve_ray.moments import F64, unpack_triangle
from delve_ray.schema import PHASES
from delve_ray.storage import Storage
from delve_ray.store.description import config_difference, describe_run, layer_difference
from delve_ray.store.protocol import Ack, Delta, LayerInfo, Progress, Source, StoreConfig, Welcome, moments_size
from delve_ray.store.publisher import Latest, Publisher
from delve_ray.store.window import Job, Window, check_delta
from delve_ray.writers import make_writers
from delve_ray.writers.base import Scalar, Writer

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Member:
    """A registered source and what the store has of it."""

    source: Source
    next_seq: int = 0
    next_window: int = 0
    heard: float = field(default_factory=time.monotonic)
    left: bool = False
    # Held while a delta of this source is taken: repeated deliveries of one delta wait for the first.
    lock: threading.Lock = field(default_factory=threading.Lock)


class CovarianceStore:
    """Merges the moments of all workers of one run in float64 and publishes each window when it is complete.

    Example:
        >>> import tempfile, numpy as np
        >>> config = StoreConfig(run="doc", savefile=tempfile.mkdtemp() + "/doc", world_size=1)
        >>> store = CovarianceStore(config)
        >>> source = Source("doc", token="", rank=0, source="a", host="localhost", pid=1)
        >>> store.register(source, config, [LayerInfo("fc", "Linear", 1)])
        Welcome(attempt=0)
        >>> entries = ((0, 0, 4, 0),)  # layer, phase, observations, non-finite rows
        >>> delta = Delta(source, attempt=0, seq=0, window=0, step=0, closes=True, labelled=True, entries=entries)
        >>> store.take(delta, np.array([1.5, 8.0])).merged  # mean, scatter
        True
        >>> store.leave(source, completed=True).finished, store.wait_finished(10)
        (True, True)
        >>> store.covariance("fc", "train")
        array([[2.]])
    """

    def __init__(self, config: StoreConfig, *, writers: Sequence[Writer] | None = None) -> None:
        self.config = config
        self._given_writers = writers
        self._layers: list[LayerInfo] = []
        self._attempt = -1
        self._token: str | None = None
        self._members: dict[int, _Member] = {}
        self._windows: dict[int, Window] = {}
        self._widths: dict[int, int] = {}  # of layers whose first forward tells
        self._refused = 0
        self._ending = False
        self._next_live = time.monotonic() + config.publish_every
        self._publisher: Publisher | None = None
        self._lock = threading.RLock()

    # --- who takes part --------------------------------------------------------------------------------------

    def settings(self) -> StoreConfig:
        """How the run is published."""
        return self.config

    def register(self, source: Source, config: StoreConfig, layers: Sequence[LayerInfo]) -> Welcome:
        """Join the run. See `protocol.Store.register`."""
        with self._lock:
            self._check_member(source, config, layers)
            if self._publisher is None:
                self._open(replace(self.config, recording=self.config.recording or config.recording), layers)
            if self._token != source.token:
                self._begin_attempt(source.token)
            self._members[source.rank] = _Member(source)
            return Welcome(self._attempt)

    def _check_member(self, source: Source, config: StoreConfig, layers: Sequence[LayerInfo]) -> None:
        run = self.config.run
        if self._ending:
            raise RegistrationError(f"run {run!r} has ended; choose another run name to start a new one")
        if difference := config_difference(self.config, config, source.rank):
            raise RegistrationError(difference)
        if not 0 <= source.rank < self.config.world_size:
            raise RegistrationError(f"rank={source.rank} is not in 0 … {self.config.world_size - 1} of run {run!r}")
        if self._layers and list(layers) != self._layers:
            raise RegistrationError(
                f"run {run!r} exists with other layers: {layer_difference(self._layers, layers)}; "
                f"give this run another name, or track the same model in every worker"
            )
        member = self._members.get(source.rank)
        if member is not None and self._token == source.token:
            held = "has already left" if member.left else "is tracked already"
            raise RegistrationError(
                f"rank {source.rank} of run {run!r} {held} (by pid {member.source.pid} on {member.source.host}); "
                f"give each worker its own rank=, and each training its own run="
            )

    def _open(self, config: StoreConfig, layers: Sequence[LayerInfo]) -> None:
        """Prepare the savefile and start publishing; on an error nothing has been started."""
        if not config.save_to:
            writers: Sequence[Writer] = ()
        elif self._given_writers is not None:
            writers = self._given_writers
        else:
            storage = Storage(config.savefile)
            storage.prepare()
            writers = make_writers(config.save_to, storage)
            if not storage.write_new("run.json", describe_run(config, layers)):
                raise OptionError(
                    f"savefile={config.savefile!r} holds a run already; choose another savefile or remove that one"
                )
        self.config = config
        self._layers = list(layers)
        self._publisher = Publisher(config, layers, writers, self._due_windows)

    def _begin_attempt(self, token: str) -> None:
        """All workers were started anew: publish what the last attempt left open and begin at window 0."""
        if self._windows:
            open_windows = [self._windows[ordinal] for ordinal in sorted(self._windows)]
            self._running().submit([window.job(self._attempt, final=True) for window in open_windows])
        self._attempt += 1
        self._token = token
        self._members, self._windows, self._widths = {}, {}, {}

    def heartbeat(self, source: Source) -> Ack:
        """Say that the source is alive."""
        with self._lock:
            self._member(source).heard = time.monotonic()
            return self._ack()

    def leave(self, source: Source, *, completed: bool, timeout: float = 0.0) -> Ack:
        """Deregister. A rank that completed counts as having closed all further windows, without rows.

        Without `completed` (the worker ends by an exception) the run stays open for a next attempt.
        """
        with self._lock:
            member = self._member(source)
            member.left = member.left or completed
            if completed:
                for window in list(self._windows.values()):
                    self._complete_if_closed(window)
                if sum(m.left for m in self._members.values()) == self.config.world_size:
                    self._finish()
            return self._ack()

    def _member(self, source: Source) -> _Member:
        member = self._members.get(source.rank)
        if member is None or member.source != source:
            raise DeltaRefused(
                f"rank {source.rank} (pid {source.pid} on {source.host}) is not registered in attempt {self._attempt} "
                f"of run {self.config.run!r}: a later attempt has begun, or the store was started anew"
            )
        return member

    def _ack(self, *, merged: bool = True, refused: Mapping[int, int] | None = None) -> Ack:
        published = self._running().published(self._attempt)
        return Ack(published, merged, self._ending, tuple((refused or {}).items()))

    # --- deltas ----------------------------------------------------------------------------------------------

    def take(self, delta: Delta, buffer: F64) -> Ack:
        """Merge a delta once. See `protocol.Store.take`."""
        try:
            return self._take(delta, buffer)
        except DeltaRefused:
            with self._lock:
                self._refused += 1
            raise

    def _take(self, delta: Delta, buffer: F64) -> Ack:
        with self._lock:
            member = self._member(delta.source)
            member.heard = time.monotonic()
        with member.lock:
            if delta.seq < member.next_seq:
                with self._lock:
                    return self._ack(merged=False)
            if delta.seq > member.next_seq:
                raise DeltaRefused(
                    f"delta {delta.seq} of rank {delta.source.rank} came before delta {member.next_seq}; send in order"
                )
            widths = check_delta(delta, buffer, self._layers)
            with self._lock:
                self._check_taking(delta)
                window = self._window(delta, member)
                # Rows of another width than elsewhere cost their layer, not all that came with it.
                refused = {i: self._widths[i] for i, d in delta.widths if self._widths.get(i, d) != d}
                self._widths = dict(delta.widths) | self._widths
                entries = [
                    None if layer in refused else window.entry(layer, phase, d)
                    for (layer, phase, *_), d in zip(delta.entries, widths, strict=True)
                ]
            ends = list(itertools.accumulate(map(moments_size, widths)))
            for entry, start, end, (_, _, n, nonfinite) in zip(entries, [0, *ends], ends, delta.entries, strict=False):
                if entry is not None:
                    entry.add(n, nonfinite, buffer[start:end])
            with self._lock:
                member.next_seq += 1
                window.changed = True
                if delta.closes:
                    member.next_window = delta.window + 1
                    window.closed.add(delta.source.rank)
                    self._complete_if_closed(window)
                self._refused += bool(refused)
                return self._ack(refused=refused)

    def _check_taking(self, delta: Delta) -> None:
        """Whether the run, and this attempt of it, still goes on."""
        self._member(delta.source)
        if delta.attempt != self._attempt:
            raise DeltaRefused(f"a delta of attempt {delta.attempt}, but run {self.config.run!r} is at {self._attempt}")
        if self._ending:
            raise StoreError(f"run {self.config.run!r} has ended and takes no more rows", final=True)

    def _window(self, delta: Delta, member: _Member) -> Window:
        """The open window that a delta belongs to; the first rank to close a window sets its step."""
        rank = delta.source.rank
        if delta.window != member.next_window:
            raise DeltaRefused(f"rank {rank} sends window {delta.window} while its window {member.next_window} is open")
        window = self._windows.get(delta.window)
        if window is None:
            window = self._windows[delta.window] = Window(delta.window, delta.step)
        elif delta.labelled and window.labelled and window.step != delta.step:
            raise DeltaRefused(
                f"rank {rank} closes window {window.ordinal} as step {delta.step}, ranks {sorted(window.closed)} as "
                f"step {window.step}; call add_saturations(step) with the same steps in every worker"
            )
        if delta.labelled or not window.labelled:
            window.step, window.labelled = delta.step, delta.labelled
        return window

    def _complete_if_closed(self, window: Window) -> None:
        """Hand a window to the publisher once every rank has closed it or has left for good."""
        left = {rank for rank, member in self._members.items() if member.left}
        if len(window.closed | left) == self.config.world_size and self._windows.pop(window.ordinal, None) is not None:
            window.closed |= left
            self._running().submit([window.job(self._attempt, final=True)])

    # --- publishing ------------------------------------------------------------------------------------------

    def _due_windows(self) -> list[Job]:
        """Called by the publisher now and then: ends a run that nobody is left of, and picks what to show live."""
        now = time.monotonic()
        with self._lock:
            silence = now - max((member.heard for member in self._members.values()), default=now)
            if 0 < self.config.silent_after < silence and not self._ending:
                log.warning(
                    "run %s is ended: none of its workers was heard of for %.0f s; what had arrived is published",
                    self.config.run,
                    silence,
                )
                self._finish()
                return []
            if not self.config.publish_every or now < self._next_live or self._ending:
                return []
            self._next_live = now + self.config.publish_every
            return self._live_jobs()

    def _live_jobs(self) -> list[Job]:
        return [window.job(self._attempt, final=False) for window in self._windows.values() if window.changed]

    def _finish(self) -> None:
        """Publish what is open and end; nothing is taken from now on."""
        self._ending = True
        windows = [self._windows.pop(ordinal) for ordinal in sorted(self._windows)]
        self._running().submit([window.job(self._attempt, final=True) for window in windows], end=True)

    def _running(self) -> Publisher:
        if self._publisher is None:
            raise StoreError(f"run {self.config.run!r} has no worker yet; a tracker registers when it is constructed")
        return self._publisher

    def add_scalars(self, scalars: list[Scalar]) -> None:
        """Hand user scalars to the writers."""
        with self._lock:
            if self._ending:
                raise StoreError(f"run {self.config.run!r} has ended and takes no scalars", final=True)
            self._running().write_scalars(scalars, self._attempt)

    # --- answers -----------------------------------------------------------------------------------------------

    def progress(self, timeout: float = 0.0) -> Progress:
        """How far publication is, with the latest metrics; the answer comes at once."""
        publisher = self._running()
        with self._lock:
            published = publisher.published(self._attempt)
            window = self._windows.get(published)
            done = set(window.closed) if window else set()
            done |= {rank for rank, member in self._members.items() if member.left}
        missing = tuple(sorted(set(range(self.config.world_size)) - done))
        return Progress(
            published, publisher.finished.is_set(), missing, publisher.metrics(), tuple(publisher.problems())
        )

    def covariance(self, layer: str, phase: str) -> F64:
        """The last published population covariance of a layer, float64, shape (d, d).

        Raises KeyError for a layer, phase or combination of which nothing has been published.
        """
        latest = self._find(layer, phase)
        return unpack_triangle(latest.packed / max(latest.n, 1), latest.mean.size)

    def spectrum(self, layer: str, phase: str) -> F64:
        """The eigenvalues of `covariance`, float64, descending."""
        return spectrum.eigenvalues(self.covariance(layer, phase))

    def _find(self, layer: str, phase: str) -> Latest:
        publisher = self._running()
        names = [info.name for info in self._layers]
        if layer not in names:
            raise KeyError(f"run {self.config.run!r} has no layer {layer!r}; its layers: {', '.join(names)}")
        if phase not in PHASES:
            raise KeyError(f"phase {phase!r} is none of {PHASES}")
        latest = publisher.latest(names.index(layer), PHASES.index(phase))
        if latest is None:
            raise KeyError(f"nothing of layer {layer!r} in phase {phase!r} has been published yet")
        return latest

    @property
    def finished(self) -> bool:
        """Whether everything is published and written, and the run has ended."""
        return self._ending if self._publisher is None else self._publisher.finished.is_set()

    @property
    def joined(self) -> bool:
        """Whether a worker has ever registered."""
        return self._publisher is not None

    def status(self) -> dict[str, Any]:
        """Ranks, windows, memory and writers, for people and tools."""
        publisher = self._publisher
        now = time.monotonic()
        with self._lock:
            entries = [entry for window in self._windows.values() for entry in window.entries.values()]
            ranks = {
                rank: {"deltas": m.next_seq, "window": m.next_window, "silent_s": now - m.heard, "left": m.left}
                for rank, m in sorted(self._members.items())
            }
            state: dict[str, Any] = {
                "run": self.config.run,
                "savefile": self.config.savefile,
                "attempt": self._attempt,
                "world_size": self.config.world_size,
                "ranks": ranks,
                "open_windows": sorted(self._windows),
                "refused": self._refused,
                "bytes": sum(entry.total.packed.nbytes for entry in entries),
            }
        if publisher is not None:
            state["bytes"] += publisher.latest_bytes()
            state["published"] = publisher.published(self._attempt)
            state["problems"] = publisher.problems()
            state["writers"] = [writer.status() for writer in publisher.writers]
            state["finished"] = publisher.finished.is_set()
        return state

    def flush(self, timeout: float) -> bool:
        """Publish what has arrived, open windows as live rows, and wait until it is written; False if not in time."""
        publisher = self._running()
        with self._lock:
            publisher.submit(self._live_jobs())
        return publisher.flush(timeout)

    def abandon(self) -> bool:
        """End the run if nobody has ever joined it; whether it has ended."""
        with self._lock:
            if self._publisher is None:
                self._ending = True
            return self._ending

    def wait_finished(self, timeout: float) -> bool:
        """Wait until everything is published and written after the last `leave`."""
        return self._running().finished.wait(timeout)

    def end(self) -> None:
        """Nothing to release: the threads end by themselves once the run has finished."""
