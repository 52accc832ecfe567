"""Plain Ray actors as workers, a store started by the driver, and what is refused across processes."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import delve_ray
from delve_ray.moments import unpack_triangle

pytestmark = [pytest.mark.slow, pytest.mark.ray]


class Worker:
    """An actor that makes a tracker and feeds a Linear with known rows."""

    def __init__(self, out_features: int = 6) -> None:
        from torch import nn

        self.model = nn.Linear(4, out_features)

    def track(self, *args: Any, **options: Any) -> tuple[str, ...]:
        self.tracker = delve_ray.SaturationTracker(*args, modules=self.model, **options)
        return self.tracker.layers

    def step(self, count: int, seed: int, step: int) -> np.ndarray:
        import torch

        x = torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))
        output = self.model(x) if count else torch.empty(0, self.model.out_features)
        self.tracker.add_saturations(step)
        return output.detach().double().numpy()

    def metrics(self, wait: bool = True, timeout: float = 30.0) -> dict[str, float]:
        return self.tracker.metrics(wait, timeout)

    def flush(self) -> None:
        self.tracker.flush()

    def close(self) -> None:
        self.tracker.close()


@pytest.fixture
def workers(ray_session: None) -> Any:
    import ray

    made: list[Any] = []

    def make(count: int, *args: Any) -> list[Any]:
        made.extend(ray.remote(Worker).options(num_cpus=0.5).remote(*args) for _ in range(count))
        return made[-count:]

    yield make
    for worker in made:
        ray.kill(worker)


def end_store(run: str) -> None:
    import ray

    with contextlib.suppress(delve_ray.StoreError):
        ray.kill(delve_ray.get_store(run))


def test_three_actors_meet_in_one_store(workers: Any, savefile: str) -> None:
    import ray

    team = workers(3)
    layers = [
        w.track.remote(savefile, "parquet", stats="cov", run="actors", rank=i, world_size=3) for i, w in enumerate(team)
    ]
    assert ray.get(layers) == [("Linear",)] * 3
    rows = np.concatenate(ray.get([w.step.remote(n, n, 0) for w, n in zip(team, (50, 7, 0), strict=True)]))
    metrics = ray.get([w.metrics.remote() for w in team])
    assert metrics[0] == metrics[1] == metrics[2]
    store = delve_ray.get_store("actors")
    covariance = ray.get(store.covariance.remote("Linear", "train"))
    reference = np.cov(rows.T, bias=True)
    assert np.abs(covariance - reference).max() < 1e-6 * np.linalg.eigvalsh(reference)[-1]
    eigenvalues = ray.get(store.spectrum.remote("Linear", "train"))
    assert np.allclose(eigenvalues, np.linalg.eigvalsh(reference)[::-1], atol=1e-6 * eigenvalues[0])
    with pytest.raises(KeyError, match="no layer 'fc'"):
        ray.get(store.covariance.remote("fc", "train"))
    ray.get([w.close.remote() for w in team])
    (row,) = delve_ray.read_covariances(savefile).to_pylist()
    assert np.array_equal(unpack_triangle(row["covariance"], 6), covariance)
    assert (row["samples"], row["workers"]) == (57, 3)


def test_a_store_started_by_the_driver_tells_the_workers_how(workers: Any, savefile: str) -> None:
    import ray

    store = delve_ray.start_store(savefile, run="driven", world_size=2, save_to="parquet", sat_threshold=0.5)
    again = delve_ray.start_store(savefile, run="driven", world_size=2, save_to="parquet", sat_threshold=0.5)
    assert again == store
    with pytest.raises(delve_ray.OptionError, match="has a store already"):
        delve_ray.start_store(savefile, run="driven", world_size=3, save_to="parquet")
    team = workers(2)
    ray.get([w.track.remote(store=store, rank=rank) for rank, w in enumerate(team)])
    ray.get([w.step.remote(100, rank, 0) for rank, w in enumerate(team)])
    ray.get([w.metrics.remote() for w in team])
    ray.get([w.close.remote() for w in team])
    (row,) = delve_ray.read_spectra(savefile).to_pylist()
    assert (row["threshold"], row["samples"], row["run"]) == (0.5, 200, "driven")


def test_a_wide_layer_is_sketched_by_all_workers_and_shards(workers: Any, savefile: str) -> None:
    import ray

    options: dict[str, Any] = {"max_features": 64, "sketch_size": 16}
    store = delve_ray.start_store(savefile, run="wide", world_size=2, save_to="parquet", num_shards=2, **options)
    team = workers(2, 100)
    ray.get([w.track.remote(store=store, rank=rank) for rank, w in enumerate(team)])
    rows = np.concatenate(ray.get([w.step.remote(100, 7, 0) for w in team]))
    ray.get([w.metrics.remote() for w in team])
    with pytest.raises(delve_ray.OptionError, match="more than max_features=64, and is sketched"):
        ray.get(store.covariance.remote("Linear", "train"))
    head = ray.get(store.spectrum.remote("Linear", "train"))
    ray.get([w.close.remote() for w in team])
    (row,) = delve_ray.read_spectra(savefile).to_pylist()
    exact = np.linalg.eigvalsh(np.cov(rows.T, bias=True))[::-1]
    assert (row["sketched"], row["samples"], row["eigenvalues"]) == (True, 200, head.tolist())
    # Two workers, two models of four inputs, and the distance of their biases: nine directions.
    np.testing.assert_allclose(head, exact[:9], rtol=1e-3)
    assert row["trace"] == pytest.approx(exact.sum(), rel=1e-6)


def test_every_layer_is_asked_of_the_shard_that_has_it(ray_session: None, savefile: str) -> None:
    """As a sketch the widest layer is the cheapest, so that the shards are others than those of whole layers."""
    import ray
    import torch
    from torch import nn

    model = nn.Sequential(nn.Linear(4, 500), nn.Linear(500, 100), nn.Linear(100, 100))
    options: dict[str, Any] = {"max_features": 200, "sketch_size": 8, "num_shards": 2, "run": "asked"}
    with delve_ray.SaturationTracker(savefile, "parquet", model, **options) as tracker:
        model(torch.randn(50, 4))
        tracker.add_saturations()
        tracker.metrics(wait=True)
        found = {layer: ray.get(tracker.store.spectrum.remote(layer, "train")).tolist() for layer in "012"}
    rows = delve_ray.read_spectra(savefile).to_pylist()
    assert [row["sketched"] for row in rows] == [True, False, False]
    assert found == {row["layer"]: row["eigenvalues"] for row in rows}


def test_two_runs_of_one_name_with_different_layers(workers: Any, savefile: str) -> None:
    import ray

    (first,), (second,) = workers(1, 6), workers(1, 7)
    ray.get(first.track.remote(savefile, "parquet", run="twice", rank=0, world_size=2))
    with pytest.raises(delve_ray.RegistrationError, match=r"different Linear \(Linear of 6, not Linear of 7\)"):
        ray.get(second.track.remote(savefile, "parquet", run="twice", rank=1, world_size=2))
    with pytest.raises(delve_ray.RegistrationError, match="rank 0 of run 'twice' is tracked already"):
        ray.get(workers(1, 6)[0].track.remote(savefile, "parquet", run="twice", rank=0, world_size=2))
    end_store("twice")


def test_an_unwritable_savefile_is_refused_and_leaves_no_store(workers: Any, tmp_path: Path) -> None:
    import ray

    (tmp_path / "file").write_text("in the way")
    (worker,) = workers(1)
    with pytest.raises(delve_ray.OptionError, match="savefile"):
        ray.get(worker.track.remote(str(tmp_path / "file" / "run"), "parquet", run="nowhere"))
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            delve_ray.get_store("nowhere")
        except delve_ray.StoreError:
            return
        time.sleep(0.1)
    pytest.fail("the store of a run that could not begin is still there")


def test_a_store_that_dies_is_named_and_the_training_goes_on(workers: Any, savefile: str) -> None:
    import ray

    (worker,) = workers(1)
    ray.get(worker.track.remote(savefile, "parquet", run="dies", publish_every=0))
    ray.get(worker.step.remote(10, 0, 0))
    ray.get(worker.flush.remote())
    ray.kill(delve_ray.get_store("dies"))
    for step in (1, 2):
        ray.get(worker.step.remote(10, 0, step))
    with pytest.raises(delve_ray.StoreError, match="process has ended"):
        ray.get(worker.metrics.remote())
    ray.get(worker.close.remote(), timeout=60)
    assert [row["step"] for row in delve_ray.read_spectra(savefile).to_pylist()] == [0]


def test_a_single_tracker_needs_no_names(ray_session: None, savefile: str) -> None:
    import torch

    model = torch.nn.Linear(4, 4)
    with delve_ray.SaturationTracker(savefile, "parquet", model) as tracker:
        model(torch.randn(9, 4))
        tracker.add_saturations()
        assert tracker.metrics(wait=True)["saturation/train/Linear"] > 0
    (row,) = delve_ray.read_spectra(savefile).to_pylist()
    assert row["samples"] == 9
    assert row["run"].startswith("run-")


def test_a_refused_worker_does_not_end_the_drivers_store(workers: Any, savefile: str) -> None:
    import ray

    store = delve_ray.start_store(savefile, run="kept", world_size=1, save_to="parquet", stats="trace")
    refused, welcome = workers(2)
    with pytest.raises(delve_ray.RegistrationError, match="brings stats="):
        ray.get(refused.track.remote(savefile, "parquet", run="kept"))
    ray.get(welcome.track.remote(store=store))
    ray.get(welcome.step.remote(10, 0, 0))
    ray.get(welcome.close.remote())
    assert [row["samples"] for row in delve_ray.read_spectra(savefile).to_pylist()] == [10]


SCRIPT = """
import ray, torch, delve_ray
ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
model = torch.nn.Linear(4, 6)
def train():
    with delve_ray.SaturationTracker({savefile!r}, "parquet", model, publish_every=0) as tracker:
        model(torch.randn(8, 4))
        tracker.add_saturations()
        model(torch.randn(9, 4))
        {end}
"""


@pytest.mark.parametrize("num_shards", [1, 2])
def test_a_run_that_its_nodes_have_no_memory_for_is_refused(ray_session: None, savefile: str, num_shards: int) -> None:
    import ray

    from delve_ray.errors import RegistrationError
    from delve_ray.store.actor import RemoteStore
    from delve_ray.store.protocol import LayerInfo, Source

    memory = sum(node["Resources"]["memory"] for node in ray.nodes() if node["Alive"])
    layers = [LayerInfo(f"layer{index}", "Linear", 8192) for index in range(int(num_shards * memory / 4 / 8192**2) + 9)]
    run = f"too large {num_shards}"
    handle = delve_ray.start_store(savefile, run=run, world_size=1, save_to="parquet", num_shards=num_shards)
    store = RemoteStore(handle)
    source = Source(run, "", 0, "s", "host", 1)
    with pytest.raises(RegistrationError, match=r"would take at least .* GiB for moments, and the node has .* GiB"):
        store.register(source, store.settings(), layers)
    assert not Path(savefile, "run.json").exists(), "a run that was refused has begun nothing"
    assert store.register(source, store.settings(), layers[:3]).attempt == 0
    for part in [] if num_shards == 1 else [delve_ray.store.remote.find(run, shard=shard) for shard in range(2)]:
        ray.kill(part, no_restart=True)
    ray.kill(handle, no_restart=True)


def test_an_exception_in_a_driver_loses_nothing(savefile: str) -> None:
    script = SCRIPT.format(savefile=savefile, end="raise RuntimeError('in the loop')") + "train()\n"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert "RuntimeError: in the loop" in done.stderr
    assert [row["samples"] for row in delve_ray.read_spectra(savefile).to_pylist()] == [8, 9]


def test_shutting_ray_down_first_is_said_in_words(savefile: str) -> None:
    end = "tracker.flush(); ray.shutdown()"
    script = SCRIPT.format(savefile=savefile, end=end) + "train()\nassert not ray.is_initialized()\n"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Ray was shut down before the tracker was closed" in done.stderr
    rows = [(row["samples"], row["final"]) for row in delve_ray.read_spectra(savefile).to_pylist()]
    assert rows == [(8, True), (9, False)]


def test_a_run_whose_store_has_ended_by_itself_is_resumed(workers: Any, savefile: str) -> None:
    """The workers were killed, the store has published what it had and still answers; a new one takes over."""
    import ray

    delve_ray.start_store(savefile, run="silent", world_size=2, save_to="parquet", silent_after=5.0, publish_every=0)
    team = workers(2)
    ray.get([w.track.remote(savefile, "parquet", run="silent", rank=i, world_size=2) for i, w in enumerate(team)])
    ray.get(team[0].step.remote(10, 1, 0))
    store = delve_ray.get_store("silent")
    deadline = time.monotonic() + 60
    while not ray.get(store.status.remote())["ranks"][0]["deltas"]:  # what was not sent would be lost
        assert time.monotonic() < deadline
        time.sleep(0.02)
    for worker in team:
        ray.kill(worker)
    while not ray.get(store.status.remote())["finished"]:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    end = json.loads(Path(savefile, "run.json").read_text())["end"]
    assert end["why"].startswith("none of its workers was heard of for ")
    with pytest.raises(delve_ray.RegistrationError, match=r"has ended \(none of its workers"):
        ray.get(workers(1)[0].track.remote(savefile, "parquet", run="silent", rank=0, world_size=2))
    team = workers(2)
    options = {"run": "silent", "world_size": 2, "resume": "second"}
    ray.get([w.track.remote(savefile, "parquet", rank=i, **options) for i, w in enumerate(team)])
    ray.get([w.step.remote(20, i, 1) for i, w in enumerate(team)])
    ray.get([w.close.remote() for w in team])
    rows = delve_ray.read_spectra(savefile).to_pylist()
    assert [(r["attempt"], r["step"], r["samples"], r["workers"]) for r in rows] == [(0, 0, 10, 1), (1, 1, 40, 2)]
    assert [a["attempt"] for a in json.loads(Path(savefile, "run.json").read_text())["attempts"]] == [0, 1]


def test_an_object_store_that_is_full_is_asked_again_and_nothing_is_lost(
    ray_session: None, savefile: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray itself would spill to disk for a long time before it says so."""
    import ray
    import torch
    from ray.exceptions import ObjectStoreFullError
    from torch import nn

    put, refusals = ray.put, []

    def full(value: Any) -> Any:
        if isinstance(value, np.ndarray) and len(refusals) < 3:
            refusals.append(value.nbytes)
            raise ObjectStoreFullError("no room")
        return put(value)

    monkeypatch.setattr(ray, "put", full)
    model = nn.Linear(4, 200)
    with delve_ray.SaturationTracker(savefile, "parquet", model, run="full", stats="cov") as tracker:
        rows = model(torch.randn(300, 4)).detach().double().numpy()
        tracker.add_saturations(0)
        tracker.metrics(wait=True)
    assert refusals == [8 * (200 + 200 * 201 // 2)] * 3
    (row,) = delve_ray.read_covariances(savefile).to_pylist()
    assert (row["samples"], row["workers"]) == (300, 1)
    reference = np.cov(rows.T, bias=True)
    error = np.abs(unpack_triangle(row["covariance"], 200) - reference).max()
    assert error < 1e-6 * np.linalg.eigvalsh(reference)[-1]


def test_each_delta_is_put_once_and_the_next_one_while_the_store_takes_one(
    ray_session: None, savefile: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray
    import torch
    from torch import nn

    from delve_ray.packing import Packer
    from delve_ray.store.actor import RemoteStore

    put, packed, buffers, prepared = ray.put, threading.Event(), [], []
    pack, prepare = Packer.__call__, RemoteStore._prepare

    def counted(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            buffers.append(float(value[0]))
        return put(value)

    def noted(self: RemoteStore, seq: int) -> None:
        packed.wait(30)  # until there is something to follow
        before = len(buffers)
        prepare(self, seq)
        prepared.append(len(buffers) - before)

    def counting(self: Packer, *args: Any) -> Any:
        found = pack(self, *args)
        if args[3] == 3:
            threading.Timer(0.2, packed.set).start()  # it is in the outbox by then
        return found

    monkeypatch.setattr(ray, "put", counted)
    monkeypatch.setattr(RemoteStore, "_prepare", noted)
    monkeypatch.setattr(Packer, "__call__", counting)
    model = nn.Linear(4, 200)
    with delve_ray.SaturationTracker(savefile, "parquet", model, run="ahead", stats="cov") as tracker:
        for step in range(4):
            model(torch.randn(50 + step, 4))
            tracker.add_saturations(step)
        tracker.metrics(wait=True)
    assert len(buffers) == len(set(buffers)) == 4
    assert prepared == [1, 1, 1, 0]
    rows = delve_ray.read_covariances(savefile).sort_by("step").to_pylist()
    assert [(row["step"], row["samples"]) for row in rows] == [(step, 50 + step) for step in range(4)]


def test_two_trackers_of_one_run_have_a_name_each(ray_session: None, tmp_path: Path) -> None:
    import torch

    models = {name: torch.nn.Linear(4, width) for name, width in (("generator", 3), ("critic", 2))}
    trackers = {
        name: delve_ray.SaturationTracker(str(tmp_path / name), "parquet", model, run="gan", name=name)
        for name, model in models.items()
    }
    for name, model in models.items():
        model(torch.randn(30, 4))
        trackers[name].add_saturations(step=1)
    for tracker in trackers.values():
        tracker.close()
    for name, width in (("generator", 3), ("critic", 2)):
        (row,) = delve_ray.read_spectra(tmp_path / name).to_pylist()
        assert (row["run"], row["features"], row["samples"]) == (f"gan-{name}", width, 30)
