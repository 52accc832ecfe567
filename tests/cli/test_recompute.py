import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from delve_ray import read_spectra
from delve_ray.analysis.recompute import recompute
from delve_ray.cli import main
from delve_ray.schema import SPECTRA_SCHEMA
from delve_ray.storage import Storage
from delve_ray.writers.parquet import ParquetWriter
from tests.cli.runs import publish
from tests.windows import layer_row, window


@pytest.fixture
def run(tmp_path):
    eigenvalues = np.array([8.0, 1.0, 1.0])
    return publish(tmp_path / "run", steps=3, eigenvalues=eigenvalues, described={"run": "run"})


def answered(capsys, *arguments):
    assert main(["recompute", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_json_has_the_rows_of_the_last_windows(run, capsys):
    rows = json.loads(answered(capsys, run, "--threshold", "0.8", "--json"))
    expected = recompute(run, threshold=0.8, filters=[("step", "==", 2)]).to_pylist()
    expected = [row | {"wall_time": row["wall_time"].isoformat()} for row in expected]
    assert rows == expected
    assert {(row["step"], row["threshold"], row["intrinsic_dimensionality"]) for row in rows} == {(2, 0.8, 1)}
    rows = json.loads(answered(capsys, run, "-t", "0.9", "-t", "0.8", "--json", "--step", "0", "--phase", "eval"))
    assert [(row["step"], row["phase"], row["intrinsic_dimensionalities"]) for row in rows] == [(0, "eval", [2, 1])] * 2


def test_the_text_has_what_was_asked_for(run, capsys):
    text = answered(capsys, run, "-t", "0.9", "-t", "0.8", "-s", "trace", "-s", "effective_rank")
    assert text.splitlines()[0] == str(run)
    blocks = [block.splitlines() for block in text.split("\n\n")]
    assert len(blocks) == 1 + 2 * 2
    assert blocks[0][3].split()[:6] == ["conv1", "Linear", "3", "100", "33.3", "2"] or "67%" in blocks[0][3]
    assert blocks[1] == ["dimensions by threshold, train, step 2", *blocks[1][1:]]
    assert blocks[1][1].split() == ["layer", "0.9", "0.8"]
    assert blocks[1][2].split() == ["conv1", "2", "1"]
    assert blocks[2][0] == "train, step 2"
    assert blocks[2][1].split() == ["layer", "trace", "effective_rank"]
    (effective,) = {row["effective_rank"] for row in recompute(run).to_pylist()}
    assert blocks[2][2].split() == ["conv1", "6.5", f"{effective:.4g}"]
    assert "dim: dimensions that hold 90 % of the variance" in text
    assert max(map(len, text.splitlines()[1:])) <= 80


def test_many_statistics_fit(run, capsys):
    from delve_ray.schema import SCALAR_STATS

    text = answered(capsys, run, *(part for name in SCALAR_STATS for part in ("-s", name)))
    assert max(map(len, text.splitlines()[1:])) <= 80
    heads = {name for line in text.splitlines() for name in line.split()}
    # alpha is not defined for three eigenvalues; the table of layers has the dimension as dim.
    assert set(SCALAR_STATS) - heads == {"alpha", "intrinsic_dimensionality"}


def test_a_file_has_all_steps_under_the_schema_and_the_run_stays(run, tmp_path, capsys):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    target = tmp_path / "out.parquet"
    assert answered(capsys, run, "-t", "0.8", "-o", target) == f"{target}: 12 rows\n"
    table = pq.read_table(target)
    assert table.schema.names == SPECTRA_SCHEMA.names
    assert table.schema.metadata == SPECTRA_SCHEMA.metadata
    assert table.to_pylist() == recompute(run, threshold=0.8).to_pylist()
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before

    # A folder of such files reads like a run.
    (tmp_path / "again" / "spectra").mkdir(parents=True)
    target.rename(tmp_path / "again" / "spectra" / "all.parquet")
    assert read_spectra(tmp_path / "again").equals(recompute(run, threshold=0.8), check_metadata=True)


def test_a_spectrum_that_is_not_finite_has_no_dimensions(tmp_path, capsys):
    broken = layer_row("broken", features=2, eigenvalues=np.array([np.nan, 1.0]))
    ParquetWriter(Storage(tmp_path / "run")).write(window([layer_row("fine"), broken]))
    lines = answered(capsys, tmp_path / "run", "-t", "0.9", "-t", "0.5").splitlines()
    assert [line.split() for line in lines[-2:]] == [["fine", "2", "1"], ["broken", "–", "–"]]


def test_a_file_and_json(run, tmp_path, capsys):
    rows = json.loads(answered(capsys, run, "-o", tmp_path / "out.parquet", "--json", "--phase", "eval"))
    assert len(rows) == 6 == pq.read_table(tmp_path / "out.parquet").num_rows


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["-t", "90"], "sat_threshold=90.0 is out of range"),
        (["-t", "0.9", "-t", "0.9"], "sat_threshold=[0.9, 0.9] has 0.9 twice"),
        (["-s", "satration"], "stats: unknown name 'satration'; did you mean 'saturation'?"),
        (["-s", "rankme"], "{run}: rankme needs the covariances, and the run has none of these rows; record them with"),
        (["--step", "9"], "{run}: no rows with step=9; there are: train 3 steps from 0 to 2; eval 3 steps"),
        (["-o", "{run}/spectra/out.parquet"], "{run}/spectra holds the files of a run, which stay as they are"),
    ],
)
def test_what_cannot_be_recomputed(run, capsys, arguments, sentence):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert main(["recompute", str(run), *(argument.format(run=run) for argument in arguments)]) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"delve-ray: {sentence.format(run=run)}")
    assert said.err.count("\n") == 1
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_one_run_of_two_lacks_what_is_needed(run, tmp_path, capsys):
    covariance = np.array([8.0, 0.0, 0.0, 1.0, 0.0, 1.0])
    publish(tmp_path / "with", run="with", covariance=covariance, eigenvalues=np.array([8.0, 1.0, 1.0]))
    assert main(["recompute", str(tmp_path), "-s", "rankme", "--json"]) == 2
    said = capsys.readouterr()
    rows = json.loads(said.out)
    assert {row["run"] for row in rows} == {"with"}
    assert all(row["rankme"] > 1 for row in rows)
    assert said.err.count("\n") == 1
