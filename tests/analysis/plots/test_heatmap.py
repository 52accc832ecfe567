import numpy as np
import pytest
from matplotlib.collections import QuadMesh
from matplotlib.colors import LogNorm

from delve_ray.analysis.plots import stat_heatmap
from delve_ray.errors import OptionError, ReadError
from tests.analysis.plots.pictures import FIVE, MANY
from tests.spectra_tables import network, spectra_table


def meshes_of(figure):
    """The mesh of each panel, by its title."""
    return {
        axes.get_title(): next(child for child in axes.get_children() if isinstance(child, QuadMesh))
        for axes in figure.axes
        if axes.get_title()
    }


def test_layers_by_steps_of_both_phases():
    figure = stat_heatmap(network(FIVE, 3))
    meshes = meshes_of(figure)
    assert list(meshes) == ["train", "eval"]
    layer, step = np.mgrid[0:5, 0:3]
    expected = (layer + 1) / (5 + step + 1)
    np.testing.assert_allclose(meshes["train"].get_array(), expected)
    np.testing.assert_allclose(meshes["eval"].get_array(), 0.9 * expected)
    assert meshes["train"].norm is meshes["eval"].norm
    assert (meshes["train"].norm.vmin, meshes["train"].norm.vmax) == (0.0, pytest.approx(5 / 6))
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == FIVE
    bottom, top = axes.get_ylim()
    assert bottom > top  # the input on top


def test_cells_lie_at_their_steps():
    table = spectra_table(*({"step": step, "saturation": 0.5} for step in (0, 10, 100)))
    (mesh,) = meshes_of(stat_heatmap(table)).values()
    np.testing.assert_allclose(mesh.get_coordinates()[0, :, 0], [-5, 5, 55, 145])
    np.testing.assert_allclose(mesh.get_coordinates()[:, 0, 1], [-0.5, 0.5])


def test_what_is_not_finite_is_masked():
    nan, inf = float("nan"), float("inf")
    rows = [("a", 0, 1.0), ("b", 0, None), ("c", 0, inf), ("a", 1, nan), ("c", 1, 3.0)]
    table = spectra_table(*({"layer": layer, "step": step, "condition_number": c} for layer, step, c in rows))
    (mesh,) = meshes_of(stat_heatmap(table, stat="condition_number")).values()
    assert np.ma.getmaskarray(mesh.get_array()).tolist() == [[False, True], [True, True], [True, False]]
    assert (mesh.norm.vmin, mesh.norm.vmax) == (1.0, 3.0)


def test_wide_ranges_are_logarithmic():
    def norm(*values, stat="trace"):
        table = spectra_table(*({"step": step, stat: value} for step, value in enumerate(values)))
        return next(iter(meshes_of(stat_heatmap(table, stat=stat)).values())).norm

    assert isinstance(norm(1.0, 1e4), LogNorm)
    assert isinstance(norm(1e-200, 1e200), LogNorm)
    assert not isinstance(norm(1.0, 900.0), LogNorm)
    assert not isinstance(norm(0.0, 1e4), LogNorm)
    assert not isinstance(norm(1e-5, 1.0, stat="saturation"), LogNorm)


@pytest.mark.parametrize("value", [0.0, -3.0, 5.0, float("nan"), float("inf")])
def test_one_value_and_none(value, tmp_path):
    figure = stat_heatmap(spectra_table({"log_determinant": value}), tmp_path / "one.png", stat="log_determinant")
    (mesh,) = meshes_of(figure).values()
    assert mesh.norm.vmin < mesh.norm.vmax


def test_many_layers_and_steps():
    (mesh,) = meshes_of(stat_heatmap(network(MANY, 20), phase="eval")).values()
    layer, step = np.mgrid[0:300, 0:20]
    np.testing.assert_allclose(mesh.get_array(), 0.9 * (layer + 1) / (300 + step + 1))


def test_what_cannot_be_drawn_is_said():
    with pytest.raises(OptionError, match=r"stat='efective_rank' is unknown; did you mean 'effective_rank'\?"):
        stat_heatmap(network(FIVE), stat="efective_rank")
    with pytest.raises(OptionError, match=r"stat='layer' is unknown; .*Valid names: saturation, "):
        stat_heatmap(network(FIVE), stat="layer")
    with pytest.raises(ReadError, match=r"no row has a value of stat='rankme'.*There are: saturation, intrinsic_dim"):
        stat_heatmap(network(FIVE), stat="rankme")
    with pytest.raises(ReadError, match="no window to draw"):
        stat_heatmap(spectra_table())
    with pytest.raises(ReadError, match="no window of phase='eval'"):
        stat_heatmap(network(FIVE, phases=("train",)), phase="eval")
    with pytest.raises(ReadError, match="2 runs"):
        stat_heatmap(spectra_table({"run": "x"}, {"run": "y"}))
