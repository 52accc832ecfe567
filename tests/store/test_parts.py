"""Parts of windows on their way from the shards to the files: what is behind or fails there holds up nothing else."""

from __future__ import annotations

import contextlib
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from delve_ray.errors import ReadError, StoreError
from delve_ray.recovery import recover
from delve_ray.schema import LayerRow, PublishedWindow
from delve_ray.storage import Storage
from delve_ray.store import parts, saving
from delve_ray.store.front import FrontStore
from delve_ray.store.parts import LOST, PENDING, UNKNOWN, WRITTEN, PartWriter, ShardStore, detached, shard_config
from delve_ray.store.saving import Saver
from delve_ray.store.sharded import ShardedStore
from delve_ray.store.writing_items import row_bytes
from delve_ray.writers.base import Writer
from delve_ray.writers.parquet import ParquetWriter
from tests.store.six_layers import Sender, check, mortal, run_config, some_rows, with_widths
from tests.store.six_layers import layers as layers  # the fixture
from tests.stores import Keeper, Worker, until
from tests.windows import layer_row, window

WINDOWS = 4


class Full(Keeper):
    """A writer whose destination is full until there is room."""

    def __init__(self) -> None:
        super().__init__("full")
        self.room = threading.Event()

    def write(self, window: PublishedWindow) -> None:
        if not self.room.is_set():
            raise OSError("no space left on device")
        super().write(window)


def with_writers(savefile: Path, writers: Sequence[Writer], **changes: Any) -> ShardedStore:
    """A front with these writers, and two shards."""
    own = run_config(savefile, 2, **changes)
    front = FrontStore(own, writers=writers, saver=Saver(Storage(savefile), 0.05))
    configs = [shard_config(own, shard) for shard in range(2)]
    return ShardedStore(
        front,
        [
            ShardStore(each, writers=[PartWriter(shard, lambda: front)], saver=Saver(Storage(each.savefile), 0.05))
            for shard, each in enumerate(configs)
        ],
    )


def send_windows(store: Any, worker: Worker, count: int = WINDOWS) -> dict[int, list[Any]]:
    """Rows of so many windows."""
    rng = np.random.default_rng(5)
    sent = {step: [some_rows(rng, 1.0)] for step in range(count)}
    for step, (rows,) in sent.items():
        store.take(*with_widths(worker, rows, step, True))
    return sent


def steps_of(keeper: Keeper) -> list[int]:
    return [window.step for window in keeper.windows]


def test_a_writer_that_is_behind_costs_the_others_nothing(tmp_path: Path) -> None:
    full, other = Full(), Keeper()
    store = with_writers(tmp_path, [full, other], world_size=1)
    worker = Worker(store, 0, store.settings())
    send_windows(store, worker)
    until(lambda: steps_of(other) == list(range(WINDOWS)), "the writer that works waits for the other")
    assert store.progress().published == WINDOWS
    assert any("writer full has failed to write step 0" in problem for problem in store.progress().problems)
    for shard in store.shards:
        assert shard.status()["waiting_windows"] == WINDOWS, "what is not written everywhere is kept"
    full.room.set()
    worker.leave()
    assert store.wait_finished(60)
    assert steps_of(full) == steps_of(other) == list(range(WINDOWS))
    assert store.progress().problems == ()


def test_a_window_that_a_writer_gives_up_holds_up_no_other(tmp_path: Path) -> None:
    broken, other = Keeper("broken", fail=True), Keeper()
    store: Any = with_writers(tmp_path, [broken, other], world_size=1)
    worker = Worker(store, 0, store.settings())
    store.front.running().writers[0]._retry_s = (0.01, 0.01)
    send_windows(store, worker)
    until(lambda: steps_of(other) == list(range(WINDOWS)), "the writer that works waits for the other")
    until(lambda: store.front.part_state(0, 0, WINDOWS - 1, 0) == LOST)
    worker.leave()
    assert store.wait_finished(60)
    assert [problem for problem in store.progress().problems if "did not write 4 windows" in problem]
    for shard in store.shards:
        until(lambda shard=shard: shard.finished)
        assert shard.attempts[0].windows.keys() == set(range(WINDOWS)), "a recovery may still write them"
        assert shard.progress().problems == ()


@pytest.mark.parametrize("together", [True, False], ids=["on one machine", "on two"])
def test_what_no_store_could_save_is_recovered_from_where_it_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, together: bool
) -> None:
    run, rescue = tmp_path / "run", tmp_path / "rescue"
    monkeypatch.setattr("delve_ray.store.saved.rescue_folder", lambda run: str(rescue))
    store: Any = with_writers(run, [Keeper("broken", fail=True)], world_size=1)
    worker = Worker(store, 0, store.settings())
    store.front.running().writers[0]._retry_s = (0.01, 0.01)
    sent = send_windows(store, worker)
    until(lambda: store.front.part_state(0, 0, WINDOWS - 1, 0) == LOST)
    worker.leave()
    assert store.wait_finished(60)
    save = saving.save_once

    def full(storage: Storage, frozen: Any) -> None:
        if "rescue" not in storage.uri:
            raise OSError("no space left on device")
        save(storage, frozen)

    monkeypatch.setattr("delve_ray.store.saved.save_once", full)
    for shard in store.shards:
        until(lambda shard=shard: shard.finished)
        shard._rescue()
        number = Path(shard.config.savefile).name
        assert f"recover {run} {rescue}/shards/{number}` writes it" in shard.running().problems()[-1]
        shutil.rmtree(run / "shards" / number / "store")
    folders = [rescue]
    if not together:
        shutil.move(rescue / "shards" / "1", tmp_path / "other")
        folders.append(tmp_path / "other")
    recover(run, folders)
    check(str(run), sent, workers=1)


def test_a_shard_alone_is_no_run_to_recover(tmp_path: Path) -> None:
    """Its windows are not those of all layers."""
    store: Any = with_writers(tmp_path / "run", [Keeper()], world_size=1)
    worker = Worker(store, 0, store.settings())
    send_windows(store, worker, 1)
    (shard, _) = store.shards
    saving.save_once(Storage(tmp_path / "kept"), shard.freeze())
    with pytest.raises(ReadError, match=r"no snapshot of the run whose shards \[0\] were kept; give its savefile"):
        recover(tmp_path / "elsewhere", [tmp_path / "kept"], force=True)


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """A disk that takes no spectra and covariances until this is called."""
    room, write = threading.Event(), ParquetWriter.write

    def write_if_room(self: ParquetWriter, window: PublishedWindow) -> None:
        if not room.is_set():
            raise OSError("no space left on device")
        write(self, window)

    monkeypatch.setattr(ParquetWriter, "write", write_if_room)
    return room.set


@pytest.mark.parametrize("killed", ["the front", "a shard", "all"])
def test_what_was_handed_over_and_not_written_outlives_a_kill(
    tmp_path: Path, full: Callable[[], None], killed: str
) -> None:
    lives = mortal(tmp_path, 2, world_size=1)
    sender = Sender(lives.reached, 0, lives.config)
    rng = np.random.default_rng(7)
    sent = {step: [some_rows(rng, 1.0)] for step in range(WINDOWS)}
    for step, (rows,) in sent.items():
        sender.add(rows, step, True)
    sender.until_there()
    until(lambda: lives.front.reached.progress().published == WINDOWS, "all parts are there")
    until(lambda: not (sender.offer() or sender.kept), "a store that was started anew has everything")
    for process in {"the front": [lives.front], "a shard": lives.shards[:1]}.get(killed, [lives.front, *lives.shards]):
        lives.kill(process=process)
    if killed != "a shard":
        until(lambda: PENDING in [lives.front.reached.part_state(shard, 0, WINDOWS - 1, 0) for shard in range(2)])
    full()
    sender.until_there()
    sender.leave()
    assert lives.reached.wait_finished(60), lives.reached.status()
    check(str(tmp_path), sent, workers=1)


@pytest.mark.parametrize(("dies_before", "ahead"), [("covariances/", 0), ("spectra/", 1)])
def test_a_front_that_dies_in_the_middle_of_a_window_writes_it_anew(
    tmp_path: Path, dies_before: str, ahead: int
) -> None:
    lives = mortal(tmp_path, 2, world_size=1)
    sender = Sender(lives.reached, 0, lives.config)
    rng = np.random.default_rng(8)
    sent = {step: [some_rows(rng, 1.0)] for step in range(2)}
    sender.add(*sent[0], 0, True)
    sender.until_there()
    until(lambda: len(list(tmp_path.glob("spectra/*.parquet"))) == 1)
    storage = lives.front.life.storage
    storage.dies_before = dies_before
    sender.add(*sent[1], 1, True)
    with contextlib.suppress(StoreError):  # the front may be gone before it answers
        sender.offer()
    until(lambda: not storage.alive)
    files = {kind: len(list(tmp_path.glob(f"{kind}/*.parquet"))) for kind in ("spectra", "covariances")}
    assert files == {"spectra": 1, "covariances": 1 + ahead}
    lives.kill(process=lives.front)
    sender.until_there()
    sender.leave()
    assert lives.reached.wait_finished(60), lives.reached.status()
    check(str(tmp_path), sent, workers=1)


# --- the shard's side --------------------------------------------------------------------------------------


class Slow:
    """A front that writes the oldest part once it has `most` of them, or the last of all."""

    def __init__(self, most: int, count: int) -> None:
        self.most, self.left = most, count
        self.kept: list[parts.Key] = []
        self.longest = 0
        self.done: list[int] = []

    def accept(
        self, shard: int, part: PublishedWindow, after: parts.Key | None = None, problems: Sequence[str] = ()
    ) -> bool:
        self.left -= 1
        self.kept.append((part.attempt, part.window, part.revision))
        self.longest = max(self.longest, len(self.kept))
        return True

    def part_state(self, shard: int, *key: int) -> str:
        assert key == self.kept[0]
        if len(self.kept) < self.most and self.left:
            return PENDING
        self.kept.pop(0)
        return WRITTEN

    def shard_done(self, shard: int, problems: Sequence[str] = ()) -> None:
        self.done.append(shard)


@pytest.mark.parametrize(("room", "most"), [(0, 1), (3, 3), (100, 6)])
def test_what_is_handed_over_and_not_written_is_bounded(monkeypatch: pytest.MonkeyPatch, room: int, most: int) -> None:
    """By bytes; but one part may always be on its way."""
    monkeypatch.setattr(parts, "HELD_BYTES", 2 * room * row_bytes(layer_row()))
    front, told = Slow(most, 6), list[tuple[int, bool]]()
    writer = PartWriter(1, lambda: front, num_shards=2)
    for step in range(6):
        part = window([layer_row()], window=step)
        writer.write(part)
        writer.then((0, step, 0), lambda written, step=step: told.append((step, written)))
    writer.close()
    assert front.longest == most
    assert told == [(step, True) for step in range(6)]
    assert front.done == [1]


def test_a_front_takes_nothing_after_a_part_that_it_has_lost(tmp_path: Path) -> None:
    keeper = Keeper()
    store = with_writers(tmp_path, [keeper], world_size=1)
    front: Any = store.front
    worker = Worker(front, 0, store.settings())
    for step in range(2):
        worker.send({}, step, True)
    first, second = (window(run="r", window=step, step=step, world_size=1, workers=1) for step in range(2))
    assert not front.accept(0, second, (0, 0, 0))
    assert front.part_state(0, 0, 1, 0) == UNKNOWN
    for shard in range(2):
        assert front.accept(shard, first)
        assert front.accept(shard, second, (0, 0, 0))
    until(lambda: steps_of(keeper) == [0, 1])


def test_a_part_that_is_kept_has_arrays_of_its_own() -> None:
    values = np.arange(6.0)
    views: dict[str, Any] = dict.fromkeys(("eigenvalues", "mean"), values[:3])
    row: LayerRow = layer_row(**views, covariance=values)
    (same,) = detached(window([row])).rows
    assert (same.layer, same.embedding) == (row.layer, None)
    for name in ("eigenvalues", "mean", "covariance"):
        assert not np.shares_memory(getattr(same, name), values)
        np.testing.assert_array_equal(getattr(same, name), getattr(row, name))
