"""The report without a browser: what the page carries, and what is said of that which cannot be read."""

import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from delve_ray import read_spectra
from delve_ray.analysis.report import page, write_report
from delve_ray.analysis.report.page import escaped_json
from delve_ray.analysis.report.words import OF_EVERY_ROW, STATISTICS
from delve_ray.errors import OptionError, ReadError
from delve_ray.schema import EXTRA_STATS, SCALAR_STATS, SPECTRA_SCHEMA, VERSION_KEY
from delve_ray.storage import Storage
from delve_ray.writers.parquet import ParquetWriter
from tests.analysis.report.pages import HOSTILE, data_of, numbers_of, write_large_run, write_rows, write_scalars
from tests.windows import layer_row, sketched_row, window


def column(path, run, phase, name):
    """A statistic as the page has it: (layers, steps)."""
    shown = run["phases"][phase]
    return numbers_of(path, shown["columns"][name]).reshape(len(run["layers"]), len(shown["steps"]))


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A run of 12 layers, 7 steps and both phases, its page, and what the page says."""
    folder = tmp_path_factory.mktemp("large")
    write_large_run(folder / "run", layers=12, steps=7)
    write_report(folder / "run", folder / "page.html")
    return folder / "run", folder / "page.html", data_of(folder / "page.html")["runs"][0]


@pytest.mark.parametrize("name", OF_EVERY_ROW)
def test_every_number_is_that_of_the_files(large, name):
    path, html, run = large
    rows = read_spectra(path).to_pylist()
    for phase in ("train", "eval"):
        steps = run["phases"][phase]["steps"]
        names = [layer["name"] for layer in run["layers"]]
        wanted = np.full((len(names), len(steps)), np.nan)
        for row in rows:
            if row["phase"] == phase and row[name] is not None:
                wanted[names.index(row["layer"]), steps.index(row["step"])] = row[name]
        if np.isnan(wanted).all():
            assert name not in run["phases"][phase]["columns"]
            continue
        shown = column(html, run, phase, name)
        np.testing.assert_array_equal(shown, wanted.astype(shown.dtype))
        assert shown.dtype == (np.float64 if name == "determinant" else np.float32)  # which may be 1e-300


def test_eigenvalues_are_those_of_the_files(large):
    path, html, run = large
    rows = {(row["phase"], row["layer"], row["step"]): row["eigenvalues"] for row in read_spectra(path).to_pylist()}
    for phase, shown in run["phases"].items():
        values = iter(numbers_of(html, shown["eigenvalues"]).tolist())
        for layer in run["layers"]:
            ranks = run["ranks"][str(layer["features"])]
            assert ranks[0] == 1
            assert ranks[-1] == layer["features"]
            for step in shown["eigensteps"]:
                own = np.array(rows[phase, layer["name"], step])[np.array(ranks) - 1].astype(np.float32)
                np.testing.assert_array_equal([next(values) for _ in ranks], own)
        assert not list(values)


def test_layers_are_in_the_order_of_the_network_with_type_and_width(large):
    path, _, run = large
    rows = [row for row in read_spectra(path).to_pylist() if (row["phase"], row["step"]) == ("train", 0)]
    shown = [(layer["name"], layer["type"], layer["features"]) for layer in run["layers"]]
    assert shown == [(row["layer"], row["layer_type"], row["features"]) for row in rows]


def test_what_does_not_fit_is_thinned_and_counted(tmp_path, monkeypatch):
    write_large_run(tmp_path / "run", layers=4, steps=30)
    monkeypatch.setattr(page, "MAX_ROWS", 4 * 2 * 10)
    monkeypatch.setattr(page, "MAX_EIGENVALUES", 2 * 3 * 260)
    monkeypatch.setattr("delve_ray.analysis.report.content.diagnose", lambda *_: [])
    write_report(tmp_path / "run", tmp_path / "page.html")
    run = data_of(tmp_path / "page.html")["runs"][0]
    ranks = sum(len(run["ranks"][str(layer["features"])]) for layer in run["layers"])
    for shown in run["phases"].values():
        assert shown["of"] == 30
        assert shown["steps"] == [0, 3, 6, 10, 13, 16, 19, 23, 26, 29]
        assert set(shown["eigensteps"]) <= set(shown["steps"])
        assert shown["eigensteps"][-1] == 29
        assert shown["eigenvalues"]["count"] == ranks * len(shown["eigensteps"]) <= 3 * 260


def test_the_step_of_a_finding_stays(tmp_path, monkeypatch):
    from types import SimpleNamespace

    finding = {"kind": "dead", "layers": [], "evidence": "", "advice": "", "rule": "", "source": "", "run": "large"}
    found = [SimpleNamespace(as_dict=lambda: {**finding, "phase": "train", "step": 17})]
    monkeypatch.setattr("delve_ray.analysis.report.content.diagnose", lambda *_: found)
    monkeypatch.setattr(page, "MAX_ROWS", 4 * 2 * 3)
    write_large_run(tmp_path / "run", layers=4, steps=30)
    write_report(tmp_path / "run", tmp_path / "page.html")
    run = data_of(tmp_path / "page.html")["runs"][0]
    assert run["phases"]["train"]["steps"] == [0, 17, 29]
    assert run["phases"]["eval"]["steps"] == [0, 14, 29]
    assert run["findings"][0]["step"] == 17


def test_nulls_are_told_from_nan_and_infinities_kept(tmp_path):
    values = [None, float("nan"), float("inf"), -float("inf"), 1e300, 3.0]
    rows = [{"layer": f"l{i}", "log_determinant": value} for i, value in enumerate(values)]
    rows.append({"layer": "late", "step": 1, "log_determinant": 1.0})
    write_rows(tmp_path / "run", *rows)
    write_report(tmp_path / "run", tmp_path / "page.html")
    run = data_of(tmp_path / "page.html")["runs"][0]
    shown = column(tmp_path / "page.html", run, "train", "log_determinant")
    assert shown.dtype == np.float64
    bits = shown.view(np.uint64)
    null = 0x7FF8000000000001
    at = {layer["name"]: index for index, layer in enumerate(run["layers"])}
    assert (bits[at["l0"]] == null).all()
    assert np.isnan(shown[at["l1"], 0])
    assert bits[at["l1"], 0] != null
    assert bits[at["l1"], 1] == null
    np.testing.assert_array_equal(shown[[at[f"l{i}"] for i in range(2, 6)], 0], values[2:])
    assert (bits[at["late"], 0], shown[at["late"], 1]) == (null, 1.0)


def test_large_counts_are_exact(tmp_path):
    write_rows(tmp_path / "run", {"layer": "a", "samples": 2**53 - 1}, {"layer": "b", "samples": 2**24 + 1})
    write_report(tmp_path / "run", tmp_path / "page.html")
    run = data_of(tmp_path / "page.html")["runs"][0]
    assert column(tmp_path / "page.html", run, "train", "samples")[:, 0].tolist() == [2**53 - 1, 2**24 + 1]


def test_scalars_are_there_by_name_and_rank(tmp_path):
    write_rows(tmp_path / "run", {})
    points = [
        {"name": name, "rank": rank, "step": step, "value": step + rank / 4 + len(name)}
        for name in ("loss", "accuracy")
        for rank in (0, 1)
        for step in range(1500)
    ]
    write_scalars(tmp_path / "run", *points)
    write_report(tmp_path / "run", tmp_path / "page.html")
    lines = data_of(tmp_path / "page.html")["runs"][0]["scalars"]
    assert [(line["name"], line["rank"], line["of"]) for line in lines] == [
        ("accuracy", 0, 1500),
        ("accuracy", 1, 1500),
        ("loss", 0, 1500),
        ("loss", 1, 1500),
    ]
    steps = numbers_of(tmp_path / "page.html", lines[3]["steps"])
    assert (steps[0], steps[-1], steps.size) == (0, 1499, 1000)
    np.testing.assert_array_equal(numbers_of(tmp_path / "page.html", lines[3]["values"]), steps + 0.25 + 4)


def test_what_was_run_is_said(tmp_path):
    described = {
        "created": "2026-01-02T03:04:05.678+00:00",
        "model": {"num_parameters": 12345},
        "options": {
            "seed": 2**63 + 1,
            "recording": {"precision": "tf32"},
            "stats": ["trace"],
            "trial_config": '{"lr": 0.1}',
        },
        "versions": {"torch": "2.9"},
        "attempts": [{"attempt": 0, "world_size": 2, "began": "2026-01-02T03:04:05+00:00"}],
        "end": {"time": "2026-01-02T04:04:05+00:00", "why": "closed", "problems": ["a full disk"]},
    }
    rows = [{"step": step, "workers": 1 if step == 3 else 2, "samples": 100 + step} for step in range(5)]
    write_rows(tmp_path / "run", *rows, {"phase": "eval", "step": 4, "final": False, "workers": 0}, described=described)
    write_report(tmp_path / "run", tmp_path / "page.html")
    run = data_of(tmp_path / "page.html")["runs"][0]
    assert dict(run["facts"]) == {
        "files": str(tmp_path / "run"),
        "world size": "2 workers",
        "train windows": "5, from step 0 to 4; 100 to 104 samples per layer and window",
        "eval windows": "step 4; 100 samples per layer and window",
        "threshold δ": "99 % of the variance",
        "parameters of the model": "12,345",
        "began": "2026-01-02 03:04:05 UTC",
        "ended": "2026-01-02 04:04:05 UTC, closed; a full disk",
        "missing workers": "train step 3 (1 of 2)",
        "windows still open": "eval step 4 (live)",
    }
    assert dict(run["options"]) == {
        "seed": str(2**63 + 1),
        "recording/precision": "tf32",
        "stats": '["trace"]',
        "config/lr": "0.1",
    }
    assert run["versions"] == [["torch", "2.9"]]
    assert run["attempts"] == [["attempt 0", "2026-01-02 03:04:05 UTC, 2 workers"]]


@pytest.mark.parametrize(
    "content", ["[]", "{", '{"options": 3, "versions": [], "attempts": {"a": 1}, "model": 1, "end": 2}']
)
def test_a_run_json_that_says_nonsense_costs_only_what_it_says(tmp_path, content):
    write_rows(tmp_path / "run", {})
    (tmp_path / "run" / "run.json").write_text(content)
    said = write_report(tmp_path / "run", tmp_path / "page.html")
    assert len(said) == (0 if "options" in content else 1)
    run = data_of(tmp_path / "page.html")["runs"][0]
    assert (run["name"], run["options"], run["versions"], run["attempts"]) == ("run", [], [], [])


def test_damaged_files_cost_only_themselves(tmp_path):
    path = tmp_path / "run"
    writer = ParquetWriter(Storage(path))
    for step in range(5):
        writer.write(window([layer_row()], step=step, window=step))
    write_scalars(path, {"name": "loss", "step": 0, "value": 1.0})
    files = sorted((path / "spectra").iterdir())
    files[1].write_bytes(files[1].read_bytes()[:-9])
    content = bytearray(files[2].read_bytes())
    content[len(content) // 4] ^= 0xFF  # in a column's pages, which only a checksum shows
    files[2].write_bytes(content)
    newer = pq.read_table(files[3])
    pq.write_table(newer.replace_schema_metadata({VERSION_KEY: b"99"}), files[3])
    next((path / "scalars").iterdir()).write_bytes(b"PAR1")

    said = write_report(path, tmp_path / "page.html")

    content = data_of(tmp_path / "page.html")
    assert content["problems"] == said
    assert len(said) == 5
    for name, sentence in zip((files[1].name, files[2].name, files[3].name, "000000-0.parquet"), said, strict=False):
        assert sentence.startswith("left out: ")
        assert name in sentence
    assert "schema version 99 is newer" in said[2]
    assert "has no run.json" in said[4]
    run = content["runs"][0]
    assert run["phases"]["train"]["steps"] == [0, 4]
    assert run["scalars"] == []


def test_runs_that_cannot_be_read_are_named_and_the_others_shown(tmp_path):
    write_rows(tmp_path / "sweep" / "good", {"layer": "x"})
    write_rows(tmp_path / "sweep" / "twin", {"layer": "y"})
    (tmp_path / "sweep" / "empty" / "spectra").mkdir(parents=True)
    (tmp_path / "sweep" / "odd").mkdir()
    (tmp_path / "sweep" / "odd" / "run.json").write_text("{}")
    (tmp_path / "sweep" / "odd" / "spectra").write_text("a file")
    said = write_report([tmp_path / "sweep", tmp_path / "nowhere"], tmp_path / "page.html")
    assert [any(name in sentence for sentence in said) for name in ("nowhere", "empty", "odd")] == [True] * 3
    assert len(said) == 3
    runs = data_of(tmp_path / "page.html")["runs"]
    assert [run["label"] for run in runs] == [f"run ({tmp_path}/sweep/good)", f"run ({tmp_path}/sweep/twin)"]
    assert [run["layers"][0]["name"] for run in runs] == ["x", "y"]


def test_nothing_to_read_is_an_error(tmp_path):
    for paths, reason in [
        ([], "at least one"),
        (tmp_path / "nowhere", "does not exist"),
        ([tmp_path / "nowhere", tmp_path], "nowhere: no run there"),
    ]:
        with pytest.raises(ReadError, match=reason):
            write_report(paths, tmp_path / "page.html")
    (tmp_path / "run" / "spectra").mkdir(parents=True)
    with pytest.raises(ReadError, match="no window is published yet"):
        write_report(tmp_path / "run", tmp_path / "page.html")
    (tmp_path / "run" / "spectra" / "000000-0000000000-000000.parquet").write_bytes(b"PAR1")
    with pytest.raises(ReadError, match=r"left out: .*000000-0000000000-000000\.parquet"):
        write_report(tmp_path / "run", tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize(
    ("output", "reason"),
    [("", "name of a local file"), (3, "name of a local file"), ("s3://bucket/page.html", "URI"), (".", "directory")],
)
def test_an_output_that_is_none_is_refused(tmp_path, output, reason):
    write_rows(tmp_path, {})
    with pytest.raises(OptionError, match=reason):
        write_report(tmp_path, output)


def test_an_output_that_cannot_be_written_is_named(tmp_path):
    write_rows(tmp_path / "run", {})
    with pytest.raises(OptionError, match=r"run\.json.*cannot write there"):
        write_report(tmp_path / "run", tmp_path / "run" / "run.json" / "page.html")


def test_a_page_replaces_another_and_makes_its_directory(tmp_path):
    write_rows(tmp_path / "run", {})
    target = tmp_path / "new" / "page.html"
    write_report(tmp_path / "run", target)
    target.write_text("older")
    write_report(tmp_path / "run", target)
    assert data_of(target)["runs"][0]["name"] == "run"
    assert [file.name for file in target.parent.iterdir()] == ["page.html"]


def test_more_runs_than_a_page_takes_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "MAX_RUNS", 2)
    for name in "abc":
        write_rows(tmp_path / "runs" / name, {"run": name})
    said = write_report(tmp_path / "runs", tmp_path / "page.html")
    assert said == ["the page shows 2 of 3 runs; give fewer paths to see the others"]
    assert [run["name"] for run in data_of(tmp_path / "page.html")["runs"]] == ["a", "b"]


@pytest.mark.parametrize("name", HOSTILE)
def test_names_travel_unharmed_and_unable_to_harm(name):
    text = escaped_json({"name": name})
    assert text.isascii()
    assert not set("<>&") & set(text)
    import json

    assert json.loads(text) == {"name": name}


def test_nothing_of_a_run_stands_in_the_page_but_in_its_data(tmp_path):
    write_rows(tmp_path / "plain", *({"layer": "plain", "run": "plain"} for _ in HOSTILE))
    rows = [{"layer": name, "run": HOSTILE[0], "layer_type": name} for name in HOSTILE]
    described = {"run": HOSTILE[0], "options": {name: name for name in HOSTILE}}
    write_rows(tmp_path / "hostile", *rows, described=described)
    pages = {}
    for name in ("plain", "hostile"):
        write_report(tmp_path / name, tmp_path / "page.html")
        text = (tmp_path / "page.html").read_text(encoding="utf-8")
        before, _, rest = text.partition('id="numbers">')
        pages[name] = before + rest[rest.index("</script>\n<script>") :]
    assert pages["plain"] == pages["hostile"]


def test_sketched_layers_have_their_bounds(tmp_path):
    rows = [layer_row("whole"), sketched_row("seen", 0.0625), sketched_row("unseen", 9.0)]
    ParquetWriter(Storage(tmp_path / "run")).write(window(rows))
    write_report(tmp_path / "run", tmp_path / "page.html")
    (run,) = data_of(tmp_path / "page.html")["runs"]
    ends = {
        "saturation": [2 / 3, 3 / 40, np.nan],
        "saturation_low": [np.nan, 3 / 40, 3 / 40],
        "saturation_high": [np.nan, 3 / 40, 37 / 40],
        "unseen_variance": [np.nan, 0.0625, 9.0],
    }
    for name, values in ends.items():
        np.testing.assert_array_equal(column(tmp_path / "page.html", run, "train", name)[:, 0], np.float32(values))
    assert ("too-few-columns", ["unseen"]) in [(each["kind"], each["layers"]) for each in run["findings"]]


def test_every_statistic_has_words():
    assert {*SCALAR_STATS, *EXTRA_STATS} <= STATISTICS.keys()
    for name, words in STATISTICS.items():
        assert SPECTRA_SCHEMA.field(name).type in (pa.int32(), pa.int64(), pa.float64())
        assert words.meaning.endswith(".")


def test_a_missing_plotly_names_the_extra_and_the_import_needs_neither_torch_nor_ray(tmp_path):
    program = """
import sys
from delve_ray.analysis.report import write_report
assert not {"plotly", "torch", "ray", "matplotlib", "pandas"} & set(sys.modules)
sys.modules["plotly"] = sys.modules["plotly.offline"] = None
try:
    write_report("nowhere", "page.html")
except ImportError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert run.stdout == 'a report needs plotly: pip install "delve_ray[report]"\n'
