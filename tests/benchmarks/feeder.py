"""A store fed by simulated senders: prepared moments under fresh headers, as many as are asked for."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from delve_ray.moments import F64, Moments
from delve_ray.store.core import CovarianceStore
from delve_ray.store.protocol import Delta, LayerInfo, Source
from tests.benchmarks.sinks import config

TRAIN = 0
_OBSERVATIONS = 64
_TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True)
class Load:
    """What one window brings: so many senders, each with so many deltas of so many layers of one width."""

    layers: int = 4
    width: int = 256
    flushes: int = 1
    senders: int = 1
    phases: int = 1


class Feeder:
    """A store in this process, and its senders."""

    def __init__(self, load: Load) -> None:
        self.load = load
        options = config(world_size=load.senders)
        self.store = CovarianceStore(options)
        infos = [LayerInfo(f"layer{index}", "Linear", load.width) for index in range(load.layers)]
        self.sources = [Source("bench", "", rank, f"s{rank}", "host", 1 + rank) for rank in range(load.senders)]
        for source in self.sources:
            self.store.register(source, options, infos)
        self.entries = tuple(
            (index, phase, _OBSERVATIONS, 0) for index in range(load.layers) for phase in range(load.phases)
        )
        self.window = 0
        self.sent = 0
        """Deltas of each sender so far."""

    def buffer(self) -> F64:
        """The moments of one delta."""
        moments = Moments.from_rows(np.random.default_rng(0).normal(size=(_OBSERVATIONS, self.load.width)))
        return np.tile(np.concatenate([moments.mean, moments.packed()]), len(self.entries))

    def send(self, buffer: F64, *, close: bool = True) -> float:
        """Send a window's deltas; the CPU seconds of the store that takes them.

        Those of its thread that publishes are not among them, and are waited for.
        """
        seconds = 0.0
        for flush in range(self.load.flushes):
            closes = close and flush == self.load.flushes - 1
            for source in self.sources:
                delta = Delta(source, 0, self.sent, self.window, self.window, closes, closes, self.entries).sealed(
                    buffer
                )
                start = time.thread_time()
                ack = self.store.take(delta, buffer)
                seconds += time.thread_time() - start
                if not ack.merged:
                    raise RuntimeError(f"the store did not take delta {self.sent} of {source.source}: {ack}")
            self.sent += 1
        if close:
            self.window += 1
            self.wait_published()
        return seconds

    def wait_published(self) -> None:
        """Wait until all windows are published. Raises RuntimeError when that takes minutes."""
        deadline = time.monotonic() + _TIMEOUT_S
        while self.store.progress().published < self.window:
            if time.monotonic() > deadline:
                raise RuntimeError(f"window {self.window} is not published: {self.store.status()}")
            time.sleep(0.002)
