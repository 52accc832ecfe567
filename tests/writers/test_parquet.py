import math
import os
import shutil
from datetime import timedelta, timezone

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest

from delve_ray.analysis import read_scalars
from delve_ray.schema import (
    COVARIANCES_SCHEMA,
    EXTRA_STATS,
    SCALAR_STATS,
    SCALARS_SCHEMA,
    SPECTRA_SCHEMA,
    VERSION_KEY,
)
from delve_ray.storage import Storage
from delve_ray.writers.parquet import ParquetWriter, covariances_table, revisions
from tests.windows import COVARIANCE, HOSTILE_NAMES, START, later, layer_row, scalar, window


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
    assert [name[len("scalars/") :][:7] for name in names] == ["000000-", "000000-", "000000-", "000001-"]
    table = pq.read_table(storage.path("scalars"))
    assert table.schema.equals(SCALARS_SCHEMA)
    rows = sorted((row["attempt"], row["step"], row["rank"], row["name"]) for row in table.to_pylist())
    assert rows == [(0, 0, 0, "loss"), (0, 0, 1, "acc"), (0, 1, 0, "loss"), (0, 2, 0, "loss"), (1, 0, 0, "loss")]
    assert sum(math.isnan(value) for value in table["value"].to_pylist()) == 1


def test_scalars_written_again_replace_their_own_files(storage, writer):
    values = [scalar(value=value, step=step) for step, value in enumerate([0.5, math.nan, math.inf, -0.0])]
    for maker in (writer, writer, ParquetWriter(storage)):  # as after an outage, and after a crash
        maker.write_scalars([*values, scalar(step=9, attempt=3)])
    # The same moment in another time zone, and the same number in another type.
    abroad = START.astimezone(timezone(timedelta(hours=5)))
    writer.write_scalars([scalar(value=np.float64(s.value), step=s.step, wall_time=abroad) for s in values])

    assert len(storage.list_files("scalars", "")) == 2
    assert read_scalars(storage, columns=["step", "value"]).to_pylist()[2:] == [
        {"step": 2, "value": math.inf},
        {"step": 3, "value": -0.0},
        {"step": 9, "value": 1.5},
    ]


@pytest.mark.parametrize(
    "changes",
    [
        *({name: "other"} for name in ("run", "trial", "name")),
        *({name: 1} for name in ("rank", "step")),
        {"value": np.nextafter(1.5, 2)},
        {"wall_time": later(1e-6)},
    ],
)
def test_scalars_that_differ_have_files_of_their_own(storage, writer, changes):
    values = {"name": "loss", "value": 1.5, "rank": 0, "step": 0, "run": "run", "trial": None, "wall_time": START}
    for each in (values, values | changes):
        writer.write_scalars([scalar(step=7), scalar(**each)])
    assert len(storage.list_files("scalars", "")) == 2


def test_the_files_of_an_earlier_process_are_superseded(storage, monkeypatch):
    first = ParquetWriter(storage)
    first._revisions = {}  # it never deletes, as if it crashed before
    for revision in (0, 3, 4):
        first._revisions.clear()
        first.write(window([layer_row(covariance=COVARIANCE)], revision=revision, final=False))
    first.write(window([layer_row()], window=1, revision=2))
    first.write(window([layer_row()], attempt=1, revision=1))
    storage.delete("spectra/000000-0000000000-000003.parquet")  # a crash left covariances alone
    listed = []
    list_files = storage.list_files
    monkeypatch.setattr(storage, "list_files", lambda *names: listed.append(names[0]) or list_files(*names))
    restarted = ParquetWriter(storage)
    restarted.write_scalars([scalar()])
    restarted.write(window([], revision=9))
    assert listed == []

    restarted.write(window([layer_row()], revision=5))
    restarted.write(window([layer_row()], window=2))
    restarted.write(window([layer_row()], window=2, revision=1))
    assert listed == ["spectra", "covariances", "embeddings"]
    assert sorted(os.listdir(storage.path("spectra"))) == [
        "000000-0000000000-000005.parquet",
        "000000-0000000001-000002.parquet",
        "000000-0000000002-000001.parquet",
        "000001-0000000000-000001.parquet",
    ]
    assert os.listdir(storage.path("covariances")) == []


def test_newer_revisions_on_disk_stay(storage):
    ParquetWriter(storage).write(window([layer_row()], revision=7))
    ParquetWriter(storage).write(window([layer_row()], revision=3))
    assert revisions(storage) == {(0, 0): 7}
    assert len(storage.list_files("spectra", "")) == 2


def test_a_directory_that_cannot_be_listed_is_listed_again(storage, writer, monkeypatch):
    ParquetWriter(storage).write(window([layer_row()], revision=0))

    def fail(*args):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(storage, "list_files", fail)
        with pytest.raises(OSError, match="Input/output"):
            writer.write(window([layer_row()], revision=1))
    writer.write(window([layer_row()], revision=1))
    assert storage.list_files("spectra", "") == ["spectra/000000-0000000000-000001.parquet"]


def test_what_cannot_be_deleted_does_not_fail_the_window(storage, writer, monkeypatch, caplog):
    def refuse(name):
        raise PermissionError(13, f"not to be deleted: {name}")

    writer.write(window([layer_row(covariance=COVARIANCE)], revision=0))
    with monkeypatch.context() as patch:
        patch.setattr(storage, "delete", refuse)
        for revision in (1, 2):
            writer.write(window([layer_row(covariance=COVARIANCE)], revision=revision))
    (record,) = caplog.records
    assert "superseded files stay, such as 000000-0000000000-000000.parquet" in record.getMessage()
    assert len(storage.list_files("spectra", "")) == 3
    writer.write(window([layer_row(covariance=COVARIANCE)], revision=3))
    for folder in ("spectra", "covariances"):
        assert storage.list_files(folder, "") == [f"{folder}/000000-0000000000-000003.parquet"]


def test_the_highest_revision_of_every_window(storage, writer):
    assert revisions(storage) == {}
    for name in (
        "000000-0000000000-000002",
        "000000-0000000000-000010",
        "000000-0000000001-000000",
        "000002-0000000001-000003",
        "1000000-10000000000-1000000",
        *("0", "spectra", "000000-0000000005", "0000000-0000000006-000000", "000000-0000000007-00000x"),
        *("-00001-0000000008-000000", ".000000-0000000009-000000", "x000000-0000000010-000000"),
        "٠٠٠٠٠٠-0000000011-000000",
    ):
        storage.write_atomic(f"spectra/{name}.parquet", b"")
    storage.write_atomic("spectra/000000-0000000012-000000.parquet.tmp", b"")
    storage.write_atomic("covariances/000000-0000000001-000004.parquet", b"")  # a crash left them without spectra
    assert revisions(storage) == {(0, 0): 10, (0, 1): 4, (2, 1): 3, (1000000, 10000000000): 1000000}
    writer.write(window([layer_row()], attempt=5, window=6, revision=7))
    assert revisions(storage)[5, 6] == 7


def test_a_directory_that_went_from_a_remote_filesystem_is_made_by_the_next_try(tmp_path):
    storage = Storage("run", filesystem=pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem()))
    assert not storage.is_local
    writer = ParquetWriter(storage)
    writer.write(window([layer_row()]))
    shutil.rmtree(tmp_path / "run" / "spectra")
    with pytest.raises(FileNotFoundError):
        writer.write(window([layer_row()], window=1))
    writer.write(window([layer_row()], window=1))
    assert storage.list_files("spectra", "") == ["spectra/000000-0000000001-000000.parquet"]


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
