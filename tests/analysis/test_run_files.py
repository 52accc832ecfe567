from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from delve_ray.analysis import read_covariances, read_spectra, run_files
from delve_ray.errors import ReadError
from delve_ray.schema import EXTRA_STATS, SCHEMA_VERSION, SPECTRA_SCHEMA, VERSION_KEY
from delve_ray.storage import Storage
from delve_ray.writers.parquet import ParquetWriter
from tests.windows import COVARIANCE, found, layer_row, publish, window


def test_only_needed_columns_are_read(tmp_path, monkeypatch):
    publish(tmp_path)
    asked = []
    read = pq.ParquetFile.read

    def record(self, columns=None, **options):
        asked.extend(columns)
        return read(self, columns, **options)

    monkeypatch.setattr(pq.ParquetFile, "read", record)
    assert len(found(tmp_path, "saturation")) == 2
    assert set(asked) == {"run", "phase", "step", "attempt", "revision", "layer", "wall_time", "saturation"}


@pytest.mark.parametrize("values_per_chunk", [2**31 - 1, 5])
def test_list_columns_follow_their_rows(tmp_path, monkeypatch, values_per_chunk):
    monkeypatch.setattr(run_files, "MAX_LIST_VALUES", values_per_chunk)
    expected = {}
    for step in (3, 1, 2):
        rows = []
        for layer in ("b", "a"):
            for phase in ("train", "eval"):
                values = np.array([step, ord(layer), len(phase)], np.float64)
                expected[phase, step, layer] = values.tolist()
                rows.append(layer_row(layer, phase, eigenvalues=values))
        ParquetWriter(Storage(tmp_path)).write(window(rows, step=step, window=9 - step))

    table = read_spectra(tmp_path)
    keys = zip(*(table[name].to_pylist() for name in ("phase", "step", "layer")), strict=True)
    assert dict(zip(keys, table["eigenvalues"].to_pylist(), strict=True)) == expected


def test_list_columns_too_long_for_one_chunk(tmp_path, monkeypatch):
    for step in (1, 0):
        publish(tmp_path, ("b", "a"), step=step, window=1 - step, phases=("train", "eval"), covariance=True)
    expected = read_covariances(tmp_path)
    monkeypatch.setattr(run_files, "MAX_LIST_VALUES", 5)

    assert read_covariances(tmp_path).equals(expected)
    assert (
        read_covariances(tmp_path, filters=[("layer", "=", "a")])["covariance"].to_pylist()
        == [(COVARIANCE * 0.5).tolist()] * 4
    )


def test_only_row_groups_that_are_asked_for_are_read(tmp_path, monkeypatch):
    publish(tmp_path, ("a", "b", "c"), covariance=True)
    groups = []
    read = pq.ParquetFile.read_row_groups

    def record(self, row_groups, columns=None, **options):
        groups.append(row_groups)
        return read(self, row_groups, columns, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_groups", record)
    assert found(tmp_path, "layer", "mean", read=read_covariances, filters=[("layer", "=", "b")]) == [
        ("b", [3.0, 0.0, 4.0])
    ]
    assert groups == [[1]]


def test_a_directory_of_runs_is_searched(tmp_path):
    publish(tmp_path / "sweep" / "trial_b" / "run", ("a",), run="b")
    publish(tmp_path / "sweep" / "trial_a", ("a",), run="a")
    publish(tmp_path / "sweep" / "trial_a" / "checkpoint" / "nested", ("a",), run="inside a run")
    publish(tmp_path / "sweep" / ".hidden", ("a",), run="hidden")
    (tmp_path / "sweep" / "empty").mkdir()
    (tmp_path / "sweep" / "started").mkdir()
    (tmp_path / "sweep" / "started" / "run.json").write_text("{}")

    assert found(tmp_path / "sweep", "run") == [("a",), ("b",)]
    assert found([str(tmp_path / "sweep"), Storage(tmp_path / "sweep" / "trial_a")], "run") == [("a",), ("b",)]
    assert found(f"file://{tmp_path}/sweep", "run") == [("a",), ("b",)]


def test_links_do_not_double_a_run(tmp_path):
    publish(tmp_path / "run_1", ("a",))
    (tmp_path / "latest").symlink_to(tmp_path / "run_1")
    (tmp_path / "loop").symlink_to(tmp_path)

    assert found(tmp_path) == [(0, "a", 0.5)]


def test_a_run_on_another_filesystem():
    storage = Storage("mock:///bucket/runs/one")
    writer = ParquetWriter(storage)
    for step in range(3):
        writer.write(window([layer_row("a", covariance=COVARIANCE)], step=step, window=step))

    assert found(storage, "step", "eigenvalues") == [(step, [4.0, 2.5, 0.0]) for step in range(3)]
    assert found(storage, "step", "covariance", read=read_covariances, filters=[("step", "=", 1)]) == [
        (1, COVARIANCE.tolist())
    ]


@pytest.mark.parametrize("paths", [[], "nowhere", "empty", "file", "nosuch://bucket/run"])
def test_paths_that_hold_no_run(tmp_path, monkeypatch, paths):
    monkeypatch.chdir(tmp_path)
    Path("empty/below").mkdir(parents=True)
    Path("file").write_text("")
    with pytest.raises(ReadError, match=str(paths) if paths else "at least one run directory"):
        read_spectra(paths)


def rewrite(path, change):
    (file,) = (path / "spectra").iterdir()
    pq.write_table(change(pq.read_table(file)), file)
    return file


def test_columns_that_an_older_version_lacks_are_null(tmp_path):
    publish(tmp_path, ("a",), value=0.25)
    lacking = ["revision", "alpha", "eigenvalues", "wall_time"]

    def older(table):
        table = table.drop_columns(lacking)
        features = table.schema.get_field_index("features")
        table = table.set_column(features, "features", table["features"].cast(pa.int64()))
        return table.append_column("dropped_since", pa.array(["x"])).replace_schema_metadata({VERSION_KEY: b"0"})

    rewrite(tmp_path, older)
    publish(tmp_path, ("a",), value=0.5, step=1)

    table = read_spectra(tmp_path)
    assert table.schema.equals(SPECTRA_SCHEMA, check_metadata=True)
    old, new = table.to_pylist()
    assert [old[name] for name in lacking] == [None] * 4
    assert (old["saturation"], old["features"], new["saturation"]) == (0.25, 3, 0.5)
    assert new["eigenvalues"] == [4.0, 2.5, 0.0]

    publish(tmp_path, ("b",), value=0.75, step=0, window=7, revision=0)
    assert found(tmp_path) == [(0, "b", 0.75), (1, "a", 0.5)]  # any revision is newer than none


def test_files_of_before_there_were_more_statistics_read_beside_newer_ones(tmp_path):
    new = [*EXTRA_STATS, "samples_per_feature", "undersampled"]
    publish(tmp_path, ("a", "b"), value=0.25)
    rewrite(tmp_path, lambda table: table.drop_columns(new))
    (file,) = (tmp_path / "spectra").iterdir()
    assert pq.read_metadata(file).metadata[VERSION_KEY] == str(SCHEMA_VERSION).encode()
    stats = {"saturation": 0.5, "rankme": 2.5, "correlation_intrinsic_dimensionality": 2}
    ParquetWriter(Storage(tmp_path)).write(window([layer_row("a", stats=stats)], step=1, window=1))

    table = read_spectra(tmp_path)
    assert table.schema.equals(SPECTRA_SCHEMA, check_metadata=True)
    *old, newer = table.to_pylist()
    assert [[row[name] for name in ("saturation", *new)] for row in old] == [[0.25] + [None] * len(new)] * 2
    assert (newer["rankme"], newer["correlation_intrinsic_dimensionality"], newer["undersampled"]) == (2.5, 2, False)
    assert found(tmp_path, "layer", filters=[("undersampled", "==", False)]) == [("a",)]
    assert found(tmp_path, "samples_per_feature", "rankme") == [(None, None), (None, None), (100 / 3, 2.5)]


def test_files_that_went_through_another_tool_still_read(tmp_path):
    publish(tmp_path, ("a",))
    rewrite(tmp_path, lambda table: table.replace_schema_metadata(None))

    assert found(tmp_path) == [(0, "a", 0.5)]


@pytest.mark.parametrize("version", [SCHEMA_VERSION + 1, 10**6])
def test_a_newer_version_is_refused_by_name(tmp_path, version):
    publish(tmp_path)
    metadata = {VERSION_KEY: str(version).encode()}
    file = rewrite(tmp_path, lambda table: table.select(["run"]).replace_schema_metadata(metadata))

    expected = f"{file}: schema version {version} is newer than {SCHEMA_VERSION}.*upgrade.*delve-ray"
    with pytest.raises(ReadError, match=expected):
        read_spectra(tmp_path)


def test_foreign_files_are_refused_by_name(tmp_path):
    publish(tmp_path)
    file = rewrite(tmp_path, lambda table: pa.table({"x": [1]}))
    with pytest.raises(ReadError, match=f"{file} has no layer, phase, run, step: not written by delve_ray"):
        read_spectra(tmp_path)


@pytest.mark.parametrize("damage", ["empty", "head", "half", "tail", "page", "text", "name", "version"])
def test_a_damaged_file_is_named(tmp_path, damage):
    publish(tmp_path)
    (file,) = (tmp_path / "spectra").iterdir()
    data = file.read_bytes()
    if damage == "version":
        metadata = {VERSION_KEY: b"one"}
        pq.write_table(pq.read_table(file).replace_schema_metadata(metadata), file)
    else:
        page = bytearray(data)
        chunk = pq.ParquetFile(file).metadata.row_group(0).column(SPECTRA_SCHEMA.get_field_index("saturation"))
        page[(chunk.dictionary_page_offset or chunk.data_page_offset) + chunk.total_compressed_size - 1] ^= 0xFF
        damaged = {
            "empty": b"",
            "head": data[1:],
            "half": data[: len(data) // 2],
            "tail": data[:-1],
            "page": bytes(page),
            "text": b"x" * 99,
            "name": data.replace(b"spectral_entropy", b"spectral\xdfentropy"),
        }
        file.write_bytes(damaged[damage])

    with pytest.raises(ReadError, match=str(file)):
        read_spectra(tmp_path)


def vanish_while_listed(monkeypatch, times, successor):
    """Let `successor` supersede what each of the first `times` listings saw, before it can be opened."""
    list_files, calls = Storage.list_files, []

    def list_then_lose(self, folder, suffix):
        names = list_files(self, folder, suffix)
        calls.append(names)
        if len(calls) <= times:
            successor(len(calls))
            for name in names:
                self.delete(name)
        return names

    monkeypatch.setattr(Storage, "list_files", list_then_lose)
    return calls


def test_a_revision_that_is_superseded_while_reading(tmp_path, monkeypatch):
    publish(tmp_path, ("a",), value=0.0, revision=0)
    calls = vanish_while_listed(monkeypatch, 3, lambda n: publish(tmp_path, ("a",), value=float(n), revision=n))

    assert found(tmp_path) == [(0, "a", 3.0)]
    assert len(calls) == 4


def test_files_that_keep_going_are_reported(tmp_path, monkeypatch):
    publish(tmp_path, ("a",), revision=0)
    calls = vanish_while_listed(monkeypatch, 99, lambda n: publish(tmp_path, ("a",), revision=n))

    with pytest.raises(ReadError, match=r"files went while they were read, 5 times.*try again"):
        read_spectra(tmp_path)
    assert len(calls) == 5
