"""The store's process killed again and again while workers train, over a connection that loses and repeats calls.

Real Ray actors as workers, a real store actor, SIGKILL. In the end every row that any worker has seen is published,
once: the counts to the integer, the covariances as a two-pass float64 computation has them.
"""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import delve_ray
from delve_ray.moments import unpack_triangle
from tests.chaos.processes import family, times
from tests.helpers import covariance_error, two_pass_covariance

pytestmark = [pytest.mark.slow, pytest.mark.ray]

WORKERS = 3
KILLS, KILLS_WITH_SHARDS = 50, 15
SHARDS = 2
STEP_S = 0.03
"""Pause between batches: kills land in windows, not only between them."""


class Unreliable:
    """A store as reached over a bad connection: calls get lost on the way there or back, come late, or twice."""

    def __init__(self, store: Any, seed: int) -> None:
        self.store = store
        self.random = random.Random(seed)
        self.held: tuple[Any, ...] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)

    def take(self, *delta: Any) -> Any:
        fate = self.random.random()
        if fate < 0.1:
            self.held = delta  # it comes later, after others
            raise delve_ray.StoreError("lost on the way there")
        if fate < 0.2:
            time.sleep(0.1 * self.random.random())
        answer = self.store.take(*delta)
        if self.held is not None and fate > 0.5:
            held, self.held = self.held, None
            self.store.take(*held)
        if fate > 0.9:
            self.store.take(*delta)
        if 0.2 < fate < 0.3:
            raise delve_ray.StoreError("lost on the way back")
        return answer

    def heartbeat(self, *arguments: Any) -> Any:
        if self.random.random() < 0.2:
            raise delve_ray.StoreError("lost on the way there")
        return self.store.heartbeat(*arguments)


class Worker:
    """One rank: a convolution and a Linear, and a copy of every row that they put out."""

    def track(self, savefile: str, run: str, rank: int, num_shards: int = 1) -> None:
        import torch
        from torch import nn

        torch.manual_seed(rank)
        self.generator = torch.Generator().manual_seed(100 + rank)
        self.model = nn.Sequential(nn.Conv1d(2, 5, 3), nn.Flatten(), nn.Linear(20, 9))
        options = {"run": run, "rank": rank, "world_size": WORKERS, "publish_every": 0.05, "stats": "cov"}
        options["num_shards"] = num_shards
        self.tracker = delve_ray.SaturationTracker(savefile, "parquet", self.model, **options)
        self.tracker._shipper.store = Unreliable(self.tracker._shipper.store, rank)  # type: ignore[assignment]
        self.kept: dict[tuple[int, str], list[np.ndarray]] = {}

    def train(self, step: int, batches: int) -> None:
        import torch

        for _ in range(batches):
            x = torch.randn(6, 2, 6, generator=self.generator) + 40
            maps = self.model[0](x).detach().double()
            self._keep(step, "0", maps.movedim(1, -1).reshape(-1, 5).numpy())
            y = self.model[2](self.model[1](maps.float())).detach().double()
            self._keep(step, "2", y.numpy())
            time.sleep(STEP_S)
        self.tracker.add_scalar("batches", batches, step)
        self.tracker.add_saturations(step)

    def _keep(self, step: int, layer: str, rows: np.ndarray) -> None:
        self.kept.setdefault((step, layer), []).append(rows.copy())

    def close(self) -> dict[tuple[int, str], np.ndarray]:
        self.tracker.close()
        assert self.tracker._shipper.lost is None
        return {key: np.concatenate(rows) for key, rows in self.kept.items()}


def store_processes(session: str) -> list[int]:
    """The processes of the store's actors in this Ray, and in no other that runs on this machine."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and (entry / "cmdline").read_bytes().startswith(b"ray::StoreActor"):
                parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
                if session.encode() in Path("/proc", parent, "cmdline").read_bytes():
                    found.append(int(entry.name))
        except OSError:  # it has just ended
            continue
    return found


class Killer(threading.Thread):
    """Kills a process of the store at random instants, each of its lives once."""

    def __init__(self, session: str, kills: int) -> None:
        super().__init__(daemon=True)
        self.session = session
        self.left = kills
        self.random = random.Random(4)
        self.killed: list[int] = []

    def run(self) -> None:
        while self.left:
            alive = [pid for pid in store_processes(self.session) if pid not in self.killed]
            if not alive:
                time.sleep(0.02)
                continue
            pid = self.random.choice(alive)
            time.sleep(self.random.expovariate(4.0))
            os.kill(pid, signal.SIGKILL)
            self.killed.append(pid)
            self.left -= 1


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("kills", "num_shards"), [(KILLS, 1), (KILLS_WITH_SHARDS, SHARDS)], ids=["one", "shards"])
def test_a_store_that_is_killed_again_and_again_loses_nothing_and_repeats_nothing(
    kills: int, num_shards: int, ray_session: None, savefile: str
) -> None:
    import ray

    session = Path(ray._private.worker.global_worker.node.get_session_dir_path()).name
    team = [ray.remote(Worker).options(num_cpus=0.5).remote() for _ in range(WORKERS)]
    ray.get([worker.track.remote(savefile, "killed", rank, num_shards) for rank, worker in enumerate(team)])
    killer = Killer(session, times(kills))
    killer.start()
    chance, step = random.Random(5), 0
    while killer.is_alive() or step < 5:
        ray.get([worker.train.remote(step, chance.randrange(5)) for worker in team])
        step += 1
    kept = ray.get([worker.close.remote() for worker in team])
    assert len(set(killer.killed)) == times(kills)
    check(savefile, kept, step)
    with pytest.raises(delve_ray.StoreError, match="has no store"):
        delve_ray.get_store("killed")
    for worker in team:
        ray.kill(worker)
    scalars = delve_ray.read_scalars(savefile).to_pylist()
    assert [(s["step"], s["rank"]) for s in scalars] == [(s, rank) for s in range(step) for rank in range(WORKERS)]
    print(f"{times(kills)} kills in {step} windows of {WORKERS} workers")


def check(savefile: str, kept: list[dict[tuple[int, str], np.ndarray]], steps: int) -> None:
    """Every (step, layer) that any worker has rows of is there, complete and exact."""
    rows = {(row["step"], row["layer"]): row for row in delve_ray.read_covariances(savefile).to_pylist()}
    expected = {key for one in kept for key in one}
    assert set(rows) == expected
    assert {key[0] for key in expected} <= set(range(steps))
    for key, row in rows.items():
        everything = np.concatenate([one[key] for one in kept if key in one])
        assert (row["samples"], row["workers"], row["final"]) == (len(everything), WORKERS, True), key
        matrix = unpack_triangle(row["covariance"], row["features"])
        assert covariance_error(matrix, two_pass_covariance(everything)) < 1e-6, key
    spectra = delve_ray.read_spectra(savefile, columns=["step", "layer", "samples"]).to_pylist()
    assert [row["samples"] for row in spectra] == [rows[row["step"], row["layer"]]["samples"] for row in spectra]
    assert len(spectra) == len(rows)


def test_ranks_that_close_together_all_learn_that_everything_is_written(ray_session: None, tmp_path: Path) -> None:
    """Whoever is the last to leave ends the store; the others, who wait for it to be saved, have delivered, too."""
    import ray

    team = [ray.remote(Worker).options(num_cpus=0.5).remote() for _ in range(WORKERS)]
    for number in range(3):
        savefile = tmp_path / f"run-{number}"
        ray.get([worker.track.remote(str(savefile), f"together-{number}", rank) for rank, worker in enumerate(team)])
        ray.get([worker.train.remote(0, 2) for worker in team])
        check(str(savefile), ray.get([worker.close.remote() for worker in team]), 1)
        assert not (savefile / "undelivered").exists()
    for worker in team:
        ray.kill(worker)


LOST_CALLS = {"num_failures": 1000, "req_failure_prob": 15, "resp_failure_prob": 15}
"""Ray itself loses so many percent of the calls between processes, before they are carried out or after."""


def train_over_lost_calls(savefile: str) -> None:
    """Three ranks in one process, and their store in another."""
    import ray

    ray.init(address="local", num_cpus=2, num_gpus=0, include_dashboard=False, logging_level="ERROR")
    team = [Worker() for _ in range(WORKERS)]
    for rank, worker in enumerate(team):
        worker.track(savefile, "lossy", rank)
    for step in range(5):
        for worker in team:
            worker.train(step, 2)
    closing = [threading.Thread(target=worker.close) for worker in team]
    for thread in closing:
        thread.start()
    for thread in closing:
        thread.join()
    check(savefile, [{key: np.concatenate(rows) for key, rows in worker.kept.items()} for worker in team], 5)
    ray.shutdown()
    print("exact")


def test_calls_that_ray_loses_are_made_again_and_count_once(
    tmp_path: Path, savefile: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = {"CoreWorkerService.grpc_client.PushTask": LOST_CALLS}
    monkeypatch.setenv("RAY_testing_rpc_failure", json.dumps(failures))
    with family(tmp_path) as processes:
        output = processes.run(train_over_lost_calls, savefile)
    assert "the store is unavailable" in output
    assert "exact" in output
