"""What one delta, byte, decomposition, sign of life and row costs, in CPU seconds: what docs/scale.md calculates with.

CPU time and not the clock's, so that a busy machine changes little. BLAS should have one thread (OMP_NUM_THREADS=1).
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import psutil
import ray

from delve_ray.schema import PublishedWindow
from delve_ray.storage import Storage
from delve_ray.store import actor
from delve_ray.store.core import CovarianceStore
from delve_ray.store.protocol import LayerInfo
from delve_ray.store.publishing import layer_row
from delve_ray.store.saving import Saver
from delve_ray.store.window import Collected
from delve_ray.writers.parquet import ParquetWriter
from tests.benchmarks.report import Section, markdown_cells
from tests.benchmarks.scale_local import config_of
from tests.benchmarks.scale_ray import scale_ray
from tests.benchmarks.scale_shapes import RUN, SHAPES, Deltas, source_of
from tests.windows import window as a_window

TEXT = """\
CPU seconds, medians, one BLAS thread. A delta in the store: checking and merging it, of layers of 8 features for what
it costs however small it is, and of ResNet-50's at full width for what a byte costs. Through Ray: of the store's
process, and of the caller's. A row: all statistics of a layer, one decomposition; and writing it into a Parquet file
of its window's 54.
"""
DECOMPOSED = (64, 256, 512, 1024, 2048, 4096)
_CALLS, _WINDOWS = 400, 8
_ASKED = (
    "progress with the metrics of 54 layers, through Ray",
    "heartbeat that brings the metrics of 54 layers, through Ray",
    "heartbeat, through Ray",
)


def cpu_seconds(call: Callable[[], object], repeats: int) -> float:
    """Median CPU seconds of this process."""
    spent = []
    for _ in range(repeats):
        began = time.process_time()
        call()
        spent.append(time.process_time() - began)
    return statistics.median(spent)


class _Taker:
    """A store that takes delta after delta of one window."""

    def __init__(self, widths: list[int]) -> None:
        self.deltas = Deltas(widths, 1)
        self.config = replace(config_of("/nowhere", 1, 1), save_to=())
        self.store = CovarianceStore(self.config, writers=[])
        self.store.register(source_of(0), self.config, self.deltas.layers)
        self.seq = 0

    def header(self) -> Any:
        """The next delta."""
        delta = replace(self.deltas.pieces[0].header(source_of(0), 0), seq=self.seq, closes=False, labelled=False)
        self.seq += 1
        return delta.sealed(self.deltas.pieces[0].buffer)

    def seconds(self, repeats: int) -> float:
        """CPU seconds of one `take`."""
        headers = [self.header() for _ in range(repeats + 1)]
        buffer = self.deltas.pieces[0].buffer
        self.store.take(headers.pop(0), buffer)
        taking = iter(headers)
        return cpu_seconds(lambda: self.store.take(next(taking), buffer), repeats)


def take_constants() -> list[tuple[str, str]]:
    """Merging and saving."""
    one, many = (_Taker([8] * layers).seconds(300) for layers in (1, 101))
    wide = _Taker(SHAPES["resnet50"].widths)
    layer = (many - one) / 100
    whole = wide.seconds(12)
    per_byte = (whole - one - 53 * layer) / wide.deltas.nbytes
    with tempfile.TemporaryDirectory() as folder:
        saver = Saver(Storage(folder), 1e9)
        saver._store = wide.store
        saving = cpu_seconds(saver._save, 3) / wide.deltas.nbytes
    beat = cpu_seconds(lambda: [wide.store.heartbeat(source_of(0), {}) for _ in range(1000)], 5) / 1000
    return [
        ("a delta, however small", f"{1e6 * one:.0f} µs"),
        ("and each of its layers", f"{1e6 * layer:.1f} µs"),
        ("a byte merged", f"{1e9 * per_byte:.3f} ns, {1e-9 / per_byte:.1f} GB/s"),
        ("a byte saved in a snapshot", f"{1e9 * saving:.2f} ns, {1e-9 / saving:.2f} GB/s"),
        ("a heartbeat, without Ray", f"{1e6 * beat:.1f} µs"),
    ]


def row_constants() -> list[tuple[str, str]]:
    """Decomposing and writing."""
    found, rows = [], {}
    config = config_of("/nowhere", 1, 1)
    rng = np.random.default_rng(0)
    for width in DECOMPOSED:
        values = rng.normal(size=(width, width))
        packed = (values @ values.T)[np.triu_indices(width)]
        collected = Collected(4 * width, 0, np.zeros(width), packed, 4.0 * width)
        info = LayerInfo(f"layer{width}", "Linear", width)

        def make(info: LayerInfo = info, collected: Collected = collected, width: int = width) -> None:
            rows[width] = layer_row(info, "train", collected, config)

        make()
        seconds = cpu_seconds(make, 1 if width > 2048 else 3)
        found.append((f"a row of {width} features", f"{1e3 * seconds:.1f} ms, {1e9 * seconds / width**3:.2f} ns · d³"))
    for width in (256, 4096):
        several = [
            replace(rows[width], layer=f"layer{index}", eigenvalues=np.sort(rng.random(width))[::-1])
            for index in range(54)
        ]
        window: PublishedWindow = a_window(several)
        with tempfile.TemporaryDirectory() as folder:
            numbers = iter(range(100))
            writer = ParquetWriter(Storage(folder))
            seconds = cpu_seconds(lambda w=window, n=numbers, p=writer: p.write(replace(w, window=next(n))), 5)  # type: ignore[misc]
            size = os.path.getsize(f"{folder}/spectra/000000-0000000000-000000.parquet")
        found.append((f"writing a row of {width} features", f"{1e6 * seconds / 54:.0f} µs, {size / 54:.0f} bytes"))
    return found


class _Caller:
    """A process that calls a store."""

    def pid(self) -> int:
        """This process."""
        return os.getpid()

    def call(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> int:
        """Call it with each of these, each call after the one before; how many of the answers bring metrics."""
        handle = actor.find(RUN)
        answers = [ray.get(getattr(handle, method).remote(*each)) for each in arguments]
        return sum(answer.metrics is not None for answer in answers)


def ray_constants() -> list[tuple[str, str]]:
    """Calls through Ray: of every rank of a run, after each of its windows."""
    spent: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in _ASKED}
    sources = [source_of(rank) for rank in range(_CALLS)]
    beats = [(source, {"deltas": 0}) for source in sources]
    with scale_ray(), tempfile.TemporaryDirectory() as folder:
        config = config_of(folder, _CALLS, 1)
        deltas = Deltas(SHAPES["resnet50"].scaled(1 / 16), 1)
        store = actor.connect(actor.start(config))
        for source in sources:
            store.register(source, config, deltas.layers)
        caller = ray.remote(num_cpus=0)(_Caller).remote()
        pids = [store.status()["pid"], ray.get(caller.pid.remote())]
        for window in range(_WINDOWS):
            for source in sources:
                store.take(deltas.pieces[0].header(source, window), deltas.pieces[0].buffer)
            while store.progress().published <= window:
                time.sleep(0.05)
            store.flush(60.0)  # what is still written is no part of what is measured
            asked = (("progress", [()] * _CALLS, _CALLS), ("heartbeat", beats, _CALLS), ("heartbeat", beats, 0))
            for name, (method, arguments, told) in zip(_ASKED, asked, strict=True):
                before = [_seconds(pid) for pid in pids]
                if ray.get(caller.call.remote(method, arguments)) != told:
                    raise RuntimeError(f"{name}: not so many answers brought metrics")
                for side, pid, start in zip(spent[name], pids, before, strict=True):
                    side.append((_seconds(pid) - start) / _CALLS)
        nbytes = len(store.progress().metrics.packed)
        for source in sources:
            store.leave(source, completed=True, sent=_WINDOWS, timeout=60.0)
        store.wait_finished(60.0)
        ray.kill(caller)
        for source in sources:
            store.end(source)
    each = {name: [1e3 * statistics.median(side) for side in sides] for name, sides in spent.items()}
    costs = [(name, f"store {own:.2f} ms, caller {others:.2f} ms") for name, (own, others) in each.items()]
    return [*costs, ("the metrics of 54 layers, as they travel", f"{1e-3 * nbytes:.1f} KB")]


def _seconds(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def constants_section(*, through_ray: bool = True) -> Section:
    """The table of all constants."""
    lines = take_constants() + row_constants() + (ray_constants() if through_ray else [])
    return Section("Constants", TEXT, markdown_cells(("what", "CPU time"), lines))


if __name__ == "__main__":
    print(constants_section())
