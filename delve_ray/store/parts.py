"""The parts of a window that shards publish, and the front that makes one window of them.

Each shard is a whole store for some of the layers. What it publishes goes to the front, which knows all workers and has
the files: it waits until every shard has published its part of a window, and hands them to its writers as one. A shard
keeps a part, and offers it again, until the front has written it, so that the front itself has nothing to lose. It does
not wait for that with the next part: what one of the front's writers is behind with holds up no other.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from string import digits
from typing import Any, Protocol

from delve_ray.errors import DelveRayError, StoreError
from delve_ray.schema import PublishedWindow
from delve_ray.storage import Storage
from delve_ray.store.attempt import Attempt, Member
from delve_ray.store.core import CovarianceStore
from delve_ray.store.protocol import StoreConfig
from delve_ray.store.window import Job
from delve_ray.store.writing_items import row_bytes
from delve_ray.writers.base import Scalar, WriterRun

log = logging.getLogger(__name__)

FOLDER = "shards"
"""Folder of the shards' own snapshots, below the savefile."""
TOGETHER_S = 5.0
"""A published window is corrected when all shards have corrected their parts, or so many seconds after the first."""
WITHOUT_S = 600.0
"""A window that lacks the part of a shard for so long is published without it."""
PAUSE_S = (0.02, 1.0)
"""First and longest pause between two questions whether a part is written."""
HELD_BYTES = 256 << 20
"""Rows that all shards together have handed over and the front has not written. Beyond that each hands over one part at
a time."""

REVISIONS_OF_A_LIFE = 1 << 20
"""A window has fewer revisions than this before its shard is started anew."""

UNKNOWN, PENDING, WRITTEN, LOST = "unknown", "pending", "written", "lost"

Key = tuple[int, int, int]
"""Attempt, window and revision of a shard's part."""


class Front(Protocol):
    """The front as a shard sees it. Every method may raise StoreError."""

    def accept(self, shard: int, part: PublishedWindow, after: Key | None = None, problems: Sequence[str] = ()) -> bool:
        """Take a part that the shard offers after another; False, and nothing is taken, where that one is `UNKNOWN`.

        `problems` say what the shard could not publish so far.
        """

    def part_state(self, shard: int, attempt: int, window: int, revision: int) -> str:
        """Whether a part, or a newer one, is `UNKNOWN`, `PENDING`, `WRITTEN`, or given up by a writer, `LOST`."""

    def shard_done(self, shard: int, problems: Sequence[str] = ()) -> None:
        """A shard has published everything, but for what these say."""


@dataclass(slots=True, eq=False)
class _Held:
    """A part that was handed over, and who is to hear whether it is written."""

    part: PublishedWindow
    nbytes: int
    then: Callable[[bool], None] | None = None


class PartWriter:
    """The one writer of a shard: hands its windows to the front, and keeps final ones until the front has written them.

    `then` says what is to be done when that is known; a thread asks the front as long as anything is kept. A front that
    was started anew gets all that is kept once more, in order, before it gets anything new: it can conclude from a part
    that it has, or had, those before.
    """

    name = "front"

    def __init__(self, shard: int, front: Callable[[], Front], num_shards: int = 1) -> None:
        self._shard = shard
        self._front = front
        self.problems: Callable[[], Sequence[str]] = tuple
        """What the shard could not publish, in words."""
        self._room = HELD_BYTES // num_shards
        self._held: OrderedDict[Key, _Held] = OrderedDict()
        self._outcomes: dict[Key, bool] = {}  # of those that nobody has asked for yet
        self._asking = self._stopped = False
        self._changed = threading.Condition()
        self._offering = threading.Lock()  # held while parts are offered, so that they come in order

    def open(self, run: WriterRun) -> None:
        """Nothing to prepare."""

    def write(self, window: PublishedWindow) -> None:
        """Hand over a part, a final one once there is room for it.

        Raises OSError where the front does not answer, on which the writer's thread tries again.
        """
        try:
            if window.final:
                self._hand_over(window)
            else:
                self._accept(self._front(), window, None)
        except DelveRayError as error:
            raise OSError(f"the front of the run does not take it: {error}") from error

    def then(self, key: Key, call: Callable[[bool], None]) -> None:
        """Call back when the front has written a final part (True), or has given it up (False)."""
        with self._changed:
            held = self._held.get(key)
            if held is not None:
                held.then = call
                return
            written = self._outcomes.pop(key)
        call(written)

    def write_scalars(self, scalars: list[Scalar]) -> None:
        """A shard has none."""

    def close(self) -> None:
        """Wait until everything is written, and say that this was all."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or not self._held)
            everything = not self._held
        if everything:
            self._front().shard_done(self._shard, self.problems())

    def stop_waiting(self) -> None:
        """Wait for nothing any more: there is no more time."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def _hand_over(self, part: PublishedWindow) -> None:
        nbytes = sum(map(row_bytes, part.rows))
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._has_room(nbytes))
        with self._offering:
            front, before = self._front(), self._newest()
            if not self._accept(front, part, before):
                self._offer_again(front)
                if not self._accept(front, part, before):
                    raise StoreError("it was started anew")
            with self._changed:
                self._held[_key(part)] = _Held(part, nbytes)
                if not self._asking:
                    self._asking = True
                    threading.Thread(target=self._ask, name="delve_ray-parts", daemon=True).start()

    def _has_room(self, nbytes: int) -> bool:
        return not self._held or nbytes + sum(held.nbytes for held in self._held.values()) <= self._room

    def _newest(self) -> Key | None:
        with self._changed:
            return next(reversed(self._held), None)

    def _offer_again(self, front: Front) -> None:
        """Offer all that is kept, in order. Raises StoreError where the front is started anew meanwhile."""
        with self._changed:
            kept = [held.part for held in self._held.values()]
        before: Key | None = None
        for part in kept:
            if not self._accept(front, part, before):
                raise StoreError("it was started anew")
            before = _key(part)

    def _accept(self, front: Front, part: PublishedWindow, after: Key | None) -> bool:
        return front.accept(self._shard, part, after, self.problems())

    # --- the thread that asks ------------------------------------------------------------------------------------

    def _ask(self) -> None:
        """Find out what becomes of what is kept, the oldest first, until nothing is."""
        pause = PAUSE_S[0]
        while True:
            with self._changed:
                if self._stopped or not self._held:
                    self._asking = False
                    return
                key = next(iter(self._held))
            if self._look_after(key):
                pause = PAUSE_S[0]
                continue
            with self._changed:
                self._changed.wait_for(lambda: self._stopped, pause)
            pause = min(2 * pause, PAUSE_S[1])

    def _look_after(self, key: Key) -> bool:
        """Ask for one part, and offer all again to a front that does not know it; whether it is done with."""
        try:
            state = self._front().part_state(self._shard, *key)
            if state == UNKNOWN:
                with self._offering:
                    self._offer_again(self._front())
        except DelveRayError as error:
            log.debug("shard %d: the front does not answer: %s", self._shard, error)
            return False
        if state not in (WRITTEN, LOST):
            return False
        with self._changed:
            call = self._held[key].then
            if call is None:
                self._outcomes[key] = state == WRITTEN
                self._forget(key)
                return True
        try:
            call(state == WRITTEN)
        except Exception:  # theirs; the other parts are still to be looked after
            log.exception("shard %d: what was to be done after a part was written failed", self._shard)
        with self._changed:
            self._forget(key)
        return True

    def _forget(self, key: Key) -> None:
        del self._held[key]
        self._changed.notify_all()


def _key(part: PublishedWindow) -> Key:
    return part.attempt, part.window, part.revision


def detached(part: PublishedWindow) -> PublishedWindow:
    """The same with arrays of its own, where they are views of what somebody else needs the memory of."""
    names = ("eigenvalues", "mean", "covariance", "embedding")
    return replace(
        part,
        rows=[
            replace(row, **{name: array.copy() for name in names if (array := getattr(row, name)) is not None})
            for row in part.rows
        ],
    )


def shard_config(config: StoreConfig, shard: int) -> StoreConfig:
    """How a shard of a run is published: to the front; its own snapshots lie below the run's savefile."""
    return replace(
        config,
        savefile=Storage(config.savefile).child(f"{FOLDER}/{shard}").savefile,
        save_to=(PartWriter.name,) if config.save_to else (),
        writers=(),
        writer_args={},
        num_shards=1,
        lingers=0.0,
    )


def shard_of(config: StoreConfig) -> int | None:
    """The shard that `shard_config` has made a configuration for; None for one of a whole run.

    >>> run = StoreConfig("r", "s3://bucket/run?region=here", world_size=1, num_shards=2)
    >>> shard_of(shard_config(run, 1)), shard_of(run)
    (1, None)
    """
    return int(_place(config.savefile)[1]) if config.save_to == (PartWriter.name,) else None


def _place(savefile: str) -> tuple[str, str, str]:
    """What a shard's savefile has before the folder of the shards, its number, and what a URI has behind its path."""
    above, _, rest = savefile.rpartition(f"/{FOLDER}/")
    behind = rest.lstrip(digits)
    return above, rest.removesuffix(behind), behind


class ShardStore(CovarianceStore):
    """The store of a shard: what it has published is written once the front has written it.

    Its windows are named by revisions that no process before this one has used. The front hears from its `PartWriter`
    what could not be published.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._part_writer = next((w for w in self._given_writers or () if isinstance(w, PartWriter)), None)
        if self._part_writer is not None:
            self._part_writer.problems = self._unpublished

    @property
    def run_savefile(self) -> str:
        """See `SavedStore.run_savefile`."""
        above, _, behind = _place(self.config.savefile)
        return above + behind

    @property
    def rescue_folder(self) -> str:
        """See `SavedStore.rescue_folder`: below that of the run, as shards of it may be on one machine."""
        return os.path.join(super().rescue_folder, FOLDER, _place(self.config.savefile)[1])

    def _unpublished(self) -> Sequence[str]:
        return () if self.publisher is None else self.publisher.unpublished()

    def written(self, job: Job, everywhere: bool) -> None:
        """See `WindowStore.written`; a part that is handed over is not written yet."""
        if everywhere and self._part_writer is not None:
            self._part_writer.then((job.attempt, job.ordinal, job.revision), partial(super().written, job))
        else:
            super().written(job, everywhere)

    def next_revision(self, attempt: int, ordinal: int) -> int:
        """The first revision of a window: what was published before a restart may have had more, or less."""
        lives = 0 if self.saver is None else self.saver.incarnation
        return max(super().next_revision(attempt, ordinal), lives * REVISIONS_OF_A_LIFE)

    def _news(self, attempt: Attempt, member: Member) -> None:
        """Nothing: the front has the metrics of all layers."""


@dataclass(slots=True)
class Parts:
    """What the shards have published of one window.

    Attributes:
        newest: each shard's newest part.
        fresh: shards whose newest final part is in no publication yet.
        fresh_since: when the first of these came, by the monotonic clock.
        written: the revision of each shard that every writer has written.
        shown: whether the newest parts are in a live publication.
    """

    newest: dict[int, PublishedWindow] = field(default_factory=dict)
    fresh: set[int] = field(default_factory=set)
    fresh_since: float = 0.0
    written: dict[int, int] = field(default_factory=dict)
    shown: bool = True

    def add(self, shard: int, part: PublishedWindow) -> None:
        """Note a shard's part, unless there is a newer one."""
        before = self.newest.get(shard)
        if before is not None and (before.revision >= part.revision or (before.final and not part.final)):
            return
        self.newest[shard] = part
        self.shown = False
        if part.final and self.written.get(shard, -1) < part.revision:
            self.fresh_since = self.fresh_since if self.fresh else time.monotonic()
            self.fresh.add(shard)

    def final(self, num_shards: int) -> bool:
        """Whether every shard has published its part as final."""
        return sum(part.final for part in self.newest.values()) == num_shards

    def may_be_published(self, num_shards: int, *, again: bool) -> bool:
        """Whether the parts of a complete window can be published now, for the first time or as a correction."""
        if not self.fresh:
            return False
        waited = time.monotonic() - self.fresh_since
        if again:
            return len(self.fresh) == num_shards or waited > TOGETHER_S
        return self.final(num_shards) or waited > WITHOUT_S
