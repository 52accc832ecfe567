"""delve_ray.moments: the algebra of counts, means and scatters, and the packed triangle."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from delve_ray import moments
from delve_ray.moments import (
    Moments,
    PackedTotal,
    pack_triangle,
    packed_diagonal,
    row_blocks,
    triangle_size,
    unpack_triangle,
)
from tests.helpers import F64, TOLERANCE, covariance_error, merged, random_rows, two_pass_covariance

FLOAT64_TOLERANCE = 1e-10
"""Of λ1: at mean/spread 1e5 a float64 mean is rounded by 1e-11 of the spread, differently in every group."""


def random_matrix(rows: int, columns: int, seed: int = 0) -> F64:
    return np.random.default_rng(seed).normal(size=(rows, columns))


def random_groups(sizes: list[int], features: int, *, offset: float = 0.0, seed: int = 0) -> list[F64]:
    """Groups of rows; each group's mean lies `offset` away from zero in its own direction."""
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(size, features)) + offset * rng.choice([-1.0, 1.0], features) for size in sizes]


def assert_same(result: Moments, expected: Moments) -> None:
    """Equal to the bit, arrays and their types included."""
    assert result.n == expected.n
    assert result.mean.dtype == result.scatter.dtype == np.float64
    np.testing.assert_array_equal(result.mean, expected.mean)
    np.testing.assert_array_equal(result.scatter, expected.scatter)


def assert_close(result: Moments, expected: Moments) -> None:
    assert result.n == expected.n
    if expected.n:
        np.testing.assert_allclose(result.mean, expected.mean, rtol=1e-14, atol=1e-10)
        assert covariance_error(result.covariance(), expected.covariance()) < FLOAT64_TOLERANCE


# --- the packed triangle -------------------------------------------------------------------------------


def test_the_triangle_is_row_major() -> None:
    matrix = np.array([[1.0, 2.0, 3.0], [9.0, 4.0, 5.0], [9.0, 9.0, 6.0]])
    assert pack_triangle(matrix).tolist() == [1, 2, 3, 4, 5, 6]
    assert unpack_triangle([1, 2, 3, 4, 5, 6], 3).tolist() == [[1, 2, 3], [2, 4, 5], [3, 5, 6]]
    assert unpack_triangle([1, 2, 3, 4, 5, 6], 3, symmetric=False).tolist() == [[1, 2, 3], [0, 4, 5], [0, 0, 6]]


@pytest.mark.parametrize("features", [0, 1, 2, 127, 128, 129, 257, 300])
def test_packing_is_numpys_upper_triangle_and_unpacking_its_inverse(features: int) -> None:
    matrix = random_matrix(features, features)
    matrix = matrix + matrix.T
    packed = pack_triangle(matrix)
    assert packed.shape == (triangle_size(features),)
    np.testing.assert_array_equal(packed, matrix[np.triu_indices(features)])
    np.testing.assert_array_equal(unpack_triangle(packed, features), matrix)
    np.testing.assert_array_equal(unpack_triangle(packed, features, symmetric=False), np.triu(matrix))
    np.testing.assert_array_equal(packed_diagonal(packed, features), np.diagonal(matrix))


@pytest.mark.parametrize("garbage", [np.nan, np.inf, 1e300])
def test_packing_reads_the_upper_triangle_only(garbage: float) -> None:
    matrix = random_matrix(200, 200)
    expected = matrix[np.triu_indices(200)]
    matrix[np.tril_indices(200, -1)] = garbage
    np.testing.assert_array_equal(pack_triangle(matrix), expected)


@pytest.mark.parametrize("layout", ["Fortran", "strided", "float32"])
def test_packing_takes_any_layout(layout: str) -> None:
    matrix = random_matrix(150, 150).astype(np.float32).astype(np.float64)
    given_matrix = {
        "Fortran": np.asfortranarray(matrix),
        "strided": np.repeat(np.repeat(matrix, 2, axis=0), 2, axis=1)[::2, ::2],
        "float32": matrix.astype(np.float32),
    }[layout]
    packed = pack_triangle(given_matrix)
    assert packed.dtype == np.float64
    np.testing.assert_array_equal(packed, matrix[np.triu_indices(150)])


def test_the_diagonal_is_a_copy() -> None:
    packed = np.arange(6.0)
    packed_diagonal(packed, 3)[:] = -1
    assert packed.tolist() == [0, 1, 2, 3, 4, 5]


@given(features=st.integers(0, 90), height=st.integers(1, 40))
def test_row_blocks_tile_the_triangle(features: int, height: int) -> None:
    numbered = np.zeros((features, features), dtype=int)
    numbered[np.triu_indices(features)] = np.arange(triangle_size(features))
    next_row, next_value = 0, 0
    for first, rows, part in row_blocks(features, height):
        assert (first, part.start) == (next_row, next_value)
        dense = numbered[first : first + rows, first:]
        upper = dense[np.triu_indices(rows, m=features - first)]
        np.testing.assert_array_equal(upper, np.arange(part.start, part.stop))
        next_row, next_value = first + rows, part.stop
    assert (next_row, next_value) == (features, triangle_size(features))


@pytest.mark.parametrize("length", [0, 5, 7])
def test_a_triangle_of_another_length_is_refused_in_words(length: int) -> None:
    with pytest.raises(ValueError, match=rf"3 features has shape \(6,\), not \({length},\)"):
        unpack_triangle(np.zeros(length), 3)


@pytest.mark.parametrize("features", [1, 5, 128, 300])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_divisor_divides_each_value_once(features: int, symmetric: bool) -> None:
    packed = np.random.default_rng(features).normal(size=triangle_size(features))
    found = unpack_triangle(packed, features, symmetric=symmetric, divisor=3.0)
    np.testing.assert_array_equal(found, unpack_triangle(packed / 3.0, features, symmetric=symmetric))


def test_a_scatter_that_is_not_square_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        pack_triangle(np.zeros((2, 3)))


# --- Moments -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 10, 1000])
@pytest.mark.parametrize("features", [1, 3, 40])
@pytest.mark.parametrize("offset", [0.0, 1.0, 1e5])
def test_from_rows_is_the_two_pass_covariance(n: int, features: int, offset: float) -> None:
    rows = random_rows(n, features, dtype=torch.float64, offset=offset).numpy()
    result = Moments.from_rows(rows)
    assert result.n == n
    np.testing.assert_allclose(result.mean, rows.mean(0), rtol=1e-14, atol=1e-14)
    assert covariance_error(result.covariance(), two_pass_covariance(rows)) < FLOAT64_TOLERANCE
    np.testing.assert_array_equal(result.scatter, result.scatter.T)


def test_from_rows_against_exact_fractions() -> None:
    rows = [[100_000.1, -3.0], [100_000.2, -2.5], [100_000.4, 7.25]]
    exact = [[Fraction(value) for value in row] for row in rows]
    means = [sum(column) / 3 for column in zip(*exact, strict=True)]
    scatter = [[sum((r[i] - means[i]) * (r[j] - means[j]) for r in exact) for j in range(2)] for i in range(2)]
    result = Moments.from_rows(rows)
    np.testing.assert_allclose(result.mean, [float(mean) for mean in means], rtol=1e-15)
    np.testing.assert_allclose(result.scatter, [[float(value) for value in row] for row in scatter], rtol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_from_rows_takes_every_float_type_of_torch(dtype: torch.dtype) -> None:
    rows = random_rows(50, 7, dtype=dtype).requires_grad_()
    assert_same(Moments.from_rows(rows), Moments.from_rows(rows.detach().double().numpy()))


def test_identical_rows_have_no_scatter() -> None:
    result = Moments.from_rows(np.tile([0.1, 1e5 / 3, -7e-9], (1000, 1)))
    assert result.mean.tolist() == [0.1, 1e5 / 3, -7e-9]
    assert not result.scatter.any()


def test_from_rows_of_no_row_is_empty() -> None:
    assert_same(Moments.from_rows(np.zeros((0, 5))), Moments.empty(5))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_from_rows_refuses_and_counts_non_finite_rows(bad: float) -> None:
    rows = np.zeros((9, 3))
    rows[[1, 4], [0, 2]] = bad
    with pytest.raises(ValueError, match="2 of 9 rows"):
        Moments.from_rows(rows)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4)])
def test_from_rows_refuses_other_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\(observations, features\)"):
        Moments.from_rows(np.zeros(shape))


@pytest.mark.parametrize(
    ("n", "mean", "scatter", "message"),
    [
        (1, np.zeros(2), np.zeros((3, 3)), r"mean has shape \(2,\) but scatter \(3, 3\)"),
        (1, np.zeros((3, 1)), np.zeros((3, 3)), r"mean has shape \(3, 1\)"),
        (1, np.zeros(3), np.zeros((3, 4)), r"square matrix, not one of shape \(3, 4\)"),
        (1, np.zeros(3), np.zeros(9), r"square matrix, not one of shape \(9,\)"),
        (-1, np.zeros(3), np.zeros((3, 3)), "cannot be -1"),
    ],
)
def test_moments_whose_shapes_do_not_belong_together_are_refused(n: int, mean: F64, scatter: F64, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Moments(n, mean, scatter)


def test_no_observation_has_no_covariance() -> None:
    with pytest.raises(ValueError, match="no observation"):
        Moments.empty(3).covariance()


def test_packed_and_back() -> None:
    original = Moments.from_rows(random_matrix(30, 140))
    assert_same(Moments.from_packed(original.n, original.mean, original.packed()), original)
    with pytest.raises(ValueError, match=r"140 features has shape \(9870,\)"):
        Moments.from_packed(30, original.mean, original.packed()[:-1])


def test_from_packed_keeps_nothing_of_its_arguments() -> None:
    mean, packed = np.ones(2), np.ones(3)
    result = Moments.from_packed(1, mean, packed)
    mean[:], packed[:] = -5, -5
    assert result.mean.tolist() == [1, 1]
    assert result.scatter.tolist() == [[1, 1], [1, 1]]


# --- merge ---------------------------------------------------------------------------------------------


def test_merge_of_literals() -> None:
    both = Moments(1, np.array([0.0, 0.0]), np.zeros((2, 2))).merge(
        Moments(3, np.array([4.0, 8.0]), np.array([[2.0, 1.0], [1.0, 5.0]]))
    )
    assert both.n == 4
    assert both.mean.tolist() == [3.0, 6.0]
    # 1·3/4·δδᵀ = 0.75·[[16, 32], [32, 64]] on top of both scatters
    assert both.scatter.tolist() == [[14.0, 25.0], [25.0, 53.0]]


sizes = st.lists(st.integers(0, 20), min_size=1, max_size=12)


@given(
    sizes=sizes, features=st.integers(1, 20), offset=st.sampled_from([0.0, 1.0, 1e5]), seed=st.integers(0, 2**32 - 1)
)
@settings(max_examples=60, deadline=None)
def test_any_order_and_any_tree_of_merges_is_the_whole(
    sizes: list[int], features: int, offset: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    groups = random_groups(sizes, features, offset=offset, seed=seed)
    parts = [Moments.from_rows(group) for group in groups]
    while len(parts) > 1:  # two parts at random become one, until one is left
        left = parts.pop(rng.integers(len(parts)))
        right = parts.pop(rng.integers(len(parts)))
        parts.append(left.merge(right))
    assert_close(parts[0], Moments.from_rows(np.concatenate(groups)))


@given(seed=st.integers(0, 2**32 - 1), offset=st.sampled_from([0.0, 1e5]))
@settings(max_examples=30, deadline=None)
def test_merge_is_associative_and_commutative(seed: int, offset: float) -> None:
    a, b, c = (Moments.from_rows(group) for group in random_groups([3, 11, 5], 6, offset=offset, seed=seed))
    assert_close(a.merge(b), b.merge(a))
    assert_close(a.merge(b).merge(c), a.merge(b.merge(c)))


def test_the_empty_moments_are_neutral_on_both_sides() -> None:
    some = Moments.from_rows(random_matrix(10, 4) + 1e5)
    assert_same(some.merge(Moments.empty(4)), some)
    assert_same(Moments.empty(4).merge(some), some)
    assert_same(Moments.empty(4).merge(Moments.empty(4)), Moments.empty(4))


def test_merge_changes_neither_operand() -> None:
    a, b = (Moments.from_rows(group) for group in random_groups([5, 7], 3, offset=10.0))
    before = [array.copy() for array in (a.mean, a.scatter, b.mean, b.scatter)]
    a.merge(b)
    for array, copy in zip((a.mean, a.scatter, b.mean, b.scatter), before, strict=True):
        np.testing.assert_array_equal(array, copy)


def test_merge_of_other_features_is_refused() -> None:
    with pytest.raises(ValueError, match="3 features do not merge with moments of 4"):
        Moments.empty(3).merge(Moments.empty(4))


def test_identical_rows_have_no_scatter_however_they_are_split() -> None:
    row = np.array([0.1, 1e5 / 3])
    total = merged([Moments.from_rows(np.tile(row, (n, 1))) for n in (1, 2, 7, 13, 1000)])
    assert (total.n, total.mean.tolist()) == (1023, row.tolist())
    assert not total.scatter.any()


# --- PackedTotal ---------------------------------------------------------------------------------------


def totalled(parts: list[Moments], features: int) -> Moments:
    total = PackedTotal(features)
    for part in parts:
        total.add(part.n, part.mean, part.packed())
    return Moments.from_packed(*total.result())


@pytest.mark.parametrize("groups", [0, 1, 2, 31, 32, 33, 34, 64, 65, 66, 67, 200])
@pytest.mark.parametrize("offset", [0.0, 1e5])
def test_a_total_of_any_number_of_groups_is_their_merge(groups: int, offset: float) -> None:
    # One random direction per group would make the spread between groups as large as the offset; the same for
    # all of them leaves mean/spread at 1e5.
    rows = [group + offset for group in random_groups([1 + k % 5 for k in range(groups)], 20)]
    parts = [Moments.from_rows(group) for group in rows]
    expected = merged([Moments.empty(20), *parts])
    result = totalled(parts, 20)
    assert_close(result, expected)
    if groups:
        assert covariance_error(result.covariance(), two_pass_covariance(np.concatenate(rows))) < TOLERANCE


@pytest.mark.parametrize("groups", [1, 2, 33, 34, 200])
@pytest.mark.parametrize("offset", [0.0, 1e5])
def test_a_total_of_weighted_groups_is_that_of_their_weighted_rows(groups: int, offset: float) -> None:
    rows = [group + offset for group in random_groups([1 + k % 5 for k in range(groups)], 20)]
    each = np.random.default_rng(1).choice([0.25, 1.0, 3.0, 700.0], groups)
    total, weights = (
        PackedTotal(20),
        np.concatenate([np.full(len(group), w) for group, w in zip(rows, each, strict=True)]),
    )
    for group, weight in zip(rows, each, strict=True):
        part = Moments.from_rows(group)
        total.add(part.n, part.mean, weight * part.packed(), weight * part.n)
    values = np.concatenate(rows) - rows[0][0]
    mean = weights @ values / weights.sum()
    expected = ((values - mean) * weights[:, None]).T @ (values - mean) / weights.sum()
    n, found, packed = total.result()
    assert (n, total.weight) == (len(weights), weights.sum())
    assert total.copy().weight == total.weight
    np.testing.assert_allclose(found, mean + rows[0][0], rtol=1e-12, atol=1e-12)
    assert covariance_error(unpack_triangle(packed / total.weight, 20), expected) < TOLERANCE


@pytest.mark.parametrize("features", [1, 127, 128, 129, 300])
def test_a_total_of_many_features_is_their_merge(features: int) -> None:
    parts = [Moments.from_rows(group) for group in random_groups([4] * 40, features, offset=3.0)]
    assert_close(totalled(parts, features), merged(parts))


def test_no_product_of_a_fold_is_one_that_blas_shares_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenBLAS's threads wait for each other, and one that gets no core holds up the store a hundredfold."""
    sizes, matmul = [], np.matmul

    def recorded(left: F64, right: F64, out: F64) -> F64:
        sizes.append(left.shape[0] * left.shape[1] * right.shape[1])
        return matmul(left, right, out=out)

    parts = [Moments.from_rows(group) for group in random_groups([4] * 33, 700, offset=3.0)]
    monkeypatch.setattr(np, "matmul", recorded)
    found = totalled(parts, 700)
    monkeypatch.undo()
    assert 0 < max(sizes) <= 1 << 18
    assert_close(found, merged(parts))


def test_a_total_can_be_read_and_added_to_in_turn() -> None:
    parts = [Moments.from_rows(group) for group in random_groups([3] * 100, 5, offset=100.0)]
    total = PackedTotal(5)
    for index, part in enumerate(parts):
        total.add(part.n, part.mean, part.packed())
        if index % 7 == 0:
            total.result()
    assert_close(Moments.from_packed(*total.result()), merged(parts))
    assert_close(Moments.from_packed(*total.result()), merged(parts))  # reading changes nothing


def test_an_empty_group_adds_nothing() -> None:
    part = Moments.from_rows(random_matrix(6, 3))
    total = PackedTotal(3)
    total.add(0, np.full(3, np.nan), np.full(6, np.nan))
    total.add(part.n, part.mean, part.packed())
    total.add(0, np.full(3, np.nan), np.full(6, np.nan))
    assert_same(Moments.from_packed(*total.result()), part)
    assert_same(Moments.from_packed(*PackedTotal(3).result()), Moments.empty(3))


def test_a_total_keeps_nothing_of_its_arguments() -> None:
    parts = [Moments.from_rows(group) for group in random_groups([4] * 5, 3, offset=9.0)]
    total = PackedTotal(3)
    for part in parts:
        mean, packed = part.mean.copy(), part.packed()
        total.add(part.n, mean, packed)
        np.testing.assert_array_equal(mean, part.mean)
        np.testing.assert_array_equal(packed, part.packed())
        mean[:], packed[:] = np.nan, np.nan
    assert_close(Moments.from_packed(*total.result()), merged(parts))


@pytest.mark.parametrize("groups", [1, 20, 33, 40])
def test_a_copy_is_independent(groups: int) -> None:
    parts = [Moments.from_rows(group) for group in random_groups([4] * groups, 3, offset=9.0)]
    more = [Moments.from_rows(group) for group in random_groups([6] * 40, 3, offset=50.0, seed=1)]
    total = PackedTotal(3)
    for part in parts:
        total.add(part.n, part.mean, part.packed())
    twin = total.copy()
    for part in more:
        total.add(part.n, part.mean, part.packed())
    assert_close(Moments.from_packed(*twin.result()), merged(parts))
    for part in more[:5]:
        twin.add(part.n, part.mean, part.packed())
    assert_close(Moments.from_packed(*total.result()), merged([*parts, *more]))
    assert_close(Moments.from_packed(*twin.result()), merged([*parts, *more[:5]]))


def test_a_total_of_identical_rows_has_no_scatter() -> None:
    row = np.array([0.1, 1e5 / 3])
    total = PackedTotal(2)
    for n in range(1, 100):
        total.add(n, row, np.zeros(3))
    n, mean, packed = total.result()
    assert (n, mean.tolist()) == (4950, row.tolist())
    assert not packed.any()


def test_a_total_keeps_a_bounded_number_of_means() -> None:
    total = PackedTotal(2)
    for _ in range(500):
        total.add(1, np.zeros(2), np.zeros(3))
        assert len(total._means) <= moments.MAX_PENDING
    assert total.n == 500
