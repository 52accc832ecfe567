"""The worker's side: it goes on without the store, within its memory, and everything arrives."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from delve_ray import SaturationTracker, StoreError, read_covariances, read_scalars, read_spectra
from delve_ray.errors import UnknownSource
from delve_ray.host_accumulator import HostAccumulator
from delve_ray.memory import worker_bytes
from delve_ray.moments import unpack_triangle
from delve_ray.outbox import Outbox
from delve_ray.packing import Packer
from delve_ray.recorder import Recorder
from delve_ray.shipping import Shipper, heartbeat_s
from delve_ray.store.core import CovarianceStore
from delve_ray.store.protocol import Ack, Delta, Held, LayerInfo, Progress
from tests.stores import config, until

FEATURES = 60


class Link:
    """A store as a worker reaches it: away, or slow to say so, or forgetful."""

    def __init__(self, store: CovarianceStore) -> None:
        self.store = store
        self.reachable = threading.Event()
        self.reachable.set()
        self.hang = False
        self.calls = 0
        self.asked = 0  # for the metrics
        self.loses_metrics = False

    def _go(self) -> None:
        self.calls += 1
        if self.hang:
            self.reachable.wait(30)
        elif not self.reachable.is_set():
            raise StoreError("no answer")

    def take(self, delta: Delta, buffer: Any) -> Ack:
        self._go()
        return self.store.take(delta, buffer)

    def heartbeat(self, source: Any, outbox: Any = None) -> Ack:
        self._go()
        ack = self.store.heartbeat(source, outbox)
        return replace(ack, metrics=None) if self.loses_metrics else ack

    def progress(self, timeout: float = 0.0) -> Progress:
        self.asked += 1
        return self.store.progress(timeout)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)


def link_of(tracker: SaturationTracker) -> Link:
    link = Link(tracker._shipper.store)  # type: ignore[arg-type]
    tracker._shipper.store = tracker._store = link  # type: ignore[assignment]
    return link


@pytest.mark.parametrize("hang", [False, True])
def test_what_closes_while_the_store_is_away_waits_on_disk_and_arrives(
    savefile: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hang: bool
) -> None:
    monkeypatch.setattr("delve_ray.shipping.RETRY_S", (0.01, 0.02))
    monkeypatch.setattr("delve_ray.memory.MIN_OUTBOX_BYTES", 0)
    model = nn.Linear(8, FEATURES)
    tracker = SaturationTracker(savefile, "parquet", model, stats="cov", publish_every=0, spill_dir=tmp_path / "spill")
    link = link_of(tracker)
    link.hang = hang
    link.reachable.clear()
    kept = []
    delta_bytes = 8 * (FEATURES + FEATURES * (FEATURES + 1) // 2)
    for step in range(40):
        kept.append(model(torch.randn(70 + step, 8)).detach().double().numpy())
        tracker.add_scalar("step_done", step)
        tracker.add_saturations(step)
    outbox = tracker._shipper.outbox
    until(lambda: outbox.status()["deltas"] >= 40)
    bound = 2 * delta_bytes  # one delta of both phases, and the one that is being sent
    until(lambda: outbox.status()["memory_bytes"] <= bound, "the last one does not go to the disk")
    assert outbox.status()["on_disk"] >= 37
    link.reachable.set()
    tracker.close()
    assert not list((tmp_path / "spill").iterdir()), "nothing is left behind"
    rows = read_covariances(savefile).to_pylist()
    assert [(row["step"], row["samples"], row["workers"]) for row in rows] == [(s, 70 + s, 1) for s in range(40)]
    for row in rows:
        error = unpack_triangle(row["covariance"], FEATURES) - np.cov(kept[row["step"]].T, bias=True)
        assert np.abs(error).max() < 1e-6
    assert [(r["step"], r["value"]) for r in read_scalars(savefile).to_pylist()] == [(s, float(s)) for s in range(40)]


def test_windows_that_close_faster_than_they_are_packed_stay_within_max_memory(
    savefile: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = nn.Linear(8, FEATURES)
    waiting, pack = threading.Event(), Packer.__call__
    slow = lambda self, *args: (waiting.wait(30), pack(self, *args))[1]  # noqa: E731
    monkeypatch.setattr(Packer, "__call__", slow)
    limit = worker_bytes([FEATURES]) + 500_000
    tracker = SaturationTracker(savefile, "parquet", model, publish_every=0, max_memory=limit)
    for step in range(30):
        model(torch.randn(9, 8))
        tracker.add_saturations(step)
        assert sum(item.nbytes for item in tracker._shipper._queue) <= 500_000
    assert "windows close faster than they can be packed" in caplog.text
    waiting.set()
    tracker.close()
    rows = {row["step"]: row["workers"] for row in read_spectra(savefile).to_pylist()}
    lost = sorted(set(range(30)) - set(rows))
    assert lost, "their rows are given up"
    assert lost == list(range(lost[0], 30))
    assert set(rows.values()) == {1}, "what is published is complete"


def test_nobody_looks_into_what_is_being_packed(savefile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the packer takes it apart meanwhile."""
    model = nn.Sequential(nn.Linear(8, 5), nn.Linear(5, 3))
    taken, go_on = threading.Event(), threading.Event()
    drain, held_bytes = HostAccumulator.drain_into, HostAccumulator.held_bytes.fget
    drained, asked = [], []

    def slow_drain(self: HostAccumulator, *args: Any) -> Any:
        drained.append(self)
        taken.set()
        assert go_on.wait(30)
        return drain(self, *args)

    def noted_bytes(self: HostAccumulator) -> int:
        assert held_bytes is not None
        asked.append(self)
        return held_bytes(self)

    monkeypatch.setattr(HostAccumulator, "drain_into", slow_drain)
    tracker = SaturationTracker(savefile, "parquet", model, publish_every=0)
    model(torch.randn(9, 8))
    tracker.add_saturations(0)
    assert taken.wait(30)
    monkeypatch.setattr(HostAccumulator, "held_bytes", property(noted_bytes))
    model(torch.randn(9, 8))
    tracker.add_saturations(1)
    assert len(asked) == 2, "those of the window that waits"
    assert drained[0] not in asked
    first, second = (item.nbytes for item in tracker._shipper._queue)
    assert first == second > 0, "of what is being packed as many as it held"
    go_on.set()
    tracker.close()
    assert {row["step"]: row["workers"] for row in read_spectra(savefile).to_pylist()} == {0: 1, 1: 1}


def test_an_incomplete_share_does_not_count_as_a_complete_one(savefile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CovarianceStore(config(savefile=savefile, save_to=("parquet",)))
    models = [nn.Linear(4, 3) for _ in range(2)]
    trackers = [
        SaturationTracker(modules=model, store=store, rank=rank, publish_every=0) for rank, model in enumerate(models)
    ]
    waiting, pack = threading.Event(), Packer.__call__
    monkeypatch.setattr(Packer, "__call__", lambda self, *args: (waiting.wait(30), pack(self, *args))[1])
    spare = property(lambda self: 0 if self is trackers[1]._recorder else 1 << 30)
    monkeypatch.setattr("delve_ray.recorder.Recorder.spare_bytes", spare)
    for step in range(3):
        for model, tracker in zip(models, trackers, strict=True):
            model(torch.randn(10, 4))
            tracker.add_saturations(step)
    waiting.set()
    for tracker in trackers:
        tracker.close()
    found = [(row["step"], row["samples"], row["workers"]) for row in read_spectra(savefile).to_pylist()]
    assert found == [(0, 20, 2), (1, 10, 1), (2, 10, 1)]


def test_a_store_says_what_waits_at_its_workers(savefile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("delve_ray.shipping.HEARTBEAT_S", 0.01)
    with SaturationTracker(savefile, "parquet", nn.Linear(3, 3)) as tracker:
        until(lambda: tracker.store.status()["ranks"][0]["outbox"] == tracker._shipper.outbox.status())
        assert tracker.store.status()["ranks"][0]["outbox"]["deltas"] == 0


def test_a_store_that_has_forgotten_a_worker_gets_it_back(savefile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that lost everything, files apart: the worker registers again with what it still has."""
    monkeypatch.setattr("delve_ray.shipping.RETRY_S", (0.01, 0.02))
    model = nn.Linear(4, 3)
    tracker = SaturationTracker(savefile, "parquet", model, publish_every=0)
    model(torch.randn(10, 4))
    tracker.add_saturations(0)
    tracker.metrics(wait=True)
    forgetful = CovarianceStore(replace(tracker._config, resume=True))
    layers = [LayerInfo("Linear", "Linear", 3)]
    tracker._shipper.store = tracker._store = Link(forgetful)  # type: ignore[assignment]
    tracker._shipper._rejoin = partial(forgetful.register, tracker._source, tracker._config, layers)
    with pytest.raises(UnknownSource):
        forgetful.heartbeat(tracker._source)
    for step in (1, 2):
        model(torch.randn(20 + step, 4))
        tracker.add_saturations(step)
    tracker.metrics(wait=True)
    tracker.close()
    found = [
        (row["step"], row["samples"], row["workers"], row["attempt"]) for row in read_spectra(savefile).to_pylist()
    ]
    assert found == [(0, 10, 1, 0), (1, 21, 1, 0), (2, 22, 1, 0)]


def test_a_close_that_was_interrupted_halfway_is_a_close(savefile: str) -> None:
    """Ctrl-C in a notebook, after the window was handed over and before that was noted."""
    model = nn.Linear(4, 3)
    with SaturationTracker(savefile, "parquet", model, publish_every=0) as tracker:
        for step in range(3):
            model(torch.randn(10 + step, 4))
            tracker.add_saturations(step)
            tracker._shipper.windows -= 1
        tracker.metrics(wait=True)
    rows = read_spectra(savefile).to_pylist()
    assert [(row["step"], row["samples"]) for row in rows] == [(0, 10), (1, 11), (2, 12)]


def test_layers_whose_width_nobody_knows_yet_take_no_memory(savefile: str) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(32, 3))
    with SaturationTracker(savefile, "parquet", model, conv_method="flatten", publish_every=0) as tracker:
        tracker.add_saturations(0)
        assert tracker._recorder.widths == [3]
        model(torch.randn(40, 1, 6, 6))
        tracker.add_saturations(1)
        assert sorted(tracker._recorder.widths) == [3, 32]
        tracker.metrics(wait=True)
    assert [(row["layer"], row["features"]) for row in read_spectra(savefile).to_pylist()] == [("0", 32), ("2", 3)]


def test_a_delta_costs_one_call_and_its_answer_brings_the_metrics(
    savefile: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Signs of life are for those who have nothing to send."""
    monkeypatch.setattr("delve_ray.shipping.HEARTBEAT_S", 1000.0)
    model = nn.Linear(FEATURES, 3)
    with SaturationTracker(savefile, "parquet", model, publish_every=0) as tracker:
        link = link_of(tracker)
        for window in range(3):
            model(torch.randn(20, FEATURES))
            tracker.add_saturations(step=window)
            until(lambda window=window: link.store.progress().published == window + 1)  # type: ignore[misc]
        assert link.calls == 3
        until(lambda: tracker.metrics(), "the answer to the second delta told of the first window")
        assert link.asked == 0
        assert set(tracker.metrics()) == set(tracker.metrics(wait=True))


@pytest.mark.parametrize("lost", [False, True])
def test_a_rank_hears_the_metrics_of_each_window_and_asks_where_an_answer_was_lost(
    savefile: str, monkeypatch: pytest.MonkeyPatch, lost: bool
) -> None:
    monkeypatch.setattr("delve_ray.shipping.HEARTBEAT_S", 0.01)
    model = nn.Linear(FEATURES, 3)
    with SaturationTracker(savefile, "parquet", model, publish_every=0) as tracker:
        until(lambda: tracker._shipper.last_ack is not None)  # it has heard that there are none
        link = link_of(tracker)
        link.loses_metrics = lost
        before: dict[str, float] = {}
        for window in range(3):
            model((window + 1) * torch.randn(20, FEATURES))
            tracker.add_saturations(step=window)
            until(lambda window=window: link.store.progress().published == window + 1)  # type: ignore[misc]
            published = dict(link.store.progress().metrics)
            assert published != before
            until(lambda published=published: tracker.metrics() == published)  # type: ignore[misc]
            before = published
        beats = link.calls
        until(lambda: link.calls > beats + 3, "signs of life without news")
        assert link.asked == (3 if lost else 0), "once for each window"


@pytest.mark.parametrize(
    ("ranks", "silent_after", "seconds"),
    [(1, 300.0, 5.0), (10_000, 300.0, 25.0), (10_000, 40.0, 10.0), (4000, 0.0, 10.0)],
)
def test_signs_of_life_are_rarer_with_thousands_of_ranks(ranks: int, silent_after: float, seconds: float) -> None:
    assert heartbeat_s(config(world_size=ranks, silent_after=silent_after)) == seconds


def test_metrics_that_were_asked_for_earlier_do_not_replace_later_ones(savefile: str) -> None:
    """The sender's question may be on its way when `metrics(wait=True)` asks, or `close`."""
    model = nn.Linear(4, 3)
    with SaturationTracker(savefile, "parquet", model, publish_every=0) as tracker:
        link = link_of(tracker)
        asked, go_on = threading.Event(), threading.Event()

        def slow(timeout: float) -> Progress:
            answer = link.store.progress(timeout)
            asked.set()
            assert go_on.wait(30)
            return answer

        link.progress = slow  # type: ignore[attr-defined]
        asking = threading.Thread(target=tracker._shipper.progress, daemon=True)
        asking.start()
        assert asked.wait(30)
        del link.progress  # type: ignore[attr-defined]
        model(torch.randn(9, 4))
        tracker.add_saturations(0)
        found = tracker.metrics(wait=True)
        assert found
        go_on.set()
        asking.join(30)
        assert tracker.metrics() == found


def test_a_signal_handler_closes_inside_a_hook_that_the_packer_waits_for(
    savefile: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hook holds the accumulators until the handler returns; the packer wants them for live rows."""
    waiting = threading.Event()
    live = Shipper.queue_live

    def noted(self: Shipper, *args: float) -> bool:
        waiting.set()
        return live(self, *args)

    model = nn.Linear(4, 3)
    tracker = SaturationTracker(savefile, "parquet", model, publish_every=0.01)
    model(torch.randn(9, 4))
    with tracker._recorder.lock:  # as in the hook that was interrupted
        monkeypatch.setattr(Shipper, "queue_live", noted)
        assert waiting.wait(30)
        tracker.close(timeout=20)
    assert [(row["samples"], row["workers"]) for row in read_spectra(savefile).to_pylist() if row["final"]] == [(9, 1)]


def test_nothing_is_recorded_again_once_nothing_can_be_delivered(savefile: str) -> None:
    with SaturationTracker(savefile, "parquet", nn.Linear(4, 3), publish_every=0) as tracker:
        tracker.stop()
        failed = threading.Event()

        def resume() -> None:
            with pytest.raises(StoreError, match="the store is gone"):
                tracker.resume()
            failed.set()

        resuming = threading.Thread(target=resume, daemon=True)
        with tracker._shipper._state:  # where the sender finds out
            resuming.start()
            resuming.join(0.3)  # until it is as far as it gets
            tracker._shipper.lost = "the store is gone"
        assert failed.wait(30)
        assert not tracker.is_recording()
        tracker._shipper.lost = None


def test_where_a_worker_is_is_known_as_soon_as_its_delta_is_offered(
    savefile: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store that is started anew asks for it, maybe before the packer has gone on."""
    packed, go_on = threading.Event(), threading.Event()
    excess = Outbox._excess

    def slow(self: Outbox, *args: Any, **options: Any) -> Any:
        packed.set()
        assert go_on.wait(30)
        return excess(self, *args, **options)

    monkeypatch.setattr(Outbox, "_excess", slow)
    model = nn.Linear(4, 3)
    with SaturationTracker(savefile, "parquet", model, publish_every=0) as tracker:
        model(torch.randn(9, 4))
        tracker.add_saturations(0)
        assert packed.wait(30)
        shipper, told = tracker._shipper, list[Held]()
        until(lambda: not len(shipper.outbox), "the store has it, and it is safe there")
        monkeypatch.setattr(shipper, "_rejoin", told.append)
        shipper._register_again()
        go_on.set()
    assert told == [Held(attempt=0, seq=1, window=1, whole=True)]


@pytest.mark.parametrize("broken", ["next", "put"])
def test_a_thread_that_fails_leaves_nobody_waiting(
    savefile: str, broken: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: Any, **options: Any) -> Any:
        raise RuntimeError("nobody has foreseen this")

    model = nn.Linear(4, 3)
    tracker = SaturationTracker(savefile, "parquet", model, publish_every=0)
    monkeypatch.setattr(Outbox, broken, fail)
    model(torch.randn(9, 4))
    tracker.add_saturations(0)
    with pytest.raises(StoreError, match="nobody has foreseen this"):
        tracker.flush(timeout=60)
    assert not tracker.is_recording()
    tracker.close()
    assert "cannot deliver its moments and records no more" in caplog.text


def test_a_store_that_ends_with_its_run_is_no_loss(savefile: str, caplog: pytest.LogCaptureFixture) -> None:
    """The last rank ends the store while its sender's sign of life is on its way."""

    def ask() -> None:
        raise StoreError("the store's process has ended", final=True)

    with SaturationTracker(savefile, "parquet", nn.Linear(4, 3), publish_every=0) as tracker:
        shipper = tracker._shipper
        shipper.leaving = True
        shipper._call(ask)
        assert shipper.lost is None
        shipper.leaving = False
        shipper._call(ask)
        assert shipper.lost == "StoreError: the store's process has ended"


def test_what_cannot_be_packed_before_the_end_is_said(
    savefile: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    go_on = threading.Event()
    drain = HostAccumulator.drain_into

    def slow_drain(self: HostAccumulator, *args: Any) -> Any:
        assert go_on.wait(60)
        return drain(self, *args)

    monkeypatch.setattr(HostAccumulator, "drain_into", slow_drain)
    monkeypatch.setattr("delve_ray.shipping.PACK_S", 0.1)
    model = nn.Linear(4, 3)
    tracker = SaturationTracker(savefile, "parquet", model, publish_every=0)
    model(torch.randn(9, 4))
    tracker.add_saturations(7)
    tracker.close(timeout=0.1)
    assert "rows of steps [7] are still on their device; they are lost" in caplog.text
    go_on.set()


class Asking(logging.Handler):
    """A handler of the user's that has another thread use the tracker, and waits for it."""

    def __init__(self, ask: Callable[[], object]) -> None:
        super().__init__(logging.ERROR)
        self._ask = ask
        self.answered: list[bool] = []

    def emit(self, record: logging.LogRecord) -> None:
        thread = threading.Thread(target=self._ask, daemon=True)
        thread.start()
        thread.join(10)
        self.answered.append(not thread.is_alive())


def test_no_lock_is_held_while_something_is_said(savefile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(4, 3)
    with SaturationTracker(savefile, "parquet", model, publish_every=0) as tracker:
        taken, go_on = threading.Event(), threading.Event()
        drain = HostAccumulator.drain_into

        def slow_drain(self: HostAccumulator, *args: Any) -> Any:
            taken.set()
            assert go_on.wait(60)
            return drain(self, *args)

        monkeypatch.setattr(HostAccumulator, "drain_into", slow_drain)
        monkeypatch.setattr(Recorder, "spare_bytes", 0)
        handler = Asking(lambda: tracker.add_scalar("errors", 1.0))
        logging.getLogger("delve_ray.packing_queue").addHandler(handler)
        try:
            for step in range(2):
                model(torch.randn(9, 4))
                tracker.add_saturations(step)
                assert taken.wait(30)
        finally:
            logging.getLogger("delve_ray.packing_queue").removeHandler(handler)
            go_on.set()
        assert handler.answered == [True]
