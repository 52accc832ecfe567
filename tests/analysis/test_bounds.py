"""What a metric can be where layers are sketched: its bounds by hand, and the ranking of runs by what is certain."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from delve_ray.analysis.bounds import Bounds, metric_bounds
from delve_ray.analysis.ranking import TrialResult, rank_trials
from delve_ray.analysis.ranking_table import ranking_table
from delve_ray.analysis.trials import read_trials
from delve_ray.cli import main
from delve_ray.errors import ReadError
from delve_ray.schema import LayerRow, interval_metrics, window_metrics
from delve_ray.storage import Storage
from delve_ray.writers.parquet import ParquetWriter
from tests.windows import layer_row, scalar, sketched_row, window

KEY = "saturation/eval/mean"


def whole(layer: str, k: int, features: int = 10) -> LayerRow:
    stats = {"saturation": k / features, "intrinsic_dimensionality": k, "effective_rank": k + 0.5}
    return layer_row(layer, "eval", features=features, stats=stats)


def seen(layer: str = "seen") -> LayerRow:
    """3/40."""
    return sketched_row(layer, 0.0625, "eval")


def unseen(layer: str = "unseen") -> LayerRow:
    """From 3/40 to 37/40."""
    return sketched_row(layer, 9.0, "eval")


def publish(path: Path, name: str, *rows: LayerRow, accuracy: float = 0.9) -> None:
    """A run of two windows, of which the last has these rows."""
    writer = ParquetWriter(Storage(path / name))
    writer.write(window([whole("early", 9)], run=name, step=0, window=0))
    writer.write(window(rows, run=name, step=1, window=1))
    writer.write_scalars([scalar("accuracy", accuracy, run=name)])
    described = {"run": name, "model": {"num_parameters": 100}}
    (path / name / "run.json").write_text(json.dumps(described))


def trials_of(path: Path) -> list[TrialResult]:
    return [trial for run in sorted(path.iterdir()) for trial in read_trials(Storage(run), (KEY,))]


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Saturations: 0.3 and 0.1 for sure; 0.1375 to 0.5625, of which 0.2 is reported; 0.075 to 0.925; 0.0875."""
    publish(tmp_path, "good", whole("a", 2), whole("b", 4))
    publish(tmp_path, "low", whole("a", 1))
    publish(tmp_path, "mixed", whole("a", 2), unseen())
    publish(tmp_path, "open", unseen("x"), unseen("y"))
    publish(tmp_path, "tight", whole("a", 1), seen())
    return tmp_path


def row_of(row: LayerRow) -> dict[str, Any]:
    names = ("layer", "features", "sketched", "saturation_low", "saturation_high")
    stats = {
        name: row.stats.get(name) for name in ("saturation", "intrinsic_dimensionality", "effective_rank", "trace")
    }
    return {name: getattr(row, name) for name in names} | stats


# --- bounds --------------------------------------------------------------------------------------------------


def test_bounds_of_a_mean_and_of_a_layer() -> None:
    rows = [row_of(each) for each in (whole("a", 2), unseen(), seen())]
    found = metric_bounds(rows, KEY)
    assert found is not None
    assert (found.low, found.high) == pytest.approx(((0.2 + 2 * 0.075) / 3, (0.2 + 0.925 + 0.075) / 3))
    assert found.unresolved == ("unseen",)
    assert metric_bounds(rows, "saturation/eval/unseen") == Bounds(3 / 40, 37 / 40, ("unseen",))
    assert metric_bounds(rows, "saturation/eval/seen") == Bounds(3 / 40, 3 / 40, ())
    assert metric_bounds(rows, "intrinsic_dimensionality/eval/mean") == Bounds(8 / 3, 42 / 3, ("unseen",))
    assert metric_bounds(rows, "intrinsic_dimensionality/eval/unseen") == Bounds(3.0, 37.0, ("unseen",))


def test_what_sketches_do_not_bound_is_not_known() -> None:
    rows = [row_of(each) for each in (whole("a", 2), seen())]
    found = metric_bounds(rows, "effective_rank/eval/mean")
    assert found is not None
    assert (math.isnan(found.low), math.isnan(found.high), found.unresolved) == (True, True, ("seen",))
    trace = metric_bounds([row_of(seen())], "trace/eval/mean")
    assert trace == Bounds(9.0625, 9.0625, ()), "that of a sketch is exact"


def test_nothing_is_bounded_where_nothing_is_sketched() -> None:
    rows = [row_of(whole("a", 2)), row_of(unseen())]
    for key in ("saturation/eval/a", "saturation/eval/none", "accuracy", "loss/eval/mean", "saturation/mean"):
        assert metric_bounds(rows, key) is None
    assert metric_bounds([rows[0]], KEY) is None
    assert metric_bounds([], KEY) is None


@given(st.lists(st.tuples(st.booleans(), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=12))
def test_the_published_bounds_are_those_of_the_files_and_hold_every_mean_that_there_can_be(layers: Any) -> None:
    rows, truth = [], []
    for index, (is_sketched, one, other, where) in enumerate(layers):
        low, high = sorted((one, other))
        exact = low + where * (high - low)
        changes: dict[str, Any] = {"sketched": True, "saturation_low": low, "saturation_high": high}
        stats = {} if is_sketched else {"saturation": exact}
        rows.append(layer_row(str(index), "eval", stats=stats, **(changes if is_sketched else {})))
        truth.append(exact)
    metrics = window_metrics(rows)
    found = metric_bounds([row_of(row) for row in rows], KEY)
    if found is None:
        assert not any(key.startswith(("saturation_low", "saturation_high")) for key in metrics)
        return
    published = (metrics["saturation_low/eval/mean"], metrics["saturation_high/eval/mean"])
    assert (found.low, found.high) == pytest.approx(published, rel=1e-12)
    assert found.low - 1e-12 <= np.mean(truth) <= found.high + 1e-12
    for row in rows:
        if row.sketched:
            assert metrics[f"saturation_low/eval/{row.layer}"] == row.saturation_low


def test_keys_of_bounds_are_those_of_other_metrics() -> None:
    assert interval_metrics("train", [("a", 0.5, None, None), ("b", math.nan, None, None)]) == {}
    assert interval_metrics(
        "train", [("mean", None, 0.25, 0.5), ("bad", math.nan, None, None), ("c", 1.0, None, None)]
    ) == {
        "saturation_low/train/layer:mean": 0.25,
        "saturation_low/train/mean": 0.625,
        "saturation_high/train/layer:mean": 0.5,
        "saturation_high/train/mean": 0.75,
    }


# --- ranking -------------------------------------------------------------------------------------------------


def test_a_trial_has_the_place_of_the_end_that_is_certain(sweep: Path) -> None:
    table = rank_trials(trials_of(sweep))
    assert table["trial"].to_pylist() == ["good", "mixed", "low", "tight", "open"], "0.3, 0.1375, 0.1, 0.0875, 0.075"
    rows = {row["trial"]: row for row in table.to_pylist()}
    assert {name: row[KEY] for name, row in rows.items()} == pytest.approx(
        {"good": 0.3, "mixed": 0.2, "low": 0.1, "tight": 0.0875, "open": None}
    )
    bounds = {name: (row["by_low"], row["by_high"]) for name, row in rows.items()}
    assert bounds["open"] == (3 / 40, 37 / 40)
    assert bounds["mixed"] == pytest.approx((0.1375, 0.5625))
    assert all(bounds[name] == pytest.approx((rows[name][KEY],) * 2) for name in ("good", "low", "tight"))
    assert {name: row["unresolved"] for name, row in rows.items() if row["unresolved"]} == {
        "mixed": ["unseen"],
        "open": ["x", "y"],
    }
    assert table.schema.metadata[b"left_out"] == b""
    least = rank_trials(trials_of(sweep), by_mode="min")["trial"].to_pylist()
    assert least == ["tight", "low", "good", "mixed", "open"], "0.0875, 0.1, 0.3, 0.5625, 0.925"


def test_only_sketched_trials_rank_by_their_bounds(tmp_path: Path) -> None:
    publish(tmp_path, "one", unseen(), seen())
    publish(tmp_path, "two", unseen(), whole("b", 3))
    publish(tmp_path, "none", unseen(), accuracy=0.5)
    rows = rank_trials(trials_of(tmp_path)).to_pylist()
    assert [(row["trial"], row["contender"]) for row in rows] == [("two", True), ("one", True), ("none", False)]
    table = rank_trials(trials_of(tmp_path), by="saturation/eval/unseen")
    assert table["saturation/eval/unseen"].null_count == 3
    assert table["by_low"].to_pylist() == [3 / 40] * 3


def test_a_statistic_that_sketches_do_not_have_ranks_by_the_other_layers_and_says_so(sweep: Path) -> None:
    table = rank_trials(trials_of(sweep), by="effective_rank/eval/mean")
    assert table["trial"].to_pylist() == ["good", "mixed", "low", "tight"]
    rows = {row["trial"]: row for row in table.to_pylist()}
    assert (rows["mixed"]["effective_rank/eval/mean"], rows["mixed"]["by_low"]) == (2.5, None)
    assert rows["mixed"]["unresolved"] == ["unseen"]
    assert table.schema.metadata[b"left_out"] == b"open"
    said = ranking_table(table)
    assert "without the layers that are sketched, which have no effective_rank: mixed (unseen), tight (seen)" in said
    assert "left out, as they failed or did not report both metrics: 1 (open)" in said


def test_the_layers_that_waste_most_are_known_by_the_most_that_they_can_use(sweep: Path) -> None:
    rows = {row["trial"]: row for row in rank_trials(trials_of(sweep)).to_pylist()}
    assert rows["tight"]["wasted"][0] == {
        "layer": "seen",
        "features": 40,
        "intrinsic_dimensionality": 3,
        "saturation": 3 / 40,
        "sketched": True,
    }
    assert rows["mixed"]["wasted"] == [
        {"layer": "a", "features": 10, "intrinsic_dimensionality": 2, "saturation": 0.2, "sketched": False},
        {
            "layer": "unseen",
            "features": 40,
            "intrinsic_dimensionality": 37,
            "saturation": 37 / 40,
            "sketched": True,
        },
    ]


def test_the_reported_metric_holds_where_there_are_no_files(sweep: Path) -> None:
    trials = [TrialResult("bare", {}, {"accuracy": 0.9, KEY: 0.25}), TrialResult("none", {}, {"accuracy": 0.9})]
    (row,) = rank_trials(trials).to_pylist()
    assert (row["by_low"], row["by_high"], row["unresolved"]) == (0.25, 0.25, [])
    with pytest.raises(ReadError, match="none of 1 trials"):
        rank_trials(trials[1:])
    failed = TrialResult("failed", {}, {"accuracy": 0.9}, str(sweep / "open"), failed=True)
    assert rank_trials([*trials, failed])["trial"].to_pylist() == ["bare"]


def test_a_directory_of_several_runs_keeps_them_apart(tmp_path: Path) -> None:
    writer = ParquetWriter(Storage(tmp_path))
    for index, (name, row) in enumerate((("one", unseen()), ("two", whole("a", 3)))):
        writer.write(window([row], run=name, window=index, step=index))
        writer.write_scalars([scalar("accuracy", 0.9, run=name)])
    rows = rank_trials(read_trials(Storage(tmp_path), (KEY,))).to_pylist()
    assert [(row["trial"], row["by_low"], row["unresolved"]) for row in rows] == [
        ("two", 0.3, []),
        ("one", 3 / 40, ["unseen"]),
    ]


def test_the_command_shows_the_interval(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rank", str(sweep), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["trial"], row["unresolved"]) for row in rows][-1] == ("open", ["x", "y"])
    assert main(["rank", str(sweep)]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = {line.split()[1]: line.split()[3] for line in lines if line.split()[0].isdigit()}
    assert found == {"good": "0.3", "mixed": "0.14…0.56", "low": "0.1", "tight": "0.0875", "open": "0.075…0.93"}
    assert (
        "an interval, as layers are sketched; ranked by the end that is certain: mixed (unseen), open (x, y)" in lines
    )
    assert "good wastes most in a (2 of 10 dimensions used), b (4 of 10 dimensions used)" in lines
