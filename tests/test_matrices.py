"""delve_ray.matrices against definitions, numpy's own correlations, and rows that float32 has rounded."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from delve_ray.matrices import FLOAT32_EPS, correlation, eigenvalues, second_moment
from delve_ray.schema import F64
from tests.covariances import FLOAT64_EPS, population_covariance, rotated
from tests.helpers import accumulator

pytestmark = pytest.mark.filterwarnings("error")


def mixed_rows(observations: int, features: int, *, seed: int = 0, offset: float = 0.0) -> F64:
    """Correlated rows in float64, with means of about `offset` standard deviations."""
    rng = np.random.default_rng(seed)
    mixing = np.eye(features) + rng.normal(size=(features, features)) / np.sqrt(features)
    return np.asarray(rng.normal(size=(observations, features)) @ mixing + offset * rng.normal(size=features))


def upper(matrix: F64) -> F64:
    """The upper triangle, which is what of a matrix is right."""
    return np.asarray(matrix[np.triu_indices(len(matrix))])


# --- eigenvalues ---------------------------------------------------------------------------------------


def test_eigenvalues_come_back_through_a_random_rotation_in_descending_order() -> None:
    expected = 0.5 ** np.arange(40)
    lam = eigenvalues(rotated(expected))
    assert lam.dtype == np.float64
    assert np.all(np.diff(lam) <= 0)
    np.testing.assert_allclose(lam, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("garbage", [np.nan, np.inf, 1e308])
def test_only_the_upper_triangle_is_read(garbage: float) -> None:
    covariance = rotated(np.linspace(5, 1, 30))
    expected = eigenvalues(covariance)
    covariance[np.tril_indices(30, -1)] = garbage
    before = covariance.copy()
    np.testing.assert_array_equal(eigenvalues(covariance), expected)
    np.testing.assert_array_equal(covariance, before)


def test_negative_eigenvalues_from_rounding_become_zero() -> None:
    lam = eigenvalues(np.array([[1.0, 2.0], [2.0, 1.0]]))
    np.testing.assert_allclose(lam, [3.0, 0.0], rtol=1e-15)
    assert lam[1] == 0.0


@pytest.mark.parametrize("features", [1, 2, 3, 50])
@pytest.mark.parametrize("exponent", [-1000, -600, 600, 1000])
def test_eigenvalues_at_the_ends_of_float64(features: int, exponent: int) -> None:
    covariance = rotated(np.linspace(2, 1, features))
    lam = eigenvalues(np.ldexp(covariance, exponent))
    np.testing.assert_allclose(np.ldexp(lam, -exponent), np.linspace(2, 1, features), rtol=1e-13)


def test_a_float32_covariance_is_decomposed_in_float64() -> None:
    covariance = rotated(np.linspace(2, 1, 20)).astype(np.float32)
    expected = eigenvalues(covariance.astype(np.float64))
    np.testing.assert_array_equal(eigenvalues(covariance), expected)


@pytest.mark.parametrize("features", [1, 2, 3, 20])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_covariance_that_is_not_finite_is_refused(features: int, bad: float) -> None:
    covariance = np.eye(features)
    covariance[0, -1] = bad
    with pytest.raises(ValueError, match="NaN or inf"):
        eigenvalues(covariance)


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 2, 2)])
def test_a_covariance_that_is_not_square_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="square"):
        eigenvalues(np.zeros(shape))


# --- correlation ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0.0, 3.0, 1e5])
@pytest.mark.parametrize("observations", [20, 1000])
def test_the_correlation_is_numpys_whatever_the_scale_of_each_feature(observations: int, offset: float) -> None:
    rows = mixed_rows(observations, 30, offset=offset) * 10.0 ** np.random.default_rng(1).uniform(-6, 6, 30)
    result = correlation(population_covariance(rows), rows.mean(0), FLOAT64_EPS)
    np.testing.assert_allclose(upper(result), upper(np.corrcoef(rows.T)), rtol=0, atol=1e-9)


def test_a_perfect_correlation_is_of_rank_one() -> None:
    direction = np.array([1e-6, -3.0, 2e5, 40.0])
    result = correlation(np.outer(direction, direction), np.zeros(4))
    np.testing.assert_allclose(upper(result), upper(np.outer(np.sign(direction), np.sign(direction))), rtol=1e-15)


def test_features_that_do_not_vary_are_left_out() -> None:
    covariance = np.diag([4.0, 0.0, 1.0, -1e-30])
    covariance[0, 2] = 1.0
    np.testing.assert_array_equal(upper(correlation(covariance, np.ones(4))), [1.0, 0.5, 1.0])


@pytest.mark.parametrize("mean", [1.0, -1e6, 1e-20])
@pytest.mark.parametrize("product_eps", [FLOAT32_EPS, FLOAT64_EPS])
def test_a_spread_of_rounding_is_left_out_and_a_little_more_is_not(mean: float, product_eps: float) -> None:
    def features(spread_in_ulps: float) -> int:
        spread = spread_in_ulps * product_eps * abs(mean)
        return len(correlation(np.array([[spread**2]]), np.array([mean]), product_eps))

    assert [features(ulps) for ulps in (0.0, 1.0, 7.9)] == [0, 0, 0]
    assert [features(ulps) for ulps in (8.1, 100.0, 1e5)] == [1, 1, 1]


def test_a_small_spread_keeps_its_say_beside_a_huge_one() -> None:
    rows = mixed_rows(500, 6) * np.array([1e8, 1.0, 1.0, 1e-4, 1.0, 1.0])
    result = correlation(population_covariance(rows), rows.mean(0))
    np.testing.assert_allclose(upper(result), upper(np.corrcoef(rows.T)), rtol=0, atol=1e-9)


def test_a_spread_without_squares_in_float32_is_left_out() -> None:
    covariance = np.diag([1.0, (1e-15) ** 2, (8e-16) ** 2])
    assert len(correlation(covariance, np.zeros(3))) == 2
    assert len(correlation(covariance, np.zeros(3), FLOAT64_EPS)) == 3
    # The layer's largest values may be those of a mean.
    covariance = np.diag([1e4, (1e-11) ** 2, (8e-12) ** 2])
    assert len(correlation(covariance, np.array([1e4, 0.0, 0.0]))) == 2


@pytest.mark.parametrize("checked", [True, False])
@pytest.mark.parametrize("batch", [7, 512, 5000])
def test_what_float32_products_leave_of_a_constant_feature_is_no_feature(batch: int, checked: bool) -> None:
    rows = mixed_rows(5000, 40) * np.logspace(-6, 3, 40)
    constants = [0.1, 3.3333, -77.7, 1e3 / 3, 12345.678, 1e-3 / 7, 0.0]
    rows[:, 10:17] = constants
    rows_ND = torch.tensor(rows, dtype=torch.float32)
    total = accumulator(40, checked=checked)
    for part in rows_ND.split(batch):
        total.add(part)
    moments = total.moments()

    varying = np.delete(rows_ND.double().numpy(), range(10, 17), axis=1)
    result = correlation(moments.covariance(), moments.mean)
    assert result.shape == (33, 33)
    np.testing.assert_allclose(upper(result), upper(np.corrcoef(varying.T)), rtol=0, atol=5 * FLOAT32_EPS)


@settings(max_examples=50, deadline=None)
@given(
    exponents=st.lists(st.integers(-15, 15), min_size=2, max_size=12),
    data=st.data(),
)
def test_scaling_and_reordering_features_changes_no_correlation(exponents: list[int], data: st.DataObject) -> None:
    rows = mixed_rows(40, len(exponents), offset=2.0)
    covariance, mean = population_covariance(rows), rows.mean(0)
    covariance = (covariance + covariance.T) / 2
    expected = correlation(covariance, mean)
    assert len(expected) == len(exponents)

    signs = data.draw(st.lists(st.sampled_from([-1.0, 1.0]), min_size=len(exponents), max_size=len(exponents)))
    scale = np.ldexp(1.0, exponents) * signs
    scaled = correlation(covariance * np.outer(scale, scale), mean * scale)
    np.testing.assert_array_equal(upper(scaled), upper(expected * np.outer(signs, signs)))

    order = np.array(data.draw(st.permutations(range(len(exponents)))))
    reordered = correlation(covariance[np.ix_(order, order)], mean[order])
    np.testing.assert_allclose(eigenvalues(reordered), eigenvalues(expected), rtol=0, atol=1e-13)


@pytest.mark.parametrize("exponent", [-1000, 1000])
def test_correlations_at_the_ends_of_float64(exponent: int) -> None:
    covariance, mean = rotated(np.linspace(5, 1, 10)), np.linspace(-1, 1, 10)
    scaled = correlation(np.ldexp(covariance, exponent), np.ldexp(mean, exponent // 2))
    np.testing.assert_array_equal(upper(scaled), upper(correlation(covariance, mean)))


@pytest.mark.parametrize("features", [0, 1, 5])
def test_without_variance_there_is_no_correlation(features: int) -> None:
    for mean in (np.zeros(features), np.full(features, 3.0)):
        assert correlation(np.zeros((features, features)), mean).shape == (0, 0)
    assert eigenvalues(np.zeros((0, 0))).shape == (0,)


def test_the_correlation_of_one_feature_is_one() -> None:
    assert correlation(np.array([[7.0]]), np.array([-3.0])) == pytest.approx(np.ones((1, 1)), rel=1e-15)


def test_the_lower_triangle_is_not_read_and_the_covariance_not_changed() -> None:
    covariance, mean = rotated(np.linspace(5, 1, 10)), np.linspace(-1, 1, 10)
    expected, expected_moment = correlation(covariance, mean), second_moment(covariance, mean)
    covariance[np.tril_indices(10, -1)] = np.nan
    before = covariance.copy()
    np.testing.assert_array_equal(upper(correlation(covariance, mean)), upper(expected))
    np.testing.assert_array_equal(upper(second_moment(covariance, mean)), upper(expected_moment))
    np.testing.assert_array_equal(covariance, before)


# --- second moment -------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0.0, 1.0, 1e4])
def test_the_second_moment_is_that_of_the_rows_themselves(offset: float) -> None:
    rows = mixed_rows(200, 12, offset=offset)
    result = second_moment(population_covariance(rows), rows.mean(0))
    np.testing.assert_allclose(upper(result), upper(rows.T @ rows / 200), rtol=1e-12, atol=1e-12)
