"""Parquet: one file of spectra per window and revision, one of covariances and embeddings where they are asked for."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterator, Sequence
from datetime import UTC
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from delve_ray.schema import (
    COVARIANCES_SCHEMA,
    EMBEDDINGS_SCHEMA,
    EXTRA_STATS,
    INTEGER_STATS,
    SCALAR_STATS,
    SCALARS_SCHEMA,
    SHARDS_KEY,
    SPECTRA_SCHEMA,
    LayerRow,
    PublishedWindow,
)
from delve_ray.storage import Storage
from delve_ray.writers.base import Scalar, WriterRun

log = logging.getLogger(__name__)

_FILE_NAME = re.compile(r"([0-9]{6,})-([0-9]{10,})-([0-9]{6,})\.parquet")
"""Attempt, window, revision."""
_BESIDE = ("covariances", "embeddings")
"""Folders of what goes with some spectra, in files of the same names."""
_ROW_FIELDS = (
    "phase",
    "layer",
    "layer_type",
    "features",
    "samples",
    "nonfinite_rows",
    "samples_per_feature",
    "undersampled",
    "threshold",
    "alpha_r2",
    "alpha_from",
    "alpha_to",
    "mean_norm",
    "sketched",
    "saturation_low",
    "saturation_high",
    "unseen_variance",
)
_WINDOW_FIELDS = (
    "run",
    "trial",
    "trial_config",
    "attempt",
    "step",
    "workers",
    "world_size",
    "revision",
    "final",
    "wall_time",
)


class ParquetWriter:
    """Writes windows to `spectra/`, `covariances/` and `embeddings/`, user scalars to `scalars/`, under a storage.

    A window becomes `spectra/<attempt>-<window>-<revision>.parquet`, and, for the rows that carry a
    covariance or an embedding, a file of the same name in `covariances/` or `embeddings/`. The spectra come last: a
    crash in between leaves covariances ahead of their spectra, never a spectrum without its covariance. Once a newer
    revision is there, the files of the older ones are deleted, those of an earlier process, too: the
    directories are listed once, before the first window. A file that cannot be deleted does not fail the
    window; it is harmless, because readers take the highest revision, and is tried again with the next one.

    What is written again, by this or by another process, replaces its own file: a window is named by its
    revision, and user scalars `scalars/<attempt>-<hash>.parquet` by what they say.

    Columns are those of `delve_ray.schema`. A statistic that a row does not have is null; NaN and the
    infinities are kept. A window without rows writes nothing. Raises OSError when the storage does.
    """

    name = "parquet"

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._revisions: dict[tuple[int, int], set[int]] | None = None  # on disk, as far as this writer knows
        self._kept_files = False  # whether one could not be deleted

    def open(self, run: WriterRun) -> None:
        """Nothing to prepare: a file is made when there is something to write."""

    def write(self, window: PublishedWindow) -> None:
        """Write one revision of one window; the files of its older revisions go."""
        if not window.rows:
            return
        # Noted before anything is written, so that what a failed write left behind goes with the next revision.
        revisions = self._known_revisions().setdefault((window.attempt, window.window), set())
        revisions.add(window.revision)
        name = _file_name(window.attempt, window.window, window.revision)
        with_covariance = [row for row in window.rows if row.covariance is not None]
        if with_covariance:
            # One row group per layer: whoever asks for one layer's matrix reads that one alone.
            self._put(f"covariances/{name}", covariances_table(window, with_covariance), row_group_size=1)
        embedded = [row for row in window.rows if row.embedding is not None]
        if embedded:
            self._put(f"embeddings/{name}", embeddings_table(window, embedded))
        self._put(f"spectra/{name}", spectra_table(window))
        for older in sorted(revision for revision in revisions if revision < window.revision):
            if not self._delete(_file_name(window.attempt, window.window, older)):
                break
            revisions.discard(older)

    def write_scalars(self, scalars: list[Scalar]) -> None:
        """Write user scalars, one file per attempt and call."""
        for attempt in sorted({scalar.attempt for scalar in scalars}):
            own = [scalar for scalar in scalars if scalar.attempt == attempt]
            self._put(f"scalars/{attempt:06d}-{_content_hash(own)}.parquet", _scalars_table(own))

    def close(self) -> None:
        """Nothing to release: every file was complete when its call returned."""

    def _known_revisions(self) -> dict[tuple[int, int], set[int]]:
        if self._revisions is None:
            found: dict[tuple[int, int], set[int]] = {}
            # A crash may have left covariances without their spectra.
            for folder in ("spectra", *_BESIDE):
                for attempt, window, revision in _listed(self._storage, folder):
                    found.setdefault((attempt, window), set()).add(revision)
            self._revisions = found
        return self._revisions

    def _delete(self, name: str) -> bool:
        """Delete the files of a superseded revision; whether they are gone."""
        try:
            # In this order, because a spectrum is never without its covariance.
            for folder in ("spectra", *_BESIDE):
                self._storage.delete(f"{folder}/{name}")
        except (OSError, pa.ArrowException) as error:
            if not self._kept_files:
                log.warning("%s: superseded files stay, such as %s (%s)", self._storage.uri, name, error)
            self._kept_files = True
            return False
        return True

    def _put(self, name: str, table: pa.Table, row_group_size: int | None = None) -> None:
        sink = pa.BufferOutputStream()
        text = [field.name for field in table.schema if pa.types.is_string(field.type)]
        # Dictionaries pay for repeated names, not for eigenvalues that hardly ever repeat.
        pq.write_table(
            table,
            sink,
            compression="zstd",
            use_dictionary=text,
            row_group_size=row_group_size,
            write_page_checksum=True,
        )
        self._storage.write_atomic(name, sink.getvalue())


def window_file(folder: str, attempt: int, window: int, revision: int) -> str:
    """Where the spectra, covariances or embeddings of a window's revision lie, below the savefile."""
    return f"{folder}/{_file_name(attempt, window, revision)}"


def revisions(storage: Storage, folders: Sequence[str] = ("spectra", *_BESIDE)) -> dict[tuple[int, int], int]:
    """The highest revision on disk of every window, by (attempt, window), as the files' names tell it.

    A crash may have left covariances without their spectra. Files under other names are left out. Raises OSError when
    the storage does.
    """
    highest: dict[tuple[int, int], int] = {}
    for folder in folders:
        for attempt, window, revision in _listed(storage, folder):
            highest[attempt, window] = max(revision, highest.get((attempt, window), 0))
    return highest


def spectra_table(window: PublishedWindow) -> pa.Table:
    """The rows of a window as a table of `SPECTRA_SCHEMA`, in their order."""
    rows = window.rows
    columns = _shared_columns(window, rows)
    for stat in (*SCALAR_STATS, *EXTRA_STATS):
        columns[stat] = [_stat(row, stat) for row in rows]
    columns["thresholds"] = _lists([np.asarray(row.thresholds, np.float64) for row in rows])
    columns["intrinsic_dimensionalities"] = _lists(
        [np.asarray(row.intrinsic_dimensionalities, np.int32) for row in rows]
    )
    columns["eigenvalues"] = _lists([np.asarray(row.eigenvalues, np.float64) for row in rows])
    table = _table(columns, SPECTRA_SCHEMA)
    if not window.shards:
        return table
    shards = json.dumps([[shard, *said] for shard, said in sorted(window.shards.items())])
    return table.replace_schema_metadata({**table.schema.metadata, SHARDS_KEY: shards.encode()})


def covariances_table(window: PublishedWindow, rows: Sequence[LayerRow]) -> pa.Table:
    """The rows' means and packed covariances as a table of `COVARIANCES_SCHEMA`; each row must have one."""
    columns = _shared_columns(window, rows)
    columns["mean"] = _lists([np.asarray(row.mean, np.float64) for row in rows])
    # One chunk per row: the matrices are not copied, and together may exceed a list column's 2^31 values.
    columns["covariance"] = pa.chunked_array([_lists([np.asarray(row.covariance, np.float64)]) for row in rows])
    return _table(columns, COVARIANCES_SCHEMA)


def embeddings_table(window: PublishedWindow, rows: Sequence[LayerRow]) -> pa.Table:
    """The rows' embeddings as a table of `EMBEDDINGS_SCHEMA`, a row for each point; each row must have one."""
    points = [np.asarray(row.embedding, np.float64) for row in rows]
    counts = np.array([point.shape[0] for point in points])
    of_row = pa.array(np.repeat(np.arange(len(rows)), counts))
    shared = _shared_columns(window, rows)
    schema = EMBEDDINGS_SCHEMA
    columns = {name: pa.array(shared[name], schema.field(name).type) for name in schema.names if name in shared}
    columns = {name: column.take(of_row) for name, column in columns.items()}
    columns["point"] = np.concatenate([np.arange(count, dtype=np.int32) for count in counts])
    columns["x"], columns["y"] = np.concatenate(points).T
    return _table(columns, schema)


def _shared_columns(window: PublishedWindow, rows: Sequence[LayerRow]) -> dict[str, Any]:
    columns: dict[str, Any] = {name: [getattr(window, name)] * len(rows) for name in _WINDOW_FIELDS}
    columns.update({name: [getattr(row, name) for row in rows] for name in _ROW_FIELDS})
    return columns


def _stat(row: LayerRow, stat: str) -> float | int | None:
    value = row.stats.get(stat)
    if value is None or stat not in INTEGER_STATS:
        return value
    return int(value) if np.isfinite(value) else None  # an integer column has no NaN but null


def _lists(arrays: Sequence[npt.NDArray[Any]]) -> pa.ListArray:
    """A list column of one-dimensional arrays."""
    offsets = np.zeros(len(arrays) + 1, np.int32)
    np.cumsum([array.size for array in arrays], out=offsets[1:])
    return pa.ListArray.from_arrays(offsets, np.concatenate(arrays) if len(arrays) != 1 else arrays[0])


def _table(columns: dict[str, Any], schema: pa.Schema) -> pa.Table:
    return pa.table({field.name: columns[field.name] for field in schema}, schema=schema)


def _scalars_table(scalars: Sequence[Scalar]) -> pa.Table:
    columns = {name: [getattr(scalar, name) for scalar in scalars] for name in SCALARS_SCHEMA.names}
    return _table(columns, SCALARS_SCHEMA)


def _file_name(attempt: int, window: int, revision: int) -> str:
    return f"{attempt:06d}-{window:010d}-{revision:06d}.parquet"


def _listed(storage: Storage, folder: str) -> Iterator[tuple[int, int, int]]:
    """Attempt, window and revision of the files in a folder, by their names."""
    for path in storage.list_files(folder, ".parquet"):
        name = path.rpartition("/")[2]
        if match := _FILE_NAME.fullmatch(name):
            attempt, window, revision = map(int, match.groups())
            if _file_name(attempt, window, revision) == name:  # no digits too many
                yield attempt, window, revision


def _content_hash(scalars: Sequence[Scalar]) -> str:
    """The same for the same scalars in the same order, in every process."""
    digest = hashlib.sha256()
    for scalar in scalars:
        values = [getattr(scalar, name) for name in SCALARS_SCHEMA.names if name not in ("value", "wall_time")]
        values += [float(scalar.value).hex(), scalar.wall_time.astimezone(UTC).isoformat()]
        digest.update(json.dumps(values).encode() + b"\n")
    return digest.hexdigest()[:32]
