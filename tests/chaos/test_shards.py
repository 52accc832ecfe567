"""A store with shards in a cluster of several nodes: spread over them, exact, also when a node with a shard is lost."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.chaos.processes import F64, STATS, TOLERANCE, WITHIN_S, family, run_file, times, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.ray]

RANKS, BATCHES, SHARDS = range(2), range(4), 3
WIDTHS = (6, 24, 3, 17, 10)
LOST_IN, MOVED_IN = 2, 4
"""The steps in the middle of which a shard's node is lost, and by which the shard is on another."""


def make_model() -> Any:
    """A network whose layers depend on nothing but this."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    layers = [nn.Linear(before, after) for before, after in zip((5, *WIDTHS), WIDTHS, strict=False)]
    return nn.Sequential(*layers)


def rows_of(rank: int, step: int, batch: int) -> Any:
    import torch

    return torch.randn(40, 5, generator=torch.Generator().manual_seed(1000 * step + 10 * rank + batch)) * 3 + 50


class Worker:
    """Feeds a tracked network with rows that its rank, step and batch determine."""

    def __init__(self, rank: int) -> None:
        self.rank, self.model = rank, make_model()

    def track(self, **options: Any) -> None:
        import delve_ray

        self.tracker = delve_ray.SaturationTracker(
            modules=self.model, rank=self.rank, publish_every=0, stats=STATS, **options
        )

    def batches(self, step: int, batches: Sequence[int], closes: bool) -> None:
        for batch in batches:
            self.model(rows_of(self.rank, step, batch))
        if closes:
            self.tracker.add_saturations(step)

    def call(self, name: str, *args: Any, **options: Any) -> Any:
        return getattr(self.tracker, name)(*args, **options)


def truth(step: int) -> list[F64]:
    """What each layer gave out in a step, by layer."""
    import torch

    model = make_model()
    outputs: list[list[Any]] = [[] for _ in WIDTHS]
    with torch.no_grad():
        for rank in RANKS:
            for batch in BATCHES:
                x = rows_of(rank, step, batch)
                for kept, layer in zip(outputs, model, strict=True):
                    x = layer(x)
                    kept.append(x.double().numpy())
    return [np.concatenate(kept) for kept in outputs]


@contextlib.contextmanager
def connected_cluster() -> Iterator[Any]:
    """A cluster of a head, three nodes that are alike, and one with "rank" for each rank."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        for _ in range(3):
            cluster.add_node(num_cpus=1)
        cluster.add_node(num_cpus=2, resources={"rank": 2})
        ray.init(address=cluster.address, log_to_driver=False)
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def shard_nodes(run: str) -> list[str | None]:
    """The node that each shard of a run answers from; None where it does not."""
    import ray

    import delve_ray

    try:
        status = ray.get(delve_ray.get_store(run).status.remote(), timeout=30.0)
    except (delve_ray.StoreError, ray.exceptions.RayError):
        return [None]
    return [shard.get("node") for shard in status["shards"]]


def train(savefile: str, steps: int) -> None:
    """Train on a cluster of which a node with a shard goes in the middle."""
    import ray

    import delve_ray

    with connected_cluster() as cluster:
        store = delve_ray.start_store(
            savefile,
            run="sharded",
            world_size=2,
            save_to=["parquet", "tensorboard"],
            stats=STATS,
            num_shards=SHARDS,
            snapshot_every=1.0,
            publish_every=0,
        )
        front = ray.get_runtime_context().get_node_id()
        wait_until(lambda: None not in shard_nodes("sharded"), "all shards")
        nodes = shard_nodes("sharded")
        print(f"the shards are on {len(set(nodes))} nodes")
        by_id = {node.node_id: node for node in cluster.worker_nodes}
        ranks = [n["NodeID"] for n in ray.nodes() if n["Resources"].get("rank")]
        lost = next((index for index, node in enumerate(nodes) if node in by_id and node not in (front, *ranks)), None)
        team = [ray.remote(Worker).options(resources={"rank": 1}, num_cpus=1).remote(rank) for rank in RANKS]
        ray.get([worker.track.remote(store=store) for worker in team])
        for step in range(steps):
            ray.get([worker.batches.remote(step, BATCHES[:2], False) for worker in team])
            if step == LOST_IN:
                ray.get([worker.call.remote("flush") for worker in team])  # so that a part of the window is there
                assert lost is not None
                cluster.remove_node(by_id[nodes[lost]], allow_graceful=False)
                print("a node with a shard is lost")
            if step == MOVED_IN:
                wait_until(lambda: shard_nodes("sharded")[lost] not in (None, nodes[lost]), "the shard elsewhere")
            ray.get([worker.batches.remote(step, BATCHES[2:], True) for worker in team])
        metrics = ray.get([worker.call.remote("metrics", wait=True, timeout=WITHIN_S) for worker in team])
        assert metrics[0] == metrics[1]
        assert {f"saturation/train/{layer}" for layer in range(len(WIDTHS))} < set(metrics[0])
        covariance = ray.get(store.covariance.remote("3", "train"))
        expected = np.cov(truth(steps - 1)[3].T, bias=True)
        assert np.abs(covariance - expected).max() < TOLERANCE * np.linalg.eigvalsh(expected)[-1]
        spectrum = ray.get(store.spectrum.remote("3", "train"))
        assert np.abs(spectrum - np.linalg.eigvalsh(covariance)[::-1]).max() < TOLERANCE * spectrum[0]
        ray.get([worker.call.remote("close") for worker in team])
        print("the run has ended")


def check(savefile: str, steps: int) -> None:
    import delve_ray
    from delve_ray.moments import unpack_triangle

    spectra = {(row["step"], row["layer"]): row for row in delve_ray.read_spectra(savefile).to_pylist()}
    covariances = {(row["step"], row["layer"]): row for row in delve_ray.read_covariances(savefile).to_pylist()}
    assert set(spectra) == set(covariances) == {(s, str(n)) for s in range(steps) for n in range(len(WIDTHS))}
    for step in range(steps):
        for layer, rows in enumerate(truth(step)):
            row = spectra[step, str(layer)]
            assert (row["samples"], row["workers"], row["final"]) == (len(rows), 2, True)
            expected = np.cov(rows.T, bias=True)
            found = unpack_triangle(np.array(covariances[step, str(layer)]["covariance"]), len(expected))
            assert np.abs(found - expected).max() < TOLERANCE * np.linalg.eigvalsh(expected)[-1]
    end = run_file(savefile)["end"]
    assert (end["why"], end["problems"]) == ("closed", [])
    assert len(run_file(savefile)["attempts"]) == 1


def test_a_run_with_shards_outlives_a_node_of_one(savefile: str, tmp_path: Path) -> None:
    steps = times(6)
    with family(tmp_path) as cluster:
        said = cluster.run(train, savefile, steps)
        assert "the shards are on 3 nodes" in said
        assert "a node with a shard is lost" in said
        assert "the run has ended" in said
        cluster.wait_gone()
    check(savefile, steps)
