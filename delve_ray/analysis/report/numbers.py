"""The numbers of the page: which of them it holds, and how they are packed."""

from __future__ import annotations

import base64
import gzip
from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from delve_ray.schema import F64

I64 = npt.NDArray[np.int64]

NULL_BITS = {4: 0x7FC00001, 8: 0x7FF8000000000001}
"""The NaN that stands for a null, by the number's bytes: the page tells it from a statistic that is NaN."""
_TINY, _HUGE = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


class NumberPool:
    """Arrays of numbers, each as float32 where that holds them, packed into one text.

    Of each array the first bytes of all its numbers come first, then the second ones, and so on: exponents beside
    exponents compress where whole numbers do not.
    """

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._size = 0

    def add(self, values: F64, *, exact: bool = False) -> dict[str, int]:
        """Keep an array and return where it is: `at` and `count`, and the `bytes` of a number.

        Nulls carry the bits `NULL_BITS[8]`. Numbers are rounded to float32, if all of them lie in its range; with
        `exact`, only if that changes none.
        """
        null = values.view(np.uint64) == NULL_BITS[8]
        wide = _needs_float64(values, exact)
        packed = values.astype(np.float64 if wide else np.float32)
        packed.view(np.uint64 if wide else np.uint32)[null] = NULL_BITS[packed.itemsize]
        place = {"at": self._size, "count": packed.size, "bytes": packed.itemsize}
        little = packed.astype(packed.dtype.newbyteorder("<"), copy=False)
        self._pieces.append(little.view(np.uint8).reshape(-1, packed.itemsize).T.tobytes())
        self._size += packed.nbytes
        return place

    def text(self) -> str:
        """All of them, compressed, as base64."""
        return compressed(b"".join(self._pieces))


def _needs_float64(values: F64, exact: bool) -> bool:
    finite = np.abs(values[np.isfinite(values)])
    if exact:
        with np.errstate(over="ignore"):
            return bool((finite.astype(np.float32) != finite).any())
    return bool(((finite > _HUGE) | ((finite < _TINY) & (finite > 0.0))).any())


def compressed(data: bytes) -> str:
    """Bytes as gzip in base64, the same for the same bytes."""
    return base64.b64encode(gzip.compress(data, compresslevel=6, mtime=0)).decode()


def floats(column: pa.ChunkedArray) -> F64:
    """A column of numbers as float64, its nulls with the bits `NULL_BITS[8]`."""
    values: F64 = np.array(column.cast(pa.float64(), safe=False).to_numpy(), np.float64)
    values.view(np.uint64)[column.is_null().to_numpy()] = NULL_BITS[8]
    return values


def nothing(count: int) -> F64:
    """So many nulls."""
    return np.full(count, NULL_BITS[8], np.uint64).view(np.float64)


def spread(values: Sequence[int], most: int, kept: Collection[int] = ()) -> list[int]:
    """At most `most` (at least one) of the ascending values, evenly spread; the last and those in `kept` come first.

    >>> spread([0, 1, 2, 3, 4, 5, 6, 7, 8], 3), spread([0, 1, 2, 3, 4], 1), spread([0, 1, 2, 3, 4], 3, kept=[1])
    ([0, 4, 8], [4], [0, 1, 4])
    """
    if len(values) <= most:
        return list(values)
    chosen = {values[-1], *[value for value in values if value in kept][: max(most - 1, 0)]}
    for index in np.linspace(0, len(values) - 1, most).round().astype(int).tolist():
        if len(chosen) < most:
            chosen.add(values[index])
    return sorted(chosen)


def shown_ranks(features: int, most: int) -> list[int]:
    """The 1-based ranks whose eigenvalues are shown of so many: all, or about `most`, evenly in their logarithm.

    >>> shown_ranks(5, 8), shown_ranks(1000, 8)
    ([1, 2, 3, 4, 5], [1, 3, 7, 19, 52, 139, 373, 1000])
    """
    if features <= most:
        return list(range(1, features + 1))
    ranks: list[int] = np.unique(np.geomspace(1, features, most).round().astype(int)).tolist()
    return ranks


def eigenvalues_at(lists: pa.ListArray, row: int, ranks: Sequence[int]) -> F64:
    """The eigenvalues of a row at ascending 1-based ranks, NaN beyond its last."""
    own = lists.values.to_numpy()[lists.offsets[row].as_py() : lists.offsets[row + 1].as_py()]
    chosen = np.full(len(ranks), np.nan)
    within = [rank - 1 for rank in ranks if rank <= own.size]
    chosen[: len(within)] = own[within]
    return chosen
