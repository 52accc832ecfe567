"""Decompositions as Ray tasks: the same rows, and the store does what nobody else does."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from delve_ray import SaturationTracker, read_spectra
from delve_ray.moments import pack_triangle
from delve_ray.reservoir import UNBOUNDED, Reservoir
from delve_ray.schema import LayerRow
from delve_ray.store import publishing, remote_spectra
from delve_ray.store.protocol import LayerInfo
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


def test_without_a_free_cpu_nothing_is_sent(ray_session: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setattr(remote_spectra, "WIDE", 64)
    monkeypatch.setattr(ray, "available_resources", lambda: {"memory": 1.0})
    compute, (found, sample) = RemoteSpectra(1), moments(64)
    layer = LayerInfo("a", "Linear", 64)
    same(compute(layer, "train", found, OPTIONS, sample), layer_row(layer, "train", found, OPTIONS, sample))
    assert compute.sent == 0


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
