"""Parquet: one file of spectra per window and revision, one of covariances where they were asked for."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from delve_ray.schema import (
    COVARIANCES_SCHEMA,
    EXTRA_STATS,
    INTEGER_STATS,
    SCALAR_STATS,
    SCALARS_SCHEMA,
    SPECTRA_SCHEMA,
    LayerRow,
    PublishedWindow,
)
from delve_ray.storage import Storage
from delve_ray.writers.base import Scalar

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
    """Writes windows to `spectra/` and `covariances/`, user scalars to `scalars/`, under a storage.

    A window becomes `spectra/<attempt>-<window>-<revision>.parquet`, and, for the rows that carry a
    covariance, a file of the same name in `covariances/`. The covariances come first: a crash between the
    two leaves covariances ahead of their spectra, never a spectrum without its covariance. Once a newer
    revision is there, the files of the revisions that this writer wrote before it are deleted; what a
    crash leaves behind is harmless, because readers take the highest revision.

    Columns are those of `delve_ray.schema`. A statistic that a row does not have is null; NaN and the
    infinities are kept. A window without rows writes nothing. Raises OSError when the storage does.
    """

    name = "parquet"

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._revisions: dict[tuple[int, int], set[int]] = {}
        self._scalar_files = 0

    def write(self, window: PublishedWindow) -> None:
        """Write one revision of one window; the files of its older revisions go."""
        if not window.rows:
            return
        # Noted before anything is written, so that what a failed write left behind goes with the next revision.
        revisions = self._revisions.setdefault((window.attempt, window.window), set())
        revisions.add(window.revision)
        name = _file_name(window.attempt, window.window, window.revision)
        with_covariance = [row for row in window.rows if row.covariance is not None]
        if with_covariance:
            # One row group per layer: whoever asks for one layer's matrix reads that one alone.
            self._put(f"covariances/{name}", covariances_table(window, with_covariance), row_group_size=1)
        self._put(f"spectra/{name}", spectra_table(window))
        for older in [revision for revision in revisions if revision < window.revision]:
            name = _file_name(window.attempt, window.window, older)
            self._storage.delete(f"spectra/{name}")
            self._storage.delete(f"covariances/{name}")
            revisions.discard(older)

    def write_scalars(self, scalars: list[Scalar]) -> None:
        """Write user scalars, one file per attempt and call."""
        for attempt in sorted({scalar.attempt for scalar in scalars}):
            table = _scalars_table([scalar for scalar in scalars if scalar.attempt == attempt])
            # The counter keeps a writer's files in order; the rest keeps restarted writers apart.
            unique = f"{self._scalar_files:010d}-{uuid.uuid4().hex[:12]}"
            self._scalar_files += 1
            self._put(f"scalars/{attempt:06d}-{unique}.parquet", table)

    def close(self) -> None:
        """Nothing to release: every file was complete when its call returned."""

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
    return _table(columns, SPECTRA_SCHEMA)


def covariances_table(window: PublishedWindow, rows: Sequence[LayerRow]) -> pa.Table:
    """The rows' means and packed covariances as a table of `COVARIANCES_SCHEMA`; each row must have one."""
    columns = _shared_columns(window, rows)
    columns["mean"] = _lists([np.asarray(row.mean, np.float64) for row in rows])
    # One chunk per row: the matrices are not copied, and together may exceed a list column's 2^31 values.
    columns["covariance"] = pa.chunked_array([_lists([np.asarray(row.covariance, np.float64)]) for row in rows])
    return _table(columns, COVARIANCES_SCHEMA)


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
