"""Decompositions of wide layers as Ray tasks, where the cluster has CPUs to spare; the others stay in the store.

GPUs belong to who trains: one is used where the run's `spectra_gpus` allows it and nobody has it at that moment.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError

from delve_ray.reservoir import Reservoir
from delve_ray.schema import LayerRow
from delve_ray.store.device_spectra import device_row
from delve_ray.store.protocol import LayerInfo, StoreConfig
from delve_ray.store.publishing import WIDE, layer_row
from delve_ray.store.window import Collected

log = logging.getLogger(__name__)

MOST_TASKS = 16
"""Tasks of one store at a time: what it has packed for them is in the object store meanwhile."""
LOOK_S = 5.0
"""How long an answer about free CPUs holds."""
WAIT_S = 120.0
"""How long a task may take before the store decomposes that layer by itself."""
GPU_WIDE = 4096
"""Features from which on a layer may go to a GPU. Ray ends the process of such a task, which frees the GPU's memory, so
that each one begins by importing torch and waking the GPU: seconds, as long as one core takes for a layer of this
width."""
GPU_AGAIN_S = 600.0
"""How long no GPU is tried after one has failed."""
GPUS_PER_TASK = 1
"""What such a task takes: all of a GPU."""


class RemoteSpectra:
    """Computes rows as `publishing.layer_row` does, those of wide layers elsewhere if there is room.

    Called by several threads at a time, of which `cores` compute here; a task takes one CPU, and is begun where one is
    free. What a task does not answer is computed here. Memory: the packed moments of `MOST_TASKS` layers.
    """

    def __init__(self, cores: int, device: str = "cuda") -> None:
        self._cores = max(1, cores)
        self._here = 0
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)  # a place has become free, here or elsewhere
        self._running = 0
        self._free = 0
        self._looked = float("-inf")
        self._looking = False
        self._told: set[str] = set()
        self._device = device
        self._on_gpus = 0
        self._no_gpu_until = float("-inf")
        self.sent = 0
        """Layers that were decomposed elsewhere."""
        self.sent_to_gpus = 0
        """Of these, on a GPU."""

    def __call__(
        self, layer: LayerInfo, phase: str, found: Collected, config: StoreConfig, sample: Reservoir | None = None
    ) -> LayerRow:
        """The row of a layer."""
        d = found.mean.size
        # The head of a sketch comes from k×k matrices, for which no GPU is woken.
        if d >= GPU_WIDE and not found.columns and self._take_gpu(config.spectra_gpus):
            try:
                row = self._on_gpu(layer, phase, found, config, sample)
            finally:
                with self._lock:
                    self._on_gpus -= 1
            if row is not None:
                return row
        if self._take_place(wide=d >= WIDE):
            try:
                row = self._elsewhere(layer, phase, found, config, sample)
            finally:
                self._give_back(elsewhere=True)
            if row is not None:
                return row
            self._take_place(wide=False)
        try:
            return layer_row(layer, phase, found, config, sample)
        finally:
            self._give_back(elsewhere=False)

    def _take_gpu(self, most: int) -> bool:
        """Whether one more task may have a GPU, and finds one that nobody has."""
        with self._lock:
            if self._on_gpus >= most or time.monotonic() < self._no_gpu_until:
                return False
            self._on_gpus += 1
        there_is_one = False
        try:  # without the lock, for Ray may take its time
            there_is_one = bool(ray.available_resources().get("GPU", 0) >= 1)
        finally:
            if not there_is_one:
                with self._lock:
                    self._on_gpus -= 1
        return there_is_one

    def _take_place(self, *, wide: bool) -> bool:
        """Wait for a place: True for a wide layer that finds a free CPU elsewhere, False for one here."""
        while True:
            if wide:
                self._look()
            with self._changed:
                if wide and self._running < min(self._free, MOST_TASKS):
                    self._running += 1
                    return True
                if self._here < self._cores:
                    self._here += 1
                    return False
                self._changed.wait(LOOK_S)

    def _give_back(self, *, elsewhere: bool) -> None:
        with self._changed:
            self._running -= elsewhere
            self._here -= not elsewhere
            self._changed.notify_all()

    def _look(self) -> None:
        """Ask Ray how many CPUs are free, unless that is known; who gives a place back does not wait meanwhile."""
        with self._changed:
            while self._looking:
                self._changed.wait()
            if time.monotonic() - self._looked <= LOOK_S:
                return
            self._looking = True
            looked = self._looked = time.monotonic()
            running = self._running
        free = 0
        try:
            # Ray counts nothing for the store's own threads: where there is one node, they take of what seems free.
            alone = sum(bool(node["Alive"]) for node in ray.nodes()) == 1
            # What we have running is not free, and will be.
            free = int(ray.available_resources().get("CPU", 0)) - (self._cores if alone else 0) + running
        finally:
            with self._changed:
                self._looking = False
                if self._looked == looked:  # no task has failed meanwhile
                    self._free = free
                self._changed.notify_all()

    def _elsewhere(
        self, layer: LayerInfo, phase: str, found: Collected, config: StoreConfig, sample: Reservoir | None
    ) -> LayerRow | None:
        """The row from a task; None where there is no answer."""
        row: LayerRow | None = self._ask(layer_row, {}, layer, phase, found, config, sample)
        if row is None:
            with self._lock:
                self._free, self._looked = 0, time.monotonic() + WAIT_S  # for a while
            return None
        with self._lock:
            self.sent += 1
        return _own(row)

    def _on_gpu(
        self, layer: LayerInfo, phase: str, found: Collected, config: StoreConfig, sample: Reservoir | None
    ) -> LayerRow | None:
        """The row from a task that has a GPU; None where there is no answer."""
        more = {"num_gpus": GPUS_PER_TASK}
        answer = self._ask(device_row, more, layer, phase, found, config, sample, self._device)
        row, trouble = (None, "no answer") if answer is None else answer
        if trouble is not None:
            self._warn("gpu", f"run {config.run}: a GPU failed to decompose a layer, CPUs do it: {trouble}")
            with self._lock:
                self._no_gpu_until = time.monotonic() + GPU_AGAIN_S
        if row is None:
            return None
        with self._lock:
            self.sent += 1
            self.sent_to_gpus += trouble is None
        return _own(row)

    def _ask(
        self,
        function: Callable[..., Any],
        resources: Mapping[str, Any],
        layer: LayerInfo,
        phase: str,
        found: Collected,
        config: StoreConfig,
        *more: Any,
    ) -> Any:
        """What a function gives as a task; None where there is no answer."""
        plain = replace(config, writers=(), writer_args={})
        # Not in the placement group of whoever is here, and on the next node rather than this one.
        options = {"num_cpus": 1, "scheduling_strategy": "SPREAD", "max_retries": 0, **resources}
        reference = None
        try:
            reference = _task(function).options(**options).remote(layer, phase, found, plain, *more)
            return ray.get(reference, timeout=WAIT_S)
        except (RayError, GetTimeoutError) as error:
            if isinstance(error, GetTimeoutError) and reference is not None:
                ray.cancel(reference, force=True)  # one that waits for its turn would ask for more nodes
            self._warn("task", f"run {config.run}: a task that decomposes layers failed, the store does it: {error}")
            return None

    def _warn(self, kind: str, what: str) -> None:
        """Say something once."""
        with self._lock:
            told = kind in self._told
            self._told.add(kind)
        if not told:
            log.warning("%s", what)


@lru_cache(maxsize=4)
def _task(function: Callable[..., Any]) -> Any:
    """A function as a task: Ray brings it to its workers once."""
    return ray.remote(function)


def _own(row: LayerRow) -> LayerRow:
    """A row with arrays of its own: those that come out of the object store are views of it."""
    return replace(
        row,
        eigenvalues=row.eigenvalues.copy(),
        mean=row.mean.copy(),
        covariance=None if row.covariance is None else row.covariance.copy(),
        embedding=None if row.embedding is None else row.embedding.copy(),
    )
