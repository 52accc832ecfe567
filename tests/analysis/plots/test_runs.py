import numpy as np
import pyarrow as pa
import pytest
from matplotlib.collections import QuadMesh

from delve_ray.analysis.plots import compare_runs
from delve_ray.errors import OptionError, ReadError
from tests.analysis.plots.pictures import FIVE, lines_of, luminance, words_of
from tests.spectra_tables import network, spectra_table


def runs(*layers, **changes):
    """A run for each list of layers: r0, r1, …"""
    return pa.concat_tables([network(names, run=f"r{index}", **changes) for index, names in enumerate(layers)])


def ticks(axes):
    return [label.get_text() for label in axes.get_xticklabels()]


def test_a_line_per_run_with_gaps_where_it_lacks_a_layer():
    figure = compare_runs(runs(["a", "b", "d"], ["a", "c", "d"]), phase="train")
    (axes,) = figure.axes
    assert ticks(axes) == ["a", "c", "b", "d"] or ticks(axes) == ["a", "b", "c", "d"]
    place = {name: index for index, name in enumerate(ticks(axes))}
    lines = lines_of(axes)
    assert set(lines) == {"r0", "r1"}
    for run, layers in (("r0", "abd"), ("r1", "acd")):
        expected = np.full(4, np.nan)
        expected[[place[name] for name in layers]] = np.arange(1, 4) / 4
        np.testing.assert_allclose(lines[run][1], expected)
    assert words_of(figure) == ["r0", "r1"]


def test_both_phases_have_a_panel():
    train, evaluation = compare_runs(runs(FIVE, FIVE)).axes
    np.testing.assert_allclose(lines_of(train)["r1"][1], np.arange(1, 6) / 6)
    np.testing.assert_allclose(lines_of(evaluation)["r1"][1], 0.9 * np.arange(1, 6) / 6)


def test_each_run_has_its_last_step():
    table = pa.concat_tables([network(FIVE, 2, run="short"), network(FIVE, 4, run="long")])
    lines = lines_of(compare_runs(table, phase="train").axes[0])
    np.testing.assert_allclose(lines["short"][1], np.arange(1, 6) / 7)
    np.testing.assert_allclose(lines["long"][1], np.arange(1, 6) / 9)
    figure = compare_runs(table, step=3)
    assert set(lines_of(figure.axes[0])) == {"long"}
    assert words_of(figure) == ["short (no train or eval)", "long"]


def test_a_run_without_eval():
    table = pa.concat_tables([network(FIVE, run="both"), network(FIVE, run="train", phases=("train",))])
    figure = compare_runs(table)
    assert [set(lines_of(axes)) for axes in figure.axes] == [{"both", "train"}, {"both"}]
    assert words_of(figure) == ["both", "train (no eval)"]


def test_lines_are_told_apart_by_colour_and_marker():
    lines = compare_runs(runs(*[FIVE] * 8), phase="train").axes[0].get_lines()
    assert len({line.get_color() for line in lines}) == len({line.get_marker() for line in lines}) == 8
    assert max(luminance(line.get_color()) for line in lines) < 0.75  # on white


def test_more_runs_are_rows_of_colours():
    table = runs(*[FIVE[: 3 + index % 3] for index in range(10)])
    figure = compare_runs(table)
    assert [axes.get_title() for axes in figure.axes[:2]] == ["train", "eval"]
    meshes = [next(child for child in axes.get_children() if isinstance(child, QuadMesh)) for axes in figure.axes[:2]]
    expected = np.full((10, 5), np.nan)
    for index in range(10):
        count = 3 + index % 3
        expected[index, :count] = np.arange(1, count + 1) / (count + 1)
    np.testing.assert_allclose(meshes[0].get_array().filled(np.nan), expected)
    np.testing.assert_allclose(meshes[1].get_array().filled(np.nan), 0.9 * expected)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == [f"r{index}" for index in range(10)]
    assert ticks(figure.axes[1]) == FIVE


def test_other_statistics(tmp_path):
    rows = [
        {"run": run, "layer": layer, "condition_number": value}
        for run, values in (("x", (10.0, float("inf"), 1e6)), ("y", (100.0, 5.0, None)))
        for layer, value in zip("abc", values, strict=True)
    ]
    (axes,) = compare_runs(spectra_table(*rows), tmp_path / "runs.png", stat="condition_number").axes
    assert axes.get_yscale() == "log"
    np.testing.assert_equal(lines_of(axes)["x"][1], [10.0, np.nan, 1e6])
    np.testing.assert_equal(lines_of(axes)["y"][1], [100.0, 5.0, np.nan])


def test_what_cannot_be_drawn_is_said():
    with pytest.raises(ReadError, match="no run has a window of step=7"):
        compare_runs(runs(FIVE, FIVE), step=7)
    with pytest.raises(ReadError, match="no window to draw"):
        compare_runs(spectra_table())
    with pytest.raises(ReadError, match="phase='test'"):
        compare_runs(runs(FIVE), phase="test")
    with pytest.raises(OptionError, match="did you mean 'alpha'"):
        compare_runs(runs(FIVE), stat="alfa")
