"""Samples of rows: what is kept, that merging is that of the union, and the coordinates along eigenvectors."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from delve_ray.reservoir import UNBOUNDED, Reservoir, embed, merge, pack, packed_size, smallest, unpack

SIZE = 5


def of(keys: np.ndarray, size: int = SIZE) -> Reservoir:
    """The reservoir of rows that carry their keys."""
    return smallest(keys, np.stack([keys, -keys], axis=1), UNBOUNDED, size)


@given(st.lists(st.lists(st.integers(0, 10**6), max_size=12), min_size=1, max_size=6), st.randoms())
def test_however_rows_are_split_the_smallest_keys_are_kept(parts: list[list[int]], random: object) -> None:
    taken = [float(key) + 0.5 for part in parts for key in part]
    if len(set(taken)) < len(taken):
        return
    reservoirs = [of(np.array(part, np.float64) + 0.5) for part in parts]
    random.shuffle(reservoirs)  # type: ignore[attr-defined]
    cut = len(reservoirs) // 2
    grouped = [merge(group, SIZE) for group in (reservoirs[:cut], reservoirs[cut:]) if group]
    for found in (merge(reservoirs, SIZE), merge(grouped, SIZE)):
        assert found.keys.tolist() == sorted(taken)[:SIZE]
        assert np.array_equal(found.rows, np.stack([found.keys, -found.keys], axis=1))
        assert found.bound == (UNBOUNDED if len(taken) <= SIZE else sorted(taken)[SIZE])


def test_no_key_above_the_bound_of_any_part_counts() -> None:
    """A part whose rows were left out afterwards knows less far than it has rows."""
    short = Reservoir(np.array([0.1]), np.array([[1.0, 1.0]]), bound=0.2)
    found = merge([short, of(np.array([0.05, 0.15, 0.25]))], SIZE)
    assert (found.keys.tolist(), found.bound) == ([0.05, 0.1, 0.15], 0.2)


def test_packed_and_back() -> None:
    kept = of(np.array([0.3, 0.1]))
    packed = pack(kept)
    assert packed.size == packed_size(2, 2)
    again = unpack(packed, 2, 2, kept.bound)
    packed[:] = 0.0  # nothing of it is kept
    assert np.array_equal(again.keys, kept.keys)
    assert np.array_equal(again.rows, kept.rows)
    assert unpack(np.empty(0), 0, 4, 0.5).rows.shape == (0, 4)


def test_coordinates_are_those_along_the_leading_eigenvectors() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(400, 6)) @ rng.normal(size=(6, 6)) + 50.0
    covariance = np.cov(rows.T, bias=True)
    points = embed(rows, rows.mean(axis=0), np.triu(covariance))
    largest = np.sort(np.linalg.eigvalsh(covariance))[::-1][:2]
    assert np.cov(points.T, bias=True) == pytest.approx(np.diag(largest), abs=1e-9 * largest[0])
    assert points.mean(axis=0) == pytest.approx([0, 0], abs=1e-10)


def test_the_signs_do_not_depend_on_the_decomposition() -> None:
    rows = np.array([[2.0, 0.0, 1.0]])
    vectors = np.array([[0.6, -0.8, 0.0], [0.0, 0.0, 1.0], [0.8, 0.6, 0.0]])
    covariance = vectors.T @ np.diag([9.0, 4.0, 1.0]) @ vectors
    # The largest components are made positive: v1 is (-0.6, 0.8, 0), v2 is (0, 0, 1).
    assert embed(rows, np.zeros(3), covariance) == pytest.approx(np.array([[-1.2, 1.0]]))


def test_one_feature_has_one_coordinate() -> None:
    assert embed(np.array([[3.0], [1.0]]), np.array([2.0]), np.array([[1.0]])).tolist() == [[1.0, 0.0], [-1.0, 0.0]]
