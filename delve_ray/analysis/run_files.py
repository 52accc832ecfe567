"""The files of run directories: finding them, opening them, their rows under one schema."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from delve_ray.analysis.keys import I64, int64_array
from delve_ray.errors import OptionError, ReadError
from delve_ray.schema import (
    COVARIANCES_SCHEMA,
    EMBEDDINGS_SCHEMA,
    SCALARS_SCHEMA,
    SCHEMA_VERSION,
    SPECTRA_SCHEMA,
    VERSION_KEY,
)
from delve_ray.storage import Storage

RunPath: TypeAlias = str | os.PathLike[str] | Storage

MAX_DEPTH = 8
"""How many directories deep a sweep is searched for runs."""
LOCAL_THREADS = min(8, os.cpu_count() or 1)
"""Files read at a time from a local directory: Arrow decodes without Python's lock."""
REMOTE_THREADS = 16
"""Files read at a time where each costs a round trip."""
MAX_LIST_VALUES = 2**31 - 1
"""What one chunk of an Arrow list column can hold."""


@dataclass(frozen=True)
class Kind:
    """One kind of file: of the rows that agree in `group`, those of the highest `version` hold, one per `item`."""

    folder: str
    schema: pa.Schema
    group: tuple[str, ...]
    version: tuple[str, ...]
    item: tuple[str, ...]
    order: tuple[str, ...]

    @property
    def keys(self) -> list[str]:
        """The columns that decide which rows hold; the later wall_time settles what is left."""
        return [*self.group, *self.version, *self.item, "wall_time"]

    def of_each_attempt(self) -> Kind:
        """The same, but that each attempt has rows of its own."""
        version = tuple(name for name in self.version if name != "attempt")
        return replace(self, group=(*self.group, "attempt"), version=version, order=(*self.order, "attempt"))


_WINDOW = ("run", "phase", "step")
_REVISION = ("attempt", "revision")
SPECTRA = Kind("spectra", SPECTRA_SCHEMA, _WINDOW, _REVISION, ("layer",), _WINDOW)
COVARIANCES = Kind("covariances", COVARIANCES_SCHEMA, _WINDOW, _REVISION, ("layer",), _WINDOW)
EMBEDDINGS = Kind("embeddings", EMBEDDINGS_SCHEMA, _WINDOW, _REVISION, ("layer", "point"), _WINDOW)
SCALARS = Kind(
    "scalars", SCALARS_SCHEMA, ("run", "name", "step"), ("attempt",), ("rank",), ("run", "name", "step", "rank")
)


def find_runs(paths: RunPath | Iterable[RunPath], folder: str = "spectra") -> list[Storage]:
    """The run directories that `paths` name or hold below them, each once.

    A run is a directory with run.json, spectra/ or `folder`; below a run no others are looked for. Raises
    ReadError for a path without any.
    """
    given = [paths] if isinstance(paths, (str, os.PathLike, Storage)) else list(paths)
    if not given:
        raise ReadError(f"paths={paths!r}: name at least one run directory")
    found: dict[str, Storage] = {}
    for path in given:
        try:
            root = path if isinstance(path, Storage) else Storage(path)
        except OptionError as error:
            raise ReadError(f"paths: {error}") from error
        with _reading(root.uri, "a directory of runs", "give the savefile of a run, or a directory above"):
            below = list(_search(root, folder))
            if not below:
                why = "neither run.json nor spectra/ in it or below it" if root.exists() else "it does not exist"
                raise ReadError(f"{root.uri}: no run there, {why}; give the savefile of a run, or a directory above")
        for run in below:  # once, though links such as "latest" may lead to it, too
            found.setdefault(os.path.realpath(run.local_path) if run.is_local else run.uri, run)
    return list(found.values())


def _search(root: Storage, folder: str) -> Iterator[Storage]:
    level = [root]
    for _ in range(MAX_DEPTH):
        below: list[Storage] = []
        for directory in level:
            names = directory.list_directories()
            if folder in names or "spectra" in names or directory.exists("run.json"):
                yield directory
            else:
                below.extend(directory.child(name) for name in names)
        level = below


def list_files(run: Storage, kind: Kind) -> list[str]:
    """The names of the run's files of a kind, sorted; none where there is no such directory."""
    with _reading(f"{run.uri}/{kind.folder}", "a directory", "restore or remove it"):
        return run.list_files(kind.folder, ".parquet")


def read_files(run: Storage, kind: Kind, files: Sequence[str], columns: Sequence[str]) -> tuple[pa.Table, I64]:
    """The files' rows below each other, and how many each has."""
    tables = in_parallel(run, partial(_read_file, run, kind, columns), files)
    return below_each_other(kind, columns, tables), np.array([table.num_rows for table in tables], np.int64)


def below_each_other(kind: Kind, columns: Sequence[str], tables: Iterable[pa.Table]) -> pa.Table:
    """One table of these columns, without rows where there is no table."""
    empty = pa.Table.from_batches([], pa.schema([kind.schema.field(name) for name in columns]))
    return pa.concat_tables([empty, *tables])


def in_parallel(run: Storage, read: Callable[..., pa.Table], *arguments: Iterable[Any]) -> list[pa.Table]:
    """`map(read, *arguments)`, with as many files of the run open at a time as suits its filesystem."""
    files = list(zip(*arguments, strict=True))
    threads = LOCAL_THREADS if run.is_local else REMOTE_THREADS
    # Handing a file to another thread takes as long as opening a local one.
    size = max(1, len(files) // (8 * threads)) if run.is_local else 1
    batches = [files[start : start + size] for start in range(0, len(files), size)]
    with ThreadPoolExecutor(threads) as pool:
        found = pool.map(lambda batch: [read(*each) for each in batch], batches)
        return [table for tables in found for table in tables]


def _read_file(run: Storage, kind: Kind, columns: Sequence[str], name: str) -> pa.Table:
    with _open(run, kind, name) as (file, present):
        table = file.read([column for column in columns if column in present], use_threads=False)
        return _conform(table, kind.schema, columns, file.metadata.num_rows)


def read_rows(run: Storage, kind: Kind, columns: Sequence[str], name: str, rows: I64) -> pa.Table:
    """Some rows of a file, by their ascending numbers; only the row groups that hold them are read."""
    with _open(run, kind, name) as (file, present):
        sizes = np.array([file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)])
        ends = np.cumsum(sizes)
        if rows[-1] >= ends[-1]:
            raise FileNotFoundError(f"{run.uri}/{name} was replaced")
        group = np.searchsorted(ends, rows, side="right")
        used = np.unique(group)
        named = [column for column in columns if column in present]
        table = file.read_row_groups(used.tolist(), named, use_threads=False)
        table = _conform(table, kind.schema, columns, int(sizes[used].sum()))
        skipped = (ends - sizes)[used] - (np.cumsum(sizes[used]) - sizes[used])
        return take(table, rows - skipped[np.searchsorted(used, group)])


def take(table: pa.Table, rows: I64) -> pa.Table:
    """The rows of a table by their numbers, in that order."""
    if rows.size == table.num_rows and np.array_equal(rows, np.arange(rows.size)):
        return table
    return pa.table([_take_column(column, rows) for column in table.columns], schema=table.schema)


def _take_column(column: pa.ChunkedArray, rows: I64) -> pa.ChunkedArray:
    if not pa.types.is_list(column.type) or (pc.sum(pc.list_value_length(column)).as_py() or 0) <= MAX_LIST_VALUES:
        return column.take(int64_array(rows))
    # Arrow would join the chunks, which does not fit one chunk: the rows are long, so a chunk each is cheap.
    ends = np.cumsum([len(chunk) for chunk in column.chunks])
    chunk_of = np.searchsorted(ends, rows, side="right")
    pieces = [
        column.chunk(c).slice(row - ends[c] + len(column.chunk(c)), 1) for c, row in zip(chunk_of, rows, strict=True)
    ]
    return pa.chunked_array(pieces, type=column.type)


def _conform(table: pa.Table, schema: pa.Schema, columns: Sequence[str], rows: int) -> pa.Table:
    """The columns with the schema's types; what an older version of the schema did not have is null."""
    fields = [schema.field(name) for name in columns]
    present = dict(zip(table.column_names, table.columns, strict=True))
    arrays = [
        _typed(present[field.name], field.type) if field.name in present else pa.nulls(rows, field.type)
        for field in fields
    ]
    return pa.table(arrays, schema=pa.schema(fields))


def _typed(column: pa.ChunkedArray, wanted: pa.DataType) -> pa.ChunkedArray:
    return column if column.type == wanted else column.cast(wanted)


@contextmanager
def _open(run: Storage, kind: Kind, name: str) -> Iterator[tuple[pq.ParquetFile, set[str]]]:
    """A file of the run and its columns, once its version is known to be readable."""
    where = f"{run.uri}/{name}"
    remedy = "restore it, or remove it to read the rest"
    with _reading(where, "Parquet", remedy, run, name), run.open_input(name) as stream:
        file = pq.ParquetFile(stream, page_checksum_verification=True)
        present = set(file.schema_arrow.names)
        _check_version(where, kind, (file.metadata.metadata or {}).get(VERSION_KEY), present)
        yield file, present


def _check_version(where: str, kind: Kind, version: bytes | None, present: set[str]) -> None:
    """Raise ReadError for a file of a newer version, and for one that is not of this kind at all."""
    if version is not None and not version.isdigit():
        raise ReadError(f"{where}: schema version {version!r} is no number; the file is damaged, remove it")
    number = SCHEMA_VERSION if version is None else int(version)
    if number > SCHEMA_VERSION:
        raise ReadError(
            f"{where}: schema version {number} is newer than {SCHEMA_VERSION}, the newest that this delve_ray reads; "
            "upgrade it (pip install --upgrade delve-ray)"
        )
    lacking = sorted({*kind.group, *kind.item} - present)
    if lacking and number == SCHEMA_VERSION:
        raise ReadError(f"{where} has no {', '.join(lacking)}: not written by delve_ray, or damaged; remove it")


@contextmanager
def _reading(where: str, what: str, remedy: str, run: Storage | None = None, name: str = "") -> Iterator[None]:
    """Turn what a filesystem or Arrow raises into a ReadError; a file that went stays FileNotFoundError, or becomes
    one: an open file of an object store is none, and its parts are asked for one by one.

    UnicodeDecodeError is what pyarrow makes of a column's name in a damaged footer.
    """
    try:
        yield
    except (FileNotFoundError, ReadError):
        raise
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        if run is not None and not run.is_local and _gone(run, name):
            raise FileNotFoundError(f"{where} was removed") from error
        raise ReadError(f"{where} cannot be read as {what} ({error}); {remedy}") from error


def _gone(run: Storage, name: str) -> bool:
    try:
        return not run.exists(name)
    except (OSError, pa.ArrowException):
        return False
