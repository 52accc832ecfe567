import json
import math

import pytest

from delve_ray.analysis.ranking import rank_trials
from delve_ray.analysis.trials import read_trials
from delve_ray.cli import main
from delve_ray.storage import Storage
from delve_ray.writers.parquet import ParquetWriter
from tests.cli.runs import publish
from tests.training import train_digits
from tests.windows import layer_row, scalar, window


def trial(path, number, accuracy, saturation, **options):
    options = {"config": {"lr": 0.1 * number, "net": {"width": 8 * number}}} | options
    described = {
        "run": f"train_{number:05d}",
        "model": {"num_parameters": 100 * number},
        "options": {"trial": f"t{number}", "trial_config": json.dumps(options["config"])},
    }
    publish(
        path / f"t{number}",
        run=f"train_{number:05d}",
        trial=f"t{number}",
        accuracy=accuracy,
        stats={"saturation": saturation, "intrinsic_dimensionality": 1},
        described=described,
        **options,
    )


@pytest.fixture
def sweep(tmp_path):
    for number, accuracy, saturation in ((1, 0.980, 0.2), (2, 0.975, 0.6), (3, 0.90, 0.9)):
        trial(tmp_path, number, accuracy, saturation)
    return tmp_path


def ranked(capsys, *arguments):
    code = main(["rank", *map(str, arguments), "--json"])
    said = capsys.readouterr()
    return code, json.loads(said.out), said.err


def test_the_contenders_by_saturation_then_the_others(sweep, capsys):
    code, rows, _ = ranked(capsys, sweep)
    assert code == 0
    assert [(row["place"], row["trial"], row["contender"]) for row in rows] == [
        (1, "t2", True),
        (2, "t1", True),
        (3, "t3", False),
    ]
    assert rows[0]["saturation/eval/mean"] == pytest.approx(0.6)
    assert (rows[0]["accuracy"], rows[0]["num_parameters"]) == (0.975, 200)
    assert (rows[0]["config/lr"], rows[0]["config/net/width"]) == (0.2, 16)
    assert rows[0]["path"] == str(sweep / "t2")
    wasted = {"layer": "conv1", "features": 3, "intrinsic_dimensionality": 1, "saturation": 0.6, "sketched": False}
    assert rows[0]["wasted"][0] == wasted

    assert main(["rank", str(sweep)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("  ") and line.split()[0].isdigit()] == [
        "t2",
        "t1",
        "t3",
    ]
    assert "net/width=16" in lines[2]
    assert max(map(len, lines[:6])) <= 80


def test_options(sweep, capsys):
    assert [row["trial"] for row in ranked(capsys, sweep, "--within", "0.001")[1]] == ["t1", "t2", "t3"]
    assert [row["trial"] for row in ranked(capsys, sweep, "--within", "1", "--by-mode", "min")[1]] == ["t1", "t2", "t3"]
    assert [row["trial"] for row in ranked(capsys, sweep, "--mode", "min", "--within", "0")[1]] == ["t3", "t2", "t1"]
    rows = ranked(capsys, sweep, "--by", "saturation/train/fc", "--accuracy", "saturation/eval/mean")[1]
    assert [row["trial"] for row in rows] == ["t3", "t2", "t1"]
    assert rows[0]["saturation/train/fc"] == 0.9


def test_trials_without_a_metric_are_left_out_and_named(sweep, capsys):
    trial(sweep, 4, math.nan, 0.5)
    trial(sweep, 5, None, 0.5)
    trial(sweep, 6, 0.99, None)
    (sweep / "t7").mkdir()
    (sweep / "t7" / "run.json").write_text('{"run": "began"}')

    assert len(ranked(capsys, sweep)[1]) == 3
    assert main(["rank", str(sweep)]) == 0
    assert "did not report both metrics: 4 (t4, t5, t6, began)" in capsys.readouterr().out


def test_no_trial_ranks(sweep, capsys):
    code, rows, said = ranked(capsys, sweep, "--accuracy", "acc")
    assert (code, rows) == (2, [])
    assert said.count("\n") == 1
    assert "reported both 'saturation/eval/mean' and 'acc'; reported: accuracy, " in said
    assert "tracker.add_scalar('acc', value, step)" in said
    assert main(["rank", str(sweep), "--within", "-1"]) == 2
    assert capsys.readouterr().err.startswith("delve-ray: within=-1.0 is no distance from the best 'accuracy'")


def test_what_cannot_be_read_does_not_hide_the_others(sweep, capsys):
    (sweep / "t9" / "spectra").mkdir(parents=True)
    (sweep / "t9" / "spectra" / "x.parquet").write_text("not Parquet")
    code, rows, said = ranked(capsys, sweep)
    assert (code, len(rows), said.count("\n")) == (2, 3, 1)


def test_trials_of_one_name_get_their_place_beside_it(tmp_path, capsys):
    for name, saturation in (("x", 0.2), ("y", 0.4)):
        publish(tmp_path / name, run="run", accuracy=0.9, stats={"saturation": saturation})
    rows = ranked(capsys, tmp_path)[1]
    assert [row["trial"] for row in rows] == [f"run {tmp_path / 'y'}", f"run {tmp_path / 'x'}"]


def test_the_metrics_are_those_that_the_tracker_reported(tmp_path):
    metrics = {}
    savefile = train_digits(tmp_path / "run", metrics=metrics)
    (found,) = read_trials(Storage(savefile), ["trace/eval/2"])
    reported = {key: value for key, value in metrics.items() if key.endswith("/mean") or key == "trace/eval/2"}
    assert {key: value for key, value in found.metrics.items() if key != "accuracy"} == pytest.approx(reported)
    assert found.metrics["accuracy"] == metrics["accuracy"]
    assert rank_trials([found])["trial"].to_pylist() == ["digits"]


def test_final_windows_come_before_live_ones_and_ranks_are_averaged(tmp_path):
    writer = ParquetWriter(Storage(tmp_path))
    writer.write(window([layer_row(phase="eval", stats={"saturation": 0.5})], step=0))
    live = [layer_row(phase=phase, stats={"saturation": value}) for phase, value in (("eval", 0.9), ("train", 0.25))]
    writer.write(window(live, step=1, window=1, final=False))
    writer.write_scalars(
        [scalar("loss", value, step=step, rank=rank) for step, rank, value in ((0, 0, 9.0), (1, 0, 1.0), (1, 1, 3.0))]
    )
    (found,) = read_trials(Storage(tmp_path))
    assert found.metrics["loss"] == 2.0
    assert found.metrics["saturation/eval/mean"] == 0.5
    assert found.metrics["saturation/train/mean"] == 0.25


@pytest.mark.parametrize("text", ["", "not JSON", "[1]", "null"])
def test_a_config_that_is_none(tmp_path, text):
    ParquetWriter(Storage(tmp_path)).write(window([layer_row()], trial="t", trial_config=text))
    (found,) = read_trials(Storage(tmp_path))
    assert (found.trial, found.config) == ("t", {})
