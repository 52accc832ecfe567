"""The pass over a delta's numbers: every word counts, and every value that is not finite is seen."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from delve_ray.store.scanning import PIECE, RUN, copy_scanned, scan, word_sum

SIZES = [0, 1, 7, RUN - 1, RUN, RUN + 1, PIECE - 1, PIECE, PIECE + 1, 2 * PIECE + 3 * RUN + 5]


def numbers(size: int) -> np.ndarray:
    return np.random.default_rng(size).normal(size=size)


@pytest.mark.parametrize("size", SIZES)
def test_the_sum_is_that_of_the_words_as_integers(size: int) -> None:
    values = numbers(size)
    expected = sum(int.from_bytes(word, "little") for word in values.astype("<f8").view("V8").tolist()) % (1 << 64)
    assert scan(values) == (expected, True)
    assert word_sum(values) == expected
    assert scan(np.repeat(values, 2)[::2]) == (expected, True), "in another stride, too"


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("size", SIZES[1:])
def test_a_value_that_is_not_finite_is_seen_wherever_it_is(size: int, bad: float) -> None:
    values = numbers(size)
    for place in {0, size - 1, size // 2, min(size - 1, RUN), min(size - 1, PIECE)}:
        kept, values[place] = values[place], bad
        assert not scan(values)[1]
        values[place] = kept
    assert scan(values)[1]


def test_infinities_of_both_signs_do_not_cancel() -> None:
    values = numbers(3 * RUN)
    values[5], values[6] = np.inf, -np.inf
    assert not scan(values)[1]


def test_numbers_whose_squares_leave_float64_are_finite() -> None:
    assert scan(np.full(3 * PIECE + 1, 1.7e308))[1]
    assert scan(np.full(3 * PIECE + 1, 5e-324))[1]
    assert scan(np.array([1e200, -1e200]))[1]


@given(st.lists(st.sampled_from([0, 1, 5, RUN, PIECE - 1, PIECE, PIECE + 1, 2 * PIECE + 9]), max_size=6), st.data())
def test_what_is_cut_is_scanned_on_the_way(sizes: list[int], data: st.DataObject) -> None:
    ends = np.cumsum([0, *sizes])
    values = numbers(int(ends[-1]))
    slices = [slice(int(first), int(last)) for first, last in pairwise(ends)]
    places = data.draw(st.permutations(slices))[: data.draw(st.integers(0, len(slices)))]
    expected = np.concatenate([np.empty(0), *(values[place] for place in places)])
    copied, words, finite = copy_scanned(values, places)
    assert copied.tobytes() == expected.tobytes()
    assert (words, finite) == scan(expected)
    assert copied.base is None, "it is no view of what it was cut from"
    if expected.size:
        whose = next(place for place in places if place.stop > place.start)
        bad = data.draw(st.integers(whose.start, whose.stop - 1))
        values[bad] = data.draw(st.sampled_from([np.nan, np.inf, -np.inf]))
        assert not copy_scanned(values, places)[2]
