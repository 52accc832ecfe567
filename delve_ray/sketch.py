"""Sketches of scatters that are too large to keep: Y = S·Ω, where S is d×d and Ω a d×k matrix that all workers share.

A sketch is linear in S, so sketches merge as scatters do: by addition, and with the rank-one terms of the merge formula
(see `moments`), of which S·Ω takes w·δ(δᵀΩ). Beside Y there is the diagonal of S, so that the trace is exact. What the
two say of the spectrum is in `nystrom`.

Ω has sparse signs: each row has ζ = 8 entries ±1/√ζ, one in each of ζ blocks of k/ζ columns (Martinsson & Tropp,
"Randomized numerical linear algebra", Acta Numerica 2020, §9.2). They come from a hash of (d, k, row, block), so that
every process, machine and version has the same.

In packed form a sketch is its diagonal (d), then Y row by row (d·k): d(k+1) values, where a triangle has d(d+1)/2. A
sketch is only made where it is the shorter of the two, so that a length tells what something is.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from delve_ray.checks import check_integer
from delve_ray.errors import OptionError
from delve_ray.moments import F64, PackedTotal, triangle_size

log = logging.getLogger(__name__)

SIGNS = 8
"""ζ, entries of each row of Ω; sizes of sketches are multiples of it."""
_SEED = np.uint64(0x64656C76655F7261)
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIXERS = ((np.uint64(30), np.uint64(0xBF58476D1CE4E5B9)), (np.uint64(27), np.uint64(0x94D049BB133111EB)))
_BLOCK_VALUES = 1 << 18
"""Values of Y that are worked on at a time: 2 MB, which stay in the cache."""


@dataclass(frozen=True, slots=True)
class SketchRule:
    """Which layers are sketched: those wider than `max_features`, with `size` columns; none where that is 0.

    >>> rule = SketchRule(max_features=8192, size=1024)
    >>> rule.columns(8192), rule.columns(50_257)
    (0, 1024)
    """

    max_features: int = 0
    size: int = 0

    def columns(self, features: int) -> int:
        """Columns of the sketch of a layer; 0 where its scatter is kept whole, which may be shorter than a sketch."""
        wide = features > self.max_features and sketch_size(features, self.size) < triangle_size(features)
        return self.size if wide else 0

    def packed_size(self, features: int) -> int:
        """Length of a layer's scatter in packed form, be it whole or sketched."""
        return packed_size(features, self.columns(features))

    def moments_size(self, features: int) -> int:
        """Length of a layer's mean and packed scatter, one after the other."""
        return features + self.packed_size(features)


WHOLE = SketchRule()
"""The rule that sketches nothing."""


def check_sketching(max_features: int, sketch_size: int) -> None:
    """Raise OptionError for a size of sketches that cannot be, `max_features` being checked already."""
    if type(sketch_size) is not int or sketch_size < 0 or sketch_size % SIGNS:
        raise OptionError(
            f"sketch_size={sketch_size!r} is not a multiple of {SIGNS} from 0 on, where 0 leaves out layers of more "
            f"than max_features={max_features}"
        )


def usable_sketch_size(sketch_size: int) -> int:
    """The size of sketches that a user means: rounded up to a multiple of 8, with a word. Raises OptionError.

    >>> usable_sketch_size(1020), usable_sketch_size(0)
    (1024, 0)
    """
    size = check_integer("sketch_size", sketch_size, at_least=0)
    usable = -(-size // SIGNS) * SIGNS
    if usable != size:
        log.warning("sketch_size=%d is rounded up to %d, a multiple of %d", size, usable, SIGNS)
    return usable


def sketch_size(features: int, columns: int) -> int:
    """Length of a packed sketch, d(k+1)."""
    return features * (columns + 1)


def packed_size(features: int, columns: int) -> int:
    """Length of a packed scatter: of a triangle where `columns` is 0, else of a sketch."""
    return sketch_size(features, columns) if columns else triangle_size(features)


def columns_of(length: int, features: int) -> int | None:
    """The columns of a packed scatter by its length: 0 for a triangle, None for what is neither.

    >>> columns_of(5050, 100), columns_of(100 * 17, 100), columns_of(100 * 18, 100)
    (0, 16, None)
    """
    if length == triangle_size(features):
        return 0
    columns = length // features - 1 if features else 0
    fits = length == sketch_size(features, columns) < triangle_size(features)
    return columns if fits and columns > 0 and columns % SIGNS == 0 else None


def split(packed: F64, features: int) -> tuple[F64, F64]:
    """Views of a packed sketch: the diagonal (d,) and Y (d, k)."""
    return packed[:features], packed[features:].reshape(features, -1)


@dataclass(frozen=True, slots=True, eq=False)
class Omega:
    """Ω: `columns` and `values` of the entries of each row, both of shape (d, ζ), int64 and float64."""

    features: int
    size: int
    columns: npt.NDArray[np.int64]
    values: F64

    def after(self, rows: F64) -> F64:
        """rows·Ω, float64 of shape (n, k), of rows (n, d)."""
        found = np.empty((len(rows), self.size))
        width = self.size // SIGNS
        for block in range(SIGNS):
            places = self.columns[:, block] - block * width
            for row, out in zip(rows * self.values[:, block], found, strict=True):
                out[block * width : (block + 1) * width] = np.bincount(places, row, minlength=width)
        return found

    def dense(self, first: int, last: int) -> F64:
        """Rows of Ω as a dense matrix, (last − first, k)."""
        rows = np.zeros((last - first, self.size))
        np.put_along_axis(rows, self.columns[first:last], self.values[first:last], axis=1)
        return rows

    def gram(self) -> F64:
        """ΩᵀΩ, (k, k)."""
        found = np.zeros(self.size**2)
        for block in range(SIGNS):
            places = self.columns[:, block : block + 1] * self.size + self.columns
            weights = self.values[:, block : block + 1] * self.values
            found += np.bincount(places.ravel(), weights.ravel(), minlength=found.size)
        return found.reshape(self.size, self.size)


@lru_cache(maxsize=16)
def omega(features: int, size: int) -> Omega:
    """Ω for d features and sketches of `size` columns, the same in every process.

    >>> found = omega(3, 16)
    >>> found.columns.tolist()[0], np.sign(found.values[0]).astype(int).tolist()
    ([1, 3, 4, 7, 8, 11, 13, 14], [1, -1, -1, 1, -1, 1, 1, 1])
    """
    start = _mixed(np.uint64(features) ^ _mixed(np.uint64(size) ^ _SEED))
    with np.errstate(over="ignore"):
        hashes = _mixed(start + np.arange(1, features * SIGNS + 1, dtype=np.uint64) * _GOLDEN)
    width = size // SIGNS
    # The upper half says which column, the lowest bit which sign.
    place = ((hashes >> np.uint64(32)) % np.uint64(width)).astype(np.int64).reshape(features, SIGNS)
    sign = 1.0 - 2.0 * (hashes & np.uint64(1)).astype(np.float64).reshape(features, SIGNS)
    columns, values = place + width * np.arange(SIGNS), sign / np.sqrt(SIGNS)
    columns.flags.writeable = values.flags.writeable = False
    return Omega(features, size, columns, values)


def _mixed(state: npt.NDArray[np.uint64] | np.uint64) -> npt.NDArray[np.uint64]:
    """SplitMix64's output for these states (Steele, Lea, Flood, "Fast splittable pseudorandom number generators",
    OOPSLA 2014).
    """
    mixed = np.asarray(state, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for shift, factor in _MIXERS:
            mixed = (mixed ^ (mixed >> shift)) * factor
    return mixed ^ (mixed >> np.uint64(31))


class SketchTotal(PackedTotal):
    """A running total of sketched moments: see `PackedTotal`. Memory: 8d(k+1) bytes, and at most 33 means."""

    __slots__ = ()

    def __init__(self, features: int, columns: int) -> None:
        super().__init__(features, sketch_size(features, columns))

    def _add_groups(self, scaled: F64) -> None:
        """Add the sketch of Σ_k s_k s_kᵀ, where the s_k are the rows."""
        diagonal, sketch = split(self.packed, self.features)
        diagonal += np.einsum("kd,kd->d", scaled, scaled)
        right = omega(self.features, sketch.shape[1]).after(scaled)
        height = max(1, _BLOCK_VALUES // sketch.shape[1])
        for first in range(0, self.features, height):
            sketch[first : first + height] += scaled[:, first : first + height].T @ right


def new_total(features: int, columns: int) -> PackedTotal:
    """An empty total of whole or, where there are columns, of sketched moments."""
    return SketchTotal(features, columns) if columns else PackedTotal(features)
