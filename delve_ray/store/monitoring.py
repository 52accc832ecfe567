"""A store's state as Ray's own metrics, which Ray exports for Prometheus beside its own.

Ray puts `ray_` before each name. The dashboard in `cluster/grafana.json` uses exactly these.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from delve_ray.store.core import CovarianceStore

log = logging.getLogger(__name__)

EVERY_S = 5.0
"""Seconds between two updates; Ray itself exports every ten."""
MAX_LAYERS = 64
"""Layers whose saturation is shown; of more, so many are taken evenly over the depth of the network."""
SECONDS = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0]
"""Boundaries of the histograms."""


@dataclass(frozen=True, slots=True)
class Metric:
    """Name, kind ("counter", "gauge" or "histogram"), what it says, and its tags beside `run`."""

    name: str
    kind: str
    description: str
    tags: tuple[str, ...] = ()


METRICS = (
    Metric("delve_ray_deltas_total", "counter", "Deltas that were merged"),
    Metric("delve_ray_bytes_total", "counter", "Bytes of the moments that were merged"),
    Metric("delve_ray_refused_total", "counter", "Deltas, or layers of deltas, that were refused"),
    Metric("delve_ray_repeated_total", "counter", "Deltas that came again and were left out"),
    Metric("delve_ray_late_total", "counter", "Deltas of windows that nobody waited for any more"),
    Metric("delve_ray_dropped_total", "counter", "Windows and lists of scalars that a writer gave up", ("writer",)),
    Metric("delve_ray_lag_windows", "gauge", "Windows by which a rank is behind the first", ("rank",)),
    Metric("delve_ray_silent_seconds", "gauge", "Seconds since a rank was heard of", ("rank",)),
    Metric("delve_ray_outbox_bytes", "gauge", "Bytes that wait at a rank, in memory and on disk", ("rank",)),
    Metric("delve_ray_store_bytes", "gauge", "Bytes of the moments in the store"),
    Metric("delve_ray_open_windows", "gauge", "Windows that are not published yet"),
    Metric("delve_ray_saturation", "gauge", "Saturation in the last published window", ("layer", "phase")),
    Metric("delve_ray_merge_seconds", "histogram", "Time to merge a delta"),
    Metric("delve_ray_publish_seconds", "histogram", "Time to turn a window into rows"),
    Metric("delve_ray_write_seconds", "histogram", "Time to write a window or a list of scalars", ("writer",)),
)
_COUNTS = ("deltas", "bytes", "refused", "repeated", "late")


class Monitor:
    """Keeps Ray's metrics up to date with a store.

    `make` makes the object of a metric, with Ray's methods inc, set and observe; by default those of ray.util.metrics.
    """

    def __init__(self, store: CovarianceStore, make: Callable[[Metric], Any] | None = None) -> None:
        self._store = store
        self._metrics = {metric.name: (make or _of_ray)(metric) for metric in METRICS}
        self._told: dict[str, int] = {}

    def start(self, ended: threading.Event) -> None:
        """Update on a thread of its own until `ended` is set."""
        threading.Thread(target=self._run, args=(ended,), name="delve_ray-monitor", daemon=True).start()

    def _run(self, ended: threading.Event) -> None:
        while not ended.wait(EVERY_S):
            try:
                self.update()
            except Exception:  # who watches must not stop what is watched
                log.exception("run %s: its metrics could not be updated", self._store.config.run)

    def update(self) -> None:
        """Bring all metrics up to date."""
        if not self._store.joined:
            return
        status = self._store.status()
        for name in _COUNTS:
            self._count(f"delve_ray_{name}_total", self._store.counts[name])
        for writer in status["writers"]:
            dropped = int(writer["dropped"]) + int(writer["failed"])
            self._count("delve_ray_dropped_total", dropped, writer=str(writer["name"]))
        self._show("delve_ray_store_bytes", status["bytes"])
        self._show("delve_ray_open_windows", len(status["open_windows"]))
        self._show_ranks(status["ranks"])
        self._show_saturations(self._store.progress().metrics)
        for what, whose, seconds in self._store.timings.drain():
            tags = {"writer": whose} if what == "write" else {}
            self._metrics[f"delve_ray_{what}_seconds"].observe(max(float(seconds), 1e-9), self._tags(tags))

    def _show_ranks(self, ranks: Mapping[int, Mapping[str, Any]]) -> None:
        for number, rank in ranks.items():
            outbox = rank["outbox"]
            self._show("delve_ray_lag_windows", rank["lag"], rank=str(number))
            self._show("delve_ray_silent_seconds", 0.0 if rank["left"] else rank["silent_s"], rank=str(number))
            waiting = outbox.get("memory_bytes", 0) + outbox.get("disk_bytes", 0)
            self._show("delve_ray_outbox_bytes", waiting, rank=str(number))

    def _show_saturations(self, metrics: Mapping[str, float]) -> None:
        layers = [info.name for info in self._store.layers]
        shown = {layers[index * len(layers) // MAX_LAYERS] for index in range(MAX_LAYERS)} if layers else set()
        for key, value in metrics.items():
            stat, phase, layer = key.split("/", 2)
            if stat == "saturation" and (layer in shown or layer == "mean"):
                self._show("delve_ray_saturation", value, layer=layer, phase=phase)

    def _show(self, name: str, value: float, **tags: str) -> None:
        self._metrics[name].set(float(value), self._tags(tags))

    def _count(self, name: str, total: int, **tags: str) -> None:
        """Raise a counter to a total."""
        key = name + "".join(tags.values())
        if more := total - self._told.get(key, 0):
            self._metrics[name].inc(float(more), self._tags(tags))
            self._told[key] = total

    def _tags(self, tags: Mapping[str, str]) -> dict[str, str]:
        return {"run": self._store.config.run, **tags}


def _of_ray(metric: Metric) -> Any:
    from ray.util import metrics

    kinds: dict[str, Any] = {"counter": metrics.Counter, "gauge": metrics.Gauge, "histogram": metrics.Histogram}
    more = {"boundaries": SECONDS} if metric.kind == "histogram" else {}
    return kinds[metric.kind](metric.name, description=metric.description, tag_keys=("run", *metric.tags), **more)
