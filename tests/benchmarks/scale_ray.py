"""The store as Ray actors, fed by a few processes that play many sources, each with a delta of its own on its way."""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import psutil
import ray

from delve_ray.moments import F64
from delve_ray.store import actor
from delve_ray.store.protocol import Ack, Delta, Source, StoreConfig
from delve_ray.store.remote import INLINE_BYTES
from tests.benchmarks.intake import ROOT, EmptyActor
from tests.benchmarks.scale_local import Figures, config_of, published_after
from tests.benchmarks.scale_shapes import RUN, Acks, Deltas, Piece, source_of

FEEDERS = 2
"""Processes that play the sources."""
OBJECTS_BYTES = 512 << 20
"""Ray's object store; deltas on their way take up to half of it."""
_TIMEOUT_S = 500.0


class Empty(EmptyActor):
    """What the store is measured against: it is called as often, and does nothing."""

    @ray.method(concurrency_group="query")
    def pid(self) -> int:
        """Its process."""
        return os.getpid()


class Feeder:
    """Plays the sources of some ranks as their senders do: put, take, and then the next window.

    A source waits for no other. It offers its delta to all shards at once, and to the front when all have it.
    """

    def __init__(self, ranks: Sequence[int], widths: Sequence[int], shards: int, room: int) -> None:
        self.ranks = list(ranks)
        self.deltas = Deltas(widths, shards)
        self.room = asyncio.Semaphore(max(1, room // max(1, self.deltas.nbytes)))

    def pid(self) -> int:
        """This process."""
        return os.getpid()

    def join(self, run: str, config: StoreConfig) -> None:
        """Register all sources."""
        store = actor.connect(actor.find(run))
        for rank in self.ranks:
            store.register(source_of(rank), config, self.deltas.layers)

    async def feed(self, parts: Sequence[Any], front: Any, windows: int) -> tuple[F64, F64]:
        """Play all windows; when each delta was offered and acknowledged, shape (sources, windows)."""
        offered, acked = np.empty((len(self.ranks), windows)), np.empty((len(self.ranks), windows))

        async def play(index: int, source: Source) -> None:
            for window in range(windows):
                offered[index, window] = time.time()
                async with self.room:
                    pieces = zip(parts, self.deltas.pieces, strict=True)
                    await asyncio.gather(*(self._take(part, piece, source, window) for part, piece in pieces))
                if self.deltas.front is not None:
                    await self._take(front, self.deltas.front, source, window)
                acked[index, window] = time.time()

        await asyncio.gather(*(play(index, source_of(rank)) for index, rank in enumerate(self.ranks)))
        return offered, acked

    async def _take(self, store: Any, piece: Piece, source: Source, window: int) -> None:
        delta: Delta = piece.header(source, window)
        # Each source brings a copy of its own, as it would from its own process.
        buffer = ray.put(piece.buffer) if piece.buffer.nbytes >= INLINE_BYTES else piece.buffer
        ack: Ack = await store.take.remote(delta, buffer)
        if not ack.merged:
            raise RuntimeError(f"window {window} of {source.source} was not taken: {ack}")

    def leave(self, run: str, windows: int) -> None:
        """Deregister all sources."""
        store = actor.connect(actor.find(run))
        for rank in self.ranks:
            store.leave(source_of(rank), completed=True, sent=windows, timeout=60.0)


@contextmanager
def scale_ray() -> Iterator[None]:
    """A Ray of this machine."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(
        address="local",
        num_cpus=2,
        num_gpus=0,
        include_dashboard=False,
        object_store_memory=OBJECTS_BYTES,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}},
    )
    try:
        yield
    finally:
        ray.shutdown()


def measure_ray(
    widths: Sequence[int], sources: int, shards: int, windows: int, *, feeders: int = FEEDERS, empty: bool = True
) -> Figures:
    """All sources at once into the store, and then into as many actors that do nothing; Ray must be running."""
    feeders = min(feeders, sources)
    players = [
        ray.remote(num_cpus=0)(Feeder).remote(
            range(first, sources, feeders), widths, shards, OBJECTS_BYTES // 2 // feeders
        )
        for first in range(feeders)
    ]
    pids = {"feeders": ray.get([player.pid.remote() for player in players], timeout=_TIMEOUT_S)}
    try:
        with tempfile.TemporaryDirectory() as folder:
            found = _into_store(folder, players, pids, widths, sources, shards, windows)
        if empty:
            found.empty_rate = _into_nothing(players, shards, sources, windows)
        return found
    finally:
        for player in players:
            ray.kill(player)


def _into_store(
    folder: str,
    players: Sequence[Any],
    pids: dict[str, list[int]],
    widths: Sequence[int],
    sources: int,
    shards: int,
    windows: int,
) -> Figures:
    config = config_of(folder, sources, shards, snapshot_every=10.0)
    front = actor.start(config)
    ray.get([player.join.remote(RUN, config) for player in players], timeout=_TIMEOUT_S)
    parts = [front] if shards == 1 else [actor.find(RUN, shard=shard) for shard in range(shards)]
    status = ray.get(front.status.remote(), timeout=_TIMEOUT_S)
    pids = pids | {"store": [status["pid"]] if shards == 1 else [part["pid"] for part in status["shards"]]}
    if shards > 1:
        pids["front"] = [status["pid"]]
    before = _cpu_seconds(pids)
    acks = _feed(players, parts, front, windows)
    cpu = {name: seconds - before.get(name, 0.0) for name, seconds in _cpu_seconds(pids).items()}
    deadline = time.monotonic() + _TIMEOUT_S
    while ray.get(front.progress.remote(), timeout=_TIMEOUT_S).published < windows:
        if time.monotonic() > deadline:
            raise RuntimeError(f"not published: {ray.get(front.status.remote())['problems']}")
        time.sleep(0.01)
    states = [ray.get(part.status.remote(), timeout=_TIMEOUT_S) for part in parts]
    ray.get([player.leave.remote(RUN, windows) for player in players], timeout=_TIMEOUT_S)
    while not ray.get(front.progress.remote(), timeout=_TIMEOUT_S).finished:
        time.sleep(0.02)
    publish_s = published_after(folder, acks.acked.max(axis=0))
    for handle in {*parts, front}:
        ray.kill(handle, no_restart=True)
    nbytes = Deltas(widths, shards).nbytes
    held, received = (sum(state[key] for state in states) for key in ("bytes", "bytes_in"))
    return Figures(sources, shards, nbytes, windows, acks, publish_s, held, received, cpu)


def _into_nothing(players: Sequence[Any], shards: int, sources: int, windows: int) -> float:
    """Deltas per second."""
    remote: Any = ray.remote  # its type knows no concurrency groups
    kind = remote(num_cpus=0, concurrency_groups=actor._GROUP_THREADS)(Empty)
    stores = [kind.remote() for _ in range(shards + (shards > 1))]
    ray.get([store.pid.remote() for store in stores], timeout=_TIMEOUT_S)
    try:
        acks = _feed(players, stores[:shards], stores[-1], windows)
    finally:
        for store in stores:
            ray.kill(store)
    return sources * windows / acks.seconds


def _feed(players: Sequence[Any], parts: Sequence[Any], front: Any, windows: int) -> Acks:
    found = ray.get([player.feed.remote(parts, front, windows) for player in players], timeout=_TIMEOUT_S)
    offered, acked = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
    return Acks(offered, acked)


def _cpu_seconds(pids: dict[str, list[int]]) -> dict[str, float]:
    """CPU seconds so far of these processes, of Ray's own, and under `driver` of this one."""
    found = {name: sum(map(_seconds, own)) for name, own in pids.items()}
    known = {pid for own in pids.values() for pid in own}
    me = psutil.Process()
    others = [process for process in me.children(recursive=True) if process.pid not in known]
    found["ray"] = sum(_seconds(process.pid) for process in others)
    found["driver"] = _seconds(me.pid)
    return found


def _seconds(pid: int) -> float:
    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.Error:  # it has ended meanwhile
        return 0.0
    return float(times.user + times.system)
