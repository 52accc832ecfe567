"""A store's workers without trackers: rows in, deltas out; and a writer that keeps what it gets."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from delve_ray.moments import F64, Moments
from delve_ray.outbox import Outbox
from delve_ray.schema import PublishedWindow
from delve_ray.store.core import CovarianceStore
from delve_ray.store.protocol import Ack, Delta, LayerInfo, Source, StoreConfig
from delve_ray.store.sharded import ShardedStore
from delve_ray.writers.base import Scalar

LAYERS = [LayerInfo("conv", "Conv2d", 3), LayerInfo("fc", "Linear", 5)]
RNG = np.random.default_rng(20260101)
_BEGIN = RNG.bit_generator.state


def restart() -> None:
    """Begin with the first rows again."""
    RNG.bit_generator.state = _BEGIN


class Keeper:
    """A writer that keeps what it gets."""

    def __init__(self, name: str = "keeper", fail: bool = False, delay: float = 0.0) -> None:
        self.name, self.fail, self.delay = name, fail, delay
        self.windows: list[PublishedWindow] = []
        self.scalars: list[Scalar] = []
        self.closed = False

    def write(self, window: PublishedWindow) -> None:
        time.sleep(self.delay)
        if self.fail:
            raise TypeError("no space for this")
        self.windows.append(window)

    def write_scalars(self, scalars: list[Scalar]) -> None:
        self.scalars.extend(scalars)

    def close(self) -> None:
        self.closed = True


def config(**changes: Any) -> StoreConfig:
    base = StoreConfig(
        run="r",
        savefile="/nowhere",
        world_size=2,
        stats=("saturation", "trace", "cov"),
        publish_every=0.0,
        silent_after=0,
        late_after=0,
    )
    return replace(base, **changes)


def source(rank: int, name: str = "", token: str = "", pid: int = 100) -> Source:
    return Source("r", token, rank, name or f"s{token}{rank}", "host", pid + rank)


def park(outbox: Outbox, delta: Delta, buffer: F64, *, first: bool, memory: int, limit: int) -> None:
    """Take in a packed delta as a worker's packer does."""
    outbox.put(delta.sealed(buffer), buffer, first=first)
    outbox.make_room(memory=memory, limit=limit)


class Worker:
    """Sends rows to a store like a tracker does, with its own sequence of deltas."""

    def __init__(
        self, store: CovarianceStore | ShardedStore, rank: int, options: StoreConfig | None = None, **changes: Any
    ) -> None:
        self.store, self.source = store, source(rank, **changes)
        welcome = store.register(self.source, options or store.settings(), LAYERS)
        self.attempt, self.window = welcome.attempt, welcome.window
        self.seq = 0

    def delta(self, rows: dict[tuple[int, int], np.ndarray], step: int, closes: bool) -> tuple[Delta, np.ndarray]:
        entries, parts = [], [np.empty(0)]
        for (layer, phase), values in sorted(rows.items()):
            moments = Moments.from_rows(values)
            entries.append((layer, phase, moments.n, 0))
            parts += [moments.mean, moments.packed()]
        delta = Delta(self.source, self.attempt, self.seq, self.window, step, closes, closes, tuple(entries))
        buffer = np.concatenate(parts)
        return delta.sealed(buffer), buffer

    def next(
        self, rows: dict[tuple[int, int], np.ndarray], step: int = 0, closes: bool = False
    ) -> tuple[Delta, np.ndarray]:
        """The next delta, to be sent whenever."""
        delta, buffer = self.delta(rows, step, closes)
        self.seq += 1
        self.window += closes
        return delta, buffer

    def send(self, rows: dict[tuple[int, int], np.ndarray], step: int = 0, closes: bool = False) -> Ack:
        ack = self.store.take(*self.next(rows, step, closes))
        assert ack.merged
        return ack

    def leave(self, *, completed: bool = True) -> Ack:
        return self.store.leave(self.source, completed=completed, sent=self.seq)


def rows(n: int, d: int, offset: float = 0.0) -> np.ndarray:
    return RNG.normal(size=(n, d)) * np.linspace(1, 3, d) + offset


def published(store: CovarianceStore, windows: int) -> None:
    deadline = time.monotonic() + 60
    while store.progress().published < windows:
        assert time.monotonic() < deadline, store.status()
        time.sleep(0.002)


def until(condition: Callable[[], object], what: str = "") -> None:
    """Wait until something holds."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.005)


def silent(store: CovarianceStore, rank: int, seconds: float) -> None:
    """A rank was last heard of so many seconds earlier."""
    store.attempts[-1].members[rank].heard -= seconds


def written(store: CovarianceStore, windows: int) -> None:
    published(store, windows)
    assert store.running().flush(60)  # the store's own flush would publish open windows, too
