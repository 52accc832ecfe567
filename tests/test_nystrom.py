"""What a sketch says of a spectrum: bounds that hold for every spectrum, and closed forms where it says all."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from delve_ray.moments import F64
from delve_ray.nystrom import Head, head, head_bytes, head_statistics
from delve_ray.sketch import omega
from delve_ray.spectrum import intrinsic_dimensionality, participation_ratio, saturation, stable_rank

EPS = float(np.finfo(np.float64).eps)
ROUNDING = 1e-6
"""Of the trace: 8·2^-27, the shift, is taken off each eigenvalue, and left out are those below it."""


def rotated(eigenvalues: F64, seed: int) -> F64:
    """A covariance with these eigenvalues and random axes."""
    axes = np.linalg.qr(np.random.default_rng(seed).normal(size=(eigenvalues.size, eigenvalues.size)))[0]
    return (axes * eigenvalues) @ axes.T


def packed_sketch(scatter: F64, size: int) -> F64:
    features = len(scatter)
    return np.concatenate([np.diag(scatter), (scatter @ omega(features, size).dense(0, features)).ravel()])


KINDS = {
    "power law": lambda ranks, rng: ranks ** -rng.uniform(0.2, 3),
    "exponential": lambda ranks, rng: np.exp(-ranks / rng.uniform(1, 20)),
    "flat": lambda ranks, rng: np.ones(ranks.size),
    "low rank": lambda ranks, rng: np.where(ranks <= rng.integers(1, 40), 1 / ranks, 0.0),
    "low rank and noise": lambda ranks, rng: np.where(ranks <= rng.integers(1, 10), 1.0, 10.0 ** -rng.uniform(1, 7)),
    "one": lambda ranks, rng: (ranks == 1).astype(float),
    "random": lambda ranks, rng: np.sort(rng.uniform(size=ranks.size))[::-1],
}


@settings(max_examples=50, deadline=None)
@given(
    st.sampled_from(sorted(KINDS)),
    st.integers(40, 150),
    st.sampled_from([8, 16]),
    st.sampled_from([1e-30, 1.0, 1e30]),
    st.integers(0, 2**32),
)
@example("flat", 150, 16, 1.0, 0)
def test_the_bounds_hold_for_every_spectrum(kind: str, features: int, size: int, scale: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    spectrum = KINDS[kind](np.arange(1.0, features + 1), rng)
    weight = 7.0
    found = head(packed_sketch(rotated(spectrum, seed) * scale * weight, size), features, weight, EPS)
    values = found.eigenvalues / scale
    padded = np.concatenate([values, np.zeros(features - values.size)])
    unseen, trace = found.unseen / scale, spectrum.sum()
    slack = ROUNDING * trace
    assert found.trace / scale == pytest.approx(trace, rel=1e-12)
    assert values.size <= size
    assert (np.diff(values) <= 0).all()
    assert (values > 0).all()
    assert (padded <= spectrum + slack / 100).all()
    assert (spectrum <= padded + unseen + slack).all()
    sums, own = np.cumsum(padded), np.cumsum(spectrum)
    assert (sums <= own + slack).all()
    assert (own <= sums + unseen + slack).all()
    assert unseen == pytest.approx(trace - values.sum(), abs=1e-12 * trace)
    for delta in (0.3, 0.9, 0.99):
        exact = intrinsic_dimensionality(spectrum, delta)
        low, high, reached = found.dimensionality(delta)
        assert low <= exact <= high <= features, (kind, delta)
        assert reached == (values.sum() >= (delta - 1e-12) * trace)
        assert head_statistics(found, features, delta).saturation_low <= saturation(spectrum, delta)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 60), st.integers(0, 2**32), st.booleans())
def test_the_bounds_hold_with_fewer_rows_than_features_and_float32_products(n: int, seed: int, single: bool) -> None:
    features, size = 120, 16
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(n, features)) * np.arange(1, features + 1) ** -rng.uniform(0, 2)
    rows -= rows.mean(0)
    exact = np.linalg.eigvalsh(rows.T @ rows / n)[::-1]
    dtype = np.float32 if single else np.float64
    cast = rows.astype(dtype)
    sketch = (cast.T @ (cast @ omega(features, size).dense(0, features).astype(dtype))).astype(np.float64)
    packed = np.concatenate([np.square(rows).sum(0), sketch.ravel()])
    found = head(packed, features, float(n), float(np.finfo(dtype).eps), n)
    padded = np.concatenate([found.eigenvalues, np.zeros(features - found.eigenvalues.size)])
    assert found.rank == n - 1
    assert found.eigenvalues.size <= n - 1
    assert (padded <= exact + 1e-7 * found.trace).all()
    assert (exact <= padded + found.unseen + 1e-5 * found.trace).all()
    low, high, _ = found.dimensionality(0.9)
    assert low <= intrinsic_dimensionality(np.maximum(exact, 0), 0.9) <= high <= n - 1


@pytest.mark.parametrize("rank", [1, 5, 12])
def test_a_layer_of_low_rank_is_seen_whole(rank: int) -> None:
    spectrum = np.concatenate([np.linspace(3, 1, rank), np.zeros(200 - rank)])
    found = head(packed_sketch(rotated(spectrum, 1), 32), 200, 1.0, EPS)
    assert found.eigenvalues.size == rank
    np.testing.assert_allclose(found.eigenvalues, spectrum[:rank], atol=1e-6 * spectrum.sum())
    assert 0 <= found.unseen <= 1e-5 * spectrum.sum()
    known = head_statistics(found, 200, 0.85, (0.85, 0.5))
    k = intrinsic_dimensionality(spectrum, 0.85)
    assert known.values["intrinsic_dimensionality"] == k
    assert (known.saturation_low, known.saturation_high, known.values["saturation"]) == (k / 200,) * 3
    assert known.dimensions == (k, intrinsic_dimensionality(spectrum, 0.5))
    assert known.values["trace"] == known.values["diagonal_trace"] == pytest.approx(spectrum.sum())
    assert known.values["stable_rank"] == pytest.approx(stable_rank(spectrum), rel=1e-4)
    assert known.values["participation_ratio"] == pytest.approx(participation_ratio(spectrum), rel=1e-4)
    assert set(known.values) == {
        *("saturation", "intrinsic_dimensionality", "trace", "diagonal_trace", "stable_rank", "participation_ratio")
    }


def test_what_the_bounds_leave_open_is_not_published() -> None:
    spectrum = np.ones(150)
    found = head(packed_sketch(rotated(spectrum, 2), 16), 150, 1.0, EPS, samples=1000)
    known = head_statistics(found, 150, 0.99)
    assert set(known.values) == {"trace", "diagonal_trace"}
    assert known.saturation_low < 0.11
    assert known.saturation_high >= 149 / 150
    assert set(head_statistics(found, 150, 0.99, stats=["det"]).values) == set()


def test_without_variance_there_is_nothing() -> None:
    found = head(np.zeros(100 * 17), 100, 5.0)
    assert (found.eigenvalues.size, found.trace, found.unseen) == (0, 0.0, 0.0)
    known = head_statistics(found, 100, 0.99)
    assert known.values == {"saturation": 0.0, "intrinsic_dimensionality": 0, "trace": 0.0, "diagonal_trace": 0.0}
    assert (known.saturation_low, known.saturation_high) == (0.0, 0.0)
    assert head(np.zeros(100 * 17), 100, 0.0).trace == 0.0, "nor with rows that were all left out"


@given(st.lists(st.floats(1e-3, 1.0), min_size=1, max_size=30), st.floats(0, 3), st.integers(0, 60), st.data())
def test_an_interval_is_that_of_all_spectra_with_this_head(
    values: list[float], unseen: float, more: int, data: st.DataObject
) -> None:
    """Whatever positive semidefinite rest there is, here one with the same axes, k(δ) lies in it."""
    own = np.sort(values)[::-1]
    rank = own.size + more
    shares = np.array(data.draw(st.lists(st.floats(0, 1), min_size=rank, max_size=rank)))
    shares = shares / shares.sum() if shares.any() else np.eye(rank)[0]
    spectrum = np.sort(np.concatenate([own, np.zeros(more)]) + unseen * shares)[::-1]
    delta = data.draw(st.floats(0.05, 0.999))
    low, high, _ = Head(own, float(own.sum()) + unseen, unseen, rank).dimensionality(delta)
    exact = intrinsic_dimensionality(np.maximum(spectrum, 1e-300), delta)
    assert low <= exact <= high or np.isclose(np.cumsum(spectrum) / spectrum.sum(), delta, atol=1e-9).any()


def test_the_leading_vectors_are_those_of_the_covariance() -> None:
    spectrum = np.concatenate([[5.0, 2.0], 0.01 * np.ones(118) / np.arange(1, 119) ** 2])
    covariance = rotated(spectrum, 3)
    found = head(packed_sketch(covariance, 32), 120, 1.0, EPS, with_vectors=True)
    assert found.vectors is not None
    np.testing.assert_allclose(np.linalg.norm(found.vectors, axis=0), 1.0, atol=1e-5)
    exact = np.linalg.eigh(covariance).eigenvectors[:, ::-1][:, :2]
    np.testing.assert_allclose(np.abs((found.vectors * exact).sum(0)), 1.0, atol=1e-3)


def test_memory_is_that_of_the_sketch_not_of_the_width() -> None:
    assert head_bytes(1024) < 150 << 20
