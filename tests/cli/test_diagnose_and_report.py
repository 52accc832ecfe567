import json
import re

import pytest

from delve_ray import read_spectra
from delve_ray.analysis.diagnosis import Finding, diagnose
from delve_ray.cli import main
from tests.cli.runs import publish


@pytest.fixture
def run(tmp_path):
    """A run whose layers vary and have no variance, as far as its rows say: something to find."""
    return str(publish(tmp_path / "run", steps=3, described={"run": "run", "world_size": 4}))


FINDING = Finding(
    kind="over-wide",
    layers=tuple(f"block.{i}\x1b[2J" for i in range(9)),
    evidence="Nine layers of 512 features need 3 to 9 dimensions " * 3,
    advice="Make them narrower.",
    rule="A rule.",
    source="A source.",
    run="run\n",
    phase="eval",
    step=7,
)


def test_findings_are_those_of_the_function(run, capsys):
    with open(f"{run}/run.json") as file:
        described = json.load(file)
    expected = [finding.as_dict() for finding in diagnose(read_spectra(run), described)]

    assert main(["diagnose", run, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == expected
    assert found
    assert set(found[0]) >= {"kind", "layers", "evidence", "advice", "rule", "source", "run", "phase", "step"}


def test_the_function_is_given_the_rows_and_what_run_json_says(run, capsys, monkeypatch):
    given = []
    monkeypatch.setattr("delve_ray.cli.diagnose.diagnose", lambda *arguments: given.append(arguments) or [])
    assert main(["diagnose", run]) == 0
    assert capsys.readouterr().out == f"{run}\nnothing found\n"
    ((spectra, described),) = given
    assert spectra.equals(read_spectra(run))
    assert described == {"run": "run", "world_size": 4}


def test_the_text_of_a_finding(run, capsys, monkeypatch):
    monkeypatch.setattr("delve_ray.cli.diagnose.diagnose", lambda *_: [FINDING])
    assert main(["diagnose", run]) == 0
    where, head, *lines = capsys.readouterr().out.splitlines()
    assert where == run
    names = ", ".join(rf"block.{i}\x1b[2J" for i in range(6))
    assert head == rf"over-wide: {names} and 3 more (run\n, eval, step 7)"
    assert " ".join(line.strip() for line in lines) == f"{FINDING.evidence.strip()} {FINDING.advice}"
    assert len(lines) == 3
    assert all(line.startswith("  ") and len(line) <= 80 for line in lines)


def test_a_report_is_written_and_what_cannot_be_read_is_said(run, tmp_path, capsys):
    (tmp_path / "bad" / "spectra").mkdir(parents=True)
    (tmp_path / "bad" / "spectra" / "x.parquet").write_text("not Parquet")
    page = tmp_path / "page.html"

    assert main(["report", run, "-o", str(page)]) == 0
    assert capsys.readouterr().out == f"{page}\n"
    assert re.match(r"(?i)<!doctype html>", page.read_text("utf-8"))
    page.unlink()
    assert main(["report", run, str(tmp_path / "bad"), str(tmp_path / "nowhere"), "-o", str(page), "--json"]) == 2
    said = capsys.readouterr()
    (row,) = json.loads(said.out)
    assert row["output"] == str(page)
    assert page.exists()
    assert row["problems"]
    assert len(said.err.splitlines()) == len(row["problems"]) + 1
    assert "x.parquet" in said.err


def test_a_report_of_nothing(tmp_path, capsys):
    assert main(["report", str(tmp_path / "nowhere"), "-o", str(tmp_path / "x.html"), "--json"]) == 2
    said = capsys.readouterr()
    assert json.loads(said.out) == []
    assert said.err.count("\n") == 1
    assert not (tmp_path / "x.html").exists()
