"""Scripts written for delve 0.1.50 run with the import changed, and docs/from-delve.md says what is true.

What the page says of delve itself is checked where delve is installed, in .venv-bench.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

from delve_ray import OptionError, SaturationTracker, read_covariances, read_scalars, read_spectra
from delve_ray.moments import unpack_triangle
from delve_ray.writers import check_save_to
from tests.helpers import dimensionality, two_pass_covariance
from tests.watched import IMAGES, Rows, check_saturations, cnn

PAGE = (Path(__file__).parents[1] / "docs" / "from-delve.md").read_text(encoding="utf-8")
REQUIRED = inspect.Parameter.empty
CONSTRUCTOR: dict[str, Any] = {
    "savefile": REQUIRED,
    "save_to": REQUIRED,
    "modules": REQUIRED,
    "layer_filter": None,
    "writer_args": None,
    "log_interval": 1,
    "max_samples": None,
    "stats": ["lsat"],
    "layerwise_sat": True,
    "reset_covariance": True,
    "average_sat": False,
    "ignore_layer_names": [],
    "include_conv": True,
    "conv_method": "channelwise",
    "timeseries_method": "last_timestep",
    "sat_threshold": 0.99,
    "nosave": False,
    "verbose": False,
    "device": "cuda:0",
    "initial_epoch": 0,
    "interpolation_strategy": None,
    "interpolation_downsampling": 32,
}
"""Parameters of delve 0.1.50's constructor in their order, with their defaults; layer_filter's is the identity."""
STATS = {
    "lsat": "saturation",
    "idim": "intrinsic_dimensionality",
    "det": "determinant",
    "trc": "trace",
    "dtrc": "diagonal_trace",
    "cov": "read_covariances",
    "embed": "read_embeddings",
}
WRITERS = {
    "csv": ("csv/spectra.csv", "csv/scalars.csv"),
    "npy": ("npy/train/0000000001.npz", "npy/scalars/*.npy"),
    "plot": ("plot/train/0000000001.png", "plot/saturation.png"),
    "plotcsv": ("csv/spectra.csv", "csv/scalars.csv", "plot/saturation.png"),
    "tensorboard": ("tensorboard/events.*",),
    "print": (),
}
"""delve 0.1.50's names, and the files below the savefile that the page promises for each."""
OTHER_NAMES = {"csvplot": "plotcsv", "csvplotting": "plotcsv", "tb": "tensorboard"}
"""Its other names for some of them."""
needs_delve = pytest.mark.skipif(importlib.util.find_spec("delve") is None, reason="delve is in .venv-bench alone")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, as scripts name their savefiles relative to it."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    return tmp_path


def read_csv(savefile: str, name: str = "spectra") -> pd.DataFrame:
    return pd.read_csv(f"{savefile}/csv/{name}.csv")


# --- the constructor -----------------------------------------------------------------------------------


def test_every_parameter_is_known_and_the_first_three_have_their_places() -> None:
    ours = list(inspect.signature(SaturationTracker).parameters)
    assert set(CONSTRUCTOR) <= set(ours)
    assert ours[:3] == list(CONSTRUCTOR)[:3]


@needs_delve
def test_the_list_of_parameters_is_delves() -> None:
    import delve

    parameters = dict(inspect.signature(delve.SaturationTracker.__init__).parameters)
    del parameters["self"]
    defaults = {name: parameter.default for name, parameter in parameters.items()}
    assert defaults.pop("layer_filter")("x") == "x"
    assert defaults == {name: default for name, default in CONSTRUCTOR.items() if name != "layer_filter"}
    assert list(parameters) == list(CONSTRUCTOR)


def test_delves_defaults_are_accepted_by_name(here: Path) -> None:
    given = {name: value for name, value in CONSTRUCTOR.items() if value is not REQUIRED}
    given |= {"layer_filter": lambda layers: layers, "device": "cpu"}
    del given["average_sat"]  # it is refused
    model = cnn()
    watched = Rows({"0": model[0], "3": model[3], "5": model[5]})
    with SaturationTracker(savefile="run", save_to="parquet", modules=model, **given) as tracker:
        model(IMAGES[:64])
        tracker.add_saturations()
    check_saturations(read_spectra("run").to_pandas(), {0: watched.take()})
    assert read_spectra("run").column("trace").null_count == 3, "stats=['lsat'] is the saturation alone"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layerwise_sat": False}, "layerwise_sat=False .* rows are always per layer"),
        ({"reset_covariance": False}, "reset_covariance=False .* every window starts anew"),
        ({"average_sat": False}, "average_sat=False .* mean over layers is always published"),
        ({"ignore_layer_names": ["7"]}, r"ignore_layer_names has \['7'\], which the model does not"),
        ({"writer_args": {"primary_metric": "accuracy"}}, "writer_args has 'primary_metric', .* read_scalars"),
        ({"writer_args": {"plot_manipulation_func": print}}, "'plot_manipulation_func', .* delve_ray.analysis.plots"),
        ({"writer_args": {"savepath": "x"}}, "'savepath', .* savefile's directory"),
        ({"writer_args": {"figsize": (3, 2)}}, "writer_args has 'figsize', an option of 'plot', .* 'parquet'"),
        ({"writer_args": {"zip": True}}, "writer_args has 'zip', an option of 'npy', .* 'parquet'"),
        ({"stats": ["sat"]}, "stats: unknown name 'sat'; did you mean"),
        ({"save_to": "csvs"}, "save_to='csvs' is unknown; valid: .*'csv', 'npy', 'plot'.* Did you mean 'csv'"),
        ({"interpolation_strategy": "best"}, "interpolation_strategy='best' is none of 'nearest'"),
        ({"conv_method": "sum"}, "conv_method='sum' is none of 'channelwise'"),
    ],
)
def test_what_is_not_there_is_refused_by_name(options: dict[str, Any], words: str, here: Path) -> None:
    with pytest.raises((OptionError, NotImplementedError), match=words):
        SaturationTracker(**{"savefile": "run", "save_to": "parquet", "modules": cnn(), **options})
    assert not list(here.iterdir())


def test_a_savefile_that_holds_a_run_is_gone_on_with_on_request(here: Path) -> None:
    model = cnn()
    for first, more in ((0, {}), (5, {"resume": True})):
        with SaturationTracker("run", "plotcsv", model, initial_epoch=first, **more) as tracker:
            model(IMAGES[:64])
            tracker.add_saturations()
    assert read_csv("run")["step"].unique().tolist() == [0, 5]
    assert set(pq.read_table("run/plot/saturation.parquet").column("step").to_pylist()) == {0, 5}
    with pytest.raises(OptionError, match="holds a run already"):
        SaturationTracker("run", "plotcsv", model)


def test_options_that_are_the_same(here: Path) -> None:
    """Each has the effect that its name promises, seen in the layers and their counts."""
    model, batch = cnn(), IMAGES[:64]

    def counts(forwards: int = 3, **options: Any) -> dict[str, tuple[int, int]]:
        run = f"run{len(list(here.iterdir()))}"
        with SaturationTracker(run, "parquet", model, stats=["lsat"], **options) as tracker:
            for _ in range(forwards):
                model(batch)
            tracker.add_saturations()
        return {row["layer"]: (row["samples"], row["features"]) for row in read_spectra(run).to_pylist()}

    everything = {"0": (64 * 36 * 3, 6), "3": (192, 24), "5": (192, 10)}
    assert counts() == everything
    assert counts(include_conv=False) == {"3": (192, 24), "5": (192, 10)}
    assert counts(ignore_layer_names=["3"]).keys() == {"0", "5"}
    assert counts(layer_filter=lambda layers: {"5": layers["5"]}).keys() == {"5"}
    assert counts(log_interval=2)["5"] == (128, 10), "the first and the third forward"
    assert counts(max_samples=100) == {"0": (100, 6), "3": (100, 24), "5": (100, 10)}, "rows, not images"
    for method in ("mean", "max", "median"):
        assert counts(conv_method=method)["0"] == (192, 6)
    assert counts(conv_method="flatten")["0"] == (192, 216)
    small = counts(interpolation_strategy="bilinear", interpolation_downsampling=4)
    assert small == everything | {"0": (64 * 16 * 3, 6)}
    assert counts(interpolation_strategy="nearest") == everything, "no map is larger than 32"


def test_nosave_writes_nothing(here: Path) -> None:
    model = cnn()
    with SaturationTracker("run", "csv", model, nosave=True) as tracker:
        model(IMAGES[:64])
        tracker.add_scalar("loss", 1.0)
        tracker.add_saturations()
        assert 0 < tracker.metrics(wait=True)["saturation/train/mean"] <= 1
    assert not list(here.iterdir())


# --- statistics ----------------------------------------------------------------------------------------


def test_every_statistic(here: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 12))
    rows = model(IMAGES.flatten(1)).detach()
    with SaturationTracker("run", ["parquet", "npy"], model, stats=list(STATS)) as tracker:
        model(IMAGES.flatten(1))
        tracker.add_saturations()
    (row,) = read_spectra("run").to_pylist()
    covariance = two_pass_covariance(rows)
    values = np.linalg.eigvalsh(covariance)[::-1]
    k = dimensionality(values, 0.99)
    wanted = {
        "lsat": k / 12,
        "idim": k,
        "det": np.linalg.det(covariance),
        "trc": np.trace(covariance),
        "dtrc": values.sum(),
    }
    assert {name: row[STATS[name]] for name in wanted} == pytest.approx(wanted, rel=1e-5)
    (packed,) = read_covariances("run").column("covariance").to_pylist()
    with np.load("run/npy/train/0000000000.npz") as archive:
        for matrix in (unpack_triangle(packed, 12), archive["covariance/0"]):
            assert np.abs(matrix - covariance).max() <= 1e-6 * values[0]
        points = archive["embedding/0"]
    axes = np.linalg.eigh(covariance)[1][:, [-1, -2]]
    projected = np.abs((rows.double().numpy() - rows.double().numpy().mean(0)) @ axes)
    distances = np.abs(np.abs(points)[:, None] - projected[None]).max(2).min(1)
    assert len(points) > 100
    assert distances.max() <= 1e-4 * np.sqrt(values[0]), "each is one of the layer's rows"


# --- writers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WRITERS)
def test_every_writer_writes_where_the_page_says(name: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = cnn()
    with SaturationTracker("run", name, model) as tracker:
        for epoch in range(2):
            model(IMAGES[:64])
            tracker.add_scalar("accuracy", epoch / 2)
            tracker.add_saturations()
    for pattern in WRITERS[name]:
        assert list(here.glob(f"run/{pattern}")), pattern
    printed = capsys.readouterr().out
    assert ("run  step 1  train: saturation" in printed) == (name == "print")
    assert ("run  step 1  accuracy: 0.5" in printed) == (name == "print")
    folders = {path.name for path in here.glob("run/*") if path.is_dir()} - {"writers", "store"}
    assert folders == {pattern.partition("/")[0] for pattern in WRITERS[name]}
    assert json.loads((here / "run" / "run.json").read_text())["run"] == "run"


@needs_delve
def test_the_list_of_writers_is_delves() -> None:
    from delve.writers import STATMAP
    from delve.writers import WRITERS as THEIRS

    assert {*WRITERS, *OTHER_NAMES} == set(THEIRS)
    assert all(THEIRS[name] is THEIRS[same] for name, same in OTHER_NAMES.items())
    assert THEIRS["plot"] is THEIRS["plotcsv"], "their plots come with a CSV file"
    assert set(STATS) == set(STATMAP)


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_other_names_of_the_same(name: str) -> None:
    assert check_save_to(name) == check_save_to(OTHER_NAMES[name])


def test_delves_way_of_giving_options(here: Path) -> None:
    model = cnn()
    given = {"figsize": [4, 2], "fontsize": 8, "zip": True}
    with SaturationTracker("run", ["plotcsv", "npy"], model, writer_args=given) as tracker:
        model(IMAGES[:64])
        tracker.add_saturations()
    picture = (here / "run" / "plot" / "saturation.png").read_bytes()
    width, height = int.from_bytes(picture[16:20]), int.from_bytes(picture[20:24])
    assert width == 2 * height
    assert check_save_to(["plotcsv", "csv", "print", "console"]) == ("csv", "plot", "console")


# --- methods -------------------------------------------------------------------------------------------


def test_every_method(here: Path) -> None:
    model = cnn()
    tracker = SaturationTracker("run", "parquet", model)
    assert tracker.is_recording() is True
    tracker.stop()
    assert tracker.is_recording() is False
    model(IMAGES[:64])
    tracker.add_saturations()
    tracker.resume()
    assert tracker.is_recording() is True
    model(IMAGES[:32])
    tracker.add_scalar("loss", np.float32(0.5))
    tracker.add_scalar("late", torch.tensor(2.0), step=7)
    tracker.add_saturations()
    tracker.flush()
    assert tracker.layers == ("0", "3", "5")
    assert tracker.store.covariance("5", "train").shape == (10, 10)
    assert all(module._forward_hooks for module in (model[0], model[3], model[5]))
    tracker.close()
    tracker.close()
    assert not any(module._forward_hooks for module in model.modules())
    assert vars(model[3]).keys() == vars(nn.Linear(1, 1)).keys()
    rows = read_spectra("run", columns=["step", "layer", "samples"]).to_pylist()
    assert [(row["step"], row["layer"]) for row in rows] == [(1, "0"), (1, "3"), (1, "5")], (
        "a stopped window has no row"
    )
    assert rows[2]["samples"] == 32
    scalars = read_scalars("run", columns=["name", "step", "value"]).to_pylist()
    assert [tuple(row.values()) for row in scalars] == [("late", 7, 2.0), ("loss", 1, 0.5)]


# --- the page ------------------------------------------------------------------------------------------


def table(heading: str) -> list[list[str]]:
    """The rows of the first table behind a heading of the page, without their head."""
    section = PAGE.partition(f"\n{heading}\n")[2].partition("\n|")[2].partition("\n\n")[0]
    lines = [line for line in f"|{section}".splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def quoted(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


def test_the_page_has_every_parameter_in_delves_order() -> None:
    assert [name for row in table("## Options") for name in quoted(row[0])] == list(CONSTRUCTOR)


def test_the_page_has_every_statistic() -> None:
    assert {quoted(row[0])[0]: quoted(row[1])[0] for row in table("## Statistics")} == STATS


def test_the_page_has_every_writer_and_its_files() -> None:
    rows = {name: row for row in table("## Writers and files") for name in quoted(row[0]) if name != "AbstractWriter"}
    assert set(rows) == {*WRITERS, *OTHER_NAMES}
    for name in ("csv", "npy", "plot"):
        ours = {re.sub(r"\d{10}", "#", file) for file in quoted(rows[name][3])}
        assert ours == {re.sub(r"\d{10}", "#", pattern) for pattern in WRITERS[name]}


def test_what_the_page_names_of_the_package_is_there() -> None:
    for line in PAGE.splitlines():
        if match := re.fullmatch(r"from (delve_ray[\w.]*) import ([\w, ]+)", line):
            module = importlib.import_module(match[1])
            assert all(hasattr(module, name) for name in match[2].split(", ")), line
    pca = importlib.import_module("delve_ray.pca")
    assert all(f"`{name}" in PAGE and hasattr(pca, name) for name in ("LinearPCALayer", "Conv2dPCALayer", "project"))
    assert all(hasattr(pca.Projection, name) for name in ("threshold", "randomize"))
    assert importlib.import_module("delve_ray.analysis.plots").__all__


@needs_delve
def test_what_the_page_names_of_delve_is_there() -> None:
    import delve.pca_layers

    (_, *rows) = PAGE.rpartition("Of the package:")[2].strip().splitlines()[1:]
    names = [re.match(r"[\w.]+", name) for row in rows for name in quoted(row.split(" | ")[0])]
    assert len(names) == 9
    for name in names:
        last = name[0].rpartition(".")[2] if name else ""
        assert hasattr(delve, last) or hasattr(delve.pca_layers, last), last


def test_the_page_has_every_method() -> None:
    rows = {name.partition("(")[0]: row[1] for row in table("## Methods") for name in quoted(row[0])}
    there = {"add_saturations", "add_scalar", "stop", "resume", "is_recording", "close", "layers", "save"}
    gone = {"add_scalars", "add_sample_scalar", "logs"}
    assert set(rows) == there | gone
    assert all(hasattr(SaturationTracker, name) for name in there)
    assert not any(rows[name].startswith("not there") and hasattr(SaturationTracker, name) for name in rows)
