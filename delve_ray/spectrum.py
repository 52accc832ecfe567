"""From a covariance to its eigenvalues, and from them to every published statistic: pure functions.

Throughout, `eigenvalues` is the float64 array λ1 ≥ … ≥ λd ≥ 0 of shape (d,) that `matrices.eigenvalues` returns, in
squared units of the layer's output; it is not checked again and never changed. Ratios are taken from λ/λ1, so
that no scale that float64 can hold over- or underflows on the way.

Eigenvalues under `rounding_floor`, the rounding of the products that Q was summed from, count as zero where
noise would look like signal (determinants, condition number, power law, noise rank); sums keep them. Where a bound
that leaves out much of a wide layer would do harm, k(1) and RankMe, it is `rounding_reach` that decides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from delve_ray.matrices import FLOAT32_EPS as FLOAT32_EPS
from delve_ray.matrices import correlation, second_moment
from delve_ray.matrices import eigenvalues as eigenvalues
from delve_ray.schema import ALWAYS, EXTRA_STATS, F64, SCALAR_STATS
from delve_ray.stat_options import CORRELATION_STATS
from delve_ray.stat_options import check_threshold as check_threshold
from delve_ray.stat_options import check_thresholds as check_thresholds
from delve_ray.stat_options import resolve_stats as resolve_stats

_FLOAT64_EPS = float(np.finfo(np.float64).eps)
_SHARE_TOLERANCE = 1e-12  # a cumulative share this far under δ has reached it: the rounding of a sum of d terms
_MIN_FIT_POINTS, _PREFERRED_FIT_POINTS, _MAX_FIT_RANK = 5, 10, 500
_RANKME_EPS = 1e-7  # the paper's, for float32
_FLAT_LOG_SPREAD = 1e-12  # logarithms that spread less than this differ by rounding alone
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(40)  # for a smooth integrand: exact to float64


def rounding_floor(eigenvalues: F64, product_eps: float = FLOAT32_EPS) -> float:
    """Return d·ε·λ1, under which an eigenvalue counts as rounding.

    `product_eps` is ε, the machine epsilon of the precision in which the products zᵀz were formed.

    >>> rounding_floor(np.array([4.0, 1.0]), product_eps=0.001)
    0.008
    """
    return eigenvalues.size * float(product_eps) * float(eigenvalues.max(initial=0.0))


def rounding_reach(eigenvalues: F64, product_eps: float = FLOAT32_EPS) -> float:
    """Return 2·ε·λ1, as far as rounding reaches in practice; all else as `rounding_floor`, which is a bound.

    The eigenvalues that float32 products gave rows of low rank in place of zeros came to 0.02 to 1.3·ε·λ1, the less
    the wider the layer: errors of single products partly cancel. `rounding_floor` is far above that, and at
    d = 4096 above most eigenvalues of a layer whose spectrum falls like i^-1.5.

    >>> rounding_reach(np.array([4.0, 1.0]), product_eps=0.001)
    0.008
    """
    return 2.0 * float(product_eps) * float(eigenvalues.max(initial=0.0))


def _resolved(eigenvalues: F64, product_eps: float) -> F64:
    """Return the leading eigenvalues that are neither zero nor rounding."""
    floor = rounding_floor(eigenvalues, product_eps)
    return eigenvalues[: np.count_nonzero((eigenvalues > 0.0) & (eigenvalues >= floor))]


def _relative(eigenvalues: F64) -> F64:
    """Return λ/λ1, empty for a spectrum of zeros."""
    return eigenvalues / eigenvalues[0] if eigenvalues.any() else eigenvalues[:0]


def intrinsic_dimensionality(eigenvalues: F64, threshold: float = 0.99, product_eps: float = FLOAT32_EPS) -> int:
    """Return k(δ), the number of leading eigenvalues that explain the share δ = `threshold` of the variance.

    The smallest k with (λ1+…+λk)/Σλ ≥ δ - 1e-12; 0 if Σλ = 0. Rounding counts as variance, which matters only where
    1 - δ is less than its share, a few d·ε at most. At δ = 1 (to within 1e-12) it would be all that decides, and a
    layer of rank one have k = d: there, only eigenvalues above `rounding_reach` count, and k(δ) ≤ k(1) holds for
    all δ up to 1 - 2·d·ε. Raises OptionError for δ outside (0, 1].
    Source: Shenk et al., Feature Space Saturation during Training, arXiv 2006.08679.

    >>> intrinsic_dimensionality(np.array([8.0, 1.0, 1.0]), threshold=0.9)
    2
    >>> noisy = np.array([8.0, 1.0, 1e-9])
    >>> intrinsic_dimensionality(noisy, threshold=1.0), intrinsic_dimensionality(noisy, threshold=1 - 1e-11)
    (2, 3)
    """
    delta = check_threshold(threshold)
    if delta >= 1.0 - _SHARE_TOLERANCE:
        eigenvalues = eigenvalues[: np.count_nonzero(eigenvalues > rounding_reach(eigenvalues, product_eps))]
    cumulative = np.cumsum(_relative(eigenvalues))
    return 1 + int(np.searchsorted(cumulative / cumulative[-1], delta - _SHARE_TOLERANCE)) if cumulative.size else 0


def saturation(eigenvalues: F64, threshold: float = 0.99, product_eps: float = FLOAT32_EPS) -> float:
    """Return k(δ)/d, the share of its width that a layer uses; all else as `intrinsic_dimensionality`.

    >>> saturation(np.array([8.0, 1.0, 1.0, 0.0]), threshold=0.9)
    0.5
    """
    return intrinsic_dimensionality(eigenvalues, threshold, product_eps) / max(eigenvalues.size, 1)


def log_determinant(eigenvalues: F64, product_eps: float = FLOAT32_EPS) -> float:
    """Return log det Q = Σ log λ, -inf where an eigenvalue is zero or rounding (Wilks, Biometrika 24, 1932).

    >>> round(log_determinant(np.full(512, 0.1)) / 512, 12) == round(math.log(0.1), 12)
    True
    """
    resolved = _resolved(eigenvalues, product_eps)
    return float(np.log(resolved).sum()) if resolved.size == eigenvalues.size else -math.inf


def determinant(eigenvalues: F64, product_eps: float = FLOAT32_EPS) -> float:
    """Return det Q = exp(Σ log λ), silently 0 or inf where float64 ends; all else as `log_determinant`.

    >>> round(determinant(np.full(4, 0.5)), 12), determinant(np.full(512, 0.1))
    (0.0625, 0.0)
    """
    with np.errstate(over="ignore", under="ignore"):
        return float(np.exp(log_determinant(eigenvalues, product_eps)))


def spectral_entropy(eigenvalues: F64) -> float:
    """Return the entropy -Σ p log p of p = λ/Σλ in nats, 0 if Σλ = 0 (Roy & Vetterli, EUSIPCO 2007).

    >>> round(spectral_entropy(np.ones(8)) / math.log(8), 12)
    1.0
    """
    relative = _relative(eigenvalues)
    shares = relative / relative.sum()
    shares = shares[shares > 0.0]
    return max(0.0, -float(shares @ np.log(shares)))  # max: one share of 1 gives -0.0


def effective_rank(eigenvalues: F64) -> float:
    """Return exp(`spectral_entropy`), from 1 to d, 0 if Σλ = 0 (Roy & Vetterli, EUSIPCO 2007).

    >>> round(effective_rank(np.array([3.0, 3.0, 0.0])), 12)
    2.0
    """
    return math.exp(spectral_entropy(eigenvalues)) if eigenvalues.any() else 0.0


def rankme(uncentred: F64, samples: int, floor: float = 0.0) -> float:
    """Return RankMe, exp(-Σ p log p) with p_i = σ_i/Σσ + 1e-7 over i ≤ min(n, d); 0 if Σσ = 0.

    `uncentred` holds the eigenvalues λ of the rows' `second_moment`, descending, so that σ_i = √(n·λ_i) are the
    singular values of the rows as they are; `samples` is n. The paper adds its 1e-7 after dividing, so the p sum to
    a little over 1: rank one gives 1 + 1.5e-6·min(n, d). Eigenvalues up to `floor` count as zero: what rounding
    leaves, say 1e-8·λ1, has the root 1e-4·σ1, and there may be d of it.
    Source: Garrido et al., RankMe, ICML 2023, arXiv 2210.02885.

    >>> round(rankme(np.array([4.0, 4.0, 0.0]), samples=100), 4)
    2.0
    """
    counted = np.where(uncentred > floor, uncentred, 0.0)[: max(int(samples), 0)]
    if not counted.any():
        return 0.0
    singular = np.sqrt(_relative(counted))
    p = singular / singular.sum() + _RANKME_EPS
    return math.exp(-float(p @ np.log(p)))


def participation_ratio(eigenvalues: F64) -> float:
    """Return (Σλ)²/Σλ², from 1 to d, 0 if Σλ = 0 (Gao et al., bioRxiv 214262, 2017).

    >>> participation_ratio(np.array([3.0, 3.0, 0.0]))
    2.0
    """
    relative = _relative(eigenvalues)
    return float(relative.sum() ** 2 / (relative @ relative)) if relative.size else 0.0


def stable_rank(eigenvalues: F64) -> float:
    """Return Σλ/λ1 = ‖A‖_F²/‖A‖₂² of the centred rows A, 0 if Σλ = 0 (Rudelson & Vershynin, J. ACM 54, 2007).

    >>> stable_rank(np.array([4.0, 1.0, 1.0]))
    1.5
    """
    return float(_relative(eigenvalues).sum())


def condition_number(eigenvalues: F64, product_eps: float = FLOAT32_EPS) -> float | None:
    """Return λ1/λd, inf where λd is zero or rounding, None if Σλ = 0 (Golub & Van Loan, Matrix Computations).

    >>> condition_number(np.array([4.0, 2.0])), condition_number(np.array([4.0, 0.0]))
    (2.0, inf)
    """
    if not eigenvalues.any():
        return None
    singular = _resolved(eigenvalues, product_eps).size < eigenvalues.size
    return math.inf if singular else float(eigenvalues[0]) / float(eigenvalues[-1])


@dataclass(frozen=True, slots=True)
class PowerLawFit:
    """λ_i ∝ i^-alpha, fitted over the 1-based ranks first_rank ≤ i ≤ last_rank with coefficient r2."""

    alpha: float
    r2: float
    first_rank: int
    last_rank: int


def power_law_exponent(eigenvalues: F64, product_eps: float = FLOAT32_EPS) -> PowerLawFit | None:
    """Fit λ_i ∝ i^-α by least squares of log λ_i on log i; None with fewer than 5 resolved eigenvalues.

    With r eigenvalues above rounding, the fit takes the ranks from 1 + min(10, r//10), after the few leading
    directions that rarely follow the law, to r//2, as few observations bend the other half first. Where that
    makes fewer than ten points it takes ten, or all there are; it never goes beyond rank 500. A flat spectrum
    gives α = 0, r² = 1. Source: Stringer et al., Nature 571 (2019); Agrawal et al., α-ReQ, NeurIPS 2022.

    >>> fit = power_law_exponent(np.arange(1, 101) ** -1.5)
    >>> round(fit.alpha, 9), round(fit.r2, 9), fit.first_rank, fit.last_rank
    (1.5, 1.0, 11, 50)
    """
    resolved = _resolved(eigenvalues, product_eps)
    if (rank := resolved.size) < _MIN_FIT_POINTS:
        return None
    first = 1 + min(10, rank // 10)
    last = min(_MAX_FIT_RANK, rank, max(rank // 2, first + _PREFERRED_FIT_POINTS - 1))
    x = np.log(np.arange(first, last + 1))
    y = np.log(resolved[first - 1 : last])
    x, y = x - x.mean(), y - y.mean()
    xx, xy, yy = float(x @ x), float(x @ y), float(y @ y)
    flat = yy <= y.size * _FLAT_LOG_SPREAD**2
    return PowerLawFit(0.0 if flat else -xy / xx, 1.0 if flat else min(1.0, xy * xy / (xx * yy)), first, last)


@lru_cache(maxsize=4096)  # one ratio per layer and window; windows of equal length repeat it
def marchenko_pastur_median(ratio: float) -> float:
    """Return the median of the Marchenko-Pastur law of unit variance with 0 < `ratio` = γ ≤ 1.

    With x = 1+γ+2√γ·cosθ the law has the smooth density (2/π)·sin²θ/(1+γ+2√γ·cosθ) on [0, π]; Newton's
    method finds the θ that halves it. Raises ValueError for other ratios. Source: Marchenko & Pastur 1967;
    Gavish & Donoho, IEEE Transactions on Information Theory 60 (2014).

    >>> round(marchenko_pastur_median(1.0), 4)
    0.6528
    """
    if not 0.0 < ratio <= 1.0:
        raise ValueError(f"the ratio of a Marchenko-Pastur law lies here in (0, 1], got {ratio}")
    centre, radius = 1.0 + ratio, 2.0 * math.sqrt(ratio)
    theta = math.pi / 2  # never past the median; from here five steps reach float64's precision
    for _ in range(8):
        angles = theta / 2 * (_NODES + 1)
        above = theta / math.pi * float(_WEIGHTS @ (np.sin(angles) ** 2 / (centre + radius * np.cos(angles))))
        density = 2 / math.pi * math.sin(theta) ** 2 / (centre + radius * math.cos(theta))
        theta -= (above - 0.5) / density
    return centre + radius * math.cos(theta)


def noise_edge(eigenvalues: F64, samples: int, product_eps: float = FLOAT32_EPS) -> float:
    """Return the edge σ²(1+√γ)² that eigenvalues of pure noise stay under, γ = d/m, m = n - 1; 0 if Σλ = 0.

    In the unit of the eigenvalues. `samples` is n; centring takes one degree of freedom. Noise of covariance σ²·I
    makes p = min(d, m) non-zero eigenvalues, which up to one factor follow the Marchenko-Pastur law of ratio
    β = p/max(d, m), for d ≤ m and d > m alike. With μ its median, the edge is (1+√β)²/μ times the median of the
    leading p eigenvalues. Those that are rounding count as zero, and where more than half of the p are, so is the
    edge. Source: Gavish & Donoho, IEEE Transactions on Information Theory 60 (2014).

    >>> round(noise_edge(np.array([30.0, 1.1, 1.05, 1.0, 0.95, 0.9]), samples=1000), 4)
    1.1924
    """
    relative = _relative(eigenvalues)  # a new array: rounding can be zeroed in it
    if not relative.size:
        return 0.0
    relative[_resolved(eigenvalues, product_eps).size :] = 0.0
    noisy, larger = sorted((eigenvalues.size, max(int(samples) - 1, 1)))
    ratio = noisy / larger
    edge_over_median = (1 + math.sqrt(ratio)) ** 2 / marchenko_pastur_median(ratio)
    return float(np.median(relative[:noisy])) * edge_over_median * float(eigenvalues[0])


def noise_rank(eigenvalues: F64, samples: int, product_eps: float = FLOAT32_EPS) -> int:
    """Return how many eigenvalues stand above the `noise_edge`, those that are rounding left out.

    Pure noise gives 0, now and then 1, as the largest fluctuates about the edge; 0 if Σλ = 0.

    >>> noise_rank(np.array([30.0, 1.1, 1.05, 1.0, 0.95, 0.9]), samples=1000)
    1
    """
    relative = _relative(eigenvalues)
    edge = noise_edge(relative, samples, product_eps)
    return int(np.count_nonzero(_resolved(relative, product_eps) > edge))


@dataclass(frozen=True, slots=True)
class Statistics:
    """The statistics asked for and defined, under their long names in the contract's order.

    In `values`, intrinsic dimensionalities are ints. `intrinsic_dimensionalities` has k(δ) of each of several
    thresholds; the other fields belong to `alpha`, None without it.
    """

    values: dict[str, float]
    alpha_r2: float | None = None
    alpha_from: int | None = None
    alpha_to: int | None = None
    intrinsic_dimensionalities: tuple[int, ...] = ()


def statistics(
    eigenvalues: F64,
    *,
    trace: float,
    samples: int,
    threshold: float,
    thresholds: Sequence[float] = (),
    stats: Sequence[str] | str | None = SCALAR_STATS,
    product_eps: float = FLOAT32_EPS,
    covariance: F64 | None = None,
    mean: F64 | None = None,
) -> Statistics:
    """Compute the statistics asked for from one spectrum, and `schema.EXTRA_STATS` from that of another matrix.

    `trace` is the sum of Q's diagonal, `diagonal_trace` that of the clipped eigenvalues; `samples` is n; `stats`
    goes through `resolve_stats`. Saturation and intrinsic dimensionality are always there; "cov" and "embed" add none.
    `covariance` is Q (its upper triangle is enough) and `mean` the mean row: `EXTRA_STATS` need them, and one
    decomposition for RankMe, one for all that is of the correlation. Raises OptionError for a bad threshold or
    name, ValueError where they are needed and not given.

    >>> statistics(np.array([8.0, 1.0, 1.0]), trace=10.0, samples=100, threshold=0.9, stats=["trc"]).values
    {'saturation': 0.6666666666666666, 'intrinsic_dimensionality': 2, 'trace': 10.0}
    """
    asked = {*ALWAYS, *resolve_stats(stats)}
    fit = power_law_exponent(eigenvalues, product_eps) if "alpha" in asked else None
    values = _own_statistics(eigenvalues, asked, fit, trace, samples, threshold, product_eps)
    if extra := [name for name in EXTRA_STATS if name in asked]:
        if covariance is None or mean is None:
            raise ValueError(f"stats {', '.join(extra)} need the covariance and the mean")
        of_others = _statistics_of_others(eigenvalues, asked, covariance, mean, samples, threshold, product_eps)
        values |= {name: of_others[name] for name in extra}
    dimensions = tuple(intrinsic_dimensionality(eigenvalues, delta, product_eps) for delta in thresholds)
    if fit is None:
        return Statistics(values, intrinsic_dimensionalities=dimensions)
    return Statistics(values, fit.r2, fit.first_rank, fit.last_rank, dimensions)


def _own_statistics(
    eigenvalues: F64,
    asked: Container[str],
    fit: PowerLawFit | None,
    trace: float,
    samples: int,
    threshold: float,
    product_eps: float,
) -> dict[str, float]:
    """Those of `SCALAR_STATS` that are asked for and defined, in that order."""
    by_name: dict[str, Callable[[], float | None]] = {
        "saturation": lambda: saturation(eigenvalues, threshold, product_eps),
        "intrinsic_dimensionality": lambda: intrinsic_dimensionality(eigenvalues, threshold, product_eps),
        "trace": lambda: float(trace),
        "diagonal_trace": lambda: float(eigenvalues.sum()),
        "determinant": lambda: determinant(eigenvalues, product_eps),
        "log_determinant": lambda: log_determinant(eigenvalues, product_eps),
        "effective_rank": lambda: effective_rank(eigenvalues),
        "participation_ratio": lambda: participation_ratio(eigenvalues),
        "stable_rank": lambda: stable_rank(eigenvalues),
        "spectral_entropy": lambda: spectral_entropy(eigenvalues),
        "condition_number": lambda: condition_number(eigenvalues, product_eps),
        "alpha": lambda: fit.alpha if fit else None,
        "noise_rank": lambda: float(noise_rank(eigenvalues, samples, product_eps)),
    }
    with np.errstate(over="ignore"):  # a sum beyond float64 is inf, and says so by itself
        return {name: value for name in SCALAR_STATS if name in asked and (value := by_name[name]()) is not None}


def _statistics_of_others(
    own: F64, asked: Container[str], covariance: F64, mean: F64, samples: int, threshold: float, product_eps: float
) -> dict[str, float]:
    """`EXTRA_STATS` of those matrices, other than Q, that one of them is asked of: a decomposition each.

    `own` are the eigenvalues of Q. A feature that the correlation leaves out still counts in the width d. In RankMe
    two roundings count, that of the products in Q and that of float64 in Q + z̄ ⊗ z̄; the mean is exact.
    """
    values: dict[str, float] = {}
    if any(name in asked for name in CORRELATION_STATS):
        correlated = eigenvalues(correlation(covariance, mean, product_eps))
        dimension = intrinsic_dimensionality(correlated, threshold, product_eps)
        values["correlation_saturation"] = dimension / max(own.size, 1)
        values["correlation_intrinsic_dimensionality"] = dimension
        values["correlation_effective_rank"] = effective_rank(correlated)
    if "rankme" in asked:
        uncentred = eigenvalues(second_moment(covariance, mean))
        floor = max(rounding_reach(own, product_eps), rounding_reach(uncentred, _FLOAT64_EPS))
        values["rankme"] = rankme(uncentred, samples, floor)
    return values
