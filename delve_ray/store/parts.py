"""The parts of a window that shards publish, and the front that makes one window of them.

Each shard is a whole store for some of the layers. What it publishes goes to the front, which knows all workers and has
the files: it waits until every shard has published its part of a window, and hands them to its writers as one. A shard
keeps a part, and offers it again, until the front has written it, so that the front itself has nothing to lose.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from delve_ray.errors import DelveRayError
from delve_ray.schema import PublishedWindow
from delve_ray.storage import Storage
from delve_ray.store.core import CovarianceStore
from delve_ray.store.protocol import StoreConfig
from delve_ray.store.writing import GivenUp
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

REVISIONS_OF_A_LIFE = 1 << 20
"""A window has fewer revisions than this before its shard is started anew."""

UNKNOWN, PENDING, WRITTEN, GIVEN_UP = "unknown", "pending", "written", "given up"


class Front(Protocol):
    """The front as a shard sees it. Every method may raise StoreError."""

    def accept(self, shard: int, part: PublishedWindow, first: int | None = None, problems: Sequence[str] = ()) -> None:
        """Take a part. `first` is the first window of its attempt that the shard still offers, by default this one.

        `problems` are what the shard could not publish so far, in words.
        """

    def part_state(self, shard: int, attempt: int, window: int, revision: int) -> str:
        """Whether a part, or a newer one, is `UNKNOWN`, `PENDING`, `WRITTEN` or, by some writer, `GIVEN_UP`.

        A shard asks until it is one of the last two, and only then for its next window.
        """

    def shard_done(self, shard: int, problems: Sequence[str] = ()) -> None:
        """A shard has published everything, but for what these say."""


class PartWriter:
    """The one writer of a shard: hands its windows to the front, final ones until the front has written them.

    A window goes to the front as soon as it is queued, so that the front can publish it, also while others wait to be
    written; `write` then waits until it is, and offers it again to a front that was started anew. Raises OSError where
    the front does not answer, on which the writer's thread tries again, and GivenUp for what one of the front's writers
    has given up.
    """

    name = "front"

    def __init__(self, shard: int, front: Callable[[], Front]) -> None:
        self._shard = shard
        self._front = front
        self.problems: Callable[[], Sequence[str]] = tuple
        """What the shard could not publish, in words."""
        self._offered: dict[tuple[int, int, int], None] = {}  # final windows that are not written, in their order
        self._ahead: deque[PublishedWindow] = deque()  # of these, those that the front has not had yet
        self._offering = False
        self._changed = threading.Condition()

    def open(self, run: WriterRun) -> None:
        """Nothing to prepare."""

    def on_queued(self, window: PublishedWindow) -> None:
        """Hand a window over that will be written later, on a thread of its own; what fails, `write` does."""
        if not window.final:
            return
        with self._changed:
            self._offered[_key(window)] = None
            self._ahead.append(window)
            if not self._offering:
                self._offering = True
                threading.Thread(target=self._offer_ahead, name="delve_ray-parts", daemon=True).start()

    def write(self, window: PublishedWindow) -> None:
        """Hand over a part; of a final one, wait until it is written."""
        if window.final:
            self._wait_offered(window)
        try:
            front = self._front()
            if not window.final:
                self._accept(front, window)
                return
            pause = PAUSE_S[0]
            while True:
                state = front.part_state(self._shard, *_key(window))
                if state in (WRITTEN, GIVEN_UP):
                    break
                if state == UNKNOWN:  # it has not had it, or was started anew
                    self._accept(front, window)
                time.sleep(pause)
                pause = min(2 * pause, PAUSE_S[1])
        except DelveRayError as error:
            raise OSError(f"the front of the run does not take it: {error}") from error
        with self._changed:
            self._offered.pop(_key(window), None)
        if state == GIVEN_UP:
            raise GivenUp("by a writer of the run, whose problems say which")

    def _wait_offered(self, window: PublishedWindow) -> None:
        """Wait until a window was offered ahead; all that were queued before it are written, or given up."""
        with self._changed:
            self._changed.wait_for(lambda: not any(_key(other) == _key(window) for other in self._ahead))
            while self._offered and next(iter(self._offered)) != _key(window) and _key(window) in self._offered:
                del self._offered[next(iter(self._offered))]

    def _offer_ahead(self) -> None:
        while True:
            with self._changed:
                if not self._ahead:
                    self._offering = False
                    return
                window = self._ahead[0]
            try:
                self._accept(self._front(), window)
            except Exception as error:  # whatever it is, it comes again when the window is written
                log.debug("shard %d: step %d is not with the front yet: %s", self._shard, window.step, error)
            with self._changed:
                self._ahead.popleft()
                self._changed.notify_all()

    def _accept(self, front: Front, window: PublishedWindow) -> None:
        with self._changed:
            first = min((key[1] for key in self._offered if key[0] == window.attempt), default=window.window)
        front.accept(self._shard, window, min(first, window.window), self.problems())

    def write_scalars(self, scalars: list[Scalar]) -> None:
        """A shard has none."""

    def close(self) -> None:
        """Say that this was all."""
        self._front().shard_done(self._shard, self.problems())


def _key(window: PublishedWindow) -> tuple[int, int, int]:
    return window.attempt, window.window, window.revision


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


class ShardStore(CovarianceStore):
    """The store of a shard, whose windows are named by revisions that no process before this one has used.

    The front hears from its `PartWriter` what could not be published.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        for writer in self._given_writers or ():
            if isinstance(writer, PartWriter):
                writer.problems = self._unpublished

    def _unpublished(self) -> Sequence[str]:
        return () if self.publisher is None else self.publisher.unpublished()

    def next_revision(self, attempt: int, ordinal: int) -> int:
        """The first revision of a window: what was published before a restart may have had more, or less."""
        lives = 0 if self.saver is None else self.saver.incarnation
        return max(super().next_revision(attempt, ordinal), lives * REVISIONS_OF_A_LIFE)


@dataclass(slots=True)
class Parts:
    """What the shards have published of one window.

    Attributes:
        newest: each shard's newest part.
        fresh: shards whose newest final part is in no publication yet.
        fresh_since: when the first of these came, by the monotonic clock.
        written: the revision of each shard that every writer has written.
        given_up: the revision of each shard that some writer has given up.
        shown: whether the newest parts are in a live publication.
    """

    newest: dict[int, PublishedWindow] = field(default_factory=dict)
    fresh: set[int] = field(default_factory=set)
    fresh_since: float = 0.0
    written: dict[int, int] = field(default_factory=dict)
    given_up: dict[int, int] = field(default_factory=dict)
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

    def give_up(self, revisions: Mapping[int, int], num_shards: int) -> None:
        """Note what some writer has given up; the rows of what no late rank will correct are let go of."""
        self.given_up |= revisions
        if sum(part.complete for part in self.newest.values()) == num_shards and not self.fresh:
            self.newest = {shard: replace(part, rows=[]) for shard, part in self.newest.items()}

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
