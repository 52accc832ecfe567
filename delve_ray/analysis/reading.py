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

from delve_ray.analysis.keys import I64, Keys, dense, int64_array, numbers
from delve_ray.analysis.run_files import (
    COVARIANCES,
    EMBEDDINGS,
    SCALARS,
    SPECTRA,
    Kind,
    RunPath,
    below_each_other,
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
MANY_FILES = 100
MANY_COLUMNS = 8
"""From so many files on, opening one takes longer than reading so many columns of it: where that is all that the rows
which pass a filter need, it is read of all rows, and no file is opened twice."""
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
    return read(SPECTRA, paths, columns, filters, attempts)


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
    return read(COVARIANCES, paths, columns, filters, attempts)


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
    return read(SCALARS, paths, columns, filters, attempts)


def read(
    kind: Kind,
    paths: RunPath | Iterable[RunPath],
    columns: Sequence[str] | None,
    filters: Filters | None,
    attempts: str,
) -> pa.Table:
    """The rows of a kind of file; see `read_spectra`."""
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
        table = take(table, np.argsort(Keys(table).codes(kind.order), kind="stable"))
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
    # A covariance must not outlive its spectrum, so the spectra's keys count, too. They are read first, because
    # a writer puts covariances first: what is replaced meanwhile can then not seem to be without any.
    paired = kind.folder in (COVARIANCES.folder, EMBEDDINGS.folder)
    shared = [name for name in kind.keys if name in SPECTRA.schema.names]
    spectra = read_files(run, SPECTRA, list_files(run, SPECTRA), shared)[0] if paired else None
    files = list_files(run, kind)
    short = {name for name in wanted if not pa.types.is_list(kind.schema.field(name).type)} - first
    if expression is None or (len(files) > MANY_FILES and len(short) <= MANY_COLUMNS):
        first |= short
    table, counts = read_files(run, kind, files, [name for name in kind.schema.names if name in first])
    table = table.append_column(_ROW, int64_array(np.arange(table.num_rows)))
    keys = table.select(kind.keys)
    coded = Keys(keys if spectra is None else pa.concat_tables([keys, spectra], promote_options="default"))
    rows = _current(coded, table.num_rows, kind)
    if expression is not None:
        passes = np.zeros(table.num_rows, np.bool_)
        passes[_passing(table.select([*filtered, _ROW]), kind, expression)] = True
        rows = rows[passes[rows]]
    order = coded.codes(kind.order)[rows]
    if np.any(order[1:] < order[:-1]):
        rows = rows[np.argsort(order, kind="stable")]
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
        passing: I64 = numbers(table.filter(expression).column(_ROW))
    except (pa.ArrowException, TypeError) as error:
        unknown = re.match(r"No match for FieldRef\.Name\((.*?)\)", str(error))
        reason = f"no column {unknown[1]!r} in {kind.folder}" if unknown else str(error).partition("\n")[0]
        raise ReadError(f"filters: {reason}; valid columns: {', '.join(kind.schema.names)}") from error
    return passing


def _current(coded: Keys, count: int, kind: Kind) -> I64:
    """Ascending indices of the first `count` rows that hold; those behind them only replace rows."""
    version = coded.codes(kind.version)
    rows = np.arange(count)
    if version.size and version.min() < version.max():
        group = dense(coded.codes(kind.group))
        newest = np.zeros(group.max() + 1, np.int64)
        np.maximum.at(newest, group, version)
        rows = np.flatnonzero((version == newest[group])[:count])
    item = dense(coded.codes((*kind.group, *kind.item))[rows])
    if not item.size or np.bincount(item).max() == 1:
        return rows
    by_age = np.lexsort((coded.codes(("wall_time",))[rows], item))
    last = np.append(np.diff(item[by_age]) != 0, True)
    return np.sort(rows[by_age[last]])


def _append_columns(
    table: pa.Table, run: Storage, kind: Kind, files: Sequence[str], ends: I64, names: Sequence[str]
) -> pa.Table:
    """`table` with more columns of its rows, whose numbers count through the files; `ends` is where each file's end."""
    row = numbers(table.column(_ROW))
    order = np.argsort(row)
    file = np.searchsorted(ends, row[order], side="right")
    first = np.flatnonzero(np.diff(file, prepend=-1))  # where in `order` the rows of each file begin
    rows = np.split(row[order] - np.append(0, ends)[file], first[1:])[: first.size]
    read = partial(read_rows, run, kind, names)
    pieces = in_parallel(run, read, [files[index] for index in file[first]], rows)
    more = take(below_each_other(kind, names, pieces), np.argsort(order))
    for name in names:
        table = table.append_column(kind.schema.field(name), more.column(name))
    return table
