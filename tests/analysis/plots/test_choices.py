import numpy as np
import pyarrow as pa
import pytest

from delve_ray.analysis.plots import compare_runs, stat_heatmap, train_against_eval
from delve_ray.analysis.plots.choices import STATS, by_layer, floats, select, stat_matrix
from delve_ray.schema import SPECTRA_SCHEMA
from tests.spectra_tables import network, spectra_table


def test_numbers_as_float64():
    column = pa.chunked_array([pa.array([1, None], pa.int32()), pa.array([3], pa.int32())])
    np.testing.assert_equal(floats(column), [1.0, np.nan, 3.0])
    column = pa.chunked_array([[1e300, -1e300, 1e-300, 0.0, None, float("nan"), float("-inf"), 1e250]])
    np.testing.assert_equal(floats(column), [np.inf, -np.inf, 0.0, 0.0, np.nan, np.nan, -np.inf, 1e250])


def test_layers_that_are_not_there_have_no_value():
    table = spectra_table({"layer": "b", "samples": 7}, {"layer": "x", "samples": 8}, {"layer": "a", "samples": None})
    np.testing.assert_equal(by_layer(table, "samples", ["a", "b", "c"]), [np.nan, 7.0, np.nan])


def test_a_matrix_of_layers_and_steps_that_are_not_all_there():
    rows = [("a", 5, 0.5), ("b", 2, 0.25), ("a", 9, None)]
    table = spectra_table(*({"layer": layer, "step": step, "saturation": value} for layer, step, value in rows))
    steps, values = stat_matrix(table, "train", ["a", "b"], "saturation")
    assert steps == [2, 5, 9]
    np.testing.assert_equal(values, [[np.nan, 0.5, np.nan], [0.25, np.nan, np.nan]])
    assert stat_matrix(table, "eval", ["a", "b"], "saturation")[1].shape == (2, 0)


def test_only_what_is_needed_is_kept():
    table = select(network(["a"]), ("saturation",), optional=("thresholds", "unknown"))
    assert table.column_names == ["run", "phase", "step", "layer", "saturation", "thresholds"]


def test_every_statistic_is_a_number_of_the_rows():
    for stat in STATS:
        kind = SPECTRA_SCHEMA.field(stat).type
        assert pa.types.is_floating(kind) or pa.types.is_integer(kind), stat


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("values", [(1e308, 1e-308), (1e250, 1e-250), (1e308, 1e306), (0.0, -1e308), (5e-324, 1.0)])
def test_values_at_the_ends_of_float64_make_pictures(tmp_path, values):
    rows = [
        {"phase": phase, "layer": layer, "determinant": value * (0.5 if phase == "eval" else 1.0)}
        for phase in ("train", "eval")
        for layer, value in zip("abc", (*values, 2.0), strict=True)
    ]
    for draw in (stat_heatmap, train_against_eval, compare_runs):
        draw(spectra_table(*rows), tmp_path / "picture.png", stat="determinant")
