"""Decompositions of wide layers as Ray tasks, where the cluster has CPUs to spare; the others stay in the store."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError

from delve_ray.reservoir import Reservoir
from delve_ray.schema import LayerRow
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


class RemoteSpectra:
    """Computes rows as `publishing.layer_row` does, those of wide layers elsewhere if there is room.

    Called by several threads at a time, of which `cores` compute here; a task takes one CPU, and is begun where one is
    free. What a task does not answer is computed here. Memory: the packed moments of `MOST_TASKS` layers.
    """

    def __init__(self, cores: int) -> None:
        self._local = threading.Semaphore(max(1, cores))
        self._lock = threading.Lock()
        self._running = 0
        self._free = 0
        self._looked = float("-inf")
        self._told = False
        self.sent = 0
        """Layers that were decomposed elsewhere."""

    def __call__(
        self, layer: LayerInfo, phase: str, found: Collected, config: StoreConfig, sample: Reservoir | None = None
    ) -> LayerRow:
        """The row of a layer."""
        if found.mean.size >= WIDE and self._take_place():
            try:
                row = self._elsewhere(layer, phase, found, config, sample)
            finally:
                with self._lock:
                    self._running -= 1
            if row is not None:
                return row
        with self._local:
            return layer_row(layer, phase, found, config, sample)

    def _take_place(self) -> bool:
        """Whether one more task finds a free CPU."""
        with self._lock:
            if time.monotonic() - self._looked > LOOK_S:
                self._looked = time.monotonic()
                # What we have running is not free, and will be.
                self._free = int(ray.available_resources().get("CPU", 0)) + self._running
            if self._running >= min(self._free, MOST_TASKS):
                return False
            self._running += 1
            return True

    def _elsewhere(
        self, layer: LayerInfo, phase: str, found: Collected, config: StoreConfig, sample: Reservoir | None
    ) -> LayerRow | None:
        """The row from a task; None where there is no answer."""
        try:
            plain = replace(config, writers=(), writer_args={})
            # Not in the placement group of whoever is here, and on the next node rather than this one.
            task: Any = ray.remote(layer_row).options(num_cpus=1, scheduling_strategy="SPREAD", max_retries=0)
            row: LayerRow = ray.get(task.remote(layer, phase, found, plain, sample), timeout=WAIT_S)
        except (RayError, GetTimeoutError) as error:
            if not self._told:
                log.warning("run %s: a task that decomposes layers failed, the store does it: %s", config.run, error)
            self._told = True
            with self._lock:
                self._free, self._looked = 0, time.monotonic() + WAIT_S  # for a while
            return None
        with self._lock:
            self.sent += 1
        # Arrays that come out of the object store are views of it.
        return replace(
            row,
            eigenvalues=row.eigenvalues.copy(),
            mean=row.mean.copy(),
            covariance=None if row.covariance is None else row.covariance.copy(),
            embedding=None if row.embedding is None else row.embedding.copy(),
        )
