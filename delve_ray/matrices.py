"""The symmetric matrices whose spectra are published, made from a covariance and a mean, and their eigenvalues.

All are (d, d) float64 in row-major order, and of all only the upper triangle is read; of those returned only it is
right. Q is the population covariance, z̄ the mean row.
"""

from __future__ import annotations

import numpy as np

from delve_ray.schema import F64

FLOAT32_EPS = float(np.finfo(np.float32).eps)
_CONSTANT = 8.0
"""In ε·|mean|: a spread up to this may be the rounding of a constant feature, as it is where rows are accumulated."""
_NO_SQUARE = 2.0**-50
"""In root mean squares of the layer's largest feature: float32 ends at 2^-126, so what is 2^-63 of the values that
products are scaled by has no square in it; the rest is room for values far above their root mean square."""


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


def correlation(covariance: F64, mean: F64, product_eps: float = FLOAT32_EPS) -> F64:
    """Return the correlation matrix D^-½·Q·D^-½, D = diag(Q), of the v ≤ d features that vary, (v, v).

    A feature whose standard deviation is rounding is left out, because dividing by it would make noise a feature
    like any other: one of at most 8·ε times its own mean, ε being `product_eps`, the machine epsilon of the products
    zᵀz; and one of at most 2^-50 (1e-15) of the layer's largest root mean square, where float32 products run out of
    squares. Short of that nothing is compared with the variance of other features: the rounding of an entry of Q is
    relative to the spreads of its own two features, so that a small one is as well resolved as a large one.

    >>> covariance = np.array([[4.0, 1.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1e-20]])
    >>> np.triu(correlation(covariance, mean=np.ones(3))).tolist()
    [[1.0, 0.5], [0.0, 1.0]]
    """
    spread, offset = np.sqrt(np.maximum(np.diagonal(covariance), 0.0)), np.abs(mean)
    largest = float(np.hypot(spread, offset).max(initial=0.0))
    vanishing = _NO_SQUARE * largest if product_eps >= FLOAT32_EPS else 0.0
    varies = np.flatnonzero(spread > np.maximum(_CONSTANT * product_eps * offset, vanishing))
    scaled: F64 = covariance[np.ix_(varies, varies)]  # a copy
    scaled /= spread[varies, None]
    scaled /= spread[varies]
    return scaled


def second_moment(covariance: F64, mean: F64) -> F64:
    """Return (Σ zᵀz)/n = Q + z̄ ⊗ z̄, the second moment of the rows as they are, uncentred.

    >>> second_moment(np.array([[1.0, 0.5], [0.5, 2.0]]), np.array([3.0, 0.0])).tolist()
    [[10.0, 0.5], [0.5, 2.0]]
    """
    moment: F64 = np.outer(mean, mean)
    moment += covariance
    return moment
