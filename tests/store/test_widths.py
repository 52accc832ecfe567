"""Layers whose width only a forward tells: the store takes it from the first delta and holds all others to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from delve_ray import DeltaRefused, RegistrationError, SaturationTracker, read_covariances, read_spectra
from delve_ray.moments import F64, Moments, unpack_triangle
from delve_ray.store.core import CovarianceStore
from delve_ray.store.protocol import Delta, LayerInfo, Source, StoreConfig
from tests.helpers import covariance_error, two_pass_covariance

LAYERS = [LayerInfo("known", "Linear", 2), LayerInfo("told", "Conv2d", None)]


def config() -> StoreConfig:
    return StoreConfig(
        run="r",
        savefile="/nowhere",
        world_size=2,
        stats=("trace",),
        publish_every=0.0,
        silent_after=0,
        late_after=0,
        save_to=(),
    )


class Worker:
    """One rank; sends one delta after the other."""

    def __init__(self, store: CovarianceStore, rank: int, token: str = "") -> None:
        self.store = store
        self.source = Source("r", token, rank, f"{token}{rank}", "host", rank)
        self.attempt = store.register(self.source, store.config, LAYERS).attempt
        self.seq = 0

    def send(self, rows: dict[int, F64], *, widths: Any = None, closes: bool = False) -> None:
        moments = {layer: Moments.from_rows(values) for layer, values in rows.items()}
        told = tuple((layer, m.features) for layer, m in moments.items() if LAYERS[layer].features is None)
        delta = Delta(
            self.source,
            self.attempt,
            self.seq,
            window=0,
            step=0,
            closes=closes,
            labelled=closes,
            entries=tuple((layer, 0, m.n, 0) for layer, m in moments.items()),
            widths=told if widths is None else widths,
        )
        buffer = np.concatenate([np.empty(0), *(part for m in moments.values() for part in (m.mean, m.packed()))])
        self.last = self.store.take(delta.sealed(buffer), buffer)
        self.seq += 1


def rows(features: int, seed: int = 0) -> F64:
    return np.random.default_rng(seed).normal(size=(50, features))


def test_the_first_delta_tells_and_all_ranks_merge() -> None:
    store = CovarianceStore(config(), writers=[])
    left, right = Worker(store, 0), Worker(store, 1)
    left.send({0: rows(2), 1: rows(3)})
    right.send({1: rows(3, 1)}, closes=True)
    left.send({1: rows(3, 2)}, closes=True)
    assert store.flush(60)
    everything = np.concatenate([rows(3), rows(3, 1), rows(3, 2)])
    assert covariance_error(store.covariance("told", "train"), two_pass_covariance(everything)) < 1e-12
    assert store.covariance("known", "train").shape == (2, 2)


@pytest.mark.parametrize(
    ("given", "widths", "message"),
    [
        ({1: rows(3)}, (), "does not say how many features layer told has"),
        ({0: rows(2)}, ((0, 5),), "layer known has 5 features, and was registered with 2"),
        ({1: rows(3)}, ((1, 0),), "layer told has 0 features"),
        ({1: rows(3)}, ((1, -3),), "layer told has -3 features"),
        ({1: rows(3)}, ((2, 3),), "layer index 2, but the run has 2 layers"),
        ({1: rows(3)}, ((1, 4),), "its buffer is .* need float64 of shape"),
    ],
)
def test_other_widths_are_refused_and_change_nothing(given: dict[int, F64], widths: Any, message: str) -> None:
    store = CovarianceStore(config(), writers=[])
    first, second = Worker(store, 0), Worker(store, 1)
    first.send({1: rows(3)})
    before = store.status()["bytes"]
    with pytest.raises(DeltaRefused, match=message):
        second.send(given, widths=widths)
    assert store.status()["bytes"] == before
    assert store.status()["refused"] == 1
    second.send({1: rows(3, 1)}, closes=True)
    first.send({}, closes=True)
    assert store.flush(60)
    expected = two_pass_covariance(np.concatenate([rows(3), rows(3, 1)]))
    assert covariance_error(store.covariance("told", "train"), expected) < 1e-12


def test_another_width_costs_its_layer_and_nothing_else() -> None:
    store = CovarianceStore(config(), writers=[])
    first, second = Worker(store, 0), Worker(store, 1)
    first.send({0: rows(2), 1: rows(3)}, closes=True)
    second.send({0: rows(2, 1), 1: rows(4, 1)}, closes=True)
    assert second.last.refused == ((1, 3),)
    assert store.status()["refused"] == 1
    assert store.flush(60)
    both = np.concatenate([rows(2), rows(2, 1)])
    assert covariance_error(store.covariance("known", "train"), two_pass_covariance(both)) < 1e-12
    assert covariance_error(store.covariance("told", "train"), two_pass_covariance(rows(3))) < 1e-12


def test_a_tracker_whose_layer_has_another_width_goes_on(savefile: str, caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3))
    store = CovarianceStore(StoreConfig("r", savefile, 2, stats=("trace",), publish_every=0.0))
    options: dict[str, Any] = {"store": store, "conv_method": "flatten", "publish_every": 0.0}
    trackers = [SaturationTracker(modules=model, rank=rank, **options) for rank in range(2)]
    for tracker in trackers:
        tracker.stop()
    for tracker, size in zip(trackers, (4, 5), strict=True):
        tracker.resume()
        model(torch.randn(10, 1, size, size))
        tracker.stop()
        tracker.add_saturations(step=0)
        assert tracker._shipper.flush(60)
    for tracker in trackers:
        tracker.close()
    rows_by_layer = {row["layer"]: row for row in read_spectra(savefile).to_pylist()}
    assert {name: (row["samples"], row["workers"]) for name, row in rows_by_layer.items()} == {
        "0": (10, 2),
        "3": (20, 2),
    }
    said = [record.message for record in caplog.records if "not recorded" in record.message]
    assert said == [
        "layer 0 is not recorded: it has 50 features here and 32 in other workers; a layer has one width in all "
        "workers and batches (with conv_method='flatten', images of one size)"
    ]


def test_another_attempt_may_tell_another_width() -> None:
    store = CovarianceStore(config(), writers=[])
    Worker(store, 0, "a").send({1: rows(3)})
    again = Worker(store, 0, "b")
    again.send({1: rows(5)}, closes=True)
    Worker(store, 1, "b").send({}, closes=True)
    assert store.flush(60)
    assert store.covariance("told", "train").shape == (5, 5)


def test_a_worker_that_knows_the_width_is_another_model() -> None:
    store = CovarianceStore(config(), writers=[])
    Worker(store, 0)
    other = Source("r", "", 1, "x", "host", 1)
    with pytest.raises(RegistrationError, match=r"told \(Conv2d of None, not Conv2d of 3\)"):
        store.register(other, store.config, [LAYERS[0], LayerInfo("told", "Conv2d", 3)])


def test_all_the_way_to_the_files(savefile: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2 * 4 * 3, 5))
    x = torch.randn(70, 1, 6, 5)
    with SaturationTracker(
        savefile,
        "parquet",
        model,
        conv_method="flatten",
        layers=["*"],
        stats=["lsat", "cov"],
        sat_threshold=[0.9, 0.99],
    ) as tracker:
        assert tracker.layers == ("0", "1", "2")
        model(x)
        tracker.flush()
        model(x + 1)
        tracker.add_saturations(step=3)
        metrics = tracker.metrics(wait=True)
    described = json.loads((Path(savefile) / "run.json").read_text())
    assert [layer["features"] for layer in described["layers"]] == [None, None, 5]
    spectra = {row["layer"]: row for row in read_spectra(savefile).to_pylist()}
    assert [spectra[name]["features"] for name in ("0", "1", "2")] == [24, 24, 5]
    assert spectra["0"]["thresholds"] == [0.9, 0.99]
    assert spectra["0"]["samples_per_feature"] == pytest.approx(140 / 24)
    expected = two_pass_covariance(torch.cat([model[0](x), model[0](x + 1)]).flatten(1))
    covariances = {row["layer"]: row for row in read_covariances(savefile).to_pylist()}
    for name in ("0", "1"):
        covariance = unpack_triangle(np.array(covariances[name]["covariance"]), 24)
        assert covariance_error(covariance, expected) < 1e-6
        assert metrics[f"saturation/train/{name}"] == spectra[name]["saturation"]
