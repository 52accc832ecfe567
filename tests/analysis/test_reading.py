import os
import threading

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from delve_ray.analysis import read_covariances, read_scalars, read_spectra
from delve_ray.errors import ReadError
from delve_ray.schema import COVARIANCES_SCHEMA, SCALARS_SCHEMA, SPECTRA_SCHEMA
from delve_ray.storage import Storage
from delve_ray.writers.parquet import ParquetWriter, spectra_table
from tests.windows import COVARIANCE, HOSTILE_NAMES, found, later, layer_row, publish, scalar, window

READERS = [(read_spectra, SPECTRA_SCHEMA), (read_covariances, COVARIANCES_SCHEMA), (read_scalars, SCALARS_SCHEMA)]


def test_a_run_reads_as_it_was_written(tmp_path):
    rows = [layer_row("b"), layer_row("a", thresholds=(0.9,), intrinsic_dimensionalities=(1,))]
    written = window(rows, step=3, trial="t", trial_config='{"lr": 1}')
    ParquetWriter(Storage(tmp_path)).write(written)

    table = read_spectra(tmp_path)
    assert table.equals(spectra_table(written))
    assert table.schema.equals(SPECTRA_SCHEMA, check_metadata=True)


@pytest.mark.parametrize(("read", "schema"), READERS)
def test_a_run_without_files_gives_an_empty_table(tmp_path, read, schema):
    (tmp_path / "run.json").write_text("{}")

    table = read(tmp_path)
    assert table.num_rows == 0
    assert table.schema.equals(schema, check_metadata=True)
    assert read(tmp_path, columns=["step", "run"], filters=[("step", ">", 1)]).column_names == ["step", "run"]


def test_the_highest_revision_holds_for_the_whole_step(tmp_path):
    publish(tmp_path, ("a", "b"), value=0.1, revision=0)
    publish(tmp_path, ("a",), value=0.3, revision=10)
    publish(tmp_path, ("a", "b", "c"), value=0.2, revision=9)
    publish(tmp_path, ("a",), value=0.7, step=1, revision=0)

    assert found(tmp_path) == [(0, "a", 0.3), (1, "a", 0.7)]


def test_a_later_attempt_replaces_only_what_it_replays(tmp_path):
    for step in range(4):
        publish(tmp_path, ("a", "b"), value=0.1, step=step, revision=7, phases=("train", "eval"))
    publish(tmp_path, ("a",), value=0.2, step=2, attempt=1, revision=0)
    publish(tmp_path, ("a", "b"), value=0.3, step=3, attempt=2, revision=0)

    assert found(tmp_path, filters=pc.field("phase") == "train") == [
        (0, "a", 0.1),
        (0, "b", 0.1),
        (1, "a", 0.1),
        (1, "b", 0.1),
        (2, "a", 0.2),
        (3, "a", 0.3),
        (3, "b", 0.3),
    ]
    assert set(found(tmp_path, "attempt", "step", filters=[("phase", "==", "eval")])) == {(0, s) for s in range(4)}


def test_attempts_beat_revisions_in_whatever_order_files_lie(tmp_path):
    publish(tmp_path, value=0.2, attempt=1, revision=0, window=0, step=5)
    publish(tmp_path, value=0.1, attempt=0, revision=9, window=9, step=5)
    (tmp_path / "spectra" / "000001-0000000000-000000.parquet").rename(tmp_path / "spectra" / "0.parquet")

    assert found(tmp_path) == [(5, "a", 0.2), (5, "b", 0.2)]


def test_runs_of_one_directory_are_kept_apart(tmp_path):
    publish(tmp_path, ("a",), value=0.1, run="first", attempt=3)
    publish(tmp_path, ("a",), value=0.2, run="second", window=1)

    assert found(tmp_path, "run", "saturation") == [("first", 0.1), ("second", 0.2)]


def test_the_same_revision_twice_counts_once_per_layer(tmp_path):
    publish(tmp_path, ("a", "b"), value=0.1, window=0, wall_time=later(0))
    publish(tmp_path, ("b", "c"), value=0.2, window=1, wall_time=later(1))

    assert found(tmp_path) == [(0, "a", 0.1), (0, "b", 0.2), (0, "c", 0.2)]


def test_filters_apply_to_the_truth_alone(tmp_path):
    publish(tmp_path, value=0.9, attempt=0, revision=4)
    publish(tmp_path, value=0.1, attempt=1, revision=1, final=False)

    assert found(tmp_path, filters=[("saturation", ">", 0.5)]) == []
    assert found(tmp_path, filters=pc.field("attempt") == 0) == []
    assert found(tmp_path, filters=pc.field("final")) == []
    assert found(tmp_path, filters=[("saturation", "<", 0.5), ("layer", "==", "b")]) == [(0, "b", 0.1)]


@pytest.mark.parametrize(
    "filters",
    [
        [("layer", "in", ["b"]), ("step", ">=", 1)],
        [[("layer", "=", "b"), ("step", "=", 1)], [("layer", "=", "b"), ("step", "=", 2)]],
        (pc.field("layer") == "b") & (pc.field("step") > 0),
        (pc.list_value_length(pc.field("eigenvalues")) == 3) & (pc.field("layer") == "b") & (pc.field("step") > 0),
        (pc.field(SPECTRA_SCHEMA.names.index("layer")) == "b") & (pc.field(SPECTRA_SCHEMA.names.index("step")) > 0),
    ],
)
def test_every_kind_of_filter(tmp_path, filters):
    for step in range(3):
        publish(tmp_path, step=step, value=step / 4)

    assert found(tmp_path, "saturation", filters=filters) == [(0.25,), (0.5,)]
    assert read_spectra(tmp_path, filters=filters)["eigenvalues"].to_pylist() == [[4.0, 2.5, 0.0]] * 2


def test_no_filter_tuples_are_no_filter(tmp_path):
    publish(tmp_path)
    assert len(found(tmp_path, filters=[])) == 2


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        (pc.field("satration") > 0, "filters: no column 'satration' in spectra.*valid columns: run, .*saturation"),
        ([("step", "~", 1)], 'filters=.*"~" is not a valid operator.*tuples'),
        ([("step", ">")], "filters=.*expected an expression"),
        (3, "filters=3.*expected an expression"),
        (pc.field("step") > "x", "filters: .*int64, string"),
        (pc.field("step"), "filters: .*bool"),
    ],
)
def test_filters_that_do_not_apply(tmp_path, filters, message):
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ReadError, match=message):
        read_spectra(tmp_path, filters=filters)


def test_columns_in_the_order_asked_for(tmp_path):
    publish(tmp_path, ("a",))

    table = read_spectra(tmp_path, columns=["eigenvalues", "layer", "run"])
    assert table.to_pylist() == [{"eigenvalues": [4.0, 2.5, 0.0], "layer": "a", "run": "run"}]
    assert table.column_names == ["eigenvalues", "layer", "run"]
    assert read_spectra(tmp_path, columns="layer").column_names == ["layer"]
    with pytest.raises(ReadError, match=r"columns: no column 'satration' in spectra; valid: run, trial, .*saturation"):
        read_spectra(tmp_path, columns=["layer", "satration"])


def test_rows_are_sorted_and_layers_keep_the_order_of_the_network(tmp_path):
    for run in ("r2", "r1"):
        for step in (10, 9, -1):
            publish(tmp_path / run, ("z", "a", "m"), run=run, step=step, phases=("train", "eval"), window=20 - step)

    assert found([tmp_path / "r2", tmp_path / "r1"], "run", "phase", "step", "layer") == [
        (run, phase, step, layer)
        for run in ("r1", "r2")
        for phase in ("eval", "train")
        for step in (-1, 9, 10)
        for layer in ("z", "a", "m")
    ]


def test_covariances_of_the_rows_asked_for(tmp_path):
    for step in range(3):
        publish(tmp_path, ("a", "b", "c"), value=float(step), step=step, covariance=True)

    table = read_covariances(tmp_path, ["step", "mean", "covariance"], [("layer", "in", ["a", "c"]), ("step", ">", 0)])
    assert table.to_pylist() == [
        {"step": step, "mean": [3.0, 0.0, 4.0], "covariance": (COVARIANCE * step).tolist()} for step in (1, 1, 2, 2)
    ]


def test_a_covariance_does_not_outlive_its_spectrum(tmp_path):
    publish(tmp_path, covariance=True, value=0.1, step=0)
    publish(tmp_path, covariance=True, value=0.1, step=1)
    publish(tmp_path, covariance=False, value=0.2, step=1, attempt=1)

    assert found(tmp_path, "step", "layer", read=read_covariances) == [(0, "a"), (0, "b")]


def test_a_crash_between_covariances_and_spectra_leaves_a_run_that_reads(tmp_path):
    publish(tmp_path, covariance=True, value=0.1, revision=0)
    publish(tmp_path, covariance=True, value=0.2, revision=1)
    (tmp_path / "spectra" / "000000-0000000000-000001.parquet").unlink()

    assert found(tmp_path) == [(0, "a", 0.1), (0, "b", 0.1)]
    assert found(tmp_path, "revision", "covariance", read=read_covariances) == [(1, (COVARIANCE * 0.2).tolist())] * 2


def test_scalars_of_the_latest_attempt_and_the_last_word_of_a_rank(tmp_path):
    writer = ParquetWriter(Storage(tmp_path))
    writer.write_scalars([scalar("loss", 4.0 - step, step=step, rank=rank) for step in (2, 0, 1) for rank in (1, 0)])
    writer.write_scalars([scalar("loss", 0.5, step=2, attempt=1), scalar("acc", 0.9, step=2)])
    ParquetWriter(Storage(tmp_path)).write_scalars([scalar("acc", 0.7, step=2, wall_time=later(1))])

    assert found(tmp_path, "name", "step", "rank", "value", read=read_scalars) == [
        ("acc", 2, 0, 0.7),
        ("loss", 0, 0, 4.0),
        ("loss", 0, 1, 4.0),
        ("loss", 1, 0, 3.0),
        ("loss", 1, 1, 3.0),
        ("loss", 2, 0, 0.5),
    ]


def test_equal_steps_of_different_directories_do_not_replace_each_other(tmp_path):
    publish(tmp_path / "x", ("a",), value=0.1, attempt=0)
    publish(tmp_path / "y", ("a",), value=0.2, attempt=5)

    assert found([tmp_path / "y", tmp_path / "x"]) == [(0, "a", 0.2), (0, "a", 0.1)]


def test_hostile_layer_names_come_back(tmp_path):
    publish(tmp_path, HOSTILE_NAMES, covariance=True)

    assert [name for (name,) in found(tmp_path, "layer")] == list(HOSTILE_NAMES)
    assert [name for (name,) in found(tmp_path, "layer", read=read_covariances)] == list(HOSTILE_NAMES)
    assert found(tmp_path, "layer", filters=[("layer", "==", "../x")]) == [("../x",)]


def test_reading_while_a_live_run_writes(tmp_path):
    writer, stop = ParquetWriter(Storage(tmp_path)), threading.Event()
    publish(tmp_path, ("a", "b"), value=0.0, covariance=True)

    def write():
        revision = 1
        while not stop.is_set():
            rows = [layer_row(name, stats={"saturation": float(revision)}, covariance=COVARIANCE) for name in "ab"]
            writer.write(window(rows, revision=revision))
            revision += 1
            stop.wait(0.002)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        seen = []
        for _ in range(30):
            rows = found(tmp_path)
            assert [row[:2] for row in rows] == [(0, "a"), (0, "b")]
            assert rows[0][2] == rows[1][2]
            seen.append(rows[0][2])
            assert found(tmp_path, "layer", read=read_covariances) == [("a",), ("b",)]
    finally:
        stop.set()
        thread.join()
    assert seen == sorted(seen)
    assert seen[-1] > 0


def test_resolution_agrees_with_its_definition(tmp_path):
    rng = np.random.default_rng(3)
    truth = {}
    for number in range(60):
        step, attempt, revision = (int(rng.integers(high)) for high in (6, 3, 50))
        layers = [name for name in "dbca" if rng.random() < 0.7] or ["a"]
        revision = revision * 100 + number  # no ties
        publish(tmp_path, layers, value=float(number), step=step, attempt=attempt, revision=revision, window=number)
        if truth.get(step, ((-1, -1),))[0] < (attempt, revision):
            truth[step] = ((attempt, revision), [(step, layer, float(number)) for layer in layers])

    assert found(tmp_path) == [row for step in sorted(truth) for row in truth[step][1]]


def test_a_large_run_is_resolved_by_columns(tmp_path):
    rows, layers = 200_000, 50
    os.makedirs(tmp_path / "spectra")
    for attempt, first in ((0, 0), (1, 2000)):
        step = np.arange(rows) // layers + first
        values = {
            "run": pa.array(["run"]).take(pa.array(np.zeros(rows, int))),
            "phase": pa.array(["train"]).take(pa.array(np.zeros(rows, int))),
            "attempt": pa.array(np.full(rows, attempt, np.int32)),
            "revision": pa.array(np.zeros(rows, np.int32)),
            "step": pa.array(step),
            "layer": pa.array([f"l{i}" for i in range(layers)]).take(pa.array(np.arange(rows) % layers)),
            "saturation": pa.array(step + attempt / 2),
        }
        pq.write_table(pa.table(values), tmp_path / "spectra" / f"{attempt}.parquet")

    table = read_spectra(tmp_path, ["step", "saturation"])
    steps = np.repeat(np.arange(6000), layers)
    np.testing.assert_array_equal(table["step"].to_numpy(), steps)
    np.testing.assert_array_equal(table["saturation"].to_numpy(), steps + np.where(steps < 2000, 0, 0.5))
