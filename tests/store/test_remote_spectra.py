"""Decompositions as Ray tasks: the same rows, and the store does what nobody else does."""

from __future__ import annotations

import logging
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from delve_ray import SaturationTracker, read_spectra
from delve_ray.moments import pack_triangle
from delve_ray.reservoir import UNBOUNDED, Reservoir
from delve_ray.schema import LayerRow
from delve_ray.sketch import omega
from delve_ray.store import publishing, remote_spectra
from delve_ray.store.protocol import LayerInfo, StoreConfig
from delve_ray.store.publishing import layer_row
from delve_ray.store.remote_spectra import RemoteSpectra
from delve_ray.store.window import Collected
from tests.stores import config

pytestmark = [pytest.mark.slow, pytest.mark.ray]

OPTIONS = config(stats=("saturation", "trace", "cov", "embed"))


def moments(d: int) -> tuple[Collected, Reservoir]:
    rows = np.random.default_rng(d).normal(size=(300, d)) * np.linspace(1, 3, d)
    centred = rows - rows.mean(axis=0)
    keys = np.linspace(0.1, 0.2, 20)
    found = Collected(300, 0, rows.mean(axis=0), pack_triangle(centred.T @ centred), 300.0)
    return found, Reservoir(keys, rows[:20].copy(), UNBOUNDED)


def same(row: LayerRow, expected: LayerRow) -> None:
    assert row.stats == pytest.approx(expected.stats, rel=1e-9)
    largest = expected.eigenvalues[0]
    assert np.abs(row.eigenvalues - expected.eigenvalues).max() < 1e-12 * largest
    assert row.covariance is not None
    assert row.embedding is not None
    assert np.array_equal(row.covariance, expected.covariance)  # type: ignore[arg-type]
    assert row.embedding == pytest.approx(expected.embedding, abs=1e-6)
    assert row.eigenvalues.flags.writeable


def test_wide_layers_are_decomposed_elsewhere(ray_session: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_spectra, "WIDE", 64)
    compute = RemoteSpectra(1)
    for d, sent in ((63, 0), (64, 1), (80, 2)):
        layer, (found, sample) = LayerInfo("a", "Linear", d), moments(d)
        same(compute(layer, "eval", found, OPTIONS, sample), layer_row(layer, "eval", found, OPTIONS, sample))
        assert compute.sent == sent


def test_who_waits_takes_the_first_place_that_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """One CPU elsewhere, one core here, three wide layers and a narrow one: each place is taken again at once."""
    import ray

    monkeypatch.setattr(remote_spectra, "WIDE", 64)
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 1.0})
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True}, {"Alive": True}, {"Alive": False}])
    begun, go_on = {place: threading.Semaphore(0) for place in ("here", "elsewhere")}, threading.Semaphore(0)
    free_elsewhere = threading.Semaphore(0)

    def here(layer: LayerInfo, *_: Any) -> str:
        begun["here"].release()
        assert go_on.acquire(timeout=60)
        return f"{layer.name} here"

    def elsewhere(_: RemoteSpectra, layer: LayerInfo, *__: Any) -> str:
        begun["elsewhere"].release()
        assert free_elsewhere.acquire(timeout=60)
        return f"{layer.name} elsewhere"

    monkeypatch.setattr(remote_spectra, "layer_row", here)
    monkeypatch.setattr(RemoteSpectra, "_elsewhere", elsewhere)
    compute, made = RemoteSpectra(1), []

    def start(name: str, d: int) -> threading.Thread:
        found = Collected(1, 0, np.zeros(d), np.zeros(0), 1.0)
        layer = LayerInfo(name, "Linear", d)
        thread = threading.Thread(target=lambda: made.append(compute(layer, "train", found, OPTIONS)))
        thread.start()
        return thread

    threads = [start("a", 64)]
    assert begun["elsewhere"].acquire(timeout=60)
    threads.append(start("b", 64))
    assert begun["here"].acquire(timeout=60)
    threads += [start("narrow", 8), start("c", 64)]
    free_elsewhere.release()
    assert begun["elsewhere"].acquire(timeout=60), "c goes where a has been, though somebody waits for the core here"
    go_on.release()
    assert begun["here"].acquire(timeout=60)
    go_on.release()
    free_elsewhere.release()
    for thread in threads:
        thread.join(30)
    assert sorted(map(str, made)) == ["a elsewhere", "b here", "c elsewhere", "narrow here"]


def test_without_a_free_cpu_nothing_is_sent(ray_session: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setattr(remote_spectra, "WIDE", 64)
    monkeypatch.setattr(ray, "available_resources", lambda: {"memory": 1.0})
    compute, (found, sample) = RemoteSpectra(1), moments(64)
    layer = LayerInfo("a", "Linear", 64)
    same(compute(layer, "train", found, OPTIONS, sample), layer_row(layer, "train", found, OPTIONS, sample))
    assert compute.sent == 0


def test_on_one_node_the_stores_own_threads_are_not_free_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 5.0})
    for nodes, places in (([True], 2), ([True, False], 2), ([True, True], 5)):
        monkeypatch.setattr(ray, "nodes", lambda nodes=nodes: [{"Alive": alive} for alive in nodes])
        compute = RemoteSpectra(3)
        assert [compute._take_place(wide=True) for _ in range(places)] == [True] * places
        assert not compute._take_place(wide=True), "the next one is decomposed here"


def test_who_gives_a_place_back_does_not_wait_for_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    asked, answer = threading.Event(), threading.Event()

    def slow() -> list[Any]:
        asked.set()
        assert answer.wait(60)
        return [{"Alive": True}, {"Alive": True}]

    monkeypatch.setattr(ray, "nodes", slow)
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 1.0, "GPU": 1.0})
    compute = RemoteSpectra(1)
    assert not compute._take_place(wide=False)
    found: list[bool] = []
    takers = [threading.Thread(target=lambda: found.append(compute._take_place(wide=True)), daemon=True) for _ in "ab"]
    for taker in takers:
        taker.start()
    assert asked.wait(30)
    giving = threading.Thread(target=compute._give_back, kwargs={"elsewhere": False}, daemon=True)
    giving.start()
    giving.join(20)
    waited = giving.is_alive()
    answer.set()
    for taker in takers:
        taker.join(30)
    assert not waited
    assert sorted(found) == [False, True], "one CPU elsewhere, one core here"


def test_what_a_task_does_not_answer_the_store_computes(
    ray_session: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(remote_spectra, "WIDE", 64)
    compute, (found, sample) = RemoteSpectra(1), moments(64)
    layer = LayerInfo("a", "Linear", 64)
    expected = layer_row(layer, "train", found, OPTIONS, sample)

    def broken(*_: Any) -> LayerRow:
        raise RuntimeError("no memory here")

    monkeypatch.setattr(remote_spectra, "layer_row", broken)
    with caplog.at_level(logging.WARNING), pytest.raises(RuntimeError, match="no memory here"):
        compute(layer, "train", found, OPTIONS, sample)  # nor can the store
    (record,) = caplog.records
    assert "a task that decomposes layers failed, the store does it" in record.message
    assert "no memory here" in record.message
    monkeypatch.setattr(remote_spectra, "layer_row", layer_row)
    same(compute(layer, "train", found, OPTIONS, sample), expected)
    assert compute.sent == 0, "it does not try again at once"


def test_a_gpu_is_taken_only_where_the_run_may_and_one_is_free(
    ray_session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    monkeypatch.setattr(remote_spectra, "WIDE", 64)
    monkeypatch.setattr(remote_spectra, "GPU_WIDE", 72)
    monkeypatch.setattr(remote_spectra, "GPUS_PER_TASK", 0)  # there is none: the device is the CPU's
    free = {"CPU": 4.0}
    monkeypatch.setattr(ray, "available_resources", lambda: free)
    compute, allowed = RemoteSpectra(1, device="cpu"), replace(OPTIONS, spectra_gpus=1)

    def sent(d: int, options: StoreConfig) -> tuple[int, int]:
        layer, (found, sample) = LayerInfo("a", "Linear", d), moments(d)
        same(compute(layer, "eval", found, options, sample), layer_row(layer, "eval", found, options, sample))
        return compute.sent, compute.sent_to_gpus

    assert sent(72, allowed) == (1, 0), "a training has them all"
    free["GPU"] = 1.0
    assert sent(72, OPTIONS) == (2, 0), "by default none is ever taken"
    assert sent(71, allowed) == (3, 0), "not for a layer that is less wide"
    assert sent(72, allowed) == (4, 1)
    assert sent(90, allowed) == (5, 2)
    sketch = np.concatenate([np.full(90, 2.0), 2.0 * omega(90, 8).dense(0, 90).ravel()])  # of the matrix 2·I
    row = compute(LayerInfo("b", "Linear", 90), "eval", Collected(300, 0, np.zeros(90), sketch, 1.0), allowed)
    assert (row.sketched, row.stats["trace"], row.eigenvalues.size) == (True, 180.0, 8)
    assert (compute.sent, compute.sent_to_gpus) == (6, 2), "of a sketch there is nothing for one to do"


def test_a_gpu_that_fails_is_left_alone_and_the_row_is_the_same(
    ray_session: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import ray

    monkeypatch.setattr(remote_spectra, "WIDE", 64)
    monkeypatch.setattr(remote_spectra, "GPU_WIDE", 64)
    monkeypatch.setattr(remote_spectra, "GPUS_PER_TASK", 0)
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 4.0, "GPU": 1.0})
    compute, options = RemoteSpectra(1), replace(OPTIONS, spectra_gpus=2)  # "cuda", which is not there
    layer, (found, sample) = LayerInfo("a", "Linear", 64), moments(64)
    expected = layer_row(layer, "eval", found, options, sample)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            same(compute(layer, "eval", found, options, sample), expected)
    (record,) = caplog.records
    assert "a GPU failed to decompose a layer, CPUs do it" in record.message
    assert (compute.sent, compute.sent_to_gpus) == (2, 0)


def test_a_store_with_a_wide_layer(ray_session: None, savefile: str, tmp_path: Path) -> None:
    import torch

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, publishing.WIDE), torch.nn.Linear(remote_spectra.WIDE, 3))
    batch = torch.randn(40, 8)
    for path, options in ((savefile, {"run": "wide"}), (str(tmp_path / "alone"), {"store": None})):
        if options.get("run") is None:
            from delve_ray.store.core import CovarianceStore

            options = {"store": CovarianceStore(config(savefile=path, run="alone", world_size=1, stats=("trace",)))}
        with SaturationTracker(path, "parquet", model, stats=["trace"], **options) as tracker:
            model(batch)
            tracker.add_saturations(0)
    found, expected = read_spectra(savefile).to_pylist(), read_spectra(tmp_path / "alone").to_pylist()
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["intrinsic_dimensionality"] == theirs["intrinsic_dimensionality"]
        assert ours["eigenvalues"] == pytest.approx(theirs["eigenvalues"], abs=1e-10 * theirs["eigenvalues"][0])
