"""What a sketch says of a spectrum: the Nyström approximation, and bounds that hold whatever the spectrum is.

Of the covariance Q = S/w there are Y = Q·Ω (see `sketch`) and its trace T. The Nyström approximation
Q̂ = Y(ΩᵀY)⁺Yᵀ never exceeds Q: Q − Q̂ is positive semidefinite, and its trace is R = T − Σλ̂, the variance that the
sketch has not seen. So, for every i and r,

    λ̂_i ≤ λ_i ≤ λ̂_i + R        Σ_{i≤r} λ̂_i ≤ Σ_{i≤r} λ_i ≤ min(T, Σ_{i≤r} λ̂_i + R)

where λ̂_i is 0 beyond the head. These are theorems, not estimates: nothing in them is random but how small R is.
Source: Tropp, Yurtsever, Udell, Cevher, "Fixed-rank approximation of a positive-semidefinite matrix from streaming
data", NeurIPS 2017, which also has the shift ν that keeps rounding from spoiling the inverse.

All is computed from k×k matrices: BLAS passes over Y once, in blocks of rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from delve_ray.moments import F64
from delve_ray.schema import ALWAYS
from delve_ray.sketch import omega, split
from delve_ray.spectrum import FLOAT32_EPS, check_threshold, resolve_stats

_ROWS = 1024
"""Rows of Y and of Ω that are in memory beside the sketch."""
_SHIFT = 8.0
"""ν in ε·‖Y‖: above what rounding does to ΩᵀY, as measured with float32 products."""
_LEAST_EPS = 2.0**-27
"""YᵀY in float64 has the squares of Y's singular values, and so half of its digits."""
_SHARE_TOLERANCE = 1e-12  # as in `spectrum`
_AGREEMENT = 0.01
"""Relative distance of two bounds up to which their middle is published."""


@dataclass(frozen=True, slots=True)
class Head:
    """The head of a spectrum and what is known of the rest.

    Attributes:
        eigenvalues: λ̂_1 ≥ … > 0, float64, at most k of them; those that are rounding are left out.
        trace: T, exact.
        unseen: R = T − Σλ̂, which bounds how far each λ_i lies above its λ̂_i.
        rank: most eigenvalues that can be above 0: min(d, n − 1).
        vectors: (d, 2), the two leading eigenvectors of the approximation; None where they are not asked for.
    """

    eigenvalues: F64
    trace: float
    unseen: float
    rank: int
    vectors: F64 | None = None

    def dimensionality(self, threshold: float) -> tuple[int, int, bool]:
        """The smallest and the largest k(δ) that the bounds allow, and whether the head reaches the share δ.

        k_lo is the first k with Σ_{i≤k}λ̂_i + R ≥ δT. As eigenvalues descend, what is left after the first b is spread
        over the others no worse than evenly: Σ_{i≤r}λ_i ≥ Σ_{i≤b}λ̂_i + (T − Σ_{i≤b}λ̂_i)·(r − b)/(rank − b). k_hi is
        the first r at which that, for some b, or Σ_{i≤r}λ̂_i alone is δT.

        >>> Head(np.array([8.0, 1.0]), 10.0, 1.0, 100).dimensionality(0.9)
        (1, 2, True)
        >>> Head(np.array([8.0, 1.0]), 10.0, 1.0, 100).dimensionality(0.99)
        (2, 91, False)
        """
        wanted = (check_threshold(threshold) - _SHARE_TOLERANCE) * self.trace
        if self.trace <= 0.0:
            return 0, 0, True
        sums = np.concatenate([[0.0], np.cumsum(self.eigenvalues)])
        low = max(1, int(np.searchsorted(sums + self.unseen, wanted)))
        reached = int(np.searchsorted(sums, wanted))
        if reached < sums.size:
            return low, max(low, reached), True
        before = np.arange(sums.size)
        spread = before + np.ceil((wanted - sums) * np.maximum(self.rank - before, 0) / (self.trace - sums))
        high = min(self.rank, int(spread.min()))
        return min(low, high), high, False


def head_bytes(columns: int) -> int:
    """Bytes that `head` takes at most beside the sketch."""
    return 8 * (12 * columns**2 + 4 * _ROWS * columns)


def head(
    packed: F64,
    features: int,
    weight: float,
    product_eps: float = FLOAT32_EPS,
    samples: int | None = None,
    *,
    with_vectors: bool = False,
) -> Head:
    """The head of the spectrum of a packed sketch over `weight`.

    `product_eps` is ε of the products that it was summed from, `samples` the number n of observations.
    """
    diagonal, sketch = split(packed, features)
    rank = features if samples is None else min(features, max(samples - 1, 0))
    trace = float((diagonal / (weight or 1.0)).sum())
    if not trace > 0.0:
        return Head(np.empty(0), trace, max(trace, 0.0), rank)
    # In units of the trace, so that no square leaves float64.
    unit = trace * (weight or 1.0)
    test = omega(features, sketch.shape[1])
    squares, product = np.zeros((test.size, test.size)), np.zeros((test.size, test.size))
    for first in range(0, features, _ROWS):
        rows = sketch[first : first + _ROWS] / unit
        squares += rows.T @ rows
        product += test.dense(first, first + len(rows)).T @ rows
    product = (product + product.T) / 2
    shift = _SHIFT * max(product_eps, _LEAST_EPS) * math.sqrt(float(np.linalg.norm(squares)))
    gram = test.gram()
    squares += shift * (2 * product + shift * gram)
    product += shift * gram
    # ΩᵀY⁻½ by eigenvectors: where Ω itself lacks rank, what is left of it makes an approximation just as valid.
    values, vectors = np.linalg.eigh(product)
    kept = values > test.size * np.finfo(np.float64).eps * values[-1]
    root = vectors[:, kept] / np.sqrt(values[kept])
    whitened = root.T @ squares @ root
    whitened = (whitened + whitened.T) / 2
    if with_vectors:
        shifted, rotation = np.linalg.eigh(whitened)
        leading = root @ (rotation[:, ::-1][:, :2] / np.sqrt(np.maximum(shifted[::-1][:2], np.finfo(np.float64).tiny)))
    else:
        shifted = np.linalg.eigvalsh(whitened)
    found = shifted[::-1] - shift
    found = found[found > shift][:rank]  # below, rounding decides
    return Head(
        found * trace,
        trace,
        trace * max(0.0, 1.0 - float(found.sum())),
        rank,
        _vectors(sketch / unit, shift, leading, features) if with_vectors else None,
    )


def _vectors(sketch: F64, shift: float, leading: F64, features: int) -> F64:
    """(Y + νΩ)·`leading`, whose columns are of length 1."""
    vectors = sketch @ leading
    test = omega(features, sketch.shape[1])
    for first in range(0, features, _ROWS):
        vectors[first : first + _ROWS] += shift * (test.dense(first, min(first + _ROWS, features)) @ leading)
    return vectors


@dataclass(frozen=True, slots=True)
class HeadStatistics:
    """What a row has of a sketched layer: `values` by long names, and the interval of the saturation.

    In `values` are those statistics that the bounds leave no doubt of. `dimensions` has the largest k(δ) of each of
    several thresholds.
    """

    values: dict[str, float]
    saturation_low: float
    saturation_high: float
    dimensions: tuple[int, ...] = ()


def head_statistics(
    found: Head,
    features: int,
    threshold: float,
    thresholds: Sequence[float] = (),
    stats: Sequence[str] | str | None = None,
) -> HeadStatistics:
    """The statistics that a head supports, of those asked for.

    `saturation` and `intrinsic_dimensionality` are the upper ends of their intervals, and there where the head itself
    explains the share δ. `trace` and `diagonal_trace` are exact. `stable_rank` and `participation_ratio` are the middle
    of their bounds where these agree to 1 %: T/λ1, and T²/Σλ², where Σλ² lies between Σλ̂² + R²/rank and the same with
    all of R in λ1.

    >>> found = Head(np.array([8.0, 1.9]), 10.0, 0.1, 10)
    >>> sorted(head_statistics(found, 10, 0.9).values)
    ['diagonal_trace', 'intrinsic_dimensionality', 'saturation', 'trace']
    """
    asked = {*ALWAYS, *resolve_stats(stats)}
    low, high, reached = found.dimensionality(threshold)
    values: dict[str, float] = {}
    if reached:
        values |= {"saturation": high / max(features, 1), "intrinsic_dimensionality": high}
    values |= {"trace": found.trace, "diagonal_trace": found.trace}
    if found.eigenvalues.size:
        shares, rest = found.eigenvalues / found.trace, found.unseen / found.trace
        largest = min(1.0, float(shares[0]) + rest)
        values |= _agreed("stable_rank", 1 / largest, 1 / float(shares[0]))
        squares = float(shares @ shares)
        most = squares - float(shares[0]) ** 2 + largest**2
        values |= _agreed("participation_ratio", 1 / most, 1 / (squares + rest**2 / max(found.rank, 1)))
    return HeadStatistics(
        {name: value for name, value in values.items() if name in asked},
        low / max(features, 1),
        high / max(features, 1),
        tuple(found.dimensionality(delta)[1] for delta in thresholds),
    )


def _agreed(name: str, low: float, high: float) -> dict[str, float]:
    """A statistic between two bounds, if they agree."""
    return {name: (low + high) / 2} if high - low <= _AGREEMENT * low else {}
