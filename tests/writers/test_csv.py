import csv
import math

import pytest

from delve_ray.errors import OptionError
from delve_ray.schema import SCALAR_STATS, SPECTRA_SCHEMA
from delve_ray.storage import Storage
from delve_ray.writers import WriterRun
from delve_ray.writers.csv import SPECTRA, CsvWriter
from tests.windows import HOSTILE_NAMES, START, layer_row, scalar, sketched_row, window


def opened(path):
    writer = CsvWriter()
    writer.open(WriterRun("run", Storage(path)))
    return writer


@pytest.fixture
def writer(tmp_path):
    return opened(tmp_path)


def read(tmp_path, name="spectra"):
    with open(tmp_path / "csv" / f"{name}.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_a_row_has_what_the_parquet_row_has(tmp_path, writer):
    stats = {name: 0.1 + index for index, name in enumerate(SCALAR_STATS)} | {"trace": math.nan}
    writer.write(window([layer_row("fc", stats=stats), layer_row("conv")], step=3, attempt=1, revision=2, trial="t"))
    first, second = read(tmp_path)
    assert set(first) == set(SPECTRA) <= set(SPECTRA_SCHEMA.names)
    assert {name: float(first[name]) for name in SCALAR_STATS if name != "trace"} == {
        name: value for name, value in stats.items() if name != "trace"
    }
    assert first["trace"] == "nan"
    shown = ("run", "trial", "attempt", "phase", "step", "revision", "layer", "features", "samples", "workers")
    assert [first[name] for name in shown] == ["run", "t", "1", "train", "3", "2", "fc", "3", "100", "4"]
    assert first["wall_time"] == START.isoformat()
    assert (second["layer"], second["alpha"], float(second["saturation"])) == ("conv", "", 2 / 3)


def test_a_sketched_row_has_its_interval(tmp_path, writer):
    writer.write(window([sketched_row("seen", 0.0625), sketched_row("unseen", 9.0), layer_row("whole")]))
    columns = ("sketched", "saturation", "saturation_low", "saturation_high", "unseen_variance", "trace")
    assert [tuple(row[name] for name in columns) for row in read(tmp_path)] == [
        ("True", "0.075", "0.075", "0.075", "0.0625", "9.0625"),
        ("True", "", "0.075", "0.925", "9.0", "18.0"),
        ("False", str(2 / 3), "", "", "", "6.5"),
    ]


def test_a_file_that_was_begun_with_other_columns_keeps_them(tmp_path, writer):
    writer.write(window([layer_row("first")]))
    path = tmp_path / "csv" / "spectra.csv"
    heads, values = path.read_text().splitlines()
    kept = [index for index, name in enumerate(heads.split(",")) if name not in ("sketched", "saturation_low")]
    cut = [",".join(line.split(",")[index] for index in kept) for line in (heads, values)]
    path.write_text("".join(f"{line},{more}\n" for line, more in zip(cut, ("of_old", "1"), strict=True)))
    again = opened(tmp_path)
    for step in (1, 2):
        again.write(window([sketched_row("unseen", 9.0)], step=step))
    rows = read(tmp_path)
    assert [(row["layer"], row["saturation_high"], row["of_old"]) for row in rows] == [
        ("first", "", "1"),
        ("unseen", "0.925", ""),
        ("unseen", "0.925", ""),
    ]
    assert rows[-1]["wall_time"] == START.isoformat()


def test_live_windows_are_left_out(tmp_path, writer):
    writer.write(window([layer_row()], final=False))
    assert not (tmp_path / "csv").exists()


def test_scalars(tmp_path, writer):
    writer.write_scalars([scalar("loss", 0.1, step=2), scalar("loss", math.inf, rank=1)])
    assert [(r["name"], r["step"], r["rank"], r["value"]) for r in read(tmp_path, "scalars")] == [
        ("loss", "2", "0", "0.1"),
        ("loss", "0", "1", "inf"),
    ]


@pytest.mark.parametrize("cut", [0, 1, 5, 60])
def test_what_a_crash_has_cut_in_two_is_cut_off(tmp_path, writer, cut):
    """Also where a layer's name has a line break and quotes in it."""
    rows = [layer_row(name) for name in (*HOSTILE_NAMES, 'quo"te\n"d')]
    writer.write(window(rows, step=0))
    path = tmp_path / "csv" / "spectra.csv"
    whole = path.read_bytes()
    writer.write(window(rows, step=1))
    both = path.read_bytes()
    for end in range(len(whole), len(both), 97):
        path.write_bytes(both[: end + cut])
        opened(tmp_path).write(window([layer_row("after")], step=2))
        found = [(row["step"], row["layer"]) for row in read(tmp_path)]
        assert found[: len(rows)] == [("0", row.layer) for row in rows]
        assert found[-1] == ("2", "after")
        assert found[len(rows) : -1] == [("1", row.layer) for row in rows][: len(found) - len(rows) - 1]


def test_a_failed_write_is_cut_off_by_the_next(tmp_path, writer, monkeypatch):
    writer.write(window([layer_row("a")], step=0))
    with monkeypatch.context() as patch:
        patch.setattr("delve_ray.writers.csv.os.fsync", lambda number: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            writer.write(window([layer_row("b")], step=1))
    writer.write(window([layer_row("b")], step=1))
    assert [row["layer"] for row in read(tmp_path)] == ["a", "b"]


def test_a_file_that_somebody_has_removed(tmp_path, writer):
    writer.write(window([layer_row("a")]))
    (tmp_path / "csv" / "spectra.csv").unlink()
    writer.write(window([layer_row("b")]))
    assert [row["layer"] for row in read(tmp_path)] == ["b"]


def test_only_local_directories():
    with pytest.raises(OptionError, match="save_to='csv' needs a local savefile, not savefile='mock:///bucket/run'"):
        CsvWriter().open(WriterRun("run", Storage("mock:///bucket/run")))
