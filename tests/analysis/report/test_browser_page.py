"""The rest of the report in headless Chromium: findings, hostile names, colours, printing, keyboard."""

from types import SimpleNamespace

import numpy as np
import pytest

from delve_ray.analysis.report import write_report
from tests.analysis.report.browser import CHARTS, Page
from tests.analysis.report.pages import HOSTILE, write_rows, write_scalars

pytestmark = pytest.mark.slow


def test_the_findings_come_first_and_lead_to_their_layers(browser, tmp_path, monkeypatch):
    told = {"rule": "a rule", "source": "a source", "run": "run", "phase": "eval", "step": 1}
    findings = [
        {"kind": "over-wide", "layers": ["b"], "evidence": "uses <b>little</b>", "advice": "less width", **told},
        {"kind": "tail", "layers": [f"l{i}" for i in range(12)], "evidence": "low", "advice": "fewer", **told},
    ]
    found = [SimpleNamespace(as_dict=lambda finding=finding: finding) for finding in findings]
    monkeypatch.setattr("delve_ray.analysis.report.content.diagnose", lambda *_: found)
    layers = ["a", "b", *(f"l{i}" for i in range(12))]
    rows = [
        {"phase": phase, "step": step, "layer": name}
        for phase in ("eval", "train")
        for step in range(3)
        for name in layers
    ]
    write_rows(tmp_path / "run", *rows)
    write_report(tmp_path / "run", tmp_path / "page.html")
    page = Page(browser, tmp_path / "page.html")
    assert page.texts("h2")[:2] == ["Findings", "What was run"]
    assert page.texts(".finding p")[0] == "Over-wide: more features than are used — b (eval, step 1)"
    assert page.texts(".finding .kind") == [
        "Over-wide: more features than are used",
        "Tail: last layers that add little",
    ]
    assert "uses <b>little</b>" in page.texts(".finding p")
    assert page.run("document.querySelectorAll('.finding details[open]').length") == 0
    assert page.texts(".finding details p")[:2] == ["a rule", "Source: a source"]
    assert page.texts(".finding details summary")[1] == "and 4 more layers"
    page.press("document.querySelector('.finding button')")
    assert page.texts("tr.chosen td.name") == ["b"]
    assert page.texts("#step-value") == ["1 of 2"]
    assert page.run("document.getElementById('phase').value") == "eval"


def test_no_findings_are_said_in_words(browser, tmp_path, monkeypatch):
    monkeypatch.setattr("delve_ray.analysis.report.content.diagnose", lambda *_: [])
    write_rows(tmp_path / "run", {})
    write_report(tmp_path / "run", tmp_path / "page.html")
    assert Page(browser, tmp_path / "page.html").texts("#findings")[0].startswith("No findings")


def test_names_full_of_html_do_no_harm_and_are_shown_as_they_are(browser, tmp_path):
    run_names = (HOSTILE[0], HOSTILE[1])
    for number, run_name in enumerate(run_names):
        rows = [
            {"run": run_name, "layer": name, "layer_type": name, "step": step, "phase": phase, "features": 2}
            for phase in ("eval", "train")
            for step in range(2)
            for name in HOSTILE
        ]
        described = {
            "run": run_name,
            "options": {name: [name] for name in HOSTILE},
            "versions": {HOSTILE[0]: HOSTILE[1]},
        }
        write_rows(tmp_path / "runs" / str(number), *rows, described=described)
        write_scalars(
            tmp_path / "runs" / str(number),
            *({"run": run_name, "name": name, "step": 0, "value": 1.0} for name in HOSTILE),
        )
    write_report(tmp_path / "runs", tmp_path / "page.html")
    page = Page(browser, tmp_path / "page.html")
    for name in ("runs-chart", *CHARTS, *(f"scalar-{i}" for i in range(len(HOSTILE)))):
        page.chart(name)
    assert page.run("window.harmed") is None
    assert page.run("document.querySelectorAll('img, main script, main b b, .plot a').length") == 0
    assert [row[:2] for row in page.table()] == [[name, name] for name in HOSTILE]
    assert page.texts("#runs-table tbody button") == list(run_names)
    assert sorted(page.texts("#scalars h3")) == sorted(HOSTILE)
    assert page.texts("#run-facts dd")[0] == run_names[0]
    options = dict(zip(page.texts("#run-facts details dt"), page.texts("#run-facts details dd"), strict=True))
    assert set(HOSTILE) <= options.keys()
    drawn = page.texts("#per-layer .xtick text")
    assert "&amp;&lt;b&gt;" in drawn  # Plotly shows it, and does not decode it
    assert any(text.startswith("<b>bold") or text.endswith("{{data}}") for text in drawn)
    assert page.run("document.title") == "Layers of 2 runs"
    for name in HOSTILE:
        page.run(
            "[...document.querySelectorAll('td.name button')].find((b) => b.textContent === arguments[0]).click()", name
        )
        page.chart("spectrum")
    assert page.run("window.harmed") is None
    assert page.complaints() == []


def test_the_page_runs_no_other_script_and_asks_nobody(browser, tmp_path):
    write_rows(tmp_path / "run", {})
    write_report(tmp_path / "run", tmp_path / "page.html")
    page = Page(browser, tmp_path / "page.html")
    page.run("""(() => {
        const script = document.createElement("script");
        script.textContent = "window.harmed = 5";
        document.body.append(script);
        const image = document.createElement("img");
        image.setAttribute("onerror", "window.harmed = 6");
        image.src = "http://127.0.0.1:9/picture.png";
        document.body.append(image);
        fetch("http://127.0.0.1:9/data").catch(() => { window.refused = true; });
    })()""")
    page.until("window.refused")
    complaints = page.complaints()
    for directive in ("script-src", "img-src", "default-src"):
        assert any("Content Security Policy" in said and directive in said for said in complaints), directive
    asked = [said for said in complaints if said.startswith("request for")]
    blocked = [said for said in complaints if said.startswith("failed") and "'blockedReason': 'csp'" in said]
    assert len(asked) == len(blocked)
    assert page.run("window.harmed") is None


def test_a_run_without_statistics_still_has_a_page(browser, tmp_path):
    nothing = dict.fromkeys(
        ("saturation", "intrinsic_dimensionality", "eigenvalues", "mean_norm", "workers", "samples")
    )
    write_rows(tmp_path / "run", {**nothing, "nonfinite_rows": None, "features": None, "layer_type": None})
    write_report(tmp_path / "run", tmp_path / "page.html")
    page = Page(browser, tmp_path / "page.html")
    assert page.table() == [["conv1", "", "0", "–", "–", "–", "–"]]
    for name in CHARTS:
        page.chart(name)
    assert page.chart("heatmap")["data"][0]["z"] == [[None]]
    assert page.complaints() == []


def test_it_follows_the_scheme_of_the_reader_and_prints_light(browser, digits):
    page = Page(browser, digits.page)
    light = page.chart("per-layer")["layout"]["font"]["color"]
    ink = "document.getElementById('per-layer').layout.font.color"
    page.run(f"addEventListener('beforeprint', () => {{ window.printedIn = {ink}; }})")
    page.emulate(prefers_color_scheme="dark")
    try:
        page.until(f"{ink} === '#e6eaf0'")
        assert page.run("getComputedStyle(document.body).backgroundColor") == "rgb(20, 24, 30)"
        assert page.printed().startswith(b"%PDF")
        assert page.run("window.printedIn") == light == "#1a2029"
        assert all(page.run("Boolean(document.getElementById(arguments[0]).data)", name) for name in CHARTS)
        page.until(f"{ink} === '#e6eaf0'")
    finally:
        page.emulate(prefers_color_scheme="light")
    assert page.complaints() == []


def test_everything_can_be_reached_and_read_without_a_mouse(browser, digits):
    page = Page(browser, digits.page)
    controls = "[...document.querySelectorAll('button, select, input, summary')]"
    unnamed = (
        f"{controls}.filter((c) => !(c.labels && c.labels.length) && !c.textContent.trim() && !c.ariaLabel).length"
    )
    assert page.run(unnamed) == 0
    assert page.run(f"{controls}.filter((c) => c.tabIndex < 0).length") == 0
    page.chart("per-layer")
    drawn = "[...document.querySelectorAll('.plot[role=img]')].filter((plot) => plot.ariaBusy === 'false')"
    labels = page.run(f"{drawn}.map((plot) => plot.ariaLabel)")
    assert labels
    assert all("The table of layers has the numbers." in label for label in labels)
    assert page.run("document.documentElement.scrollWidth") <= 1280
    for scheme in ("light", "dark"):
        page.emulate(prefers_color_scheme=scheme)
        style = "getComputedStyle(document.documentElement).getPropertyValue(arguments[0]).trim()"
        colours = {
            name: page.run(style, f"--{name}") for name in ("page", "card", "text", "muted", "link", "warn", "chosen")
        }
        for ink in ("text", "muted", "link", "warn"):
            for paper in ("page", "card"):
                assert contrast(colours[ink], colours[paper]) >= 4.5, (scheme, ink, paper)
        assert contrast(colours["link"], colours["chosen"]) >= 4.5
    page.emulate(prefers_color_scheme="light")


def contrast(first, second):
    """The contrast ratio of two colours #rrggbb, from 1 to 21 (WCAG 2.2)."""

    def luminance(colour):
        channels = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)
