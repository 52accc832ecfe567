"""Rows of sketched layers, with the head of a spectrum and without a saturation, wherever rows are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pytest

from delve_ray import read_spectra
from delve_ray.analysis.comparing import compare
from delve_ray.analysis.diagnosis import diagnose
from delve_ray.analysis.exporting import export_npy, spectra_csv
from delve_ray.analysis.recompute import recompute
from delve_ray.analysis.table import layer_table
from delve_ray.errors import ReadError
from delve_ray.storage import Storage
from delve_ray.writers.parquet import ParquetWriter
from tests.cli.runs import command
from tests.spectra_tables import spectra_table
from tests.windows import HEAD, layer_row, sketched_row, window


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two windows with a whole layer and two sketched ones, of which one has not seen much."""
    path = str(tmp_path_factory.mktemp("sketched") / "run")
    writer = ParquetWriter(Storage(path))
    for step in range(2):
        rows = [layer_row("whole"), sketched_row("seen", 0.0625), sketched_row("unseen", 9.0)]
        writer.write(window(rows, step=step, window=step))
    (Path(path) / "run.json").write_text(json.dumps({"run": "run"}))
    return path


def of_layer(table: Any, layer: str) -> dict[str, Any]:
    return next(row for row in table.to_pylist() if row["layer"] == layer and row["step"] == 1)


def test_files_have_the_interval(run: str) -> None:
    seen, unseen, whole = (of_layer(read_spectra(run), layer) for layer in ("seen", "unseen", "whole"))
    assert (seen["saturation"], seen["saturation_low"], seen["saturation_high"]) == (3 / 40, 3 / 40, 3 / 40)
    assert (unseen["saturation"], unseen["intrinsic_dimensionality"]) == (None, None)
    assert (unseen["saturation_low"], unseen["saturation_high"]) == (3 / 40, 37 / 40)
    assert (seen["unseen_variance"], unseen["unseen_variance"]) == (0.0625, 9.0)
    assert [whole[name] for name in ("saturation_low", "saturation_high", "unseen_variance")] == [None] * 3


def test_other_thresholds_have_the_interval_of_the_head(run: str) -> None:
    table = recompute(run, threshold=0.6)
    seen, unseen = of_layer(table, "seen"), of_layer(table, "unseen")
    assert (seen["intrinsic_dimensionality"], seen["saturation_low"], seen["saturation_high"]) == (1, 1 / 40, 1 / 40)
    # 6, 8, 9 of 18 are seen; 10.8 are wanted: at best one eigenvalue, and after the head 1.8 of 9 in 8 of 37.
    assert unseen["intrinsic_dimensionality"] is None
    assert (unseen["saturation_low"], unseen["saturation_high"]) == (1 / 40, 11 / 40)
    several = of_layer(recompute(run, threshold=[0.6, 0.9]), "seen")
    assert (several["thresholds"], several["intrinsic_dimensionalities"]) == ([0.6, 0.9], [1, 3])
    for row in (seen, unseen):
        assert row["trace"] == row["diagonal_trace"]
        assert [row[name] for name in ("determinant", "effective_rank", "alpha", "noise_rank")] == [None] * 4
    assert of_layer(recompute(run), "unseen") | {"trace": None, "diagonal_trace": None} == of_layer(
        read_spectra(run), "unseen"
    ) | {"trace": None, "diagonal_trace": None}
    assert of_layer(table, "whole")["intrinsic_dimensionality"] == 1


def test_a_head_without_its_rest_says_nothing(tmp_path: Path) -> None:
    path = str(tmp_path / "run")
    ParquetWriter(Storage(path)).write(window([sketched_row("seen", 0.0625, unseen_variance=None)]))
    (row,) = recompute(path).to_pylist()
    assert [row[name] for name in ("saturation", "saturation_low", "trace")] == [None] * 3


def test_a_diagnosis_says_nothing_that_a_head_does_not_tell() -> None:
    """The same layers are found over-wide, collapsed and apart in both phases where their spectra are whole."""
    rows = []
    for phase in ("train", "eval"):
        for step in range(12):
            for index in range(4):
                spectrum = [1.0] * 2 + [1e-9] * 38 if step > 8 or phase == "eval" else [1.0] * 30 + [1e-9] * 10
                known = {
                    "layer": str(index),
                    "phase": phase,
                    "step": step,
                    "features": 40,
                    "samples": 100_000,
                    "eigenvalues": spectrum,
                    "intrinsic_dimensionality": None,
                    "saturation": None,
                    "trace": sum(spectrum),
                }
                rows.append(known)
    assert diagnose(spectra_table(*rows)), "the rules find something in whole spectra"
    for k, kinds in ((None, {"too-few-columns"}), (2, set())):
        heads = [
            row | {"eigenvalues": row["eigenvalues"][:30], "sketched": True, "trace": 30.0, "unseen_variance": 0.0}
            for row in rows
        ]
        found = diagnose(spectra_table(*(row | {"intrinsic_dimensionality": k} for row in heads)))
        assert {finding.kind for finding in found} == kinds, found


def test_tables_comparisons_and_exports_take_them(run: str, tmp_path: Path) -> None:
    spectra = read_spectra(run)
    said = "train: sketched, with bounds of the saturation: seen 8% to 8%, unseen 8% to 92%"
    lines = layer_table(spectra, step=1).splitlines()
    assert said in lines
    assert "train: the mean is without unseen" in lines
    (mean,) = [line for line in lines if line.startswith("mean ")]
    assert mean.split()[-1] == "37%", "of 2/3 and 3/40"
    other = {"a": spectra, "b": spectra}
    assert [row["difference"] for row in compare(other).to_pylist() if row["layer"] == "seen"] == [0.0, 0.0]
    assert b"saturation_high" in spectra_csv(spectra)
    index = export_npy(run, tmp_path / "arrays")
    (entry,) = [entry for entry in index if entry["layer"] == "seen"]
    values = np.load(tmp_path / "arrays" / entry["file"])
    assert values.shape == (2, 40)
    np.testing.assert_array_equal(values[0, :3], HEAD)
    assert np.isnan(values[:, 3:]).all()


def test_pictures_take_them(run: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from delve_ray.analysis import plots

    spectra = read_spectra(run)
    figure = plots.eigenspectra(spectra)
    said = [text.get_text() for axes in figure.axes for text in axes.texts]
    titles = [axes.get_title() for axes in figure.axes]
    assert said[1:] == ["train: k = 3", "train: k = 3…37"]
    assert titles[1].endswith("40 features, 5000 samples")
    for draw in (plots.saturation_per_layer, plots.saturation_over_steps):
        draw(spectra, tmp_path / f"{draw.__name__}.png")
    alone = spectra.filter(pc.field("layer") == "unseen")
    with pytest.raises(ReadError, match=r"stat='saturation': the layers are sketched, .* There are: trace"):
        plots.stat_heatmap(alone)


def test_the_command_takes_them(run: str, tmp_path: Path) -> None:
    shown = command("summary", run, "--json")
    assert shown.returncode == 0, shown.stderr
    rows = {row["layer"]: row for row in json.loads(shown.stdout)}
    assert (rows["unseen"]["saturation"], rows["unseen"]["saturation_high"]) == (None, 37 / 40)
    page = tmp_path / "report.html"
    for arguments in (("summary", run), ("recompute", run, "--threshold", "0.6"), ("report", run, "-o", page)):
        done = command(*arguments)
        assert done.returncode == 0, (arguments, done.stderr)
    assert page.stat().st_size > 10_000
