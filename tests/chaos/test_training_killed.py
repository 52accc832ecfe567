"""Workers that are killed, stopped, restarted or silent in the middle of a training: the rows say what they hold.

The store is one actor, or a front and shards. Ray Train takes long to start its workers, so each has two trackers, one
of them with shards.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import delve_ray
from tests.chaos.processes import (
    NEVER_S,
    STATS,
    Worker,
    batch,
    check_rows,
    make_model,
    outputs,
    published,
    run_file,
    statuses,
    stopped,
    store,
    store_log,
    wait_until,
    workers,
)

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.usefixtures("ray_session")]

EPOCHS, BATCHES, KILLED_IN = 5, 6, 3
CLOSE_TO = 1e-9
"""Relative difference of two runs that saw the same rows."""
FEATURES = (6, 9, 4)
"""Of the layers that plain actors have: two shards have some each."""


@pytest.fixture(params=[1, 2], ids=["alone", "shards"])
def num_shards(request: pytest.FixtureRequest) -> int:
    return int(request.param)


def rows_of(step: int, batches: Mapping[int, Iterable[int]]) -> Any:
    """The rows of all layers that should be counted."""
    return outputs(step, batches, make_model(FEATURES))


def of_moments(handle: Any, num_shards: int, name: str) -> set[Any]:
    """What is under this name in the status of each store that has moments: of the shards, or of one alone."""
    return {status[name] for status in statuses(handle)[-num_shards:]}


def team_of(size: int) -> Any:
    """So many workers."""
    return workers(range(size), FEATURES)


# --- Ray Train -----------------------------------------------------------------------------------------


def make_net() -> Any:
    import torch
    from torch import nn

    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 12), nn.Tanh(), nn.Dropout(0.1), nn.Linear(12, 5))


def resume(model: Any, folder: str) -> int:
    """Load the last checkpoint, if there is one; the epoch to begin with, which is noted."""
    import ray.train
    import torch

    start, checkpoint = 0, ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as state:
            saved = torch.load(Path(state, "state.pt"))
        model.load_state_dict(saved["model"])
        start = saved["epoch"] + 1
    if ray.train.get_context().get_world_rank() == 0:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with Path(folder, "starts").open("a") as stream:
            stream.write(f"{start}\n")
    return start


def second_start(folder: Path) -> int:
    """The epoch with which the second attempt began: Ray Train may not have noted the last checkpoint before a kill."""
    first, second = map(int, (folder / "starts").read_text().split())
    assert first == 0 < second <= KILLED_IN
    return second


SAVEFILES = {1: "saturation", 2: "saturation-shards"}
"""In the directory of the results, by the number of shards."""


def track(model: Any, num_shards: int, **options: Any) -> delve_ray.SaturationTracker:
    """One of a worker's trackers."""
    options |= {"name": None if num_shards == 1 else "shards", "num_shards": num_shards, "stats": STATS}
    return delve_ray.SaturationTracker(SAVEFILES[num_shards], "parquet", model, **options)


def save(model: Any, epoch: int, folder: Path) -> None:
    """Report the end of an epoch, which is a barrier, with a checkpoint from rank 0."""
    import ray.train
    import torch

    checkpoint = None
    if ray.train.get_context().get_world_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save({"model": model.state_dict(), "epoch": epoch}, folder / "state.pt")
        checkpoint = ray.train.Checkpoint.from_directory(str(folder))
    ray.train.report({"epoch": epoch}, checkpoint=checkpoint)


def train(config: dict[str, Any]) -> None:
    """Train by DDP from the last checkpoint on; the first attempt's rank 1 may die in the middle of an epoch."""
    import ray.train
    import torch
    from ray.train.torch import prepare_model

    rank = ray.train.get_context().get_world_rank()
    net = make_net()
    start = resume(net, config["out"])
    model = prepare_model(net)
    trackers = [track(model, num_shards, publish_every=0.5) for num_shards in config["num_shards"]]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for epoch in range(start, EPOCHS):
        torch.manual_seed(1000 * rank + epoch)  # dropout
        model.train()
        for number in range(BATCHES):
            if config["kill"] and (start, rank, epoch, number) == (0, 1, KILLED_IN, BATCHES // 2):
                for tracker in trackers:
                    tracker.flush()  # so that the store holds a part of the epoch that is replayed
                os.kill(os.getpid(), signal.SIGKILL)
            loss = model(batch(rank, epoch, number)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            net(batch(rank, epoch, BATCHES))
        for tracker in trackers:
            tracker.add_saturations(epoch)
        save(net, epoch, Path(config["out"], f"checkpoint-{epoch}"))
    for tracker in trackers:
        tracker.close()


def fit(worker: Any, folder: Path, name: str, num_workers: int, *, max_failures: int = 2, **config: Any) -> str:
    """Train; the directory of the results."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    TorchTrainer(
        worker,
        train_loop_config={"out": str(folder / name)} | config,
        scaling_config=ScalingConfig(num_workers=num_workers),
        run_config=RunConfig(
            name=name, storage_path=str(folder / "storage"), failure_config=FailureConfig(max_failures=max_failures)
        ),
    ).fit()
    return str(folder / "storage" / name)


@pytest.fixture(scope="module")
def trained(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, int]:
    """The results of a training in which nothing happens and of one that is killed, and where that one went on."""
    folder = tmp_path_factory.mktemp("trained")
    plain = fit(train, folder, "undisturbed", 2, kill=False, num_shards=[1])
    killed = fit(train, folder, "killed", 2, kill=True, num_shards=list(SAVEFILES))
    return plain, killed, second_start(folder / "killed")


def test_a_killed_and_resumed_training_has_the_rows_of_an_undisturbed_one(
    trained: tuple[str, str, int], num_shards: int
) -> None:
    plain, killed, second = trained
    plain, killed = os.path.join(plain, SAVEFILES[1]), os.path.join(killed, SAVEFILES[num_shards])
    expected, found = published(plain), published(killed)
    assert set(expected) == {(p, e, layer) for p in ("train", "eval") for e in range(EPOCHS) for layer in ("0", "3")}
    assert found.keys() == expected.keys()
    for key, row in found.items():
        scale = expected[key]["eigenvalues"][0]
        for column in ("eigenvalues", "covariance", "mean"):
            difference = np.abs(np.subtract(row[column], expected[key][column])).max()
            assert difference <= CLOSE_TO * scale, (key, column)
        for column in ("samples", "features", "intrinsic_dimensionality", "nonfinite_rows"):
            assert row[column] == expected[key][column], (key, column)
        assert row["samples"] == 2 * 16 * (BATCHES if key[0] == "train" else 1), key
        assert row["attempt"] == (0 if key[1] < second else 1), key
        assert (row["workers"], row["world_size"], row["final"]) == (2, 2, True), key
    attempts = run_file(killed)["attempts"]
    assert [(attempt["attempt"], attempt["world_size"]) for attempt in attempts] == [(0, 2), (1, 2)]
    assert run_file(killed)["end"]["why"] == "closed"
    assert run_file(killed)["options"]["num_shards"] == num_shards
    assert [attempt["attempt"] for attempt in run_file(plain)["attempts"]] == [0]


def grow(config: dict[str, Any]) -> None:
    """Each rank sees its own rows; the first attempt, which has one rank, dies in the middle of an epoch."""
    import ray.train

    rank, world_size = ray.train.get_context().get_world_rank(), ray.train.get_context().get_world_size()
    worker = Worker(rank, FEATURES)
    start = resume(worker.model, config["out"])
    trackers = [track(worker.model, num_shards, publish_every=NEVER_S) for num_shards in SAVEFILES]
    for epoch in range(start, EPOCHS):
        if world_size == 1 and epoch == KILLED_IN:
            worker.batches(epoch, range(2))
            for tracker in trackers:
                tracker.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        worker.batches(epoch, range(BATCHES))
        for tracker in trackers:
            tracker.add_saturations(epoch)
        save(worker.model, epoch, Path(config["out"], f"checkpoint-{epoch}"))
    for tracker in trackers:
        tracker.close()


@pytest.fixture(scope="module")
def grown(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, int]:
    """The results of a training that was started twice, and where it went on the second time.

    Ray Train goes on with an experiment of the same name, from its last checkpoint.
    """
    from ray.train import WorkerGroupError

    folder = tmp_path_factory.mktemp("grown")
    with pytest.raises(WorkerGroupError):
        fit(grow, folder, "growing", 1, max_failures=0)
    return fit(grow, folder, "growing", 2), second_start(folder / "growing")


def test_a_training_that_is_started_again_may_have_more_workers(grown: tuple[str, int], num_shards: int) -> None:
    results, second = grown
    savefile = os.path.join(results, SAVEFILES[num_shards])
    ranks = {epoch: [0] if epoch < second else [0, 1] for epoch in range(EPOCHS)}
    expected = {e: rows_of(e, dict.fromkeys(ranks[e], range(BATCHES))) for e in range(EPOCHS)}
    rows = check_rows(savefile, expected)
    sizes = [(row["attempt"], row["workers"], row["world_size"]) for row in rows]
    assert sizes == [(0, 1, 1)] * second + [(1, 2, 2)] * (EPOCHS - second)
    assert [attempt["world_size"] for attempt in run_file(savefile)["attempts"]] == [1, 2]


# --- plain actors --------------------------------------------------------------------------------------


def test_a_resumed_run_may_have_another_world_size(savefile: str, num_shards: int) -> None:
    import ray

    everything = range(4)
    with store(savefile, "resized", num_shards=num_shards, world_size=2) as handle:
        with team_of(2) as team:
            first, second = ray.get([w.track.remote(store=handle) for w in team])
            for step in range(3):
                ray.get([w.window.remote(step, everything) for w in team])
            ray.get([w.call.remote("metrics", wait=True) for w in team])
            ray.get([w.batches.remote(3, everything) for w in team])
            ray.get([w.call.remote("flush") for w in team])
            os.kill(first, signal.SIGKILL)
            os.kill(second, signal.SIGKILL)
        with team_of(3) as team:
            ray.get([w.track.remote(store=handle, world_size=3, resume="second") for w in team])
            for step in (2, 3, 4):
                ray.get([w.window.remote(step, everything) for w in team])
            ray.get([w.call.remote("close") for w in team])
    sizes = {step: 2 if step < 2 else 3 for step in range(5)}
    rows = check_rows(savefile, {s: rows_of(s, dict.fromkeys(range(n), everything)) for s, n in sizes.items()})
    assert [(r["attempt"], r["workers"], r["world_size"]) for r in rows] == [(0, 2, 2)] * 2 + [(1, 3, 3)] * 3
    assert [(a["attempt"], a["world_size"]) for a in run_file(savefile)["attempts"]] == [(0, 2), (1, 3)]


def test_a_dead_rank_is_missed_by_name_and_what_it_had_shipped_counts(savefile: str, num_shards: int) -> None:
    import ray

    with store(savefile, "dead", num_shards=num_shards, world_size=3, late_after=2.0) as handle, team_of(3) as team:
        pids = ray.get([w.track.remote(store=handle) for w in team])
        ray.get([w.window.remote(0, range(4)) for w in team])
        ray.get(team[2].batches.remote(1, range(3)))
        ray.get(team[2].call.remote("flush"))
        ray.get(team[2].batches.remote(1, range(3, 5)))  # these never leave it
        os.kill(pids[2], signal.SIGKILL)
        for step in (1, 2):
            ray.get([w.window.remote(step, range(6)) for w in team[:2]])
        ray.get([w.call.remote("metrics", wait=True) for w in team[:2]])
        status = statuses(handle)
        ray.get([w.call.remote("close") for w in team[:2]])
        assert ray.get(handle.flush.remote(60.0))
        log = store_log(status[0]["pid"])
    both = {0: range(6), 1: range(6)}
    parts: list[dict[int, Any]] = [dict.fromkeys(range(3), range(4)), both | {2: range(3)}, both]
    rows = check_rows(savefile, {step: rows_of(step, part) for step, part in enumerate(parts)})
    assert [(row["samples"], row["workers"], row["world_size"]) for row in rows] == [
        (3 * 4 * 16, 3, 3),
        ((6 + 6 + 3) * 16, 2, 3),
        ((6 + 6) * 16, 2, 3),
    ]
    for step in (1, 2):
        assert f"step {step} is published without ranks [2]" in log
    assert "step 0 is published without" not in log
    assert [part["problems"] for part in status] == [[]] * len(status)


def test_a_stopped_rank_corrects_the_rows_when_it_goes_on(savefile: str, num_shards: int) -> None:
    import ray

    with store(savefile, "late", num_shards=num_shards, world_size=2, late_after=2.0) as handle, team_of(2) as team:
        pids = ray.get([w.track.remote(store=handle) for w in team])
        ray.get([w.window.remote(0, range(4)) for w in team])
        ray.get(team[1].batches.remote(1, range(2)))
        ray.get(team[1].call.remote("flush"))
        ray.get(team[1].batches.remote(1, range(2, 4)))
        with stopped(pids[1]):
            for step in (1, 2):
                ray.get(team[0].window.remote(step, range(6)))
            ray.get(team[0].call.remote("metrics", wait=True))
            # Out of the memory: what comes late has to be merged into what a file holds.
            wait_until(lambda: of_moments(handle, num_shards, "parked_windows") == {2}, "two windows in files")
            there = {0: dict.fromkeys(range(2), range(4)), 1: {0: range(6), 1: range(2)}, 2: {0: range(6)}}
            before = check_rows(savefile, {step: rows_of(step, batches) for step, batches in there.items()})
        for step, numbers in ((1, range(4, 6)), (2, range(6))):
            ray.get(team[1].window.remote(step, numbers))
        ray.get([w.call.remote("close") for w in team])
    expected = {step: rows_of(step, dict.fromkeys(range(2), range(4 if step == 0 else 6))) for step in range(3)}
    after = check_rows(savefile, expected)
    assert [row["workers"] for row in before] == [2, 1, 1]
    assert [row["workers"] for row in after] == [2, 2, 2]
    assert after[0]["revision"] == before[0]["revision"]
    assert all(new["revision"] > old["revision"] for new, old in zip(after[1:], before[1:], strict=True))
    assert run_file(savefile)["end"]["problems"] == []


def test_deltas_of_an_attempt_that_was_replaced_change_nothing(savefile: str, num_shards: int) -> None:
    import ray

    everything = range(4)
    with store(savefile, "old", num_shards=num_shards, world_size=2) as handle, team_of(2) as old, team_of(2) as new:
        pids = ray.get([w.track.remote(store=handle) for w in old])
        for step in range(2):
            ray.get([w.window.remote(step, everything) for w in old])
        ray.get([w.batches.remote(2, range(2)) for w in old])
        ray.get([w.call.remote("flush") for w in old])
        os.kill(pids[0], signal.SIGKILL)
        with stopped(pids[1]):
            ray.get([w.track.remote(store=handle, resume="second") for w in new])
            for step in (1, 2):
                ray.get([w.window.remote(step, everything) for w in new])
            ray.get([w.call.remote("metrics", wait=True) for w in new])
            assert ray.get(handle.flush.remote(60.0))
            before, refused = published(savefile), of_moments(handle, num_shards, "refused")
        ray.get(old[1].window.remote(2, range(2, 4)))
        with pytest.raises(delve_ray.StoreError, match="belongs to attempt 0, and attempt 1 replays from step 1"):
            ray.get(old[1].call.remote("metrics", wait=True))
        assert not ray.get(old[1].call.remote("is_recording"))
        assert (refused, of_moments(handle, num_shards, "refused")) == ({0}, {1})
        ray.get([w.window.remote(3, everything) for w in new])
        ray.get([w.call.remote("close") for w in new])
    after = published(savefile)
    assert {key: after[key] for key in before} == before
    rows = check_rows(savefile, {s: rows_of(s, dict.fromkeys(range(2), everything)) for s in range(4)})
    assert [(row["attempt"], row["workers"]) for row in rows] == [(0, 2), (1, 2), (1, 2), (1, 2)]


def test_a_run_whose_workers_are_all_silent_is_published_and_ended(savefile: str) -> None:
    """With shards: see tests/store/test_sharded.py."""
    import ray

    with store(savefile, "silent", world_size=2, silent_after=12.0, late_after=NEVER_S) as handle:
        with team_of(2) as team:
            pids = ray.get([w.track.remote(store=handle) for w in team])
            ray.get([w.window.remote(0, range(4)) for w in team])
            ray.get(team[0].window.remote(1, range(4)))
            ray.get(team[1].batches.remote(1, range(2)))
            ray.get([w.call.remote("flush") for w in team])
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
        wait_until(lambda: ray.get(handle.status.remote())["finished"], "the end of a run without workers")
        log = store_log(ray.get(handle.status.remote())["pid"])
        with pytest.raises(delve_ray.RegistrationError, match="has ended"), team_of(1) as team:
            ray.get(team[0].track.remote(store=handle, resume="second"))
    both = {0: rows_of(0, dict.fromkeys(range(2), range(4))), 1: rows_of(1, {0: range(4), 1: range(2)})}
    rows = check_rows(savefile, both)
    assert [(row["workers"], row["world_size"], row["final"]) for row in rows] == [(2, 2, True), (1, 2, True)]
    end = run_file(savefile)["end"]
    assert end["why"].startswith("none of its workers was heard of for")
    assert end["problems"] == []
    assert "run silent is ended: none of its workers was heard of" in log
