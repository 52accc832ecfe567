"""The node with the store is lost in the middle of a training: on shared storage the run goes on and ends exact.

The cluster has its own Ray in a process of its own: a head, a node for the store, and a node for each worker.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.processes import (
    STATS,
    WITHIN_S,
    Worker,
    check_rows,
    family,
    outputs,
    run_file,
    times,
    wait_until,
)

pytestmark = [pytest.mark.slow, pytest.mark.ray]

RANKS, BATCHES = range(2), range(4)
LOST_IN, MOVED_IN = 2, 4
"""The steps in the middle of which the store's node is lost, and by which there is another."""


@contextlib.contextmanager
def connected_cluster() -> Iterator[tuple[Any, Any]]:
    """A cluster of a head, a node with the resource "store", and one with "rank" for each rank; and the second."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        node = cluster.add_node(num_cpus=1, resources={"store": 1})
        for _ in RANKS:
            cluster.add_node(num_cpus=1, resources={"rank": 1})
        ray.init(address=cluster.address, log_to_driver=False)
        yield cluster, node
    finally:
        ray.shutdown()
        cluster.shutdown()


def start_there(savefile: str, run: str) -> Any:
    """Start a store from the node that is meant for it, all of whose CPUs are taken by that; its handle."""
    import ray

    from delve_ray.store import actor
    from delve_ray.store.protocol import StoreConfig

    config = StoreConfig(run=run, savefile=savefile, world_size=len(RANKS), stats=STATS, snapshot_every=1.0)
    return ray.get(ray.remote(actor.start).options(num_cpus=1, resources={"store": 1}).remote(config))


def start_stores(savefile: str, count: int) -> None:
    """Start stores from one node; prints how many of them are there."""
    import ray

    with connected_cluster() as (_, node):
        handles = [start_there(f"{savefile}-{index}", f"run-{index}") for index in range(count)]
        nodes = [ray.get(handle.status.remote())["node"] for handle in handles]
        print(f"{nodes.count(node.node_id)} of {count} stores are there")


def node_of(run: str) -> str | None:
    """The node that a run's store answers from; None while it does not."""
    import ray

    import delve_ray

    try:
        node: str = ray.get(delve_ray.get_store(run).status.remote(), timeout=5.0)["node"]
    except (delve_ray.StoreError, ray.exceptions.RayError):
        return None
    return node


def lose_the_store(savefile: str, steps: int) -> None:
    """Train on a cluster of which the store's node goes; ends once the last rank has left."""
    import ray

    with connected_cluster() as (cluster, lost):
        handle = start_there(savefile, "moving")
        assert node_of("moving") == lost.node_id
        team = [ray.remote(Worker).options(resources={"rank": 1}).remote(rank) for rank in RANKS]
        ray.get([worker.track.remote(store=handle) for worker in team])
        for step in range(steps):
            ray.get([worker.batches.remote(step, BATCHES[:2]) for worker in team])
            if step == LOST_IN:
                ray.get([worker.call.remote("flush") for worker in team])  # so that a part of the window is there
                cluster.remove_node(lost, allow_graceful=False)
            if step == MOVED_IN:
                wait_until(lambda: node_of("moving") not in (None, lost.node_id), "the store on another node")
            ray.get([worker.window.remote(step, BATCHES[2:]) for worker in team])
        ray.get([worker.call.remote("metrics", wait=True, timeout=WITHIN_S) for worker in team])
        ray.get([worker.call.remote("close") for worker in team])
        print("the run has ended")


def test_a_store_lies_on_the_node_that_starts_it(savefile: str, tmp_path: Path) -> None:
    """There are its files, where they are local."""
    with family(tmp_path) as cluster:
        assert "4 of 4 stores are there" in cluster.run(start_stores, savefile, 4)
        cluster.wait_gone()


def test_a_run_outlives_the_node_of_its_store(savefile: str, tmp_path: Path) -> None:
    steps = times(6)
    with family(tmp_path) as cluster:
        assert "the run has ended" in cluster.run(lose_the_store, savefile, steps)
        cluster.wait_gone()
    rows = check_rows(savefile, {step: outputs(step, dict.fromkeys(RANKS, BATCHES)) for step in range(steps)})
    assert [(row["attempt"], row["workers"], row["final"]) for row in rows] == [(0, 2, True)] * steps
    assert len(run_file(savefile)["attempts"]) == 1
    end = run_file(savefile)["end"]
    assert (end["why"], end["problems"]) == ("closed", [])
    assert [name for name in os.listdir(Path(savefile, "store")) if name.startswith("window-")] == []
