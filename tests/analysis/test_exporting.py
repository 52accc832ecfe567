import csv
import io
import json
import math

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from delve_ray import read_covariances, read_scalars, read_spectra
from delve_ray.analysis import exporting
from delve_ray.analysis.exporting import delve_csv, export_npy, spectra_csv
from delve_ray.errors import OptionError, ReadError
from delve_ray.moments import unpack_triangle
from delve_ray.schema import SPECTRA_SCHEMA
from delve_ray.storage import Storage
from delve_ray.writers.parquet import ParquetWriter
from tests.spectra_tables import network, spectra_table
from tests.windows import COVARIANCE, HOSTILE_NAMES, layer_row, publish, scalar, window


def test_csv_has_what_parquet_has():
    rng = np.random.default_rng(0)
    names = [name for name in HOSTILE_NAMES if name]
    table = spectra_table(
        *({"layer": name, "saturation": rng.random(), "trace": rng.lognormal(0, 20)} for name in names),
        {"layer": "limits", "saturation": None, "condition_number": math.inf, "log_determinant": -math.inf},
        {"layer": "nan", "alpha": math.nan, "trial_config": '{"lr": 0.1, "name": "a;b"}'},
    )
    found = list(csv.DictReader(io.StringIO(spectra_csv(table).decode(), newline="")))
    columns = [field.name for field in SPECTRA_SCHEMA if not pa.types.is_list(field.type)]
    assert list(found[0]) == columns
    for row, expected in zip(found, table.to_pylist(), strict=True):
        for name in columns:
            if expected[name] is None:
                assert row[name] == ""
            elif isinstance(expected[name], float) and not math.isnan(expected[name]):
                assert float(row[name]) == expected[name]
            elif isinstance(expected[name], bool):
                assert row[name] == str(expected[name]).lower()
            elif isinstance(expected[name], int):
                assert int(row[name]) == expected[name]
            elif isinstance(expected[name], str):
                assert row[name] == expected[name]
    assert found[-1]["alpha"] == "nan"
    assert found[0]["wall_time"] == "2024-05-06 07:08:09.123456Z"


def test_pandas_reads_the_csv_as_the_table():
    table = network(["conv1", "fc"], steps=3)
    frame = pd.read_csv(io.BytesIO(spectra_csv(table)))
    assert frame["saturation"].tolist() == table["saturation"].to_pylist()
    assert frame["layer"].tolist() == table["layer"].to_pylist()


# What delve 0.1.50's CSV writer wrote for two epochs of a network with layers "0" and "2" and a scalar "loss", with
# stats=["lsat", "idim", "det", "trc", "dtrc"]: its first line.
DELVE_HEAD = (
    ";loss;train-saturation_0;train-intrinsic-dimensionality_0;train-covariance-determinant_0;"
    "train-covariance-trace_0;train-diagonal-trace_0;train-saturation_2;train-intrinsic-dimensionality_2;"
    "train-covariance-determinant_2;train-covariance-trace_2;train-diagonal-trace_2;eval-saturation_0;"
    "eval-intrinsic-dimensionality_0;eval-covariance-determinant_0;eval-covariance-trace_0;eval-diagonal-trace_0;"
    "eval-saturation_2;eval-intrinsic-dimensionality_2;eval-covariance-determinant_2;eval-covariance-trace_2;"
    "eval-diagonal-trace_2"
)


def test_the_layout_of_delve(tmp_path):
    writer = ParquetWriter(Storage(tmp_path))
    for step in range(2):
        stats = {
            "saturation": 0.5 + step / 8,
            "intrinsic_dimensionality": 2.0 + step,
            "determinant": 1e-300,
            "trace": 6.5,
            "diagonal_trace": math.inf,
        }
        rows = [layer_row(name, phase, stats=stats) for phase in ("train", "eval") for name in ("0", "2")]
        writer.write(window(rows, step=step, window=step))
    writer.write_scalars([scalar("loss", 1.0 + rank, step=0, rank=rank) for rank in range(2)])

    text = delve_csv(read_spectra(tmp_path), read_scalars(tmp_path))
    head, first, second = text.splitlines()
    assert head == DELVE_HEAD
    assert first == "0;1.5;" + ";".join(["0.5;2;1e-300;6.5;inf"] * 4)
    assert second == "1;;" + ";".join(["0.625;3;1e-300;6.5;inf"] * 4)
    frame = pd.read_csv(io.StringIO(text), sep=";", index_col=0)
    assert frame["eval-saturation_2"].to_dict() == {0: 0.5, 1: 0.625}
    assert math.isnan(frame["loss"][1])


def test_the_layout_of_delve_where_something_is_missing():
    table = spectra_table(
        {"step": 10, "layer": "a;b", "saturation": 0.5, "trace": None},
        {"step": 20, "layer": "a;b", "saturation": math.nan, "intrinsic_dimensionality": None},
        {"step": 20, "layer": "late\nlayer", "saturation": 0.25},
    )
    frame = pd.read_csv(io.StringIO(delve_csv(table)), sep=";", index_col=0)
    assert frame.index.tolist() == [10, 20]
    assert list(frame) == [
        f"train-{stat}_{layer}"
        for layer in ("a;b", "late\nlayer")
        for stat in ("saturation", "intrinsic-dimensionality")
    ]
    assert frame["train-saturation_a;b"].isna().tolist() == [False, True]
    assert frame["train-saturation_late\nlayer"].tolist()[1] == 0.25
    with pytest.raises(ReadError, match=r"spectra hold 2 runs \(a, b, …\)"):
        delve_csv(pa.concat_tables([network(["fc"], run="a"), network(["fc"], run="b")]))


def arrays(folder):
    index = json.loads((folder / "index.json").read_text("utf-8"))
    found = {}
    for entry in index:
        kind = entry["file"].partition("-")[0]
        found[kind, entry["run"], entry["phase"], entry["layer"], entry["features"]] = (
            entry["steps"],
            np.load(folder / entry["file"], allow_pickle=False),
        )
    assert len(found) == len(index)
    assert {path.name for path in folder.iterdir()} == {"index.json", *(entry["file"] for entry in index)}
    return found


@pytest.mark.parametrize("at_a_time", [1, 1 << 30])
def test_arrays_are_those_of_the_files(tmp_path, monkeypatch, at_a_time):
    monkeypatch.setattr(exporting, "COVARIANCE_BYTES", at_a_time)
    runs = [tmp_path / "runs" / "x", tmp_path / "runs" / "y"]
    for number, run in enumerate(runs):
        for step in (5, 0, 7):
            publish(
                run,
                HOSTILE_NAMES,
                value=0.1 + step + number,
                step=step,
                phases=("train", "eval"),
                run=f"run{number}",
                covariance=True,
            )
    calls = []
    index = export_npy(tmp_path / "runs", tmp_path / "out", progress=lambda done, total: calls.append((done, total)))

    found = arrays(tmp_path / "out")
    assert len(index) == len(found) == 2 * 2 * 2 * len(HOSTILE_NAMES)
    for row in read_covariances(runs).to_pylist():
        steps, matrices = found["covariances", row["run"], row["phase"], row["layer"], 3]
        assert steps == [0, 5, 7]
        assert matrices.shape == (3, 3, 3)
        np.testing.assert_array_equal(matrices[steps.index(row["step"])], unpack_triangle(row["covariance"], 3))
    for row in read_spectra(runs).to_pylist():
        steps, eigenvalues = found["eigenvalues", row["run"], row["phase"], row["layer"], 3]
        np.testing.assert_array_equal(eigenvalues[steps.index(row["step"])], row["eigenvalues"])
    rows = 3 * 2 * len(HOSTILE_NAMES)
    assert calls[-1] == (2 * rows, 2 * rows)


def test_arrays_of_one_phase_without_covariances(tmp_path):
    publish(tmp_path / "run", ("fc",), phases=("train", "eval"))
    export_npy(tmp_path / "run", tmp_path / "out", phase="eval")
    ((key, (steps, eigenvalues)),) = arrays(tmp_path / "out").items()
    assert key == ("eigenvalues", "run", "eval", "fc", 3)
    assert steps == [0]
    np.testing.assert_array_equal(eigenvalues, [[4.0, 2.5, 0.0]])


def test_a_layer_that_changes_its_width_has_several_files(tmp_path):
    writer = ParquetWriter(Storage(tmp_path / "run"))
    writer.write(window([layer_row(covariance=COVARIANCE)], step=0))
    narrow = {"features": 2, "eigenvalues": np.array([2.0, 1.0]), "covariance": np.array([2.0, 0.0, 1.0])}
    writer.write(window([layer_row(**narrow)], step=1, window=1, attempt=1))

    export_npy(tmp_path / "run", tmp_path / "out")
    found = arrays(tmp_path / "out")
    assert {key[0::4]: steps for key, (steps, _) in found.items()} == {
        ("eigenvalues", 3): [0],
        ("eigenvalues", 2): [1],
        ("covariances", 3): [0],
        ("covariances", 2): [1],
    }
    np.testing.assert_array_equal(found["covariances", "run", "train", "conv1", 2][1], [[[2.0, 0.0], [0.0, 1.0]]])


def test_a_run_that_cannot_be_read_leaves_nothing_behind(tmp_path):
    for name in ("x", "y", "z"):
        publish(tmp_path / "runs" / name, ("a", "b"), run=name, covariance=True)
    damaged = tmp_path / "runs" / "y" / "covariances" / "000000-0000000000-000000.parquet"
    metadata = pq.ParquetFile(damaged).metadata
    values = metadata.row_group(1).column(metadata.num_columns - 2)  # of layer b; the last column is wall_time
    assert values.path_in_schema.startswith("covariance.")
    data = bytearray(damaged.read_bytes())
    data[values.data_page_offset + values.total_compressed_size - 8] ^= 0xFF
    damaged.write_bytes(data)

    told = []
    index = export_npy(
        tmp_path / "runs", tmp_path / "out", failed=lambda run, error: told.append((run.uri, str(error)))
    )
    assert {key[1] for key in arrays(tmp_path / "out")} == {"x", "z"}
    assert len(index) == 2 * 2 * 2
    ((uri, message),) = told
    assert uri == str(tmp_path / "runs" / "y")
    assert message.startswith(f"{damaged} cannot be read as Parquet")
    with pytest.raises(ReadError, match="cannot be read as Parquet"):
        export_npy(tmp_path / "runs", tmp_path / "other")


def test_arrays_go_into_a_new_folder(tmp_path):
    publish(tmp_path / "run")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    with pytest.raises(OptionError, match="out' is not empty"):
        export_npy(tmp_path / "run", tmp_path / "out")
