"""Workers of two nodes whose deltas are merged on their node; the combiners are killed in the middle.

The cluster has its own Ray in a process of its own: a head with the store, which has two shards, and two nodes with two
workers each.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.processes import STATS, WITHIN_S, Worker, check_rows, family, outputs, run_file

pytestmark = [pytest.mark.slow, pytest.mark.ray]

NODES, RANKS, BATCHES = range(2), range(4), range(2)
BUNDLES = 4
"""Bundles that are waited for before the combiners are killed, and after that."""


@contextlib.contextmanager
def connected_cluster() -> Iterator[list[str]]:
    """A cluster of a head and two nodes with the resources "node0" and "node1"; the ids of these."""
    import ray
    from ray.cluster_utils import Cluster

    memory = {"object_store_memory": 100 << 20}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, **memory})
    try:
        nodes = [cluster.add_node(num_cpus=1, resources={f"node{node}": 2}, **memory) for node in NODES]
        ray.init(address=cluster.address, log_to_driver=False)
        yield [node.node_id for node in nodes]
    finally:
        ray.shutdown()
        cluster.shutdown()


def kill_combiners(run: str, nodes: list[str]) -> int:
    """Kill what combiners there are; how many."""
    import ray

    from delve_ray.store.combiner_actor import combiner_name
    from delve_ray.store.remote import NAMESPACE

    found = 0
    for node in nodes:
        with contextlib.suppress(ValueError):
            ray.kill(ray.get_actor(combiner_name(run, node), namespace=NAMESPACE))
            found += 1
    return found


def train(savefile: str) -> None:
    """Train until there were bundles, kill the combiners, and train until there are bundles again; prints how it was.

    Each worker ships once per window, so that without combiners the store would get a call from each.
    """
    import ray

    from delve_ray.store import actor
    from delve_ray.store.protocol import StoreConfig

    with connected_cluster() as nodes:
        config = StoreConfig(
            "combined", savefile, len(RANKS), stats=STATS, snapshot_every=0.5, publish_every=0.0, num_shards=2
        )
        handle = actor.start(config)
        team = [
            ray.remote(Worker).options(num_cpus=0, resources={f"node{rank % len(NODES)}": 1}).remote(rank)
            for rank in RANKS
        ]
        ray.get([worker.track.remote(store=handle, combine=True) for worker in team])
        steps = 0

        def window() -> list[Any]:
            nonlocal steps
            steps += 1
            return [worker.window.remote(steps - 1, BATCHES) for worker in team]

        def until_bundled() -> dict[str, int]:
            before, deadline = ray.get(handle.status.remote())["bundles"], time.monotonic() + WITHIN_S
            while True:
                ray.get(window())
                ray.get([worker.call.remote("metrics", wait=True, timeout=WITHIN_S) for worker in team])
                status: dict[str, int] = ray.get(handle.status.remote())
                if status["bundles"] >= before + BUNDLES:
                    return status
                assert time.monotonic() < deadline, f"{status['bundles']} bundles, {before} before"

        first = until_bundled()
        running = window()
        killed = kill_combiners("combined", nodes)
        ray.get(running)
        second = until_bundled()
        ray.get([worker.call.remote("close") for worker in team])
        counts = [{name: status[name] for name in ("deltas", "bundles", "bundled")} for status in (first, second)]
        print(json.dumps({"steps": steps, "killed": killed, "counts": counts}))


def test_nodes_merge_before_the_wire_and_a_combiner_may_be_killed(savefile: str, tmp_path: Path) -> None:
    with family(tmp_path) as cluster:
        said = cluster.run(train, savefile)
        cluster.wait_gone()
    found = json.loads(said[said.index('{"steps"') :].splitlines()[0])
    steps = found["steps"]
    rows = check_rows(savefile, {step: outputs(step, dict.fromkeys(RANKS, BATCHES)) for step in range(steps)})
    assert [(row["workers"], row["final"]) for row in rows] == [(len(RANKS), True)] * steps
    assert (run_file(savefile)["end"]["why"], run_file(savefile)["end"]["problems"]) == ("closed", [])
    assert found["killed"] == len(NODES)
    for counts in found["counts"]:
        # All workers of a node are in each of its bundles: the store was called as often as there are nodes.
        assert counts["bundled"] == counts["bundles"] * len(RANKS) / len(NODES)
        assert counts["deltas"] - counts["bundled"] + counts["bundles"] < counts["deltas"]
