import numpy as np
import pytest
from matplotlib.text import Text

from delve_ray.analysis.plots import depth_colours, train_against_eval
from delve_ray.errors import OptionError, ReadError
from tests.analysis.plots.pictures import FIVE, FORTY, lines_of
from tests.spectra_tables import network, spectra_table


def two_phases(stat="saturation", **layers):
    """Of each layer its value in train and in eval."""
    return spectra_table(
        *(
            {"phase": phase, "layer": layer, stat: values[index]}
            for index, phase in enumerate(("train", "eval"))
            for layer, values in layers.items()
        )
    )


def points_of(figure):
    (points,) = figure.axes[0].collections
    return points


def named(figure):
    """The list below the picture, farthest first."""
    return figure.get_supxlabel().split("\n")[1:]


def test_a_point_per_layer_coloured_by_depth():
    figure = train_against_eval(network(FORTY, 2))
    expected = np.arange(1, 41) / 42
    np.testing.assert_allclose(points_of(figure).get_offsets(), np.column_stack([expected, 0.9 * expected]))
    np.testing.assert_allclose(points_of(figure).get_facecolors(), depth_colours(40))
    (x, y) = lines_of(figure.axes[0])["equal"]
    assert x == y
    assert figure.axes[0].get_xlim() == figure.axes[0].get_ylim() == tuple(x)


def test_the_farthest_are_named_with_their_values():
    figure = train_against_eval(two_phases(a=(0.5, 0.5), b=(0.2, 0.9), c=(0.6, 0.55), d=(0.4, 0.1)))
    assert named(figure) == [
        *("1  b: train 20%, eval 90%", "2  d: train 40%, eval 10%", "3  c: train 60%, eval 55%"),
    ]
    numbers = {text.get_text(): text.xy for text in figure.axes[0].texts}
    assert numbers == {"1": (0.2, 0.9), "2": (0.4, 0.1), "3": (0.6, 0.55)}
    assert len(named(train_against_eval(network(FORTY)))) == 5
    assert named(train_against_eval(two_phases(a=(0.5, 0.5)))) == []


def test_where_both_are_logarithmic_the_ratio_counts():
    layers = {"a": (1000.0, 500.0), "b": (0.01, 0.1)}
    figure = train_against_eval(two_phases("trace", **layers), stat="trace")
    assert figure.axes[0].get_xscale() == figure.axes[0].get_yscale() == "log"
    assert [line.split(":")[0] for line in named(figure)] == ["1  b", "2  a"]
    figure = train_against_eval(two_phases("trace", a=(1000.0, 500.0), b=(20.0, 100.0)), stat="trace")
    assert figure.axes[0].get_xscale() == "linear"
    assert [line.split(":")[0] for line in named(figure)] == ["1  a", "2  b"]


def test_layers_without_both_values_are_left_out(tmp_path):
    inf = float("inf")
    layers = {"a": (1.0, None), "b": (2.0, 3.0), "c": (inf, 2.0), "d": (float("nan"), 1.0)}
    figure = train_against_eval(two_phases("alpha", **layers), tmp_path / "one.png", stat="alpha")
    assert points_of(figure).get_offsets().tolist() == [[2.0, 3.0]]
    np.testing.assert_allclose(points_of(figure).get_facecolors(), [depth_colours(4)[1]])


def test_numbers_of_points_on_one_place_stand_apart_and_inside():
    figure = train_against_eval(two_phases(**dict.fromkeys("abcdef", (0.99, 0.01))))
    figure.draw_without_rendering()
    inside = figure.axes[0].get_window_extent()
    boxes = [Text.get_window_extent(text) for text in figure.axes[0].texts]
    assert len(boxes) == 5
    for box in boxes:
        assert inside.x0 < box.x0 < box.x1 < inside.x1
        assert inside.y0 < box.y0 < box.y1 < inside.y1
    centres = np.array([[(box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2] for box in boxes])
    apart = np.abs(centres[:, None] - centres).max(axis=-1) + 1e3 * np.eye(5)
    assert apart.min() > max(box.height for box in boxes)


def test_the_step():
    figure = train_against_eval(network(FIVE, 3), step=1)
    np.testing.assert_allclose(points_of(figure).get_offsets()[:, 0], np.arange(1, 6) / 7)
    assert figure.axes[0].get_xlabel() == "train, step 1"


def test_what_cannot_be_drawn_is_said():
    with pytest.raises(ReadError, match="no window of phase='eval'; this picture needs train and eval"):
        train_against_eval(network(FIVE, phases=("train",)))
    with pytest.raises(ReadError, match="no window of phase='train' at step=1"):
        train_against_eval(spectra_table({"step": 0}, {"step": 1, "phase": "eval"}), step=1)
    with pytest.raises(ReadError, match="no layer has a finite alpha in both"):
        train_against_eval(two_phases("alpha", a=(1.0, None), b=(None, 1.0)), stat="alpha")
    with pytest.raises(ReadError, match="no rows with step=9"):
        train_against_eval(network(FIVE), step=9)
    with pytest.raises(OptionError, match="did you mean 'saturation'"):
        train_against_eval(network(FIVE), stat="saturaton")
    with pytest.raises(ReadError, match="no window to draw"):
        train_against_eval(spectra_table())
