import numpy as np
import pytest
from matplotlib.colors import to_rgba

from delve_ray.analysis.plots import saturation_per_layer
from delve_ray.analysis.plots.canvas import PHASE_COLOURS
from delve_ray.errors import ReadError
from tests.analysis.plots.pictures import FIVE, FORTY, bars_of, drawn_texts, lines_of, words_of
from tests.spectra_tables import network, spectra_table


def heights(bars):
    return [bar.get_height() for bar in bars]


def ticks(axes):
    return [label.get_text() for label in axes.get_xticklabels()]


def test_train_and_eval_stand_beside_each_other_in_network_order():
    (axes,) = saturation_per_layer(network(FIVE, 3)).axes

    bars = bars_of(axes)
    assert list(bars) == ["train", "eval"]
    np.testing.assert_allclose(heights(bars["train"]), np.arange(1, 6) / 8)  # (l + 1) / (layers + step + 1), step 2
    np.testing.assert_allclose(heights(bars["eval"]), 0.9 * np.arange(1, 6) / 8)
    assert ticks(axes) == FIVE
    for place, (left, right) in enumerate(zip(bars["train"], bars["eval"], strict=True)):
        assert left.get_x() + left.get_width() == pytest.approx(place) == pytest.approx(right.get_x())
        assert left.get_facecolor() == to_rgba(PHASE_COLOURS["train"])
        assert right.get_facecolor() == to_rgba(PHASE_COLOURS["eval"])


def test_the_mean_is_that_of_the_metrics():
    table = spectra_table(
        *(
            {"layer": name, "saturation": value}
            for name, value in zip("abcd", (0.2, None, float("nan"), 0.5), strict=True)
        )
    )
    figure = saturation_per_layer(table)
    (axes,) = figure.axes
    assert lines_of(axes)["train mean"][1] == [pytest.approx(0.35)] * 2
    assert "mean 35.0%" in words_of(figure)
    np.testing.assert_equal(heights(bars_of(axes)["train"]), [0.2, np.nan, np.nan, 0.5])


def test_dimensions_and_features_are_written():
    rows = [
        {"phase": phase, "layer": layer, "intrinsic_dimensionality": k, "features": features, "samples": 5000}
        for phase, more in (("train", 0), ("eval", 100))
        for layer, k, features in (("a", 11 + more, 1024), ("b", 12 + more, 2048))
    ]
    texts = [text for text, _, _ in drawn_texts(saturation_per_layer(spectra_table(*rows)))]
    assert {"11", "12", "111", "112", "1024", "2048"} <= set(texts)


def test_undersampled_layers_are_hatched():
    table = spectra_table(
        {"layer": "few", "samples": 9, "features": 10},
        {"layer": "enough", "samples": 10, "features": 10},
        {"layer": "few", "phase": "eval", "samples": 10, "features": 10},
    )
    figure = saturation_per_layer(table)
    bars = bars_of(figure.axes[0])
    assert [bool(bar.get_hatch()) for bar in bars["train"]] == [True, False]
    assert [bool(bar.get_hatch()) for bar in bars["eval"]] == [False, False]
    assert "fewer samples than features" in words_of(figure)
    assert "fewer samples than features" not in words_of(saturation_per_layer(network(FIVE)))


def test_many_layers_have_a_panel_per_phase():
    train, evaluation = saturation_per_layer(network(FORTY)).axes
    np.testing.assert_allclose(heights(bars_of(train)["train"]), np.arange(1, 41) / 41)
    np.testing.assert_allclose(heights(bars_of(evaluation)["eval"]), 0.9 * np.arange(1, 41) / 41)
    assert list(bars_of(train)) == ["train"]
    assert ticks(evaluation) == FORTY


def test_phase_and_step():
    table = network(FIVE, 3)
    (axes,) = saturation_per_layer(table, phase="eval", step=1).axes
    assert list(bars_of(axes)) == ["eval"]
    np.testing.assert_allclose(heights(bars_of(axes)["eval"]), 0.9 * np.arange(1, 6) / 7)
    assert words_of(saturation_per_layer(table, step=1))[::2] == ["train, step 1", "eval, step 1"]


def test_a_layer_that_one_phase_lacks():
    table = spectra_table(
        {"layer": "a", "saturation": 0.25},
        {"layer": "b", "saturation": 0.5},
        {"phase": "eval", "layer": "b", "saturation": 0.75},
        {"phase": "eval", "layer": "c", "saturation": 1.0},
    )
    (axes,) = saturation_per_layer(table).axes
    assert ticks(axes) == ["a", "b", "c"]
    np.testing.assert_equal(heights(bars_of(axes)["train"]), [0.25, 0.5, np.nan])
    np.testing.assert_equal(heights(bars_of(axes)["eval"]), [np.nan, 0.75, 1.0])


def test_nothing_but_nulls_is_a_picture_without_bars():
    (axes,) = saturation_per_layer(spectra_table({"saturation": None, "samples": None, "features": None})).axes
    np.testing.assert_equal(heights(bars_of(axes)["train"]), [np.nan])
    assert lines_of(axes) == {}


def test_what_cannot_be_drawn_is_said():
    with pytest.raises(ReadError, match="no window to draw"):
        saturation_per_layer(spectra_table())
    with pytest.raises(ReadError, match="2 runs"):
        saturation_per_layer(spectra_table({"run": "x"}, {"run": "y"}))
    with pytest.raises(ReadError, match="no rows with step=7; there are: train 2 steps from 0 to 1"):
        saturation_per_layer(network(FIVE, 2), step=7)
    with pytest.raises(ReadError, match="phase='test'"):
        saturation_per_layer(network(FIVE), phase="test")
    with pytest.raises(ReadError, match="no rows with phase=eval"):
        saturation_per_layer(network(FIVE, phases=("train",)), phase="eval")
    with pytest.raises(ReadError, match="lack the columns samples"):
        saturation_per_layer(network(FIVE).drop_columns(["samples"]))
