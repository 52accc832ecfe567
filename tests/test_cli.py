import json
import os
import re
import subprocess
import sys
from datetime import datetime

import numpy as np
import pytest

from delve_ray import read_spectra
from delve_ray.analysis.table import NOTHING_YET, layer_table
from delve_ray.cli import UNBUILT, main
from delve_ray.schema import SPECTRA_SCHEMA
from delve_ray.storage import Storage
from delve_ray.writers.parquet import ParquetWriter
from tests.windows import START, layer_row, window


def publish(path, steps=2, run="run", phases=("train", "eval"), **row):
    writer = ParquetWriter(Storage(path))
    for step in range(steps):
        rows = [layer_row(name, phase, **row) for phase in phases for name in ("conv1", "fc")]
        writer.write(window(rows, run=run, step=step, window=step))
    return path


def command(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "delve_ray.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        **options,
    )


def test_summary_says_where_and_what(tmp_path, capsys):
    publish(tmp_path, steps=3)

    assert main(["summary", str(tmp_path)]) == 0
    where, what, *table = capsys.readouterr().out.splitlines()
    assert where == str(tmp_path)
    assert what == "run run: world size 4; windows: 3 train, 3 eval; last step 2"
    assert "\n".join(table) == layer_table(read_spectra(tmp_path))


def test_summary_of_a_step_and_phase(tmp_path, capsys):
    publish(tmp_path, steps=3)

    assert main(["summary", str(tmp_path), "--step", "1", "--phase", "eval"]) == 0
    table = capsys.readouterr().out.splitlines()[2:]
    assert "\n".join(table) == layer_table(read_spectra(tmp_path), step=1, phase="eval")


def test_summary_names_layers_with_too_few_samples(tmp_path, capsys):
    publish(tmp_path, phases=("eval",), samples=2)

    assert main(["summary", str(tmp_path)]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[3].split()[:5] == ["layer", "type", "features", "samples", "n/d"]
    assert table[4].split()[:5] == ["conv1", "Linear", "3", "2", "0.67"]
    assert table[-1] == "eval: undersampled, n/d is below 1: conv1 0.67, fc 0.67"
    assert max(map(len, table[2:])) <= 80


def test_summary_of_several_runs_and_of_one_without_rows(tmp_path, capsys):
    publish(tmp_path / "sweep" / "a", run="first")
    publish(tmp_path / "sweep" / "b", run="second")
    (tmp_path / "started").mkdir()
    (tmp_path / "started" / "run.json").write_text('{"run": "third", "world_size": 8}')

    assert main(["summary", str(tmp_path / "sweep"), str(tmp_path / "started")]) == 0
    first, second, third = capsys.readouterr().out.split("\n\n")
    assert first.splitlines()[:2] == [
        str(tmp_path / "sweep" / "a"),
        "run first: world size 4; windows: 2 train, 2 eval; last step 1",
    ]
    assert "run second: " in second
    assert third == f"{tmp_path / 'started'}\nrun third: world size 8; windows: none\n{NOTHING_YET}\n"


def test_json_has_the_rows_of_the_table_under_the_names_of_the_columns(tmp_path, capsys):
    publish(tmp_path, steps=3)

    assert main(["summary", str(tmp_path), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["phase"], row["step"], row["layer"]) for row in rows] == [
        ("train", 2, "conv1"),
        ("train", 2, "fc"),
        ("eval", 2, "conv1"),
        ("eval", 2, "fc"),
    ]
    assert all(list(row) == SPECTRA_SCHEMA.names for row in rows)
    assert (rows[0]["eigenvalues"], rows[0]["saturation"]) == ([4.0, 2.5, 0.0], 2 / 3)
    assert (rows[0]["intrinsic_dimensionality"], rows[0]["final"], rows[0]["alpha"]) == (2, True, None)
    assert (rows[0]["samples_per_feature"], rows[0]["undersampled"], rows[0]["rankme"]) == (100 / 3, False, None)
    assert datetime.fromisoformat(rows[0]["wall_time"]) == START


def test_json_of_one_step_and_phase_and_of_no_rows(tmp_path, capsys):
    publish(tmp_path / "a", steps=3)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "run.json").write_text("{}")

    assert main(["summary", str(tmp_path), "--json", "--step", "0", "--phase", "eval"]) == 0
    assert [(row["phase"], row["step"]) for row in json.loads(capsys.readouterr().out)] == [("eval", 0)] * 2


def test_json_knows_neither_nan_nor_infinity(tmp_path, capsys):
    stats = {"saturation": 0.0, "condition_number": np.inf, "log_determinant": -np.inf, "alpha": np.nan}
    publish(tmp_path, steps=1, stats=stats, eigenvalues=np.array([np.inf, np.nan, 0.0]))

    def refuse(token):
        raise AssertionError(f"{token} is no JSON")

    assert main(["summary", str(tmp_path), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out, parse_constant=refuse)
    for row in rows:
        assert [row[name] for name in stats] == [0.0, None, None, None]
        assert row["eigenvalues"] == [None, None, 0.0]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["{path}/nowhere"], r"delve-ray: {path}/nowhere: no run there, it does not exist; .*"),
        (["{path}/run", "--step", "7"], r"delve-ray: {path}/run: no rows with step=7; there are: train 2 steps .*"),
        (["{path}/run", "--step", "7", "--json"], r"delve-ray: {path}/run: no rows with step=7; .*"),
        (["nosuch://bucket/run"], r"delve-ray: .*nosuch://bucket/run.*"),
        (["{path}/damaged"], r"delve-ray: {path}/damaged/spectra/x.parquet cannot be read as Parquet .*"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(tmp_path, capsys, arguments, sentence):
    publish(tmp_path / "run")
    (tmp_path / "damaged" / "spectra").mkdir(parents=True)
    (tmp_path / "damaged" / "spectra" / "x.parquet").write_text("not Parquet")

    assert main(["summary", *(argument.format(path=tmp_path) for argument in arguments)]) == 2
    said = capsys.readouterr()
    assert re.fullmatch(sentence.format(path=re.escape(str(tmp_path))) + "\n", said.err)
    assert said.out in ("", "[]\n")


def test_a_damaged_run_does_not_hide_the_others(tmp_path, capsys):
    publish(tmp_path / "good")
    (tmp_path / "bad" / "spectra").mkdir(parents=True)
    (tmp_path / "bad" / "spectra" / "x.parquet").write_text("not Parquet")

    assert main(["summary", str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert said.out.startswith(f"{tmp_path / 'good'}\nrun run: ")
    assert len(said.err.splitlines()) == 1

    assert main(["summary", str(tmp_path), "--json"]) == 2
    assert len(json.loads(capsys.readouterr().out)) == 4


@pytest.mark.parametrize("name", UNBUILT)
@pytest.mark.parametrize("rest", [[], ["a", "b", "--json"], ["--help"]])
def test_commands_that_are_not_built_say_so(capsys, name, rest):
    assert main([name, *rest]) == 2
    said = capsys.readouterr()
    assert re.fullmatch(rf"delve-ray: {name} \(.*\) is not built yet; summary is\.\n", said.err)
    assert said.out == ""


@pytest.mark.parametrize(
    "arguments",
    [[], ["nonsense"], ["summary"], ["summary", "x", "--nonsense"], ["summary", "x", "--phase", "test"]],
)
def test_unknown_arguments(capsys, arguments):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "error: " in capsys.readouterr().err


def test_the_version(capsys, monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", {"delve_ray": "1.2.3"}.__getitem__)
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert (ended.value.code, capsys.readouterr().out) == (0, "delve-ray 1.2.3\n")


def test_the_process_prints_utf8_and_imports_neither_torch_nor_ray(tmp_path):
    publish(tmp_path)
    program = (
        "import sys, delve_ray.cli; code = delve_ray.cli.main(); "
        "sys.exit(code or any(name in sys.modules for name in ('torch', 'ray', 'matplotlib')))"
    )
    run = subprocess.run([sys.executable, "-c", program, "summary", tmp_path], capture_output=True, timeout=120)
    assert (run.returncode, run.stderr) == (0, b"")
    assert "━" in run.stdout.decode("utf-8")


def test_a_terminal_without_box_drawing_gets_a_table(tmp_path):
    run = command("summary", publish(tmp_path), env=os.environ | {"PYTHONIOENCODING": "latin-1", "PYTHONUTF8": "0"})
    assert (run.returncode, run.stderr) == (0, "")
    assert "conv1" in run.stdout


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_reader_that_leaves_gets_no_traceback(tmp_path, options):
    publish(tmp_path)
    reader, writer = os.pipe()
    os.close(reader)
    try:
        run = subprocess.run(
            [sys.executable, "-m", "delve_ray.cli", "summary", tmp_path, *options],
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
        )
    finally:
        os.close(writer)
    assert (run.returncode, run.stderr) == (141, "")
