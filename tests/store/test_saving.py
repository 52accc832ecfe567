"""The store's state in files: whole, twice, and good enough to go on from."""

from __future__ import annotations

import os
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.fs as pafs
import pytest

from delve_ray import read_covariances, read_scalars
from delve_ray.moments import unpack_triangle
from delve_ray.storage import Data, Storage
from delve_ray.store.core import CovarianceStore
from delve_ray.store.saving import Saver
from delve_ray.writers.base import Scalar
from tests.leftovers import running
from tests.stores import Worker, config, rows, until
from tests.windows import START

EVERY = 3600.0  # seconds: only when it is asked for


class Disk(Storage):
    """A local storage that can be full, slow, or gone for a process that is dead."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.error: OSError | None = None
        self.open = threading.Event()
        self.open.set()

    def write_atomic(self, relative: str, data: Data) -> None:
        self.open.wait(60)
        if self.error is not None:
            raise self.error
        super().write_atomic(relative, data)


def own(savefile: str, **changes: Any) -> Any:
    return config(savefile=savefile, save_to=("parquet",), snapshot_every=EVERY, **changes)


def begin(savefile: str, **changes: Any) -> tuple[CovarianceStore, Disk]:
    disk = Disk(savefile)
    return CovarianceStore(own(savefile, **changes), saver=Saver(disk, EVERY)), disk


def save(store: CovarianceStore) -> None:
    assert store.saver is not None
    assert store.saver.wait_saved(store._version, 60)


def kill(disk: Disk) -> None:
    """From here on the process of this store has no effect."""
    disk.error = OSError("the process is dead")


def again(savefile: str, **changes: Any) -> CovarianceStore:
    store = begin(savefile, **changes)[0]
    assert store.restore()
    return store


def take_over(worker: Worker, store: CovarianceStore) -> None:
    worker.store = store


def snapshots(savefile: str) -> list[Path]:
    return sorted(Path(savefile, "store").glob("snapshot-*"))


def finish(store: CovarianceStore, workers: list[Worker]) -> None:
    for worker in workers:
        worker.leave()
    assert store.wait_finished(60)


def test_a_killed_store_goes_on_from_its_snapshot_and_what_the_workers_still_have(savefile: str) -> None:
    store, disk = begin(savefile)
    workers = [Worker(store, rank) for rank in range(2)]
    parts = [rows(n, 5, 1e3) for n in (20, 30, 5, 8)]
    workers[0].send({(1, 0): parts[0]}, step=3)
    workers[1].send({(1, 0): parts[1]}, step=3)
    save(store)
    assert [store.heartbeat(w.source).durable for w in workers] == [1, 1]
    not_saved = workers[0].next({(1, 0): parts[2]}, step=3)
    ack = store.take(*not_saved)
    assert (ack.next_seq, ack.durable, ack.saved) == (2, 1, False)
    kill(disk)
    second = again(savefile)
    ack = second.heartbeat(workers[0].source)
    assert (ack.next_seq, ack.durable) == (1, 0), "what it has; nothing is sure until it has saved it itself"
    for worker in workers:
        take_over(worker, second)
    assert second.take(*not_saved).merged
    assert not second.take(*not_saved).merged
    workers[1].send({(1, 0): parts[3]}, step=3, closes=True)
    workers[0].send({}, step=3, closes=True)
    finish(second, workers)
    (row,) = read_covariances(savefile).to_pylist()
    together = np.concatenate(parts)
    assert (row["samples"], row["workers"], row["step"], row["attempt"]) == (63, 2, 3, 0)
    assert np.allclose(unpack_triangle(row["covariance"], 5), np.cov(together.T, bias=True), rtol=1e-9)


def test_out_of_order_deltas_widths_and_scalars_survive(savefile: str) -> None:
    store, disk = begin(savefile, world_size=1)
    worker = Worker(store, 0)
    first, second, third = (worker.next({(0, 0): rows(4, 3)}, step=0, closes=closes) for closes in (False, True, True))
    scalar = Scalar("r", 0, 0, "accuracy", 0, 0.25, START)
    third = replace(third[0], scalars=(scalar,), step=1).sealed(third[1]), third[1]
    store.take(*third)
    store.take(*first)
    save(store)
    kill(disk)
    later = again(savefile, world_size=1)
    take_over(worker, later)
    ack = later.heartbeat(worker.source)
    assert (ack.next_seq, ack.above) == (1, (2,))
    assert not later.take(*third).merged
    assert later.take(*second).next_seq == 3
    finish(later, [worker])
    assert [(r["step"], r["samples"]) for r in read_covariances(savefile).to_pylist()] == [(0, 8), (1, 4)]
    assert [(r["name"], r["value"]) for r in read_scalars(savefile).to_pylist()] == [("accuracy", 0.25)]


@pytest.mark.parametrize("damage", ["bit", "cut", "empty", "garbage"])
def test_a_damaged_snapshot_is_named_and_set_aside_and_the_one_before_it_is_used(savefile: str, damage: str) -> None:
    store, disk = begin(savefile)
    workers = [Worker(store, rank) for rank in range(2)]
    parts = [rows(10 + index, 5) for index in range(4)]
    workers[0].send({(1, 0): parts[0]})
    save(store)
    pending = []
    for index in (1, 2):
        pending.append(workers[0].next({(1, 0): parts[index]}))
        store.take(*pending[-1])
    store.saver.hurry()  # type: ignore[union-attr]
    until(lambda: store.saver.written >= 4)  # type: ignore[union-attr]
    durable = store.heartbeat(workers[0].source).durable
    kill(disk)
    newest = snapshots(savefile)[-1]
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 4
    newest.write_bytes({"bit": bytes(data), "cut": bytes(data[:-40]), "empty": b"", "garbage": b"x" * 200}[damage])
    second = again(savefile)
    (named,) = second.status()["snapshots"]["damaged"]
    assert newest.name in named
    assert any(newest.name in problem for problem in second.progress().problems)
    assert Path(savefile, "store", f"damaged-{newest.name}").exists()
    assert second.heartbeat(workers[0].source).next_seq >= durable, "what a worker may have forgotten is there"
    for worker in workers:
        take_over(worker, second)
    for delta in pending:
        second.take(*delta)
    workers[1].send({(1, 0): parts[3]}, closes=True)
    workers[0].send({}, closes=True)
    finish(second, workers)
    (row,) = read_covariances(savefile).to_pylist()
    assert (row["samples"], row["workers"]) == (sum(map(len, parts)), 2)
    assert np.allclose(unpack_triangle(row["covariance"], 5), np.cov(np.concatenate(parts).T, bias=True), rtol=1e-10)


def test_two_snapshots_are_kept_and_what_both_have_is_durable(savefile: str) -> None:
    store, _ = begin(savefile)
    worker = Worker(store, 0)
    for seq in range(5):
        ack = worker.send({(0, 0): rows(4, 3)})
        assert ack.durable == seq, "the last one is in no snapshot yet"
        save(store)
        ack = store.heartbeat(worker.source)
        assert (ack.durable, ack.saved) == (seq + 1, True)
        assert len(snapshots(savefile)) == 2
        assert not list(Path(savefile, "store").glob(".*")), "no half file"


def test_a_storage_that_fails_keeps_the_workers_from_forgetting_and_is_tried_again(
    savefile: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("delve_ray.store.saving.RETRY_S", (0.01, 0.02))
    store, disk = begin(savefile)
    worker = Worker(store, 0)
    disk.error = OSError(28, "No space left on device")
    worker.send({(0, 0): rows(4, 3)}, closes=True)
    until(lambda: store.status()["snapshots"]["failed"] >= 3)
    assert store.heartbeat(worker.source).durable == 0
    assert any("No space left" in problem for problem in store.progress().problems)
    assert "workers keep what is not saved" in caplog.text
    disk.error = None
    until(lambda: store.heartbeat(worker.source).durable == 1)
    assert store.progress().problems == ()


def test_nobody_waits_for_a_storage_that_hangs(savefile: str) -> None:
    store, disk = begin(savefile)
    first, second = Worker(store, 0), Worker(store, 1)
    disk.open.clear()
    first.send({(0, 0): rows(4, 3)}, closes=True)
    until(lambda: store.saver is not None and store.saver.status()["pending"])
    for _ in range(20):
        assert second.send({(0, 0): rows(4, 3)}).durable == 0
    assert store.status()["ranks"][1]["deltas"] == 20
    disk.open.set()
    until(lambda: store.heartbeat(second.source).durable == 20)


def test_a_store_that_was_replaced_writes_nothing_more(savefile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("delve_ray.store.saving.RETRY_S", (0.01, 0.02))
    old, _ = begin(savefile)
    worker = Worker(old, 0)
    save(old)
    new = again(savefile)
    save(new)
    before = [path.name for path in snapshots(savefile)]
    assert all(name.startswith("snapshot-000001-") for name in before)
    worker.send({(0, 0): rows(4, 3)}, closes=True)
    until(lambda: old.status()["snapshots"]["failed"] >= 1)
    assert "a later store of this run" in old.status()["snapshots"]["last_error"]
    assert [path.name for path in snapshots(savefile)] == before


def test_a_published_window_that_was_not_written_is_published_again(savefile: str) -> None:
    """The store dies between decomposing a window and writing it."""
    store, disk = begin(savefile, world_size=1)
    hold = threading.Event()
    worker = Worker(store, 0)
    writer = store.running().writers[0].writer
    write = writer.write
    writer.write = lambda window: (hold.wait(60), write(window))[1]  # type: ignore[method-assign, func-returns-value]
    worker.send({(1, 0): rows(40, 5)}, step=5, closes=True)
    until(lambda: store.progress().published == 1)
    save(store)
    kill(disk)
    assert not os.path.exists(os.path.join(savefile, "spectra"))
    second = again(savefile, world_size=1)
    until(lambda: os.path.isdir(os.path.join(savefile, "spectra")) and read_covariances(savefile).num_rows == 1)
    take_over(worker, second)
    finish(second, [worker])
    (row,) = read_covariances(savefile).to_pylist()
    assert (row["step"], row["samples"], row["workers"], row["final"]) == (5, 40, 1, True)
    hold.set()


def test_a_run_that_was_ending_ends(savefile: str) -> None:
    store, disk = begin(savefile, world_size=1)
    worker = Worker(store, 0)
    worker.send({(1, 0): rows(40, 5)}, step=5)
    hold = threading.Event()
    close = store.running().writers[0].close
    store.running().writers[0].close = lambda timeout: (hold.wait(60), close(timeout))[1]  # type: ignore[method-assign]
    assert worker.leave().finished
    save(store)
    kill(disk)
    second = again(savefile, world_size=1)
    assert second.wait_finished(60)
    assert second.heartbeat(worker.source).finished
    hold.set()
    assert [(r["step"], r["samples"]) for r in read_covariances(savefile).to_pylist()] == [(5, 40)]


def test_snapshots_lie_on_any_filesystem_and_a_damaged_one_is_set_aside_there(savefile: str, tmp_path: Path) -> None:
    """Not local: no rename, no links, no hidden names."""
    remote = Storage("below", filesystem=pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem()))
    assert not remote.is_local
    store = CovarianceStore(own(savefile), saver=Saver(remote, EVERY))
    worker = Worker(store, 0)
    sent = rows(9, 5)
    worker.send({(1, 0): sent})
    save(store)
    names = remote.list_files("store", ".arrow")
    assert len(names) == 2
    newest = names[-1]
    remote.write_atomic(newest, remote.read_bytes(newest)[:-1])
    state = Saver(remote, EVERY).load()
    assert state is not None
    assert [m.next_seq for m in state.attempts[0].members.values()] == [1]
    ((_, entry),) = state.attempts[0].windows[0].entries.items()
    found = entry.freeze().collect()
    assert found.n == 9
    assert np.allclose(found.mean, sent.mean(0), rtol=1e-12)
    assert remote.exists(f"store/damaged-{newest.rpartition('/')[2]}")


def test_a_store_that_nobody_has_joined_ends_without_a_snapshot(savefile: str) -> None:
    before = running()
    store, _ = begin(savefile)
    assert len(running() - before) == 1, "its saver"
    assert store.abandon()
    until(lambda: running() <= before)
    assert store.abandon()
    assert not os.path.exists(os.path.join(savefile, "store"))


def test_what_somebody_waited_for_hurries_nothing_that_comes_later(
    savefile: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a busy run the state has always changed since the last snapshot."""
    store, _ = begin(savefile)
    assert store.saver is not None
    freeze = store.freeze

    def busy() -> Any:
        frozen = freeze()
        store._touch()
        return frozen

    monkeypatch.setattr(store, "freeze", busy)
    worker = Worker(store, 0)
    worker.send({(0, 0): rows(4, 3)})
    save(store)
    with store.saver._changed:
        assert store.saver._due_in() > EVERY / 2
    assert store.saver.status()["pending"]
