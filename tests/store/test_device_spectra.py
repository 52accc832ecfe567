"""Decompositions on a device: LAPACK's values, at every scale, and LAPACK's where the device fails."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from delve_ray.moments import pack_triangle
from delve_ray.spectrum import eigenvalues
from delve_ray.store.device_spectra import device_eigenvalues, device_row
from delve_ray.store.protocol import LayerInfo
from delve_ray.store.publishing import layer_row
from delve_ray.store.window import Collected
from tests.stores import config

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def covariance(d: int, seed: int = 0) -> np.ndarray:
    """One whose eigenvalues fall over twelve orders of magnitude."""
    rng = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(rng.normal(size=(d, d)))
    found: np.ndarray = (basis * np.geomspace(1.0, 1e-12, d)) @ basis.T
    return found


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scale", [1.0, 1e-250, 1e250])
@pytest.mark.parametrize("d", [1, 2, 300])
def test_the_values_are_lapacks(d: int, scale: float, device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    matrix = covariance(d) * scale
    expected = eigenvalues(matrix)
    upper = np.triu(matrix) + np.tril(np.full((d, d), np.nan), -1)  # as it is unpacked: below lies anything
    found = device_eigenvalues(upper, device)
    assert found.shape == (d,)
    assert found.dtype == np.float64
    assert np.abs(found - expected).max() <= 1e-12 * expected[0]
    assert (np.diff(found) <= 0).all()
    assert (found >= 0).all()


def test_zeros_and_what_is_not_finite() -> None:
    assert device_eigenvalues(np.zeros((4, 4)), "cpu").tolist() == [0.0] * 4
    for bad in (np.nan, np.inf):
        matrix = np.eye(4)
        matrix[1, 2] = bad
        with pytest.raises(ValueError, match="no finite eigenvalues"):
            device_eigenvalues(matrix, "cpu")


@pytest.mark.parametrize("device", ["cpu", "no device", "meta"])
def test_a_row_with_and_without_a_device_that_works(device: str) -> None:
    d, layer, options = 40, LayerInfo("a", "Linear", 40), config(stats=("saturation", "trace", "alpha", "cov"))
    found = Collected(300, 0, np.zeros(d), pack_triangle(300 * covariance(d)), 300.0)
    row, trouble = device_row(layer, "train", found, options, None, device)
    expected = layer_row(layer, "train", found, options)
    assert (trouble is None) == (device == "cpu")
    assert np.abs(row.eigenvalues - expected.eigenvalues).max() <= 1e-12 * expected.eigenvalues[0]
    assert row.stats == pytest.approx(expected.stats, rel=1e-6)
    assert np.array_equal(row.covariance, expected.covariance)  # type: ignore[arg-type]


def test_what_is_wrong_with_a_layer_is_said_as_without_a_device() -> None:
    packed = pack_triangle(np.eye(4))
    packed[2] = np.nan
    found = Collected(10, 0, np.zeros(4), packed, 10.0)
    with pytest.raises(ValueError, match="no finite eigenvalues"):
        device_row(LayerInfo("a", "Linear", 4), "train", found, config(), None, "cpu")
