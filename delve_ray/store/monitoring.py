"""The state of a store, or of a combiner, as Ray's own metrics, which Ray exports for Prometheus beside its own.

Ray puts `ray_` before each name. The dashboard in `cluster/grafana.json` uses exactly these.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from delve_ray.store.combiner import Combiner
from delve_ray.store.core import CovarianceStore

log = logging.getLogger(__name__)

EVERY_S = 5.0
"""Seconds between two updates; Ray itself exports every ten."""
MAX_LAYERS = 64
"""Layers whose saturation is shown; of more, so many are taken evenly over the depth of the network."""
MAX_RANKS = 256
"""Ranks that are shown; of more, so many evenly, and under `rank="max"` the largest value of all."""
LEAST = 5e-324
"""The least number above zero: added to a counter it changes no sum."""
SECONDS = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0]
"""Boundaries of the histograms."""


@dataclass(frozen=True, slots=True)
class Metric:
    """Name, kind ("counter", "gauge" or "histogram"), what it says, and its tags beside the `common` ones.

    `shard` is a shard's number, "front" for what has the files of a run with shards, "all" for a store without. Deltas,
    also repeated and late ones, are counted by each shard and by the front.
    """

    name: str
    kind: str
    description: str
    tags: tuple[str, ...] = ()
    common: tuple[str, ...] = ("run", "shard")

    @property
    def all_tags(self) -> tuple[str, ...]:
        """Every tag that each value has."""
        return (*self.common, *self.tags)


WHOLE_RUN = ("all", "front")
"""The stores that know of every layer and every delta of a run."""
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
COMBINER_METRICS = tuple(
    Metric(f"delve_ray_combiner_{name}", kind, description, common=("run",))
    for name, kind, description in (
        ("deltas_total", "counter", "Deltas that a node's workers have brought to their combiner"),
        ("bundles_total", "counter", "Bundles of several deltas that the store has taken from it"),
        ("alone_total", "counter", "Deltas that it has offered to the store by themselves"),
        ("saved_bytes_total", "counter", "Bytes by which bundles were smaller than their deltas"),
        ("waiting", "gauge", "Deltas that wait in it for the store's answer"),
    )
)
"""A combiner has its metrics from when it starts, with its node's first worker. Ray's own tags tell of which node they
are."""
_RANK_METRICS = tuple(metric.name for metric in METRICS if metric.tags == ("rank",))
_COUNTS = ("deltas", "bytes", "refused", "repeated", "late")


class Exporter:
    """Keeps some of Ray's metrics up to date, on a thread of its own; `update` does so once.

    `make` makes the object of a metric, with Ray's methods inc, set and observe, and for a counter `begin`, which
    exports it as zero; by default those of ray.util.metrics. `common` are the tags that all of them have.
    """

    def __init__(
        self, metrics: Sequence[Metric], common: Mapping[str, str], make: Callable[[Metric], Any] | None = None
    ) -> None:
        self._metrics = {metric.name: (make or _of_ray)(metric) for metric in metrics}
        self._common = dict(common)
        self._told: dict[str, int] = {}

    def start(self, ended: threading.Event) -> None:
        """Update on a thread of its own until `ended` is set."""
        threading.Thread(target=self._run, args=(ended,), name="delve_ray-monitor", daemon=True).start()

    def _run(self, ended: threading.Event) -> None:
        while True:
            try:
                self.update()
            except Exception:  # who watches must not stop what is watched
                log.exception("run %s: its metrics could not be updated", self._common["run"])
            if ended.wait(EVERY_S):
                return

    def update(self) -> None:
        """Bring all metrics up to date."""
        raise NotImplementedError

    def _show(self, name: str, value: float, **tags: str) -> None:
        self._metrics[name].set(float(value), self._tags(tags))

    def _count(self, name: str, total: int, **tags: str) -> None:
        """Raise a counter to a total."""
        key = name + "".join(tags.values())
        if key not in self._told:
            self._metrics[name].begin(self._tags(tags))
            self._told[key] = 0
        if more := total - self._told[key]:
            self._metrics[name].inc(float(more), self._tags(tags))
            self._told[key] = total

    def _tags(self, tags: Mapping[str, str]) -> dict[str, str]:
        return {**self._common, **tags}


class Monitor(Exporter):
    """The metrics of a store, or of one of the stores of a run with shards."""

    def __init__(
        self, store: CovarianceStore, make: Callable[[Metric], Any] | None = None, *, shard: str = "all"
    ) -> None:
        super().__init__(METRICS, {"run": store.config.run, "shard": shard}, make)
        self._store = store
        self._shard = shard
        self._ranks: set[str] = set()
        self._saturations: set[tuple[str, str]] = set()

    def update(self) -> None:
        """See `Exporter.update`."""
        for name in _COUNTS:
            self._count(f"delve_ray_{name}_total", self._store.counts[name])
        if not self._store.joined:
            return
        status = self._store.status()
        for writer in status["writers"]:
            dropped = int(writer["dropped"]) + int(writer["failed"])
            self._count("delve_ray_dropped_total", dropped, writer=str(writer["name"]))
        self._show("delve_ray_store_bytes", status["bytes"])
        self._show("delve_ray_open_windows", len(status["open_windows"]))
        self._show_ranks(status["ranks"])
        if self._shard in WHOLE_RUN:  # a shard's mean would be that of its own layers
            self._show_saturations(self._store.progress().metrics)
        for what, whose, seconds in self._store.timings.drain():
            tags = {"writer": whose} if what == "write" else {}
            self._metrics[f"delve_ray_{what}_seconds"].observe(max(float(seconds), 1e-9), self._tags(tags))

    def _show_ranks(self, ranks: Mapping[int, Mapping[str, Any]]) -> None:
        values = {str(number): _rank_values(rank) for number, rank in ranks.items()}
        shown = list(values)
        if len(values) > MAX_RANKS:
            shown = [shown[index * len(values) // MAX_RANKS] for index in range(MAX_RANKS)]
            values["max"] = {name: max(told[name] for told in values.values()) for name in _RANK_METRICS}
            shown.append("max")
        for rank in shown:
            for name, value in values[rank].items():
                self._show(name, value, rank=rank)
        for rank in self._ranks.difference(shown):  # of an attempt with more ranks: Ray would keep their last values
            for name in _RANK_METRICS:
                self._show(name, 0.0, rank=rank)
        self._ranks.update(shown)

    def _show_saturations(self, metrics: Mapping[str, float]) -> None:
        layers = [info.name for info in self._store.layers]
        shown = {layers[index * len(layers) // MAX_LAYERS] for index in range(MAX_LAYERS)} if layers else set()
        told = set()
        for key, value in metrics.items():
            stat, phase, layer = key.split("/", 2)
            if stat == "saturation" and (layer in shown or layer == "mean"):
                told.add((layer, phase))
                self._show("delve_ray_saturation", value, layer=layer, phase=phase)
        for layer, phase in self._saturations - told:  # which a sketch has left open: Ray would keep their last values
            self._show("delve_ray_saturation", math.nan, layer=layer, phase=phase)
        self._saturations |= told


class CombinerMonitor(Exporter):
    """The metrics of a node's combiner."""

    def __init__(self, run: str, combiner: Combiner, make: Callable[[Metric], Any] | None = None) -> None:
        super().__init__(COMBINER_METRICS, {"run": run}, make)
        self._combiner = combiner

    def update(self) -> None:
        """See `Exporter.update`."""
        for name, total in self._combiner.counts.items():
            self._count(f"delve_ray_combiner_{name}_total", total)
        self._show("delve_ray_combiner_waiting", self._combiner.waiting)


def _rank_values(rank: Mapping[str, Any]) -> dict[str, float]:
    outbox = rank["outbox"]
    return {
        "delve_ray_lag_windows": float(rank["lag"]),
        "delve_ray_silent_seconds": 0.0 if rank["left"] else float(rank["silent_s"]),
        "delve_ray_outbox_bytes": float(outbox.get("memory_bytes", 0) + outbox.get("disk_bytes", 0)),
    }


class _Counter:
    """A counter of Ray's that is there before the first event.

    Without, Prometheus sees it first at that event's count, and counts an increase of nothing. Ray's `inc` refuses
    zero, and what is behind it takes it.
    """

    def __init__(self, counter: Any) -> None:
        self._counter = counter
        self.inc = counter.inc

    def begin(self, tags: Mapping[str, str]) -> None:
        """Export zero."""
        record = getattr(self._counter, "_record", None)
        if record is None:  # Ray's own, which a version of it may not have
            self._counter.inc(LEAST, tags)
        else:
            record(0.0, tags)


def _of_ray(metric: Metric) -> Any:
    from ray.util import metrics

    kinds: dict[str, Any] = {"counter": metrics.Counter, "gauge": metrics.Gauge, "histogram": metrics.Histogram}
    more = {"boundaries": SECONDS} if metric.kind == "histogram" else {}
    made = kinds[metric.kind](metric.name, description=metric.description, tag_keys=metric.all_tags, **more)
    return _Counter(made) if metric.kind == "counter" else made
