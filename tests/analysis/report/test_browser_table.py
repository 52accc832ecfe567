"""The table of the report in headless Chromium: its numbers, its order, its filter."""

import math

import numpy as np
import pytest

from delve_ray.analysis.report import write_report
from tests.analysis.report.browser import CHARTS, Page
from tests.analysis.report.pages import rows_of, write_rows

pytestmark = pytest.mark.slow


def sort(page, key):
    page.press(f"document.querySelector('th button[data-key=\"{key}\"]')")


def test_the_table_has_the_numbers_of_the_files(browser, digits):
    page = Page(browser, digits.page)
    train, evaluated = rows_of(digits.run, "train", 3), rows_of(digits.run, "eval", 3)
    wanted = [
        [
            row["layer"],
            row["layer_type"],
            str(row["features"]),
            *(
                text
                for one in (row, other)
                for text in (
                    f"{one['samples']:,}",
                    f"{one['samples'] / one['features']:.3g}" if one["samples"] < 100 * one["features"] else "120",
                    str(one["intrinsic_dimensionality"]),
                    f"{100 * one['saturation']:.1f} %",
                )
            ),
        ]
        for row, other in zip(train, evaluated, strict=True)
    ]
    assert page.table() == wanted
    assert page.texts("table#layers thead th[colspan]") == ["", "train, step 3", "eval, step 3"]
    mean = np.mean([row["saturation"] for row in train])
    assert f"{100 * mean:.1f} %" in page.texts("tfoot .share")


def test_every_statistic_is_a_column_and_agrees_to_its_digits(browser, digits):
    page = Page(browser, digits.page)
    page.press("document.querySelector('#columns summary')")
    page.run("[...document.querySelectorAll('#column-choices input')].forEach((box) => box.click())")
    names = page.run("[...document.querySelectorAll('#column-choices input')].map((box) => box.value)")
    assert {"trace", "determinant", "effective_rank", "condition_number", "alpha", "noise_rank"} <= set(names)
    for phase, start in (("train", 7), ("eval", 7 + 4 + len(names))):
        for row, shown in zip(rows_of(digits.run, phase, 3), page.table(), strict=True):
            for name, text in zip(names, shown[start:], strict=False):
                wanted = row[name]
                if wanted is None or not math.isfinite(wanted):
                    assert text == {None: "–", math.inf: "∞", -math.inf: "−∞"}[wanted], (name, text)
                else:
                    shown_value = float(text.replace("−", "-").replace(",", ""))
                    assert math.isclose(shown_value, wanted, rel_tol=5.01e-4), (name, text, wanted)


def test_a_large_run_opens_sorts_and_filters(browser, large):
    assert large.page.stat().st_size < 10_000_000
    page = Page(browser, large.page)
    rows = rows_of(large.run, "train", 99)
    assert len(page.table()) == len(rows) == 300
    sort(page, "train/saturation")
    order = sorted(range(300), key=lambda i: (-np.float32(rows[i]["saturation"]), i))
    assert [row[0] for row in page.table()] == [rows[i]["layer"] for i in order]
    assert page.run("document.querySelector('th[aria-sort=descending] button').dataset.key") == "train/saturation"
    sort(page, "train/saturation")
    order = sorted(range(300), key=lambda i: (np.float32(rows[i]["saturation"]), i))
    assert [row[0] for row in page.table()] == [rows[i]["layer"] for i in order]
    sort(page, "train/saturation")
    assert [row[0] for row in page.table()] == [row["layer"] for row in rows]
    page.choose("filter", "STAGE3.block1")
    assert [row[0] for row in page.table()] == [f"backbone.stage3.block1.part{i}" for i in range(5)]
    assert page.texts("#filter-count") == ["5 of 300 layers"]
    page.choose("filter", "conv")
    assert len(page.table()) == 150
    page.choose("filter", "no such layer")
    assert page.table() == []
    page.choose("filter", "")
    for name in CHARTS:
        page.chart(name)
    assert page.complaints() == []


def test_what_is_missing_or_no_number_is_shown_as_that(browser, tmp_path):
    rows = [
        {"layer": "a", "step": 0, "trace": None, "saturation": None, "samples": 5, "nonfinite_rows": 7},
        {"layer": "b", "step": 0, "trace": float("nan"), "saturation": float("nan")},
        {"layer": "c", "step": 0, "trace": float("inf"), "saturation": 0.25},
        {
            "layer": "a",
            "step": 4,
            "trace": 0.0,
            "saturation": 0.5,
            "eigenvalues": [0.0, 0.0],
            "intrinsic_dimensionality": 0,
        },
        {"layer": "c", "step": 4, "trace": 12345678.0, "saturation": 0.75},
    ]
    write_rows(tmp_path / "run", *rows)
    write_report(tmp_path / "run", tmp_path / "page.html")
    page = Page(browser, tmp_path / "page.html")
    page.press(
        "[...document.querySelectorAll('#column-choices label')].find((l) => l.textContent === 'trace').firstChild"
    )
    assert [(row[0], row[3], row[6], row[7]) for row in page.table()] == [
        ("a", "100", "50.0 %", "0"),
        ("b", "–", "–", "–"),
        ("c", "100", "75.0 %", "1.235e+7"),
    ]
    page.choose("step", "0")
    assert [(row[0], row[3], row[4], row[6], row[7]) for row in page.table()] == [
        ("a", "5", "0.5 !", "–", "–"),
        ("b", "100", "10", "NaN", "NaN"),
        ("c", "100", "10", "25.0 %", "∞"),
    ]
    for _ in range(2):  # missing ones come last, in both directions
        sort(page, "train/saturation")
        assert [row[0] for row in page.table()] == ["c", "a", "b"]
    notes = page.texts("#table-notes li")
    assert notes[0] == "train: 1 layer with fewer samples than features, marked “!”."
    assert "1 layer with non-finite observations" in notes[1]
    assert page.chart("per-layer")["data"][0]["marker"]["symbol"] == ["circle-open", "circle", "circle"]
    assert "Open markers: fewer samples than features." in page.texts("figcaption p")[0]
    page.choose("step", "1")
    assert page.chart("per-layer")["data"][0]["marker"]["symbol"] == ["circle"] * 3  # one of which has no row
    assert "Open markers" not in page.texts("figcaption p")[0]
    assert page.chart("heatmap")["data"][0]["z"] == [[None, 0.5], [None, None], [0.25, 0.75]]
    page.choose("layer", "a")
    page.choose("step", "1")
    assert page.chart("spectrum")["data"] == []
    assert page.complaints() == []
