import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from delve_ray import read_spectra
from delve_ray.analysis.recompute import product_eps, recompute
from delve_ray.errors import OptionError, ReadError
from delve_ray.schema import EXTRA_STATS, SCALAR_STATS, SPECTRA_SCHEMA
from delve_ray.spectrum import FLOAT32_EPS, statistics
from delve_ray.storage import Storage
from delve_ray.writers.parquet import ParquetWriter
from tests.training import train_digits
from tests.windows import later, layer_row, window

CORRELATION = [name for name in EXTRA_STATS if name.startswith("correlation_")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same training under several options."""
    folder = tmp_path_factory.mktemp("runs")
    several = ["lsat", "cov", "correlation", "rankme", "alpha", "noise_rank"]
    return {
        "plain": train_digits(folder / "plain"),
        "0.9": train_digits(folder / "0.9", sat_threshold=0.9),
        "several": train_digits(folder / "several", sat_threshold=[0.9, 0.5, 1.0]),
        "few": train_digits(folder / "few", stats=["lsat"]),
        "cov": train_digits(folder / "cov", stats=["cov"]),
        "everything": train_digits(folder / "everything", stats=several, sat_threshold=0.9),
        "float64": train_digits(folder / "float64", precision="float64", stats=["cov"], width=100),
        "all of float64": train_digits(
            folder / "all", precision="float64", stats=[*SCALAR_STATS, *EXTRA_STATS], width=100
        ),
    }


def write(path, *rows, described=None, **changes):
    ParquetWriter(Storage(path)).write(window(rows, **changes))
    if described is not None:
        (Path(path) / "run.json").write_text(json.dumps(described))
    return path


def assert_same(found, published, but=("wall_time",)):
    assert found.schema.equals(published.schema, check_metadata=True)
    assert found.num_rows == published.num_rows > 0
    for name in set(SPECTRA_SCHEMA.names) - set(but):
        assert found.column(name).equals(published.column(name)), name


@pytest.mark.parametrize(
    ("source", "options", "published"),
    [
        ("plain", {"threshold": 0.9}, "0.9"),
        ("0.9", {"threshold": 0.99}, "plain"),
        ("plain", {"threshold": [0.9, 0.5, 1.0]}, "several"),
        ("several", {"threshold": 0.99}, "plain"),
        ("several", {}, "several"),
        ("plain", {"stats": ["lsat"]}, "few"),
        (
            "cov",
            {"threshold": 0.9, "stats": ["lsat", "cov", "correlation", "rankme", "alpha", "noise_rank"]},
            "everything",
        ),
    ],
)
def test_rows_are_those_that_the_store_publishes_for_the_same_options(runs, source, options, published):
    assert_same(recompute(runs[source], **options), read_spectra(runs[published]))


def test_the_rounding_of_the_run_s_own_precision_counts(runs):
    found = recompute(runs["float64"], stats=[*SCALAR_STATS, *EXTRA_STATS])
    # A run that did not ask for the trace has it as the sum of its eigenvalues.
    assert_same(found, read_spectra(runs["all of float64"]), but=("wall_time", "trace"))
    np.testing.assert_allclose(found["trace"], read_spectra(runs["all of float64"])["trace"], rtol=1e-12)
    assert product_eps(Storage(runs["float64"])) == 2.0**-52


def test_one_small_eigenvalue_is_rounding_or_not_by_the_run_s_precision(tmp_path):
    row = layer_row(features=2, eigenvalues=np.array([1.0, 2.0**-30]), stats={})
    write(tmp_path / "a", row, described={"options": {"product_eps": 2.0**-23}})
    write(tmp_path / "b", row, described={"options": {"product_eps": 2.0**-52}})
    write(tmp_path / "c", row, described={"options": {"recording": {"precision": "float64"}}})
    write(tmp_path / "d", row)

    found = [recompute(tmp_path / name, columns=["condition_number"]).to_pydict() for name in "abcd"]
    assert [row["condition_number"] for row in found] == [[np.inf], [2.0**30], [2.0**30], [np.inf]]


@pytest.mark.parametrize("content", ["", "[]", '{"options": 3}', '{"options": {"product_eps": "x", "recording": []}}'])
def test_a_run_json_that_says_nothing_means_float32(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    assert product_eps(Storage(tmp_path)) == FLOAT32_EPS


@settings(max_examples=25, deadline=None)
@given(
    spectrum=st.lists(st.floats(0, 1e6), min_size=1, max_size=12),
    thresholds=st.lists(st.floats(0.01, 1.0), min_size=1, max_size=3, unique=True),
    samples=st.integers(1, 10**6),
)
def test_any_spectrum_and_threshold(tmp_path_factory, spectrum, thresholds, samples):
    eigenvalues = np.sort(np.array(spectrum))[::-1]
    row = layer_row(features=eigenvalues.size, eigenvalues=eigenvalues, samples=samples, stats={"trace": 7.0})
    run = write(tmp_path_factory.mktemp("run"), row)

    (found,) = recompute(run, threshold=thresholds).to_pylist()
    expected = statistics(eigenvalues, trace=7.0, samples=samples, threshold=thresholds[0], thresholds=thresholds)
    assert {name: found[name] for name in SCALAR_STATS} == {name: expected.values.get(name) for name in SCALAR_STATS}
    assert found["thresholds"] == (thresholds if len(thresholds) > 1 else [])
    assert found["intrinsic_dimensionalities"] == (
        list(expected.intrinsic_dimensionalities) if len(thresholds) > 1 else []
    )
    assert found["threshold"] == thresholds[0]


def test_each_row_keeps_its_own_threshold_unless_told_otherwise(tmp_path):
    rows = [layer_row("a", threshold=0.5), layer_row("b", threshold=0.7, thresholds=(0.7, 0.6))]
    write(tmp_path, *rows)

    columns = ["layer", "threshold", "thresholds", "intrinsic_dimensionality", "intrinsic_dimensionalities"]
    assert [tuple(row.values()) for row in recompute(tmp_path, columns=columns).to_pylist()] == [
        ("a", 0.5, [], 1, []),  # 4 of 6.5 is 0.615…
        ("b", 0.7, [0.7, 0.6], 2, [2, 1]),
    ]


def test_a_row_whose_eigenvalues_are_missing_or_not_finite_has_no_statistics(tmp_path):
    broken = [[np.nan, 1.0, 0.0], [np.inf, 1.0, 0.0]]
    rows = [layer_row(str(index), eigenvalues=np.array(values)) for index, values in enumerate(broken)]
    write(tmp_path, *rows, layer_row("good"))

    found = recompute(tmp_path, threshold=0.5).to_pylist()
    assert [row["saturation"] for row in found] == [None, None, 1 / 3]
    assert [row["trace"] for row in found] == [None, None, 6.5]
    assert [row["threshold"] for row in found] == [0.5, 0.5, 0.5]


def test_covariances_that_belong_to_other_observations_are_not_used(tmp_path):
    matrix = np.array([4.0, 0.0, 0.0, 2.0, 0.0, 1.0])
    writer = ParquetWriter(Storage(tmp_path))
    row = layer_row(covariance=matrix, eigenvalues=np.array([4.0, 2.0, 1.0]))
    writer.write(window([row], step=0))
    writer.write(window([row], step=1, window=1))
    # A crash between the two files of a revision leaves the covariances ahead.
    writer._put("covariances/000000-0000000001-000001.parquet", _ahead(tmp_path))

    found = recompute(tmp_path, stats=["rankme"], columns=["step", "rankme"]).to_pylist()
    assert [row["step"] for row in found if row["rankme"] is not None] == [0]


def _ahead(path):
    import pyarrow.parquet as pq

    table = pq.read_table(path / "covariances" / "000000-0000000001-000000.parquet")
    return table.set_column(table.schema.get_field_index("revision"), "revision", pa.array([1], pa.int32()))


def test_statistics_of_other_matrices_without_covariances(tmp_path):
    stats = {"saturation": 2 / 3, "correlation_effective_rank": 1.5, "correlation_saturation": 0.25, "rankme": 2.5}
    write(tmp_path, layer_row(stats=stats))

    asked = {"stats": ["correlation", "rankme"]}
    with pytest.raises(ReadError, match=r"correlation_intrinsic_dimensionality needs the covariances.*'cov'"):
        recompute(tmp_path, **asked)
    # What is on disk and no threshold changes is kept.
    assert recompute(tmp_path, stats=["rankme"], threshold=0.5)["rankme"].to_pylist() == [2.5]
    (row,) = recompute(tmp_path, stats=["rankme", "correlation_effective_rank"], threshold=0.5).to_pylist()
    assert row["correlation_effective_rank"] == 1.5
    with pytest.raises(ReadError, match="correlation_saturation needs the covariances"):
        recompute(tmp_path, stats=["correlation_saturation"], threshold=0.5)
    assert recompute(tmp_path, stats=["correlation_saturation"])["correlation_saturation"].to_pylist() == [0.25]


def test_filters_columns_and_several_runs(runs, tmp_path):
    publish = [(tmp_path / "b", "b"), (tmp_path / "a", "a")]
    for path, run in publish:
        for step in (1, 0):
            write(path, layer_row("x"), layer_row("y"), run=run, step=step, window=step)

    found = recompute(
        [path for path, _ in publish],
        threshold=0.5,
        columns=["layer", "run", "step"],
        filters=(pc.field("layer") == "y") & (pc.field("saturation") > 0.6),  # which is the stored one
    )
    assert [tuple(row.values()) for row in found.to_pylist()] == [
        ("y", run, step) for run in ("a", "b") for step in (0, 1)
    ]
    assert found.column_names == ["layer", "run", "step"]


def test_progress_counts_the_rows_of_each_run(tmp_path):
    for name in "ab":
        write(tmp_path / name, layer_row("x"), layer_row("y"), layer_row("z"), run=name)

    seen = []
    recompute(tmp_path, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)] * 2


def test_files_are_not_changed_and_only_what_holds_is_used(tmp_path):
    write(tmp_path, layer_row(eigenvalues=np.array([1.0, 1.0, 1.0])), attempt=0, wall_time=later(9))
    write(tmp_path, layer_row(eigenvalues=np.array([8.0, 1.0, 1.0])), attempt=1)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.parquet")}

    found = recompute(tmp_path, threshold=0.8)
    assert found.select(["attempt", "intrinsic_dimensionality"]).to_pylist() == [
        {"attempt": 1, "intrinsic_dimensionality": 1}
    ]
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.parquet")} == before


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"threshold": 90}, OptionError, "sat_threshold=90 is out of range.*write 0.9"),
        ({"threshold": [0.9, 0.9]}, OptionError, "twice"),
        ({"stats": ["satration"]}, OptionError, "unknown name 'satration'; did you mean 'saturation'"),
        ({"columns": ["nope"]}, ReadError, "columns: no column 'nope'"),
        ({"filters": pc.field("nope") == 1}, ReadError, "filters: no column 'nope'"),
    ],
)
def test_options_that_cannot_be_used(tmp_path, options, error, message):
    write(tmp_path, layer_row())
    with pytest.raises(error, match=message):
        recompute(tmp_path, **options)


def test_a_run_without_rows(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    found = recompute(tmp_path, threshold=0.9, stats=["rankme"])
    assert found.num_rows == 0
    assert found.schema.equals(SPECTRA_SCHEMA, check_metadata=True)


def test_covariances_are_read_in_pieces(runs, monkeypatch):
    monkeypatch.setattr("delve_ray.analysis.recompute.COVARIANCE_BYTES", 1)
    whole = read_spectra(runs["everything"])
    options = {"threshold": 0.9, "stats": ["lsat", "cov", "correlation", "rankme", "alpha", "noise_rank"]}
    assert_same(recompute(runs["cov"], **options), whole)


def test_rows_of_layers_that_are_wider_in_a_later_attempt(tmp_path):
    write(tmp_path, layer_row(eigenvalues=np.array([1.0]), features=1), step=0)
    write(tmp_path, replace(layer_row(), eigenvalues=np.array([3.0, 1.0]), features=2), step=1, window=1, attempt=1)
    found = recompute(tmp_path, threshold=0.7)
    assert found["saturation"].to_pylist() == [1.0, 0.5]
