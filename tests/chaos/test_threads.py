"""The store's core under many threads: exact totals, and nobody waits for decomposing, writing or packing."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from delve_ray import SaturationTracker, read_covariances, read_spectra, spectrum
from delve_ray.moments import F64, PackedTotal, unpack_triangle
from delve_ray.storage import Storage
from delve_ray.store import publisher
from delve_ray.store.core import CovarianceStore
from delve_ray.store.run_file import RunFile, read_run
from delve_ray.store.saving import Saver
from delve_ray.store.window import Entry, Window
from tests.chaos.processes import REPOSITORY, times
from tests.helpers import covariance_error, two_pass_covariance
from tests.stores import LAYERS, Keeper, Worker, config, source, until

SOURCES = 16
WINDOWS = 4
DELTAS = 12
"""Per source and window; half of them come twice, all of them in any order."""


@pytest.fixture(autouse=True)
def restless() -> Iterator[None]:
    """Threads change places a thousand times as often as usual, which shows what is not locked."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(usual / 1000)
    yield
    sys.setswitchinterval(usual)


def plan(worker: Worker, rng: np.random.Generator, kept: dict[int, list[F64]]) -> list[Any]:
    """A source's deltas, those of a few windows at a time shuffled, and some of them twice."""
    deltas = []
    for window in range(WINDOWS):
        for index in range(DELTAS):
            part = rng.normal(size=(int(rng.integers(1, 9)), 5)) * np.linspace(1, 4, 5) + 30
            kept[window].append(part)
            deltas.append(worker.next({(1, 0): part}, step=window, closes=index == DELTAS - 1))
    order = random.Random(worker.source.rank)
    twice = deltas + order.sample(deltas, len(deltas) // 2)
    order.shuffle(twice)
    return twice


@pytest.mark.parametrize("seed", range(times(3)))
def test_totals_are_exact_whatever_the_threads_do(savefile: str, seed: int) -> None:
    own = config(savefile=savefile, save_to=("parquet",), world_size=SOURCES, publish_every=0.01, snapshot_every=0.01)
    saver = Saver(Storage(savefile), 0.01)
    store = CovarianceStore(own, saver=saver)
    rng = np.random.default_rng(seed)
    kept: dict[int, list[F64]] = {window: [] for window in range(WINDOWS)}
    workers = [Worker(store, rank) for rank in range(SOURCES)]
    plans = [plan(worker, rng, kept) for worker in workers]
    stopping, failures = threading.Event(), list[BaseException]()

    def guarded(work: Callable[[], object], *, repeat: bool) -> threading.Thread:
        def run() -> None:
            try:
                while True:
                    work()
                    if not repeat or stopping.is_set():
                        return
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        return thread

    def ask() -> None:
        store.status()
        store.progress()
        store.heartbeat(source(3))
        store.freeze()
        saver.hurry()
        store.flush(30)

    askers = [guarded(ask, repeat=True) for _ in range(3)]
    senders = [guarded(lambda p=p: [store.take(*delta) for delta in p], repeat=False) for p in plans]  # type: ignore[misc]
    for thread in senders:
        thread.join(120)
        assert not thread.is_alive(), "a deadlock"
    stopping.set()
    for thread in askers:
        thread.join(60)
        assert not thread.is_alive(), "a deadlock"
    assert failures == []
    assert store.counts["repeated"] == SOURCES * WINDOWS * DELTAS // 2
    for worker in workers:
        worker.leave()
    assert store.wait_finished(60)
    rows = read_covariances(savefile).to_pylist()
    assert [(row["step"], row["workers"], row["final"]) for row in rows] == [(w, SOURCES, True) for w in range(WINDOWS)]
    for row in rows:
        everything = np.concatenate(kept[row["step"]])
        assert row["samples"] == len(everything)
        error = covariance_error(unpack_triangle(row["covariance"], 5), two_pass_covariance(everything))
        assert error < 1e-12


@pytest.mark.parametrize("seed", range(times(2)))
def test_a_training_goes_on_while_others_ask_and_close(savefile: str, seed: int) -> None:
    """Tiny batches, a window after each, live rows all the time; then two threads close it at once."""
    chance = random.Random(seed)
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(5)))
    tracker = SaturationTracker(savefile, "parquet", model, publish_every=0.005)
    failures = list[Exception]()
    over = threading.Event()

    def ask() -> None:
        while not over.is_set():
            try:
                tracker.metrics()
                tracker.store.status()
                tracker.add_scalar("asked", 1.0)
                tracker.flush(60)
            except Exception as error:
                if "after close()" not in str(error):
                    failures.append(error)
                return

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    sent = [chance.randrange(1, 30) for _ in range(chance.randrange(10, 40))]
    for step, count in enumerate(sent):
        model(torch.randn(count, 6))
        tracker.add_saturations(step)
    closing = [threading.Thread(target=tracker.close, args=(60,), daemon=True) for _ in range(2)]
    for thread in closing:
        thread.start()
    for thread in closing:
        thread.join(120)
        assert not thread.is_alive(), "a deadlock"
    over.set()
    asking.join(60)
    assert not asking.is_alive(), "a deadlock"
    assert failures == []
    rows = read_spectra(savefile).to_pylist()
    found = {(row["step"], row["layer"]): (row["samples"], row["workers"], row["final"]) for row in rows}
    assert found == {(step, str(layer)): (count, 1, True) for step, count in enumerate(sent) for layer in range(5)}
    last = [row["saturation"] for row in rows if row["step"] == len(sent) - 1]
    assert tracker.metrics()["saturation/train/mean"] == pytest.approx(sum(last) / 5)


class Gate:
    """Something that takes its time: whoever comes is held until it opens."""

    def __init__(self, work: Callable[..., Any]) -> None:
        self.work = work
        self.open = threading.Event()
        self.entered = threading.Event()

    def __call__(self, *args: Any, **options: Any) -> Any:
        opening = self.open
        self.entered.set()
        assert opening.wait(60)
        return self.work(*args, **options)


def goes_on(store: CovarianceStore, workers: list[Worker], gate: Gate) -> None:
    """While one thing is held at the gate, deltas are merged and questions answered."""
    assert gate.entered.wait(60)
    before = store.status()["ranks"][1]["deltas"]
    done = threading.Event()

    def use() -> None:
        for _ in range(5):
            workers[1].send({(0, 0): np.eye(3), (1, 0): np.eye(5)})
            store.heartbeat(workers[0].source)
            store.progress()
            store.status()
        Worker(store, 2)
        done.set()

    threading.Thread(target=use, daemon=True).start()
    assert done.wait(60), "somebody waits for a lock that is held meanwhile"
    assert not gate.open.is_set()
    assert store.status()["ranks"][1]["deltas"] == before + 5
    gate.open.set()


@pytest.fixture
def workers(savefile: str) -> tuple[CovarianceStore, list[Worker]]:
    own = config(savefile=savefile, world_size=3, late_after=0.01, snapshot_every=3600.0)
    saver = Saver(Storage(savefile), 3600.0)
    store = CovarianceStore(own, writers=[Keeper()], saver=saver)
    team = [Worker(store, rank) for rank in range(2)]

    def at_leisure() -> bool:
        with saver._changed:
            return saver._due_in() > 60

    until(at_leisure, "a registration is saved in a hurry, and a cut would wait for what the tests hold up")
    return store, team


def test_nobody_waits_for_a_decomposition(
    workers: tuple[CovarianceStore, list[Worker]], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, team = workers
    monkeypatch.setattr(spectrum, "eigenvalues", gate := Gate(spectrum.eigenvalues))
    team[0].send({(0, 0): np.eye(3), (1, 0): np.eye(5)}, closes=True)
    goes_on(store, team, gate)


def test_nobody_waits_for_a_writer(workers: tuple[CovarianceStore, list[Worker]]) -> None:
    store, team = workers
    writer = store.running().writers[0].writer
    writer.write = gate = Gate(writer.write)  # type: ignore[method-assign]
    team[0].send({(0, 0): np.eye(3)}, closes=True)
    goes_on(store, team, gate)


def test_nobody_waits_for_a_snapshot_to_be_packed_and_written(
    workers: tuple[CovarianceStore, list[Worker]], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, team = workers
    assert store.saver is not None
    team[0].send({(0, 0): np.eye(3)})
    monkeypatch.setattr(store.saver, "_put", gate := Gate(store.saver._put))
    store.saver.hurry()
    goes_on(store, team, gate)


def test_nobody_waits_for_moments_to_be_merged_for_a_reader(
    workers: tuple[CovarianceStore, list[Worker]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a snapshot or a publication needs is put together outside of the locks that deltas need."""
    store, team = workers
    assert store.saver is not None
    team[0].send({(0, 0): np.eye(3)})
    collect, gate = Entry.collect, Gate(lambda self, parts: collect(self, parts))
    monkeypatch.setattr(Entry, "collect", lambda self, parts: gate(self, parts))
    store.saver.hurry()
    goes_on(store, team, gate)


def test_the_publisher_does_not_wait_for_the_saver(savefile: str) -> None:
    own = config(savefile=savefile, world_size=1, snapshot_every=3600.0)
    saver = Saver(Storage(savefile), 3600.0)
    store = CovarianceStore(own, writers=[keeper := Keeper()], saver=saver)
    worker = Worker(store, 0)
    saver._put = gate = Gate(saver._put)  # type: ignore[method-assign]
    worker.send({(0, 0): np.eye(3)}, closes=True)
    saver.hurry()
    assert gate.entered.wait(60)
    until(lambda: keeper.windows)
    assert not gate.open.is_set()
    gate.open.set()


def test_nobody_waits_for_a_delta_that_is_merged(
    workers: tuple[CovarianceStore, list[Worker]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One source's delta is being merged, and another one's for the same layer comes to wait for it."""
    store, team = workers
    for worker in team:
        worker.send({(1, 0): np.eye(5)})
    add = PackedTotal.add
    gate = Gate(add)
    monkeypatch.setattr(
        PackedTotal, "add", lambda self, n, *rest: gate(self, n, *rest) if n == 5 else add(self, n, *rest)
    )
    deltas = [worker.next({(1, 0): np.eye(5)}) for worker in team]
    threads = [threading.Thread(target=store.take, args=delta, daemon=True) for delta in deltas]
    threads[0].start()
    assert gate.entered.wait(60)
    threads[1].start()
    threads[1].join(0.3)  # until it is as far as it gets
    done = threading.Event()

    def use() -> None:
        third = Worker(store, 2)
        third.send({(0, 0): np.ones((2, 3))})
        for worker in team:
            store.heartbeat(worker.source)
        store.progress()
        store.status()
        done.set()

    threading.Thread(target=use, daemon=True).start()
    waited = not done.wait(20)
    gate.open.set()
    assert not waited, "somebody waits for a lock that is held meanwhile"
    for thread in threads:
        thread.join(60)
    assert [status["deltas"] for status in store.status()["ranks"].values()] == [2, 2, 1]


def test_a_window_is_not_parked_while_a_late_delta_is_merged(savefile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The window's file has been written when the delta comes, and its entries are let go before that is merged."""
    own = config(savefile=savefile, save_to=("parquet",), late_after=0.01, snapshot_every=0.01)
    store = CovarianceStore(own, saver=Saver(Storage(savefile), 0.01))
    first, late = Worker(store, 0), Worker(store, 1)
    first.send({(0, 0): np.eye(3)}, closes=True)
    delta = late.next({(0, 0): np.ones((4, 3))}, closes=True)
    taking = threading.Thread(target=store.take, args=delta, daemon=True)
    merging, parked = threading.Event(), threading.Event()
    written, parking, adding = Storage.write_atomic, CovarianceStore.parked, Entry.add

    def write_atomic(self: Storage, name: str, data: Any) -> None:
        written(self, name, data)
        if "/window-" in name and not merging.is_set():
            taking.start()
            assert merging.wait(60)

    def park(self: CovarianceStore, handle: Window, version: int, name: str) -> None:
        threading.Timer(0.3, parked.set).start()  # if parking waits for the delta, the delta goes on
        parking(self, handle, version, name)
        parked.set()

    def add(self: Entry, *moments: Any) -> None:
        merging.set()
        assert parked.wait(60)
        adding(self, *moments)

    monkeypatch.setattr(Entry, "add", add)
    monkeypatch.setattr(CovarianceStore, "parked", park)
    monkeypatch.setattr(Storage, "write_atomic", write_atomic)
    assert merging.wait(60)
    taking.join(20)
    for worker in (first, late):
        worker.leave()
    assert store.wait_finished(60)
    (row,) = read_covariances(savefile).to_pylist()
    assert (row["samples"], row["workers"]) == (7, 2)


def test_a_layer_whose_first_delta_is_being_merged_has_no_row_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    """A live row of no observations would say that its saturation has fallen to 0."""
    store = CovarianceStore(config(world_size=1), writers=[keeper := Keeper()])
    worker = Worker(store, 0)
    worker.send({(0, 1): np.eye(3)})
    add, gate = PackedTotal.add, Gate(PackedTotal.add)
    monkeypatch.setattr(
        PackedTotal, "add", lambda self, n, *rest: gate(self, n, *rest) if n == 4 else add(self, n, *rest)
    )
    frozen, freeze = threading.Event(), Entry.freeze

    def noted(self: Entry) -> Any:
        cut = freeze(self)
        if self.features == 5:
            frozen.set()
        return cut

    monkeypatch.setattr(Entry, "freeze", noted)
    delta = worker.next({(0, 0): np.ones((4, 3)), (1, 0): np.ones((6, 5))})
    taking = threading.Thread(target=store.take, args=delta, daemon=True)
    taking.start()
    assert gate.entered.wait(20)
    flushing = threading.Thread(target=store.flush, args=(20,), daemon=True)
    flushing.start()
    assert frozen.wait(20), "the wide layer, which is merged after the other"
    gate.open.set()
    flushing.join(20)
    taking.join(20)
    assert store.flush(20)
    live = [{(row.layer, row.phase): row.samples for row in window.rows} for window in keeper.windows]
    both = {("conv", "train"): 4, ("conv", "eval"): 3}
    assert live == [both, both | {("fc", "train"): 6}]


def test_what_somebody_else_has_brought_back_is_not_lost(savefile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two want a parked window at once, and its file goes once the first has it."""
    store = CovarianceStore(config(savefile=savefile, save_to=("parquet",), world_size=1))
    worker = Worker(store, 0)
    worker.send({(0, 0): np.eye(3)})
    (window,) = store.attempts[-1].windows.values()
    window.parked = "window-of-both"

    def gone(*_: object) -> Any:
        window.parked = None  # the other one has been here
        raise FileNotFoundError("window-of-both")

    monkeypatch.setattr("delve_ray.store.saved.load_window", gone)
    store.unpark(window)
    assert store.progress().problems == ()
    assert [entry.n for entry in window.entries.values()] == [3]
    assert window.broken == set()


def test_a_window_that_cannot_be_published_holds_up_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it is: the publisher's thread goes on, and says it."""
    store = CovarianceStore(config(world_size=1), writers=[keeper := Keeper()])
    worker = Worker(store, 0)
    metrics = publisher.window_metrics
    faults = iter([RuntimeError("nobody has foreseen this")])

    def fail_once(rows: Any) -> Any:
        for fault in faults:
            raise fault
        return metrics(rows)

    monkeypatch.setattr(publisher, "window_metrics", fail_once)
    for step in range(2):
        worker.send({(0, 0): np.eye(3)}, step=step, closes=True)
    until(lambda: store.progress().published == 2)
    assert store.flush(20)
    assert [window.step for window in keeper.windows] == [1]
    (problem,) = store.progress().problems
    assert problem == "step 0 cannot be published: RuntimeError: nobody has foreseen this"


def test_a_store_that_fails_its_publisher_once_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    poll, calls = CovarianceStore.poll, list[int]()

    def fail_twice(self: CovarianceStore) -> Any:
        calls.append(len(calls))
        if len(calls) < 3:
            raise RuntimeError("nobody has foreseen this")
        return poll(self)

    monkeypatch.setattr(CovarianceStore, "poll", fail_twice)
    monkeypatch.setattr(publisher, "_POLL_S", 0.01)
    store = CovarianceStore(config(world_size=1), writers=[Keeper()])
    worker = Worker(store, 0)
    until(lambda: len(calls) > 3)
    worker.send({(0, 0): np.eye(3)}, closes=True)
    until(lambda: store.progress().published == 1)
    (problem,) = store.progress().problems
    assert "RuntimeError: nobody has foreseen this" in problem


def test_no_older_description_of_a_run_replaces_a_newer_one(savefile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A registration writes it, and so does the publisher."""
    file = RunFile(Storage(savefile), config(savefile=savefile), LAYERS)
    file.begin_attempt(0, 2)
    gate = Gate(Storage.write_atomic)
    monkeypatch.setattr(Storage, "write_atomic", lambda self, *content: gate(self, *content))
    first = threading.Thread(target=file.write_if_changed, daemon=True)
    first.start()
    assert gate.entered.wait(20)
    file.begin_attempt(1, 2)
    gate.open, held = threading.Event(), gate.open
    gate.open.set()  # for the second one
    second = threading.Thread(target=file.write_if_changed, daemon=True)
    second.start()
    second.join(0.3)  # until it is as far as it gets
    held.set()
    first.join(20)
    second.join(20)
    assert [attempt["attempt"] for attempt in read_run(Storage(savefile))["attempts"]] == [0, 1]


TRACKERS = """
import threading, torch
from delve_ray import SaturationTracker
ready, problems = threading.Barrier(8), []
def make(number):
    ready.wait()
    try:
        SaturationTracker(f"run-{number}", modules=torch.nn.Linear(2, 2), nosave=True).close()
    except Exception as error:
        problems.append(error)
threads = [threading.Thread(target=make, args=(number,)) for number in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(problems)
"""


@pytest.mark.slow
def test_several_threads_make_trackers_at_once(tmp_path: Path) -> None:
    """The first one in a process prepares what all of them share."""
    environment = {"PYTHONPATH": REPOSITORY, "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", TRACKERS], capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120
    )
    assert done.stdout.strip() == "[]", done.stderr
