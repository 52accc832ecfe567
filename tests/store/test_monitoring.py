"""A store's state as metrics: which figures are told, against what was sent."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from delve_ray.errors import DeltaRefused
from delve_ray.store import monitoring
from delve_ray.store.core import CovarianceStore
from delve_ray.store.monitoring import MAX_LAYERS, METRICS, Metric, Monitor
from delve_ray.store.protocol import LayerInfo
from delve_ray.store.sharded import LocalShards
from delve_ray.store.timings import MOST, Timings
from tests.stores import Keeper, Worker, config, published, rows, source, written


class Recorded:
    """What Ray's metrics have for methods, by tags."""

    def __init__(self, metric: Metric) -> None:
        self.metric = metric
        self.values: dict[tuple[str, ...], Any] = defaultdict(float)

    def _key(self, tags: dict[str, str]) -> tuple[str, ...]:
        assert set(tags) == {"run", "shard", *self.metric.tags}
        assert all(type(value) is str for value in tags.values())
        return tuple(tags[name] for name in self.metric.tags)

    def begin(self, tags: dict[str, str]) -> None:
        assert self.metric.kind == "counter"
        assert self._key(tags) not in self.values, "a counter begins once"
        self.values[self._key(tags)] = 0.0

    def inc(self, value: float, tags: dict[str, str]) -> None:
        assert self.metric.kind == "counter"
        assert type(value) is float
        assert value > 0
        self.values[self._key(tags)] += value

    def set(self, value: float, tags: dict[str, str]) -> None:
        assert self.metric.kind == "gauge"
        assert type(value) is float
        self.values[self._key(tags)] = value

    def observe(self, value: float, tags: dict[str, str]) -> None:
        assert self.metric.kind == "histogram"
        assert type(value) is float
        assert value > 0
        self.values[self._key(tags)] += 1


def watched(store: CovarianceStore) -> tuple[Monitor, dict[str, Recorded]]:
    made: dict[str, Recorded] = {}
    monitor = Monitor(store, lambda metric: made.setdefault(metric.name, Recorded(metric)))
    return monitor, made


def test_every_figure_is_told() -> None:
    options = config(world_size=2)
    store = CovarianceStore(options, writers=[Keeper("a"), Keeper("b", fail=True)])
    monitor, made = watched(store)
    monitor.update()  # nobody has come: there are the counters, but for those of writers, and they are zero
    begun = {name: dict(metric.values) for name, metric in made.items() if metric.values}
    assert begun == {
        f"delve_ray_{name}_total": {(): 0.0} for name in ("deltas", "bytes", "refused", "repeated", "late")
    }
    workers = [Worker(store, rank, options) for rank in range(2)]
    sent = 0
    for step, rank in ((0, 0), (0, 1), (1, 0), (2, 0)):
        delta, buffer = workers[rank].next({(1, 0): rows(20, 5)}, step=step, closes=True)
        store.take(delta, buffer)
        sent += buffer.nbytes
    store.take(delta, buffer)  # again
    with pytest.raises(DeltaRefused):
        store.take(replace(delta, seq=9, window=-3), buffer)
    store.heartbeat(source(1), {"memory_bytes": 30, "disk_bytes": 12})
    written(store, 1)
    monitor.update()
    told = {name.removeprefix("delve_ray_"): dict(metric.values) for name, metric in made.items()}
    assert told["deltas_total"] == {(): 4.0}
    assert told["bytes_total"] == {(): float(sent)}
    assert told["refused_total"] == told["repeated_total"] == {(): 1.0}
    assert told["late_total"] == {(): 0.0}
    assert told["dropped_total"] == {("a",): 0.0, ("b",): 1.0}
    assert told["lag_windows"] == {("0",): 0.0, ("1",): 2.0}
    assert told["outbox_bytes"] == {("0",): 0.0, ("1",): 42.0}
    assert told["open_windows"] == {(): 2.0}
    assert told["store_bytes"] == {(): float(store.status()["bytes"])}
    saturation = store.progress().metrics["saturation/train/fc"]
    assert told["saturation"] == {("fc", "train"): saturation, ("mean", "train"): saturation}
    assert told["merge_seconds"] == {(): 4.0}
    assert told["publish_seconds"] == {(): 1.0}
    assert told["write_seconds"][("a",)] == 1.0
    assert set(told) == {metric.name.removeprefix("delve_ray_") for metric in METRICS}
    monitor.update()
    assert made["delve_ray_deltas_total"].values == {(): 4.0}, "a counter counts once"
    store.finish("test")


def test_what_a_writer_gives_up_is_counted() -> None:
    options = config(world_size=1)
    store = CovarianceStore(options, writers=[Keeper("b", fail=True)])
    monitor, made = watched(store)
    worker = Worker(store, 0, options)
    worker.send({(1, 0): rows(20, 5)}, closes=True)
    published(store, 1)
    store.finish("test")
    assert store.wait_finished(60)
    monitor.update()
    assert made["delve_ray_dropped_total"].values == {("b",): 1.0}
    assert made["delve_ray_write_seconds"].values == {}


def test_the_layers_that_are_shown_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.stores.LAYERS", [LayerInfo(f"l{index}", "Linear", 1) for index in range(300)])
    options = config(world_size=1)
    store = CovarianceStore(options, writers=[])
    monitor, made = watched(store)
    worker = Worker(store, 0, options)
    worker.send({(index, 0): np.arange(3.0)[:, None] for index in range(300)}, closes=True)
    written(store, 1)
    monitor.update()
    shown = [layer for layer, _ in made["delve_ray_saturation"].values]
    assert len(shown) == MAX_LAYERS + 1
    assert {"l0", "mean"} < set(shown)
    assert max(int(name[1:]) for name in shown if name != "mean") >= 295
    store.finish("test")


def test_a_mean_over_layers_is_that_of_all_shards() -> None:
    options = config(world_size=1, num_shards=2, save_to=())
    sharded = LocalShards(options, lambda _: None)
    stores = {"front": sharded.local_front, "0": sharded.local_shards[0], "1": sharded.local_shards[1]}
    worker = Worker(sharded, 0, options)  # type: ignore[arg-type]
    worker.send({(0, 0): np.outer([1.0, -1.0, 0.0], [1, 0, 0]), (1, 0): rows(200, 5)}, closes=True)
    published(sharded, 1)  # type: ignore[arg-type]
    shown = {}
    for shard, store in stores.items():
        made: dict[str, Recorded] = {}
        Monitor(store, lambda metric, made=made: made.setdefault(metric.name, Recorded(metric)), shard=shard).update()
        shown[shard] = dict(made["delve_ray_saturation"].values)
        assert made["delve_ray_deltas_total"].values == {(): 1.0}
    narrow, wide = shown["front"]["conv", "train"], shown["front"]["fc", "train"]
    assert (narrow, wide) == (1 / 3, 1.0)
    assert shown == {"front": shown["front"], "0": {}, "1": {}}
    assert shown["front"]["mean", "train"] == pytest.approx((narrow + wide) / 2)
    worker.leave()
    assert sharded.wait_finished(60)


def test_the_ranks_that_are_shown_are_bounded_and_those_of_before_are_at_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitoring, "MAX_RANKS", 4)
    options = config(world_size=10, silent_after=0)
    store = CovarianceStore(options, writers=[])
    monitor, made = watched(store)
    workers = [Worker(store, rank, options) for rank in range(10)]
    for worker in workers:
        if worker.source.rank != 9:
            worker.send({}, closes=True)
    store.heartbeat(source(9), {"memory_bytes": 7})
    monitor.update()
    assert dict(made["delve_ray_lag_windows"].values) == {("0",): 0, ("2",): 0, ("5",): 0, ("7",): 0, ("max",): 1}
    assert made["delve_ray_outbox_bytes"].values["max",] == 7
    again = replace(options, world_size=3)  # a new attempt, of fewer ranks
    anew = [Worker(store, rank, again, token="again") for rank in range(3)]
    anew[0].send({}, closes=True)
    monitor.update()
    lag = {("0",): 0, ("1",): 1, ("2",): 1, ("5",): 0, ("7",): 0, ("max",): 0}
    assert dict(made["delve_ray_lag_windows"].values) == lag
    assert made["delve_ray_outbox_bytes"].values["max",] == 0
    store.finish("test")


class OfRay:
    """A counter of Ray's, with or without what `inc` calls."""

    def __init__(self) -> None:
        self.total = 1.0

    def inc(self, value: float, tags: dict[str, str]) -> None:
        assert value > 0
        self.total += value


def test_a_counter_begins_without_what_is_behind_rays() -> None:
    counter = OfRay()
    monitoring._Counter(counter).begin({"run": "r"})
    assert counter.total == 1.0


def test_a_metric_that_fails_does_not_stop_the_watching(monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    monkeypatch.setattr(monitoring, "EVERY_S", 0.01)
    calls = threading.Semaphore(0)

    class Broken(Monitor):
        def update(self) -> None:
            calls.release()
            raise RuntimeError("no metrics today")

    ended = threading.Event()
    Broken(CovarianceStore(config(world_size=1), writers=[]), Recorded).start(ended)
    for _ in range(3):
        assert calls.acquire(timeout=60)
    ended.set()


def test_durations_are_bounded_and_told_once() -> None:
    timings = Timings()
    for number in range(MOST + 10):
        timings.note("merge", float(number))
    found = timings.drain()
    assert [seconds for _, _, seconds in found] == [float(number) for number in range(10, MOST + 10)]
    with pytest.raises(OSError, match="full"), timings.of("write", "parquet"):
        raise OSError("full")
    with timings.of("write", "parquet"):
        pass
    ((what, whose, seconds),) = timings.drain()
    assert (what, whose) == ("write", "parquet")
    assert seconds >= 0
