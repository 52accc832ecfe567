"""Publishing with wide layers as Ray tasks against publishing in the store alone: time, overhead of a task, memory.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.remote_spectra --windows 7

One thread per decomposition, as Ray gives an actor and a task. The store is in this process and takes the moments of a
window before the clock starts; measured is from the closing delta until the rows are there.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import threading
import time
import unittest.mock
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import ray
from ray.cluster_utils import Cluster

from delve_ray.moments import F64, pack_triangle
from delve_ray.schema import PublishedWindow
from delve_ray.store import publishing, remote_spectra
from delve_ray.store.core import CovarianceStore
from delve_ray.store.protocol import Delta, LayerInfo, Source, StoreConfig
from delve_ray.store.publishing import layer_row
from delve_ray.store.remote_spectra import MOST_TASKS, RemoteSpectra
from delve_ray.store.window import Collected
from delve_ray.writers.base import Scalar
from tests.benchmarks.timing import Samples, alternate, median, ratio

SETS: Mapping[str, Sequence[int]] = {
    "small: 20 layers of 64 to 512": [64, 128, 256, 512] * 5,
    "wide: 8 layers of 1024 and 2048": [1024, 2048] * 4,
    "mixed: 16 of 64 to 512, 4 of 1024 and 2048": [64, 128, 256, 512] * 4 + [1024, 2048] * 2,
}
WIDTHS = (256, 512, 1024, 2048)
CORES = 2
"""What the store believes to have; one of them takes what comes in, so that one decomposes."""
OBJECT_STORE = 400 << 20
CONFIG = StoreConfig(run="bench", savefile="/nowhere", world_size=1, publish_every=0.0, silent_after=0, late_after=0)


def moments(d: int) -> tuple[F64, F64]:
    """Mean and packed scatter of 2d rows whose spreads differ."""
    rows = np.random.default_rng(d).normal(size=(2 * d, d)) * np.linspace(1.0, 3.0, d)
    centred = rows - rows.mean(axis=0)
    return rows.mean(axis=0), pack_triangle(centred.T @ centred)


class Rows:
    """A writer that says when a window's rows are there."""

    name = "rows"

    def __init__(self) -> None:
        self.there = threading.Semaphore(0)

    def write(self, window: PublishedWindow) -> None:
        self.there.release()

    def write_scalars(self, scalars: list[Scalar]) -> None:
        pass

    def close(self) -> None:
        pass


class Run:
    """A store of these widths; `compute` is None for one that has nothing done elsewhere."""

    def __init__(self, widths: Sequence[int], compute: RemoteSpectra | None) -> None:
        self.compute, self.rows = compute, Rows()
        elsewhere = 0 if compute is None else MOST_TASKS
        self.store = CovarianceStore(
            CONFIG, writers=[self.rows], cores=CORES, compute=compute or layer_row, elsewhere=elsewhere
        )
        self.source = Source("bench", "", 0, "a", "host", 1)
        self.store.register(self.source, CONFIG, [LayerInfo(f"l{i}", "Linear", d) for i, d in enumerate(widths)])
        made = {d: moments(d) for d in set(widths)}
        self.buffer = np.concatenate([part for d in widths for part in made[d]])
        self.entries = tuple((index, 0, 2 * d, 0) for index, d in enumerate(widths))
        self.seq = self.step = 0

    def take(self) -> None:
        """A window's moments."""
        self._send(self.entries, self.buffer, closes=False)

    def publish(self) -> None:
        """Close the window and wait for its rows."""
        self._send((), np.empty(0), closes=True)
        assert self.rows.there.acquire(timeout=600)
        self.step += 1

    def _send(self, entries: tuple[tuple[int, int, int, int], ...], buffer: F64, *, closes: bool) -> None:
        delta = Delta(self.source, 0, self.seq, self.step, self.step, closes, closes, entries)
        assert self.store.take(delta.sealed(buffer), buffer).merged
        self.seq += 1

    def close(self) -> None:
        """End the store."""
        self.store.finish("measured")
        assert self.store.wait_finished(60)


def measure_set(widths: Sequence[int], windows: int) -> dict[str, Samples]:
    """Seconds per window, "in place" and with "tasks"."""
    runs = {"in place": Run(widths, None), "tasks": Run(widths, RemoteSpectra(CORES - 1))}
    found = alternate(
        {name: lambda _, run=run: run.publish() for name, run in runs.items()},  # type: ignore[misc]
        calls=windows,
        block=1,
        warmup=1,
        before=lambda name, _: runs[name].take(),
    )
    for run in runs.values():
        run.close()
    return found


def measure_widths(calls: int) -> dict[int, dict[str, tuple[float, float]]]:
    """Of one layer, medians of wall seconds and of CPU seconds of this process: decomposed "here", and by a "task".

    "sent" is a task that takes the layer and does nothing.
    """
    found: dict[int, dict[str, tuple[float, float]]] = {}
    compute, empty = RemoteSpectra(1), ray.remote(num_cpus=1, scheduling_strategy="SPREAD")(lambda *_: None)
    with unittest.mock.patch.object(remote_spectra, "WIDE", 1):
        for d in WIDTHS:
            mean, packed = moments(d)
            work = LayerInfo("l", "Linear", d), "train", Collected(2 * d, 0, mean, packed, 2.0 * d), CONFIG
            variants: dict[str, Callable[..., object]] = {
                "here": layer_row,
                "task": compute,
                "sent": lambda *a: ray.get(empty.remote(*a)),
            }
            seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
            for call in range(calls + 2):
                for name, variant in variants.items():
                    wall, cpu = time.perf_counter(), time.process_time()
                    variant(*work)
                    if call >= 2:  # workers have started
                        seconds[name].append((time.perf_counter() - wall, time.process_time() - cpu))
            found[d] = {name: tuple(np.median(taken, axis=0)) for name, taken in seconds.items()}
    assert compute.sent == (calls + 2) * len(WIDTHS), "not all went to a task"
    return found


# --- memory ------------------------------------------------------------------------------------------------


def _resident() -> tuple[int, int]:
    """Bytes of anonymous memory of this process, and of Ray's workers below it."""
    parents: dict[int, int] = {}
    sizes: dict[int, int] = {}
    workers = set()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError, IndexError, ValueError):
            status = dict(line.split(":\t", 1) for line in (entry / "status").read_text().splitlines() if ":\t" in line)
            pid = int(entry.name)
            parents[pid], sizes[pid] = int(status["PPid"]), 1024 * int(status.get("RssAnon", "0").split()[0])
            if (entry / "cmdline").read_bytes().startswith(b"ray::"):
                workers.add(pid)

    def is_ours(pid: int) -> bool:
        while pid in parents:
            pid = parents[pid]
            if pid == os.getpid():
                return True
        return False

    return sizes[os.getpid()], sum(sizes[pid] for pid in workers if is_ours(pid))


def measure_memory(widths: Sequence[int], compute: RemoteSpectra | None) -> tuple[int, int]:
    """Bytes by which a window's publication raises this process at most, and what Ray's workers hold at most."""
    run = Run(widths, compute)
    run.take()
    run.publish()
    run.take()
    before, peak, peak_workers = _resident()[0], 0, 0
    stop = threading.Event()

    def sample() -> None:
        nonlocal peak, peak_workers
        while not stop.wait(0.02):
            own, workers = _resident()
            peak, peak_workers = max(peak, own), max(peak_workers, workers)

    sampler = threading.Thread(target=sample)
    sampler.start()
    run.publish()
    stop.set()
    sampler.join()
    run.close()
    return max(0, peak - before), peak_workers


# --- clusters ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def local() -> Iterator[None]:
    """Ray on one node of two CPUs."""
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=OBJECT_STORE,
        logging_level="ERROR",
    )
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def two_nodes() -> Iterator[None]:
    """Two nodes of one CPU each, on this machine."""
    cluster = Cluster()
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1, object_store_memory=OBJECT_STORE, include_dashboard=False)
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        yield
    finally:
        ray.shutdown()
        cluster.shutdown()


def show_sets(windows: int) -> None:
    """Print the table of sets of layers."""
    print("| Ray | layers | in place | with tasks | ratio | store's peak | with tasks | Ray's workers |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
    for where, cluster in (("1 node of 2 CPUs", local), ("2 nodes of 1 CPU", two_nodes)):
        with cluster():
            for what, widths in SETS.items():
                found = measure_set(widths, windows)
                alone, _ = measure_memory(widths, None)
                shared, workers = measure_memory(widths, RemoteSpectra(CORES - 1))
                times = [f"{1e3 * median(found[name]).value:.0f} ms" for name in ("in place", "tasks")]
                change = ratio(found["tasks"], found["in place"])
                sizes = [f"{size / 2**20:.0f} MiB" for size in (alone, shared, workers)]
                ratios = f"{change.value:.2f} ({change.low:.2f} to {change.high:.2f})"
                print("|", " | ".join([where, what, *times, ratios, *sizes]), "|", flush=True)


def show_widths(calls: int) -> None:
    """Print the table of single layers."""
    print("| features | here | by a task | of that, taking it there | store's CPU, here | by a task | sent |")
    print("| --- | --- | --- | --- | --- | --- | --- |", flush=True)
    with local():
        for d, seconds in measure_widths(calls).items():
            times = [*(seconds[name][0] for name in ("here", "task", "sent")), seconds["here"][1], seconds["task"][1]]
            cells = [str(d), *(f"{1e3 * value:.1f} ms" for value in times), f"{4 * d * (d + 1) / 2**20:.1f} MiB"]
            print("|", " | ".join(cells), "|", flush=True)


def main() -> None:
    """Measure, and print tables in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", type=int, default=7, help="windows per set of layers; twice as many single layers")
    parser.add_argument("--only", choices=("sets", "widths"), help="one table alone")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    print(f"WIDE = {publishing.WIDE}, {len(os.sched_getaffinity(0))} cores, {load:.1f} processes run on them\n")
    if options.only != "widths":
        show_sets(options.windows)
    if options.only != "sets":
        show_widths(2 * options.windows)


if __name__ == "__main__":
    main()
