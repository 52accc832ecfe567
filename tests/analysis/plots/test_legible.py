"""Every picture with few and many layers: nothing lies upon anything else, nothing is cut off, nothing warns."""

import numpy as np
import pyarrow as pa
import pytest

from delve_ray.analysis import plots
from tests.analysis.plots.pictures import FIVE, HOSTILE, MANY, assert_legible, drawn_texts
from tests.spectra_tables import spectra_table

pytestmark = pytest.mark.filterwarnings("error")
PICTURES = {
    "steps": plots.saturation_over_steps,
    "depth": plots.saturation_per_layer,
    "heatmap": plots.stat_heatmap,
    "eigenspectra": plots.eigenspectra,
    "phases": plots.train_against_eval,
    "runs": plots.compare_runs,
}


def table(layers, steps=2, run="a/b_$run%<x>"):
    """Both phases of a run whose numbers are as long as they get: 8192 dimensions, large counts of samples."""
    rng = np.random.default_rng(len(layers))
    return spectra_table(
        *(
            {
                "run": run,
                "phase": phase,
                "step": step,
                "layer": layer,
                "features": 8192,
                "samples": 123456 if index % 5 else 4000,
                "saturation": float(rng.uniform(0.01, 0.99)) if index % 7 != 6 else None,
                "intrinsic_dimensionality": 8191,
                "eigenvalues": (np.arange(1, 41) ** -1.5).tolist() if step == steps - 1 else [],
            }
            for phase in ("train", "eval")
            for step in range(steps)
            for index, layer in enumerate(layers)
        )
    )


@pytest.mark.parametrize("layers", [FIVE, HOSTILE, MANY], ids=["five", "hostile", "many"])
@pytest.mark.parametrize("name", PICTURES)
def test_nothing_lies_upon_anything_else(name, layers):
    assert_legible(PICTURES[name](table(layers, 1)))


@pytest.mark.parametrize("count", [1, 12, 13, 24])
def test_bars_beside_each_other(count):
    assert_legible(plots.saturation_per_layer(table(MANY[:count], 1)))


@pytest.mark.parametrize("name", ["steps", "heatmap"])
@pytest.mark.parametrize("steps", [1, 1000])
def test_one_step_and_a_thousand(name, steps):
    assert_legible(PICTURES[name](table(FIVE, steps)))


@pytest.mark.parametrize("count", [8, 30])
def test_several_runs(count):
    runs = [table(MANY[index : 20 + index], 1, run=f"{index}_$trial-{'long' * 20}") for index in range(count)]
    assert_legible(plots.compare_runs(pa.concat_tables(runs)))


def test_names_are_shown_as_they_are():
    shown = [text.replace(r"\$", "$").strip() for text, _, _ in drawn_texts(plots.saturation_per_layer(table(HOSTILE)))]
    assert {"$x_{", "_hidden %s", r"a\nb", "<b>&amp;</b>"} <= set(shown)
    assert sum(text.startswith("xxx") and len(text) <= 28 for text in shown) == 1
    assert any("a/b_$run%<x>" in text for text in shown)


def test_shortened_names_of_many_layers_still_tell_them_apart():
    figure = plots.stat_heatmap(table(MANY))
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert len(set(names)) == len(names) > 30
    assert all(len(name) <= 28 for name in names)
