"""Ranks that are late, silent, gone, replaced or started anew; windows that are corrected."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from delve_ray import DeltaRefused, RegistrationError, read_covariances, read_spectra
from delve_ray.moments import unpack_triangle
from delve_ray.storage import Storage
from delve_ray.store.core import CovarianceStore
from delve_ray.store.protocol import Delta, Held
from delve_ray.store.saving import Saver
from tests.stores import LAYERS, Keeper, Worker, config, rows, silent, source, until, written


def saved_store(savefile: str, every: float = 0.02, **changes: Any) -> CovarianceStore:
    own = config(savefile=savefile, save_to=("parquet",), snapshot_every=every, **changes)
    return CovarianceStore(own, saver=Saver(Storage(savefile), every))


def test_a_window_is_published_without_the_rank_that_is_late_and_corrected_when_it_comes(
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = CovarianceStore(config(world_size=3), writers=[keeper := Keeper()])
    workers = [Worker(store, rank) for rank in range(3)]
    parts = [rows(10 + rank, 3) for rank in range(3)]
    for worker, part in zip(workers[:2], parts, strict=False):
        worker.send({(0, 0): part}, step=4, closes=True)
    workers[2].send({(0, 0): parts[2][:5]}, step=4)  # live, before the deadline
    store.config = replace(store.config, late_after=0.1)
    until(lambda: keeper.windows, "the deadline")
    (first,) = keeper.windows
    assert (first.workers, first.world_size, first.rows[0].samples, first.final) == (2, 3, 26, True)
    assert "step 4 is published without ranks [2]" in caplog.text
    assert store.progress().published == 1, "nobody waits for the late one"
    workers[2].send({(0, 0): parts[2][5:]}, step=4, closes=True)
    until(lambda: len(keeper.windows) == 2, "the correction")
    corrected = keeper.windows[1]
    assert (corrected.workers, corrected.revision, corrected.rows[0].samples) == (3, 1, 33)
    reference = np.cov(np.concatenate(parts).T, bias=True)
    assert np.allclose(store.covariance("conv", "train"), reference, rtol=1e-12)
    until(lambda: store.status()["waiting_windows"] == 0, "a window that all have closed is settled")


def test_windows_that_wait_for_a_late_rank_lie_in_files(savefile: str) -> None:
    store = saved_store(savefile, late_after=0.05)
    fast, slow = Worker(store, 0), Worker(store, 1)
    mine = [rows(20 + step, 5) for step in range(6)]
    theirs = [rows(7 + step, 5, 50.0) for step in range(6)]
    for step in range(6):
        fast.send({(1, 0): mine[step]}, step=step, closes=True)
    until(lambda: store.status()["parked_windows"] == 6, "all of them wait, and none in memory")
    assert store.status()["bytes"] == 8 * 15, "only what `covariance` answers from"
    assert [r["workers"] for r in read_spectra(savefile).to_pylist()] == [1] * 6
    for step in range(6):
        slow.send({(1, 0): theirs[step]}, step=step, closes=True)
    until(lambda: store.status()["waiting_windows"] == 0, "every one is corrected")
    fast.leave()
    assert slow.leave().finished
    assert store.wait_finished(60)
    for row in read_covariances(savefile).to_pylist():
        together = np.concatenate([mine[row["step"]], theirs[row["step"]]])
        assert (row["samples"], row["workers"], row["revision"]) == (len(together), 2, 1)
        assert np.allclose(unpack_triangle(row["covariance"], 5), np.cov(together.T, bias=True), rtol=1e-10)
    assert [name for name in os.listdir(Path(savefile, "store")) if name.startswith("window")] == []


def test_a_late_rank_that_closes_an_empty_share_completes_the_window(savefile: str) -> None:
    store = saved_store(savefile, late_after=0.05)
    fast, slow = Worker(store, 0), Worker(store, 1)
    fast.send({(1, 0): rows(20, 5)}, step=0, closes=True)
    until(lambda: store.status()["parked_windows"] == 1)
    slow.send({}, step=0, closes=True)
    until(lambda: [r["workers"] for r in read_spectra(savefile).to_pylist()] == [2])
    (row,) = read_spectra(savefile).to_pylist()
    assert (row["samples"], row["revision"]) == (20, 1)


def test_a_parked_window_that_is_damaged_is_named_and_the_run_goes_on(savefile: str) -> None:
    store = saved_store(savefile, late_after=0.05)
    fast, slow = Worker(store, 0), Worker(store, 1)
    fast.send({(1, 0): rows(20, 5)}, step=0, closes=True)
    until(lambda: store.status()["parked_windows"] == 1)
    (parked,) = Path(savefile, "store").glob("window-*")
    parked.write_bytes(parked.read_bytes()[:-3])
    slow.send({(1, 0): rows(9, 5)}, step=0, closes=True)
    until(lambda: any("is cut" in problem for problem in store.progress().problems))
    until(lambda: len(read_spectra(savefile, attempts="all").to_pylist()) == 1)
    until(lambda: read_spectra(savefile).to_pylist()[0]["revision"] == 1)
    (row,) = read_spectra(savefile).to_pylist()
    assert (row["samples"], row["workers"]) == (9, 1), "what is lost does not count as complete"


def test_nothing_waits_for_a_rank_that_is_silent_for_long() -> None:
    store = CovarianceStore(config(late_after=0.0, silent_after=1000.0), writers=[keeper := Keeper()])
    alive, dead = Worker(store, 0), Worker(store, 1)
    dead.send({(0, 0): rows(3, 3)}, step=0)
    alive.send({(0, 0): rows(5, 3)}, step=0, closes=True)
    silent(store, 1, 1001.0)
    until(lambda: keeper.windows, "the other rank is given up")
    assert (keeper.windows[0].workers, keeper.windows[0].rows[0].samples) == (1, 8)
    alive.send({(0, 0): rows(6, 3)}, step=1, closes=True)
    until(lambda: len(keeper.windows) == 2)
    until(lambda: store.status()["waiting_windows"] == 0)
    late = store.take(*dead.next({(0, 0): rows(4, 3)}, step=0, closes=True))
    assert (late.late, late.merged, late.next_seq) == (True, False, 2), "taken note of, and left out"
    assert store.status()["late"] == 1


def test_a_worker_that_takes_over_a_rank_goes_on_where_the_others_are() -> None:
    store = CovarianceStore(config(), writers=[keeper := Keeper()])
    stays, dies = Worker(store, 0, token="t"), Worker(store, 1, token="t")
    for worker in (stays, dies):
        worker.send({(0, 0): rows(5, 3)}, step=0, closes=True)
    dies.send({(0, 0): rows(4, 3)}, step=1)
    stays.send({(0, 0): rows(5, 3)}, step=1, closes=True)
    with pytest.raises(RegistrationError, match="rank 1 of run 'r' is tracked already"):
        Worker(store, 1, token="t", name="second tracker of the same process")
    other = Worker(store, 1, token="t", name="other", pid=500)
    assert other.window == 2, "the window that the others are at"
    with pytest.raises(DeltaRefused, match="has been replaced by pid 501"):
        dies.send({(0, 0): rows(4, 3)}, step=1, closes=True)
    for worker in (stays, other):
        worker.send({(0, 0): rows(6, 3)}, step=2, closes=True)
    for worker in (stays, other):
        worker.send({(0, 0): rows(7, 3)}, step=3, closes=True)
    stays.leave()
    assert other.leave().finished
    assert store.wait_finished(60)
    found = {w.step: (w.workers, w.rows[0].samples) for w in keeper.windows}
    assert found == {0: (2, 10), 1: (1, 9), 2: (1, 12), 3: (2, 14)}


def test_a_new_attempt_may_have_another_world_size() -> None:
    store = CovarianceStore(config(), writers=[keeper := Keeper()])
    for rank in range(2):
        Worker(store, rank, token="one").send({(0, 0): rows(5, 3)}, step=0, closes=True)
    larger = replace(store.config, world_size=3)
    new = [Worker(store, rank, options=larger, token="two") for rank in range(3)]
    with pytest.raises(RegistrationError, match="brings world_size=2, but run 'r' has world_size=3"):
        Worker(store, 0, options=config(), token="two", name="odd", pid=900)
    for worker in new:
        worker.send({(0, 0): rows(5, 3)}, step=0, closes=True)
    written(store, 1)
    assert [(w.attempt, w.world_size, w.workers) for w in keeper.windows] == [(0, 2, 2), (1, 3, 3)]
    with pytest.raises(RegistrationError, match="belongs to an earlier attempt"):
        Worker(store, 0, token="one", name="late")


def test_a_straggler_of_the_attempt_before_corrects_what_is_not_replayed() -> None:
    store = CovarianceStore(config(late_after=0.05), writers=[keeper := Keeper()])
    old = [Worker(store, rank, token="one") for rank in range(2)]
    for step in range(3):
        old[0].send({(0, 0): rows(5, 3)}, step=step, closes=True)
    until(lambda: len(keeper.windows) == 3, "published without rank 1")
    store.config = replace(store.config, late_after=0.0)
    new = [Worker(store, rank, token="two") for rank in range(2)]
    for worker in new:
        worker.send({(0, 0): rows(9, 3)}, step=1, closes=True)
    old[1].send({(0, 0): rows(6, 3)}, step=0, closes=True)
    until(lambda: len(keeper.windows) == 5)
    found = [(w.attempt, w.step, w.revision, w.workers, w.rows[0].samples) for w in keeper.windows]
    assert sorted(found)[:2] == [(0, 0, 0, 1, 5), (0, 0, 1, 2, 11)]
    with pytest.raises(DeltaRefused, match="attempt 1 replays from step 1"):
        old[1].send({(0, 0): rows(6, 3)}, step=1, closes=True)


def test_a_source_that_a_store_has_lost_says_what_it_still_has() -> None:
    """A store without its snapshots: what the sources had already forgotten is missing, and the row says whose."""
    store = CovarianceStore(config(), writers=[keeper := Keeper()])
    for rank, held in enumerate((Held(2, 14, 7, whole=True), Held(2, 9, 7, whole=False))):
        assert store.register(source(rank, token="t"), store.config, LAYERS, held).attempt == 2
        delta = Delta(source(rank, token="t"), 2, held.seq, 7, 70, True, True, ())
        assert store.take(delta.sealed(np.empty(0)), np.empty(0)).merged
    written(store, 8)
    assert [(w.attempt, w.window, w.step, w.workers) for w in keeper.windows] == [(2, 7, 70, 1)]
