"""The front of a store with shards: all that a store is but the moments."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa

from delve_ray.errors import StoreError
from delve_ray.schema import PublishedWindow
from delve_ray.storage import Storage
from delve_ray.store.assignment import shards_of
from delve_ray.store.attempt import Attempt
from delve_ray.store.core import CovarianceStore
from delve_ray.store.earlier import Earlier, final_windows, read_parts
from delve_ray.store.parts import LOST, PENDING, UNKNOWN, WITHOUT_S, WRITTEN, Key, Parts
from delve_ray.store.protocol import LayerInfo, StoreConfig
from delve_ray.store.state import State
from delve_ray.store.window import Job, Window

log = logging.getLogger(__name__)

MOST_LOST = 256
"""Windows that a writer has given up and that are kept for a recovery, the newest ones."""


class FrontStore(CovarianceStore):
    """Knows a run's workers and has its files; the moments are in `config.num_shards` shards, each a store of its own.

    Workers tell it when they close a window, without moments, after every shard has what belongs to it. The shards
    publish independently; `accept` takes their parts, and a window is written once it is complete and all its parts
    are there. The run ends when all shards have. Nothing of a part is in a snapshot: a shard offers it again until it
    is written. A front that was started anew may thus get some of a window's parts only; the others are in the files.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        self._parts: dict[tuple[int, int], Parts] = {}  # by attempt and ordinal
        self._earlier: dict[tuple[int, int], Earlier] = {}  # what a front before this one has written
        self._lost: dict[tuple[int, int], dict[int, int]] = {}  # given up by a writer: the revisions of the shards
        self._done: set[int] = set()  # shards that have published everything
        self._told: set[tuple[int, str]] = set()  # what shards could not publish
        self._ending_since = 0.0
        self._ended = False
        super().__init__(*args, **options)

    def _open(self, config: StoreConfig, layers: Sequence[LayerInfo], *args: Any, **options: Any) -> None:
        super()._open(config, layers, *args, **options)
        if (idle := config.num_shards - len(layers)) > 0:
            log.warning(
                "run %s: num_shards=%d leaves %d idle, as there are %d layers; num_shards=%d does the same",
                *(config.run, config.num_shards, idle, len(layers), len(layers)),
            )

    def assigned(self) -> dict[str, int]:
        """The shard of each layer, by name."""
        return shards_of(self.layers, self.config)

    # --- called by the shards ----------------------------------------------------------------------------------

    def accept(self, shard: int, part: PublishedWindow, after: Key | None = None, problems: Sequence[str] = ()) -> bool:
        """Take a shard's part of a window, and what it could not publish. See `parts.Front.accept`.

        Raises StoreError for one of an attempt that is not known yet, or where the files cannot be read.
        """
        if after is not None and self.part_state(shard, *after) == UNKNOWN:
            return False
        written = self._written_before(part)
        with self._lock:
            self._tell(shard, problems)
            attempt = self._attempt(part.attempt)
            if attempt is None:
                return True
            window = attempt.windows.get(part.window)
            if window is None:
                if part.window < attempt.published:
                    return True
                window = attempt.windows[part.window] = self._reopened(attempt, part)
            if part.final:
                self._pass_over(attempt, shard, part.window)
            parts = self._parts.get((part.attempt, part.window))
            if parts is None:
                parts = self._parts[part.attempt, part.window] = Parts(newest=dict(written))
                self._earlier.pop((part.attempt, part.window), None)  # from now on this front knows better
            parts.add(shard, part)
            self._advance(attempt)
        return True

    def _written_before(self, part: PublishedWindow) -> dict[int, PublishedWindow]:
        """The parts of a window that a front before this one has written, when the first is offered again."""
        key = part.attempt, part.window
        with self._lock:
            earlier = None if key in self._parts else self._earlier.get(key)
            assigned = self.assigned()
        if earlier is None:
            return {}
        try:
            return read_parts(Storage(self.config.savefile), earlier, assigned)
        except (OSError, pa.ArrowException) as error:
            raise StoreError(f"run {self.config.run!r}: step {part.step} cannot be read: {error}") from error

    def _pass_over(self, attempt: Attempt, shard: int, ordinal: int) -> None:
        """Note what a final part tells a front that was started anew: its shard's earlier windows are written."""
        for before, window in attempt.windows.items():
            parts = self._parts.get((attempt.number, before))
            if before < ordinal and not window.published and (parts is None or shard not in parts.newest):
                window.published = True
                attempt.published = max(attempt.published, before + 1)

    def part_state(self, shard: int, attempt: int, window: int, revision: int) -> str:
        """See `parts.Front.part_state`."""
        with self._lock:
            known = self._attempt(attempt)
            if known is None:
                return WRITTEN
            if self._lost.get((attempt, window), {}).get(shard, -1) >= revision:
                return LOST
            parts = self._parts.get((attempt, window))
            if parts is None:
                return WRITTEN if window not in known.windows and window < known.published else UNKNOWN
            if parts.written.get(shard, -1) >= revision:
                return WRITTEN
            newest = parts.newest.get(shard)
            return UNKNOWN if newest is None or newest.revision < revision else PENDING

    def shard_done(self, shard: int, problems: Sequence[str] = ()) -> None:
        """A shard has published everything that it could, or is gone after the run has ended."""
        with self._lock:
            self._tell(shard, problems)
            self._done.add(shard)
            self._end_if_done()

    def _tell(self, shard: int, problems: Sequence[str]) -> None:
        """Make what a shard could not publish the run's problem, once."""
        for problem in problems:
            if self.publisher is not None and (shard, problem) not in self._told:
                self._told.add((shard, problem))
                self.publisher.problem(f"shard {shard}: {problem}")

    @property
    def undone(self) -> list[int]:
        """Once the run ends, the shards that have not said that they have published everything."""
        with self._lock:
            return [] if self.ending is None else sorted(set(range(self.config.num_shards)) - self._done)

    def _attempt(self, number: int) -> Attempt | None:
        """An attempt that still takes parts; None for one that is settled. Raises StoreError for a later one."""
        for attempt in self.attempts:
            if attempt.number == number:
                return attempt
        if self.attempts and number < self.attempts[0].number:
            return None
        raise StoreError(f"run {self.config.run!r}: attempt {number} is not known yet; its workers have to register")

    def _reopened(self, attempt: Attempt, part: PublishedWindow) -> Window:
        """A window of which no worker has said anything yet."""
        window = Window(part.window, part.step)
        window.closed = self._have_closed(attempt, part.window)
        window.revision = self.next_revision(attempt.number, part.window)
        return window

    @staticmethod
    def _have_closed(attempt: Attempt, ordinal: int) -> set[int]:
        """Ranks that are beyond a window."""
        return {rank for rank, member in attempt.members.items() if member.next_window > ordinal}

    # --- windows -------------------------------------------------------------------------------------------------

    def _advance(self, attempt: Attempt) -> None:
        super()._advance(attempt)
        for number, ordinal in list(self._parts):
            if number == attempt.number and ordinal not in attempt.windows:
                del self._parts[number, ordinal]
        for number, ordinal in list(self._earlier):
            if number == attempt.number and ordinal not in attempt.windows:
                del self._earlier[number, ordinal]

    def _is_complete(self, window: Window, attempt: Attempt, silent_before: float) -> bool:
        # What the shards publish when a run or an attempt ends is all that there will be.
        over = self.ending is not None or attempt is not self.attempts[-1]
        return over or super()._is_complete(window, attempt, silent_before)

    def _has_news(self, window: Window, attempt: Attempt) -> bool:
        parts = self._parts.get((attempt.number, window.ordinal))
        return parts is not None and parts.may_be_published(self.config.num_shards, again=window.published)

    def _is_settled(self, window: Window, attempt: Attempt) -> bool:
        if self.ending is not None or not window.published or window.unwritten:
            return False
        parts = self._parts.get((attempt.number, window.ordinal))
        if parts is None:  # it was published by a front before this one, and the shards may still correct it
            earlier = self._earlier.get((attempt.number, window.ordinal))
            return earlier is not None and earlier.complete
        if attempt.missing(window.ordinal):  # who is missing is not expected any more
            return not parts.fresh
        # Every shard hears of the last rank by itself, and then publishes once more.
        return not parts.fresh and sum(part.complete for part in parts.newest.values()) == self.config.num_shards

    def _submit(self, attempt: Attempt, windows: Sequence[Window]) -> None:
        """Publish windows, of those whose parts are there."""
        jobs = [self._job(attempt, window, final=True) for window in windows if self._has_news(window, attempt)]
        self.running().submit(jobs)

    def _job(self, attempt: Attempt, window: Window, *, final: bool) -> Job:
        parts = self._parts[attempt.number, window.ordinal]
        missing = sorted(set(range(self.config.num_shards)) - set(parts.newest))
        if final and missing and not window.published:
            self.running().problem(f"step {window.step} is published without the layers of shards {missing}")
        job = window.job(attempt.number, attempt.world_size, attempt.left, final=final)
        # What lacks a shard's layers is not complete, whoever has closed it.
        most = attempt.world_size - bool(missing)
        workers = min([job.workers, most, *(part.workers for part in parts.newest.values())])
        if final:
            parts.fresh.clear()
        parts.shown = True
        return replace(job, workers=workers, parts=dict(parts.newest))

    def _live_jobs(self) -> list[Job]:
        if not self.attempts:
            return []
        attempt = self.attempts[-1]
        jobs = []
        for window in attempt.windows.values():
            parts = self._parts.get((attempt.number, window.ordinal))
            if parts and not window.published and not parts.shown and len(parts.newest) == self.config.num_shards:
                jobs.append(self._job(attempt, window, final=False))
        return jobs

    def written(self, job: Job, everywhere: bool) -> None:
        """Every writer has written a window, and its shards let go of it; or one has given it up, and they keep it."""
        key = job.attempt, job.ordinal
        with self._lock:
            parts = self._parts.get(key)
            if parts is None:
                return
            offered = {shard: part.revision for shard, part in (job.parts or {}).items()}
            if not everywhere:
                self._lose(key, offered)
                return
            parts.written |= offered
            for attempt in self.attempts:
                window = attempt.windows.get(job.ordinal)  # none where a writer has answered after the end
                if attempt.number == job.attempt and window is not None:
                    window.unwritten -= 1
                    self._touch()
                    self._advance(attempt)

    def _lose(self, key: tuple[int, int], offered: dict[int, int]) -> None:
        """Note that a window was given up; its rows go, and of windows given up long ago the windows themselves."""
        self._lost[key] = offered
        del self._parts[key]
        while len(self._lost) > MOST_LOST:
            number, ordinal = next(iter(self._lost))
            del self._lost[number, ordinal]
            for attempt in self.attempts:
                if attempt.number == number:
                    attempt.windows.pop(ordinal, None)

    def ended(self) -> None:
        """See `WindowStore.ended`; of the windows those remain that a recovery may have something for."""
        with self._lock:
            for attempt in self.attempts:
                for ordinal, window in list(attempt.windows.items()):
                    if window.published and not window.unwritten and not attempt.missing(ordinal):
                        del attempt.windows[ordinal]
        super().ended()

    def _adopt(self, state: State) -> None:
        """See `WindowStore._adopt`; what the files have beyond the state is published."""
        latest: Earlier | None = None
        for attempt in state.attempts:
            for window in attempt.windows.values():
                window.published = window.published and not window.changed  # what was not written is offered again
            wanted = [key for key in self._on_disk if self._may_be_newer(attempt, *key)]
            for earlier in final_windows(Storage(self.config.savefile), wanted):
                self._earlier[attempt.number, earlier.window] = earlier
                window = attempt.windows.setdefault(earlier.window, Window(earlier.window, earlier.step))
                window.closed |= self._have_closed(attempt, earlier.window)
                window.published = True
                if earlier.window >= attempt.published:
                    attempt.published, latest = earlier.window + 1, earlier
        super()._adopt(state)
        if latest is not None:
            parts = read_parts(Storage(self.config.savefile), latest, self.assigned())
            self.running().announce([row for part in parts.values() for row in part.rows])

    @staticmethod
    def _may_be_newer(attempt: Attempt, number: int, ordinal: int) -> bool:
        """Whether a window on disk is one that a saved state does not settle."""
        return number == attempt.number and (ordinal in attempt.windows or ordinal >= attempt.published)

    # --- the end -------------------------------------------------------------------------------------------------

    def _finish(self, why: str) -> None:
        """Take nothing from workers any more, and end when all shards have published everything."""
        self.ending, self._ending_since = why, time.monotonic()
        while self._merging:
            self._changed.wait()
        for attempt in self.attempts:
            self._advance(attempt)
        self._touch()
        self._end_if_done()

    def _end_if_done(self) -> None:
        if self.ending is None or self._ended:
            return
        undone = self.undone
        if undone and time.monotonic() - self._ending_since < WITHOUT_S:
            return
        self._ended = True
        if undone:
            self.running().problem(f"shards {undone} have not published all that they have: they do not answer")
        self.running().submit([], end=True)

    def poll(self) -> list[Job]:
        """See `WindowStore.poll`."""
        with self._lock:
            if self.ending is not None:
                for attempt in self.attempts:
                    self._advance(attempt)
                self._end_if_done()
                return []
        return super().poll()
