"""What a front before this one has written, read back: where some shards publish again, the files have the others."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from delve_ray.schema import EXTRA_STATS, F64, SCALAR_STATS, SHARDS_KEY, LayerRow, PublishedWindow
from delve_ray.storage import Storage
from delve_ray.writers.parquet import revisions, window_file

_AS_THEY_ARE = (
    "layer",
    "layer_type",
    "phase",
    "features",
    "samples",
    "nonfinite_rows",
    "threshold",
    "alpha_r2",
    "alpha_from",
    "alpha_to",
    "sketched",
    "saturation_low",
    "saturation_high",
    "unseen_variance",
)
"""Columns that are attributes of a row under the same name."""


@dataclass(frozen=True, slots=True)
class Earlier:
    """A window that the files have as final: which one, at which revision, and whether that is all there is of it.

    It is not where a rank had not closed it, or where a crash has left a newer revision's covariances alone. `shards`
    has `workers` and `complete` of each shard's part.
    """

    attempt: int
    window: int
    revision: int
    step: int
    complete: bool
    shards: Mapping[int, tuple[int, bool]]


def final_windows(storage: Storage, keys: Iterable[tuple[int, int]]) -> Iterator[Earlier]:
    """Those of these windows, by (attempt, window), that the files have as final, in order."""
    wanted = sorted(keys)
    if not wanted:
        return
    newest, begun = revisions(storage, ("spectra",)), revisions(storage)
    for attempt, window in wanted:
        if (attempt, window) not in newest:  # a crash has left covariances alone
            continue
        revision = newest[attempt, window]
        with storage.open_input(window_file("spectra", attempt, window, revision)) as stream:
            file = pq.ParquetFile(stream)
            rows = file.read(["final", "workers", "world_size", "step"]).slice(0, 1).to_pylist()
            said = json.loads((file.schema_arrow.metadata or {}).get(SHARDS_KEY, b"[]"))
        for row in rows:
            if row["final"]:
                complete = row["workers"] >= row["world_size"] and begun[attempt, window] == revision
                shards = {shard: (workers, closed) for shard, workers, closed in said}
                yield Earlier(attempt, window, revision, row["step"], complete, shards)


def read_parts(storage: Storage, earlier: Earlier, assigned: Mapping[str, int]) -> dict[int, PublishedWindow]:
    """The parts that a written window was made of, by shard, with a revision below all that shards give.

    `assigned` has the shard of each layer, by name.
    Of rows without a covariance the norm of the mean is known, but not the mean: it stands there as one number.
    Raises OSError or ArrowException where the files cannot be read.
    """
    where = earlier.attempt, earlier.window, earlier.revision
    rows = _read(storage, window_file("spectra", *where))
    matrices = _by_layer(_read_beside(storage, window_file("covariances", *where)))
    points = _by_layer(_read_beside(storage, window_file("embeddings", *where)))
    parts = {}
    for shard, (workers, complete) in earlier.shards.items():
        own = [row for row in rows if assigned[row["layer"]] == shard]
        parts[shard] = PublishedWindow(
            **{name: rows[0][name] for name in ("run", "attempt", "step", "world_size", "wall_time")},
            workers=workers,
            window=earlier.window,
            revision=-1,
            final=True,
            rows=[_layer_row(row, matrices.get(_key(row)), points.get(_key(row))) for row in own],
            complete=complete,
        )
    return parts


def _read(storage: Storage, name: str) -> list[dict[str, Any]]:
    with storage.open_input(name) as stream:
        rows: list[dict[str, Any]] = pq.ParquetFile(stream).read().to_pylist()
    return rows


def _read_beside(storage: Storage, name: str) -> list[dict[str, Any]]:
    """What lies beside some spectra; nothing where it was not asked for."""
    try:
        return _read(storage, name)
    except FileNotFoundError:
        return []


def _key(row: Mapping[str, Any]) -> tuple[str, str]:
    return row["layer"], row["phase"]


def _by_layer(rows: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str], list[Mapping[str, Any]]]:
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(_key(row), []).append(row)
    return found


def _layer_row(
    row: Mapping[str, Any], matrix: Sequence[Mapping[str, Any]] | None, points: Sequence[Mapping[str, Any]] | None
) -> LayerRow:
    embedding: F64 | None = None
    if points:
        embedding = np.array([(point["x"], point["y"]) for point in sorted(points, key=lambda point: point["point"])])
    stats = {stat: row[stat] for stat in (*SCALAR_STATS, *EXTRA_STATS) if row[stat] is not None}
    return LayerRow(
        **{name: row[name] for name in _AS_THEY_ARE},
        stats=stats,
        eigenvalues=np.array(row["eigenvalues"], dtype=np.float64),
        mean=np.array(matrix[0]["mean"] if matrix else [row["mean_norm"]], dtype=np.float64),
        covariance=np.array(matrix[0]["covariance"], dtype=np.float64) if matrix else None,
        embedding=embedding,
        thresholds=tuple(row["thresholds"] or ()),
        intrinsic_dimensionalities=tuple(row["intrinsic_dimensionalities"] or ()),
    )
