"""The store's classes in this process, driven by simulated sources: merging, memory, publishing; without Ray."""

from __future__ import annotations

import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from delve_ray.moments import F64
from delve_ray.stat_options import resolve_stats
from delve_ray.store.core import CovarianceStore
from delve_ray.store.front import FrontStore
from delve_ray.store.protocol import StoreConfig
from delve_ray.store.sharded import LocalShards
from tests.benchmarks.scale_shapes import RUN, Acks, Deltas, Piece, source_of

DRIVERS = 2
"""Threads that offer deltas, each for its share of the sources: as many as this machine has cores."""
_TIMEOUT_S = 600.0
_BEYOND_CACHES = 256 << 20


@dataclass(slots=True)
class Figures:
    """What a run of so many sources cost.

    `publish_s` is the median from the last close of a window until its rows are in the file; `held` the bytes that the
    stores say they have, `cpu_s` CPU seconds by process, and `nbytes` the bytes of one delta.
    """

    sources: int
    shards: int
    nbytes: int
    windows: int
    acks: Acks
    publish_s: float
    held: int
    received: int
    cpu_s: dict[str, float] = field(default_factory=dict)
    empty_rate: float = float("nan")

    @property
    def deltas(self) -> int:
        """Deltas of all sources."""
        return self.sources * self.windows

    @property
    def rate(self) -> float:
        """Deltas per second."""
        return self.deltas / self.acks.seconds


def config_of(savefile: str, sources: int, shards: int, **options: float) -> StoreConfig:
    """A run that writes its rows, every statistic, and does nothing by itself."""
    return StoreConfig(
        RUN,
        savefile,
        sources,
        stats=resolve_stats(None),
        num_shards=shards,
        **{"publish_every": 0.0, "late_after": 0.0, "silent_after": 0.0} | options,  # type: ignore[arg-type]
    )


def published_after(savefile: str, closed: F64) -> float:
    """Median seconds from the closes of the windows until the files were renamed to what readers look for."""
    files = sorted(Path(savefile, "spectra").glob("*.parquet"))
    if len(files) != len(closed):
        raise RuntimeError(f"{len(files)} of {len(closed)} windows are in {savefile}")
    return statistics.median(path.stat().st_ctime - at for path, at in zip(files, closed, strict=True))


def stores_of(store: CovarianceStore | LocalShards) -> tuple[list[CovarianceStore], CovarianceStore]:
    """Those that get moments, and the one that knows all workers."""
    if isinstance(store, LocalShards):
        return store.local_shards, store.local_front
    return [store], store


def measure_local(widths: Sequence[int], sources: int, shards: int, windows: int) -> Figures:
    """All sources offer their windows one after the other, from `DRIVERS` threads that wait for no other source."""
    deltas = Deltas(widths, shards)
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(folder, sources, shards)
        store = CovarianceStore(config) if shards == 1 else LocalShards(config, lambda _: None)
        parts, front = stores_of(store)
        for rank in range(sources):
            store.register(source_of(rank), config, deltas.layers)
        offered, acked = np.empty((sources, windows)), np.empty((sources, windows))

        def offer(rank: int, window: int) -> None:
            offered[rank, window] = time.time()
            takes = [*zip(parts, deltas.pieces, strict=True)]
            if deltas.front is not None:
                takes.append((front, deltas.front))
            for part, piece in takes:
                _take(part, piece, rank, window)
            acked[rank, window] = time.time()

        def drive(first: int) -> float:
            for window in range(windows):
                for rank in range(first, sources, DRIVERS):
                    offer(rank, window)
            return time.thread_time()

        before = time.process_time()
        with ThreadPoolExecutor(DRIVERS) as pool:
            driving = sum(pool.map(drive, range(min(DRIVERS, sources))))
        held = 0
        _wait(front, windows)
        held = sum(part.status()["bytes"] for part in parts)
        spent = time.process_time() - before
        received = sum(part.counts["bytes"] for part in parts)
        for rank in range(sources):
            store.leave(source_of(rank), completed=True, sent=windows)
        if not front.wait_finished(_TIMEOUT_S):
            raise RuntimeError(f"the run does not end: {front.status()}")
        publish_s = published_after(folder, acked.max(axis=0))
    cpu = {"take": driving, "publishing": max(0.0, spent - driving)}
    return Figures(sources, shards, deltas.nbytes, windows, Acks(offered, acked), publish_s, held, received, cpu)


def _take(store: CovarianceStore, piece: Piece, rank: int, window: int) -> None:
    ack = store.take(piece.header(source_of(rank), window), piece.buffer)
    if not ack.merged:
        raise RuntimeError(f"window {window} of source {rank} was not taken: {ack}")


def _wait(front: CovarianceStore, windows: int) -> None:
    deadline = time.monotonic() + _TIMEOUT_S
    while front.progress().published < windows:
        if time.monotonic() > deadline:
            raise RuntimeError(f"window {front.progress().published} is not published: {front.status()['problems']}")
        time.sleep(0.002)
    if isinstance(front, FrontStore):
        return
    front.running().flush(_TIMEOUT_S)


def bare_add(widths: Sequence[int], threads: int, seconds: float = 0.5) -> float:
    """Bytes per second of such buffers in numpy's in-place addition alone, each thread into a total of its own.

    They come from memory, as they do out of the object store: there are more than caches hold.
    """
    size = Deltas(widths, 1).pieces[0].buffer.size
    arrays = [np.ones(size) for _ in range(-(-_BEYOND_CACHES // (8 * size)))]
    counts = [0] * threads
    barrier = threading.Barrier(threads)

    def add(thread: int) -> float:
        total = np.zeros(size)
        barrier.wait()
        began = time.perf_counter()
        while time.perf_counter() - began < seconds:
            for array in arrays:
                np.add(total, array, out=total)
            counts[thread] += 1
        return time.perf_counter() - began

    with ThreadPoolExecutor(threads) as pool:
        spent = max(pool.map(partial(add), range(threads)))
    return sum(counts) * sum(array.nbytes for array in arrays) / spent
