"""Run directories as Arrow tables: one truth per step, out of attempts, revisions and schema versions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from delve_ray.analysis.run_files import (
    COVARIANCES,
    I64,
    SCALARS,
    SPECTRA,
    Kind,
    RunPath,
    find_runs,
    in_parallel,
    list_files,
    read_files,
    read_rows,
    take,
)
from delve_ray.errors import ReadError
from delve_ray.storage import Storage

Filters: TypeAlias = pc.Expression | Sequence[Any]

TRIES = 5
"""How often a run is listed because a file went between listing and opening."""
_ROW = "__row"


def read_spectra(
    paths: RunPath | Iterable[RunPath],
    columns: Sequence[str] | None = None,
    filters: Filters | None = None,
    *,
    attempts: str = "latest",
) -> pa.Table:
    """The spectra of one or several runs: one row per (run, phase, step, layer).

    `paths` is one savefile or several, as paths, URIs or `Storage`; a directory that is no run is searched
    for runs below it, as a sweep has them. Within a run directory the latest attempt holds for every (phase,
    step) that it wrote, and of it the highest revision; what an attempt did not replay stays from the one
    before. With `attempts="all"` each attempt has its own rows, of the highest revision, those that a later one
    replaces included. Only then `filters` applies: an expression of pyarrow.compute, or a list of tuples as
    `pyarrow.parquet.read_table` takes it. `columns` restricts the result, in that order; only what is needed
    is read.

    Rows are sorted by run, phase and step, layers in the order in which they were written, which is that of
    the network. Columns and types are those of `delve_ray.schema.SPECTRA_SCHEMA`; what an older version of
    the files does not have is null. Runs that have not written anything give an empty table.

    Raises ReadError for a path that is no run, an unknown column, a filter that does not apply, a file that
    is damaged, or one of a newer version.

    >>> import tempfile
    >>> run = tempfile.mkdtemp()
    >>> Storage(run).write_atomic("run.json", b"{}")
    >>> read_spectra(run, columns=["step", "layer", "saturation"], filters=[("phase", "==", "eval")]).shape
    (0, 3)
    """
    return _read(SPECTRA, paths, columns, filters, attempts)


def read_covariances(
    paths: RunPath | Iterable[RunPath],
    columns: Sequence[str] | None = None,
    filters: Filters | None = None,
    *,
    attempts: str = "latest",
) -> pa.Table:
    """The means and packed covariances of one or several runs; everything else as in `read_spectra`.

    `covariance` is the upper triangle, row-major, d(d+1)/2 values in float64;
    `delve_ray.moments.unpack_triangle` makes a matrix of it. A step that a later attempt or revision
    published without covariances has none: those of before describe other observations than its spectra.
    """
    return _read(COVARIANCES, paths, columns, filters, attempts)


def read_scalars(
    paths: RunPath | Iterable[RunPath],
    columns: Sequence[str] | None = None,
    filters: Filters | None = None,
    *,
    attempts: str = "latest",
) -> pa.Table:
    """What `add_scalar` recorded, one row per (run, name, step, rank), sorted so; else as `read_spectra`.

    The latest attempt that recorded a name at a step holds, and of a rank that did so twice the later value.
    """
    return _read(SCALARS, paths, columns, filters, attempts)


def _read(
    kind: Kind,
    paths: RunPath | Iterable[RunPath],
    columns: Sequence[str] | None,
    filters: Filters | None,
    attempts: str,
) -> pa.Table:
    if attempts not in ("latest", "all"):
        raise ReadError(f"attempts={attempts!r} is neither 'latest' nor 'all'")
    kind = kind.of_each_attempt() if attempts == "all" else kind
    if isinstance(columns, str):
        columns = [columns]
    wanted = kind.schema.names if columns is None else list(columns)
    for name in wanted:
        if name not in kind.schema.names:
            raise ReadError(f"columns: no column {name!r} in {kind.folder}; valid: {', '.join(kind.schema.names)}")
    expression = _expression(filters)
    tables = [_read_run(run, kind, wanted, expression) for run in find_runs(paths, kind.folder)]
    table = pa.concat_tables(tables)
    if len(tables) > 1:
        table = take(table, np.argsort(_codes(table, kind.order), kind="stable"))
    return table.select(wanted).replace_schema_metadata(kind.schema.metadata)


def _expression(filters: Filters | None) -> pc.Expression | None:
    """The filter as an expression; no tuples are no filter."""
    if filters is None or isinstance(filters, pc.Expression):
        return filters
    try:
        return pq.filters_to_expression(filters) if len(filters) else None
    except (TypeError, ValueError) as error:
        wanted = "an expression of pyarrow.compute, or tuples (column, operator, value)"
        raise ReadError(f"filters={filters!r}: {error}; expected {wanted}") from error


def _read_run(run: Storage, kind: Kind, wanted: Sequence[str], expression: pc.Expression | None) -> pa.Table:
    for _ in range(TRIES):
        try:
            return _read_run_once(run, kind, wanted, expression)
        except FileNotFoundError as error:  # a live revision was superseded, and its successor is there
            gone = error
    raise ReadError(f"{run.uri}: files went while they were read, {TRIES} times ({gone}); try again") from gone


def _read_run_once(run: Storage, kind: Kind, wanted: Sequence[str], expression: pc.Expression | None) -> pa.Table:
    """The rows of one run that hold and pass the filter, sorted.

    The long list columns, and with a filter all that it does not need, are read for these rows alone.
    """
    filtered = _mentioned(kind, expression)
    first = {*kind.keys, *filtered}
    if expression is None:
        first.update(name for name in wanted if not pa.types.is_list(kind.schema.field(name).type))
    # A covariance must not outlive its spectrum, so the spectra's keys count, too. They are read first, because
    # a writer puts covariances first: what is replaced meanwhile can then not seem to be without any.
    paired = kind.folder == COVARIANCES.folder
    spectra = read_files(run, SPECTRA, list_files(run, SPECTRA), kind.keys)[0] if paired else None
    files = list_files(run, kind)
    table, counts = read_files(run, kind, files, [name for name in kind.schema.names if name in first])
    table = table.append_column(_ROW, pa.array(np.arange(table.num_rows)))
    rows = _current(table, spectra, kind)
    if expression is not None:
        passes = np.zeros(table.num_rows, np.bool_)
        passes[_passing(table.select([*filtered, _ROW]), kind, expression)] = True
        rows = rows[passes[rows]]
    table = take(table, rows)
    others = [name for name in dict.fromkeys(wanted) if name not in first]
    return _append_columns(table, run, kind, files, np.cumsum(counts), others) if others else table


def _mentioned(kind: Kind, expression: pc.Expression | None) -> list[str]:
    """The columns an expression needs; rather too many than too few, as only its text tells."""
    if expression is None:
        return []
    text = str(expression)
    return [name for name in kind.schema.names if name in text or "FieldPath(" in text]


def _passing(table: pa.Table, kind: Kind, expression: pc.Expression) -> I64:
    """The row numbers that pass, in any order: Arrow filters in parallel."""
    try:
        passing: I64 = table.filter(expression).column(_ROW).to_numpy()
    except (pa.ArrowException, TypeError) as error:
        unknown = re.match(r"No match for FieldRef\.Name\((.*?)\)", str(error))
        reason = f"no column {unknown[1]!r} in {kind.folder}" if unknown else str(error).partition("\n")[0]
        raise ReadError(f"filters: {reason}; valid columns: {', '.join(kind.schema.names)}") from error
    return passing


def _current(table: pa.Table, others: pa.Table | None, kind: Kind) -> I64:
    """Indices of the rows of `table` that hold, sorted. `others` only replaces rows, and gives none."""
    keys = table.select(kind.keys)
    if others is not None:
        keys = pa.concat_tables([keys, others.select(kind.keys)])
    version = _codes(keys, kind.version)
    groups, group = np.unique(_codes(keys, kind.group), return_inverse=True)
    newest = np.zeros(groups.size, np.int64)
    np.maximum.at(newest, group, version)
    rows = np.flatnonzero((version == newest[group])[: table.num_rows])
    item = _codes(keys, (*kind.group, *kind.item))[rows]
    by_age = np.lexsort((_codes(keys, ("wall_time",))[rows], item))
    last = np.append(np.diff(item[by_age]) != 0, True)[: rows.size]
    rows = np.sort(rows[by_age[last]])
    return rows[np.argsort(_codes(keys, kind.order)[rows], kind="stable")]


def _codes(table: pa.Table, names: Sequence[str]) -> I64:
    """One integer per row that compares as the tuple of the row's values in `names` does; null comes first."""
    codes = np.zeros(table.num_rows, np.int64)
    for name in names:
        encoded = table.column(name).combine_chunks().dictionary_encode()
        rank = np.zeros(len(encoded.dictionary) + 1, np.int64)
        rank[pc.array_sort_indices(encoded.dictionary).to_numpy()] = np.arange(1, rank.size)
        codes = codes * rank.size + rank[encoded.indices.fill_null(rank.size - 1).to_numpy(zero_copy_only=False)]
    return codes


def _append_columns(
    table: pa.Table, run: Storage, kind: Kind, files: Sequence[str], ends: I64, names: Sequence[str]
) -> pa.Table:
    """`table` with more columns of its rows, whose numbers count through the files; `ends` is where each file's end."""
    row = table.column(_ROW).to_numpy()
    order = np.argsort(row)
    file = np.searchsorted(ends, row[order], side="right")
    first = np.flatnonzero(np.diff(file, prepend=-1))  # where in `order` the rows of each file begin
    rows = np.split(row[order] - np.append(0, ends)[file], first[1:])
    read = partial(read_rows, run, kind, names)
    pieces = in_parallel(run, read, [files[index] for index in file[first]], rows)
    empty = pa.schema([kind.schema.field(name) for name in names]).empty_table()
    more = take(pa.concat_tables([empty, *pieces]), np.argsort(order))
    for name in names:
        table = table.append_column(kind.schema.field(name), more.column(name))
    return table
