import subprocess
import sys

import numpy as np
import pytest

from delve_ray.analysis.plots import MAX_LEGEND, saturation_over_steps
from delve_ray.errors import ReadError
from tests.analysis.plots.pictures import FIVE, FORTY, words_of
from tests.spectra_tables import network, spectra_table


def lines_of(figure):
    """Of every drawn line: {label: (steps, values, style, colour)}."""
    lines = [line for axes in figure.axes for line in axes.get_lines()]
    return {
        line.get_label(): (list(line.get_xdata()), list(line.get_ydata()), line.get_linestyle(), line.get_color())
        for line in lines
    }


def test_the_lines_carry_the_values():
    lines = lines_of(saturation_over_steps(network(FIVE, 3)))

    assert set(lines) == {f"{phase} {layer}" for phase in ("train", "eval") for layer in FIVE}
    steps, values, style, _ = lines["train hidden"]
    assert (steps, style) == ([0, 1, 2], "-")
    np.testing.assert_allclose(values, [4 / 6, 4 / 7, 4 / 8])
    steps, values, style, _ = lines["eval hidden"]
    assert (steps, style) == ([0, 1, 2], "--")
    np.testing.assert_allclose(values, [0.9 * 4 / 6, 0.9 * 4 / 7, 0.9 * 4 / 8])


@pytest.mark.parametrize("layers", [FIVE, FORTY])
def test_colours_tell_depth(layers):
    lines = lines_of(saturation_over_steps(network(layers, 2)))

    colours = [lines[f"train {layer}"][3] for layer in layers]
    assert colours == [lines[f"eval {layer}"][3] for layer in layers]
    assert len(set(colours)) == len(layers)
    luminance = [float(np.dot(colour[:3], [0.2126, 0.7152, 0.0722])) for colour in colours]
    assert luminance == sorted(luminance)


def test_few_layers_have_a_legend():
    figure = saturation_over_steps(network(FIVE, 2))
    assert words_of(figure) == [*FIVE, "train", "eval"]
    assert len(figure.axes) == 1


def test_many_layers_have_a_colour_bar_and_a_panel_per_phase():
    figure = saturation_over_steps(network(FORTY, 2))
    train, evaluation, colour_bar = figure.axes
    assert [train.get_title(), evaluation.get_title()] == ["train", "eval"]
    assert {line.get_label() for line in train.get_lines()} == {f"train {layer}" for layer in FORTY}
    assert {line.get_label() for line in evaluation.get_lines()} == {f"eval {layer}" for layer in FORTY}
    named = [label.get_text() for label in colour_bar.get_yticklabels()]
    assert len(named) == MAX_LEGEND
    assert (named[0], named[-1]) == (FORTY[0], FORTY[-1])
    assert words_of(figure) == []


def test_one_phase():
    figure = saturation_over_steps(network(FIVE, 2), phase="eval")
    assert set(lines_of(figure)) == {f"eval {layer}" for layer in FIVE}
    assert words_of(figure) == [*FIVE, "eval"]


def test_what_a_window_lacks_is_a_gap():
    table = spectra_table(
        {"layer": "a", "step": 0, "saturation": 0.1},
        {"layer": "b", "step": 0, "saturation": None},
        {"layer": "b", "step": 5, "saturation": 0.4},
        {"layer": "c", "step": 5, "saturation": None},
        {"layer": "a", "step": 7, "saturation": 0.3},
    )
    lines = lines_of(saturation_over_steps(table))
    assert set(lines) == {"train a", "train b"}
    np.testing.assert_equal(lines["train a"][:2], ([0, 5, 7], [0.1, np.nan, 0.3]))
    np.testing.assert_equal(lines["train b"][:2], ([0, 5, 7], [np.nan, 0.4, np.nan]))


@pytest.mark.parametrize("layers", [FIVE, FORTY])
@pytest.mark.parametrize("steps", [1, 60])
def test_the_file_is_a_picture_with_the_lines_in_it(tmp_path, layers, steps):
    from matplotlib.image import imread

    path = tmp_path / "saturation.png"
    figure = saturation_over_steps(network(layers, steps), path)
    pixels = imread(path)[..., :3]
    assert pixels.shape[:2] == tuple(int(side * figure.dpi) for side in reversed(figure.get_size_inches()))
    for layer in (layers[0], layers[-1]):
        colour = lines_of(figure)[f"train {layer}"][3][:3]
        assert (np.abs(pixels - colour).max(axis=-1) < 0.02).sum() > 10


def test_names_are_not_formulas(tmp_path):
    names = ["$x_{", "_hidden", "a\nb", "", "x" * 300]
    figure = saturation_over_steps(network(names, 2), tmp_path / "names.png")
    assert words_of(figure)[:4] == [r"\$x_{", " _hidden", r"a\nb", ""]
    assert len(words_of(figure)[4]) < 40


def test_what_cannot_be_drawn_is_said():
    with pytest.raises(ReadError, match="2 runs"):
        saturation_over_steps(spectra_table({"run": "x"}, {"run": "y"}))
    with pytest.raises(ReadError, match="no window"):
        saturation_over_steps(spectra_table())
    with pytest.raises(ReadError, match="phase='eval'"):
        saturation_over_steps(spectra_table({"phase": "train"}), phase="eval")
    with pytest.raises(ReadError, match="phase='test'"):
        saturation_over_steps(spectra_table({}), phase="test")


def test_pyplot_stays_out_and_a_missing_matplotlib_names_the_extra():
    program = """
import sys
from delve_ray.analysis import plots
from tests.spectra_tables import network
assert "matplotlib" not in sys.modules
plots.saturation_over_steps(network(["a"], 2))
assert "matplotlib.pyplot" not in sys.modules
for name in [name for name in sys.modules if name.startswith("matplotlib")]:
    sys.modules[name] = None
try:
    plots.saturation_over_steps(network(["a"], 2))
except ImportError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stdout == 'plots need matplotlib: pip install "delve_ray[plot]"\n'
