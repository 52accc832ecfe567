"""A store that has stopped while the training goes on: the worker's memory stays bounded, and nothing is lost unsaid.

Ray, the store and the worker have processes of their own, so that the worker's memory is the worker's alone. Of a store
with shards one process has stopped, the front or a shard; the others hold no more than they do at any time.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from delve_ray.store.memory import store_bytes
from delve_ray.store.protocol import moments_size
from tests.chaos.processes import (
    NEVER_S,
    Worker,
    check_rows,
    family,
    make_model,
    memory,
    outputs,
    run_file,
    statuses,
    stopped,
    store,
    times,
    wait_until,
    with_shards,
    workers,
)

pytestmark = [pytest.mark.slow, pytest.mark.ray]

FEATURES: dict[int, Sequence[int]] = {1: (600,), 2: (600, 590)}
"""Of the layers, by the number of shards: each has one."""
MAX_MEMORY = 160 << 20
EVERY = 50
"""Batches per window of the worker that is measured; any other rank has one."""
PROCESS_BYTES = 48 << 20
"""What a store's process may take beside its moments: imports at the first use, and what its allocator keeps."""


def delta_bytes(num_shards: int) -> int:
    """Of a window."""
    return 8 * sum(map(moments_size, FEATURES[num_shards]))


def reset_peak() -> int:
    """Let VmHWM begin anew, at what is in memory now.

    What is imported at the first use is no part of what waits: torch's compiler, which any optimizer brings, too,
    and what Arrow looks for in a first array.
    """
    import pyarrow as pa
    import torch._dynamo  # noqa: F401

    pa.array(np.zeros(1))
    Path("/proc/self/clear_refs").write_text("5")
    return memory()["VmRSS"]


def measured(worker: Worker, others: list[Any], windows: int, stores: Sequence[int]) -> dict[str, Any]:
    """Train; what the worker's outbox came to at most, and by how much the memory of the stores' processes grew."""
    import ray

    shipper = worker.tracker._shipper
    most: dict[str, Any] = {"memory_bytes": 0, "disk_bytes": 0, "unmerged": 0, "lost": 0}
    before = [memory(pid)["RssAnon"] for pid in stores]
    grown = [0] * len(stores)
    for step in range(windows):
        worker.window(step, range(EVERY))
        # A window of a few milliseconds closes faster than it is packed; what then happens is another test's matter.
        wait_until(lambda: len(shipper._queue) < 4, "the packer")
        ray.get([other.window.remote(step, [0]) for other in others])
        most = higher(most, worker.outbox())
        grown = [max(now, memory(pid)["RssAnon"] - was) for now, pid, was in zip(grown, stores, before, strict=True)]
    # The last windows are packed meanwhile, and rows of theirs may be given up after the last look.
    wait_until(lambda: not (shipper._queue or shipper._packing), "the last windows to be packed")
    return higher(most, worker.outbox()) | {"stores": grown}


def higher(most: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    return {name: max(value, now[name]) for name, value in most.items()}


def train_against_a_stopped_store(
    savefile: str, spill: str, windows: int, world_size: int, num_shards: int, stops: int
) -> None:
    """Rank 0 trains in this process while a store is stopped; prints what it took, and delivers.

    Of the front and its shards, the one that `stops` is counted from the front on.
    """
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=200 << 20, logging_level="ERROR")
    options = {"world_size": world_size, "late_after": 0.0, "silent_after": NEVER_S, "snapshot_every": 1.0}
    options["num_shards"], features = num_shards, FEATURES[num_shards]
    with store(savefile, "stopped", **options) as handle, workers(range(1, world_size), features) as others:
        worker = Worker(0, features)
        worker.batches(0, range(EVERY))  # as much as an untracked training takes
        before = reset_peak()
        worker.track(store=handle, spill_dir=spill, max_memory=MAX_MEMORY)
        ray.get([other.track.remote(store=handle, spill_dir=f"{savefile}-spill") for other in others])
        pids = [status["pid"] for status in statuses(handle)]
        going_on = [pid for index, pid in enumerate(pids) if index != stops]
        with stopped(pids[stops]):
            most = measured(worker, others, windows, going_on)
        most["peak"] = memory()["VmHWM"] - before
        most["gave_up"] = worker.tracker._shipper.outbox.lost_rows
        ray.get([other.call.remote("close") for other in others])
        worker.tracker.close()
    ray.shutdown()
    print("\nmeasured", json.dumps(most))


def train_with_a_packer_that_hangs(savefile: str, spill: str) -> None:
    """Neither the store nor the disk takes anything, and then the packer waits for ever; prints what it took."""
    from delve_ray.packing import Packer
    from delve_ray.store.core import CovarianceStore
    from delve_ray.store.protocol import StoreConfig

    class Hanging(CovarianceStore):
        def take(self, delta: Any, buffer: Any) -> Any:
            threading.Event().wait()

    def hang(*_: object) -> Any:
        threading.Event().wait()

    worker = Worker(0, FEATURES[1])
    worker.batches(0, [0])
    before = reset_peak()
    core = Hanging(StoreConfig("hanging", savefile, 1, silent_after=0.0))
    worker.track(store=core, spill_dir=spill, max_memory=MAX_MEMORY)
    for step in range(60):
        worker.window(step, [0])
        wait_until(lambda step=step: worker.outbox()["deltas"] > step, "a window that is packed")
    Packer.__call__ = hang  # as where a device never finishes
    for step in range(60, 120):
        worker.window(step, [0])
    print("\nmeasured", json.dumps({"peak": memory()["VmHWM"] - before, **worker.outbox()}), flush=True)
    os._exit(0)


def train_apart(
    tmp_path: Path, savefile: str, spill: Path, windows: int, world_size: int, num_shards: int, stops: int
) -> tuple[dict[str, Any], str]:
    """What a training took, and what it said; the numbers are printed, for people."""
    with family(tmp_path) as processes:
        arguments = savefile, str(spill), windows, world_size, num_shards, stops
        said = processes.run(train_against_a_stopped_store, *arguments)
        processes.wait_gone()
    found = numbers(said)
    shown = {name: f"{found[name] / (1 << 20):.1f}" for name in ("peak", "memory_bytes", "disk_bytes")}
    shown["stores"] = " and ".join(f"{grown / (1 << 20):.1f}" for grown in found["stores"])
    recorded = windows * delta_bytes(num_shards) >> 20
    print(f"of {recorded} MiB recorded, max_memory {MAX_MEMORY >> 20} MiB: {shown} MiB")
    return found, said


def check_stores(found: dict[str, Any], world_size: int, num_shards: int, stops: int) -> None:
    """The front and the shards that went on hold what `store_bytes` says, of two windows, and not all that there is."""
    widths = [[], *([width] for width in FEATURES[num_shards])] if num_shards > 1 else [FEATURES[1]]
    del widths[stops]
    assert len(found["stores"]) == len(widths)
    for grown, own in zip(found["stores"], widths, strict=True):
        assert grown < store_bytes(own, windows=2, sources=world_size).peak + PROCESS_BYTES


def numbers(said: str) -> dict[str, Any]:
    """What a process has measured."""
    (line,) = (line for line in said.splitlines() if line.startswith("measured "))
    found: dict[str, Any] = json.loads(line.removeprefix("measured "))
    return found


def expected(steps: list[int], batches: dict[int, Any], num_shards: int) -> dict[int, np.ndarray]:
    model = make_model(FEATURES[num_shards])
    return {step: outputs(step, batches, model) for step in steps}


@with_shards()
def test_a_worker_whose_store_has_stopped_keeps_to_its_memory(savefile: str, tmp_path: Path, num_shards: int) -> None:
    """With shards, the first of them stops."""
    windows, stops = times(10_000 // EVERY if num_shards == 1 else 90), num_shards - 1
    recorded = windows * delta_bytes(num_shards)
    assert recorded > 1.5 * MAX_MEMORY, "it would not fit"
    found, _ = train_apart(tmp_path, savefile, tmp_path / "spill", windows, 1, num_shards, stops)
    assert found["peak"] < MAX_MEMORY
    assert found["memory_bytes"] < MAX_MEMORY
    assert found["disk_bytes"] + found["memory_bytes"] >= recorded - 2 * delta_bytes(num_shards)
    assert (found["lost"], found["gave_up"]) == (0, [])
    check_stores(found, 1, num_shards, stops)
    rows = check_rows(savefile, expected(list(range(windows)), {0: range(EVERY)}, num_shards))
    assert [(row["workers"], row["final"]) for row in rows] == [(1, True)] * windows
    assert run_file(savefile)["end"]["problems"] == []
    assert not list((tmp_path / "spill").iterdir()), "what waited there has arrived"


@with_shards(in_ci=False)
def test_rows_that_neither_memory_nor_disk_holds_are_given_up_and_missed(
    savefile: str, tmp_path: Path, num_shards: int
) -> None:
    """A file is in the way of the worker's folder; the other rank has another. With shards, the front stops."""
    windows = times(80 if num_shards == 1 else 30)
    spill = tmp_path / "spill"
    spill.write_text("in the way")
    found, said = train_apart(tmp_path, savefile, spill / "folder", windows, 2, num_shards, 0)
    assert found["peak"] < MAX_MEMORY
    assert found["memory_bytes"] < MAX_MEMORY
    assert found["disk_bytes"] == 0
    check_stores(found, 2, num_shards, 0)
    assert 0 < found["lost"] == len(found["gave_up"])
    lost = [step for step in range(windows) if f"rank 0: rows of step {step} are given up" in said]
    assert 0 < len(lost) < windows, "some may have been given up before they were packed"
    kept = [step for step in range(windows) if step not in lost]
    batches = {0: range(EVERY), 1: [0]}
    reference = expected(kept, batches, num_shards) | expected(lost, {1: [0]}, num_shards)
    rows = check_rows(savefile, reference)
    assert [row["workers"] for row in rows] == [1 if step in lost else 2 for step in range(windows)]
    assert {row["world_size"] for row in rows} == {2}
    assert f"{spill / 'folder'}" in said


def test_what_is_packed_and_what_waits_for_it_share_the_memory(savefile: str, tmp_path: Path) -> None:
    spill = tmp_path / "spill"
    spill.write_text("in the way")
    with family(tmp_path) as processes:
        said = processes.run(train_with_a_packer_that_hangs, savefile, str(spill / "folder"))
    found = numbers(said)
    print(f"max_memory {MAX_MEMORY >> 20} MiB, at most {found['peak'] / (1 << 20):.1f} MiB")
    assert "neither memory nor" in said, "what is packed has reached its bound"
    assert "windows close faster than they can be packed" in said, "and what waits for it"
    assert found["peak"] < MAX_MEMORY
