"""What a front before this one has written, read back from its files."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from delve_ray import read_spectra
from delve_ray.moments import Moments
from delve_ray.reservoir import Reservoir
from delve_ray.schema import PublishedWindow, window_metrics
from delve_ray.storage import Storage
from delve_ray.store.assignment import shards_of
from delve_ray.store.earlier import Earlier, final_windows, read_parts
from delve_ray.store.protocol import LayerInfo, StoreConfig
from delve_ray.store.publishing import layer_row
from delve_ray.store.window import Collected
from delve_ray.writers.parquet import ParquetWriter

LAYERS = [LayerInfo(name, "Linear", width) for name, width in zip("abc", (6, 3, 9), strict=True)]
ASSIGNED = {"a": 1, "b": 1, "c": 0}
"""The shard of each layer."""


def window(stats: tuple[str, ...] = ("trace", "alpha", "rankme", "cov", "embed"), **changes: Any) -> PublishedWindow:
    rng = np.random.default_rng(0)
    config = StoreConfig("r", "unused", 2, stats=stats, threshold=0.9, thresholds=(0.9, 0.99))
    rows = []
    for info in LAYERS:
        for phase in ("train", "eval"):
            values = rng.normal(size=(40, info.features or 0)) + 3
            moments = Moments.from_rows(values)
            found = Collected(40, 2, moments.mean, moments.packed(), 40.0)
            sample = Reservoir(rng.random(5), values[:5], 1.0) if "embed" in stats else None
            rows.append(layer_row(info, phase, found, config, sample))
    first = PublishedWindow("r", 1, 4, 7, 3, True, 2, 2, datetime.now(UTC), rows, complete=True)
    first = replace(first, shards=dict.fromkeys(range(2), (2, True)))
    return replace(first, **changes)


def test_the_parts_of_all_shards_make_the_window_that_was_written(tmp_path: Path) -> None:
    storage, written = Storage(tmp_path), window()
    ParquetWriter(storage).write(written)
    (earlier,) = final_windows(storage, [(1, 4)])
    assert earlier == Earlier(
        attempt=1, window=4, revision=3, step=7, complete=True, shards={0: (2, True), 1: (2, True)}
    )
    parts = read_parts(storage, earlier, ASSIGNED)
    found = {(row.layer, row.phase): row for part in parts.values() for row in part.rows}
    assert set(parts) == {0, 1}
    for shard, part in parts.items():
        assert {row.layer for row in part.rows} == {name for name, where in ASSIGNED.items() if where == shard}
        assert (part.revision, part.final, part.workers, part.complete, part.step) == (-1, True, 2, True, 7)
    assert len(found) == len(written.rows) == 6
    for row in written.rows:
        same = found[row.layer, row.phase]
        for name in ("eigenvalues", "mean", "covariance", "embedding"):
            np.testing.assert_array_equal(getattr(same, name), getattr(row, name))
        arrays = {"eigenvalues": row.eigenvalues, "mean": row.mean, "covariance": None, "embedding": None}
        assert replace(same, **arrays) == replace(row, **arrays)
    assert window_metrics(list(found.values())) == window_metrics(written.rows)


def test_sketches_have_the_shards_that_their_own_cost_gives_them(tmp_path: Path) -> None:
    """500·10 values of the first layer's sketch are fewer than 100·103/2; its covariance would be the largest."""
    storage = Storage(tmp_path)
    ParquetWriter(storage).write(window())
    (earlier,) = final_windows(storage, [(1, 4)])
    layers = [LayerInfo(name, "Linear", width) for name, width in zip("abc", (500, 100, 100), strict=True)]
    whole = StoreConfig("r", "unused", 2, num_shards=2)
    for config, first in ((whole, {"a"}), (replace(whole, max_features=200, sketch_size=8), {"a", "b"})):
        parts = read_parts(storage, earlier, shards_of(layers, config))
        assert [{row.layer for row in parts[shard].rows} for shard in (0, 1)] == [first, set("abc") - first]


def test_without_covariances_the_norm_of_the_mean_stays(tmp_path: Path) -> None:
    storage, written = Storage(tmp_path), window(stats=("trace",), shards={0: (2, True)})
    ParquetWriter(storage).write(written)
    (earlier,) = final_windows(storage, [(1, 4)])
    rows = [row for part in read_parts(storage, earlier, dict.fromkeys("abc", 0)).values() for row in part.rows]
    assert [row.mean_norm for row in rows] == [row.mean_norm for row in written.rows]
    assert {row.covariance is None and row.embedding is None for row in rows} == {True}


@pytest.mark.parametrize(
    ("changes", "complete"),
    [({"final": False}, None), ({"workers": 1}, False), ({}, True)],
    ids=["live", "without a rank", "all ranks"],
)
def test_which_windows_are_final_and_complete(tmp_path: Path, changes: dict[str, Any], complete: bool | None) -> None:
    ParquetWriter(Storage(tmp_path)).write(window(**changes))
    found = list(final_windows(Storage(tmp_path), [(1, 4), (1, 5)]))
    assert [earlier.complete for earlier in found] == ([] if complete is None else [complete])


def test_each_shard_has_what_its_own_part_said(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    ParquetWriter(storage).write(window(workers=1, shards={1: (2, True), 0: (1, False)}))
    (earlier,) = final_windows(storage, [(1, 4)])
    parts = read_parts(storage, earlier, ASSIGNED)
    assert not earlier.complete
    assert {shard: (part.workers, part.complete) for shard, part in parts.items()} == {0: (1, False), 1: (2, True)}
    assert read_spectra(tmp_path).num_rows == 6


def test_what_a_crash_has_cut_off_is_not_complete(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    ParquetWriter(storage).write(window())
    spectra = tmp_path / "spectra" / "000001-0000000004-000003.parquet"
    kept = spectra.read_bytes()
    ParquetWriter(storage).write(window(revision=4))
    (tmp_path / "spectra" / "000001-0000000004-000004.parquet").unlink()
    assert list(final_windows(storage, [(1, 4)])) == []
    spectra.write_bytes(kept)
    (earlier,) = final_windows(storage, [(1, 4)])
    assert (earlier.revision, earlier.complete) == (3, False)
