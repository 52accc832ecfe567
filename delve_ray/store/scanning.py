"""What the door asks of a delta's numbers: the sum of their words, and whether all are finite, in as few passes as can
be and without temporaries.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from delve_ray.moments import F64

PIECE = 1 << 16
"""Values that are read twice in a row, 512 KiB: the second time from the core's own cache."""
RUN = 1 << 13
"""Values of one dot product. Of more than 10,000 OpenBLAS would make a job for threads of its own, which waits for
whichever of them gets no core."""


def word_sum(buffer: F64) -> int:
    """The sum of the numbers' words modulo 2^64, at memory's speed (a CRC would take longer than the merge)."""
    return int(np.add.reduce(np.ascontiguousarray(buffer, np.float64).view(np.uint64)))


def scan(buffer: F64) -> tuple[int, bool]:
    """`word_sum`, and whether all numbers are finite.

    On the caller's thread alone: the cores beside it are the senders'.

    >>> scan(np.array([1.0, float("nan")]))[1], scan(np.array([1.0, 1e300]))[1]
    (False, True)
    """
    values = np.ascontiguousarray(buffer, np.float64)
    words, finite = 0, True
    with np.errstate(all="ignore"):
        for start in range(0, values.size, PIECE):
            piece = values[start : start + PIECE]
            words += word_sum(piece)
            finite = finite and _finite(piece)
    return words % (1 << 64), finite


def copy_scanned(buffer: F64, places: Sequence[slice]) -> tuple[F64, int, bool]:
    """The values at these places, one after the other, and what `scan` says of them, read from memory once.

    >>> copy_scanned(np.array([0.0, 1.0, 2.0, float("inf")]), [slice(2, 3), slice(0, 1)])
    (array([2., 0.]), 4611686018427387904, True)
    """
    copied = np.empty(sum(place.stop - place.start for place in places))
    words, finite, start, end = 0, True, 0, 0
    with np.errstate(all="ignore"):
        for place in places:
            for first in range(place.start, place.stop, PIECE):
                last = min(first + PIECE, place.stop)
                copied[end : end + last - first] = buffer[first:last]
                end += last - first
                if end - start >= PIECE or end == copied.size:  # narrow layers are scanned together
                    words += word_sum(copied[start:end])
                    finite = finite and _finite(copied[start:end])
                    start = end
    return copied, words % (1 << 64), finite


def _finite(piece: F64) -> bool:
    """Whether all values are finite.

    A sum of squares is NaN or inf as soon as one of them is, and a dot product forms it faster than every value can be
    looked at. Where it is not finite, squares may have left float64, and every value is looked at.
    """
    whole = piece.size - piece.size % RUN
    rows = piece[:whole].reshape(-1, RUN)
    squares = np.matmul(rows[:, None, :], rows[:, :, None])
    rest = piece[whole:]
    if np.isfinite(squares).all() and np.isfinite(np.dot(rest, rest)):
        return True
    return bool(np.isfinite(piece).all())
