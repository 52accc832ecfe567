"""From moments to a row: values against the rows that the moments are of."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from delve_ray import spectrum
from delve_ray.moments import Moments
from delve_ray.schema import ALWAYS, EXTRA_STATS, F64, SCALAR_STATS, LayerRow
from delve_ray.store.protocol import LayerInfo, StoreConfig
from delve_ray.store.publishing import layer_row
from delve_ray.store.window import Collected

ROWS = np.random.default_rng(3).normal(size=(60, 8)) * np.array([1e3, 1, 1, 1, 1, 1, 1, 1]) + 2.0


def row_of(rows: F64, **options: Any) -> LayerRow:
    moments = Moments.from_rows(rows)
    threshold = options.get("thresholds", (0.99,))[0]
    config = StoreConfig(run="r", savefile="/nowhere", world_size=1, threshold=threshold, **options)
    layer = LayerInfo("fc", "Linear", moments.features)
    return layer_row(layer, "train", Collected(moments.n, 3, moments.mean, moments.packed(), float(moments.n)), config)


def test_every_threshold_has_its_dimension_from_the_one_spectrum(monkeypatch: pytest.MonkeyPatch) -> None:
    original, shapes = spectrum.eigenvalues, []
    monkeypatch.setattr(spectrum, "eigenvalues", lambda matrix: shapes.append(matrix.shape) or original(matrix))
    rows = np.random.default_rng(0).normal(size=(500, 10)) * 0.7 ** np.arange(10)
    row = row_of(rows, thresholds=(0.95, 0.5, 0.999, 1.0))
    assert shapes == [(10, 10)]
    expected = [spectrum.intrinsic_dimensionality(row.eigenvalues, delta) for delta in (0.95, 0.5, 0.999, 1.0)]
    assert list(row.intrinsic_dimensionalities) == expected
    assert expected == [5, 1, 9, 10]
    assert (row.threshold, tuple(row.thresholds)) == (0.95, (0.95, 0.5, 0.999, 1.0))
    assert row.stats["intrinsic_dimensionality"] == expected[0]
    assert row.stats["saturation"] == 0.5


def test_one_threshold_fills_no_list() -> None:
    row = row_of(ROWS, stats=SCALAR_STATS)
    assert (row.threshold, list(row.thresholds), list(row.intrinsic_dimensionalities)) == (0.99, [], [])
    assert not set(row.stats) & set(EXTRA_STATS)


def test_statistics_of_other_matrices_are_those_of_the_rows() -> None:
    row = row_of(ROWS, stats=EXTRA_STATS)
    assert set(row.stats) == {*ALWAYS, *EXTRA_STATS}
    lam = np.linalg.eigvalsh(np.corrcoef(ROWS.T))[::-1] / 8
    k = 1 + int(np.argmax(np.cumsum(lam) >= 0.99))
    singular = np.linalg.svd(ROWS, compute_uv=False)
    p = singular / singular.sum() + 1e-7
    assert row.stats["intrinsic_dimensionality"] == 1
    assert row.stats["correlation_intrinsic_dimensionality"] == k == 8
    assert row.stats["correlation_saturation"] == 1.0
    assert row.stats["correlation_effective_rank"] == pytest.approx(np.exp(-lam @ np.log(lam)))
    assert row.stats["rankme"] == pytest.approx(np.exp(-p @ np.log(p)))


@pytest.mark.parametrize(
    ("samples", "features", "ratio", "undersampled"),
    [(60, 8, 7.5, False), (8, 8, 1.0, False), (7, 8, 0.875, True), (1, 1, 1.0, False)],
)
def test_samples_per_feature(samples: int, features: int, ratio: float, undersampled: bool) -> None:
    row = row_of(np.random.default_rng(1).normal(size=(samples, features)))
    assert (row.samples_per_feature, row.undersampled) == (ratio, undersampled)


@pytest.mark.parametrize("features", [1, 5])
def test_a_window_of_non_finite_rows_alone_has_a_row(features: int) -> None:
    stats = (*SCALAR_STATS, *EXTRA_STATS)
    row = row_of(np.empty((0, features)), stats=stats, thresholds=(0.9, 0.99))
    assert (row.samples, row.nonfinite_rows, row.samples_per_feature, row.undersampled) == (0, 3, 0.0, True)
    assert list(row.intrinsic_dimensionalities) == [0, 0]
    assert all(row.stats[name] == 0 for name in (*ALWAYS, *EXTRA_STATS))
