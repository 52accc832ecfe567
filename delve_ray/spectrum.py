"""From a covariance to its eigenvalues, and from them to every published statistic: pure functions.

Throughout, `eigenvalues` is the float64 array λ1 ≥ … ≥ λd ≥ 0 of shape (d,) that the function `eigenvalues`
returns, in squared units of the layer's output; it is not checked again and never changed. Ratios are taken
from λ/λ1, so that no scale that float64 can hold over- or underflows on the way.

Eigenvalues under `rounding_floor`, the rounding of the products that Q was summed from, count as zero where
noise would look like signal (determinants, condition number, power law, noise rank); sums keep them.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from delve_ray.errors import OptionError
from delve_ray.schema import ALWAYS, F64, SCALAR_STATS

FLOAT32_EPS = float(np.finfo(np.float32).eps)
COVARIANCE_STAT = "cov"  # the one statistic that is no scalar: the covariance itself is written
_SHARE_TOLERANCE = 1e-12  # a cumulative share this far under δ has reached it: the rounding of a sum of d terms
_MIN_FIT_POINTS, _PREFERRED_FIT_POINTS, _MAX_FIT_RANK = 5, 10, 500
_FLAT_LOG_SPREAD = 1e-12  # logarithms that spread less than this differ by rounding alone
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(40)  # for a smooth integrand: exact to float64
_CANONICAL = (*SCALAR_STATS, COVARIANCE_STAT)
_ALIASES = {
    "lsat": "saturation",
    "idim": "intrinsic_dimensionality",
    "trc": "trace",
    "dtrc": "diagonal_trace",
    "det": "determinant",
    "covariance": COVARIANCE_STAT,
}


def check_threshold(value: object) -> float:
    """Return the option `sat_threshold` as a float, or raise OptionError if it is not a number in (0, 1].

    >>> check_threshold(0.99)
    0.99
    """
    rule = "it is the share of variance to explain, a number in (0, 1] such as 0.99"
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise OptionError(f"sat_threshold={value!r} is of type {type(value).__name__}; {rule}")
    if not 0 < value <= 1:
        hint = f"; for {value} percent write {value / 100:g}" if 1 < value <= 100 else ""
        raise OptionError(f"sat_threshold={value} is out of range; {rule}{hint}")
    return float(value)


def resolve_stats(stats: Sequence[str] | str | None) -> tuple[str, ...]:
    """Return the canonical names of the statistics asked for, in the order of the contract, each once.

    Takes long names, Delve's short ones (lsat, idim, cov, det, trc, dtrc) and "covariance"; a bare string is
    one name, None every scalar. Raises OptionError for others, NotImplementedError for Delve's "embed".

    >>> resolve_stats(["cov", "trc", "lsat", "saturation"])
    ('saturation', 'trace', 'cov')
    """
    if stats is None:
        return SCALAR_STATS
    if not isinstance(stats, (str, Sequence, set, frozenset)):
        raise OptionError(f"stats={stats!r} is of type {type(stats).__name__}; it is a list of names or None")
    known, asked = (*_CANONICAL, *_ALIASES), set()
    for name in [stats] if isinstance(stats, str) else stats:
        if name == "embed":
            raise NotImplementedError('stats: "embed" (saving layer outputs) is not implemented; leave it out')
        if name not in known:
            close = difflib.get_close_matches(str(name).lower(), known, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise OptionError(f"stats: unknown name {name!r}; {hint}Valid names: {', '.join(known)}")
        asked.add(_ALIASES.get(name, name))
    return tuple(name for name in _CANONICAL if name in asked)


def eigenvalues(covariance: F64) -> F64:
    """Return the eigenvalues of a covariance, descending, with negatives from rounding clipped to 0.

    `covariance` is (d, d), row-major, and is computed with in float64; only its upper triangle is read. The
    result is (d,) float64. Raises ValueError for a matrix that is not square, or not finite. Entries may lie
    anywhere in float64's range: LAPACK's symmetric driver (dsyevd) scales into a safe range by itself.

    >>> eigenvalues(np.array([[2.0, 1.0], [0.0, 2.0]])).round(12).tolist()
    [3.0, 1.0]
    """
    matrix = np.asarray(covariance, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"a covariance is a square matrix, got shape {matrix.shape}")
    try:
        descending: F64 = np.linalg.eigvalsh(matrix, UPLO="U")[::-1].astype(np.float64, copy=False)
    except np.linalg.LinAlgError:  # what LAPACK makes of NaN and inf from d = 3 on; smaller ones give NaN
        descending = np.full(1, np.nan)
    if not np.isfinite(descending).all():
        raise ValueError(f"no finite eigenvalues: the {matrix.shape} covariance holds NaN or inf, or overflows")
    return np.maximum(descending, 0.0)


def rounding_floor(eigenvalues: F64, product_eps: float = FLOAT32_EPS) -> float:
    """Return d·ε·λ1, under which an eigenvalue counts as rounding.

    `product_eps` is ε, the machine epsilon of the precision in which the products zᵀz were formed.

    >>> rounding_floor(np.array([4.0, 1.0]), product_eps=0.001)
    0.008
    """
    return eigenvalues.size * float(product_eps) * float(eigenvalues.max(initial=0.0))


def _resolved(eigenvalues: F64, product_eps: float) -> F64:
    """Return the leading eigenvalues that are neither zero nor rounding."""
    floor = rounding_floor(eigenvalues, product_eps)
    return eigenvalues[: np.count_nonzero((eigenvalues > 0.0) & (eigenvalues >= floor))]


def _relative(eigenvalues: F64) -> F64:
    """Return λ/λ1, empty for a spectrum of zeros."""
    return eigenvalues / eigenvalues[0] if eigenvalues.any() else eigenvalues[:0]


def intrinsic_dimensionality(eigenvalues: F64, threshold: float = 0.99) -> int:
    """Return k(δ), the number of leading eigenvalues that explain the share δ = `threshold` of the variance.

    The smallest k with (λ1+…+λk)/Σλ ≥ δ - 1e-12; 0 if Σλ = 0. Raises OptionError for δ outside (0, 1].
    Source: Shenk et al., Feature Space Saturation during Training, arXiv 2006.08679.

    >>> intrinsic_dimensionality(np.array([8.0, 1.0, 1.0]), threshold=0.9)
    2
    """
    share = check_threshold(threshold) - _SHARE_TOLERANCE
    cumulative = np.cumsum(_relative(eigenvalues))
    return 1 + int(np.searchsorted(cumulative / cumulative[-1], share)) if cumulative.size else 0


def saturation(eigenvalues: F64, threshold: float = 0.99) -> float:
    """Return k(δ)/d, the share of its width that a layer uses; all else as `intrinsic_dimensionality`.

    >>> saturation(np.array([8.0, 1.0, 1.0, 0.0]), threshold=0.9)
    0.5
    """
    return intrinsic_dimensionality(eigenvalues, threshold) / max(eigenvalues.size, 1)


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


def noise_rank(eigenvalues: F64, samples: int, product_eps: float = FLOAT32_EPS) -> int:
    """Return how many eigenvalues stand above the edge σ²(1+√γ)² of pure noise, γ = d/m, m = n - 1.

    `samples` is n; centring takes one degree of freedom. Noise of covariance σ²·I makes p = min(d, m) non-zero
    eigenvalues, which up to one factor follow the Marchenko-Pastur law of ratio β = p/max(d, m), for d ≤ m
    and d > m alike. With μ its median, the edge is (1+√β)²/μ times the median of the leading p eigenvalues.
    Those that are rounding count as zero. Pure noise gives 0, now and then 1, as the largest fluctuates about
    the edge; 0 if Σλ = 0. Source: Gavish & Donoho, IEEE Transactions on Information Theory 60 (2014).

    >>> noise_rank(np.array([30.0, 1.1, 1.05, 1.0, 0.95, 0.9]), samples=1000)
    1
    """
    relative = _relative(eigenvalues)  # a new array: rounding can be zeroed in it
    if not relative.size:
        return 0
    relative[_resolved(eigenvalues, product_eps).size :] = 0.0
    noisy, larger = sorted((eigenvalues.size, max(int(samples) - 1, 1)))
    ratio = noisy / larger
    edge_over_median = (1 + math.sqrt(ratio)) ** 2 / marchenko_pastur_median(ratio)
    return int(np.count_nonzero(relative > np.median(relative[:noisy]) * edge_over_median))


@dataclass(frozen=True, slots=True)
class Statistics:
    """The statistics asked for and defined, under their long names in the contract's order.

    In `values`, `intrinsic_dimensionality` is an int. The other fields belong to `alpha`, None without it.
    """

    values: dict[str, float]
    alpha_r2: float | None = None
    alpha_from: int | None = None
    alpha_to: int | None = None


def statistics(
    eigenvalues: F64,
    *,
    trace: float,
    samples: int,
    threshold: float,
    stats: Sequence[str] | str | None = SCALAR_STATS,
    product_eps: float = FLOAT32_EPS,
) -> Statistics:
    """Compute the statistics asked for from one spectrum.

    `trace` is the sum of Q's diagonal, `diagonal_trace` that of the clipped eigenvalues; `samples` is n; `stats`
    goes through `resolve_stats`. Saturation and intrinsic dimensionality are always there, "cov" adds no value.
    Raises OptionError for a bad threshold or name.

    >>> statistics(np.array([8.0, 1.0, 1.0]), trace=10.0, samples=100, threshold=0.9, stats=["trc"]).values
    {'saturation': 0.6666666666666666, 'intrinsic_dimensionality': 2, 'trace': 10.0}
    """
    asked = {*ALWAYS, *resolve_stats(stats)}
    fit = power_law_exponent(eigenvalues, product_eps) if "alpha" in asked else None
    by_name: dict[str, Callable[[], float | None]] = {
        "saturation": lambda: saturation(eigenvalues, threshold),
        "intrinsic_dimensionality": lambda: intrinsic_dimensionality(eigenvalues, threshold),
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
        values = {name: value for name in SCALAR_STATS if name in asked and (value := by_name[name]()) is not None}
    return Statistics(values, *((fit.r2, fit.first_rank, fit.last_rank) if fit else ()))
