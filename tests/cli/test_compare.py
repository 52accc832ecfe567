import json

import numpy as np
import pytest

from delve_ray import read_spectra
from delve_ray.analysis.comparing import compare, comparison_table
from delve_ray.analysis.recompute import recompute
from delve_ray.cli import main
from tests.cli.runs import publish


@pytest.fixture
def runs(tmp_path):
    publish(tmp_path / "a", run="first", layers=("conv1", "fc"))
    narrow = {"stats": {"saturation": 0.25, "intrinsic_dimensionality": 1}, "eigenvalues": np.array([8.0, 1.0, 0.0])}
    publish(tmp_path / "b", run="second", steps=3, layers=("conv1", "head"), **narrow)
    return [str(tmp_path / "a"), str(tmp_path / "b")]


def labelled(runs, read=read_spectra, **options):
    tables = [read(run, **options) for run in runs]
    return {f"{table['run'][0]}  {run}": table for run, table in zip(runs, tables, strict=True)}


def test_text_and_json_are_those_of_the_function(runs, capsys):
    expected = compare(labelled(runs))

    assert main(["compare", *runs]) == 0
    text = capsys.readouterr().out
    assert text == comparison_table(expected) + "\n"
    assert text.splitlines()[0] == f"A  first  {runs[0]}"
    assert main(["compare", *runs, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown == expected.to_pylist()
    assert [row["difference"] for row in shown if row["layer"] == "conv1"] == [0.0, 0.25 - 2 / 3] * 2
    assert "A has no head" in text
    assert "B has no fc" in text


def test_one_phase_step_and_statistic(runs, capsys):
    assert main(["compare", *runs, "--json", "--phase", "eval", "--step", "1", "--stat", "trace"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert {(row["phase"], row["step"]) for row in shown} == {("eval", 1)}
    assert "trace" in shown[0]


def test_all_at_one_threshold(runs, capsys):
    assert main(["compare", *runs, "--json", "--threshold", "0.5"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown == compare(labelled(runs, recompute, threshold=0.5)).to_pylist()
    assert {row["threshold"] for row in shown} == {0.5}
    assert {row["saturation"] for row in shown} == {1 / 3}


def test_a_folder_of_runs(runs, tmp_path, capsys):
    assert main(["compare", str(tmp_path), "--json"]) == 0
    assert {row["run"] for row in json.loads(capsys.readouterr().out)} == {"first", "second"}


def test_one_run_alone_and_one_that_cannot_be_read(runs, tmp_path, capsys):
    assert main(["compare", runs[0]]) == 2
    assert capsys.readouterr().err == "delve-ray: 1 of the runs given can be compared; it takes two.\n"

    (tmp_path / "c" / "spectra").mkdir(parents=True)
    (tmp_path / "c" / "spectra" / "x.parquet").write_text("not Parquet")
    assert main(["compare", *runs, str(tmp_path / "c"), "--json"]) == 2
    said = capsys.readouterr()
    assert {row["run"] for row in json.loads(said.out)} == {"first", "second"}
    assert len(said.err.splitlines()) == 1
    assert f"{tmp_path / 'c'}/spectra/x.parquet cannot be read as Parquet" in said.err


def test_an_unknown_statistic(runs, capsys):
    assert main(["compare", *runs, "--stat", "satration"]) == 2
    assert capsys.readouterr().err.startswith("delve-ray: stat='satration' is no statistic; valid: saturation, ")
