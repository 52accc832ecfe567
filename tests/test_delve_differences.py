"""What docs/from-delve.md says of figures that differ: our side everywhere, delve 0.1.50's where it is installed."""

from __future__ import annotations

import importlib.util
import logging
import math
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from delve_ray import SaturationTracker, spectrum
from delve_ray.store.core import CovarianceStore
from tests.helpers import covariance_error, dimensionality, two_pass_covariance
from tests.watched import DIGITS, IMAGES

PAGE = (Path(__file__).parents[1] / "docs" / "from-delve.md").read_text(encoding="utf-8")
ROWS = torch.tensor(DIGITS.data, dtype=torch.float32)
TRAIN = "train-covariance-matrix"
Theirs = Callable[..., Any]
needs_delve = pytest.mark.skipif(importlib.util.find_spec("delve") is None, reason="delve is in .venv-bench alone")


@pytest.fixture
def theirs(tmp_path: Path) -> Iterator[Theirs]:
    """Makes delve's tracker, whose log names every layer."""
    import delve

    def make(model: Any, save_to: str = "csv", **options: Any) -> Any:
        return delve.SaturationTracker(str(tmp_path / "theirs"), save_to, model, **{"device": "cpu", **options})

    logging.disable(logging.INFO)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield make
    logging.disable(logging.NOTSET)


def ours(model: Any, *inputs: Tensor, **options: Any) -> tuple[dict[str, float], CovarianceStore]:
    """The metrics of one window over these forwards, and the store that has its covariances."""
    with SaturationTracker("unused", modules=model, nosave=True, **options) as tracker:
        for x in inputs:
            model(x)
        tracker.add_saturations()
        return tracker.metrics(wait=True), tracker.store


def identity(features: int = 64) -> nn.Linear:
    """A layer that leaves its rows as they are."""
    layer = nn.Linear(features, features)
    nn.init.eye_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def shares(rows: Tensor) -> np.ndarray:
    """Share of the variance that the first 1, 2, … eigenvalues hold."""
    values = np.linalg.eigvalsh(two_pass_covariance(rows))[::-1].clip(0)
    return np.asarray(values.cumsum() / values.sum())


# --- the worked comparison -----------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "label"), [(1797, "one batch of 1797"), (64, "28 batches of 64 and one of 5")])
def test_the_worked_comparison(size: int, label: str) -> None:
    batches = ROWS.split(size)
    definition = int((shares(ROWS) < 0.99).sum()) + 1
    metrics, _ = ours(identity(), *batches)
    found = metrics["intrinsic_dimensionality/train/Linear"]
    delve = int((shares(batches[-1]) < 0.99).sum())
    assert found == definition
    assert f"| {label} | {definition} | {found:.0f} | {delve} |" in PAGE
    assert metrics["saturation/train/Linear"] == definition / 64
    assert [len(batches), len(batches[-1])] == {1797: [1, 1797], 64: [29, 5]}[size]


@needs_delve
@pytest.mark.parametrize("size", [1797, 64])
def test_delves_own_figures_are_those_of_the_page(size: int, theirs: Theirs) -> None:
    model = nn.Sequential(identity())
    tracker = theirs(model, stats=["idim", "lsat"])
    for batch in ROWS.split(size):
        model(batch)
    assert tracker.logs[TRAIN]["0"]._tlen == len(ROWS.split(size)[-1]), "the last batch"
    tracker.add_saturations()
    (k,) = tracker.writer.value_dict["train-intrinsic-dimensionality_0"]
    label = {1797: "one batch of 1797", 64: "28 batches of 64 and one of 5"}[size]
    assert re.search(rf"\| {label} \| 41 \| 41 \| {k} \|", PAGE)
    assert tracker.writer.value_dict["train-saturation_0"] == [k / 64]


@needs_delve
def test_delves_dimensionality_is_the_definition_minus_one_for_any_spectrum() -> None:
    from delve.metrics import compute_intrinsic_dimensionality

    random = np.random.default_rng(0)
    for _ in range(200):
        values = np.sort(random.random(random.integers(1, 30)) ** random.integers(1, 12))[::-1]
        share = random.uniform(0.5, 0.999)
        theirs = compute_intrinsic_dimensionality(torch.diag(torch.tensor(values.copy())), share)
        assert theirs == dimensionality(values, share) - 1 == spectrum.intrinsic_dimensionality(values, share) - 1


# --- one by one ----------------------------------------------------------------------------------------


def test_a_layer_of_rank_one() -> None:
    rows = torch.arange(50.0)[:, None] * torch.tensor([1.0, 2.0, -3.0])
    assert ours(identity(3), rows)[0]["intrinsic_dimensionality/train/Linear"] == 1


@pytest.mark.parametrize("mean", [1e5, 1e7])
def test_a_mean_far_above_the_spread(mean: float) -> None:
    rows = torch.randn(4096, 8, generator=torch.Generator().manual_seed(0)) + mean
    _, store = ours(identity(8), rows)
    assert covariance_error(store.covariance("Linear", "train"), two_pass_covariance(rows)) < 1e-6


def test_the_determinant_and_its_logarithm() -> None:
    values = np.full(512, 0.1)
    found = spectrum.statistics(
        values, trace=51.2, samples=10_000, threshold=0.99, stats=["determinant", "log_determinant"]
    ).values
    assert found["determinant"] == 0
    assert found["log_determinant"] == pytest.approx(512 * math.log(0.1))
    assert f"`log_determinant` is {found['log_determinant']:.1f}".replace("-", "−") in PAGE


@pytest.mark.parametrize("batch_first", [False, True])
def test_sequences_of_a_recurrent_layer(batch_first: bool) -> None:
    torch.manual_seed(0)
    model = nn.LSTM(5, 3, batch_first=batch_first)
    x = torch.randn(7, 40, 5)
    output = model(x)[0].detach()
    output = output if batch_first else output.transpose(0, 1)
    for method, rows in (("timestepwise", output.flatten(0, 1)), ("last_timestep", output[:, -1])):
        _, store = ours(model, x, timeseries_method=method)
        assert covariance_error(store.covariance("LSTM", "train"), two_pass_covariance(rows)) < 1e-6


def test_tokens_of_a_linear_layer() -> None:
    model, x = identity(6), torch.randn(9, 7, 6, generator=torch.Generator().manual_seed(0))
    for method, rows in (("timestepwise", x.flatten(0, 1)), ("last_timestep", x[:, -1])):
        _, store = ours(model, x, timeseries_method=method)
        assert covariance_error(store.covariance("Linear", "train"), two_pass_covariance(rows)) < 1e-6


def test_names_mean_nothing() -> None:
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    for name in ("encoder_lstm", "encoder_output", "decoder_lstm", "decoder_output"):
        _, store = ours(nn.ModuleDict({name: identity(6)})[name], x)
        assert covariance_error(store.covariance("Linear", "train"), two_pass_covariance(x)) < 1e-6


def test_rows_that_are_not_finite(tmp_path: Path) -> None:
    from delve_ray import read_spectra

    model, x = identity(6), torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    bad = x.clone()
    bad[3, 2], bad[7, 0] = torch.nan, torch.inf
    with SaturationTracker(tmp_path / "run", "parquet", model) as tracker:
        model(x)
        model(bad)
        tracker.add_saturations()
    (row,) = read_spectra(tmp_path / "run").to_pylist()
    assert (row["samples"], row["nonfinite_rows"]) == (78, 2)
    kept = torch.cat([x, bad[torch.isfinite(bad).all(1)]])
    assert row["trace"] == pytest.approx(np.trace(two_pass_covariance(kept)), rel=1e-6)


def test_the_mean_over_layers() -> None:
    model = nn.Sequential(identity(), nn.Linear(64, 10))
    metrics, _ = ours(model, ROWS)
    mean = (metrics["saturation/train/0"] + metrics["saturation/train/1"]) / 2
    assert metrics["saturation/train/mean"] == pytest.approx(mean)


# --- delve's side --------------------------------------------------------------------------------------


@needs_delve
def test_where_nothing_differs_the_covariances_are_equal(theirs: Theirs) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.Flatten(), nn.Linear(216, 12))
    tracker = theirs(model, stats=["det", "trc", "dtrc"])
    metrics, store = ours(model, IMAGES)
    for layer, moments in tracker.logs[TRAIN].items():
        assert covariance_error(store.covariance(layer, "train"), moments.fix().numpy()) < 1e-6
    tracker.add_saturations()
    found = {key: float(value) for key, (value,) in tracker.writer.value_dict.items()}
    names = {"covariance-determinant": "determinant", "covariance-trace": "trace", "diagonal-trace": "diagonal_trace"}
    assert found.keys() == {f"train-{name}_{layer}" for name in names for layer in "02"}
    for name, own in names.items():
        for layer in "02":
            assert metrics[f"{own}/train/{layer}"] == pytest.approx(found[f"train-{name}_{layer}"], rel=1e-4)


@needs_delve
def test_delves_rank_one_mean_and_determinant() -> None:
    from delve import TorchCovarianceMatrix
    from delve.metrics import compute_cov_determinant, compute_intrinsic_dimensionality

    def covariance(rows: Tensor) -> Tensor:
        moments = TorchCovarianceMatrix(device="cpu")
        moments.update(rows, False)
        return moments.fix()

    assert (
        compute_intrinsic_dimensionality(covariance(torch.arange(50.0)[:, None] * torch.tensor([1.0, 2.0, -3.0]))) == 0
    )
    assert compute_cov_determinant(0.1 * torch.eye(512, dtype=torch.float64)) == 0
    for mean, least, most in ((1e5, 1e-5, 1e-3), (1e7, 0.1, 10.0)):
        rows = torch.randn(4096, 8, generator=torch.Generator().manual_seed(0)) + mean
        assert least < covariance_error(covariance(rows).numpy(), two_pass_covariance(rows)) < most


@needs_delve
def test_delves_older_name_is_gone_from_delve_too() -> None:
    import delve

    assert not hasattr(delve, "CheckLayerSat")


@needs_delve
def test_delves_sequences(theirs: Theirs) -> None:
    torch.manual_seed(0)
    lstm, x = nn.Sequential(nn.LSTM(5, 3)), torch.randn(7, 40, 5)
    tracker = theirs(lstm)
    last_sample = lstm(x)[0][:, -1].detach()
    assert covariance_error(tracker.logs[TRAIN]["0"].fix().numpy(), two_pass_covariance(last_sample)) < 1e-6
    for method, rows in (("last_timestep", lambda out: out[:, -1]), ("timestepwise", lambda out: out.flatten(1))):
        linear = nn.Sequential(nn.Linear(5, 3))
        tracker = theirs(linear, timeseries_method=method)
        output = rows(linear(x).detach())
        assert covariance_error(tracker.logs[TRAIN]["0"].fix().numpy(), two_pass_covariance(output)) < 1e-6
    named = nn.ModuleDict({"encoder_output": nn.Linear(5, 3)})
    tracker = theirs(named)
    named["encoder_output"](x.transpose(0, 1)[:, :1])
    covariance = tracker.logs[TRAIN]["encoder_output"].fix()
    assert covariance.shape == (3, 3)
    assert torch.allclose(covariance, covariance[0, 0].expand(3, 3))


@needs_delve
def test_delves_bad_batches_stop_and_close(theirs: Theirs, tmp_path: Path) -> None:
    model = nn.Sequential(identity(6))
    tracker = theirs(model)
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    model(torch.full((4, 6), torch.nan))
    model(x)
    tracker.add_saturations()
    model(torch.full((4, 6), torch.nan))
    with pytest.raises(RuntimeError, match="converge"):
        tracker.add_saturations()
    model(x)
    tracker.add_saturations()
    tracker.stop()
    model(x)
    tracker.add_saturations()
    found = tracker.writer.value_dict["train-saturation_0"]
    assert np.isfinite(found[:2]).all()
    assert np.isnan(found[2:]).all()
    tracker.close()
    assert model[0]._forward_hooks
    assert model[0].name == "0"
    assert (tmp_path / "theirs.csv").is_file()


@needs_delve
def test_delves_options_that_do_something_else(
    theirs: Theirs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(72, 5))
    tracker = theirs(model, include_conv=False, average_sat=True, nosave=True, max_samples=10, verbose=True)
    model(IMAGES[:64])
    assert tracker.logs[TRAIN]["0"]._tlen == 10 * 36, "ten images"
    tracker.add_scalar("accuracy", 1.0)
    tracker.add_saturations()
    found = tracker.writer.value_dict
    assert "train-saturation_0" in found, "the convolution"
    assert np.isnan(found["average-train-sat"]).all()
    assert "accuracy" not in found
    assert (tmp_path / "theirs.csv").is_file(), "which nosave does not keep from being written"
    assert capsys.readouterr() == ("", ""), "verbose prints nothing"
    assert list(theirs([model[0], model[2]]).layers) == ["Module-0-Conv2d", "Module-1-Linear"]
    with pytest.raises(TypeError, match="not iterable"):
        theirs(model[2])


@needs_delve
def test_delves_embedding_is_made_of_two_rows_of_the_covariance(theirs: Theirs) -> None:
    model = nn.Sequential(identity(6))
    tracker = theirs(model, "plot", stats=["embed"])
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    model(x)
    covariance = tracker.logs[TRAIN]["0"].fix()[:2]
    tracker.add_saturations(save=False)
    (points,) = tracker.writer.sample_value_dict["embed"]
    wanted = x.double() @ (covariance.T @ covariance)[:, :2]
    assert torch.allclose(torch.tensor(points, dtype=torch.float64), wanted)


@needs_delve
def test_delves_files_lie_where_the_page_says(theirs: Theirs, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 3))
    for save_to in ("npy", "plot", "tensorboard"):
        tracker = theirs(model, save_to)
        for _ in range(2):
            model(ROWS[:100])
            tracker.add_saturations()
        tracker.close()
    for file in re.findall(r"`<savefile>([^`]+\.(?:csv|npy|png))`", PAGE):
        assert Path(f"{tmp_path / 'theirs'}{file}").is_file(), file
    assert (tmp_path / "theirs" / "train-saturation_0").is_dir()
    header, *epochs = (tmp_path / "theirs.csv").read_text().splitlines()
    assert header == ";train-saturation_0"
    assert len(epochs) == 2
