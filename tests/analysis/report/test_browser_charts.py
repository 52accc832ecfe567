"""The charts of the report in headless Chromium: what they hold, and how choices change it."""

import math

import numpy as np
import pytest

from delve_ray.analysis import read_scalars
from delve_ray.analysis.report import write_report
from tests.analysis.report.browser import Page
from tests.analysis.report.pages import rows_of, write_rows

pytestmark = pytest.mark.slow


def trace(chart, name):
    return next(one for one in chart["data"] if one.get("name") == name)


def test_charts_hold_the_numbers_of_the_files(browser, digits):
    page = Page(browser, digits.page)
    for phase in ("train", "eval"):
        rows = rows_of(digits.run, phase, 3)
        per_layer = trace(page.chart("per-layer"), phase)
        np.testing.assert_array_equal(per_layer["y"], np.float32([row["saturation"] for row in rows]))
        first = trace(page.chart("spectrum"), f"{phase}, step 3")
        own = np.float32(rows[0]["eigenvalues"])
        np.testing.assert_array_equal(first["x"], np.flatnonzero(own > 0) + 1)
        np.testing.assert_array_equal(first["y"], own[own > 0])
        k = rows[0]["intrinsic_dimensionality"]
        assert trace(page.chart("spectrum"), f"k(δ) = {k}, {phase}")["x"] == [k, k]
    heat = page.chart("heatmap")["data"][0]
    over_steps = page.chart("over-steps")
    for step in range(4):
        wanted = np.float32([row["saturation"] for row in rows_of(digits.run, "train", step)])
        np.testing.assert_array_equal([line[step] for line in heat["z"]], wanted)
        np.testing.assert_array_equal([line["y"][step] for line in over_steps["data"]], wanted)
    assert page.complaints() == []


def test_choices_change_what_the_charts_hold(browser, digits):
    page = Page(browser, digits.page)
    page.choose("phase", "eval")
    page.choose("step", "1")
    page.choose("layer", "2")
    page.choose("statistic", "condition number")
    rows = {step: rows_of(digits.run, "eval", step) for step in range(4)}
    numbers = np.float32([row["condition_number"] for row in rows[1]])
    shown = [math.inf if value is None else value for value in trace(page.chart("per-layer"), "eval")["y"]]
    np.testing.assert_array_equal(shown, numbers)
    heat = page.chart("heatmap")["data"][0]
    for step in range(4):
        own = [row["condition_number"] for row in rows[step]]
        wanted = [math.log10(value) if math.isfinite(value) else None for value in own]
        for value, expected in zip((line[step] for line in heat["z"]), wanted, strict=True):
            assert value == expected or math.isclose(value, expected, rel_tol=1e-6)
    assert page.chart("spectrum")["layout"]["xaxis"]["range"][1] > math.log10(10)
    spectrum = trace(page.chart("spectrum"), "eval, step 1")
    own = np.float32(rows[1][2]["eigenvalues"])
    np.testing.assert_array_equal(spectrum["y"], own[own > 0])
    assert page.texts("#step-value") == ["1 of 3"]
    assert page.texts("table#layers thead th[colspan]") == ["", "train, step 1", "eval, step 1"]
    assert page.texts("tr.chosen td.name") == ["2", "2"] or page.texts("tr.chosen td.name") == ["2"]
    assert page.complaints() == []


def test_scalars_are_drawn(browser, digits):
    page = Page(browser, digits.page)
    wanted = read_scalars(digits.run)
    line = page.chart("scalar-0")["data"][0]
    assert line["x"] == wanted.column("step").to_pylist()
    np.testing.assert_array_equal(line["y"], np.float32(wanted.column("value").to_pylist()))


def test_a_large_run_shows_the_spread_over_layers_and_the_nearest_spectrum(browser, large):
    page = Page(browser, large.page)
    page.choose("layer", "backbone.stage7.block3.part4")
    values = np.array([[row["saturation"] for row in rows_of(large.run, "train", step)] for step in (0, 50, 99)])
    chart = page.chart("over-steps")
    for name, wanted in (
        ("least", values.min(1)),
        ("least to most", values.max(1)),
        ("median", np.median(values, 1)),
        ("quarter", np.quantile(values, 0.25, axis=1)),
        ("middle half", np.quantile(values, 0.75, axis=1)),
    ):
        np.testing.assert_allclose(np.take(trace(chart, name)["y"], (0, 50, 99)), wanted, rtol=1e-6)
    np.testing.assert_allclose(np.take(chart["data"][-1]["y"], (0, 50, 99)), values[:, -1], rtol=1e-6)
    page.choose("step", "52")
    chart = page.chart("spectrum")
    found = int(chart["data"][0]["name"].removeprefix("train, step "))
    assert 0 < abs(found - 52) <= 4
    assert f"that of step {found}, the nearest one on this page" in page.texts("figcaption p")[2]
    own = np.float32(rows_of(large.run, "train", found)[-1]["eigenvalues"])
    np.testing.assert_array_equal(chart["data"][0]["y"], own[np.array(chart["data"][0]["x"]) - 1])


def test_runs_are_compared_and_chosen(browser, tmp_path):
    for number, name in enumerate(("first", "second")):
        layers = ["a", "b", "c"] if name == "first" else ["b", "c", "d"]
        rows = [
            {
                "run": name,
                "layer": layer,
                "phase": "train",
                "step": step,
                "intrinsic_dimensionality": step + 1,
                "saturation": (i + 1) / 8 + step / 16 + number / 32,
            }
            for step in range(2 + number)
            for i, layer in enumerate(layers)
        ]
        write_rows(tmp_path / "runs" / name, *rows, described={"run": name})
    write_report(tmp_path / "runs", tmp_path / "page.html")
    page = Page(browser, tmp_path / "page.html")
    chart = page.chart("per-layer")
    assert trace(chart, "first, train")["y"] == [1 / 8 + 1 / 16, 2 / 8 + 1 / 16, 3 / 8 + 1 / 16]
    assert trace(chart, "second, train")["y"] == [None, 1 / 8 + 1 / 16 + 1 / 32, 2 / 8 + 1 / 16 + 1 / 32]
    means = page.chart("runs-chart")
    assert trace(means, "second")["y"] == [2 / 8 + step / 16 + 1 / 32 for step in range(3)]
    page.choose("layer", "c")
    page.choose("run", "second")
    assert [row[0] for row in page.table()] == ["b", "c", "d"]
    assert page.texts("table#layers tr.chosen td.name") == ["c"]
    assert page.texts("#step-value") == ["2 of 2"]
    assert trace(page.chart("spectrum"), "k(δ) = 3, train")["x"] == [3, 3]
    assert trace(page.chart("per-layer"), "second, train")["y"] == [(i + 1) / 8 + 2 / 16 + 1 / 32 for i in range(3)]
    page.press("document.getElementById('others')")
    assert [one["name"] for one in page.chart("per-layer")["data"]] == ["second, train"]
    assert page.complaints() == []
