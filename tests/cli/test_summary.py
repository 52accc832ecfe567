import json
from datetime import datetime

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from delve_ray import read_spectra
from delve_ray.analysis.table import NOTHING_YET, layer_table, sparkline
from delve_ray.cli import main
from delve_ray.schema import SPECTRA_SCHEMA
from delve_ray.storage import Storage
from delve_ray.writers.parquet import ParquetWriter
from tests.cli.runs import publish
from tests.spectra_tables import network
from tests.windows import HOSTILE_NAMES, START, layer_row, window


def test_summary_says_where_and_what(tmp_path, capsys):
    publish(tmp_path, steps=3)

    assert main(["summary", str(tmp_path)]) == 0
    where, what, *table = capsys.readouterr().out.splitlines()
    assert where == str(tmp_path)
    assert what == "run run: world size 4; windows: 3 train, 3 eval; last step 2"
    assert "\n".join(table) == layer_table(read_spectra(tmp_path), trend=True)


def test_summary_of_a_step_and_phase(tmp_path, capsys):
    publish(tmp_path, steps=3)

    assert main(["summary", str(tmp_path), "--step", "1", "--phase", "eval"]) == 0
    table = capsys.readouterr().out.splitlines()[2:]
    assert "\n".join(table) == layer_table(read_spectra(tmp_path), step=1, phase="eval", trend=True)


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


def test_a_run_that_a_link_leads_to_is_shown_once(tmp_path, capsys):
    publish(tmp_path / "first")
    (tmp_path / "latest").symlink_to(tmp_path / "first")
    assert main(["summary", str(tmp_path / "first"), str(tmp_path / "latest"), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 4


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


def refuse(token):
    raise AssertionError(f"{token} is no JSON")


def test_json_knows_neither_nan_nor_infinity(tmp_path, capsys):
    stats = {"saturation": 0.0, "condition_number": np.inf, "log_determinant": -np.inf, "alpha": np.nan}
    publish(tmp_path, steps=1, stats=stats, eigenvalues=np.array([np.inf, np.nan, 0.0]))

    assert main(["summary", str(tmp_path), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out, parse_constant=refuse)
    for row in rows:
        assert [row[name] for name in stats] == [0.0, None, None, None]
        assert row["eigenvalues"] == [None, None, 0.0]


def test_text_json_and_parquet_agree(tmp_path, capsys):
    rng = np.random.default_rng(1)
    writer = ParquetWriter(Storage(tmp_path))
    for step in range(4):
        shares = rng.random(3)
        rows = [
            layer_row(f"l{i}", stats={"saturation": share, "intrinsic_dimensionality": 1 + i, "trace": rng.random()})
            for i, share in enumerate(shares)
        ]
        writer.write(window(rows, step=step, window=step))

    assert main(["summary", str(tmp_path), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    last = read_spectra(tmp_path, filters=[("step", "==", 3)]).to_pylist()
    for row, stored in zip(shown, last, strict=True):
        assert row | {"wall_time": None} == stored | {"wall_time": None}
    assert main(["summary", str(tmp_path)]) == 0
    lines = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines() if line[:1] == "l"}
    for row in last:
        line = lines[row["layer"]]
        assert line[2:4] == [str(row["features"]), str(row["samples"])]
        assert line[5] == str(row["intrinsic_dimensionality"])
        assert line[7] == f"{row['saturation']:.0%}"


@pytest.mark.parametrize("arguments", [["--json"], []])
def test_names_are_shown_literally_and_steer_nothing(tmp_path, capsys, arguments):
    names = [*HOSTILE_NAMES, "\x1b[2J", "[red]x[/red]", "\x9b31m", "a\u202eb", "<script>alert(1)</script>"]
    publish(tmp_path, layers=names, run="\x1b]0;pwned\x07[bold]")

    assert main(["summary", str(tmp_path), *arguments]) == 0
    out = capsys.readouterr().out
    assert all(char.isprintable() or char == "\n" for char in out)
    if arguments:
        assert {row["layer"] for row in json.loads(out)} == set(names)
    else:
        assert r"run \x1b]0;pwned\x07[bold]: " in out
        assert "[red]x[/red]" in out


# --- the course over steps -----------------------------------------------------------------------------------


def test_a_course_goes_from_zero_to_its_own_highest():
    assert sparkline([0.0, 0.5, 1.0], 12) == "▁▅█"
    assert sparkline([0.0, 0.05, 0.1], 12) == "▁▅█"
    assert sparkline([0.0, 0.0], 12) == "▁▁"
    assert sparkline([], 12) == ""
    assert sparkline([None, float("nan"), 0.2, float("inf")], 12) == "  █ "


def test_a_long_course_is_averaged_into_its_width():
    values = np.repeat([0.1, 0.25, 0.4, 0.8], 25)
    assert sparkline(values.tolist(), 4) == "▂▃▅█" == sparkline([0.1, 0.25, 0.4, 0.8], 4)
    assert len(sparkline(np.linspace(0, 1, 1000).tolist(), 12)) == 12


@pytest.mark.parametrize("phases", [("train",), ("eval", "train")])
@pytest.mark.parametrize("steps", [2, 40])
def test_the_table_has_the_course_up_to_its_step_and_fits(phases, steps):
    spectra = network(["conv1", "fc"], steps=steps, phases=phases)
    table = layer_table(spectra, trend=True, step=steps - 1)
    lines = table.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[1].count(" was") == len(phases)
    values = spectra.to_pydict()
    for phase in phases:
        width = len(lines[2].split()[-1])
        course = [
            value
            for name, layer, value in zip(values["phase"], values["layer"], values["saturation"], strict=True)
            if name == phase and layer == "conv1"
        ]
        assert sparkline(course, width) in lines[2]
    assert " was" not in layer_table(spectra, trend=True, step=0)
    assert " was" not in layer_table(spectra)


def test_without_room_there_is_no_course():
    spectra = network([f"encoder.layers.{i}.self_attention.out_projection" for i in range(2)], steps=5)
    assert " was" not in layer_table(spectra, trend=True)
    assert " was" in layer_table(spectra, trend=True, width=120)


def test_a_layer_that_some_windows_lack_has_gaps():
    spectra = network(["a", "b"], steps=5, phases=("train",))
    there = pc.or_(pc.equal(spectra["layer"], "a"), pc.is_in(spectra["step"], pa.array([1, 4])))
    table = layer_table(spectra.filter(there), trend=True)
    (line,) = [line for line in table.splitlines() if line.startswith("b ")]
    assert sparkline([None, 2 / 4, None, None, 2 / 7], 5) == " █  ▅"
    assert line.endswith("  █  ▅")
