"""The parts of a window that shards publish, and the front that makes one window of them.

Each shard is a whole store for some of the layers. What it publishes goes to the front, which knows all workers and has
the files: it waits until every shard has published its part of a window, and hands them to its writers as one. A shard
keeps a part, and offers it again, until the front has written it, so that the front itself has nothing to lose.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

from delve_ray.errors import DelveRayError
from delve_ray.schema import PublishedWindow
from delve_ray.storage import Storage
from delve_ray.store.attempt import Attempt, Member
from delve_ray.store.core import CovarianceStore
from delve_ray.store.protocol import StoreConfig
from delve_ray.writers.base import Scalar, WriterRun

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

UNKNOWN, PENDING, WRITTEN = "unknown", "pending", "written"


class Front(Protocol):
    """The front as a shard sees it. Every method may raise StoreError."""

    def accept(self, shard: int, part: PublishedWindow) -> None:
        """Take a part."""

    def part_state(self, shard: int, attempt: int, window: int, revision: int) -> str:
        """Whether a part, or a newer one, is `UNKNOWN`, `PENDING` or `WRITTEN`."""

    def shard_done(self, shard: int) -> None:
        """A shard has published everything."""


class PartWriter:
    """The one writer of a shard: hands its windows to the front, final ones until the front has written them.

    Raises OSError where the front does not answer, on which the writer's thread tries again.
    """

    name = "front"

    def __init__(self, shard: int, front: Callable[[], Front]) -> None:
        self._shard = shard
        self._front = front

    def open(self, run: WriterRun) -> None:
        """Nothing to prepare."""

    def write(self, window: PublishedWindow) -> None:
        """Hand over a part; of a final one, wait until it is written."""
        try:
            front = self._front()
            front.accept(self._shard, window)
            pause = PAUSE_S[0]
            while window.final:
                state = front.part_state(self._shard, window.attempt, window.window, window.revision)
                if state == WRITTEN:
                    return
                if state == UNKNOWN:  # the front was started anew
                    front.accept(self._shard, window)
                time.sleep(pause)
                pause = min(2 * pause, PAUSE_S[1])
        except DelveRayError as error:
            raise OSError(f"the front of the run does not take it: {error}") from error

    def write_scalars(self, scalars: list[Scalar]) -> None:
        """A shard has none."""

    def close(self) -> None:
        """Say that this was all."""
        self._front().shard_done(self._shard)


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
    """The store of a shard, whose windows are named by revisions that no process before this one has used."""

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
