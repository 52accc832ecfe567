"""A store with shards: cut, merged, published as one, the same figures as one store has, whatever fails."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from delve_ray import read_covariances, read_spectra
from delve_ray.analysis.run_files import SPECTRA
from delve_ray.errors import DeltaRefused, StoreError, UnknownSource
from delve_ray.moments import F64, unpack_triangle
from delve_ray.parcels import encode_parcel, parcel_name
from delve_ray.recovery import recover
from delve_ray.schema import PublishedWindow
from delve_ray.storage import Storage
from delve_ray.store import parts as parts_module
from delve_ray.store.assignment import assign
from delve_ray.store.core import CovarianceStore
from delve_ray.store.front import FrontStore
from delve_ray.store.parts import PENDING, UNKNOWN, WRITTEN, Parts, PartWriter, ShardStore, shard_config
from delve_ray.store.protocol import Held, LayerInfo, StoreConfig, moments_size
from delve_ray.store.saving import Saver
from delve_ray.store.sharded import ShardedStore
from delve_ray.store.window import Window
from tests.chaos.processes import times
from tests.helpers import covariance_error, two_pass_covariance
from tests.stores import Keeper, Worker, config, until

WIDTHS = (9, 3, 12, 5, None, 7)
LAYERS = [LayerInfo(f"layer{index}", "Linear", width) for index, width in enumerate(WIDTHS)]
FIGURES = ("trace", "eigenvalues", "mean_norm", "mean", "covariance")
FEATURES = (9, 3, 12, 5, 4, 7)  # what the forward of layer4 tells


class Sharded:
    """A front and shards in this process, each of which can be killed and started anew from its snapshots."""

    def __init__(self, savefile: str, num_shards: int, *, world_size: int = 2, **changes: Any) -> None:
        self.config = config(
            savefile=savefile,
            save_to=("parquet",),
            stats=("saturation", "trace", "cov", "embed"),
            num_shards=num_shards,
            world_size=world_size,
            snapshot_every=0.05,
            **changes,
        )
        self.front: Any = FrontStore(self.config, saver=Saver(Storage(savefile), 0.05))
        self.shards: list[Any] = [self._shard(index) for index in range(num_shards)]
        self.store = ShardedStore(Alive(lambda: self.front), [Alive(self._living(i)) for i in range(num_shards)])

    def _living(self, index: int) -> Callable[[], Any]:
        return lambda: self.shards[index]

    def _shard(self, index: int) -> CovarianceStore:
        options = shard_config(self.config, index)
        writer = PartWriter(index, lambda: Alive(lambda: self.front))  # type: ignore[arg-type, return-value]
        return ShardStore(options, writers=[writer], saver=Saver(Storage(options.savefile), 0.05))

    def kill_shard(self, index: int) -> None:
        """What it has not saved is gone; it goes on from its last snapshot."""
        old, self.shards[index] = self.shards[index], None
        self._stop(old)
        new = self._shard(index)
        new.restore()
        self.shards[index] = new

    def kill_front(self) -> None:
        old, self.front = self.front, None
        self._stop(old)
        new = FrontStore(replace(self.config, resume=True), saver=Saver(Storage(self.config.savefile), 0.05))
        new.restore()
        self.front = new

    def _stop(self, store: Any) -> None:
        """Nothing that it still does has any effect, as if its process were gone."""
        store.saver.stop()
        if store.publisher is not None:
            for thread in store.publisher.writers:
                thread.writer.write = thread.writer.write_scalars = lambda *_: None
                thread.writer.close = lambda: None


class Alive:
    """A store that does not answer while it is gone."""

    def __init__(self, living: Callable[[], Any]) -> None:
        self._living = living

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            store = self._living()
            if store is None:
                raise StoreError("it is gone")
            return getattr(store, name)(*args, **options)

        return call


@pytest.fixture(autouse=True)
def layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.stores.LAYERS", LAYERS)
    monkeypatch.setattr(parts_module, "TOGETHER_S", 0.2)


def some_rows(rng: np.random.Generator, share: float = 0.8) -> dict[tuple[int, int], F64]:
    return {
        (layer, phase): rng.normal(size=(int(rng.integers(2, 20)), d)) + 3
        for layer, d in enumerate(FEATURES)
        for phase in (0, 1)
        if rng.random() < share
    }


def with_widths(worker: Worker, rows: dict[tuple[int, int], F64], step: int, closes: bool) -> Any:
    delta, buffer = worker.next(rows, step, closes)
    widths = ((4, FEATURES[4]),) if any(layer == 4 for layer, _ in rows) else ()
    return replace(delta, widths=widths).sealed(buffer), buffer


def check(savefile: str, sent: dict[int, list[dict[tuple[int, int], F64]]], workers: int = 2) -> None:
    """The files have what was sent, by step, of every layer and phase."""
    spectra = read_spectra(savefile).to_pylist()
    covariances = {(r["step"], r["layer"], r["phase"]): r for r in read_covariances(savefile).to_pylist()}
    expected = {
        (step, f"layer{layer}", ("train", "eval")[phase])
        for step, parts in sent.items()
        for rows in parts
        for layer, phase in rows
    }
    assert {(row["step"], row["layer"], row["phase"]) for row in spectra} == expected == set(covariances)
    for row in spectra:
        layer, phase = int(row["layer"][5:]), ("train", "eval").index(row["phase"])
        every = np.concatenate([p[layer, phase] for p in sent[row["step"]] if (layer, phase) in p])
        where = (row["step"], row["layer"], row["phase"])
        assert (row["samples"], row["workers"], row["final"]) == (len(every), workers, True), where
        matrix = unpack_triangle(np.array(covariances[where]["covariance"]), every.shape[1])
        assert covariance_error(matrix, two_pass_covariance(every)) < 1e-12
        assert covariances[where]["revision"] == row["revision"]
    for step, phase in {(row["step"], row["phase"]) for row in spectra}:
        in_order = [row["layer"] for row in spectra if (row["step"], row["phase"]) == (step, phase)]
        assert in_order == sorted(in_order)


# --- assignment --------------------------------------------------------------------------------------------


@given(st.lists(st.one_of(st.none(), st.integers(1, 4096)), min_size=1, max_size=60), st.integers(1, 9))
def test_no_shard_has_more_than_its_share_and_one_layer(widths: list[int | None], num_shards: int) -> None:
    layers = [LayerInfo(str(index), "Linear", width) for index, width in enumerate(widths)]
    assigned = assign(layers, num_shards)
    assert assigned == assign(list(layers), num_shards)
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
    sharded = Sharded(str(tmp_path / "run"), num_shards)
    workers = [Worker(sharded.store, rank, sharded.config) for rank in range(2)]  # type: ignore[arg-type]
    alone = CovarianceStore(replace(sharded.config, savefile=str(tmp_path / "alone"), num_shards=1))
    others = [Worker(alone, rank, alone.config) for rank in range(2)]
    sent: dict[int, list[Any]] = {}
    for step in range(3):
        for part in range(2):
            for worker, other in zip(workers, others, strict=True):
                rows = some_rows(rng)
                sent.setdefault(step, []).append(rows)
                ack = sharded.store.take(*with_widths(worker, rows, step, part == 1))
                assert (ack.merged, ack.next_seq) == (True, worker.seq)
                alone.take(*with_widths(other, rows, step, part == 1))
    for each in (*workers, *others):
        each.leave()
    assert sharded.store.wait_finished(60)
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
    assert sharded.store.progress().metrics == pytest.approx(alone.progress().metrics, rel=1e-11)
    assert sharded.front.progress().problems == ()


def test_late_ranks_correct_all_shards_together(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    sharded = Sharded(str(tmp_path), 3, late_after=0.2)
    workers = [Worker(sharded.store, rank, sharded.config) for rank in range(2)]  # type: ignore[arg-type]
    rows = [some_rows(rng, 1.0) for _ in workers]
    sharded.store.take(*with_widths(workers[0], rows[0], 0, True))
    until(lambda: read_spectra(tmp_path).num_rows == 12)
    assert set(read_spectra(tmp_path).column("workers").to_pylist()) == {1}
    sharded.store.take(*with_widths(workers[1], rows[1], 0, True))
    until(lambda: set(read_spectra(tmp_path).column("workers").to_pylist()) == {2})
    for worker in workers:
        worker.leave()
    assert sharded.store.wait_finished(60)
    check(str(tmp_path), {0: rows})
    assert len(set(read_spectra(tmp_path).column("revision").to_pylist())) == 1


def test_live_rows_are_of_all_shards(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    sharded = Sharded(str(tmp_path), 3, world_size=1, publish_every=0.2)
    worker = Worker(sharded.store, 0, sharded.config)  # type: ignore[arg-type]
    rows = some_rows(rng, 1.0)
    sharded.store.take(*with_widths(worker, rows, 0, False))
    until(lambda: read_spectra(tmp_path).num_rows == 12)
    assert set(read_spectra(tmp_path).column("final").to_pylist()) == {False}
    assert sharded.store.flush(30)
    worker.send({}, 0, True)
    worker.leave()
    assert sharded.store.wait_finished(60)
    check(str(tmp_path), {0: [rows]}, workers=1)


def test_a_new_attempt_replaces_what_it_replays(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    sharded = Sharded(str(tmp_path), 2, world_size=1)
    first = Worker(sharded.store, 0, sharded.config, token="a")  # type: ignore[arg-type]
    sent: dict[int, list[Any]] = {}
    for step in range(3):
        sent[step] = [some_rows(rng)]
        sharded.store.take(*with_widths(first, sent[step][0], step, True))
    sharded.store.take(*with_widths(first, some_rows(rng), 3, False))
    again = Worker(sharded.store, 0, sharded.config, token="b")  # type: ignore[arg-type]
    assert (again.attempt, again.window) == (1, 0)
    for step in (2, 3):
        sent[step] = [some_rows(rng)]
        sharded.store.take(*with_widths(again, sent[step][0], step, True))
    again.leave()
    assert sharded.store.wait_finished(60)
    check(str(tmp_path), sent, workers=1)


# --- failures ------------------------------------------------------------------------------------------------


class Sender:
    """A worker that keeps what no snapshot has, and offers it again, as its outbox does."""

    def __init__(self, sharded: Sharded, rank: int) -> None:
        self.sharded = sharded
        self.worker = Worker(sharded.store, rank, sharded.config)  # type: ignore[arg-type]
        self.kept: list[Any] = []

    def add(self, rows: Any, step: int, closes: bool) -> None:
        self.kept.append(with_widths(self.worker, rows, step, closes))

    def offer(self) -> Any:
        """Offer all that is kept once, and forget what is durable."""
        ack = None
        for delta, buffer in list(self.kept):
            ack = self.sharded.store.take(delta, buffer)
        if ack is not None:
            self.kept = [item for item in self.kept if item[0].seq >= ack.durable]
        return ack

    def until_there(self) -> None:
        def there() -> bool:
            try:
                ack = self.offer() or self.sharded.store.heartbeat(self.worker.source)
                return bool(ack.next_seq == self.worker.seq)
            except UnknownSource:
                self.rejoin()
            except StoreError:
                pass
            return False

        until(there, "the stores do not take it")

    def rejoin(self) -> None:
        first = self.kept[0][0] if self.kept else None
        held = Held(
            self.worker.attempt,
            first.seq if first else self.worker.seq,
            first.window if first else self.worker.window,
            whole=True,
        )
        self.sharded.store.register(self.worker.source, self.sharded.config, LAYERS, held)

    def leave(self) -> None:
        def left() -> bool:
            try:
                return bool(self.worker.leave().left)
            except UnknownSource:
                self.until_there()
            except StoreError:
                pass
            return False

        until(left, "no leave was given")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(times(6)))
def test_whatever_is_killed_nothing_is_lost_and_nothing_twice(tmp_path: Path, seed: int) -> None:
    rng, dice = np.random.default_rng(seed), random.Random(seed)
    sharded = Sharded(str(tmp_path), 3)
    senders = [Sender(sharded, rank) for rank in range(2)]
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
                    sharded.kill_shard(dice.randrange(3))
                elif chance < 0.3:
                    sharded.kill_front()
                if dice.random() < 0.3:
                    time.sleep(0.1)  # for a snapshot
    for sender in senders:
        sender.until_there()
    for sender in senders:
        sender.leave()
    assert sharded.store.wait_finished(60), sharded.store.status()
    check(str(tmp_path), sent)


def test_the_front_forgets_nothing_that_a_shard_was_told_is_written(tmp_path: Path) -> None:
    sharded = Sharded(str(tmp_path), 2, world_size=1)
    sender = Sender(sharded, 0)
    rows = some_rows(np.random.default_rng(0), 1.0)
    sender.add(rows, 0, True)
    sender.until_there()
    until(lambda: sharded.front.part_state(0, 0, 0, 0) == WRITTEN)
    sharded.kill_front()
    assert sharded.front.part_state(0, 0, 0, 0) in (WRITTEN, UNKNOWN)
    before = sorted(path.name for path in (tmp_path / "spectra").iterdir())
    part = PublishedWindow("r", 0, 0, 0, 1, True, 1, 1, time_now(), [])
    sharded.front.accept(1, part)  # a shard that has not heard the answer
    assert sharded.front.part_state(1, 0, 0, 1) == WRITTEN
    assert sorted(path.name for path in (tmp_path / "spectra").iterdir()) == before
    sender.until_there()
    sender.leave()
    assert sharded.store.wait_finished(60)
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
    sharded = Sharded(str(tmp_path), 2, world_size=1)
    worker = Worker(sharded.store, 0, sharded.config)  # type: ignore[arg-type]
    rows = some_rows(np.random.default_rng(0), 1.0)
    sharded.store.take(*with_widths(worker, rows, 0, True))
    lost = sharded.shards[1]
    sharded._stop(lost)
    until(lambda: read_spectra(tmp_path).num_rows > 0)
    layers = {layer for layer, shard in zip(LAYERS, assign(LAYERS, 2), strict=True) if shard == 0}
    found = set(read_spectra(tmp_path).column("layer").to_pylist())
    if found == {info.name for info in layers}:  # the other's part did not come in before
        assert any("without the layers of shards [1]" in word for word in sharded.front.progress().problems)
    sharded.shards[0].leave(worker.source, completed=True, sent=worker.seq)
    sharded.front.leave(worker.source, completed=True, sent=worker.seq)
    assert sharded.front.wait_finished(30)


def test_what_one_shard_refuses_changes_no_other_answer(tmp_path: Path) -> None:
    sharded = Sharded(str(tmp_path), 2, world_size=1)
    worker = Worker(sharded.store, 0, sharded.config)  # type: ignore[arg-type]
    rows = some_rows(np.random.default_rng(1), 1.0)
    delta, buffer = with_widths(worker, rows, 0, True)
    bad = buffer.copy()
    bad[0] = np.nan
    with pytest.raises(DeltaRefused, match="non-finite"):
        sharded.store.take(delta.sealed(bad), bad)
    assert sharded.store.take(delta, buffer).next_seq == 1
    worker.leave()
    assert sharded.store.wait_finished(60)
    check(str(tmp_path), {0: [rows]}, workers=1)


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
    sharded = Sharded(str(tmp_path), 2, late_after=0.1)
    workers = [Worker(sharded.store, rank, sharded.config) for rank in range(2)]  # type: ignore[arg-type]
    rows = [some_rows(rng, 1.0) for _ in workers]
    sharded.store.take(*with_widths(workers[0], rows[0], 0, True))
    delta, buffer = with_widths(workers[1], rows[1], 0, True)
    until(lambda: read_spectra(tmp_path).num_rows == 12)
    for shard in sharded.shards:
        shard.finish("the workers are gone")
    sharded.front.finish("the workers are gone")
    assert sharded.front.wait_finished(60)
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
    assigned = dict(zip((layer.name for layer in LAYERS), assign(LAYERS, 2), strict=True))
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


AT_THE_END = """
import atexit, sys
import numpy as np
from tests import stores
from tests.store.test_sharded import LAYERS, Sharded, some_rows, with_widths

def send(step):
    rows = some_rows(np.random.default_rng(step), share=1.0)
    parts.store.take(*with_widths(worker, rows, step, closes=True))

def end():  # as a tracker's that nobody closed
    send(1)
    worker.leave()
    print(parts.store.wait_finished(60))

stores.LAYERS = LAYERS
parts = Sharded(sys.argv[1], 2, world_size=1)
worker = stores.Worker(parts.store, 0, parts.config)
send(0)
atexit.register(end)
"""


def test_shards_take_what_is_left_when_the_interpreter_ends(tmp_path: Path) -> None:
    """Thread pools are over by then: before anything of atexit runs."""
    command = [sys.executable, "-c", AT_THE_END, str(tmp_path)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert found.stdout == "True\n", found.stderr
    steps = read_spectra(str(tmp_path)).column("step").to_pylist()
    assert sorted(steps) == [0] * 2 * len(LAYERS) + [1] * 2 * len(LAYERS)
