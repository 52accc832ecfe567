"""A store with shards: cut, merged, published as one, the same figures as one store has, whatever fails."""

from __future__ import annotations

import json
import random
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from delve_ray import read_covariances, read_spectra
from delve_ray.analysis.run_files import SPECTRA
from delve_ray.errors import DeltaRefused, StoreError
from delve_ray.parcels import encode_parcel, parcel_name
from delve_ray.recovery import recover
from delve_ray.schema import PublishedWindow
from delve_ray.sketch import WHOLE
from delve_ray.storage import Storage
from delve_ray.store import parts as parts_module
from delve_ray.store.assignment import assign
from delve_ray.store.core import CovarianceStore
from delve_ray.store.door import MAX_COUNT
from delve_ray.store.front import FrontStore
from delve_ray.store.parts import PENDING, UNKNOWN, WRITTEN, Parts, shard_config
from delve_ray.store.protocol import LayerInfo, StoreConfig, moments_size
from delve_ray.store.publishing import layer_row
from delve_ray.store.run_file import read_run
from delve_ray.store.window import Window
from tests.chaos.processes import times
from tests.store.six_layers import FEATURES, LAYERS, Sender, check, local_shards, mortal, some_rows, with_widths
from tests.store.six_layers import layers as layers  # the fixture
from tests.stores import Keeper, Worker, config, source, until

FIGURES = ("trace", "eigenvalues", "mean_norm", "mean", "covariance")


# --- assignment --------------------------------------------------------------------------------------------


@given(st.lists(st.one_of(st.none(), st.integers(1, 4096)), min_size=1, max_size=60), st.integers(1, 9))
def test_no_shard_has_more_than_its_share_and_one_layer(widths: list[int | None], num_shards: int) -> None:
    layers = [LayerInfo(str(index), "Linear", width) for index, width in enumerate(widths)]
    assigned = assign(layers, num_shards, WHOLE)
    assert assigned == assign(list(layers), num_shards, WHOLE)
    cost = [0 if width is None else moments_size(width) for width in widths]
    loads = [sum(c for c, shard in zip(cost, assigned, strict=True) if shard == index) for index in range(num_shards)]
    assert set(assigned) <= set(range(num_shards))
    assert max(loads) <= sum(cost) / num_shards + (1 - 1 / num_shards) * max(cost) + 1e-9
    if len(widths) >= num_shards:
        assert len(set(assigned)) == num_shards


# --- figures -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_shards", [2, 3, 8])
def test_the_files_are_those_of_one_store(tmp_path: Path, num_shards: int) -> None:
    rng = np.random.default_rng(num_shards)
    sharded = local_shards(tmp_path / "run", num_shards)
    workers = [Worker(sharded, rank, sharded.config) for rank in range(2)]
    alone = CovarianceStore(replace(sharded.config, savefile=str(tmp_path / "alone"), num_shards=1))
    others = [Worker(alone, rank, alone.config) for rank in range(2)]
    sent: dict[int, list[Any]] = {}
    for step in range(3):
        for part in range(2):
            for worker, other in zip(workers, others, strict=True):
                rows = some_rows(rng)
                sent.setdefault(step, []).append(rows)
                ack = sharded.take(*with_widths(worker, rows, step, part == 1))
                assert (ack.merged, ack.next_seq) == (True, worker.seq)
                alone.take(*with_widths(other, rows, step, part == 1))
    for each in (*workers, *others):
        each.leave()
    assert sharded.wait_finished(60)
    assert alone.wait_finished(60)
    check(str(tmp_path / "run"), sent)
    for read in (read_spectra, read_covariances):
        left, right = (
            read(tmp_path / name).drop_columns(["wall_time", "revision"]).to_pylist() for name in ("run", "alone")
        )
        assert len(left) == len(right)
        for ours, theirs in zip(left, right, strict=True):
            for name, value in ours.items():  # snapshots cut the sums at other places
                same = pytest.approx(theirs[name], rel=1e-10, abs=1e-13) if name in FIGURES else theirs[name]
                assert value == same, name
    assert sharded.progress().metrics == pytest.approx(alone.progress().metrics, rel=1e-11)
    assert sharded.progress().problems == ()


def test_late_ranks_correct_all_shards_together(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    sharded = local_shards(tmp_path, 3, late_after=0.2)
    workers = [Worker(sharded, rank, sharded.config) for rank in range(2)]
    rows = [some_rows(rng, 1.0) for _ in workers]
    sharded.take(*with_widths(workers[0], rows[0], 0, True))
    until(lambda: read_spectra(tmp_path).num_rows == 12)
    assert set(read_spectra(tmp_path).column("workers").to_pylist()) == {1}
    sharded.take(*with_widths(workers[1], rows[1], 0, True))
    until(lambda: set(read_spectra(tmp_path).column("workers").to_pylist()) == {2})
    for worker in workers:
        worker.leave()
    assert sharded.wait_finished(60)
    check(str(tmp_path), {0: rows})
    assert len(set(read_spectra(tmp_path).column("revision").to_pylist())) == 1


def test_live_rows_are_of_all_shards(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    sharded = local_shards(tmp_path, 3, world_size=1, publish_every=0.2)
    worker = Worker(sharded, 0, sharded.config)
    rows = some_rows(rng, 1.0)
    sharded.take(*with_widths(worker, rows, 0, False))
    until(lambda: read_spectra(tmp_path).num_rows == 12)
    assert set(read_spectra(tmp_path).column("final").to_pylist()) == {False}
    assert sharded.flush(30)
    worker.send({}, 0, True)
    worker.leave()
    assert sharded.wait_finished(60)
    check(str(tmp_path), {0: [rows]}, workers=1)


def test_a_new_attempt_replaces_what_it_replays(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    sharded = local_shards(tmp_path, 2, world_size=1)
    first = Worker(sharded, 0, sharded.config, token="a")
    sent: dict[int, list[Any]] = {}
    for step in range(3):
        sent[step] = [some_rows(rng)]
        sharded.take(*with_widths(first, sent[step][0], step, True))
    sharded.take(*with_widths(first, some_rows(rng), 3, False))
    torn = with_widths(first, some_rows(rng, 1.0), 3, True)
    widths = [FEATURES[layer] for layer, *_ in torn[0].entries]
    sharded.shards[0].take(*sharded._cut(*torn, widths)[0])  # and then it died
    again = Worker(sharded, 0, sharded.config, token="b")
    assert (again.attempt, again.window) == (1, 0)
    for step in (2, 3):
        sent[step] = [some_rows(rng)]
        sharded.take(*with_widths(again, sent[step][0], step, True))
        with pytest.raises(DeltaRefused, match="belongs to attempt 0, and attempt 1 replays from step 2"):
            sharded.take(*torn)
    assert [status["refused"] for status in sharded.status()["shards"]] == [0, 2], "the first one had it"
    again.leave()
    assert sharded.wait_finished(60)
    check(str(tmp_path), sent, workers=1)


def test_a_run_whose_workers_are_all_silent_is_published_and_ended(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    sharded = local_shards(tmp_path, 2, silent_after=3.0)
    workers = [Worker(sharded, rank, sharded.config) for rank in range(2)]
    sent = {step: [some_rows(rng, 1.0) for _ in workers] for step in range(2)}
    for step, parts in sent.items():
        for worker, rows in zip(workers, parts, strict=True):
            sharded.take(*with_widths(worker, rows, step, (step, worker) != (1, workers[1])))
    assert sharded.wait_finished(60)
    check(str(tmp_path), sent, workers={0: 2, 1: 1})
    end = read_run(Storage(tmp_path))["end"]
    assert end["why"].startswith("none of its workers was heard of for")
    assert end["problems"] == []


# --- failures ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(times(6)))
def test_whatever_is_killed_nothing_is_lost_and_nothing_twice(tmp_path: Path, seed: int) -> None:
    rng, dice = np.random.default_rng(seed), random.Random(seed)
    sharded = mortal(tmp_path, 3)
    senders = [Sender(sharded.reached, rank, sharded.config) for rank in range(2)]
    sent: dict[int, list[Any]] = {}
    for step in range(6):
        for part in range(2):
            for sender in senders:
                rows = some_rows(rng)
                sent.setdefault(step, []).append(rows)
                sender.add(rows, step, part == 1)
                if dice.random() < 0.7:
                    sender.until_there()
                chance = dice.random()
                if chance < 0.2:
                    sharded.kill(process=sharded.shards[dice.randrange(3)])
                elif chance < 0.3:
                    sharded.kill(process=sharded.front)
                if dice.random() < 0.3:
                    time.sleep(0.1)  # for a snapshot
    for sender in senders:
        sender.until_there()
    for sender in senders:
        sender.leave()
    assert sharded.reached.wait_finished(60), sharded.reached.status()
    check(str(tmp_path), sent)


def test_the_front_forgets_nothing_that_a_shard_was_told_is_written(tmp_path: Path) -> None:
    sharded = mortal(tmp_path, 2, world_size=1)
    sender, front = Sender(sharded.reached, 0, sharded.config), sharded.front.reached
    rows = some_rows(np.random.default_rng(0), 1.0)
    sender.add(rows, 0, True)
    sender.until_there()
    until(lambda: front.part_state(0, 0, 0, 0) == WRITTEN)
    sharded.kill(process=sharded.front)
    assert front.part_state(0, 0, 0, 0) in (WRITTEN, UNKNOWN)
    before = sorted(path.name for path in (tmp_path / "spectra").iterdir())
    part = PublishedWindow("r", 0, 0, 0, 1, True, 1, 1, time_now(), [])
    front.accept(1, part)  # a shard that has not heard the answer
    assert front.part_state(1, 0, 0, 1) == WRITTEN
    assert sorted(path.name for path in (tmp_path / "spectra").iterdir()) == before
    sender.until_there()
    sender.leave()
    assert sharded.reached.wait_finished(60)
    check(str(tmp_path), {0: [rows]}, workers=1)


def time_now() -> Any:
    from datetime import UTC, datetime

    return datetime.now(UTC)


def test_a_window_is_pending_until_every_shard_has_it(tmp_path: Path) -> None:
    options = config(savefile=str(tmp_path), save_to=("parquet",), num_shards=2, world_size=1)
    keeper = Keeper()
    front = FrontStore(options, writers=[keeper])
    worker = Worker(front, 0, options)
    worker.send({}, 0, True)
    part = PublishedWindow("r", 0, 0, 0, 0, True, 1, 1, time_now(), [])
    assert front.part_state(0, 0, 0, 0) == UNKNOWN
    front.accept(0, part)
    assert front.part_state(0, 0, 0, 0) == PENDING
    assert front.progress().published == 0
    front.accept(1, part)
    until(lambda: front.part_state(0, 0, 0, 0) == WRITTEN)
    assert front.part_state(1, 0, 0, 0) == WRITTEN
    with pytest.raises(StoreError, match="attempt 3 is not known yet"):
        front.accept(0, replace(part, attempt=3))
    worker.leave()
    assert not front.finished
    assert front.undone == [0, 1]
    front.shard_done(0)
    front.shard_done(1)
    assert front.wait_finished(30)


def test_a_shard_that_never_comes_back_is_named_and_the_rest_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts_module, "WITHOUT_S", 0.3)
    monkeypatch.setattr("delve_ray.store.front.WITHOUT_S", 0.3)
    sharded = mortal(tmp_path, 2, world_size=1)
    worker = Worker(sharded.reached, 0, sharded.config)
    rows = some_rows(np.random.default_rng(0), 1.0)
    sharded.reached.take(*with_widths(worker, rows, 0, True))
    sharded.shards[1].end()
    until(lambda: any(tmp_path.glob("spectra/*.parquet")))
    layers = {layer for layer, shard in zip(LAYERS, assign(LAYERS, 2, WHOLE), strict=True) if shard == 0}
    found = set(read_spectra(tmp_path).column("layer").to_pylist())
    if found == {info.name for info in layers}:  # the other's part did not come in before
        problems = sharded.front.reached.progress().problems
        assert any("without the layers of shards [1]" in word for word in problems)
    sharded.shards[0].reached.leave(worker.source, completed=True, sent=worker.seq)
    sharded.front.reached.leave(worker.source, completed=True, sent=worker.seq)
    assert sharded.front.reached.wait_finished(30)


def test_what_a_shard_cannot_publish_is_said_by_the_run(tmp_path: Path) -> None:
    """As with one store: in its progress while it goes on, which workers log, and in run.json."""
    sharded = local_shards(tmp_path, 2, world_size=1)
    worker = Worker(sharded, 0, sharded.config)
    rows = some_rows(np.random.default_rng(0), 1.0)

    def fail(layer: LayerInfo, *args: Any, **options: Any) -> Any:
        if layer.name == "layer3":
            raise ArithmeticError("no convergence")
        return layer_row(layer, *args, **options)

    shard = assign(LAYERS, 2, WHOLE)[3]
    sharded.take(*with_widths(worker, rows, 0, False))
    sharded.local_shards[shard].running()._compute = fail
    worker.send({}, 0, True)
    said = [f"shard {shard}: layer layer3, step 0: ArithmeticError: no convergence"]
    until(lambda: sharded.progress().published == 1)
    assert sharded.progress().problems == tuple(said), "of both phases, once"
    worker.leave()
    assert sharded.wait_finished(60)
    assert json.loads((tmp_path / "run.json").read_text())["end"]["problems"] == said
    assert {row["layer"] for row in read_spectra(tmp_path).to_pylist()} == {f"layer{n}" for n in (0, 1, 2, 4, 5)}


def test_who_is_turned_away_ends_no_shard_of_one_who_joins(tmp_path: Path) -> None:
    """Two trackers of one name started the stores at once; the other is in the front, and not in the shards yet."""
    sharded = local_shards(tmp_path / "run", 2, world_size=1)
    first = source(0)
    welcome = sharded.local_front.register(first, sharded.config, LAYERS)
    assert not sharded.abandon()
    for index, shard in enumerate(sharded.local_shards):
        assert shard.register(first, shard_config(sharded.config, index), LAYERS) == welcome
    assert sharded.leave(first, completed=True, sent=0).finished
    assert sharded.wait_finished(60)
    unused = local_shards(tmp_path / "unused", 2, world_size=1)
    assert unused.abandon()
    assert all(store.finished for store in (unused.local_front, *unused.local_shards))


def test_what_one_shard_refuses_changes_no_other_answer(tmp_path: Path) -> None:
    sharded = local_shards(tmp_path, 2, world_size=1)
    worker = Worker(sharded, 0, sharded.config)
    rows = some_rows(np.random.default_rng(1), 1.0)
    delta, buffer = with_widths(worker, rows, 0, True)
    bad = buffer.copy()
    bad[0] = np.nan
    with pytest.raises(DeltaRefused, match="non-finite"):
        sharded.take(delta.sealed(bad), bad)
    assert sharded.take(delta, buffer).next_seq == 1
    worker.leave()
    assert sharded.wait_finished(60)
    check(str(tmp_path), {0: [rows]}, workers=1)


def test_a_count_that_one_shard_alone_can_refuse_shows_in_the_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes 16,384 of the largest deltas, but for this test, which lets one bring as much."""
    monkeypatch.setattr("delve_ray.store.door.MAX_ROWS", MAX_COUNT)
    sharded = local_shards(tmp_path, 2)
    rng = np.random.default_rng(1)
    workers = [Worker(sharded, rank, sharded.config) for rank in range(2)]
    for worker in workers:
        assert sharded.take(*with_widths(worker, some_rows(rng, 1.0), 0, worker is workers[0])).merged
    delta, buffer = with_widths(workers[1], some_rows(rng, 1.0), 0, True)
    (layer, phase, _, nonfinite), *others = delta.entries
    delta = replace(delta, entries=((layer, phase, MAX_COUNT - 1, nonfinite), *others), weights=())
    with pytest.raises(DeltaRefused, match="would count"):
        sharded.take(delta.sealed(buffer), buffer)
    workers[0].leave()
    sharded.finish("its sender has ended")
    assert sharded.wait_finished(60)
    found = read_spectra(tmp_path).to_pylist()
    assert len(found) == 2 * len(LAYERS)
    assert {(row["step"], row["workers"]) for row in found} == {(0, 1)}


def test_a_shard_is_configured_like_the_run_but_for_its_files() -> None:
    where = "s3://key:secret@bucket/run/{}?endpoint_override=127.0.0.1:9&scheme=http"
    base = StoreConfig("r", where.format(""), 4, save_to=("parquet", "csv"), num_shards=3, lingers=5.0)
    shard = shard_config(base, 2)
    assert (shard.savefile, shard.save_to, shard.num_shards) == (where.format("shards/2"), ("front",), 1)
    assert (shard.run, shard.world_size, shard.stats) == (base.run, base.world_size, base.stats)
    assert SPECTRA.folder not in shard.savefile


@pytest.mark.parametrize("lost", [False, True], ids=["all are there", "a shard's snapshots are lost"])
def test_what_was_not_delivered_is_recovered(tmp_path: Path, lost: bool) -> None:
    """A rank's last deltas stay in files; the run has ended without them."""
    rng = np.random.default_rng(3)
    sharded = local_shards(tmp_path, 2, late_after=0.1)
    workers = [Worker(sharded, rank, sharded.config) for rank in range(2)]
    rows = [some_rows(rng, 1.0) for _ in workers]
    sharded.take(*with_widths(workers[0], rows[0], 0, True))
    delta, buffer = with_widths(workers[1], rows[1], 0, True)
    until(lambda: read_spectra(tmp_path).num_rows == 12)
    sharded.finish("the workers are gone")
    assert sharded.wait_finished(60)
    assert set(read_spectra(tmp_path).column("workers").to_pylist()) == {1}
    (tmp_path / "undelivered").mkdir()
    pieces = encode_parcel(delta, buffer, sharded.config, LAYERS, first=True)
    Storage(tmp_path / "undelivered").write_atomic(parcel_name(delta), pieces)
    if lost:
        shutil.rmtree(tmp_path / "shards" / "1")
    (outcome,) = recover(tmp_path, force=True)
    assert outcome.merged, outcome.problem
    if not lost:
        check(str(tmp_path), {0: rows})
        return
    # What the shard's layers had before is gone: their rows say so, and count what there is once.
    assigned = dict(zip((layer.name for layer in LAYERS), assign(LAYERS, 2, WHOLE), strict=True))
    for row in read_spectra(tmp_path).to_pylist():
        key = (int(row["layer"][5:]), ("train", "eval").index(row["phase"]))
        kept = rows if assigned[row["layer"]] == 0 else rows[1:]
        assert row["samples"] == sum(len(part[key]) for part in kept)
        assert row["workers"] < 2


def test_a_writer_that_answers_after_the_end_is_too_late() -> None:
    """The windows of a run that has ended go, but for those that a recovery may have something for."""
    front = FrontStore(config(num_shards=2, world_size=1), writers=[Keeper()])
    Worker(front, 0)
    window = Window(0, step=3)
    front._parts[0, 0] = Parts()
    job = replace(window.job(0, 1, {0}, final=True), parts={})
    front.written(job, True)
    assert window.unwritten == 1
    assert front.attempts[-1].windows == {}
