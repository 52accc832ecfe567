"""What is shown: the scrape configuration, and the dashboard against the metrics that the store exports."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
from typing import Any

import pytest
import ray._private.ray_constants as ray_constants

from delve_ray.store.monitoring import COMMON_TAGS, METRICS
from tests.cluster.files import CLUSTER, documents, read, tool

DASHBOARD: dict[str, Any] = json.loads(read("grafana.json"))
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
EXPRESSIONS = [target["expr"] for panel in PANELS for target in panel["targets"]]
EXPORTED = {f"ray_{metric.name}{'_bucket' if metric.kind == 'histogram' else ''}": metric for metric in METRICS}
"""What the dashboard may ask for, as Ray exports it."""
COLUMNS = 24


def selectors(expression: str) -> list[tuple[str, dict[str, str]]]:
    """The series that an expression asks for: name, and its labels' conditions."""
    found = re.findall(r"([a-zA-Z_:]\w*)\{([^}]*)\}", expression)
    return [(name, dict(re.findall(r'(\w+)\s*(?:=~|!=|!~|=)\s*("[^"]*")', labels))) for name, labels in found]


def area(panel: dict[str, Any]) -> set[tuple[int, int]]:
    """The cells that a panel covers."""
    place = panel["gridPos"]
    columns, rows = range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"])
    return set(itertools.product(columns, rows))


def test_the_dashboard_is_a_model_of_grafanas() -> None:
    assert {"title", "uid", "schemaVersion", "panels", "templating", "time", "refresh"} <= set(DASHBOARD)
    assert "id" not in DASHBOARD, "an id belongs to one Grafana; uid is what another keeps"
    assert DASHBOARD["schemaVersion"] >= 36, "since then a datasource is an object with type and uid"
    assert re.fullmatch(r"[\w-]{1,40}", DASHBOARD["uid"])


def test_panels_have_ids_of_their_own_and_do_not_overlap() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        cells = area(panel)
        assert cells, panel["title"]
        assert max(column for column, _ in cells) < COLUMNS, panel["title"]
        assert not cells & taken, panel["title"]
        taken |= cells


def test_every_panel_says_what_it_shows() -> None:
    for panel in PANELS:
        assert panel["title"]
        assert panel["description"].endswith(".")
        references = [target["refId"] for target in panel["targets"]]
        assert references
        assert len(set(references)) == len(references)


def test_the_datasource_is_chosen_and_not_named() -> None:
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert variables["datasource"]["query"] == "prometheus"
    chosen = {"type": "prometheus", "uid": "${datasource}"}
    assert variables["run"]["datasource"] == chosen
    for panel in PANELS:
        assert panel["datasource"] == chosen
        assert all(target["datasource"] == chosen for target in panel["targets"])


def test_the_runs_are_those_that_have_metrics() -> None:
    (run,) = (variable for variable in DASHBOARD["templating"]["list"] if variable["name"] == "run")
    (metric,) = re.findall(r"^label_values\((\w+), run\)$", run["query"]["query"])
    assert metric in EXPORTED
    assert run["query"]["query"] == run["definition"]
    assert run["includeAll"]
    assert run["multi"]


def test_expressions_ask_for_what_is_exported_with_tags_that_it_has() -> None:
    for expression in EXPRESSIONS:
        asked = selectors(expression)
        assert asked, expression
        assert len(asked) == len(re.findall(r"\bray_\w+", expression)), "a metric without a choice of runs"
        for name, labels in asked:
            assert name in EXPORTED, name
            tags = {*COMMON_TAGS, *EXPORTED[name].tags}
            assert set(labels) <= tags, expression
            assert labels["run"] == '"$run"'
            grouped = re.findall(r"\bby \(([^)]*)\)", expression)
            assert set(", ".join(grouped).split(", ")) <= tags | {"le"}, expression


def test_what_every_shard_counts_is_counted_once() -> None:
    for expression in EXPRESSIONS:
        for name, labels in selectors(expression):
            if name.removeprefix("ray_delve_ray_") in ("deltas_total", "repeated_total", "late_total"):
                assert labels["shard"] == '"all|front"', expression


def test_legends_name_what_is_left_of_the_tags() -> None:
    for panel in PANELS:
        for target in panel["targets"]:
            grouped, *_ = re.findall(r"\bby \(([^)]*)\)", target["expr"])
            named = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            assert named, panel["title"]
            assert named <= set(grouped.split(", ")) - {"le"}, panel["title"]


def test_every_metric_is_shown_as_its_kind_is() -> None:
    shown: dict[str, list[str]] = {}
    for expression in EXPRESSIONS:
        for name, _ in selectors(expression):
            shown.setdefault(name, []).append(expression)
    assert set(shown) == set(EXPORTED)
    for name, expressions in shown.items():
        kind = EXPORTED[name].kind
        for expression in expressions:
            over_time = re.search(rf"\b(rate|increase)\({name}\{{[^}}]*\}}\[\$__rate_interval\]\)", expression)
            if kind == "gauge":
                assert not over_time, expression
            if kind == "histogram":
                assert over_time, expression
                assert expression.startswith("histogram_quantile(0.95, sum by (le, "), expression
    assert sum("rate(" in expression for expression in EXPRESSIONS) >= 5


def test_a_run_without_events_shows_words_or_zero_and_no_nan() -> None:
    for panel in PANELS:
        assert panel["fieldConfig"]["defaults"]["noValue"].endswith("yet"), panel["title"]
    for expression in EXPRESSIONS:
        assert "/" not in expression, "a division by what may be zero"
        if "histogram_quantile" in expression:  # NaN where nothing was observed in the interval; a comparison drops it
            assert expression.endswith(" >= 0"), expression
        else:
            assert not re.search(r"[<>]", expression), "what is zero shall be shown"


def test_promql_is_well_formed() -> None:
    parser = pytest.importorskip("promql_parser", reason="needs promql-parser: pip install promql-parser")
    for expression in EXPRESSIONS:
        parser.parse(expression.replace("$__rate_interval", "1m"))
    with pytest.raises(ValueError):
        parser.parse(EXPRESSIONS[0].replace("$__rate_interval", "1m") + ")")


def test_prometheus_reads_the_file_that_ray_writes() -> None:
    (config,) = documents("prometheus.yml")
    assert set(config) == {"global", "scrape_configs"}
    assert set(config["global"]) == {"scrape_interval", "evaluation_interval"}
    assert all(re.fullmatch(r"\d+s", text) for text in config["global"].values())
    (job,) = config["scrape_configs"]
    assert set(job) == {"job_name", "file_sd_configs"}
    (discovery,) = job["file_sd_configs"]
    assert set(discovery) == {"files", "refresh_interval"}
    assert discovery["files"] == [f"/tmp/ray/{ray_constants.PROMETHEUS_SERVICE_DISCOVERY_FILE}"]


def test_prometheus_takes_the_configuration() -> None:
    promtool = tool("promtool", "Debian's package prometheus")
    command = [promtool, "check", "config", "--syntax-only", CLUSTER / "prometheus.yml"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
