"""A real Ray Train run: two workers, DDP, scikit-learn's digits, one store; the files say what the rows were.

Every worker also keeps its layers' outputs by an independent path (plain hooks that copy), so that the published
covariances can be compared with a two-pass float64 computation over all rows of all ranks.
"""

from __future__ import annotations

import os
import pickle
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import delve_ray
from delve_ray.moments import unpack_triangle
from delve_ray.schema import SCALAR_STATS

pytestmark = [pytest.mark.slow, pytest.mark.ray]

LAYERS = ("conv1", "conv2", "fc1", "fc2")
# Batches of each rank in each epoch: even, uneven, and a rank that sees nothing at all.
PLAN = {0: (6, 6), 1: (9, 2), 2: (5, 0)}


def make_model() -> Any:
    from collections import OrderedDict

    from torch import nn

    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(1, 8, 3, padding=1),
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(8, 16, 3, stride=2),
            relu2=nn.ReLU(),
            flat=nn.Flatten(),
            drop=nn.Dropout(0.2),
            fc1=nn.Linear(16 * 9, 32),
            relu3=nn.ReLU(),
            fc2=nn.Linear(32, 10),
        )
    )


def digits_batches(rank: int, count: int, size: int = 32) -> list[Any]:
    import torch
    from sklearn.datasets import load_digits

    data = load_digits()
    x = torch.tensor(data.images, dtype=torch.float32)[:, None] / 4 - 2
    y = torch.tensor(data.target)
    start = rank * 700
    return [(x[i : i + size], y[i : i + size]) for i in range(start, start + count * size, size)]


def train_epochs(
    model: Any, rank: int, plan: dict[int, tuple[int, int]], after_epoch: Callable[[int], None]
) -> list[float]:
    """Train by DDP, uneven numbers of batches included; evaluate without gradients."""
    import torch

    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for epoch, counts in plan.items():
        model.train()
        with model.join():
            for x, y in digits_batches(rank, counts[rank]):
                loss = torch.nn.functional.cross_entropy(model(x), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
        model.eval()
        with torch.no_grad():
            for x, _ in digits_batches(rank, 2, 50):
                model.module(x)
        after_epoch(epoch)
    return losses


def keep_rows(model: Any, now: dict[str, int]) -> dict[str, list[np.ndarray]]:
    """Copies of the layers' output rows, by phase, epoch and layer: the independent path."""
    kept: dict[str, list[np.ndarray]] = {}

    def keep(name: str) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            values = output.detach().double()
            rows = values.movedim(1, -1).reshape(-1, values.shape[1]) if values.dim() == 4 else values
            phase = "train" if module.training else "eval"
            kept.setdefault(f"{phase}/{now['epoch']}/{name}", []).append(rows.numpy().copy())

        return hook

    for name in LAYERS:
        getattr(model.module, name).register_forward_hook(keep(name))
    return kept


def seeded_training(rank: int, prepare: Callable[[Any], Callable[[int], None]]) -> tuple[Any, ...]:
    """Train from the same seeds each time; returns losses, final weights and the random state."""
    import torch
    from ray.train.torch import prepare_model

    torch.manual_seed(11)
    model = prepare_model(make_model())
    torch.manual_seed(100 + rank)
    losses = train_epochs(model, rank, PLAN, prepare(model))
    return losses, [p.detach().numpy().copy() for p in model.parameters()], torch.get_rng_state().numpy().copy()


def tracked_worker(config: dict[str, Any]) -> None:
    """Train without and with the tracker, and keep the rows of the second training."""
    import ray.train

    rank = ray.train.get_context().get_world_rank()
    found: dict[str, Any] = {"reports": []}

    def prepare(model: Any) -> Callable[[int], None]:
        now = {"epoch": 0}
        found["kept"] = keep_rows(model, now)
        stats = [*SCALAR_STATS, "cov"]
        tracker = delve_ray.SaturationTracker("saturation", ["parquet", "tensorboard"], model, stats=stats)
        found["tracker"] = tracker

        def after_epoch(epoch: int) -> None:
            tracker.add_saturations(step=epoch)
            tracker.add_scalar("epoch_done", epoch, step=epoch)
            metrics = tracker.metrics(wait=True)
            found["reports"].append(metrics)
            ray.train.report(metrics)
            now["epoch"] = epoch + 1

        return after_epoch

    plain = seeded_training(rank, lambda model: lambda epoch: None)
    tracked = seeded_training(rank, prepare)
    handle = delve_ray.get_store(ray.train.get_context().get_experiment_name())
    status, covariance = ray.get([handle.status.remote(), handle.covariance.remote("fc2", "eval")])
    found["tracker"].close()
    np.savez(Path(config["out"], f"rows-{rank}.npz"), **{key: np.concatenate(p) for key, p in found["kept"].items()})
    same = plain[0] == tracked[0] and all(map(np.array_equal, [*plain[1], plain[2]], [*tracked[1], tracked[2]]))
    outcome = {"same": same, "losses": len(plain[0]), "reports": found["reports"]}
    if rank == 0:
        outcome |= {"status": status, "covariance": covariance}
        Path(config["out"], "outcome.pickle").write_bytes(pickle.dumps(outcome))


def fit(worker: Any, tmp_path: Path, name: str, **failure: Any) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    trainer = TorchTrainer(
        worker,
        train_loop_config={"out": str(tmp_path)},
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(
            name=name, storage_path=str(tmp_path / "storage"), failure_config=FailureConfig(**failure)
        ),
    )
    return trainer.fit()


@pytest.fixture(scope="module")
def run(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    tmp_path = tmp_path_factory.mktemp("train")
    fit(tracked_worker, tmp_path, "digits")
    return pickle.loads((tmp_path / "outcome.pickle").read_bytes()), tmp_path


def savefile(tmp_path: Path, name: str = "digits") -> str:
    """A relative savefile lies in the run's own directory."""
    return str(tmp_path / "storage" / name / "saturation")


def two_pass(rows: np.ndarray) -> np.ndarray:
    centred = rows - rows.mean(axis=0)
    centred -= centred.mean(axis=0)
    return centred.T @ centred / len(rows)


def test_training_is_the_same_to_the_bit(run: tuple[Any, Path]) -> None:
    outcome, _ = run
    assert outcome["losses"] == 6 + 9 + 5
    assert outcome["same"], "losses, final weights and the random state with and without the tracker"


def test_covariances_equal_a_two_pass_computation_over_all_ranks(run: tuple[Any, Path]) -> None:
    _, tmp_path = run
    kept = [np.load(tmp_path / f"rows-{rank}.npz") for rank in range(2)]
    table = delve_ray.read_covariances(savefile(tmp_path)).to_pylist()
    assert {(row["phase"], row["step"], row["layer"]) for row in table} == {
        (phase, step, layer) for phase in ("train", "eval") for step in PLAN for layer in LAYERS
    }
    spectra = {(r["phase"], r["step"], r["layer"]): r for r in delve_ray.read_spectra(savefile(tmp_path)).to_pylist()}
    for row in table:
        key = f"{row['phase']}/{row['step']}/{row['layer']}"
        rows = np.concatenate([file[key] for file in kept if key in file])
        reference = two_pass(rows)
        eigenvalues = np.linalg.eigvalsh(reference)[::-1].clip(min=0)
        result = unpack_triangle(row["covariance"], row["features"])
        assert row["samples"] == len(rows), key
        assert np.abs(result - reference).max() < 1e-6 * eigenvalues[0], key
        published = spectra[row["phase"], row["step"], row["layer"]]
        k = int(np.argmax(np.cumsum(eigenvalues) / eigenvalues.sum() >= 0.99)) + 1
        assert published["intrinsic_dimensionality"] == k, key
        assert published["saturation"] == k / row["features"], key
        assert np.abs(np.array(published["eigenvalues"]) - eigenvalues).max() < 1e-6 * eigenvalues[0], key
        assert (published["workers"], published["world_size"], published["final"]) == (2, 2, True)


def test_a_rank_without_batches_is_complete(run: tuple[Any, Path]) -> None:
    _, tmp_path = run
    empty = np.load(tmp_path / "rows-1.npz")
    assert "train/2/conv1" not in empty.files, "rank 1 saw no training batch in the last epoch"
    rows = [
        r for r in delve_ray.read_spectra(savefile(tmp_path)).to_pylist() if (r["phase"], r["step"]) == ("train", 2)
    ]
    assert {row["samples"] for row in rows if row["layer"].startswith("fc")} == {5 * 32}
    assert {row["workers"] for row in rows} == {2}


def test_one_number_everywhere(run: tuple[Any, Path]) -> None:
    """Parquet, TensorBoard, metrics() and the store say the same."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    outcome, tmp_path = run
    events = EventAccumulator(os.path.join(savefile(tmp_path), "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    rows = delve_ray.read_spectra(savefile(tmp_path)).to_pylist()
    for row in rows:
        for stat in SCALAR_STATS:
            key = f"{stat}/{row['phase']}/{row['layer']}"
            if row[stat] is None:
                continue
            assert outcome["reports"][row["step"]][key] == row[stat]
            points = {event.step: event.value for event in events.Scalars(key)}
            assert points[row["step"]] == np.float32(row[stat])
    assert sorted(event.step for event in events.Scalars("epoch_done")) == [0, 0, 1, 1, 2, 2]
    last = next(
        r
        for r in delve_ray.read_covariances(savefile(tmp_path)).to_pylist()
        if (r["phase"], r["step"], r["layer"]) == ("eval", 2, "fc2")
    )
    assert np.array_equal(unpack_triangle(last["covariance"], 10), outcome["covariance"])
    assert sorted(outcome["status"]["ranks"]) == [0, 1]
    assert outcome["status"]["refused"] == 0


def test_pandas_reads_the_files_alone(run: tuple[Any, Path]) -> None:
    import pandas as pd

    _, tmp_path = run
    frame = pd.read_parquet(os.path.join(savefile(tmp_path), "spectra"))
    assert len(frame) == len(PLAN) * 2 * len(LAYERS)
    assert frame.query("final and layer == 'fc2'")["intrinsic_dimensionality"].between(1, 10).all()


def test_the_store_ends_with_the_run(run: tuple[Any, Path]) -> None:
    deadline = time.monotonic() + 60  # it answers a driver for some seconds more
    while store_pids() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert store_pids() == []
    with pytest.raises(delve_ray.StoreError, match="run 'digits' has no store in this Ray cluster"):
        delve_ray.get_store("digits")


def store_pids() -> list[int]:
    """Processes of store actors below this one's Ray."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                title = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if title.startswith(b"ray::StoreActor"):
                found.append(int(entry.name))
    return found


def failing_worker(config: dict[str, Any]) -> None:
    """Epochs 0 to 2; in the first attempt rank 1 dies by SIGKILL before it closes epoch 1."""
    import ray.train
    import torch
    from torch import nn

    rank = ray.train.get_context().get_world_rank()
    marker = Path(config["out"], "died")
    torch.manual_seed(rank)
    model = nn.Linear(6, 5)
    tracker = delve_ray.SaturationTracker("saturation", "parquet", model, stats="cov", publish_every=0)
    for epoch in range(3):
        model(torch.randn(10 * (epoch + 1), 6))
        if epoch == 1 and rank == 1 and not marker.exists():
            marker.write_text("once")
            os.kill(os.getpid(), signal.SIGKILL)
        tracker.add_saturations(epoch)
        tracker.metrics(wait=True)
    tracker.close()


def test_a_restarted_attempt_replaces_what_it_replays(ray_session: None, tmp_path: Path) -> None:
    fit(failing_worker, tmp_path, "restarted", max_failures=1)
    assert (tmp_path / "died").exists()
    rows = delve_ray.read_spectra(savefile(tmp_path, "restarted")).to_pylist()
    assert [(r["step"], r["attempt"], r["samples"], r["workers"]) for r in rows] == [
        (0, 1, 20, 2),
        (1, 1, 40, 2),
        (2, 1, 60, 2),
    ]
