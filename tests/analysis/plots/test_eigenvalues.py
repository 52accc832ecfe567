import math

import numpy as np
import pytest
from scipy import integrate, optimize
from sklearn.datasets import load_digits

from delve_ray import spectrum
from delve_ray.analysis.plots import eigenspectra
from delve_ray.errors import OptionError, ReadError
from tests.analysis.plots.pictures import FIVE, MANY, lines_of, words_of
from tests.spectra_tables import network, spectra_table

FALLING = (50.0 * 0.7 ** np.arange(40)).tolist()


def k_of(eigenvalues, delta):
    """k(δ) by its definition, one sum after the other."""
    total = math.fsum(eigenvalues)
    return next(k for k in range(1, len(eigenvalues) + 1) if math.fsum(eigenvalues[:k]) >= delta * total)


def edge_of(eigenvalues, samples):
    """The edge of noise from the density of the Marchenko-Pastur law, integrated and inverted numerically."""
    ratio = len(eigenvalues) / (samples - 1)
    low, high = (1 - math.sqrt(ratio)) ** 2, (1 + math.sqrt(ratio)) ** 2

    def mass(x):
        def density(t):
            return math.sqrt(max((high - t) * (t - low), 0.0)) / (2 * math.pi * ratio * t)

        return integrate.quad(density, low, x)[0]

    median = optimize.brentq(lambda x: mass(x) - 0.5, low, high)
    return float(np.median(eigenvalues)) / median * high


def panels_of(figure):
    return {axes.get_title().split("\n")[0]: axes for axes in figure.axes}


def test_a_spectrum_with_its_dimensions_and_the_edge_of_noise():
    table = spectra_table(
        {"layer": "a", "eigenvalues": FALLING, "samples": 400, "thresholds": [0.99, 0.9], "features": 40},
        {"layer": "a", "phase": "eval", "eigenvalues": FALLING[::2], "samples": 300, "threshold": 0.9},
    )
    figure = eigenspectra(table)
    (axes,) = figure.axes
    lines = lines_of(axes)
    assert lines["train"] == (list(range(1, 41)), FALLING)
    assert lines["eval"] == (list(range(1, 21)), FALLING[::2])
    for label, values, delta in (("train", FALLING, 0.9), ("train", FALLING, 0.99), ("eval", FALLING[::2], 0.9)):
        k = k_of(values, delta)
        assert lines[f"{label} k({delta:g})"] == ([k], [values[k - 1]])
    assert lines["train noise edge"][1] == pytest.approx([edge_of(FALLING, 400)] * 2, rel=1e-6)
    assert lines["eval noise edge"][1] == pytest.approx([edge_of(FALLING[::2], 300)] * 2, rel=1e-6)
    assert set(lines) == {
        *("train", "eval", "train k(0.9)", "train k(0.99)", "eval k(0.9)", "train noise edge", "eval noise edge")
    }
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert (
        axes.texts[0].get_text()
        == f"train: k = {k_of(FALLING, 0.9)}, {k_of(FALLING, 0.99)}\neval: k = {k_of(FALLING[::2], 0.9)}"
    )
    assert {"k of 90 % of variance", "k of 99 % of variance"} <= set(words_of(figure))


def test_thresholds_that_are_given_go_before_those_recorded():
    table = spectra_table({"eigenvalues": FALLING, "thresholds": [0.99, 0.9]})
    (axes,) = eigenspectra(table, thresholds=[0.5, 0.95]).axes
    marked = {label: x for label, (x, _) in lines_of(axes).items() if "k(" in label}
    assert marked == {"train k(0.5)": [k_of(FALLING, 0.5)], "train k(0.95)": [k_of(FALLING, 0.95)]}
    (axes,) = eigenspectra(table.drop_columns(["thresholds"]), thresholds=0.5).axes
    assert lines_of(axes)["train k(0.5)"][0] == [k_of(FALLING, 0.5)]


def test_dimensions_are_those_of_the_rows():
    table = spectra_table({"eigenvalues": FALLING, "threshold": 0.97, "intrinsic_dimensionality": k_of(FALLING, 0.97)})
    (axes,) = eigenspectra(table).axes
    assert lines_of(axes)["train k(0.97)"][0] == table.column("intrinsic_dimensionality").to_pylist()


def test_every_layer_has_a_panel_in_network_order():
    figure = eigenspectra(network(FIVE, eigenvalues=FALLING))
    assert list(panels_of(figure)) == FIVE
    assert list(panels_of(eigenspectra(network(FIVE), layers=["output", "conv2"]))) == ["conv2", "output"]
    assert list(panels_of(eigenspectra(network(FIVE), layers="hidden"))) == ["hidden"]


def test_of_many_layers_some_are_drawn_and_it_says_so():
    names = [f"l{index}" for index in range(300)]
    figure = eigenspectra(network(names))
    assert list(panels_of(figure)) == [f"l{round(299 * place / 11)}" for place in range(12)]
    assert "12 of 300 layers, evenly by depth" in figure.get_suptitle()
    assert "evenly" not in eigenspectra(network(FIVE)).get_suptitle()
    given = eigenspectra(network(names), layers=names[:100], phase="train")
    assert len(given.axes) == 48
    assert "48 of 100 layers" in given.get_suptitle()


def test_zeros_have_no_place_and_ten_decades_are_shown():
    table = spectra_table({"eigenvalues": [10.0, 1.0, 1e-12, 0.0, 0.0]})
    (axes,) = eigenspectra(table).axes
    np.testing.assert_equal(lines_of(axes)["train"][1], [10.0, 1.0, 1e-12, np.nan, np.nan])
    bottom, top = axes.get_ylim()
    assert 1e-10 <= bottom < 1e-9
    assert 10.0 < top < 100.0
    assert axes.get_xscale() == "linear"


def test_a_phase_far_below_the_other_is_still_seen():
    table = spectra_table({"eigenvalues": [1.0, 0.5]}, {"phase": "eval", "eigenvalues": [1e-16, 1e-17]})
    (axes,) = eigenspectra(table).axes
    assert axes.get_ylim()[0] < 1e-17


@pytest.mark.parametrize(
    ("eigenvalues", "said"),
    [
        (None, "no eigenvalues"),
        ([], "no eigenvalues"),
        ([0.0, 0.0], "no variance"),
        ([math.nan] * 2, "beyond 1e±250"),
        ([1e300], "beyond 1e±250"),
    ],
)
def test_what_there_is_not_is_said(eigenvalues, said, tmp_path):
    (axes,) = eigenspectra(spectra_table({"eigenvalues": eigenvalues}), tmp_path / "none.png").axes
    assert [text.get_text() for text in axes.texts] == [said]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("eigenvalues", [[5.0], [1e308, 1e300, 1.0], [1e-240, 5e-324], [1e249, 5e-324], [2.0] * 30])
def test_spectra_at_the_ends_of_float64(eigenvalues, tmp_path):
    (axes,) = eigenspectra(spectra_table({"eigenvalues": eigenvalues, "samples": None}), tmp_path / "end.png").axes
    shown = [value if 1e-250 < value < 1e250 else np.nan for value in eigenvalues]
    np.testing.assert_equal(lines_of(axes)["train"][1], shown)
    bottom, top = axes.get_ylim()
    assert 0.0 < bottom < np.nanmin(shown) <= np.nanmax(shown) < top < np.inf


def test_what_cannot_be_drawn_is_said():
    with pytest.raises(ReadError, match="layers: no layer 'conv4' among the 5; near: 'conv"):
        eigenspectra(network(FIVE), layers=["conv4"])
    with pytest.raises(ReadError, match=r"layers=\[\] names none"):
        eigenspectra(network(FIVE), layers=[])
    with pytest.raises(OptionError, match=r"for 99 percent write 0\.99"):
        eigenspectra(network(FIVE), thresholds=99)
    with pytest.raises(OptionError, match="give at most 6"):
        eigenspectra(network(FIVE), thresholds=np.linspace(0.1, 0.9, 7))
    with pytest.raises(ReadError, match="no rows with step=3"):
        eigenspectra(network(FIVE), step=3)
    with pytest.raises(ReadError, match="no window to draw"):
        eigenspectra(spectra_table())
    with pytest.raises(ReadError, match="lack the columns eigenvalues"):
        eigenspectra(network(MANY[:2]).drop_columns(["eigenvalues"]))


def test_of_many_recorded_thresholds_the_first_are_marked():
    deltas = [0.99, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.999]
    (axes,) = eigenspectra(spectra_table({"eigenvalues": FALLING, "thresholds": deltas})).axes
    marked = {label for label in lines_of(axes) if "k(" in label}
    assert marked == {f"train k({delta:g})" for delta in deltas[:6]}


def test_the_spectrum_of_the_digits_agrees_with_its_statistics():
    digits = load_digits().data
    covariance = np.cov(digits, rowvar=False, bias=True)
    values = spectrum.eigenvalues(covariance)
    known = spectrum.statistics(values, trace=covariance.trace(), samples=len(digits), threshold=0.95).values
    row = {"eigenvalues": values, "samples": len(digits), "features": 64, "threshold": 0.95}
    (axes,) = eigenspectra(spectra_table(row)).axes
    lines = lines_of(axes)
    assert lines["train k(0.95)"][0] == [known["intrinsic_dimensionality"]]
    drawn = np.array(lines["train"][1])
    assert np.count_nonzero(drawn > lines["train noise edge"][1][0]) == known["noise_rank"] > 5
