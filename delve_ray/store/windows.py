"""The windows of a store, as its publisher and its saver deal with them: open, published, parked, saved, restored.

All state is under one lock that is never held while merging, packing, decomposing, writing or reading files. The
publisher's thread turns complete windows (and, every `publish_every` seconds, open ones) into rows; each writer has a
thread of its own behind it; the saver's thread writes snapshots.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import replace

import pyarrow as pa

from delve_ray.errors import OptionError, ReadError, StoreError
from delve_ray.storage import Storage, masked
from delve_ray.store import registration
from delve_ray.store.attempt import Attempt, Member
from delve_ray.store.protocol import NOT_ON_DISK, LayerInfo, StoreConfig, ranks_text
from delve_ray.store.publisher import Publisher
from delve_ray.store.publishing import Compute, layer_row
from delve_ray.store.run_file import RunFile
from delve_ray.store.saving import FOLDER, Saver, load_window, rescue_folder, save_once
from delve_ray.store.state import Frozen, State, freeze, freeze_window
from delve_ray.store.timings import Timings
from delve_ray.store.window import Cut, Job, Window
from delve_ray.writers.base import Scalar, Writer
from delve_ray.writers.parquet import revisions

log = logging.getLogger(__name__)

UNWRITTEN_BYTES = 256 << 20
"""Moments of complete windows that are kept until every writer has written them; of older ones the rows remain, in the
queue of the writer that is behind."""
FINISH_TIMEOUT_S = 60.0
"""How long the writers may take to write what is queued when the run ends."""


class WindowStore:
    """The state of a run's store and its windows; `IntakeStore` adds the deltas, `CovarianceStore` all else.

    `cores` is how many cores it may use. In the process of a training loop that is one: the others are the loop's.
    `compute` turns moments into rows, and may have up to `elsewhere` of them done by others.
    """

    def __init__(
        self,
        config: StoreConfig,
        *,
        writers: Sequence[Writer] | None = None,
        saver: Saver | None = None,
        finish_timeout: float = FINISH_TIMEOUT_S,
        cores: int = 1,
        compute: Compute = layer_row,
        elsewhere: int = 0,
    ) -> None:
        self.config = config
        self._compute, self._elsewhere, self._cores = compute, elsewhere, cores
        self.layers: list[LayerInfo] = []
        self.attempts: list[Attempt] = []  # the current one last, and the one before it
        self.tokens: list[str | None] = []  # of all attempts, by number; None of one that nobody knows
        self.publisher: Publisher | None = None
        self.saver = saver
        self.counts = {"deltas": 0, "bytes": 0, "refused": 0, "late": 0, "repeated": 0}
        self.counts |= {"bundles": 0, "bundled": 0}  # of the deltas, those that came merged with each other
        self.timings = Timings()
        self.ending: str | None = None  # why
        self.abandoned = False  # whether no worker is left that could ask for anything
        self._given_writers = writers
        self._finish_timeout = finish_timeout
        self._run_file: RunFile | None = None
        self._on_disk: dict[tuple[int, int], int] = {}  # revisions that were there before this store
        self._scalars: dict[tuple[str, int], tuple[Scalar, ...]] = {}  # not written yet, by source and sequence number
        self._version = self._merging = 0
        self._freezing = False
        self._opening = False  # the writers, for the first worker
        self._next_live = time.monotonic() + config.publish_every
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        if saver is not None:
            saver.start(self)

    # --- begin and go on ---------------------------------------------------------------------------------------

    def _open_first(self, config: StoreConfig, layers: Sequence[LayerInfo]) -> None:
        """`_open`, called with the lock held once; it is free while the writers open, which may take long."""
        self._opening = True
        self._lock.release()
        try:
            prepared = registration.prepare(config, layers, self._given_writers)
        finally:
            self._lock.acquire()
            self._opening = False
            self._changed.notify_all()
        self._open(config, layers, prepared=prepared)

    def _open(
        self,
        config: StoreConfig,
        layers: Sequence[LayerInfo],
        state: State | None = None,
        prepared: tuple[RunFile | None, Sequence[Writer]] | None = None,
    ) -> None:
        """Prepare the savefile if it is not, and start publishing, from a state if there is one; or start nothing."""
        run_file, writers = prepared or registration.prepare(config, layers, self._given_writers, later=bool(state))
        if state is None and config.resume and config.save_to and self._given_writers is None:
            state = (self.saver or Saver(Storage(config.savefile), 0.0)).load()
            state = None if state is None else state.closed()
        self.config, self.layers, self._run_file = config, list(layers), run_file
        computing = (self._cores, self.timings, self._compute, self._elsewhere)
        self.publisher = Publisher(config, layers, writers, self, self._finish_timeout, *computing)
        if config.resume and config.save_to:
            self._on_disk = revisions(Storage(config.savefile))
        if state is not None:
            self._adopt(state)
        if run_file is not None:
            self.tokens += [None] * (run_file.attempts - len(self.tokens))

    def restore(self) -> bool:
        """Go on where the store of this run was that this one replaces; whether there was anything to go on from.

        A run that was ending ends. Raises OSError where the storage cannot be read.
        """
        state = self.saver.load() if self.saver is not None and self.config.save_to else None
        if state is None:
            return False
        own = {name: getattr(self.config, name) for name in ("savefile", *NOT_ON_DISK)}
        self.go_on(replace(state, config=replace(state.config, resume=True, **own)))
        return True

    def go_on(self, state: State) -> None:
        """Go on from a state; only before any worker has come."""
        with self._lock:
            self._open(state.config, state.layers, state)

    def _adopt(self, state: State) -> None:
        """Take over a saved state: publish again what may not have been written, each as a new revision."""
        self.tokens, self.attempts = state.tokens, state.attempts
        self.running().restore_metrics(state.metrics)
        for attempt in self.attempts:
            if self._run_file is not None:
                self._run_file.begin_attempt(attempt.number, attempt.world_size)
            for ordinal, window in attempt.windows.items():
                window.revision = max(window.revision, self.next_revision(attempt.number, ordinal))
            self._submit(attempt, [w for _, w in sorted(attempt.windows.items()) if w.published and w.changed])
            self._advance(attempt)
        for key, scalars in state.scalars.items():
            self._scalars[key] = scalars
            self._write_scalars(key)
        log.warning("run %s: its store was started anew, and goes on where it was", self.config.run)
        self._touch()
        if state.ending is not None:
            self._finish(state.ending)

    def next_revision(self, attempt: int, ordinal: int) -> int:
        """The first revision of a window that no file of a store before this one has."""
        return self._on_disk.get((attempt, ordinal), -1) + 1

    def running(self) -> Publisher:
        """The publisher. Raises StoreError as long as no worker has come."""
        if self.publisher is None:
            raise StoreError(f"run {self.config.run!r} has no worker yet; a tracker registers when it is constructed")
        return self.publisher

    def _touch(self, member: Member | None = None) -> None:
        """Note that the state has changed, by a member or otherwise, so that the saver saves it."""
        self._version += 1
        if member is not None:
            member.changed = self._version
        if self.saver is not None:
            self.saver.notify(self._version)

    def _write_scalars(self, key: tuple[str, int]) -> None:
        def written(everywhere: bool) -> None:
            with self._lock:
                if everywhere:
                    self._scalars.pop(key, None)
                    self._touch()

        self.running().write_scalars(list(self._scalars[key]), written)

    # --- windows ---------------------------------------------------------------------------------------------

    def _advance(self, attempt: Attempt) -> None:
        """Publish what is complete or overdue, in the order of the windows, and drop what is settled."""
        now = time.monotonic()
        silent_before = now - self.config.silent_after if self.config.silent_after else float("-inf")
        kept: list[tuple[int, Window]] = []
        for ordinal, window in sorted(attempt.windows.items()):
            complete = self._is_complete(window, attempt, silent_before)
            if not window.published:
                overdue = window.first_closed is not None and 0 < self.config.late_after < now - window.first_closed
                if not (complete or overdue) or not self._has_news(window, attempt):
                    break
                if missing := attempt.missing(ordinal):
                    log.warning(
                        "run %s: step %d is published without ranks %s, which have not closed it; what they still send "
                        "corrects it",
                        *(self.config.run, window.step, ranks_text(missing)),
                    )
                self._submit(attempt, [window])
            elif complete and self._has_news(window, attempt):
                log.info("run %s: step %d is corrected by what came late", self.config.run, window.step)
                self._submit(attempt, [window])
            if complete and self._is_settled(window, attempt):
                del attempt.windows[ordinal]
                self._touch()
            elif complete and window.published and not window.parked:
                kept.append((ordinal, window))
        # What a writer is behind with stays in memory up to a bound, the newest windows first.
        room = UNWRITTEN_BYTES
        for ordinal, window in reversed(kept):
            room -= sum(entry.nbytes for entry in window.entries.values())
            if room < 0:
                del attempt.windows[ordinal]

    def _is_complete(self, window: Window, attempt: Attempt, silent_before: float) -> bool:
        """Whether nobody is waited for any more."""
        return not attempt.is_awaited(window, silent_before)

    def _has_news(self, window: Window, attempt: Attempt) -> bool:
        """Whether a complete window may be published: for the first time, or corrected."""
        return window.changed or not window.published

    def _is_settled(self, window: Window, attempt: Attempt) -> bool:
        """Whether a complete window is published and written as it is."""
        return window.published and not window.changed and not window.unwritten

    def _submit(self, attempt: Attempt, windows: Sequence[Window]) -> None:
        jobs = [window.job(attempt.number, attempt.world_size, attempt.left, final=True) for window in windows]
        self.running().submit(jobs)

    def _finish(self, why: str) -> None:
        """Publish what is open and end; nothing is taken from now on."""
        self.ending = why
        while self._merging:
            self._changed.wait()
        for attempt in self.attempts:
            self._submit(attempt, [w for _, w in sorted(attempt.windows.items()) if w.changed or not w.published])
        self._touch()
        self.running().submit([], end=True)

    # --- called by the publisher -----------------------------------------------------------------------------

    def poll(self) -> list[Job]:
        """Ends a run that nobody is left of, publishes what is overdue, and picks what to show live."""
        now = time.monotonic()
        if self._run_file is not None:
            self._run_file.write_if_changed()
        with self._lock:
            if self.ending is not None or not self.attempts:
                return []
            silence = self._silence(now)
            if 0 < self.config.silent_after < silence:
                self._give_up(f"none of its workers was heard of for {silence:.0f} s")
                return []
            if 0 < self.config.gone_after < silence and self._all_gone():
                self.abandoned = True
                self._give_up("the processes of all its workers have ended")
                return []
            for attempt in self.attempts:
                self._advance(attempt)
            if not self.config.publish_every or now < self._next_live:
                return []
            self._next_live = now + self.config.publish_every
            return self._live_jobs()

    def _silence(self, now: float) -> float:
        """Seconds since any worker was heard of."""
        heard = [member.heard for attempt in self.attempts for member in attempt.members.values()]
        return now - max(heard, default=now)

    def _all_gone(self) -> bool:
        """Whether no worker that has not left has a process."""
        members = self.attempts[-1].members.values()
        return bool(members) and all(member.left or member.gone for member in members)

    def _give_up(self, why: str) -> None:
        """End a run that nobody is left of."""
        log.warning("run %s is ended: %s; what had arrived is published", self.config.run, why)
        self._finish(why)

    def _live_jobs(self) -> list[Job]:
        if not self.attempts:
            return []
        attempt = self.attempts[-1]
        fresh = [window for window in attempt.windows.values() if window.changed and not window.published]
        return [w.job(attempt.number, attempt.world_size, attempt.left, final=False) for w in fresh]

    def announced(self, job: Job) -> None:
        """A final window is decomposed, and its metrics are there."""
        with self._lock:
            for attempt in self.attempts:
                if attempt.number == job.attempt:
                    attempt.published = max(attempt.published, job.ordinal + 1)

    def written(self, job: Job, everywhere: bool) -> None:
        """Every writer has written a final window, or has given it up; then it is kept as long as there is room."""
        with self._lock:
            for attempt in self.attempts:
                window = attempt.windows.get(job.ordinal)
                if attempt.number == job.attempt and window is not None and everywhere:
                    window.unwritten -= 1
                    self._touch()
                    if self.ending is None:
                        self._advance(attempt)
                    elif not attempt.missing(job.ordinal) and not window.unwritten:
                        del attempt.windows[job.ordinal]

    def ended(self) -> None:
        """The writers are closed: say in the files how the run has ended, and keep what a recovery would need."""
        if self.saver is not None:
            self.saver.stop()
        with self._lock:
            unwritten = self._scalars or [w for a in self.attempts for w in a.windows.values() if w.unwritten]
        if unwritten and (self.saver is None or self.saver.last_error is not None):
            self._rescue()
        if self._run_file is not None:
            self._run_file.end(self.ending or "", self.running().problems())

    def _rescue(self) -> None:
        """Keep what the writers could not write, where there is room: beside the files, or on this machine."""
        for place in (self.config.savefile, rescue_folder(self.config.run)):
            try:
                storage = Storage(place)
                save_once(storage, self.freeze())
            except (OSError, OptionError, pa.ArrowException):
                continue
            where = storage.uri
            self.running().problem(
                f"what could not be written is kept on {socket.gethostname()} in {where}/{FOLDER}; "
                f"`delve-ray recover {masked(self.config.savefile)} {where}` writes it"
            )
            return
        self.running().problem("what could not be written is lost: there is no room for it on this machine either")

    def finish(self, why: str) -> None:
        """Publish what is open and end the run."""
        with self._lock:
            if self.ending is None:
                self._finish(why)

    def unpark(self, window: Window) -> None:
        """Read a parked window's entries back; called without the lock."""
        name = window.parked
        if name is None:
            return
        try:
            entries, lost = load_window(Storage(self.config.savefile), name), False
        except (ReadError, OSError) as error:
            with self._lock:
                if window.parked != name:  # somebody else was first, and the file is not needed any more
                    return
            self.running().problem(f"what had come for step {window.step} is lost: {error}")
            entries, lost = {}, True
        with self._lock:
            if window.parked == name:
                window.entries, window.parked = entries, None
                window.broken |= window.closed if lost else set()

    # --- called by the saver ---------------------------------------------------------------------------------

    def freeze(self) -> Frozen:
        """A consistent cut: every delta is in it wholly or not at all."""
        with self._lock:
            self._hold()
            try:
                metrics = {} if self.publisher is None else self.publisher.metrics()
                state = State(self.config, self.layers, self.tokens, self.attempts, self.ending, self._scalars, metrics)
                return freeze(state, self._version)
            finally:
                self._release()

    def parkable(self) -> list[tuple[Window, int, list[list[float]], list[Cut]]]:
        """Windows that are published and written, and wait for a late rank."""
        with self._lock:
            self._hold()
            try:
                return [
                    (window, window.version, *freeze_window(window))
                    for attempt in self.attempts
                    for window in attempt.windows.values()
                    if window.published and not (window.unwritten or window.changed) and window.entries
                ]
            finally:
                self._release()

    def parked(self, handle: Window, version: int, name: str) -> None:
        """A window is in a file; if nothing has arrived since, its entries leave the memory."""
        with self._lock:
            if handle.version == version and not (handle.unwritten or handle.changed):
                handle.entries, handle.parked = {}, name

    def _hold(self) -> None:
        """Let no delta begin to be merged, and wait for those that are; the lock is held."""
        self._freezing = True
        while self._merging:
            self._changed.wait()

    def _release(self) -> None:
        self._freezing = False
        self._changed.notify_all()
