import io
import json

import numpy as np
import pandas as pd
import pytest

from delve_ray import read_scalars, read_spectra
from delve_ray.analysis.exporting import delve_csv, spectra_csv
from delve_ray.cli import main
from tests.cli.runs import publish


@pytest.fixture
def run(tmp_path):
    return publish(tmp_path / "run", steps=3, accuracy=0.75, described={"run": "run"})


def exported(capsys, *arguments):
    assert main(["export", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_csv_to_stdout_and_to_a_file(run, tmp_path, capsys):
    text = exported(capsys, run)
    assert text.encode() == spectra_csv(read_spectra(run))
    assert exported(capsys, run, "--phase", "eval").count("\n") == 1 + 3 * 2
    assert exported(capsys, run, "-o", tmp_path / "out" / "x.csv") == ""
    assert (tmp_path / "out" / "x.csv").read_text() == text


@pytest.mark.parametrize("option", [["--json"], ["--format", "json"], ["-f", "json"]])
def test_json_has_all_columns_of_all_rows(run, capsys, option):
    rows = json.loads(exported(capsys, run, *option))
    stored = read_spectra(run).to_pylist()
    assert len(rows) == 12
    for row, expected in zip(rows, stored, strict=True):
        assert row == expected | {"wall_time": expected["wall_time"].isoformat()}


def test_the_layout_of_delve(run, tmp_path, capsys):
    text = exported(capsys, run, "--format", "delve")
    assert text == delve_csv(read_spectra(run), read_scalars(run))
    frame = pd.read_csv(io.StringIO(text), sep=";", index_col=0)
    assert frame["train-saturation_fc"].tolist() == [2 / 3] * 3
    assert frame["accuracy"].tolist()[2] == 0.75

    publish(tmp_path / "other", run="other")
    assert main(["export", str(tmp_path), "--format", "delve"]) == 2
    assert "spectra hold 2 runs" in capsys.readouterr().err


def test_arrays(run, tmp_path, capsys):
    out = exported(capsys, run, "--format", "npy", "-o", tmp_path / "arrays")
    assert out == f"{tmp_path / 'arrays'}: 4 arrays, and index.json, which says what is in which\n"
    index = json.loads((tmp_path / "arrays" / "index.json").read_text())
    assert {(entry["phase"], entry["layer"]) for entry in index} == {
        (phase, layer) for phase in ("train", "eval") for layer in ("conv1", "fc")
    }
    np.testing.assert_array_equal(np.load(tmp_path / "arrays" / index[0]["file"]), [[4.0, 2.5, 0.0]] * 3)


def test_arrays_of_the_runs_that_can_be_read(run, tmp_path, capsys):
    (tmp_path / "bad" / "spectra").mkdir(parents=True)
    (tmp_path / "bad" / "spectra" / "x.parquet").write_text("not Parquet")
    arguments = ["export", str(run), str(tmp_path / "bad"), "--format", "npy", "-o", str(tmp_path / "arrays")]
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert "4 arrays" in said.out
    assert said.err.startswith(f"delve-ray: {tmp_path / 'bad'}/spectra/x.parquet cannot be read as Parquet")
    assert len(list((tmp_path / "arrays").glob("*.npy"))) == 4


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--format", "npy"], "--format npy writes several files: name a new folder with -o"),
        (["--format", "npy", "-o", "{path}"], "'{path}' is not empty; "),
        (["--format", "npy", "-o", "{path}/run/spectra"], "{path}/run/spectra holds the files of a run, which stay"),
        (["-o", "{path}/run/spectra/x.parquet"], "{path}/run/spectra holds the files of a run, which stay as they are"),
        (["-o", "{path}/run/run.json/x.csv"], "'{path}/run/run.json/x.csv' cannot be written ("),
        (["-o", "{path}/"], "'{path}/' names no file"),
        (
            ["--format", "xlsx"],
            "Invalid value for '--format' / '-f': ",
        ),
    ],
)
def test_what_cannot_be_written(run, tmp_path, capsys, arguments, sentence):
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert main(["export", str(run), *(argument.format(path=tmp_path) for argument in arguments)]) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"delve-ray: {sentence.format(path=tmp_path)}")
    assert said.err.count("\n") == 1
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
