import json
import math

import pytest

from delve_ray.analysis.ranking import TrialResult, rank_trials
from delve_ray.analysis.ranking_table import ranking_table
from delve_ray.errors import OptionError, ReadError
from delve_ray.storage import Storage
from delve_ray.writers.parquet import ParquetWriter
from tests.windows import layer_row, window

KEY = "saturation/eval/mean"


def trial(name, accuracy, saturation, **more):
    return TrialResult(name, {"width": len(name)}, {"accuracy": accuracy, KEY: saturation}, **more)


def names(table):
    return table.column("trial").to_pylist()


def run_of(path, layers, parameters, phase="eval"):
    """A run's files: layers as (name, features, intrinsic dimensionality), at two steps."""
    for step in (0, 1):
        rows = [
            layer_row(
                name,
                phase,
                features=features,
                stats={"saturation": k / features * step, "intrinsic_dimensionality": float(k * step)},
            )
            for name, features, k in layers
        ]
        ParquetWriter(Storage(path)).write(window(rows, step=step, window=step))
    Storage(path).write_atomic("run.json", json.dumps({"model": {"num_parameters": parameters}}).encode())
    return str(path)


def test_saturation_orders_the_contenders_and_accuracy_the_others():
    trials = [
        trial("best", 0.990, 0.2),
        trial("near", 0.985, 0.6),
        trial("edge", 0.980, 0.9),
        trial("far", 0.979, 1.0),
        trial("farther", 0.5, 1.0),
    ]
    table = rank_trials(trials)
    assert names(table) == ["edge", "near", "best", "far", "farther"]
    assert table.column("contender").to_pylist() == [True, True, True, False, False]
    assert table.column("place").to_pylist() == [1, 2, 3, 4, 5]
    assert table.column(KEY).to_pylist() == [0.9, 0.6, 0.2, 1.0, 1.0]
    assert names(rank_trials(trials, within=0)) == ["best", "near", "edge", "far", "farther"]
    assert names(rank_trials(trials, within=1)) == ["far", "farther", "edge", "near", "best"]


def test_losses_and_metrics_of_which_less_is_better():
    trials = [trial("a", 0.10, 0.3), trial("b", 0.11, 0.2), trial("c", 0.5, 0.1)]
    assert names(rank_trials(trials, mode="min")) == ["a", "b", "c"]
    assert names(rank_trials(trials, mode="min", by_mode="min")) == ["b", "a", "c"]


def test_what_the_files_say(tmp_path):
    small = run_of(tmp_path / "small" / "saturation", [("a", 10, 9), ("b", 64, 4), ("c", 32, 31), ("d", 8, 1)], 100)
    trials = [
        trial("large", 0.99, 0.5, path=run_of(tmp_path / "large", [("a", 10, 9)], 1000)),
        trial("small", 0.99, 0.5, path=str(tmp_path / "small")),
        trial("bare", 0.99, 0.5, path=str(tmp_path / "nothing")),
    ]
    table = rank_trials(trials)
    assert names(table) == ["small", "large", "bare"], "of two alike, the smaller one; what is not known comes last"
    first, _, last = table.to_pylist()
    assert (first["num_parameters"], last["num_parameters"]) == (100, None)
    assert [layer["layer"] for layer in first["wasted"]] == ["b", "d", "a"]
    wasted = {"layer": "b", "features": 64, "intrinsic_dimensionality": 4, "saturation": 4 / 64, "sketched": False}
    assert first["wasted"][0] == wasted
    assert last["wasted"] == []
    full = rank_trials([trial("full", 0.9, 1.0, path=run_of(tmp_path / "full", [("a", 10, 10)], 1))])
    assert full.to_pylist()[0]["wasted"] == []
    assert first["path"] == str(tmp_path / "small")
    assert small.endswith("saturation")
    by_train = rank_trials(
        [TrialResult("t", {}, {"accuracy": 1, "saturation/train/mean": 0.5}, path=small)], by="saturation/train/mean"
    )
    assert by_train.to_pylist()[0]["wasted"] == [], "there are no rows of that phase"


def test_what_does_not_rank_is_named():
    trials = [
        trial("good", 0.9, 0.5),
        trial("failed", 0.9, 0.5, failed=True),
        trial("nan", math.nan, 0.5),
        TrialResult("bare", {}, {"accuracy": 0.9}),
        TrialResult("text", {}, {"accuracy": "0.9", KEY: True}),
    ]
    table = rank_trials(trials)
    assert names(table) == ["good"]
    assert table.schema.metadata[b"left_out"].decode().split("\n") == ["failed", "nan", "bare", "text"]
    with pytest.raises(ReadError) as raised:
        rank_trials([trials[3]], accuracy="acc")
    assert str(raised.value) == (
        "none of 1 trials has ended well and reported both 'saturation/eval/mean' and 'acc'; reported: accuracy"
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mode": "best"}, "mode='best' is neither 'max' nor 'min'"),
        ({"by_mode": None}, "by_mode=None"),
        ({"within": -0.1}, "within=-0.1 is no distance from the best 'accuracy'"),
        ({"within": math.nan}, "within=nan"),
        ({"within": "1%"}, "within='1%'"),
    ],
)
def test_options_that_cannot_be_used(options, words):
    with pytest.raises(OptionError, match=words):
        rank_trials([trial("a", 1.0, 1.0)], **options)


def test_configs_of_all_shapes():
    trials = [
        TrialResult("a", {"lr": 0.1, "model": {"width": 8, "act": "relu"}, "mixed": 1}, {"accuracy": 1.0, KEY: 0.5}),
        TrialResult("b", {"lr": 1, "model": {"width": 4}, "mixed": "x", "only": [1, 2]}, {"accuracy": 1, KEY: 0.4}),
    ]
    first, second = rank_trials(trials).to_pylist()
    assert (first["config/lr"], first["config/model/width"], first["config/model/act"]) == (0.1, 8, "relu")
    assert (second["config/model/act"], second["config/only"]) == (None, [1, 2])
    assert (first["config/mixed"], second["config/mixed"]) == ("1", "x")


def test_numbers_of_other_libraries():
    import numpy as np
    import torch

    trials = [
        trial("numpy", np.float32(0.5), np.float64(0.25)),
        trial("torch", torch.tensor(0.5), torch.tensor(0.125)),
        trial("array", np.ones(3), 1.0),
    ]
    table = rank_trials(trials)
    assert table.column(KEY).to_pylist() == [0.25, 0.125]
    assert table.schema.metadata[b"left_out"] == b"array"


def test_one_metric_for_both():
    (row,) = rank_trials([trial("a", 0.5, 0.25)], by=KEY, accuracy=KEY).to_pylist()
    assert row[KEY] == 0.25


def test_the_printed_table(tmp_path):
    trials = [
        trial("aa", 0.99, 0.25, path=run_of(tmp_path / "run", [("fc", 64, 4)], 12345)),
        trial("bbb", 0.985, 0.125),
        trial("c\n", 0.5, 1.0),
        trial("bad", 1.0, 1.0, failed=True),
    ]
    assert ranking_table(rank_trials(trials)) == (
        "about as accurate as the best, by saturation/eval/mean\n"
        "  #  trial    accuracy  saturation  parameters  config\n"
        "  1  aa           0.99        0.25      12,345  width=2\n"
        "  2  bbb         0.985       0.125           –  width=3\n"
        "less accurate, by accuracy\n"
        "  #  trial    accuracy  saturation  parameters  config\n"
        "  3  c\\n           0.5           1           –  width=2\n"
        "aa wastes most in fc (4 of 64 dimensions used)\n"
        "left out, as they failed or did not report both metrics: 1 (bad)"
    )
    with pytest.raises(ReadError, match=r"columns \['place'\] is no ranking; rank\(\) makes one"):
        ranking_table(rank_trials(trials).select(["place"]))
    assert all(len(line) <= 80 for line in ranking_table(rank_trials(trials)).splitlines())
