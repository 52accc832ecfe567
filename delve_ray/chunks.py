"""Pieces of a batch: how many rows are reduced at a time."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

CHUNK_ELEMENTS = 1 << 20
"""Elements of a batch that are reduced at a time: 4 MB of scratch, which stays in the cache."""
CHUNK_ROWS = (1024, 32768)
"""Fewest and most rows that a chunk may have. A float32 product over 2^16 rows is wrong by 5e-7 of λ1, over 2^18 by
1.6e-6, if nobody mends it. With too few rows, adding the product costs more than computing it."""


def chunk_rows(features: int) -> int:
    """Most rows of a chunk."""
    fewest, most = CHUNK_ROWS
    return min(most, max(fewest, CHUNK_ELEMENTS // features))


def chunks(x: Tensor) -> Iterator[Tensor]:
    """Pieces of x, shape (…, D), cut along its leading dimensions into a bounded number of rows each."""
    features = x.shape[-1]
    limit = chunk_rows(features)
    rows = x.numel() // features
    if rows <= limit:
        yield x
        return
    if x.is_contiguous():
        yield from x.view(-1, features).split(limit)
    elif rows // x.shape[0] <= limit:
        yield from x.split(limit * x.shape[0] // rows)
    else:
        for item in x:
            yield from chunks(item)
