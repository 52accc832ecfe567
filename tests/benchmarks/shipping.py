"""What a worker sends: bytes per window, and what packing and sending take from the training beside them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from delve_ray import SaturationTracker
from tests.benchmarks.models import Workload
from tests.benchmarks.sinks import Sink, attach_to, triangles, widths
from tests.benchmarks.steps import Trainer
from tests.benchmarks.timing import Samples, alternate

FLUSHES = 2
"""Deltas of a window whose bytes are counted: a live one, and the one that closes it."""
_TIMEOUT_S = 600.0
_WORKERS_THREADS = ("packer", "sender")
"""In the names of a worker's threads; the store, which is elsewhere in a cluster, has others."""


def measure_bytes(workload: Workload, windows: int) -> dict[str, Samples]:
    """Bytes per window: "shipped", headers and all, and "triangles", those of every layer, once per flush."""
    trainer = _trainer(workload)
    store = Sink(keeps=False)
    shipped: list[int] = []
    with attach_to(store, trainer.model) as tracker:
        for number in range(windows):
            before = store.bytes
            trainer.step(number)
            tracker.flush(_TIMEOUT_S)
            trainer.step(number)
            tracker.add_saturations()
            tracker.metrics(wait=True, timeout=_TIMEOUT_S)
            shipped.append(store.bytes - before)
        numbers = triangles(widths(trainer.model, tracker.layers))
    expected = FLUSHES * numbers * store.itemsize
    return {"shipped": np.array(shipped, dtype=float), "triangles": np.full(windows, float(expected))}


def measure_sharing(workload: Workload, windows: int, steps: int) -> tuple[dict[str, Samples], dict[str, float]]:
    """Seconds per step while a window is closed every so many steps ("closing") and while none is ("never").

    Both copies are tracked; what is sent is dropped where it arrives, so that no store takes part. Also seconds per
    window: the CPU time of each of the worker's threads, and "GIL", for how long a thread that wants nothing but the
    interpreter has to go without it after a window was closed.
    """
    trainers = {name: _trainer(workload) for name in ("closing", "never")}
    with (
        attach_to(Sink(keeps=False), trainers["closing"].model) as tracker,
        attach_to(Sink(keeps=False), trainers["never"].model),
    ):

        def block(name: str) -> Callable[[int], object]:
            def run(number: int) -> None:
                if name == "closing":
                    tracker.add_saturations()
                for step in range(steps):
                    trainers[name].step(number * steps + step)

            return run

        def arrived(_: str, __: int) -> None:
            tracker.metrics(wait=True, timeout=_TIMEOUT_S)

        variants = {name: block(name) for name in trainers}
        trainers["closing"].step(0)
        tracker.add_saturations()
        samples = alternate(variants, calls=windows, block=1, warmup=1, before=arrived)
        spent = thread_seconds()
        gaps = [_without_interpreter(tracker, trainers["closing"], number) for number in range(windows)]
        shares = {name: (seconds - spent[name]) / windows for name, seconds in thread_seconds().items()}
    shares["GIL"] = float(np.median(gaps))
    return {name: seconds / steps for name, seconds in samples.items()}, shares


def _trainer(workload: Workload) -> Trainer:
    torch.manual_seed(0)
    return Trainer(workload.build(), workload)


def thread_seconds() -> dict[str, float]:
    """CPU time so far of the workers' threads, by name; of all trackers of this process together."""
    seconds: dict[str, float] = {}
    for thread in threading.enumerate():
        name = thread.name.rpartition("-")[2]
        if name in _WORKERS_THREADS and thread.ident is not None:
            clock = time.pthread_getcpuclockid(thread.ident)
            seconds[name] = seconds.get(name, 0.0) + time.clock_gettime(clock)
    return seconds


def _without_interpreter(tracker: SaturationTracker, trainer: Trainer, number: int) -> float:
    """Seconds that this thread waits while it only counts and a window is packed and sent, above those without one."""
    trainer.step(number)
    tracker.metrics(wait=True, timeout=_TIMEOUT_S)
    idle = _waited()
    tracker.add_saturations()
    return max(0.0, _waited() - idle)


def _waited(seconds: float = 0.1) -> float:
    """Of so many seconds of counting, those in which this thread slept: it waits for nothing but the interpreter."""
    ran, start = _on_a_core(), time.perf_counter()
    while time.perf_counter() - start < seconds:
        pass
    return (time.perf_counter() - start) - (_on_a_core() - ran)


def _on_a_core() -> float:
    """Seconds that this thread ran, or was ready to and others had the cores, where Linux says so."""
    try:
        ran, ready, _ = Path("/proc/thread-self/schedstat").read_text(encoding="ascii").split()
    except OSError:
        return time.thread_time()
    return (int(ran) + int(ready)) * 1e-9
