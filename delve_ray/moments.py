"""Moments: count, mean and scatter of observations, which merge exactly.

The algebra is the one thing that the whole system rests on. For two disjoint sets a and b of rows

    n = n_a + n_b,   δ = mean_b − mean_a
    mean    = mean_a + δ·n_b/n
    scatter = scatter_a + scatter_b + (n_a·n_b/n)·δδᵀ

(Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979),
so any split of the rows over batches, workers and flushes gives the same covariance. Everything here is
float64 on the host, numpy only; the accumulation on a device is in `accumulator`.

Where observations are weighted, Σw takes the place of n in all of this: mean = Σwz/Σw, scatter = Σw(z−mean)ᵀ(z−mean).

A scatter is symmetric, so it travels and is stored as its packed upper triangle: row-major, d(d+1)/2 values,
`[s00, s01, … s0d, s11, … s1d, …]`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

F64 = npt.NDArray[np.float64]

_TRIANGLE_ROWS = 128
"""Rows of a triangle that are packed at a time: bounds the boolean mask to 128·d bytes."""
_PRODUCT = 1 << 18
"""Multiplications of one call of BLAS, about: from there on OpenBLAS shares a product out among threads of its own, and
waits for whichever of them gets no core. That made the fold of one layer of 256 features take 20 ms beside a busy
process, not 0.1; and small products stay in the cache."""
_FOLD_ROWS = 64
"""Rows of a triangle that a fold adds to at a time."""
MAX_PENDING = 32
"""Group means that a `PackedTotal` keeps before it folds them into the triangle with one matrix product."""


def triangle_size(features: int) -> int:
    """Length of the packed upper triangle of a d×d matrix, d(d+1)/2.

    >>> triangle_size(3)
    6
    """
    return features * (features + 1) // 2


@lru_cache(maxsize=64)
def _upper_mask(rows: int, columns: int) -> npt.NDArray[np.bool_]:
    """Mask of shape (rows, columns) that selects the upper triangle of its first `rows` columns and all others."""
    mask = ~np.tri(rows, columns, k=-1, dtype=np.bool_)
    mask.flags.writeable = False
    return mask


def row_blocks(features: int, height: int) -> Iterator[tuple[int, int, slice]]:
    """Blocks of consecutive rows of an upper triangle.

    Yields (first row, number of rows, slice of the packed triangle); a block is the dense matrix of these
    rows from column `first row` on, whose lower left corner is not part of the triangle.

    >>> list(row_blocks(5, 2))
    [(0, 2, slice(0, 9, None)), (2, 2, slice(9, 14, None)), (4, 1, slice(14, 15, None))]
    """
    start = 0
    for first in range(0, features, height):
        rows = min(height, features - first)
        stop = start + triangle_size(rows) + rows * (features - first - rows)
        yield first, rows, slice(start, stop)
        start = stop


def pack_block(block: F64, out: F64) -> None:
    """Copy the upper triangle part of a row block, shape (rows, columns), into `out`.

    One numpy call that releases the GIL: a loop over rows would hold up the training thread.
    """
    np.compress(_upper_mask(*block.shape).reshape(-1), block.reshape(-1), out=out)


def add_block(packed: F64, block: F64) -> None:
    """Add the upper triangle part of a row block to its slice of a packed triangle, in place."""
    packed += block[_upper_mask(*block.shape)]


def pack_triangle(matrix: F64) -> F64:
    """Packed upper triangle of a square matrix, float64, row-major; the lower triangle is not read.

    >>> pack_triangle(np.array([[1.0, 2.0], [9.0, 3.0]]))
    array([1., 2., 3.])
    """
    features = _square(matrix)
    packed = np.empty(triangle_size(features))
    for first, rows, part in row_blocks(features, _TRIANGLE_ROWS):
        pack_block(np.ascontiguousarray(matrix[first : first + rows, first:], dtype=np.float64), packed[part])
    return packed


def unpack_triangle(
    packed: npt.ArrayLike, features: int, *, symmetric: bool = True, divisor: float | None = None
) -> F64:
    """The d×d matrix of a packed upper triangle, float64, over `divisor` if there is one.

    With `symmetric=False` the lower triangle is zero, which is enough for a decomposition of the upper one.
    Raises ValueError when the length is not d(d+1)/2.

    >>> unpack_triangle([1.0, 2.0, 3.0], 2)
    array([[1., 2.],
           [2., 3.]])
    """
    values = np.asarray(packed, dtype=np.float64)
    if values.shape != (triangle_size(features),):
        raise ValueError(
            f"a packed triangle of {features} features has shape ({triangle_size(features)},), not {values.shape}"
        )
    matrix = np.zeros((features, features))
    for first, rows, part in row_blocks(features, _TRIANGLE_ROWS):
        block = matrix[first : first + rows, first:]
        # Divided while it lies in the cache, and without a quotient of the whole.
        block[_upper_mask(*block.shape)] = values[part] if divisor is None else values[part] / divisor
    if symmetric:
        for first, rows, _ in row_blocks(features, _TRIANGLE_ROWS):
            last = first + rows
            corner = matrix[first:last, first:last]
            corner += np.triu(corner, 1).T
            matrix[last:, first:last] = matrix[first:last, last:].T
    return matrix


def packed_diagonal(packed: F64, features: int) -> F64:
    """Copy of the diagonal of a packed triangle, shape (d,)."""
    return packed[diagonal_places(features)]


def diagonal_places(features: int) -> npt.NDArray[np.intp]:
    """Indices of the diagonal in a packed triangle, shape (d,).

    >>> diagonal_places(4).tolist()
    [0, 4, 7, 9]
    """
    row = np.arange(features, dtype=np.intp)
    return row * features - row * (row - 1) // 2


def _square(matrix: F64) -> int:
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"a scatter is a square matrix, not one of shape {matrix.shape}")
    return int(matrix.shape[0])


def _rows_float64(rows: npt.ArrayLike | torch.Tensor) -> F64:
    """Rows of any float dtype, numpy or torch, on any device, as a float64 array of shape (n, d)."""
    values: Any = rows
    if hasattr(values, "detach"):  # a torch tensor; numpy knows no bfloat16, so torch does the cast
        values = values.detach().double().cpu().numpy()
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 2:
        raise ValueError(f"rows have shape (observations, features), not {array.shape}")
    return array


@dataclass(frozen=True, slots=True)
class Moments:
    """Count, mean and scatter of n observations of d features.

    Attributes:
        n: number of observations.
        mean: float64, shape (d,); zeros when n is 0.
        scatter: Σ(z − mean)ᵀ(z − mean), float64, shape (d, d), symmetric.

    Raises:
        ValueError: the shapes do not belong together, or n is negative.

    Example:
        >>> left = Moments.from_rows(np.array([[0.0, 0.0], [2.0, 0.0]]))
        >>> right = Moments.from_rows(np.array([[1.0, 3.0]]))
        >>> both = left.merge(right)
        >>> both.n, both.mean
        (3, array([1., 1.]))
        >>> both.covariance()
        array([[0.66666667, 0.        ],
               [0.        , 2.        ]])
    """

    n: int
    mean: F64
    scatter: F64

    def __post_init__(self) -> None:
        features = _square(self.scatter)
        if self.mean.shape != (features,):
            raise ValueError(f"mean has shape {self.mean.shape} but scatter {self.scatter.shape}")
        if self.n < 0:
            raise ValueError(f"n counts observations and cannot be {self.n}")

    @property
    def features(self) -> int:
        """Number of features d."""
        return int(self.mean.shape[0])

    @classmethod
    def empty(cls, features: int) -> Moments:
        """The moments of no observation: the neutral element of `merge`."""
        return cls(0, np.zeros(features), np.zeros((features, features)))

    @classmethod
    def from_rows(cls, rows: npt.ArrayLike | torch.Tensor) -> Moments:
        """Moments of rows, shape (n, d), of any float dtype, numpy or torch, computed in float64.

        The rows are centred before the product, so that the result is exact at any offset. This is the plain
        two-pass computation, meant for data at hand; layers are accumulated by `accumulator.Accumulator`.
        Raises ValueError for a shape that is not (n, d) and for non-finite values.
        """
        values = _rows_float64(rows)
        n, features = values.shape
        if n == 0:
            return cls.empty(features)
        finite = np.isfinite(values).all(axis=1)
        if not finite.all():
            raise ValueError(f"{n - int(finite.sum())} of {n} rows are not finite; leave them out first")
        # The mean is taken after a shift by the first row: a plain sum rounds at the size of the offset.
        centred = values - values[0]
        shift = centred.mean(axis=0)
        centred -= shift
        return cls(n, values[0] + shift, centred.T @ centred)

    @classmethod
    def from_packed(cls, n: int, mean: npt.ArrayLike, packed: npt.ArrayLike) -> Moments:
        """Moments from a packed upper triangle of the scatter; the inverse of `packed`."""
        mean = np.array(mean, dtype=np.float64)
        return cls(n, mean, unpack_triangle(packed, mean.shape[0]))

    def packed(self) -> F64:
        """Packed upper triangle of the scatter, float64, shape (d(d+1)/2,), row-major."""
        return pack_triangle(self.scatter)

    def merge(self, other: Moments) -> Moments:
        """Moments of the union of both sets of observations (Chan, Golub, LeVeque); neither operand changes."""
        if self.features != other.features:
            raise ValueError(f"moments of {self.features} features do not merge with moments of {other.features}")
        if other.n == 0:
            return self
        if self.n == 0:
            return other
        n = self.n + other.n
        delta = other.mean - self.mean
        scatter = self.scatter + other.scatter
        scatter += np.outer(delta * (self.n * (other.n / n)), delta)
        return Moments(n, self.mean + delta * (other.n / n), scatter)

    def covariance(self) -> F64:
        """Population covariance scatter/n, float64, shape (d, d). Raises ValueError when n is 0."""
        if self.n == 0:
            raise ValueError("no observation, no covariance")
        return self.scatter / self.n


class PackedTotal:
    """A running total of moments in packed form, for whoever merges many: the store.

    Adding moments costs one in-place addition of the triangle. The rank-one terms of the merge formula need
    only the weights and means of the groups, so these are kept and folded in with one matrix product for every
    32 groups. Memory: the triangle, 4d² bytes, and at most 33 means. Not thread-safe.

    `n` counts observations, `weight` is the sum of their weights: the covariance is packed/weight.
    """

    __slots__ = ("_means", "_weights", "features", "n", "packed", "weight")

    def __init__(self, features: int, size: int | None = None) -> None:
        self.features = features
        self.n = 0
        self.weight = 0.0
        self.packed = np.zeros(triangle_size(features) if size is None else size)
        self._weights: list[float] = []
        self._means: list[F64] = []

    def add(self, n: int, mean: F64, packed: F64, weight: float | None = None) -> None:
        """Merge the moments (n, mean, packed scatter); the arguments are copied, never kept.

        `weight` is the sum of the observations' weights, which mean and scatter are weighted by; n if it is None.
        """
        if n == 0:
            return
        weight = float(n) if weight is None else weight
        self.n += n
        self.weight += weight
        self.packed += packed
        self._weights.append(weight)
        self._means.append(mean.copy())
        if len(self._weights) > MAX_PENDING:
            self._fold()

    def copy(self) -> PackedTotal:
        """An independent copy, for work outside the lock that guards this one."""
        twin = type(self).__new__(type(self))
        twin.features, twin.n, twin.weight, twin.packed = self.features, self.n, self.weight, self.packed.copy()
        twin._weights, twin._means = list(self._weights), list(self._means)
        return twin

    def result(self) -> tuple[int, F64, F64]:
        """(n, mean, packed scatter); the packed scatter is this total's own array."""
        self._fold()
        mean = self._means[0] if self._means else np.zeros(self.features)
        return self.n, mean, self.packed

    def _fold(self) -> None:
        """Σ_k w_k (m_k − m)(m_k − m)ᵀ over the groups k is what the merge formula adds in the end."""
        if len(self._weights) <= 1:
            return
        weights = np.array(self._weights, dtype=np.float64)
        means = np.stack(self._means)
        # No product of BLAS either, see `_PRODUCT`.
        mean = means[0] + np.einsum("k,kd->d", weights / weights.sum(), means - means[0])
        self._add_groups((means - mean) * np.sqrt(weights)[:, None])
        self._weights, self._means = [self.weight], [mean]

    def _add_groups(self, scaled: F64) -> None:
        """Add Σ_k s_k s_kᵀ, where the s_k are the rows."""
        scratch = np.empty(min(_FOLD_ROWS, self.features) * self.features)
        width = max(1, _PRODUCT // (_FOLD_ROWS * len(scaled)))
        for first, rows, part in row_blocks(self.features, _FOLD_ROWS):
            columns = self.features - first
            block, left = scratch[: rows * columns].reshape(rows, columns), scaled[:, first : first + rows].T
            for start in range(0, columns, width):
                stop = start + width
                np.matmul(left, scaled[:, first:][:, start:stop], out=block[:, start:stop])
            add_block(self.packed[part], block)
