"""The metrics as they travel: the same values in the same order, packed once, and with one answer per window."""

from __future__ import annotations

import copy
import math
import pickle
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from delve_ray.store import metrics as metrics_module
from delve_ray.store.core import CovarianceStore
from delve_ray.store.metrics import Metrics, unpacked
from delve_ray.store.protocol import Ack
from delve_ray.store.sharded import LocalShards
from tests.stores import Worker, config, published, rows, until

KEYS = st.text(max_size=20)
VALUES = st.floats(allow_nan=True, allow_infinity=True)


def bits(values: dict[str, float]) -> list[tuple[str, str]]:
    """Keys and values in their order, in which NaN is equal to NaN and 0.0 is not -0.0."""
    return [(key, "nan" if math.isnan(value) else value.hex()) for key, value in values.items()]


@given(st.dictionaries(KEYS, VALUES, max_size=30))
def test_what_arrives_is_what_was_sent(values: dict[str, float]) -> None:
    sent = Metrics(values)
    arrived = pickle.loads(pickle.dumps(sent))
    assert bits(dict(arrived)) == bits(values) == bits(dict(sent))
    assert all(type(value) is float for value in arrived.values())
    assert bits(dict(copy.deepcopy(arrived))) == bits(values)


def test_they_are_a_mapping_that_does_not_change() -> None:
    values = {"saturation/train/fc": 0.5}
    metrics = Metrics(values)
    values["more"] = 1.0
    assert metrics == {"saturation/train/fc": 0.5}
    assert metrics != {"saturation/train/fc": 0.25}
    assert unpacked(metrics.packed) == metrics
    assert repr(metrics) == "Metrics({'saturation/train/fc': 0.5})"
    with pytest.raises(KeyError):
        metrics["saturation/eval/fc"]
    with pytest.raises(TypeError):
        metrics["saturation/eval/fc"] = 1.0  # type: ignore[index]


def test_they_are_packed_once_however_often_they_are_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    compressed = []
    compress = metrics_module.zlib.compress
    monkeypatch.setattr(metrics_module.zlib, "compress", lambda keys: (compressed.append(keys), compress(keys))[1])
    metrics = Metrics({f"trace/train/layer{index}": float(index) for index in range(300)})
    assert metrics["trace/train/layer7"] == 7.0
    assert not compressed, "not as long as nothing is sent"
    for _ in range(3):
        again = pickle.loads(pickle.dumps(metrics))  # as a combiner hands on what the store has answered
        assert pickle.loads(pickle.dumps(again)) == metrics
    assert len(compressed) == 1
    assert len(metrics.packed) < 12 * 300


# --- with which answers they come ------------------------------------------------------------------------------


def answers(store: CovarianceStore, workers: list[Worker]) -> list[Ack]:
    return [store.heartbeat(worker.source) for worker in workers]


def test_each_rank_is_told_once_after_each_window() -> None:
    options = config()
    store = CovarianceStore(options, writers=[])
    workers = [Worker(store, rank, token="attempt") for rank in range(2)]
    assert [ack.metrics for ack in answers(store, workers)] == [{}, {}], "what there is when it comes"
    for window in range(3):
        acks = [worker.send({(1, 0): rows(20, 5)}, step=window, closes=True) for worker in workers]
        assert [ack.metrics for ack in acks] == [None, None]
        published(store, window + 1)
        told = [ack.metrics for ack in answers(store, workers)]
        assert told == [store.progress().metrics] * 2
        assert told[0]
        assert [ack.metrics for ack in answers(store, workers)] == [None, None]
    again = store.register(workers[0].source, options, store.layers)  # its registration was repeated
    assert again.window == 3
    assert store.heartbeat(workers[0].source).metrics is None
    anew = Worker(store, 0, name="another", token="attempt", pid=500)  # another process in its place knows nothing
    assert store.heartbeat(anew.source).metrics == store.progress().metrics
    store.finish("test")


def test_the_answer_to_a_delta_tells_them_too() -> None:
    store = CovarianceStore(config(world_size=1), writers=[])
    worker = Worker(store, 0)
    worker.send({(1, 0): rows(20, 5)}, closes=True)
    published(store, 1)
    first = store.progress().metrics
    assert worker.send({(1, 0): rows(20, 5)}, step=1).metrics == first
    assert worker.send({(1, 0): rows(20, 5)}, step=1, closes=True).metrics is None
    published(store, 2)
    assert worker.leave().metrics == store.progress().metrics != first


def test_more_than_an_answer_has_room_for_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    store = CovarianceStore(config(world_size=1), writers=[])
    worker = Worker(store, 0)
    worker.send({(1, 0): rows(20, 5)}, closes=True)
    published(store, 1)
    many = store.progress().metrics
    monkeypatch.setattr("delve_ray.store.intake.MOST_ALONG", len(many) - 1)
    ack = store.heartbeat(worker.source)
    assert (ack.metrics, ack.published) == (None, 1)
    assert store.progress().metrics == many
    store.finish("test")


def test_with_shards_the_front_tells_those_of_all_layers() -> None:
    options = config(world_size=1, num_shards=2, save_to=())
    store = LocalShards(options, lambda _: None)
    worker = Worker(store, 0, options)  # type: ignore[arg-type]
    parts: list[Ack] = []
    for shard in store.local_shards:
        take = shard.take
        shard.take = lambda *delta, take=take: (parts.append(take(*delta)), parts[-1])[1]  # type: ignore[method-assign]
    worker.send({(0, 0): rows(20, 3), (1, 0): rows(20, 5)}, closes=True)
    until(lambda: store.progress().published == 1)
    ack = worker.send({(0, 0): rows(20, 3)}, step=1, closes=True)
    assert ack.metrics == store.progress().metrics
    assert {"saturation/train/conv", "saturation/train/fc"} < set(store.progress().metrics)
    assert len(parts) == 4
    assert [part.metrics for part in parts] == [None] * 4
    assert replace(ack, metrics=None) == ack, "they are no part of what the store has of the source"
    worker.leave()
    assert store.wait_finished(30)
