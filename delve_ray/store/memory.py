"""What a store takes, computed before anything is allocated: `store_bytes`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from delve_ray.checks import check_integer
from delve_ray.moments import MAX_PENDING
from delve_ray.nystrom import head_bytes
from delve_ray.reservoir import packed_size
from delve_ray.sketch import WHOLE, SketchRule
from delve_ray.store.publisher import BYTES_PER_ENTRY, DECOMPOSING_BYTES

ENTRY_BYTES = 2 << 10
"""Objects around the arrays of a layer and phase in one window: locks, lists, array headers."""
SOURCE_BYTES = 2 << 10
"""What the store has of a source: its names, what it has sent, what waits at it."""
CLOSED_BYTES = 96
"""A source's place among those that have closed a window, per window."""


@dataclass(frozen=True, slots=True)
class StoreBytes:
    """Bytes of a store by what they are for, beyond those of the process itself (about 150 MB with Ray).

    Attributes:
        windows: totals of open windows, and of those that wait for a late rank or a writer in memory.
        latest: the last published moments, which answer `covariance` and `spectrum`.
        sources: bookkeeping of all sources.
        aside: totals set aside beside these while the newest window is saved or published live.
        decomposing: matrices that are being decomposed.
    """

    windows: int
    latest: int
    sources: int
    aside: int
    decomposing: int

    @property
    def resting(self) -> int:
        """Between publications."""
        return self.windows + self.latest + self.sources

    @property
    def peak(self) -> int:
        """Never more than that."""
        return self.resting + self.aside + self.decomposing


def pending_means(deltas: int) -> int:
    """Means that a total keeps beside its triangle after so many deltas, see `moments.PackedTotal`.

    >>> [pending_means(deltas) for deltas in (0, 1, 32, 33, 64, 65)]
    [0, 1, 32, 1, 32, 1]
    """
    return 0 if deltas == 0 else 1 + (deltas - 1) % MAX_PENDING


def store_bytes(
    widths: Sequence[int],
    *,
    phases: int = 1,
    windows: int = 1,
    sources: int = 1,
    deltas: int | None = None,
    published: bool = True,
    saved: bool = True,
    embed_rows: int = 0,
    cores: int = 1,
    rule: SketchRule = WHOLE,
) -> StoreBytes:
    """What one store, or one shard with its share of the layers, takes in bytes.

    For each layer of d features and each phase: a packed triangle in float64, 8·d(d+1)/2 bytes, per window, with up to
    32 means of 8d bytes; one more, with one mean, of the last publication; two more while the window is saved or
    published live, because deltas go on into a new total and what two cuts have set aside is merged layer by layer.
    Nothing depends on how many batches, rows or sources the moments are of, but for the bookkeeping: about 2 KB for
    each source and 100 bytes for each that has closed a window.

    Args:
        widths: features of each layer.
        phases: 2 where training and evaluation are both recorded in one window.
        windows: open ones, and the one that is being published while its successor has begun.
        sources: ranks.
        deltas: what each layer has got of the window since it was last set aside; None is the most that there can be.
        published: whether anything has been published yet.
        saved: whether snapshots are taken, or live rows published, while deltas arrive.
        embed_rows: rows that are kept for embeddings, 0 without them.
        cores: those that the store may use; all but one decompose, as far as 2 GiB hold a layer of the widest kind
            for each.
        rule: which layers are sketched (`StoreConfig.sketching`), and take 8·d(k + 1) bytes in place of a triangle.

    Raises OptionError for a number below its range.

    >>> store_bytes([2048] * 4, sources=64).windows >> 20  # MiB
    66
    >>> store_bytes([1024], phases=2).latest  # two triangles and two means
    8413184
    """
    for name, value in (("phases", phases), ("windows", windows), ("sources", sources), ("cores", cores)):
        check_integer(name, value, at_least=1)
    means = MAX_PENDING if deltas is None else pending_means(deltas)
    entries = phases * len(widths)
    triangles = 8 * phases * sum(map(rule.packed_size, widths))
    rows = 8 * phases * sum(packed_size(embed_rows, width) for width in widths) if embed_rows else 0
    window = triangles + 8 * phases * means * sum(widths) + rows + entries * ENTRY_BYTES
    latest = 8 * phases * sum(map(rule.moments_size, widths)) if published else 0
    scratch = sorted(
        head_bytes(columns) if (columns := rule.columns(width)) else BYTES_PER_ENTRY * width**2 for width in widths
    )
    side_by_side = max(1, min(cores - 1, DECOMPOSING_BYTES // max([1, *scratch[-1:]])))
    return StoreBytes(
        windows=windows * window,
        latest=latest,
        sources=sources * (SOURCE_BYTES + windows * CLOSED_BYTES),
        aside=2 * (window - rows) if saved else 0,
        decomposing=sum(scratch[-side_by_side:]),
    )
