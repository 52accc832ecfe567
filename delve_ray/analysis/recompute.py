"""Other thresholds and other statistics, long after the run: from the eigenvalues and covariances on disk."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from delve_ray.analysis.keys import Keys
from delve_ray.analysis.reading import Filters, read_covariances, read_spectra
from delve_ray.analysis.run_files import COVARIANCES, RunPath, find_runs, list_files, take
from delve_ray.errors import ReadError
from delve_ray.moments import triangle_size, unpack_triangle
from delve_ray.nystrom import Head, head_statistics
from delve_ray.precision import PRODUCT_EPS
from delve_ray.schema import EXTRA_STATS, F64, SCALAR_STATS, SPECTRA_SCHEMA
from delve_ray.spectrum import FLOAT32_EPS, Statistics, check_thresholds, resolve_stats, statistics
from delve_ray.storage import Storage
from delve_ray.store.run_file import read_run

Progress: TypeAlias = Callable[[int, int], object]
"""Called with how much is done, and how much there is in all."""

COVARIANCE_BYTES = 256 << 20
"""Packed covariances that are in memory at a time, as far as whole steps allow it."""
_PLACES = ("run", "phase", "step", "layer", "attempt", "revision")
_KEEPS = ("correlation_effective_rank", "rankme")
"""Statistics of other matrices that no threshold changes."""
_ORDER = ("run", "phase", "step")

Row: TypeAlias = dict[str, Any]


def recompute(
    paths: RunPath | Iterable[RunPath],
    *,
    threshold: float | Sequence[float] | None = None,
    stats: Sequence[str] | str | None = None,
    columns: Sequence[str] | None = None,
    filters: Filters | None = None,
    progress: Progress | None = None,
) -> pa.Table:
    """The rows of `read_spectra` as a tracker with other options would have published them; no file is changed.

    Args:
        paths: One savefile or several, or directories above runs, as `read_spectra` takes them.
        threshold: The share δ of variance of the intrinsic dimensionality, or several, the first for `saturation`. By
            default each row keeps its own.
        stats: Names as the tracker takes them; by default every scalar of the covariance's own spectrum. Statistics
            that are not asked for are null. Those of other matrices (`correlation_…`, `rankme`) need the covariances,
            which a run has where its own `stats` named "cov"; where a row has none, they are null, but for those that
            it has stored and that no option changes.
        columns: Restricts the result, in that order.
        filters: Which rows, by their stored values; see `read_spectra`.
        progress: Called with the number of rows done and the number of rows, for each run in turn.

    Returns:
        A table of `delve_ray.schema.SPECTRA_SCHEMA`, in the order of `read_spectra`. Eigenvalues under the rounding of
        the run's products count as the store has counted them: run.json has the run's `product_eps`; without it, that
        of float32. `trace` is the stored one, which is the sum of the covariance's diagonal, or else the sum of the
        eigenvalues, which differs from it by rounding. A row without eigenvalues, or with one that is not finite, has
        no statistics. A sketched row has those that the head of its spectrum supports, see `delve_ray.nystrom`.

    Raises:
        OptionError: a threshold or a name of a statistic that cannot be used.
        ReadError: what `read_spectra` raises; a statistic that no row of a run has what it needs for.

    >>> import tempfile
    >>> from datetime import UTC, datetime
    >>> from delve_ray.schema import LayerRow, PublishedWindow
    >>> from delve_ray.writers.parquet import ParquetWriter
    >>> row = LayerRow("fc", "Linear", "train", 3, 50, 0, 0.99, {}, np.array([8.0, 1.0, 1.0]), np.zeros(3))
    >>> run = Storage(tempfile.mkdtemp())
    >>> ParquetWriter(run).write(PublishedWindow("first", 0, 0, 0, 0, True, 1, 1, datetime.now(UTC), [row]))
    >>> recompute(run, threshold=0.9, columns=["threshold", "intrinsic_dimensionality"]).to_pylist()
    [{'threshold': 0.9, 'intrinsic_dimensionality': 2}]
    """
    thresholds = None if threshold is None else check_thresholds(threshold)
    asked = tuple(name for name in resolve_stats(stats) if name in (*SCALAR_STATS, *EXTRA_STATS))
    wanted = SPECTRA_SCHEMA.names if columns is None else [columns] if isinstance(columns, str) else list(columns)
    for name in wanted:
        if name not in SPECTRA_SCHEMA.names:
            raise ReadError(f"columns: no column {name!r} in spectra; valid: {', '.join(SPECTRA_SCHEMA.names)}")
    tables = [_recompute_run(run, thresholds, asked, filters, progress) for run in find_runs(paths)]
    table = pa.concat_tables(tables)
    if len(tables) > 1:
        table = take(table, np.argsort(Keys(table).codes(_ORDER), kind="stable"))
    return table.select(wanted).replace_schema_metadata(SPECTRA_SCHEMA.metadata)


def product_eps(run: Storage) -> float:
    """ε of the products that a run's covariances were summed from: what its run.json says, else that of float32."""
    try:
        options = read_run(run).get("options", {})
    except ReadError:
        return FLOAT32_EPS
    value = options.get("product_eps") if isinstance(options, Mapping) else None
    if isinstance(value, float) and 0 < value < 1:
        return value
    recording = options.get("recording") if isinstance(options, Mapping) else None
    precision = recording.get("precision") if isinstance(recording, Mapping) else None
    return PRODUCT_EPS.get(str(precision), FLOAT32_EPS)


def _recompute_run(
    run: Storage,
    thresholds: tuple[float, ...] | None,
    asked: tuple[str, ...],
    filters: Filters | None,
    progress: Progress | None,
) -> pa.Table:
    stored = read_spectra(run, filters=filters)
    eps = product_eps(run)
    extra = [name for name in EXTRA_STATS if name in asked]
    eigenvalues = _lists(stored.column("eigenvalues"))
    rows: list[Row] = stored.drop_columns(["eigenvalues"]).to_pylist()
    moments = _moments(run, rows) if extra else ((row, None) for row in enumerate(rows))
    found: list[Row] = [{}] * len(rows)
    for done, ((index, row), matrix) in enumerate(moments, start=1):
        found[index] = _row(row, eigenvalues[index], matrix, thresholds, asked, eps)
        if progress is not None:
            progress(done, len(rows))
    for name in extra:
        if rows and all(row[name] is None for row in found):
            raise ReadError(
                f"{run.uri}: {name} needs the covariances, and the run has none of these rows; record them with "
                f"stats=[…, 'cov'], or leave {name} out"
            )
    for name in found[0] if found else ():
        field = stored.schema.field(name)
        place = stored.schema.get_field_index(name)
        stored = stored.set_column(place, field, pa.array([row[name] for row in found], field.type))
    return stored


def _row(
    row: Row,
    eigenvalues: F64 | None,
    moments: tuple[F64, F64] | None,
    thresholds: tuple[float, ...] | None,
    asked: tuple[str, ...],
    eps: float,
) -> Row:
    """The columns of one row that the options decide."""
    own = tuple(row["thresholds"] or ()) or (row["threshold"] or 0.99,)
    deltas = own if thresholds is None else thresholds
    extra = [name for name in EXTRA_STATS if name in asked]
    found = Statistics({})
    low = high = None
    if row["sketched"]:
        head = _head_of(row, eigenvalues)
        if head is not None:
            known = head_statistics(head, row["features"] or 0, deltas[0], deltas if len(deltas) > 1 else (), asked)
            found = Statistics(known.values, intrinsic_dimensionalities=known.dimensions)
            low, high = known.saturation_low, known.saturation_high
    elif eigenvalues is not None and np.isfinite(eigenvalues).all():
        trace = row["trace"]
        mean, covariance = moments or (None, None)
        found = statistics(
            eigenvalues,
            trace=float(eigenvalues.sum()) if trace is None else trace,
            samples=row["samples"] or 0,
            threshold=deltas[0],
            thresholds=deltas if len(deltas) > 1 else (),
            stats=[name for name in asked if moments is not None or name not in extra],
            product_eps=eps,
            covariance=covariance,
            mean=mean,
        )
    values: Row = {name: found.values.get(name) for name in (*SCALAR_STATS, *EXTRA_STATS)}
    if moments is None:
        values |= {name: row[name] for name in extra if name in _KEEPS or deltas[0] == row["threshold"]}
    several = list(deltas) if len(deltas) > 1 else []
    return values | {
        "threshold": deltas[0],
        "thresholds": several,
        "intrinsic_dimensionalities": list(found.intrinsic_dimensionalities),
        "alpha_r2": found.alpha_r2,
        "alpha_from": found.alpha_from,
        "alpha_to": found.alpha_to,
        "saturation_low": low,
        "saturation_high": high,
    }


def _head_of(row: Row, eigenvalues: F64 | None) -> Head | None:
    """The head of a sketched layer's spectrum, as its row has it; None where that is not whole."""
    unseen, features, samples = row["unseen_variance"], row["features"] or 0, row["samples"]
    if eigenvalues is None or unseen is None or not np.isfinite([unseen, *eigenvalues]).all():
        return None
    trace = float(eigenvalues.sum()) + unseen if row["trace"] is None else row["trace"]
    return Head(eigenvalues, trace, unseen, min(features, max(samples - 1, 0)) if samples else features)


def _lists(column: pa.ChunkedArray) -> list[F64 | None]:
    """The lists of a column as arrays that share its memory; None for null, also where a list has one in it."""
    found: list[F64 | None] = []
    for chunk in column.chunks:
        values = chunk.values
        flat = values.to_numpy(zero_copy_only=False)  # a null is NaN
        ends, valid = chunk.offsets.to_numpy(), chunk.is_valid().to_numpy(zero_copy_only=False)
        found += [flat[ends[i] : ends[i + 1]] if valid[i] else None for i in range(len(chunk))]
    return found


def _moments(run: Storage, rows: Sequence[Row]) -> Iterator[tuple[tuple[int, Row], tuple[F64, F64] | None]]:
    """Each row with its number, and its mean and covariance where the run has them; some steps at a time."""
    if not list_files(run, COVARIANCES):
        yield from ((row, None) for row in enumerate(rows))
        return
    for numbers in _batches(rows):
        steps = pa.array(sorted({rows[number]["step"] for number in numbers}))
        layers = pa.array(sorted({rows[number]["layer"] for number in numbers}))
        wanted = pc.field("step").isin(steps) & pc.field("layer").isin(layers)
        table = read_covariances(run, [*_PLACES, "mean", "covariance"], wanted)
        means, packed = _lists(table.column("mean")), _lists(table.column("covariance"))
        # A crash may have left a covariance that is ahead of its spectrum: that one is of other observations.
        place = {_place(row): number for number, row in enumerate(table.select(_PLACES).to_pylist())}
        for number in numbers:
            at = place.get(_place(rows[number]))
            mean, triangle = (None, None) if at is None else (means[at], packed[at])
            both = None
            if mean is not None and triangle is not None and np.isfinite(triangle).all():
                both = mean, unpack_triangle(triangle, mean.size, symmetric=False)
            yield (number, rows[number]), both


def _place(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in _PLACES)


def _batches(rows: Sequence[Row]) -> Iterator[list[int]]:
    """The rows' numbers, some steps at a time, so that their covariances fit into `COVARIANCE_BYTES`."""
    by_step: dict[int, list[int]] = {}
    for number, row in enumerate(rows):
        by_step.setdefault(row["step"], []).append(number)
    batch: list[int] = []
    size = 0.0
    for numbers in by_step.values():
        more = math.fsum(8.0 * triangle_size(rows[number]["features"] or 0) for number in numbers)
        if batch and size + more > COVARIANCE_BYTES:
            yield batch
            batch, size = [], 0.0
        batch, size = [*batch, *numbers], size + more
    if batch:
        yield batch
