import math

import numpy as np
import pyarrow as pa
import pytest

from delve_ray.analysis.comparing import compare, comparison_columns, comparison_table
from delve_ray.errors import OptionError, ReadError
from tests.spectra_tables import network, spectra_table
from tests.windows import HOSTILE_NAMES


def rows(comparison, *columns):
    return [tuple(row[name] for name in columns) for row in comparison.to_pylist()]


def values(run, *pairs, **changes):
    """One window in which each layer has this saturation."""
    return spectra_table(*({"run": run, "layer": name, "saturation": value, **changes} for name, value in pairs))


def test_differences_are_those_from_the_first_run():
    runs = {
        "x": values("a", ("conv", 0.5), ("fc", 0.25)),
        "y": values("b", ("conv", 0.75), ("fc", 0.125)),
        "z": values("c", ("conv", 0.5), ("fc", 1.0)),
    }
    assert rows(compare(runs), "label", "run", "layer", "saturation", "difference") == [
        ("x", "a", "conv", 0.5, 0.0),
        ("y", "b", "conv", 0.75, 0.25),
        ("z", "c", "conv", 0.5, 0.0),
        ("x", "a", "fc", 0.25, 0.0),
        ("y", "b", "fc", 0.125, -0.125),
        ("z", "c", "fc", 1.0, 0.75),
    ]


def test_layers_that_only_some_runs_have_keep_their_place_and_have_no_difference():
    runs = {
        "x": values("a", ("in", 0.5), ("head", 0.25)),
        "y": values("b", ("in", 0.75), ("block", 0.5), ("head", 0.5)),
    }
    assert rows(compare(runs), "label", "layer", "difference") == [
        ("x", "in", 0.0),
        ("y", "in", 0.25),
        ("y", "block", None),
        ("x", "head", 0.0),
        ("y", "head", 0.25),
    ]
    text = comparison_table(compare(runs))
    assert "A has no block" in text
    assert "mean: of what stands in each column" in text
    (block,) = [line.split() for line in text.splitlines() if line.startswith("block")]
    assert block == ["block", "10", "–", "50.0", "%", "–"]
    (mean,) = [line.split() for line in text.splitlines() if line.startswith("mean ")]
    assert mean == ["mean", "37.5", "%", "58.3", "%", "+25.0", "%"]


def test_a_layer_without_a_value_is_named_and_the_means_are_said_to_differ():
    runs = {"x": values("a", ("in", 0.5), ("wide", 0.25)), "y": values("b", ("in", 0.75), ("wide", None))}
    text = comparison_table(compare(runs))
    assert "B has no saturation of wide" in text.splitlines()
    assert "mean: of what stands in each column" in text
    assert "has no" not in comparison_table(compare({"x": runs["x"], "y": runs["x"]}))


def test_runs_of_one_name_are_told_apart_by_their_labels():
    runs = {"here": values("run", ("fc", 0.5)), "there": values("run", ("fc", 0.75))}
    assert rows(compare(runs), "label", "run", "difference") == [("here", "run", 0.0), ("there", "run", 0.25)]


@pytest.mark.parametrize("bad", [None, math.nan, math.inf])
def test_what_is_not_finite_has_no_difference(bad):
    runs = {"x": values("a", ("p", 0.5), ("q", bad)), "y": values("b", ("p", bad), ("q", 0.5))}
    comparison = compare(runs)
    assert rows(comparison, "label", "layer", "difference") == [
        ("x", "p", 0.0),
        ("y", "p", None),
        ("x", "q", None),
        ("y", "q", None),
    ]
    assert "nan" not in comparison_table(comparison)


def test_the_last_windows_of_each_phase_or_one_step():
    runs = {"x": network(["fc"], steps=3), "y": network(["fc"], steps=5)}
    assert set(rows(compare(runs), "label", "phase", "step")) == {
        ("x", "train", 2),
        ("x", "eval", 2),
        ("y", "train", 4),
        ("y", "eval", 4),
    }
    assert "saturation, train, step A 2, B 4" in comparison_table(compare(runs))
    same = compare(runs, step=1, phase="eval")
    assert set(rows(same, "phase", "step", "difference")) == {("eval", 1, 0.0)}
    assert "saturation, eval, step 1\n" in comparison_table(same)
    with pytest.raises(ReadError, match="no rows with step=4"):
        compare(runs, step=4)


def test_other_statistics():
    runs = {
        "x": spectra_table({"intrinsic_dimensionality": 5, "trace": 2.5}),
        "y": spectra_table({"intrinsic_dimensionality": 3, "trace": 1e-7, "features": 20}),
    }
    dimensions = compare(runs, stat="intrinsic_dimensionality")
    assert rows(dimensions, "features", "intrinsic_dimensionality", "difference") == [(10, 5, 0.0), (20, 3, -2.0)]
    line = comparison_table(dimensions).splitlines()[5].split()
    assert line == ["conv1", "10/20", "5", "3", "-2"]
    line = comparison_table(compare(runs, stat="trace")).splitlines()[5].split()
    assert line == ["conv1", "10/20", "2.5", "1e-07", "-2.5"]
    assert "percentage" not in comparison_table(dimensions)


def test_thresholds_that_differ_are_named():
    runs = {"x": values("a", ("fc", 0.5), threshold=0.99), "y": values("b", ("fc", 0.25), threshold=0.9)}
    assert "the thresholds differ: A 0.99; B 0.9; " in comparison_table(compare(runs))
    runs["y"] = values("b", ("fc", 0.25), threshold=0.99)
    assert "thresholds" not in comparison_table(compare(runs))


@pytest.mark.parametrize("count", [2, 3, 7, 30])
@pytest.mark.parametrize("width", [80, 120])
def test_many_runs_with_long_names_fit(count, width):
    names = [f"encoder.layers.{i}.attention.output.dense" for i in range(4)]
    rng = np.random.default_rng(0)
    runs = {f"run-{i}": values(f"r{i}", *((name, rng.random()) for name in names)) for i in range(count)}
    lines = comparison_table(compare(runs), width=width).splitlines()
    assert max(map(len, lines)) <= width
    letters = [line.split()[0] for line in lines[:count]]
    assert len(set(letters)) == count
    heads = " ".join(line for line in lines if line.startswith("layer "))
    assert all(f"{letter} − A" in heads for letter in letters[1:])


def test_hostile_names_break_no_line():
    names = (*HOSTILE_NAMES, "\x1b[31m")
    runs = {"x\x1b[2J": values("a", *((name, 0.5) for name in names)), "y": values("b", ("fc", 0.5))}
    text = comparison_table(compare(runs))
    assert all(char.isprintable() or char == "\n" for char in text)


@pytest.mark.parametrize(
    ("runs", "options", "error", "message"),
    [
        ({"x": network(["fc"])}, {}, ReadError, "1 runs with rows; give at least two"),
        ({"x": network(["fc"]), "y": network(["fc"])}, {"stat": "satration"}, OptionError, "'satration'.*saturation"),
        ({"x": network(["fc"]), "y": pa.table({"run": ["a"]})}, {}, ReadError, "lack the columns phase, step"),
        (
            {
                "x": network(["fc"]),
                "y": pa.concat_tables([network(["fc"], run="a"), network(["fd"], run="b")]),
            },
            {},
            ReadError,
            "y holds the runs a, b",
        ),
    ],
)
def test_what_cannot_be_compared(runs, options, error, message):
    with pytest.raises(error, match=message):
        compare(runs, **options)


def test_another_table_is_no_comparison():
    with pytest.raises(ReadError, match="no comparison; compare"):
        comparison_table(network(["fc"]))


def test_the_columns_that_are_needed_are_enough():
    columns = comparison_columns("trace")
    runs = {name: network(["fc"], trace=2.0).select(columns) for name in "xy"}
    assert set(rows(compare(runs, stat="trace"), "trace", "difference")) == {(2.0, 0.0)}
