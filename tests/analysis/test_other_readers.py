"""What docs/reading.md shows for other readers gives the rows of read_spectra, from files of attempts and revisions."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from delve_ray import read_spectra
from delve_ray.schema import SPECTRA_SCHEMA
from tests.windows import later, publish

PAGE = (Path(__file__).parents[2] / "docs" / "reading.md").read_text("utf-8")


def snippet(title: str) -> str:
    """The code below a heading of the page, without what it asserts of the page's own run."""
    section = PAGE.split(f"### {title}\n")[1].split("\n## ")[0].split("\n### ")[0]
    code = re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    assert len(code) == 1
    return "".join(line for line in code[0].splitlines(keepends=True) if not line.startswith("assert "))


def run_snippet(title, run, **names):
    pytest.importorskip(title.split()[-1].lower())
    names |= {"run": str(run), "storage": str(run.parent), "print": lambda *_: None}
    exec(snippet(title), names)
    return names


@pytest.fixture(params=range(3))
def run(tmp_path, request):
    """Windows of several attempts and revisions, many of them replaced, whose layers differ."""
    rng = np.random.default_rng(request.param)
    path = tmp_path / "runs" / "first"
    for number in range(40):
        step, attempt, revision = (int(rng.integers(high)) for high in (5, 3, 4))
        layers = [name for name in ("z", "0", "a", "c") if rng.random() < 0.7] or ["0"]
        publish(
            path,
            layers,
            value=float(number),
            step=step,
            attempt=attempt,
            revision=revision,
            window=number,
            phases=("train", "eval") if rng.random() < 0.5 else ("train",),
            wall_time=later(number),
            run="first",
        )
    return path


def truth(run, *columns):
    return [tuple(row.values()) for row in read_spectra(run, columns=columns).to_pylist()]


KEYS = ("phase", "step", "attempt", "revision", "layer", "saturation")


def without_repetitions(rows):
    """Of rows of one revision that was written twice, which only a crash leaves, the later one."""
    return list({row[:-1]: row for row in sorted(rows)}.values())


def test_pandas(run):
    rows = run_snippet("pandas", run)["rows"]
    found = [tuple(row) for row in rows[list(KEYS)].itertuples(index=False)]
    assert without_repetitions(found) == sorted(truth(run, *KEYS))


def test_polars(run):
    rows = run_snippet("polars", run)["rows"]
    expected = sorted(row for row in truth(run, *KEYS) if row[4] == "0")
    assert without_repetitions(rows.select(KEYS).iter_rows()) == expected


def test_duckdb_gives_all_columns_in_the_same_order(run):
    current = run_snippet("DuckDB", run)["current"]
    assert list(current.columns) == SPECTRA_SCHEMA.names
    assert current.fetchall() == truth(run, *SPECTRA_SCHEMA.names)


def test_duckdb_keeps_directories_apart(tmp_path):
    for name, attempt, value in (("x", 0, 0.25), ("y", 5, 0.5)):
        publish(tmp_path / "runs" / name, ("b", "a"), value=value, attempt=attempt)
    current = run_snippet("DuckDB", tmp_path / "runs" / "x")["current"]
    assert sorted(current.fetchall()) == sorted(truth(tmp_path / "runs", *SPECTRA_SCHEMA.names))


def test_duckdb_of_a_window_that_was_written_twice(tmp_path):
    run = tmp_path / "runs" / "first"
    publish(run, ("a", "b"), value=0.1, window=0, wall_time=later(0))
    publish(run, ("b", "c"), value=0.2, window=1, wall_time=later(1))
    publish(run, ("b",), value=0.3, window=2, wall_time=later(1))
    current = run_snippet("DuckDB", run)["current"]
    assert current.fetchall() == truth(run, *SPECTRA_SCHEMA.names)
    assert truth(run, "layer", "saturation") == [("a", 0.1), ("c", 0.2), ("b", 0.3)]


def test_arrow_s_dataset(run):
    import pyarrow.compute as pc

    found = run_snippet("A dataset of pyarrow", run, pc=pc)["dataset"].to_table()
    assert found.schema.equals(SPECTRA_SCHEMA)
    assert set(truth(run, *KEYS)) < {tuple(row[name] for name in KEYS) for row in found.to_pylist()}
