"""A bounded random sample of a layer's rows that merges like moments do: bottom-k sampling.

Every row gets a random key, exponentially distributed with the row's weight as its rate, and the k rows of the smallest
keys are kept. Whatever was split over batches, workers and flushes, the union's k smallest keys are the same rows, so
that merging is associative and commutative, and each set of k rows is as likely as its weights say (without weights,
as any other). Sources: Cohen and Kaplan, Summarizing data using bottom-k sketches, PODC 2007; Efraimidis and Spirakis,
Weighted random sampling with a reservoir, Information Processing Letters 97 (2006).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from delve_ray.schema import F64

UNBOUNDED = float(np.finfo(np.float64).max)
"""`bound` of a reservoir that has every row that was offered."""


@dataclass(frozen=True, slots=True, eq=False)
class Reservoir:
    """Rows of one layer and phase with the smallest keys; nothing ever changes it.

    `keys` is float64 (k,), ascending; `rows` float64 (k, D). Every row that was offered with a key below `bound` is
    here, which is what makes the merge of two reservoirs one of the union, also where one holds fewer rows than the
    other because some were not finite.
    """

    keys: F64
    rows: F64
    bound: float = UNBOUNDED

    @property
    def nbytes(self) -> int:
        """Bytes of keys and rows."""
        return self.keys.nbytes + self.rows.nbytes


def smallest(keys: F64, rows: F64, bound: float, size: int) -> Reservoir:
    """The reservoir of at most `size` rows, of those with keys (n,) and rows (n, D), and what `bound` leaves of them.

    >>> kept = smallest(np.array([0.3, 0.1, 0.2]), np.array([[3.0], [1.0], [2.0]]), UNBOUNDED, size=2)
    >>> kept.rows.tolist(), kept.bound
    ([[1.0], [2.0]], 0.3)
    """
    order = np.argsort(keys, kind="stable")
    order = order[keys[order] < bound]
    if order.size > size:
        bound = float(keys[order[size]])
        order = order[:size]
    return Reservoir(keys[order], rows[order], bound)


def merge(reservoirs: Iterable[Reservoir], size: int) -> Reservoir:
    """The reservoir of at most `size` rows of all that these were offered; there is at least one of them.

    >>> one, other = (smallest(np.array([key]), np.array([[key]]), UNBOUNDED, 1) for key in (0.2, 0.1))
    >>> merge([one, other], size=1).rows.tolist()
    [[0.1]]
    """
    parts = list(reservoirs)
    keys = np.concatenate([part.keys for part in parts])
    rows = np.concatenate([part.rows for part in parts])
    return smallest(keys, rows, min(part.bound for part in parts), size)


def packed_size(rows: int, features: int) -> int:
    """Values of a packed reservoir: the keys, then the rows."""
    return rows * (1 + features)


def pack(reservoir: Reservoir) -> F64:
    """Keys and rows in one float64 array of `packed_size`."""
    return np.concatenate([reservoir.keys, reservoir.rows.reshape(-1)])


def unpack(packed: F64, rows: int, features: int, bound: float) -> Reservoir:
    """The reservoir of `pack`, as copies: what is packed may lie in a buffer that goes."""
    return Reservoir(packed[:rows].copy(), packed[rows:].reshape(rows, features).copy(), bound)


def embed(rows: F64, mean: F64, covariance: F64) -> F64:
    """Rows (k, D) in the coordinates of the two leading eigenvectors of their layer's covariance, (k, 2) float64.

    (z - mean)·v for v1 and v2; of the covariance (D, D) the upper triangle is read. The sign of an eigenvector is
    that with which its largest component is positive, so that it is the same from window to window. A layer of one
    feature has zeros for the second coordinate. Takes a decomposition with vectors, LAPACK's dsyevd.

    >>> embed(np.array([[3.0, 1.0], [0.0, 1.0]]), np.array([1.0, 1.0]), np.diag([4.0, 1.0])).tolist()
    [[2.0, 0.0], [-1.0, 0.0]]
    """
    return along(rows, mean, np.linalg.eigh(covariance, UPLO="U").eigenvectors[:, ::-1][:, :2])


def along(rows: F64, mean: F64, vectors: F64) -> F64:
    """Rows (k, D) along one or two eigenvectors (D, …), from the mean; all else as `embed`."""
    largest = np.abs(vectors).argmax(axis=0)
    vectors = vectors * np.where(vectors[largest, np.arange(vectors.shape[1])] < 0, -1.0, 1.0)
    coordinates: F64 = np.zeros((rows.shape[0], 2))
    coordinates[:, : vectors.shape[1]] = (rows - mean) @ vectors
    return coordinates + 0.0  # no negative zeros
