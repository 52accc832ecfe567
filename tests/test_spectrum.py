"""delve_ray.spectrum against closed forms, definitions, invariances and random-matrix theory."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import integrate

from delve_ray import spectrum
from delve_ray.errors import OptionError
from delve_ray.schema import EXTRA_STATS, F64, SCALAR_STATS
from tests.covariances import FLOAT64_EPS, population_covariance, random_rotation, rotated

# Nothing here may warn: a spectrum at the end of float64's range is an ordinary input.
pytestmark = pytest.mark.filterwarnings("error")


def every_statistic(lam: F64, *, samples: int = 10_000, product_eps: float = FLOAT64_EPS) -> spectrum.Statistics:
    """Return all scalars of a spectrum at δ = 0.99."""
    trace = float(sum(lam.tolist()))  # Python's sum is inf without a warning where float64 ends
    return spectrum.statistics(lam, trace=trace, samples=samples, threshold=0.99, product_eps=product_eps)


# --- intrinsic dimensionality and saturation -----------------------------------------------------------


def test_intrinsic_dimensionality_of_known_spectra() -> None:
    assert spectrum.intrinsic_dimensionality(np.array([1.0, 0.0, 0.0]), 0.99) == 1
    assert spectrum.intrinsic_dimensionality(np.ones(100), 0.99) == 99
    assert spectrum.intrinsic_dimensionality(np.ones(100), 0.991) == 100
    assert spectrum.intrinsic_dimensionality(np.ones(100), 1.0) == 100
    assert spectrum.intrinsic_dimensionality(0.5 ** np.arange(1, 41), 0.99) == 7  # 1 - 2^-7 = 0.992
    assert spectrum.intrinsic_dimensionality(np.array([4.0, 3.0, 2.0, 1.0]), 1e-9) == 1
    assert spectrum.saturation(np.ones(100), 0.25) == 0.25


@settings(max_examples=300, deadline=None)
@given(
    lam=st.lists(st.floats(0, 1e6), min_size=1, max_size=30).map(lambda v: sorted(v, reverse=True)),
    threshold=st.floats(0, 1, exclude_min=True),
)
@example(lam=[1.0] * 10, threshold=0.3)
@example(lam=[0.0, 0.0], threshold=0.5)
def test_intrinsic_dimensionality_is_its_definition(lam: list[float], threshold: float) -> None:
    k = spectrum.intrinsic_dimensionality(np.array(lam), threshold, product_eps=0.0)
    total = sum(map(Fraction, lam))
    if total == 0:
        assert k == 0
        return
    needed, rounding = Fraction(threshold) - Fraction(1, 10**12), Fraction(1, 10**14)
    assert 1 <= k <= len(lam)
    assert sum(map(Fraction, lam[:k])) / total >= needed - rounding
    assert k == 1 or sum(map(Fraction, lam[: k - 1])) / total < needed + rounding


@settings(max_examples=300, deadline=None)
@given(
    lam=st.lists(st.integers(1, 10**6), min_size=1, max_size=60).map(lambda v: sorted(v, reverse=True)),
    scale=st.sampled_from([1.0, 0.1, 1e-290, 1e290]),
    data=st.data(),
)
def test_a_cumulative_share_of_exactly_the_threshold_reaches_it(
    lam: list[int], scale: float, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, len(lam)))
    threshold = sum(lam[:k]) / sum(lam)
    assert spectrum.intrinsic_dimensionality(np.array(lam) * scale, threshold) == k


def test_the_tolerance_at_the_threshold_is_1e_12() -> None:
    lam = np.array([0.75, 0.25])
    assert spectrum.intrinsic_dimensionality(lam, 0.75 + 0.9e-12) == 1
    at_the_edge = 0.75 + 1e-12
    assert at_the_edge - 1e-12 == 0.75
    assert spectrum.intrinsic_dimensionality(lam, at_the_edge) == 1
    assert spectrum.intrinsic_dimensionality(lam, 0.75 + 1.1e-12) == 2


@pytest.mark.parametrize("bad", [0.0, 1.5, "0.9", [0.9]])
def test_a_bad_threshold_is_refused(bad: float) -> None:
    with pytest.raises(OptionError, match="sat_threshold"):
        spectrum.intrinsic_dimensionality(np.ones(3), bad)
    with pytest.raises(OptionError, match="sat_threshold"):
        spectrum.saturation(np.ones(3), bad)


@pytest.mark.parametrize("observations", [300, 3000])
def test_all_of_the_variance_is_what_rounding_leaves_of_it(observations: int) -> None:
    rng = np.random.default_rng(0)
    rows = (rng.normal(size=(observations, 3)) @ rng.normal(size=(3, 200))).astype(np.float32)
    rows -= rows.mean(0)
    lam = spectrum.eigenvalues(rows.T @ rows / np.float32(observations))
    assert 50 < np.count_nonzero(lam) <= 200
    assert [spectrum.intrinsic_dimensionality(lam, delta) for delta in (0.9999, 1.0, 1 - 0.9e-12)] == [3, 3, 3]
    assert spectrum.saturation(lam, 1.0) == 3 / 200
    assert spectrum.intrinsic_dimensionality(lam, 1.0, product_eps=1e-18) > 3


def test_at_one_the_reach_of_rounding_decides_and_short_of_it_the_definition() -> None:
    lam = np.array([1.0, 0.5, 0.25, 0.125])
    assert spectrum.intrinsic_dimensionality(lam, 1.0, product_eps=0.125 / 2) == 3
    assert spectrum.intrinsic_dimensionality(lam, 1.0, product_eps=0.124 / 2) == 4
    assert spectrum.intrinsic_dimensionality(lam, 1 - 2e-12, product_eps=0.125 / 2) == 4
    assert spectrum.intrinsic_dimensionality(np.zeros(3), 1.0) == 0


@pytest.mark.parametrize("alpha", [0.5, 1.5, 3.0])
def test_a_wide_layer_has_no_more_dimensions_at_a_share_than_in_all(alpha: float) -> None:
    lam = np.arange(1, 4097) ** -alpha  # of α = 1.5, the bound d·ε·λ1 would leave 161
    everything = spectrum.intrinsic_dimensionality(lam, 1.0)
    assert everything == np.count_nonzero(lam > 2 * spectrum.FLOAT32_EPS)
    for delta in (0.9, 0.99, 0.999, 1 - 2 * 4096 * spectrum.FLOAT32_EPS):
        assert spectrum.intrinsic_dimensionality(lam, delta) <= everything


# --- closed forms --------------------------------------------------------------------------------------


@pytest.mark.parametrize("features", [2, 20, 300])
def test_an_isotropic_spectrum(features: int) -> None:
    values = every_statistic(spectrum.eigenvalues(rotated(np.full(features, 0.5))), samples=10**6).values
    assert values["intrinsic_dimensionality"] == math.ceil(0.99 * features)
    assert values["trace"] == pytest.approx(0.5 * features)
    assert values["log_determinant"] == pytest.approx(-features * math.log(2))
    assert values["determinant"] == pytest.approx(0.5**features)
    for stat in ("effective_rank", "participation_ratio", "stable_rank"):
        assert values[stat] == pytest.approx(features), stat
    assert values["spectral_entropy"] == pytest.approx(math.log(features))
    assert values["condition_number"] == pytest.approx(1)
    assert values["noise_rank"] == 0
    assert values.get("alpha", 0.0) == 0.0


def test_a_rank_one_spectrum() -> None:
    direction = np.random.default_rng(1).normal(size=50)
    result = every_statistic(spectrum.eigenvalues(np.outer(direction, direction)))
    assert result.values["trace"] == pytest.approx(direction @ direction)
    assert result.values["intrinsic_dimensionality"] == 1
    assert result.values["saturation"] == 1 / 50
    for stat in ("effective_rank", "participation_ratio", "stable_rank", "noise_rank"):
        assert result.values[stat] == pytest.approx(1), stat
    assert result.values["spectral_entropy"] == pytest.approx(0, abs=1e-12)
    assert result.values["determinant"] == 0.0
    assert result.values["log_determinant"] == -math.inf
    assert result.values["condition_number"] == math.inf
    assert "alpha" not in result.values
    assert (result.alpha_r2, result.alpha_from, result.alpha_to) == (None, None, None)


def test_a_geometric_spectrum_through_a_random_rotation() -> None:
    ratio, features = 0.8, 40
    lam = spectrum.eigenvalues(rotated(3.0 * ratio ** np.arange(features)))
    values = every_statistic(lam).values
    total = (1 - ratio**features) / (1 - ratio)
    squares = (1 - ratio ** (2 * features)) / (1 - ratio**2)
    shares = ratio ** np.arange(features) / total
    assert values["trace"] == pytest.approx(3 * total)
    assert values["diagonal_trace"] == pytest.approx(3 * total)
    assert values["stable_rank"] == pytest.approx(total)
    assert values["participation_ratio"] == pytest.approx(total**2 / squares)
    assert values["condition_number"] == pytest.approx(ratio ** -(features - 1), rel=1e-9)
    pairs = features * (features - 1) / 2
    assert values["log_determinant"] == pytest.approx(features * math.log(3) + pairs * math.log(ratio))
    assert values["spectral_entropy"] == pytest.approx(-sum(p * math.log(p) for p in shares))
    assert values["effective_rank"] == pytest.approx(math.exp(values["spectral_entropy"]))
    # 1 - 0.8^k ≥ 0.99·(1 - 0.8^40) first holds at k = 21.
    assert values["intrinsic_dimensionality"] == 21


def test_determinants_where_float64_ends() -> None:
    small, large = np.full(512, 0.1), np.full(512, 10.0)
    assert spectrum.log_determinant(small) == pytest.approx(512 * math.log(0.1))
    assert spectrum.determinant(small) == 0.0
    assert spectrum.log_determinant(large) == pytest.approx(512 * math.log(10))
    assert spectrum.determinant(large) == math.inf
    assert spectrum.determinant(np.full(4, 0.5)) == pytest.approx(0.0625)


@pytest.mark.parametrize("features", [1, 7])
def test_a_spectrum_of_zeros(features: int) -> None:
    result = every_statistic(spectrum.eigenvalues(np.zeros((features, features))))
    expected = dict.fromkeys(SCALAR_STATS, 0.0) | {"log_determinant": -math.inf}
    del expected["condition_number"], expected["alpha"]
    assert result == spectrum.Statistics(expected)


def test_a_single_feature() -> None:
    values = every_statistic(spectrum.eigenvalues(np.array([[4.0]]))).values
    ones = dict.fromkeys(
        ["saturation", "intrinsic_dimensionality", "effective_rank", "participation_ratio", "stable_rank"], 1.0
    )
    expected = ones | {"trace": 4.0, "diagonal_trace": 4.0, "determinant": 4.0, "log_determinant": math.log(4.0)}
    expected |= {"spectral_entropy": 0.0, "condition_number": 1.0, "noise_rank": 0.0}
    assert values == pytest.approx(expected)
    assert math.copysign(1, values["spectral_entropy"]) == 1


def test_a_layer_without_features_has_no_dimension() -> None:
    values = every_statistic(spectrum.eigenvalues(np.zeros((0, 0)))).values
    assert values["intrinsic_dimensionality"] == values["saturation"] == values["effective_rank"] == 0
    assert "condition_number" not in values


def test_trace_is_the_diagonals_and_diagonal_trace_the_clipped_eigenvalues() -> None:
    covariance = np.array([[1.0, 2.0], [2.0, 1.0]])
    lam = spectrum.eigenvalues(covariance)
    values = spectrum.statistics(lam, trace=float(np.trace(covariance)), samples=9, threshold=0.99).values
    assert values["trace"] == 2.0
    assert values["diagonal_trace"] == pytest.approx(3.0)


# --- power law -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 0.9, 1.0, 1.7, 2.5])
@pytest.mark.parametrize("features", [5, 64, 1500])
def test_an_exact_power_law_gives_its_exponent(alpha: float, features: int) -> None:
    fit = spectrum.power_law_exponent(7.0 * np.arange(1, features + 1) ** -alpha, FLOAT64_EPS)
    assert fit is not None
    assert fit.alpha == pytest.approx(alpha, abs=1e-10)
    assert 1 - 1e-12 <= fit.r2 <= 1


@pytest.mark.parametrize(
    ("resolved", "expected"),
    [(5, (1, 5)), (9, (1, 9)), (10, (2, 10)), (20, (3, 12)), (100, (11, 50)), (600, (11, 300)), (2000, (11, 500))],
)
def test_the_ranks_of_the_fit(resolved: int, expected: tuple[int, int]) -> None:
    lam = np.concatenate([np.arange(1, resolved + 1) ** -1.0, np.full(30, 1e-15)])
    fit = spectrum.power_law_exponent(lam)
    assert fit is not None
    assert (fit.first_rank, fit.last_rank) == expected
    assert fit.alpha == pytest.approx(1)
    result = every_statistic(lam, product_eps=spectrum.FLOAT32_EPS)
    assert (result.alpha_from, result.alpha_to) == expected
    assert result.alpha_r2 == fit.r2
    assert result.values["alpha"] == fit.alpha


def test_the_fit_is_the_least_squares_line() -> None:
    rng = np.random.default_rng(3)
    lam = np.sort(np.arange(1, 201) ** -1.2 * rng.uniform(0.5, 2, 200))[::-1]
    fit = spectrum.power_law_exponent(lam)
    assert fit is not None
    x, y = np.log(np.arange(11, 101)), np.log(lam[10:100])
    slope, intercept = np.polyfit(x, y, 1)
    residual = y - slope * x - intercept
    assert fit.alpha == pytest.approx(-slope)
    assert fit.r2 == pytest.approx(1 - residual @ residual / np.sum((y - y.mean()) ** 2))
    assert fit.r2 < 0.9999


def test_four_resolved_eigenvalues_are_too_few_for_a_power_law() -> None:
    assert spectrum.power_law_exponent(np.array([4.0, 3.0, 2.0, 1.0, 1e-9, 0.0])) is None


def test_a_flat_spectrum_has_a_perfect_fit_in_spite_of_rounding() -> None:
    fit = spectrum.power_law_exponent(spectrum.eigenvalues(rotated(np.full(100, 1e-200))))
    assert fit == spectrum.PowerLawFit(0.0, 1.0, 11, 50)


# --- RankMe --------------------------------------------------------------------------------------------


def rankme_of_rows(rows: F64) -> float:
    """RankMe as the paper writes it, from the singular values of the rows."""
    singular = np.linalg.svd(rows, compute_uv=False)
    p = singular / singular.sum() + 1e-7
    return float(np.exp(-np.sum(p * np.log(p))))


def extra(rows: F64, *stats: str, threshold: float = 0.99, product_eps: float = FLOAT64_EPS) -> dict[str, float]:
    """The statistics of other matrices, from the moments of rows."""
    covariance, mean = population_covariance(rows), rows.mean(0)
    lam = spectrum.eigenvalues(covariance)
    result = spectrum.statistics(
        lam,
        trace=float(np.trace(covariance)),
        samples=len(rows),
        threshold=threshold,
        stats=stats or EXTRA_STATS,
        product_eps=product_eps,
        covariance=np.triu(covariance),
        mean=mean,
    )
    return {name: value for name, value in result.values.items() if name in EXTRA_STATS}


@pytest.mark.parametrize("offset", [0.0, 0.3, 100.0])
@pytest.mark.parametrize(("observations", "features"), [(500, 40), (41, 40), (40, 40), (15, 40), (2, 5)])
def test_rankme_is_that_of_the_uncentred_rows(observations: int, features: int, offset: float) -> None:
    rng = np.random.default_rng(observations)
    rows = rng.normal(size=(observations, features)) * np.linspace(1, 9, features) + offset * rng.normal(size=features)
    assert extra(rows, "rankme")["rankme"] == pytest.approx(rankme_of_rows(rows), rel=1e-5)
    assert extra(-3e-5 * rows, "rankme")["rankme"] == pytest.approx(rankme_of_rows(rows), rel=1e-5)


@pytest.mark.parametrize("features", [1, 2, 100])
def test_rankme_of_equal_singular_values_counts_them(features: int) -> None:
    p = 1 / features + 1e-7
    assert spectrum.rankme(np.full(features, 0.3), samples=1000) == pytest.approx(math.exp(-features * p * math.log(p)))
    assert spectrum.rankme(np.full(features, 0.3), samples=1000) == pytest.approx(features, rel=1e-4)


def test_rankme_has_a_term_for_each_of_the_singular_values_that_rows_have() -> None:
    nothing = -1e-7 * math.log(1e-7)
    lam = np.array([4.0, 0.0, 0.0, 0.0])
    for samples, terms in ((1, 1), (3, 3), (4, 4), (9, 4)):
        expected = math.exp((terms - 1) * nothing - (1 + 1e-7) * math.log(1 + 1e-7))
        assert spectrum.rankme(lam, samples) == pytest.approx(expected, rel=1e-12)
    assert spectrum.rankme(lam, samples=0) == spectrum.rankme(np.zeros(3), samples=9) == 0.0
    assert spectrum.rankme(np.zeros(0), samples=9) == 0.0


def test_the_roots_of_rounding_do_not_count_in_rankme() -> None:
    rng = np.random.default_rng(0)
    rows = np.outer(rng.normal(size=300), rng.normal(size=256)).astype(np.float32)
    rows -= rows.mean(0)
    moment = (rows.T @ rows / np.float32(300)).astype(np.float64)
    lam = spectrum.eigenvalues(moment)
    true = rankme_of_rows(rows.astype(np.float64))
    assert true == pytest.approx(1, abs=1e-3)
    assert spectrum.rankme(lam, samples=300) > 1.05
    assert spectrum.rankme(lam, 300, spectrum.rounding_reach(lam)) == pytest.approx(true, abs=1e-3)
    values = spectrum.statistics(
        lam, trace=1.0, samples=300, threshold=0.99, stats="rankme", covariance=moment, mean=np.zeros(256)
    ).values
    assert values["rankme"] == pytest.approx(true, abs=1e-3)


def test_a_tail_under_the_bound_of_rounding_counts_in_rankme() -> None:
    lam = np.arange(1, 1001) ** -1.5
    singular = np.sqrt(lam) / np.sqrt(lam).sum() + 1e-7
    expected = math.exp(-np.sum(singular * np.log(singular)))
    assert np.count_nonzero(lam < spectrum.rounding_floor(lam)) > 500
    values = spectrum.statistics(
        lam, trace=1.0, samples=9999, threshold=0.99, stats="rankme", covariance=np.diag(lam), mean=np.zeros(1000)
    ).values
    assert values["rankme"] == pytest.approx(expected, rel=1e-9)


def test_a_large_mean_hides_nothing_from_rankme() -> None:
    rows = np.random.default_rng(2).normal(size=(400, 50)) + 3e4
    true = rankme_of_rows(rows)
    assert 1.001 < true < 1.05
    assert extra(rows, "rankme", product_eps=spectrum.FLOAT32_EPS)["rankme"] - 1 == pytest.approx(true - 1, rel=1e-2)


# --- correlation ---------------------------------------------------------------------------------------


def correlation_of_rows(rows: F64, threshold: float) -> dict[str, float]:
    """The three statistics from the eigenvalues of numpy's own correlation of the features that vary."""
    varying = rows[:, rows.std(0) > 1e-9]
    lam = np.linalg.eigvalsh(np.atleast_2d(np.corrcoef(varying.T)))[::-1]
    shares = np.clip(lam / lam.sum(), 1e-300, 1)
    k = 1 + int(np.argmax(np.cumsum(lam) / lam.sum() >= threshold - 1e-12))
    return {
        "correlation_saturation": k / rows.shape[1],
        "correlation_intrinsic_dimensionality": k,
        "correlation_effective_rank": math.exp(-np.sum(shares * np.log(shares))),
    }


@pytest.mark.parametrize("threshold", [0.5, 0.9, 0.99])
@pytest.mark.parametrize(("observations", "features"), [(500, 40), (30, 40), (3, 5), (2, 4)])
def test_the_correlations_statistics_are_those_of_the_rows(observations: int, features: int, threshold: float) -> None:
    rng = np.random.default_rng(features)
    rows = rng.normal(size=(observations, 7)) @ rng.normal(size=(7, features)) + rng.normal(size=features)
    rows *= 10.0 ** rng.uniform(-4, 4, features)
    assert extra(rows, "correlation", threshold=threshold) == pytest.approx(correlation_of_rows(rows, threshold))


def test_a_huge_activation_owns_the_covariance_and_not_the_correlation() -> None:
    rows = np.random.default_rng(4).normal(size=(2000, 50))
    rows[:, 7] *= 1e4
    lam = spectrum.eigenvalues(population_covariance(rows))
    assert spectrum.intrinsic_dimensionality(lam) == 1
    values = extra(rows, "correlation", product_eps=spectrum.FLOAT32_EPS)
    assert values == pytest.approx(correlation_of_rows(rows, 0.99))
    assert values["correlation_saturation"] > 0.95
    assert values["correlation_effective_rank"] > 48


def test_a_constant_feature_has_no_say_and_its_place_in_the_width() -> None:
    rows = np.random.default_rng(5).normal(size=(400, 10))
    rows[:, [2, 5]] = [3.3333, 0.0]
    rows[:, 5] += 1e-9 * rows[:, 0]
    rows[:, 8] = 1e3 + 1e-4 * rows[:, 8]
    values = extra(rows, "correlation", product_eps=spectrum.FLOAT32_EPS)
    assert values["correlation_intrinsic_dimensionality"] == 7
    assert values["correlation_saturation"] == 0.7
    # The copy of feature 0 at a billionth of its size is as good as the original.
    varying = rows[:, [0, 0, 1, 3, 4, 6, 7, 9]]
    expected = correlation_of_rows(varying, 0.99)["correlation_effective_rank"]
    assert values["correlation_effective_rank"] == pytest.approx(expected)


@settings(max_examples=60, deadline=None)
@given(
    features=st.integers(1, 12),
    observations=st.integers(2, 30),
    exponents=st.lists(st.integers(-15, 15), min_size=12, max_size=12),
    data=st.data(),
)
def test_scale_sign_and_order_of_features_change_nothing_of_the_correlation(
    features: int, observations: int, exponents: list[int], data: st.DataObject
) -> None:
    rng = np.random.default_rng(features * 100 + observations)
    rows = rng.normal(size=(observations, features)) @ rng.normal(size=(features, features)) + 1.0
    here = extra(rows, "correlation", threshold=0.9)
    scale = np.ldexp(1.0, exponents[:features]) * rng.choice([-1.0, 1.0], features)
    order = np.array(data.draw(st.permutations(range(features))))
    there = extra((rows * scale)[:, order], "correlation", threshold=0.9)
    assert there == pytest.approx(here, rel=1e-9)


@pytest.mark.parametrize("mean", [0.0, 2.5])
@pytest.mark.parametrize("observations", [0, 1, 8])
@pytest.mark.parametrize("features", [0, 1, 4])
def test_other_matrices_without_variance(features: int, observations: int, mean: float) -> None:
    covariance, means = np.zeros((features, features)), np.full(features, mean if observations else 0.0)
    lam = spectrum.eigenvalues(covariance)
    result = spectrum.statistics(
        lam,
        trace=0.0,
        samples=observations,
        threshold=0.99,
        thresholds=(0.99, 1.0),
        stats=EXTRA_STATS,
        covariance=covariance,
        mean=means,
    )
    assert result.values["correlation_saturation"] == result.values["correlation_intrinsic_dimensionality"] == 0
    assert result.values["correlation_effective_rank"] == 0.0
    directions = 1 if observations and features and mean else 0
    assert result.values["rankme"] == pytest.approx(directions, abs=1e-5)
    assert result.intrinsic_dimensionalities == (0, 0)


def test_one_feature_has_the_correlation_and_the_rank_one() -> None:
    rows = np.random.default_rng(6).normal(size=(50, 1)) * 1e-3 + 5.0
    values = extra(rows)
    assert values.pop("rankme") == pytest.approx(1.0, abs=1e-6)
    assert values == dict.fromkeys(EXTRA_STATS[:3], 1.0)


# --- rounding ------------------------------------------------------------------------------------------


def test_eigenvalues_under_the_rounding_floor_count_as_zero_where_they_are_no_signal() -> None:
    lam = np.array([4.0, 2.0, 1.0, 0.5, 0.25, 1e-7])
    assert spectrum.rounding_floor(lam) == pytest.approx(6 * 2**-23 * 4)
    coarse, fine = every_statistic(lam, product_eps=2**-23).values, every_statistic(lam).values
    assert coarse["determinant"] == 0.0
    assert coarse["log_determinant"] == -math.inf
    assert coarse["condition_number"] == math.inf
    assert fine["determinant"] == pytest.approx(1e-7)
    assert fine["condition_number"] == pytest.approx(4e7)
    for stat in ("intrinsic_dimensionality", "diagonal_trace", "effective_rank", "participation_ratio"):
        assert coarse[stat] == fine[stat], stat


def test_an_eigenvalue_at_the_floor_is_resolved_and_one_under_it_is_not() -> None:
    at_floor = np.array([1.0, 0.25])
    assert spectrum.condition_number(at_floor, product_eps=0.125) == 4.0
    under = np.array([1.0, np.nextafter(0.25, 0)])
    assert spectrum.condition_number(under, product_eps=0.125) == math.inf


# --- invariances ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("exponent", [-1000, -500, 500, 1000])
def test_scale_changes_only_what_has_a_scale(exponent: int) -> None:
    lam = spectrum.eigenvalues(rotated(np.arange(1, 61) ** -1.1, seed=5))
    plain, scaled = every_statistic(lam), every_statistic(np.ldexp(lam, exponent))
    shift = lam.size * exponent * math.log(2)
    with_scale = {
        "trace": math.ldexp(plain.values["trace"], exponent),
        "diagonal_trace": math.ldexp(plain.values["diagonal_trace"], exponent),
        "log_determinant": plain.values["log_determinant"] + shift,
        "determinant": math.inf if exponent > 0 else 0.0,
    }
    assert scaled.values == pytest.approx(plain.values | with_scale, rel=1e-12)
    assert scaled.alpha_r2 == pytest.approx(plain.alpha_r2)


def test_sums_and_squares_beyond_float64_neither_warn_nor_spoil_the_rest() -> None:
    values = every_statistic(np.array([1.5e308, 1.5e308]), samples=100).values
    assert values["diagonal_trace"] == math.inf
    assert values["participation_ratio"] == values["stable_rank"] == 2.0
    assert values["intrinsic_dimensionality"] == 2
    tiny = every_statistic(np.array([5e-324, 5e-324])).values
    assert tiny["participation_ratio"] == tiny["stable_rank"] == 2.0
    assert tiny["condition_number"] == 1.0
    wide = every_statistic(np.array([1e308, 1e-308]), product_eps=0.0).values
    assert wide["condition_number"] == math.inf
    assert wide["log_determinant"] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_rotation_of_the_features_changes_nothing(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(400, 30)) @ np.diag(np.linspace(1, 5, 30))
    here = every_statistic(spectrum.eigenvalues(population_covariance(rows)), samples=400)
    there = every_statistic(
        spectrum.eigenvalues(population_covariance(rows @ random_rotation(30, seed) + 9.0)), samples=400
    )
    assert there.values == pytest.approx(here.values, rel=1e-9)
    assert there.alpha_r2 == pytest.approx(here.alpha_r2)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(0, 1e300), min_size=1, max_size=20).map(lambda v: np.array(sorted(v, reverse=True))))
def test_the_measures_of_dimension_keep_their_order(lam: F64) -> None:
    values = every_statistic(lam).values
    if not lam.any():
        return
    rank, slack = np.count_nonzero(lam), 1 + 1e-9
    assert 1 <= values["stable_rank"] <= values["participation_ratio"] * slack
    assert values["participation_ratio"] <= values["effective_rank"] * slack
    assert values["effective_rank"] <= rank * slack
    assert list(values) == [name for name in SCALAR_STATS if name in values]


# --- Marchenko-Pastur ----------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [1e-6, 0.01, 0.3, 0.7, 0.99, 1.0])
def test_half_of_the_marchenko_pastur_law_lies_under_its_median(ratio: float) -> None:
    lower, upper = (1 - math.sqrt(ratio)) ** 2, (1 + math.sqrt(ratio)) ** 2

    def density(x: float) -> float:
        return math.sqrt(max(0.0, (upper - x) * (x - lower))) / (2 * math.pi * ratio * x)

    median = spectrum.marchenko_pastur_median(ratio)
    mass, _ = integrate.quad(density, median, upper)
    assert mass == pytest.approx(0.5, abs=1e-7)


def test_the_marchenko_pastur_median_against_noise_and_the_literature() -> None:
    # Gavish & Donoho: the optimal coefficient for square matrices, (4/√3)/√median, is 2.858.
    assert 4 / math.sqrt(3) / math.sqrt(spectrum.marchenko_pastur_median(1.0)) == pytest.approx(2.858, abs=5e-4)
    rows = np.random.default_rng(0).normal(size=(1200, 480))
    empirical = np.median(np.linalg.eigvalsh(rows.T @ rows / 1200))
    assert spectrum.marchenko_pastur_median(0.4) == pytest.approx(empirical, rel=0.01)


@pytest.mark.parametrize("ratio", [0.0, -1.0, 1.1, math.nan])
def test_a_ratio_outside_the_law_is_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match="ratio"):
        spectrum.marchenko_pastur_median(ratio)


SHAPES = [(1000, 60), (300, 200), (121, 120), (120, 121), (120, 300), (40, 400)]


@pytest.mark.parametrize(("samples", "features"), SHAPES)
def test_pure_noise_has_no_rank(samples: int, features: int) -> None:
    ranks = []
    for seed in range(8):
        rows = 3.0 + 0.01 * np.random.default_rng(seed).normal(size=(samples, features))
        lam = spectrum.eigenvalues(population_covariance(rows))
        ranks.append(spectrum.noise_rank(lam, samples, FLOAT64_EPS))
    # The largest eigenvalue passes the edge in about one of six draws, the second hardly ever.
    assert max(ranks) <= 1
    assert sum(ranks) <= 4


@pytest.mark.parametrize("spikes", [1, 6])
@pytest.mark.parametrize(("samples", "features"), SHAPES)
def test_noise_rank_counts_planted_spikes(samples: int, features: int, spikes: int) -> None:
    ratio = features / samples
    # Well over the threshold √γ of Baik, Ben Arous and Péché, under which no spike can be seen.
    strength = 8 * math.sqrt(ratio) * (1 + math.sqrt(ratio))
    ranks = []
    for seed in range(8):
        rng = np.random.default_rng(seed)
        signal = math.sqrt(strength) * rng.normal(size=(samples, spikes)) @ random_rotation(features, seed)[:spikes]
        lam = spectrum.eigenvalues(population_covariance(signal + rng.normal(size=(samples, features))))
        ranks.append(spectrum.noise_rank(lam, samples, FLOAT64_EPS))
        # With the null space of d > n buried in the rounding of float32 products, too.
        assert spectrum.noise_rank(lam + 1e-8, samples) == ranks[-1]
    # All spikes are seen; the largest eigenvalue of the noise now and then passes the edge.
    assert min(ranks) == spikes
    assert max(ranks) <= spikes + 1
    assert sum(ranks) <= 8 * spikes + 4


def test_noise_rank_of_signal_without_noise_counts_the_signal_alone() -> None:
    lam = np.concatenate([[5.0, 3.0], np.full(98, 1e-9)])
    assert spectrum.noise_rank(lam, 1000) == 2


@pytest.mark.parametrize(("samples", "features"), SHAPES)
@pytest.mark.parametrize("sigma", [0.01, 1.0, 30.0])
def test_the_noise_edge_is_that_of_marchenko_and_pastur(samples: int, features: int, sigma: float) -> None:
    rows = 3.0 + sigma * np.random.default_rng(5).normal(size=(samples, features))
    lam = spectrum.eigenvalues(population_covariance(rows))
    # The population covariance divides by n what has n - 1 degrees of freedom.
    expected = sigma**2 * (1 + math.sqrt(features / (samples - 1))) ** 2 * (samples - 1) / samples
    assert spectrum.noise_edge(lam, samples, FLOAT64_EPS) == pytest.approx(expected, rel=0.06)


@settings(max_examples=200, deadline=None)
@given(
    lam=st.lists(st.floats(0, 1e6), min_size=1, max_size=30).map(lambda v: np.array(sorted(v, reverse=True))),
    samples=st.integers(0, 100),
)
def test_noise_rank_counts_what_is_above_the_edge(lam: F64, samples: int) -> None:
    edge = spectrum.noise_edge(lam, samples)
    resolved = lam[lam >= spectrum.rounding_floor(lam)] if lam.any() else lam[:0]
    near = np.isclose(resolved, edge, rtol=1e-12, atol=0.0)  # equal up to rounding: either count is right
    above = int(np.count_nonzero((resolved > edge) & ~near))
    assert above <= spectrum.noise_rank(lam, samples) <= above + np.count_nonzero(near)


def test_the_noise_edge_has_the_unit_of_the_eigenvalues() -> None:
    lam = np.array([30.0, 1.1, 1.05, 1.0, 0.95, 0.9])
    assert spectrum.noise_edge(lam * 2.0**900, 50) == spectrum.noise_edge(lam, 50) * 2.0**900
    assert spectrum.noise_edge(lam * 2.0**-900, 50) == spectrum.noise_edge(lam, 50) * 2.0**-900
    assert spectrum.noise_edge(np.full(6, 1e308), 6) == math.inf
    assert spectrum.noise_rank(np.full(6, 1e308), 6) == 0
    assert spectrum.noise_edge(np.zeros(6), 50) == 0.0
    assert spectrum.noise_edge(np.zeros(0), 50) == 0.0


def test_centring_takes_one_degree_of_freedom_from_the_noise() -> None:
    # Three observations make two eigenvalues; counted as three, the zero among them would lower the median.
    assert spectrum.noise_rank(np.array([1.0, 0.01, 0.0]), samples=3) == 0
    assert spectrum.noise_rank(np.array([1.0, 0.01, 0.0]), samples=4) == 1


@pytest.mark.parametrize("samples", [0, 1, 2])
def test_noise_rank_with_hardly_any_observations_is_zero(samples: int) -> None:
    lam = np.zeros(10)
    lam[0] = 1.0 if samples == 2 else 0.0
    assert spectrum.noise_rank(lam, samples) == 0


# --- what was asked for --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ([], ["saturation", "intrinsic_dimensionality"]),
        (["cov"], ["saturation", "intrinsic_dimensionality"]),
        (["dtrc", "effective_rank"], ["saturation", "intrinsic_dimensionality", "diagonal_trace", "effective_rank"]),
        (None, list(SCALAR_STATS)),
    ],
)
def test_only_what_was_asked_for_is_computed(asked: list[str] | None, expected: list[str]) -> None:
    lam = np.arange(20, 0, -1.0)
    result = spectrum.statistics(lam, trace=210.0, samples=100, threshold=0.9, stats=asked)
    assert list(result.values) == expected
    assert (result.alpha_r2 is None) == ("alpha" not in expected)
    assert isinstance(result.values["intrinsic_dimensionality"], int)
    assert all(isinstance(result.values[name], float) for name in expected if name != "intrinsic_dimensionality")


def test_several_thresholds_have_their_dimensions_from_the_one_spectrum() -> None:
    lam = spectrum.eigenvalues(rotated(0.5 ** np.arange(1, 41)))
    several = (0.9, 0.5, 0.99, 0.999)
    result = spectrum.statistics(
        lam, trace=1.0, samples=999, threshold=0.9, thresholds=several, stats=[], product_eps=FLOAT64_EPS
    )
    assert result.intrinsic_dimensionalities == (4, 1, 7, 10)  # 1 - 2^-k
    assert all(type(k) is int for k in result.intrinsic_dimensionalities)
    assert result.values == {"saturation": 4 / 40, "intrinsic_dimensionality": 4}
    assert every_statistic(lam).intrinsic_dimensionalities == ()


def test_at_one_the_precision_of_the_products_counts_in_the_statistics() -> None:
    lam = np.array([1.0, 0.5, 1e-8])
    for product_eps, k in ((spectrum.FLOAT32_EPS, 2), (FLOAT64_EPS, 3)):
        result = spectrum.statistics(
            lam, trace=1.5, samples=99, threshold=1.0, thresholds=(1.0, 0.9), product_eps=product_eps
        )
        assert (result.values["saturation"], result.values["intrinsic_dimensionality"]) == (k / 3, k)
        assert result.intrinsic_dimensionalities == (k, 2)


@pytest.mark.parametrize(
    ("asked", "decompositions"),
    [
        (None, 0),
        ("cov", 0),
        ("correlation_saturation", 1),
        ("correlation", 1),
        ("rankme", 1),
        (["rankme", "correlation", "trc"], 2),
    ],
)
def test_another_matrix_is_decomposed_once_and_only_where_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, asked: str | None, decompositions: int
) -> None:
    rows = np.random.default_rng(7).normal(size=(50, 6)) + 1.0
    covariance = population_covariance(rows)
    lam, shapes = spectrum.eigenvalues(covariance), []
    original = spectrum.eigenvalues
    monkeypatch.setattr(spectrum, "eigenvalues", lambda matrix: shapes.append(matrix.shape) or original(matrix))
    result = spectrum.statistics(
        lam, trace=1.0, samples=50, threshold=0.9, stats=asked, covariance=covariance, mean=rows.mean(0)
    )
    assert len(shapes) == decompositions
    names = [name for name in spectrum.resolve_stats(asked) if name in EXTRA_STATS]
    assert [name for name in result.values if name in EXTRA_STATS] == names
    for name in names:
        assert isinstance(result.values[name], int if name == "correlation_intrinsic_dimensionality" else float)


def test_other_matrices_need_the_covariance_and_the_mean() -> None:
    for some in ({}, {"covariance": np.eye(3)}, {"mean": np.zeros(3)}):
        with pytest.raises(ValueError, match="rankme need the covariance and the mean"):
            spectrum.statistics(np.ones(3), trace=3.0, samples=9, threshold=0.9, stats="rankme", **some)


def test_every_scalar_is_the_function_of_its_name() -> None:
    lam = spectrum.eigenvalues(rotated(np.concatenate([[50.0, 20.0], np.linspace(2, 1, 38)])))
    before = lam.copy()
    values = spectrum.statistics(lam, trace=1.25, samples=500, threshold=0.9, product_eps=FLOAT64_EPS).values
    fit = spectrum.power_law_exponent(lam, FLOAT64_EPS)
    assert fit is not None
    assert values == {
        "saturation": spectrum.saturation(lam, 0.9),
        "intrinsic_dimensionality": spectrum.intrinsic_dimensionality(lam, 0.9),
        "trace": 1.25,
        "diagonal_trace": lam.sum(),
        "determinant": spectrum.determinant(lam, FLOAT64_EPS),
        "log_determinant": spectrum.log_determinant(lam, FLOAT64_EPS),
        "effective_rank": spectrum.effective_rank(lam),
        "participation_ratio": spectrum.participation_ratio(lam),
        "stable_rank": spectrum.stable_rank(lam),
        "spectral_entropy": spectrum.spectral_entropy(lam),
        "condition_number": spectrum.condition_number(lam, FLOAT64_EPS),
        "alpha": fit.alpha,
        "noise_rank": spectrum.noise_rank(lam, 500, FLOAT64_EPS),
    }
    assert values["noise_rank"] == 2
    np.testing.assert_array_equal(lam, before)


def test_a_bad_threshold_or_name_stops_the_statistics() -> None:
    with pytest.raises(OptionError, match="sat_threshold"):
        spectrum.statistics(np.ones(3), trace=3.0, samples=9, threshold=0.0)
    with pytest.raises(OptionError, match="stats"):
        spectrum.statistics(np.ones(3), trace=3.0, samples=9, threshold=0.9, stats=["rank"])
