"""SaturationTracker in one process: what it records, publishes, refuses, and leaves behind."""

from __future__ import annotations

import gc
import json
import logging
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from delve_ray import OptionError, RegistrationError, SaturationTracker, StoreError, read_covariances, read_spectra
from delve_ray.accumulator import Accumulator
from delve_ray.moments import unpack_triangle
from delve_ray.shipping import Shipper
from delve_ray.store import CovarianceStore, StoreConfig


def cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 20), nn.ReLU(), nn.Linear(20, 4)
    )


def batches(count: int, size: int = 32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(size, 1, 8, 8, generator=generator) + index for index in range(count)]


def independent_rows(model: nn.Sequential, inputs: list[torch.Tensor]) -> dict[str, np.ndarray]:
    """Rows of each tracked layer, by calling the layers one after another: no hook is involved."""
    found: dict[str, list[np.ndarray]] = {}
    with torch.no_grad():
        for x in inputs:
            for name, layer in model.named_children():
                x = layer(x)
                if isinstance(layer, nn.Conv2d):
                    found.setdefault(name, []).append(
                        np.concatenate([z.reshape(len(z), -1).T for z in x.double().numpy()])
                    )
                elif isinstance(layer, nn.Linear):
                    found.setdefault(name, []).append(x.double().numpy())
    return {name: np.concatenate(parts) for name, parts in found.items()}


def test_published_covariances_are_those_of_all_rows(savefile: str) -> None:
    torch.manual_seed(0)
    model = cnn()
    train, evaluation = batches(9), batches(3, 50)
    with SaturationTracker(savefile, ["parquet"], model, stats=["cov", "lsat"], publish_every=0.01) as tracker:
        assert tracker.layers == ("0", "3", "5")
        for step in (3, 8):
            model.train()
            for x in train[: step + 1]:
                model(x)
            model.eval()
            for x in evaluation:
                model(x)
            tracker.add_saturations(step=step)
    table = read_covariances(savefile).to_pylist()
    assert {(row["phase"], row["step"], row["layer"]) for row in table} == {
        (phase, step, layer) for phase in ("train", "eval") for step in (3, 8) for layer in ("0", "3", "5")
    }
    for row in table:
        rows = independent_rows(model, train[: row["step"] + 1] if row["phase"] == "train" else evaluation)[
            row["layer"]
        ]
        reference = np.cov(rows.T, bias=True)
        result = unpack_triangle(row["covariance"], row["features"])
        assert row["samples"] == len(rows)
        assert np.abs(result - reference).max() < 1e-6 * np.linalg.eigvalsh(reference)[-1]
        assert np.allclose(row["mean"], rows.mean(0), atol=1e-5 * np.abs(rows).max())


def test_metrics_equal_the_published_rows(savefile: str) -> None:
    model = cnn()
    with SaturationTracker(savefile, "parquet", model, publish_every=0) as tracker:
        assert tracker.metrics() == {}
        for x in batches(4):
            model(x)
        tracker.add_saturations()
        metrics = tracker.metrics(wait=True)
        assert tracker.metrics() == metrics
    rows = read_spectra(savefile).to_pylist()
    expected = {f"{stat}/train/{row['layer']}": row[stat] for row in rows for stat in STATS if row[stat] is not None}
    assert {key: value for key, value in metrics.items() if not key.endswith("/mean")} == expected
    assert metrics["saturation/train/mean"] == pytest.approx(np.mean([row["saturation"] for row in rows]))
    assert tracker.metrics() == metrics, "still there after close()"


STATS = [
    "saturation",
    "intrinsic_dimensionality",
    "trace",
    "diagonal_trace",
    "determinant",
    "log_determinant",
    "effective_rank",
    "participation_ratio",
    "stable_rank",
    "spectral_entropy",
    "condition_number",
    "alpha",
    "noise_rank",
]


def test_the_training_goes_on_while_the_store_does_not_answer(savefile: str, caplog: pytest.LogCaptureFixture) -> None:
    release, asked = threading.Event(), threading.Event()
    model = nn.Linear(4, 4)
    tracker = SaturationTracker(savefile, "parquet", model, publish_every=0)
    take = tracker.store.take

    def slow_take(*args: Any) -> Any:
        asked.set()
        release.wait(30)
        return take(*args)

    tracker.store.take = slow_take
    for step in range(5):
        model(torch.randn(8, 4))
        tracker.add_saturations(step)
    assert asked.wait(60), "the sender is in the store's call"
    assert not release.is_set(), "and five windows were closed meanwhile"
    assert tracker.metrics() == {}
    release.set()
    assert tracker.metrics(wait=True)["saturation/train/Linear"] > 0
    tracker.close()
    assert [row["samples"] for row in read_spectra(savefile).to_pylist()] == [8] * 5


def test_a_store_that_stays_silent_is_named_and_costs_only_the_figures(
    savefile: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = nn.Linear(4, 4)
    tracker = SaturationTracker(savefile, "parquet", model, publish_every=0)

    def dead(*args: Any) -> Any:
        raise StoreError("the store's process has ended", final=True)

    tracker.store.take = dead
    model(torch.randn(8, 4))
    tracker.add_saturations(step=11)
    with pytest.raises(StoreError, match="the store's process has ended"):
        tracker.metrics(wait=True)
    assert not tracker.is_recording(), "nothing piles up for a store that is gone"
    model(torch.randn(8, 4))
    tracker.add_saturations(step=12)
    tracker.close(timeout=5)
    assert "ends without having delivered rows of steps [11, 12]" in caplog.text


def test_silence_is_not_final(savefile: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("delve_ray.shipping.RETRY_S", (0.01, 0.05))
    model = nn.Linear(4, 4)
    tracker = SaturationTracker(savefile, "parquet", model, publish_every=0)
    take, calls = tracker.store.take, []

    def flaky(*args: Any) -> Any:
        calls.append(args)
        answer = take(*args)
        if len(calls) < 4:
            raise StoreError("no answer in time")  # the delta was merged; the sender cannot know
        return answer

    tracker.store.take = flaky
    model(torch.randn(8, 4))
    tracker.add_saturations()
    tracker.metrics(wait=True)
    assert len(calls) == 4
    assert all(call[0] is calls[0][0] and call[1] is calls[0][1] for call in calls), (
        "a range that was sent never changes"
    )
    tracker.close()
    (row,) = read_spectra(savefile).to_pylist()
    assert row["samples"] == 8
    assert "the store does not answer (no answer in time)" in caplog.text


def test_live_rows_appear_before_the_window_closes(savefile: str) -> None:
    model = nn.Linear(4, 4)
    with SaturationTracker(savefile, "parquet", model, publish_every=0.05, initial_epoch=5) as tracker:
        model(torch.randn(30, 4))
        deadline = time.monotonic() + 60
        while not (live := read_spectra(savefile).to_pylist() if Path(savefile, "spectra").exists() else []):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert [(row["final"], row["step"], row["samples"], row["workers"]) for row in live] == [(False, 5, 30, 0)]
        model(torch.randn(12, 4))
        tracker.add_saturations()
    rows = read_spectra(savefile).to_pylist()
    assert [(row["final"], row["step"], row["samples"], row["workers"]) for row in rows] == [(True, 5, 42, 1)]


def test_close_publishes_what_no_window_was_closed_for(savefile: str) -> None:
    model = nn.Linear(4, 4)
    tracker = SaturationTracker(savefile, "parquet", model, publish_every=0)
    model(torch.randn(8, 4))
    tracker.add_saturations(step=4)
    model(torch.randn(5, 4))
    tracker.close()
    tracker.close()
    assert [(row["step"], row["samples"], row["final"]) for row in read_spectra(savefile).to_pylist()] == [
        (4, 8, True),
        (5, 5, True),
    ]
    for method in ("add_saturations", "flush", "resume"):
        with pytest.raises(StoreError, match=rf"{method}\(\) after close\(\)"):
            getattr(tracker, method)()


def test_an_exception_in_the_loop_still_publishes(savefile: str) -> None:
    model = nn.Linear(4, 4)
    with pytest.raises(ZeroDivisionError), SaturationTracker(savefile, "parquet", model, publish_every=0) as tracker:
        model(torch.randn(8, 4))
        tracker.add_saturations()
        model(torch.randn(8, 4))
        raise ZeroDivisionError
    assert [row["samples"] for row in read_spectra(savefile).to_pylist()] == [8, 8]
    assert not model._forward_hooks


def test_nothing_is_left_behind(savefile: str) -> None:
    threads = set(threading.enumerate())
    model = cnn()
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    with SaturationTracker(savefile, ["parquet", "tensorboard"], model) as tracker:
        model(batches(1)[0])
        tracker.add_saturations()
    assert {name: dict(module.__dict__) for name, module in model.named_modules()} == before
    deadline = time.monotonic() + 60
    while set(threading.enumerate()) - threads and time.monotonic() < deadline:
        time.sleep(0.01)
    assert set(threading.enumerate()) == threads
    recorder = tracker._recorder
    del tracker
    gc.collect()
    assert not recorder.recording


def test_a_script_that_forgets_to_close_loses_nothing(savefile: str) -> None:
    script = f"""
import torch, delve_ray
model = torch.nn.Linear(4, 4)
tracker = delve_ray.SaturationTracker({savefile!r}, "parquet", model)
model(torch.randn(8, 4))
tracker.add_saturations()
model(torch.randn(9, 4))
import sys
assert "ray" not in sys.modules, "tracking without Ray imports no Ray"
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
    assert [row["samples"] for row in read_spectra(savefile).to_pylist()] == [8, 9]


def test_reading_needs_no_torch() -> None:
    script = "import delve_ray, sys; delve_ray.read_spectra; assert not {'torch', 'ray'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_stop_and_resume(savefile: str) -> None:
    model = nn.Linear(4, 4)
    with SaturationTracker(savefile, "parquet", model) as tracker:
        model(torch.randn(8, 4))
        tracker.stop()
        assert not tracker.is_recording()
        model(torch.randn(100, 4))
        tracker.resume()
        assert tracker.is_recording()
        model(torch.randn(3, 4))
        tracker.add_saturations()
    assert [row["samples"] for row in read_spectra(savefile).to_pylist()] == [11]


def test_scalars_travel_with_the_run(savefile: str) -> None:
    from delve_ray import read_scalars

    model = nn.Linear(4, 4)
    with SaturationTracker(savefile, ["parquet"], model, initial_epoch=2) as tracker:
        tracker.add_scalar("accuracy", torch.tensor(0.5))
        tracker.add_saturations()
        tracker.add_scalar("accuracy", 0.75)
        tracker.add_scalar("loss", np.float32(2.0), step=9)
        for bad in ("", 3):
            with pytest.raises(OptionError, match="non-empty string"):
                tracker.add_scalar(bad, 1.0)  # type: ignore[arg-type]
        with pytest.raises(OptionError, match="value='high' of 'accuracy' must be a number"):
            tracker.add_scalar("accuracy", "high")  # type: ignore[arg-type]
    rows = sorted((row["name"], row["step"], row["value"], row["rank"]) for row in read_scalars(savefile).to_pylist())
    assert rows == [("accuracy", 2, 0.5, 0), ("accuracy", 3, 0.75, 0), ("loss", 9, 2.0, 0)]


def test_steps_rise(savefile: str) -> None:
    model = nn.Linear(4, 4)
    with SaturationTracker(savefile, "parquet", model) as tracker:
        model(torch.randn(8, 4))
        tracker.add_saturations(step=5)
        model.eval()
        model(torch.randn(6, 4))
        tracker.add_saturations(step=5)  # train, then eval, under one step
        model(torch.randn(6, 4))
        for step in (5, 4):
            with pytest.raises(OptionError, match=f"step={step} after step 5"):
                tracker.add_saturations(step=step)
        for wrong in (-1, 2.5, True, "6", 1 << 63):
            with pytest.raises(OptionError, match="step="):
                tracker.add_saturations(step=wrong)  # type: ignore[arg-type]
        tracker.add_saturations(step=np.int64(6))  # type: ignore[arg-type]
    rows = [(row["phase"], row["step"], row["samples"]) for row in read_spectra(savefile).to_pylist()]
    assert sorted(rows) == [("eval", 5, 6), ("eval", 6, 6), ("train", 5, 8)]


def test_steps_rise_also_over_windows_without_rows(savefile: str) -> None:
    with SaturationTracker(savefile, "parquet", nn.Linear(4, 4)) as tracker:
        tracker.add_saturations(step=5)
        with pytest.raises(OptionError, match="step=4 after step 5"):
            tracker.add_saturations(step=4)


def test_flush_makes_complete_windows_readable(savefile: str) -> None:
    model = nn.Linear(4, 4)
    with SaturationTracker(savefile, "parquet", model, publish_every=0) as tracker:
        model(torch.randn(8, 4))
        tracker.add_saturations()
        tracker.flush()
        assert [row["samples"] for row in read_spectra(savefile).to_pylist()] == [8]


def test_nosave_writes_nothing(savefile: str) -> None:
    model = nn.Linear(4, 4)
    with SaturationTracker(savefile, "parquet", model, nosave=True) as tracker:
        model(torch.randn(80, 4))
        tracker.add_saturations()
        assert 0 < tracker.metrics(wait=True)["saturation/train/Linear"] <= 1
    assert not Path(savefile).exists()


def test_several_ranks_in_one_process_meet_in_a_given_store(savefile: str) -> None:
    config = StoreConfig(
        run="shared", savefile=savefile, world_size=2, stats=("saturation", "cov"), publish_every=0, late_after=0
    )
    store = CovarianceStore(config)
    models = [nn.Linear(4, 4) for _ in range(2)]
    trackers = [SaturationTracker(modules=m, store=store, rank=rank) for rank, m in enumerate(models)]
    for rank, m in enumerate(models):
        m(torch.randn(10 + rank, 4))
        trackers[rank].add_saturations()
    with pytest.raises(RegistrationError, match="rank 1 of run 'shared' is tracked already"):
        SaturationTracker(modules=models[0], store=store, rank=1)
    with pytest.raises(RegistrationError, match=r"brings sat_threshold=0.5"):
        SaturationTracker(modules=models[0], store=store, rank=1, sat_threshold=0.5)
    metrics = [tracker.metrics(wait=True) for tracker in trackers]
    assert metrics[0] == metrics[1]
    for tracker in trackers:
        tracker.close()
    (row,) = read_spectra(savefile).to_pylist()
    assert (row["samples"], row["workers"], row["world_size"], row["run"]) == (21, 2, 2, "shared")


def test_a_window_that_a_rank_keeps_open_is_named(savefile: str) -> None:
    store = CovarianceStore(StoreConfig(run="r", savefile=savefile, world_size=3, late_after=0))
    tracker = SaturationTracker(modules=nn.Linear(4, 4), store=store, rank=1)
    tracker.add_saturations()
    with pytest.raises(StoreError, match=r"not published after 0.1 s: ranks \[0, 2\] have not closed it"):
        tracker.metrics(wait=True, timeout=0.1)
    tracker.close()


def test_run_json_says_how_the_run_was_made(savefile: str) -> None:
    with SaturationTracker(savefile, ["parquet"], cnn(), sat_threshold=0.95):
        pass
    description = json.loads(Path(savefile, "run.json").read_text())
    assert description["world_size"] == 1
    assert description["options"]["threshold"] == 0.95
    assert description["layers"][0] == {"name": "0", "layer_type": "Conv2d", "features": 6}
    assert {"delve_ray", "torch", "numpy", "python"} <= set(description["versions"])


class Unhookable(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


BAD_OPTIONS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no layer": (
        {"modules": Unhookable()},
        OptionError,
        "no layer that can be tracked; kinds with an adapter: Linear",
    ),
    "no module": ({"modules": 3}, OptionError, "modules=3 is a int"),
    "modules missing": ({"modules": None}, OptionError, "modules=None"),
    "unknown stat": ({"stats": ["lsat", "saturatoin"]}, OptionError, "saturatoin.*saturation"),
    "unknown writer": ({"save_to": "parket"}, OptionError, "parket.*parquet"),
    "no writer": ({"save_to": None}, OptionError, "save_to"),
    "threshold": ({"sat_threshold": 1.5}, OptionError, "sat_threshold=1.5"),
    "conv_method": ({"conv_method": "chanelwise"}, OptionError, "conv_method='chanelwise' is none of 'channelwise'"),
    "timeseries": ({"timeseries_method": "all"}, OptionError, "timeseries_method='all'"),
    "precision": ({"precision": "float16"}, OptionError, "precision='float16' is none of 'float32'"),
    "log_interval": ({"log_interval": 0}, OptionError, "log_interval=0 must be an integer, at least 1"),
    "initial_epoch": ({"initial_epoch": -1}, OptionError, "initial_epoch=-1"),
    "publish_every": ({"publish_every": -3}, OptionError, "publish_every=-3"),
    "rank": ({"rank": 2, "world_size": 2, "run": "r"}, OptionError, "rank=2 is not below world_size=2"),
    "negative rank": ({"rank": -1}, OptionError, "rank=-1"),
    "world": ({"world_size": 0}, OptionError, "world_size=0"),
    "world without Ray": ({"world_size": 2, "run": "r"}, OptionError, "world_size=2 without Ray"),
    "world without run": ({"world_size": 2}, OptionError, "run=None with world_size=2"),
    "store": ({"store": 3}, OptionError, "store=3"),
    "device": ({"device": "meta:x"}, OptionError, "device='meta:x'"),
    "max_features": ({"max_features": 3, "sketch_size": 0}, OptionError, "max_features=3 leaves no layer"),
    "max_features is no number": ({"max_features": 0}, OptionError, "max_features=0"),
    "sketch_size": ({"sketch_size": -8}, OptionError, "sketch_size=-8"),
    "sketch_size is no number": ({"sketch_size": "many"}, OptionError, "sketch_size='many'"),
    "max_memory": ({"max_memory": 1000}, OptionError, "max_memory=1000 bytes"),
    "ignore": ({"ignore_layer_names": ["fc"]}, OptionError, "ignore_layer_names has .*fc"),
    "ignore all": ({"ignore_layer_names": ["0", "3", "5"]}, OptionError, "leave no layer to track"),
    "filter": ({"layer_filter": lambda layers: None}, OptionError, "layer_filter returned a NoneType"),
    "savefile": ({"savefile": 7}, OptionError, "savefile=7"),
    "flag": ({"nosave": "False"}, OptionError, "nosave='False' must be True or False"),
    "include_conv": ({"include_conv": None}, OptionError, "include_conv=None"),
    "huge": ({"initial_epoch": 1 << 70}, OptionError, "initial_epoch=1180591620717411303424"),
    "seconds": ({"publish_every": float("nan")}, OptionError, "publish_every=nan"),
    "run": ({"run": ""}, OptionError, "run='' must be a non-empty string"),
    "collapsed URI": ({"savefile": Path("file:///x")}, OptionError, "looks like a URI that lost a slash"),
    "same names": (
        {"modules": {"a": nn.Sequential(nn.Linear(2, 2)), "a.0": nn.Linear(2, 2)}},
        OptionError,
        "two layers called 'a.0'",
    ),
    "average_sat": ({"average_sat": False}, NotImplementedError, "average_sat=False"),
    "max_overhead": ({"max_overhead": 2}, OptionError, "max_overhead=2 .* 0.02 for two percent"),
    "verbose": ({"verbose": 2}, OptionError, "verbose=2"),
    "reset": ({"reset_covariance": False}, NotImplementedError, "reset_covariance=False"),
    "max_samples": ({"max_samples": 0}, OptionError, "max_samples=0 must be an integer, at least 1"),
    "fraction": ({"sample_fraction": 10}, OptionError, "sample_fraction=10 .*for 10 percent write 0.1"),
    "seed": ({"seed": -1}, OptionError, "seed=-1"),
    "shards": ({"num_shards": "many"}, OptionError, "num_shards='many' must be an integer, at least 1, or 'auto'"),
    "combine": ({"combine": "yes"}, OptionError, "combine='yes' must be True or False"),
    "no shards": ({"num_shards": 0}, OptionError, "num_shards=0"),
    "mask": ({"mask": torch.ones(2, 2)}, OptionError, "mask is a Tensor, not a function"),
    "downsampling": ({"interpolation_downsampling": 0}, OptionError, "interpolation_downsampling=0"),
    "interpolation": ({"interpolation_strategy": "near"}, OptionError, "interpolation_strategy='near' is none of"),
    "layers": ({"layers": ["conv*"]}, OptionError, r"layers has 'conv\*', which fits no module"),
    "thresholds": ({"sat_threshold": [0.9, 1.1]}, OptionError, "sat_threshold"),
    "writer": ({"save_to": ["parquet", 3]}, OptionError, "save_to=3 is no writer, it lacks name, open, write"),
    "embed_rows": ({"embed_rows": 0}, OptionError, "embed_rows=0"),
    "tf32": ({"precision": "tf32", "device": "cpu"}, OptionError, "precision='tf32' is for products on a GPU"),
    "writer_args": ({"writer_args": {"a": 1}}, OptionError, "writer_args has 'a'; give options by the writer's name"),
    "trial": ({"trial": "x"}, OptionError, "trial='x' is no trial"),
    "resume": ({"resume": 1}, OptionError, "resume=1 must be True, False, or a name"),
    "spill_dir": ({"spill_dir": "s3://bucket/x"}, OptionError, "spill_dir='s3://bucket/x' must be a local folder"),
    "name": ({"name": ""}, OptionError, "name='' must be a non-empty string"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_a_bad_option_is_refused_at_construction(case: str, savefile: str) -> None:
    options, error, message = BAD_OPTIONS[case]
    model = cnn()
    threads = threading.active_count()
    arguments = {"savefile": savefile, "save_to": "parquet", "modules": model, **options}
    with pytest.raises(error, match=message):
        SaturationTracker(**arguments)
    assert all(not module._forward_hooks for module in model.modules()), "no hook is left"
    assert threading.active_count() == threads, "no thread is left"
    assert not Path(savefile).exists(), "no file is left"


def test_an_unwritable_savefile_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OptionError, match="savefile"):
        SaturationTracker(tmp_path / "file" / "run", "parquet", cnn())


def test_wide_layers_are_left_out_by_name(savefile: str, caplog: pytest.LogCaptureFixture) -> None:
    options = {"max_features": 10, "sketch_size": 0}
    with caplog.at_level(logging.INFO), SaturationTracker(savefile, "parquet", cnn(), **options) as tracker:
        assert tracker.layers == ("0", "5")
    assert "layer 3 has 20 features and is left out; raise max_features=10" in caplog.text
    assert "recording 2 layers takes up to" in caplog.text


def test_float64_products(savefile: str) -> None:
    model = nn.Linear(30, 20).double()
    x = torch.randn(500, 30, dtype=torch.float64)
    with SaturationTracker(savefile, "parquet", model, stats="cov", precision="float64") as tracker:
        output = model(x).detach().numpy()
        tracker.add_saturations()
    (row,) = read_covariances(savefile).to_pylist()
    reference = np.cov(output.T, bias=True)
    assert np.abs(unpack_triangle(row["covariance"], 20) - reference).max() < 1e-14 * np.linalg.eigvalsh(reference)[-1]


def test_a_worker_that_fails_leaves_its_window_open_for_the_next_attempt(savefile: str) -> None:
    """With a store that outlives the worker, an exception detaches: rows so far arrive, the window stays open."""
    model = nn.Linear(4, 4)
    config = StoreConfig(
        run="r", savefile=savefile, world_size=1, save_to=("parquet",), publish_every=0, silent_after=0
    )
    store = CovarianceStore(config)
    with pytest.raises(ZeroDivisionError), SaturationTracker(modules=model, store=store):
        model(torch.randn(8, 4))
        raise ZeroDivisionError
    status = store.status()
    assert (status["open_windows"], status["published"], status["finished"]) == ([0], 0, False)
    assert status["ranks"][0]["deltas"] == 1
    assert not model._forward_hooks


def test_numpy_integers_and_the_home_directory_are_fine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    one = np.int64(1)
    with SaturationTracker("~/run", "parquet", cnn(), log_interval=one, world_size=one, rank=one - 1) as tracker:  # type: ignore[arg-type]
        tracker.add_saturations()
    assert (tmp_path / "run" / "run.json").exists()


def test_a_failure_after_the_hooks_are_there_takes_everything_back(
    savefile: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any) -> Any:
        raise KeyboardInterrupt

    model = cnn()
    monkeypatch.setattr(CovarianceStore, "register", interrupted)
    with pytest.raises(KeyboardInterrupt):
        SaturationTracker(savefile, "parquet", model)
    assert all(not module._forward_hooks for module in model.modules())
    monkeypatch.undo()
    SaturationTracker(savefile, "parquet", model).close()


def test_an_interrupted_forward_is_left_out_and_named(
    savefile: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A product without its count would be published as variance that was never there."""
    model = nn.Sequential(nn.Linear(4, 20), nn.Linear(20, 3))
    with SaturationTracker(savefile, "parquet", model, publish_every=0) as tracker:
        model(torch.randn(8, 4))
        slot = Accumulator._slot

        def interrupted(self: Accumulator) -> int:
            if self.features == 3:
                raise KeyboardInterrupt
            return slot(self)

        monkeypatch.setattr(Accumulator, "_slot", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model(torch.randn(5000, 4))
        monkeypatch.undo()
        tracker.add_saturations()
        model(torch.randn(9, 4))
        tracker.add_saturations()
    rows = [(row["step"], row["layer"], row["samples"]) for row in read_spectra(savefile).to_pylist()]
    assert rows == [(0, "0", 5008), (1, "0", 9), (1, "1", 9)]
    assert "layer 1: an interrupted forward spoilt its sums" in caplog.text


def test_closing_from_a_signal_handler_does_not_hang(savefile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(4, 20)
    tracker = SaturationTracker(savefile, "parquet", model, publish_every=0)
    slot = Accumulator._slot

    def signalled(self: Accumulator) -> int:
        monkeypatch.undo()
        tracker.close(timeout=20)  # as a handler does, in the middle of a hook
        return slot(self)

    monkeypatch.setattr(Accumulator, "_slot", signalled)
    model(torch.randn(5000, 4))
    assert not model._forward_hooks
    assert read_spectra(savefile).num_rows == 0, "the only forward had not ended"


def test_closing_from_a_signal_handler_while_the_packer_waits_for_the_hook(
    savefile: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = nn.Linear(4, 20)
    tracker = SaturationTracker(savefile, "parquet", model, publish_every=0.01)
    monkeypatch.setattr("delve_ray.shipping.PACK_S", 0.1)  # the packer ends after the hook, which waits for this
    waiting = threading.Event()
    slot = Accumulator._slot

    class Watched:
        """The recorder's lock, which tells when the packer has to wait for a hook."""

        def __init__(self, lock: Any) -> None:
            self.lock = lock

        def acquire(self, timeout: float = -1) -> bool:
            if self.lock.acquire(blocking=False):
                return True
            waiting.set()  # a hook has it
            return bool(self.lock.acquire(timeout=timeout))

        def release(self) -> None:
            self.lock.release()

        def __enter__(self) -> None:
            self.acquire()

        def __exit__(self, *_: Any) -> None:
            self.release()

    def signalled(self: Accumulator) -> int:
        monkeypatch.setattr(Accumulator, "_slot", slot)
        assert waiting.wait(60), "the packer wants what the hook is filling"
        tracker.close(timeout=20)
        return slot(self)

    tracker._recorder.lock = Watched(tracker._recorder.lock)  # type: ignore[assignment]
    monkeypatch.setattr(Accumulator, "_slot", signalled)
    model(torch.randn(5000, 4))  # hangs where the two locks are taken in either order
    assert not model._forward_hooks
    for thread in tracker._shipper._threads:
        thread.join(60)
        assert not thread.is_alive()
    assert not [record.message for record in caplog.records if record.levelno >= logging.ERROR]


def test_a_long_last_publication_is_no_surprise(
    savefile: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The sender goes on saying that it lives while the last rank waits for its files."""
    monkeypatch.setattr("delve_ray.shipping.HEARTBEAT_S", 0.01)
    wait = CovarianceStore.wait_finished

    def slow(self: CovarianceStore, timeout: float) -> bool:
        member = self.attempts[-1].members[0]
        heard = member.heard
        deadline = time.monotonic() + 60
        while member.heard == heard and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(0.05)
        return wait(self, timeout)

    monkeypatch.setattr(CovarianceStore, "wait_finished", slow)
    model = nn.Linear(4, 3)
    with SaturationTracker(savefile, "parquet", model) as tracker:
        model(torch.randn(8, 4))
    assert not [record.message for record in caplog.records if record.levelno >= logging.ERROR]
    assert tracker._shipper.lost is None


def test_an_interrupted_close_leaves_nothing_running(savefile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = set(threading.enumerate())
    model = nn.Linear(4, 4)
    tracker = SaturationTracker(savefile, "parquet", model)
    with pytest.raises(OptionError, match="timeout='5'"):
        tracker.close(timeout="5")  # type: ignore[arg-type]
    assert model._forward_hooks, "a bad timeout closes nothing"

    def interrupted(*args: Any, **options: Any) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(Shipper, "flush", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tracker.close()
    assert not model._forward_hooks
    assert "delve_ray-sender" not in {thread.name for thread in set(threading.enumerate()) - threads}


def test_one_odd_forward_costs_one_forward(savefile: str, caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Linear(4, 3)
    with SaturationTracker(savefile, "parquet", model) as tracker:
        model(torch.randn(8, 4))
        torch.func.vmap(model)(torch.randn(5, 4))
        torch.func.jvp(model, (torch.randn(5, 4),), (torch.randn(5, 4),))
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            model(mode.from_tensor(torch.randn(5, 4)))
        torch.func.functional_call(
            model, {n: p.to("meta") for n, p in model.named_parameters()}, torch.empty(2, 4, device="meta")
        )
        (said,) = caplog.records  # fake and meta tensors are nobody's training
        assert "torch.func transforms" in said.message
        for _ in range(2):
            tracker._recorder.record(0, model, torch.tensor(1.0))
        model(torch.randn(0, 4))
        model(torch.nested.nested_tensor([torch.randn(3, 4), torch.randn(5, 4)]))
        tracker.add_saturations()
        assert [record.levelname for record in caplog.records if "a forward is left out" in record.message] == [
            "WARNING"
        ]
    assert [row["samples"] for row in read_spectra(savefile).to_pylist()] == [16]


def test_no_row_for_a_layer_without_observations(savefile: str) -> None:
    model = nn.Linear(4, 3)
    with SaturationTracker(savefile, "parquet", model) as tracker:
        model(torch.randn(0, 4))
        tracker.add_saturations()
        assert tracker.metrics(wait=True) == {}
    assert read_spectra(savefile).num_rows == 0


def test_a_rank_that_closes_without_a_step_takes_the_others(savefile: str) -> None:
    for order in ((0, 1), (1, 0)):
        path = f"{savefile}-{order[0]}"
        store = CovarianceStore(StoreConfig(run="r", savefile=path, world_size=2, publish_every=0, late_after=0))
        models = [nn.Linear(4, 4) for _ in range(2)]
        trackers = [SaturationTracker(modules=m, store=store, rank=rank) for rank, m in enumerate(models)]
        for m in models:
            m(torch.randn(8, 4))
        for rank in order:
            if rank == 0:
                trackers[0].add_saturations(step=7)
                trackers[0].flush()
            else:
                trackers[1].close()
        trackers[0].close()
        assert store.wait_finished(60)
        assert [(row["step"], row["samples"], row["workers"]) for row in read_spectra(path).to_pylist()] == [(7, 16, 2)]


def test_a_model_that_was_compiled_before_is_compiled_anew(savefile: str) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    compiled = torch.compile(model, backend="eager")
    compiled(torch.randn(8, 4))
    with SaturationTracker(savefile, "parquet", model) as tracker:
        compiled(torch.randn(9, 4))
        tracker.add_saturations()
    assert [row["samples"] for row in read_spectra(savefile).to_pylist()] == [9]


def test_a_run_that_was_ended_by_silence_refuses_more_rows(savefile: str, caplog: pytest.LogCaptureFixture) -> None:
    store = CovarianceStore(StoreConfig(run="r", savefile=savefile, world_size=1, silent_after=1000.0, publish_every=0))
    model = nn.Linear(4, 4)
    tracker = SaturationTracker(modules=model, store=store)
    model(torch.randn(8, 4))
    tracker.add_saturations()
    tracker.flush()
    store.config = replace(store.config, silent_after=0.3)
    assert store.wait_finished(60)  # signs of life come every few seconds, later than this run allows
    model(torch.randn(9, 4))
    tracker.add_saturations()
    tracker.close(timeout=10)
    assert [row["samples"] for row in read_spectra(savefile).to_pylist()] == [8]
    assert "ends without having delivered rows of steps [1]" in caplog.text


def test_recording_does_not_resume_for_a_lost_store(savefile: str) -> None:
    tracker = SaturationTracker(savefile, "parquet", nn.Linear(4, 4))
    tracker._shipper._lose("gone")
    with pytest.raises(StoreError, match="nothing is recorded: gone"):
        tracker.resume()
    tracker.close(timeout=5)


def test_multihead_attention_shows_no_layer_that_never_runs(savefile: str) -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    with SaturationTracker(savefile, "parquet", model) as tracker:
        assert tracker.layers == ("self_attn", "linear1", "linear2")


def test_a_transformer_encoder_in_eval_is_unchanged_and_padding_does_not_count(savefile: str) -> None:
    """Its fast path asks whether there are hooks; the outputs are the same to the bit, padded ones included."""
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    x, padding = torch.randn(4, 7, 16), torch.zeros(4, 7, dtype=torch.bool)
    padding[1, 4:] = True
    with torch.no_grad():
        plain = model(x), model(x, src_key_padding_mask=padding)
        with SaturationTracker(savefile, "parquet", model) as tracker:
            tracked = model(x), model(x, src_key_padding_mask=padding)
            tracker.add_saturations()
    assert all(map(torch.equal, plain, tracked))
    assert {row["samples"] for row in read_spectra(savefile).to_pylist()} == {28 + 25}


def test_non_finite_rows_are_said_once_per_layer_and_window(savefile: str, caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    x = torch.randn(10, 4)
    x[3] = float("nan")
    with SaturationTracker(savefile, "parquet", model) as tracker:
        for step in range(2):
            for _ in range(3):
                model(x)
                tracker.flush()
            tracker.add_saturations(step=step)
    said = [record.message for record in caplog.records if "not finite" in record.message]
    assert sorted(said) == sorted(
        f"layer {layer}, train, step {step}: 1 of 10 rows are not finite and were left out"
        for layer in (0, 1)
        for step in (0, 1)
    )
    rows = read_spectra(savefile).to_pylist()
    assert [(row["samples"], row["nonfinite_rows"]) for row in rows] == [(27, 3)] * 4


def test_every_option_of_rows_reaches_the_files(savefile: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(1), nn.Linear(4 * 64, 3))
    x = torch.randn(50, 1, 10, 10)
    options: dict[str, Any] = {
        "conv_method": "max",
        "interpolation_strategy": "area",
        "interpolation_downsampling": 4,
        "max_samples": 30,
        "layers": ["*", "!1"],
        "sat_threshold": [0.9, 0.99],
        "stats": ["lsat", "correlation", "rankme", "cov"],
    }
    with SaturationTracker(savefile, "parquet", model, **options) as tracker:
        model(x)
        tracker.add_saturations()
        metrics = tracker.metrics(wait=True)
    conv, linear = read_spectra(savefile).to_pylist()
    assert [(row["layer"], row["samples"], row["features"]) for row in (conv, linear)] == [("0", 30, 4), ("2", 30, 3)]
    rows = torch.nn.functional.interpolate(model[0](x), 4, mode="area").amax((2, 3))[:30].detach().double()
    centred = rows - rows.mean(0)
    expected = torch.linalg.eigvalsh(centred.T @ centred / 30).flip(0)
    np.testing.assert_allclose(conv["eigenvalues"], expected, rtol=1e-5)
    correlation = torch.linalg.eigvalsh(torch.corrcoef(rows.T)).flip(0)
    k = 1 + int((correlation.cumsum(0) / 4 < 0.9).sum())
    assert conv["correlation_intrinsic_dimensionality"] == k
    assert metrics["correlation_saturation/train/0"] == k / 4
    singular = torch.linalg.svdvals(rows)
    shares = singular / singular.sum() + 1e-7
    assert conv["rankme"] == pytest.approx(float(torch.exp(-(shares * shares.log()).sum())), rel=1e-4)
    assert conv["thresholds"] == [0.9, 0.99]
    assert len(conv["intrinsic_dimensionalities"]) == 2
    assert (linear["samples_per_feature"], linear["undersampled"]) == (10.0, False)


@pytest.mark.filterwarnings("ignore")
def test_a_statically_quantized_model(savefile: str) -> None:
    """Its convolution and its linear layer put out quantized tensors; what counts is their values."""
    torch.manual_seed(0)
    quantization = torch.ao.quantization
    model = nn.Sequential(
        quantization.QuantStub(),
        nn.Conv2d(1, 4, 3),
        nn.ReLU(),
        nn.Flatten(1),
        nn.Linear(4 * 36, 5),
        quantization.DeQuantStub(),
    ).eval()
    model.qconfig = quantization.get_default_qconfig(torch.backends.quantized.engine)
    x = torch.randn(40, 1, 8, 8)
    prepared = quantization.prepare(model)
    prepared(x)
    quantized = quantization.convert(prepared)
    with torch.no_grad():
        expected = quantized(x)
        with SaturationTracker(savefile, "parquet", quantized, stats=["cov"]) as tracker:
            assert tracker.layers == ("1", "4")
            assert torch.equal(quantized(x), expected)
    rows = {row["layer"]: row for row in read_spectra(savefile).to_pylist()}
    assert (rows["1"]["samples"], rows["1"]["features"], rows["1"]["layer_type"]) == (40 * 36, 4, "Conv2d")
    centred = (expected - expected.mean(0)).double()
    np.testing.assert_allclose(
        rows["4"]["eigenvalues"], torch.linalg.eigvalsh(centred.T @ centred / 40).flip(0), rtol=1e-5, atol=1e-7
    )


def test_ranks_that_make_rows_differently_are_refused(savefile: str) -> None:
    config = StoreConfig("r", savefile, world_size=2, stats=("saturation",), publish_every=0.0)
    store = CovarianceStore(config)
    first = SaturationTracker(modules=cnn(), store=store, rank=0, conv_method="mean", publish_every=0.0)
    with pytest.raises(
        RegistrationError, match=r"rank 1 records with conv_method='max', sample_fraction=0.5, but run 'r' with "
    ):
        SaturationTracker(modules=cnn(), store=store, rank=1, conv_method="max", sample_fraction=0.5, publish_every=0.0)
    SaturationTracker(modules=cnn(), store=store, rank=1, conv_method="mean", publish_every=0.0).close()
    first.close()
    described = json.loads((Path(savefile) / "run.json").read_text())
    assert described["options"]["recording"] == {
        "conv_method": "mean",
        "timeseries_method": "timestepwise",
        "interpolation_strategy": None,
        "interpolation_downsampling": 32,
        "log_interval": 1,
        "max_samples": None,
        "sample_fraction": 1.0,
        "seed": 0,
        "max_overhead": None,
        "precision": "float32",
    }


def test_verbose_prints_a_line_per_window(savefile: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Linear(4, 3)
    for save_to, nosave in (("parquet", False), ("console", False), (None, True)):
        path = f"{savefile}-{save_to}"
        with SaturationTracker(path, save_to, model, verbose=True, nosave=nosave) as tracker:
            model(torch.randn(20, 4))
            tracker.add_saturations(step=7)
        lines = capsys.readouterr().out.splitlines()
        assert [line.split(":")[0] for line in lines] == [f"{Path(path).name}  step 7  train"], lines
