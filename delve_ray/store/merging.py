"""How the moments of a delta get into the entries of a window; the store does it, and whoever merges before the store.

Totals and samples are `window.Entry`'s: what a layer's moments are made of is decided there, and nowhere here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import numpy as np

from delve_ray.moments import F64
from delve_ray.reservoir import pack, packed_size, unpack
from delve_ray.sketch import WHOLE, SketchRule
from delve_ray.store.protocol import Bundle, Delta
from delve_ray.store.window import Entry


def merge_into(
    entries: Sequence[Entry | None],
    delta: Delta,
    buffer: F64,
    widths: Sequence[int],
    embed_rows: int,
    rule: SketchRule = WHOLE,
) -> None:
    """Merge a delta's moments, and its samples of rows behind them, into an entry for each of its own.

    `widths` are the features of the delta's entries; None leaves an entry out; of samples `embed_rows` rows stay.
    `rule` says which layers are sketched.
    """
    starts = list(accumulate(map(rule.moments_size, widths), initial=0))
    _sample(entries, delta, buffer[starts[-1] :], widths, embed_rows)
    for index, (entry, start) in enumerate(zip(entries, starts, strict=False)):
        if entry is not None:
            _, _, n, nonfinite = delta.entries[index]
            middle = start + entry.features
            entry.add(n, nonfinite, buffer[start:middle], buffer[middle : starts[index + 1]], delta.weight(index))


def _sample(entries: Sequence[Entry | None], delta: Delta, packed: F64, widths: Sequence[int], embed_rows: int) -> None:
    places = {entry[:2]: index for index, entry in enumerate(delta.entries)}
    start = 0
    for layer, phase, rows, bound in delta.samples:
        index = places[layer, phase]
        features, entry = widths[index], entries[index]
        end = start + packed_size(rows, features)
        if entry is not None and embed_rows:
            entry.sample(unpack(packed[start:end], rows, features, bound), embed_rows)
        start = end


def combine(
    deltas: Sequence[tuple[Delta, F64, Sequence[int]]], embed_rows: int, rule: SketchRule = WHOLE
) -> tuple[Bundle, F64]:
    """One bundle of deltas (header, buffer, width of each entry) of an attempt and window, and its buffer.

    Weights are those of the observations where any delta has some; of samples `embed_rows` rows stay, as in the store.
    The deltas have passed the door, and agree on the widths of their layers. Memory: 8d² bytes per layer and phase
    that is not sketched by the `rule`.

    >>> from delve_ray.store.protocol import Source
    >>> one, two = (Source("r", "", rank, str(rank), "host", 1) for rank in (0, 1))
    >>> deltas = [Delta(source, 0, 0, 0, 0, False, False, ((0, 0, 1, 0),)) for source in (one, two)]
    >>> bundle, buffer = combine([(deltas[0], np.array([1.0, 0.0]), [1]), (deltas[1], np.array([3.0, 0.0]), [1])], 0)
    >>> bundle.total.entries, buffer  # two observations, 1 and 3: their mean and scatter
    (((0, 0, 2, 0),), array([2., 2.]))
    """
    merged: dict[tuple[int, int], Entry] = {}
    for delta, buffer, widths in deltas:
        entries = [
            merged.setdefault(entry[:2], Entry(width, columns=rule.columns(width)))
            for entry, width in zip(delta.entries, widths, strict=True)
        ]
        merge_into(entries, delta, buffer, widths, embed_rows, rule)
    headers = tuple(replace(delta, checksum=0) for delta, *_ in deltas)
    totals = {key: entry.freeze().collect() for key, entry in merged.items()}
    samples = {key: entry.reservoir for key, entry in merged.items() if entry.reservoir is not None}
    total = replace(
        headers[0],
        entries=tuple((*key, part.n, part.nonfinite) for key, part in totals.items()),
        widths=tuple({layer: width for header in headers for layer, width in header.widths}.items()),
        weights=tuple(part.weight for part in totals.values()) if any(header.weights for header in headers) else (),
        samples=tuple((*key, sample.keys.size, sample.bound) for key, sample in samples.items()),
        scalars=(),
    )
    moments = [values for part in totals.values() for values in (part.mean, part.packed)]
    body = np.concatenate([np.empty(0), *moments, *map(pack, samples.values())])
    return Bundle(headers, total).sealed(body), body
