"""What cannot be read: one sentence for each thing, exit code 2, and the rest is still shown. Through every command."""

import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from delve_ray import read_spectra
from delve_ray.cli import main
from delve_ray.schema import SCHEMA_VERSION, VERSION_KEY
from delve_ray.storage import Storage
from delve_ray.writers.parquet import ParquetWriter
from tests.cli.runs import publish
from tests.windows import layer_row, scalar, window

READERS = ("summary", "compare", "rank", "export", "recompute", "diagnose")


def half_written(path):
    publish(path, run="bad", accuracy=0.5)
    file = next((path / "spectra").iterdir())
    file.write_bytes(file.read_bytes()[:-100])


def corrupted(path):
    """A byte of a page is another one; its checksum tells."""
    publish(path, run="bad", accuracy=0.5)
    file = next((path / "spectra").iterdir())
    offset = pq.ParquetFile(file).metadata.row_group(0).column(0).dictionary_page_offset
    data = bytearray(file.read_bytes())
    data[offset + 40] ^= 0xFF
    file.write_bytes(data)


def newer(path):
    publish(path, run="bad", accuracy=0.5)
    file = next((path / "spectra").iterdir())
    table = pq.read_table(file)
    metadata = {VERSION_KEY: str(SCHEMA_VERSION + 1).encode()}
    pq.write_table(table.replace_schema_metadata(metadata), file)


def foreign(path):
    (path / "spectra").mkdir(parents=True)
    pq.write_table(pa.table({"x": [1]}), path / "spectra" / "x.parquet")


def text(path):
    (path / "spectra").mkdir(parents=True)
    (path / "spectra" / "x.parquet").write_text("not Parquet")


BAD = {
    half_written: r"{bad}/spectra/\S+ cannot be read as Parquet .*restore it, or remove it to read the rest",
    corrupted: r"{bad}/spectra/\S+ cannot be read as Parquet .*",
    newer: r"{bad}/spectra/\S+: schema version 2 is newer than 1, .*upgrade it .*",
    foreign: r"{bad}/spectra/x.parquet has no layer, phase, run, step: not written by delve_ray, or damaged; remove it",
    text: r"{bad}/spectra/x.parquet cannot be read as Parquet .*",
}


@pytest.fixture
def good(tmp_path):
    for name in "ab":
        publish(tmp_path / "runs" / name, run=name, accuracy=0.5, described={"run": name})
    return tmp_path / "runs"


def runs_of(rows):
    return {row.get("run", row.get("trial")) for row in rows}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("spoil", BAD, ids=lambda spoil: spoil.__name__)
def test_a_run_that_is_damaged_is_named_and_hides_no_other(good, capsys, name, spoil):
    spoil(good / "bad")
    assert main([name, str(good), "--json"]) == 2
    said = capsys.readouterr()
    assert re.fullmatch(f"delve-ray: {BAD[spoil].format(bad=re.escape(str(good / 'bad')))}\n", said.err)
    rows = json.loads(said.out)
    if name != "diagnose":  # which may find nothing
        assert runs_of(rows) == {"a", "b"}
    assert main([name, str(good)]) == 2
    said = capsys.readouterr()
    assert len(said.err.splitlines()) == 1
    assert str(good / "a") in said.out or name in ("export", "rank")


@pytest.mark.parametrize("name", READERS)
def test_a_folder_that_is_no_run(good, tmp_path, capsys, name):
    (tmp_path / "empty").mkdir()
    assert main([name, str(good), str(tmp_path / "empty"), str(tmp_path / "nowhere"), "--json"]) == 2
    said = capsys.readouterr()
    first, second = said.err.splitlines()
    assert first.startswith(
        f"delve-ray: {tmp_path / 'empty'}: no run there, neither run.json nor spectra/ in it or below"
    )
    assert second.startswith(f"delve-ray: {tmp_path / 'nowhere'}: no run there, it does not exist; ")
    assert name == "diagnose" or runs_of(json.loads(said.out)) == {"a", "b"}


@pytest.mark.parametrize("name", READERS)
def test_nothing_but_a_filesystem_that_does_not_exist(capsys, name):
    assert main([name, "nosuch://bucket/run"]) == 2
    said = capsys.readouterr()
    assert said.err.splitlines()[0].startswith("delve-ray: paths: savefile='nosuch://bucket/run': pyarrow cannot open")
    assert said.out == ""


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("options", [[], ["--json"]])
def test_an_empty_run_is_nothing_bad(good, capsys, name, options):
    (good / "empty").mkdir()
    (good / "empty" / "run.json").write_text('{"run": "empty", "world_size": 1}')
    code = main([name, str(good), *options])
    said = capsys.readouterr()
    assert code == (2 if name == "compare" else 0)
    assert said.err.count("\n") == (1 if name == "compare" else 0)
    if options and name != "diagnose":
        assert runs_of(json.loads(said.out)) == {"a", "b"}


@pytest.mark.parametrize("name", READERS)
def test_an_empty_run_alone(tmp_path, capsys, name):
    (tmp_path / "run.json").write_text("{}")
    code = main([name, str(tmp_path), "--json"])
    said = capsys.readouterr()
    assert code == (2 if name in ("compare", "rank") else 0)
    assert json.loads(said.out) == []


@pytest.mark.parametrize("content", ["", "not JSON", "[1, 2]", '{"run": 3, "options": 4, "attempts": 5}'])
def test_a_run_json_that_is_damaged_costs_nothing_else(good, capsys, content):
    (good / "a" / "run.json").write_text(content)
    for name in READERS:
        assert main([name, str(good)]) == 0, name
        assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", READERS)
def test_statistics_that_are_null_nan_and_infinite(tmp_path, capsys, name):
    stats = {"saturation": np.nan, "condition_number": np.inf, "log_determinant": -np.inf, "alpha": np.nan}
    for run in "ab":
        writer = ParquetWriter(Storage(tmp_path / run))
        rows = [layer_row("x", "eval", stats=stats), layer_row("y", "eval", stats={}), layer_row("z", "eval")]
        writer.write(window(rows, run=run))
        writer.write_scalars([scalar("accuracy", 0.5, run=run), scalar("loss", np.nan, run=run)])

    assert main([name, str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    assert main([name, str(tmp_path), "--json"]) == 0
    out = capsys.readouterr().out
    json.loads(out, parse_constant=lambda token: pytest.fail(f"{token} is no JSON"))


def test_runs_with_different_layers_are_summed_up_side_by_side(tmp_path, capsys):
    publish(tmp_path / "a", run="a", layers=("conv1", "fc"))
    publish(tmp_path / "b", run="b", layers=("embed", "attention"))
    assert main(["summary", str(tmp_path), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {(row["run"], row["layer"]) for row in rows} == {
        ("a", "conv1"),
        ("a", "fc"),
        ("b", "embed"),
        ("b", "attention"),
    }
    assert main(["compare", str(tmp_path), "--json"]) == 0
    compared = json.loads(capsys.readouterr().out)
    assert len(compared) == len(rows)
    assert all(row["difference"] is None for row in compared if row["run"] == "b")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--step", "7"], r"delve-ray: {path}: no rows with step=7; there are: train 2 steps .*"),
        (["--step", "7", "--phase", "eval", "--json"], r"delve-ray: {path}: no rows with step=7 and phase=eval; .*"),
    ],
)
def test_a_step_that_is_not_there(tmp_path, capsys, arguments, sentence):
    publish(tmp_path)
    for name in ("summary", "recompute"):
        assert main([name, str(tmp_path), *arguments]) == 2
        said = capsys.readouterr()
        assert re.fullmatch(sentence.format(path=re.escape(str(tmp_path))) + "\n", said.err)
        assert said.out in ("", "[]\n")


@pytest.mark.parametrize("name", READERS)
def test_hostile_names_steer_no_terminal(tmp_path, capsys, name):
    hostile = "\x1b[2J\x9b31m[red]<b>a\nb\u202e$\\alpha$"
    for run in "xy":
        publish(tmp_path / run, layers=(hostile, "fc"), run=run + hostile, accuracy=0.5, config={hostile: hostile})
    for options in ([], ["--json"]):
        assert main([name, str(tmp_path), *options]) == 0
        out = capsys.readouterr().out
        if name != "export" or options:  # CSV in a pipe is as it is
            assert all(char.isprintable() or char == "\n" for char in out)


def test_an_error_that_quotes_a_hostile_name_is_one_line(tmp_path, capsys):
    path = tmp_path / "a\n\x1b[2Jb"
    assert main(["summary", str(path)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "\x1b" not in err


def test_json_and_parquet_agree_in_every_value(tmp_path, capsys):
    rng = np.random.default_rng(0)
    writer = ParquetWriter(Storage(tmp_path))
    rows = [
        layer_row(f"l{i}", stats={"saturation": rng.random(), "trace": rng.lognormal(0, 30)}, eigenvalues=rng.random(3))
        for i in range(20)
    ]
    writer.write(window(rows))
    stored = [row | {"wall_time": row["wall_time"].isoformat()} for row in read_spectra(tmp_path).to_pylist()]
    for arguments in (["summary"], ["export"]):
        assert main([*arguments, str(tmp_path), "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == stored
