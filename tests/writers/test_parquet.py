import math
import os

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from delve_ray.schema import (
    COVARIANCES_SCHEMA,
    EXTRA_STATS,
    SCALAR_STATS,
    SCALARS_SCHEMA,
    SPECTRA_SCHEMA,
    VERSION_KEY,
)
from delve_ray.storage import Storage
from delve_ray.writers.parquet import ParquetWriter, covariances_table
from tests.windows import COVARIANCE, HOSTILE_NAMES, START, layer_row, scalar, window


@pytest.fixture
def storage(tmp_path):
    return Storage(tmp_path)


@pytest.fixture
def writer(storage):
    return ParquetWriter(storage)


def only(storage, folder):
    (name,) = storage.list_files(folder, "")
    return pq.read_table(storage.path(name))


def test_a_row_keeps_every_value(storage, writer):
    row = layer_row(
        alpha_r2=0.75,
        alpha_from=1,
        alpha_to=3,
        thresholds=(0.9, 0.999),
        intrinsic_dimensionalities=(1, 3),
        sketched=True,
    )
    writer.write(
        window([row], attempt=1, window=7, step=12, revision=2, final=False, workers=3, trial="t1", trial_config="{}")
    )

    table = only(storage, "spectra")
    assert table.schema.equals(SPECTRA_SCHEMA)
    assert table.schema.metadata[VERSION_KEY] == b"1"
    expected = dict.fromkeys(SPECTRA_SCHEMA.names) | {
        "run": "run",
        "trial": "t1",
        "attempt": 1,
        "phase": "train",
        "step": 12,
        "layer": "conv1",
        "layer_type": "Linear",
        "features": 3,
        "samples": 100,
        "nonfinite_rows": 2,
        "samples_per_feature": 100 / 3,
        "undersampled": False,
        "workers": 3,
        "world_size": 4,
        "revision": 2,
        "final": False,
        "threshold": 0.99,
        "saturation": 2 / 3,
        "intrinsic_dimensionality": 2,
        "trace": 6.5,
        "alpha_r2": 0.75,
        "alpha_from": 1,
        "alpha_to": 3,
        "thresholds": [0.9, 0.999],
        "intrinsic_dimensionalities": [1, 3],
        "eigenvalues": [4.0, 2.5, 0.0],
        "mean_norm": 5.0,
        "sketched": True,
        "trial_config": "{}",
        "wall_time": START,
    }
    assert table.to_pylist() == [expected]


def test_rows_keep_their_order_and_their_own_lists(storage, writer):
    lists = [np.array([3.0, 1.0]), np.array([]), np.array([2.0]), np.linspace(9, 0, 50)]
    rows = [layer_row(f"l{9 - i}", features=values.size, eigenvalues=values) for i, values in enumerate(lists)]
    writer.write(window(rows))

    table = only(storage, "spectra")
    assert table["layer"].to_pylist() == ["l9", "l8", "l7", "l6"]
    assert table["eigenvalues"].to_pylist() == [values.tolist() for values in lists]
    assert table["thresholds"].to_pylist() == [[]] * 4


def test_statistics_on_request_are_columns_of_their_own(storage, writer):
    stats = {name: index + 0.5 for index, name in enumerate(EXTRA_STATS)} | {"correlation_intrinsic_dimensionality": 7}
    writer.write(window([layer_row("a", stats=stats), layer_row("b"), layer_row("c", stats={"rankme": math.nan})]))

    table = only(storage, "spectra")
    assert [table[name].to_pylist()[:2] for name in EXTRA_STATS] == [[0.5, None], [7, None], [2.5, None], [3.5, None]]
    assert math.isnan(table["rankme"][2].as_py())
    assert [table.schema.field(name).type for name in EXTRA_STATS] == [
        pa.float64(),
        pa.int32(),
        pa.float64(),
        pa.float64(),
    ]


@pytest.mark.parametrize(
    ("samples", "features", "ratio", "undersampled"),
    [(0, 4, 0.0, True), (3, 4, 0.75, True), (4, 4, 1.0, False), (10, 4, 2.5, False), (5, 0, None, False)],
)
def test_samples_per_feature_and_whether_that_is_too_few(storage, writer, samples, features, ratio, undersampled):
    writer.write(window([layer_row(samples=samples, features=features)]))
    (row,) = only(storage, "spectra").select(["samples_per_feature", "undersampled"]).to_pylist()
    assert row == {"samples_per_feature": ratio, "undersampled": undersampled}


def test_absent_is_null_while_nan_and_infinity_stay(storage, writer):
    stats = {"trace": math.nan, "condition_number": math.inf, "log_determinant": -math.inf, "saturation": 0.0}
    writer.write(window([layer_row(stats=stats), layer_row(stats={"intrinsic_dimensionality": math.nan})]))

    table = only(storage, "spectra")
    row = table.slice(0, 1).to_pylist()[0]
    assert math.isnan(row["trace"])
    assert row["condition_number"] == math.inf
    assert row["log_determinant"] == -math.inf
    assert row["saturation"] == 0.0
    absent = set(SCALAR_STATS) - set(stats)
    assert {name for name in SCALAR_STATS if row[name] is None} == absent
    assert table["intrinsic_dimensionality"].null_count == 2  # integers have no NaN


def test_pandas_reads_the_same(storage, writer):
    rows = [layer_row("a"), layer_row("b", "eval", stats={"saturation": 0.25})]
    writer.write(window(rows, step=3))

    frame = pd.read_parquet(storage.path("spectra"))
    assert frame["layer"].tolist() == ["a", "b"]
    assert frame["saturation"].tolist() == [2 / 3, 0.25]
    assert frame["intrinsic_dimensionality"].fillna(-1).tolist() == [2, -1]
    assert frame["eigenvalues"][1].tolist() == [4.0, 2.5, 0.0]
    assert frame["wall_time"][0] == pd.Timestamp(START)


def test_covariances_only_for_rows_that_have_one(storage, writer):
    rows = [layer_row("a", covariance=COVARIANCE), layer_row("b"), layer_row("c", covariance=2 * COVARIANCE)]
    writer.write(window(rows, step=5, attempt=1, window=2, revision=3))

    assert storage.list_files("covariances", "") == ["covariances/000001-0000000002-000003.parquet"]
    assert storage.list_files("spectra", "") == ["spectra/000001-0000000002-000003.parquet"]
    table = only(storage, "covariances")
    assert table.schema.equals(COVARIANCES_SCHEMA)
    assert table.schema.metadata[VERSION_KEY] == b"1"
    assert table["layer"].to_pylist() == ["a", "c"]
    assert table["covariance"].to_pylist() == [COVARIANCE.tolist(), (2 * COVARIANCE).tolist()]
    assert table["mean"].to_pylist() == [[3.0, 0.0, 4.0]] * 2
    assert table["step"].to_pylist() == [5, 5]
    assert only(storage, "spectra")["layer"].to_pylist() == ["a", "b", "c"]


def test_covariances_are_not_copied_on_their_way():
    row = layer_row(covariance=COVARIANCE)
    chunk = covariances_table(window([row]), [row])["covariance"].chunk(0)
    assert chunk.values.buffers()[1].address == COVARIANCE.ctypes.data


def test_without_covariances_there_is_no_file(storage, writer):
    writer.write(window([layer_row()]))
    assert not storage.exists("covariances")


def test_covariances_are_there_before_their_spectra(storage, writer, monkeypatch):
    written = []
    monkeypatch.setattr(storage, "write_atomic", lambda name, data: written.append(name))
    writer.write(window([layer_row(covariance=COVARIANCE)]))
    assert [name.partition("/")[0] for name in written] == ["covariances", "spectra"]


def test_a_window_without_rows_writes_nothing(storage, writer):
    writer.write(window())
    writer.write_scalars([])
    writer.close()
    assert os.listdir(storage.local_path) == []


def test_a_newer_revision_replaces_the_files_of_the_older(storage, writer):
    for revision in range(3):
        writer.write(window([layer_row(covariance=COVARIANCE)], revision=revision, final=revision == 2))
    writer.write(window([layer_row()], window=1, step=1))
    writer.write(window([layer_row()], attempt=1, revision=5))

    assert storage.list_files("spectra", "") == [
        "spectra/000000-0000000000-000002.parquet",
        "spectra/000000-0000000001-000000.parquet",
        "spectra/000001-0000000000-000005.parquet",
    ]
    assert storage.list_files("covariances", "") == ["covariances/000000-0000000000-000002.parquet"]


def test_an_older_revision_goes_only_once_the_newer_is_there(storage, writer, monkeypatch):
    writer.write(window([layer_row(covariance=COVARIANCE)], revision=0))

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space"):
        writer.write(window([layer_row(covariance=COVARIANCE)], revision=1))
    monkeypatch.undo()
    assert storage.list_files("spectra", "") == ["spectra/000000-0000000000-000000.parquet"]
    assert storage.list_files("covariances", "") == ["covariances/000000-0000000000-000000.parquet"]


def test_what_a_failed_write_left_goes_with_the_next_revision(storage, writer, monkeypatch):
    write = storage.write_atomic

    def fail_for_spectra(name, data):
        if name.startswith("spectra/"):
            raise OSError(28, "No space left on device")
        write(name, data)

    monkeypatch.setattr(storage, "write_atomic", fail_for_spectra)
    with pytest.raises(OSError, match="No space"):
        writer.write(window([layer_row(covariance=COVARIANCE)], revision=0))
    assert storage.list_files("covariances", "") == ["covariances/000000-0000000000-000000.parquet"]
    monkeypatch.undo()
    writer.write(window([layer_row(covariance=COVARIANCE)], revision=1))
    assert storage.list_files("covariances", "") == ["covariances/000000-0000000000-000001.parquet"]


def test_scalars_never_overwrite_each_other(storage, writer):
    writer.write_scalars([scalar(step=0), scalar("acc", 0.5, step=0, rank=1, trial="t")])
    writer.write_scalars([scalar(step=1, value=math.nan)])
    ParquetWriter(storage).write_scalars([scalar(step=2), scalar(step=0, attempt=1)])  # a restarted store

    names = storage.list_files("scalars", ".parquet")
    assert [name[len("scalars/") :][:17] for name in names] == [
        "000000-0000000000",
        "000000-0000000000",
        "000000-0000000001",
        "000001-0000000001",
    ]
    table = pq.read_table(storage.path("scalars"))
    assert table.schema.equals(SCALARS_SCHEMA)
    rows = sorted((row["attempt"], row["step"], row["rank"], row["name"]) for row in table.to_pylist())
    assert rows == [(0, 0, 0, "loss"), (0, 0, 1, "acc"), (0, 1, 0, "loss"), (0, 2, 0, "loss"), (1, 0, 0, "loss")]
    assert sum(math.isnan(value) for value in table["value"].to_pylist()) == 1


def test_layer_names_are_data_and_never_paths(storage, writer):
    writer.write(window([layer_row(name, covariance=COVARIANCE) for name in HOSTILE_NAMES]))

    assert sorted(os.listdir(storage.local_path)) == ["covariances", "spectra"]
    assert only(storage, "spectra")["layer"].to_pylist() == list(HOSTILE_NAMES)
    assert only(storage, "covariances")["layer"].to_pylist() == list(HOSTILE_NAMES)


def test_any_filesystem_will_do():
    storage = Storage("mock:///bucket/run")
    ParquetWriter(storage).write(window([layer_row()]))
    (name,) = storage.list_files("spectra", ".parquet")
    table = pq.read_table(pa.BufferReader(storage.read_bytes(name)))
    assert table["layer"].to_pylist() == ["conv1"]
