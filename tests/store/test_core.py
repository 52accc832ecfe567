"""The store's core: merging, windows, membership and what it refuses, without Ray."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from delve_ray import DeltaRefused, OptionError, RegistrationError, StoreError, read_covariances, read_spectra
from delve_ray.store.core import CovarianceStore
from delve_ray.store.protocol import Delta, LayerInfo
from tests.stores import LAYERS, RNG, Keeper, Worker, config, published, rows, silent, source, until, written


def test_two_workers_merge_to_the_covariance_of_all_rows() -> None:
    keeper = Keeper()
    store = CovarianceStore(config(), writers=[keeper])
    workers = [Worker(store, rank) for rank in range(2)]
    parts = [rows(n, 5, 1e5) for n in (7, 1, 400, 33)]
    for index, part in enumerate(parts):
        workers[index % 2].send({(1, 0): part})
    for worker in workers:
        worker.send({}, step=4, closes=True)
    written(store, 1)
    everything = np.concatenate(parts)
    reference = np.cov(everything.T, bias=True)
    assert np.abs(store.covariance("fc", "train") - reference).max() < 1e-9 * np.linalg.eigvalsh(reference)[-1]
    assert np.allclose(store.spectrum("fc", "train"), np.linalg.eigvalsh(reference)[::-1], rtol=1e-8)
    (window,) = keeper.windows
    assert (window.step, window.final, window.workers, window.revision) == (4, True, 2, 0)
    (row,) = window.rows
    assert (row.layer, row.phase, row.samples, row.features) == ("fc", "train", 441, 5)
    assert row.stats["trace"] == pytest.approx(np.trace(reference), rel=1e-9)
    assert np.allclose(row.mean, everything.mean(0), rtol=1e-12)


def test_a_window_closes_only_when_every_rank_has_closed_it() -> None:
    store = CovarianceStore(config(), writers=[keeper := Keeper()])
    first, second = Worker(store, 0), Worker(store, 1)
    first.send({(0, 0): rows(5, 3)}, closes=True)
    first.send({(0, 0): rows(6, 3)}, step=1, closes=True)
    time.sleep(0.05)
    assert keeper.windows == []
    assert store.progress().missing == (1,)
    second.send({}, closes=True)
    written(store, 1)
    assert [row.samples for row in keeper.windows[0].rows] == [5]
    second.send({(0, 1): rows(4, 3)}, step=1, closes=True)
    written(store, 2)
    assert [(row.phase, row.samples) for row in keeper.windows[1].rows] == [("train", 6), ("eval", 4)]


def test_a_repeated_delta_counts_once() -> None:
    store = CovarianceStore(config(world_size=1), writers=[Keeper()])
    worker = Worker(store, 0)
    delta, buffer = worker.delta({(0, 0): rows(10, 3)}, 0, True)
    assert store.take(delta, buffer).merged
    written(store, 1)
    before = store.covariance("conv", "train")
    for _ in range(3):
        assert not store.take(delta, buffer).merged
    assert np.array_equal(store.covariance("conv", "train"), before)
    assert store.progress().published == 1


def test_repetitions_racing_each_other_count_once() -> None:
    store = CovarianceStore(config(world_size=1), writers=[keeper := Keeper()])
    worker = Worker(store, 0)
    for _ in range(50):
        delta, buffer = worker.delta({(0, 0): rows(10, 3), (1, 0): rows(3, 5)}, 0, False)
        with ThreadPoolExecutor(4) as pool:
            acks = list(pool.map(store.take, [delta] * 4, [buffer] * 4))
        assert sorted(ack.merged for ack in acks) == [False, False, False, True]
        worker.seq += 1
    worker.send({}, closes=True)
    written(store, 1)
    assert [row.samples for row in keeper.windows[0].rows] == [500, 150]


def test_many_threads_lose_nothing() -> None:
    world = 8
    store = CovarianceStore(config(world_size=world, publish_every=0.01), writers=[keeper := Keeper()])
    workers = [Worker(store, rank) for rank in range(world)]
    parts = [[rows(int(n), 5, 10.0 * rank) for n in RNG.integers(1, 20, 40)] for rank in range(world)]

    def run(worker: Worker, mine: list[np.ndarray]) -> None:
        for part in mine:
            worker.send({(1, 0): part})
        worker.send({}, closes=True)

    threads = [threading.Thread(target=run, args=pair) for pair in zip(workers, parts, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    written(store, 1)
    everything = np.concatenate([part for mine in parts for part in mine])
    assert keeper.windows[-1].rows[0].samples == len(everything)
    assert np.abs(store.covariance("fc", "train") - np.cov(everything.T, bias=True)).max() < 1e-9


def test_live_rows_come_first_and_rise_in_revision() -> None:
    store = CovarianceStore(config(world_size=1, publish_every=0.02), writers=[keeper := Keeper()])
    worker = Worker(store, 0)
    worker.send({(0, 0): rows(10, 3)}, step=3)
    until(lambda: keeper.windows)
    live = keeper.windows[0]
    assert (live.final, live.revision, live.workers, live.rows[0].samples) == (False, 0, 0, 10)
    worker.send({(0, 0): rows(10, 3)}, step=3, closes=True)
    written(store, 1)
    final = keeper.windows[-1]
    assert final.final
    assert final.rows[0].samples == 20
    assert [window.revision for window in keeper.windows] == list(range(len(keeper.windows)))
    count = len(keeper.windows)
    store._next_live = 0.0
    assert store.poll() == []
    assert store.running().flush(60)
    assert len(keeper.windows) == count, "nothing changed, so nothing is to be published"


def test_the_last_rank_to_leave_finishes_the_run() -> None:
    store = CovarianceStore(config(), writers=[keeper := Keeper()])
    first, second = Worker(store, 0), Worker(store, 1)
    first.send({(0, 0): rows(5, 3)}, closes=True)
    assert not store.leave(first.source, completed=True, sent=first.seq).finished
    second.send({(0, 0): rows(6, 3)}, closes=True)
    second.send({(0, 0): rows(2, 3)}, step=1, closes=True)  # rank 0 left: it counts as having closed this one, too
    written(store, 2)
    assert store.leave(second.source, completed=True, sent=second.seq).finished
    assert store.wait_finished(60)
    assert keeper.closed
    assert [(w.step, w.workers, w.rows[0].samples) for w in keeper.windows] == [(0, 2, 11), (1, 2, 2)]
    with pytest.raises(RegistrationError, match="has ended"):
        Worker(store, 0)
    with pytest.raises(StoreError, match="takes no more rows") as refusal:
        first.send({}, step=2)
    assert refusal.value.final, "nobody tries again"


def test_a_worker_that_fails_leaves_the_run_open_and_a_new_attempt_starts_over() -> None:
    store = CovarianceStore(config(), writers=[keeper := Keeper()])
    old = [Worker(store, rank, token="one") for rank in range(2)]
    for worker in old:
        worker.send({(0, 0): rows(5, 3)}, closes=True)
    old[0].send({(0, 0): rows(5, 3)}, step=1, closes=True)
    assert not store.leave(old[1].source, completed=False, sent=1).finished
    new = [Worker(store, rank, token="two", name=f"new{rank}") for rank in range(2)]
    assert [worker.attempt for worker in new] == [1, 1]
    late = old[0].delta({(0, 0): rows(5, 3)}, 2, False)
    assert store.take(*late).busy, "nobody knows yet from where the new attempt replays"
    for worker in new:
        worker.send({(0, 0): rows(50, 3)}, step=1, closes=True)
    with pytest.raises(DeltaRefused, match="it belongs to attempt 0, and attempt 1 replays from step 1"):
        store.take(*late)
    written(store, 1)
    found = [(w.attempt, w.step, w.workers, w.rows[0].samples) for w in keeper.windows]
    assert found == [(0, 0, 2, 10), (0, 1, 1, 5), (1, 1, 2, 100)]
    assert store.status()["refused"] == 1


def test_a_silent_run_is_published_and_ended(caplog: pytest.LogCaptureFixture) -> None:
    store = CovarianceStore(config(silent_after=1000.0), writers=[keeper := Keeper()])
    worker = Worker(store, 0)
    worker.send({(0, 0): rows(5, 3)}, step=7)
    silent(store, 0, 1001.0)
    assert store.wait_finished(60)
    (window,) = keeper.windows
    assert (window.step, window.workers, window.rows[0].samples, window.final) == (7, 0, 5, True)
    assert "none of its workers was heard of" in caplog.text


def test_writers_fail_alone(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, good, bad, slow = threading.Event(), Keeper("good"), Keeper("bad", fail=True), Keeper("slow")
    monkeypatch.setattr("delve_ray.store.writing.RETRY_S", (0.01, 0.01))
    monkeypatch.setattr(slow, "write", lambda window: (go_on.wait(60), Keeper.write(slow, window)))
    store = CovarianceStore(config(world_size=1), writers=[bad, slow, good])
    worker = Worker(store, 0)
    for step in range(3):
        worker.send({(0, 0): rows(5, 3)}, step=step, closes=True)
    published(store, 3)
    until(lambda: len(good.windows) == 3)
    assert slow.windows == [], "a slow writer holds up nobody"
    go_on.set()
    assert store.flush(60)
    assert [w.step for w in good.windows] == [w.step for w in slow.windows] == [0, 1, 2]
    status = {writer["name"]: writer for writer in store.status()["writers"]}
    assert status["bad"]["failed"] == 3
    assert "no space for this" in status["bad"]["last_error"]
    assert status["good"]["written"] == 3
    assert any("writer bad" in problem for problem in store.progress().problems)
    assert store.leave(worker.source, completed=True, sent=worker.seq).finished
    assert store.wait_finished(60)
    assert good.closed
    assert slow.closed
    assert bad.closed


def test_metrics_are_those_of_the_last_final_window_of_each_phase() -> None:
    store = CovarianceStore(config(world_size=1), writers=[])
    worker = Worker(store, 0)
    worker.send({(0, 0): rows(50, 3), (1, 1): rows(50, 5)}, closes=True)
    written(store, 1)
    first = store.progress().metrics
    worker.send({(0, 0): np.ones((50, 3))}, step=1, closes=True)
    written(store, 2)
    second = store.progress().metrics
    assert second["saturation/train/conv"] == 0.0 == second["saturation/train/mean"]
    assert second["trace/eval/fc"] == first["trace/eval/fc"] > 0


def test_nonfinite_rows_are_published_even_when_nothing_else_is() -> None:
    store = CovarianceStore(config(world_size=1), writers=[keeper := Keeper()])
    worker = Worker(store, 0)
    delta = Delta(worker.source, 0, 0, 0, 0, True, True, ((0, 0, 0, 12),))
    store.take(delta.sealed(np.zeros(9)), np.zeros(9))
    written(store, 1)
    (row,) = keeper.windows[0].rows
    assert (row.samples, row.nonfinite_rows, row.stats["saturation"]) == (0, 12, 0.0)


BAD_DELTAS = {
    "layer index 2": {"entries": ((2, 0, 1, 0),)},
    "layer index -1": {"entries": ((-1, 0, 1, 0),)},
    "phase index 2": {"entries": ((0, 2, 1, 0),)},
    "counts -1 observations": {"entries": ((0, 0, -1, 0),)},
    "-3 non-finite rows": {"entries": ((0, 0, 1, -3),)},
    "stands twice": {"entries": ((0, 0, 1, 0), (0, 0, 1, 0)), "buffer": np.zeros(18)},
    "needs? float64 of shape": {"buffer": np.zeros(8)},
    "buffer is float32": {"buffer": np.zeros(9, dtype=np.float32)},
    "non-finite moments": {"buffer": np.array([0.0] * 8 + [np.nan])},
    "moments without observations": {"entries": ((0, 0, 0, 0),), "buffer": np.ones(9)},
    "negative diagonal": {"buffer": np.array([0, 0, 0, -1.0, 0, 0, 1, 0, 1])},
    "attempt 3": {"attempt": 3},
    "its seq is no such number": {"seq": -1},
    "it is of window 5 while window 0 is open": {"window": 5},
    "its windows 0 to 2 may be open": {"window": 3, "seq": 3},
    "belongs to run 'other'": {"source": replace(source(0), run="other")},
    "has been replaced by pid 100": {"source": source(0, name="impostor")},
    "its checksum is not that of its content": {"checksum": 7},
}


@pytest.mark.parametrize("message", BAD_DELTAS)
def test_a_bad_delta_is_refused_and_changes_nothing(message: str) -> None:
    store = CovarianceStore(config(world_size=2), writers=[])
    worker = Worker(store, 0)
    good = rows(10, 3)
    worker.send({(0, 0): good})
    bad = dict(BAD_DELTAS[message])
    buffer = bad.pop("buffer", np.zeros(9))
    fields: dict[str, Any] = {
        "source": worker.source,
        "attempt": 0,
        "seq": 1,
        "window": 0,
        "step": 0,
        "closes": False,
        "labelled": False,
        "entries": ((0, 0, 1, 0),),
    }
    before = {key: value for key, value in store.status().items() if key not in ("ranks", "refused")}
    with pytest.raises(DeltaRefused, match=message):
        delta = Delta(**{**fields, **bad})
        store.take(delta if "checksum" in bad else delta.sealed(np.ascontiguousarray(buffer)), buffer)
    after = store.status()
    assert after["refused"] == 1
    assert {key: after[key] for key in before} == before
    assert after["ranks"][0]["deltas"] == 1
    worker.send({}, closes=True)
    Worker(store, 1).send({}, closes=True)
    written(store, 1)
    reference = np.cov(good.T, bias=True)
    assert np.allclose(store.covariance("conv", "train"), reference, rtol=1e-12)


def test_ranks_must_agree_on_the_step() -> None:
    store = CovarianceStore(config(), writers=[])
    first, second = Worker(store, 0), Worker(store, 1)
    first.send({}, step=3, closes=True)
    with pytest.raises(DeltaRefused, match=r"rank 1 closes window 0 as step 4, ranks \[0\] as step 3"):
        second.send({}, step=4, closes=True)


BAD_CONFIGS = {
    "savefile=": {"savefile": "/elsewhere"},
    "sat_threshold=0.9": {"threshold": 0.9},
    "thresholds=": {"thresholds": (0.99, 0.9)},
    "stats=": {"stats": ("trace",)},
    "world_size=3": {"world_size": 3},
    "save_to=": {"save_to": ("tensorboard",)},
}


@pytest.mark.parametrize("message", BAD_CONFIGS)
def test_a_worker_with_other_options_is_refused(message: str) -> None:
    store = CovarianceStore(config(), writers=[])
    Worker(store, 0)
    with pytest.raises(RegistrationError, match=f"rank 1 brings {message}"):
        store.register(source(1), config(**BAD_CONFIGS[message]), LAYERS)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (LAYERS[:1], "missing fc"),
        ([*LAYERS, LayerInfo("head", "Linear", 2)], "unknown head"),
        ([LAYERS[0], LayerInfo("fc", "Linear", 6)], "different fc .Linear of 5, not Linear of 6"),
        (LAYERS[::-1], "another order"),
    ],
)
def test_a_run_of_the_same_name_with_other_layers_is_refused(layers: list[LayerInfo], message: str) -> None:
    store = CovarianceStore(config(), writers=[])
    Worker(store, 0)
    with pytest.raises(RegistrationError, match=message):
        store.register(source(1), config(), layers)


def test_a_rank_is_taken_once() -> None:
    store = CovarianceStore(config(), writers=[])
    worker = Worker(store, 0)
    with pytest.raises(RegistrationError, match=r"rank 0 of run 'r' is tracked already \(by pid 100 on host\)"):
        Worker(store, 0, name="second")
    store.leave(worker.source, completed=True, sent=worker.seq)
    with pytest.raises(RegistrationError, match="has already left"):
        Worker(store, 0, name="third")
    with pytest.raises(RegistrationError, match="rank=2 is not in 0 … 1"):
        Worker(store, 2)


def test_files_agree_with_the_store(savefile: str) -> None:
    own = config(world_size=1, savefile=savefile, save_to=("parquet",))
    store = CovarianceStore(own)
    worker = Worker(store, 0)
    for step in range(3):
        worker.send({(0, 0): rows(20, 3, 5.0), (1, 1): rows(9, 5)}, step=step, closes=True)
    store.leave(worker.source, completed=True, sent=worker.seq)
    assert store.wait_finished(60)
    spectra, covariances = read_spectra(savefile), read_covariances(savefile)
    assert spectra.num_rows == covariances.num_rows == 6
    last = next(row for row in covariances.to_pylist() if row["step"] == 2 and row["layer"] == "conv")
    matrix = store.covariance("conv", "train")
    assert last["covariance"] == list(matrix[np.triu_indices(3)])
    row = next(row for row in spectra.to_pylist() if row["step"] == 2 and row["layer"] == "conv")
    assert row["eigenvalues"] == list(store.spectrum("conv", "train"))
    assert row["determinant"] is None, "a statistic that was not asked for is null"


def test_thresholds_and_statistics_on_request_reach_metrics_and_files(savefile: str) -> None:
    stats = ("correlation_saturation", "correlation_intrinsic_dimensionality", "rankme")
    own = config(
        world_size=1,
        savefile=savefile,
        save_to=("parquet",),
        stats=stats,
        threshold=0.9,
        thresholds=(0.9, 0.5, 1.0),
    )
    store = CovarianceStore(own)
    worker = Worker(store, 0)
    sent = np.random.default_rng(0).normal(size=(4, 5)) * np.array([100.0, 1, 1, 1, 1])
    worker.send({(1, 0): sent}, closes=True)
    store.leave(worker.source, completed=True, sent=worker.seq)
    assert store.wait_finished(60)
    metrics = store.progress().metrics
    (row,) = read_spectra(savefile).to_pylist()
    assert (row["threshold"], row["thresholds"], row["intrinsic_dimensionalities"]) == (0.9, [0.9, 0.5, 1.0], [1, 1, 3])
    assert (row["samples_per_feature"], row["undersampled"]) == (0.8, True)
    shares = np.cumsum(np.linalg.eigvalsh(np.corrcoef(sent.T))[::-1]) / 5
    assert row["correlation_intrinsic_dimensionality"] == np.argmax(shares >= 0.9) + 1 > 1
    assert row["correlation_effective_rank"] is None, "not asked for"
    for name in stats:
        assert metrics[f"{name}/train/fc"] == metrics[f"{name}/train/mean"] == row[name]


def test_a_savefile_that_holds_a_run_is_refused(savefile: str) -> None:
    own = config(world_size=1, savefile=savefile, save_to=("parquet",))
    first = CovarianceStore(own)
    Worker(first, 0)
    with pytest.raises(OptionError, match="holds a run already"):
        Worker(CovarianceStore(own), 0)


def test_questions_about_what_is_not_there_say_what_is() -> None:
    store = CovarianceStore(config(world_size=1), writers=[])
    with pytest.raises(StoreError, match="has no worker yet"):
        store.covariance("fc", "train")
    Worker(store, 0)
    with pytest.raises(KeyError, match="no layer 'fd'; its layers: conv, fc"):
        store.covariance("fd", "train")
    with pytest.raises(KeyError, match="phase 'test' is none of"):
        store.covariance("fc", "test")
    with pytest.raises(KeyError, match="nothing of layer 'fc' in phase 'train' has been published yet"):
        store.covariance("fc", "train")
