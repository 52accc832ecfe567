"""A store that is killed at random instants behind a network that loses, repeats, delays and reorders.

In the end the files have every row once, whatever happened. Ranks are simulated with the outbox that workers have, so
that several deltas are on their way at once; real trackers with their own threads come after them.
"""

from __future__ import annotations

import contextlib
import functools
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from delve_ray import SaturationTracker, read_scalars
from delve_ray.errors import RunEnded, StoreError, UnknownSource
from delve_ray.outbox import Outbox
from delve_ray.store.core import CovarianceStore
from delve_ray.store.protocol import Ack, Delta, StoreConfig
from delve_ray.writers.base import Scalar
from tests.chaos.harness import (
    LAYERS,
    RUN,
    Incarnations,
    Truth,
    assert_published,
    config,
    delta_of,
    hasten,
    random_layer_rows,
    remember,
    source,
)
from tests.chaos.processes import times
from tests.chaos.sharded import Lives, lives_of
from tests.stores import park

WITHIN_S = 120.0
"""How long one simulated run may take on a busy machine."""
START = datetime(2026, 1, 1, tzinfo=UTC)


@dataclass
class Network:
    """Calls on their way to the store, and answers on their way back; what arrives next is left to chance."""

    store: Lives
    random: random.Random
    faulty: bool = True
    final: bool = False
    due: list[Callable[[], None]] = field(default_factory=list)

    def send(self, call: Callable[[CovarianceStore], Any], answered: Callable[[Any], None]) -> None:
        """Send a call, whose answer or error comes back some time, once, more often, or never."""
        for _ in range(self._copies()):
            self.due.append(lambda: self._arrive(call, answered))

    def step(self) -> None:
        """Let one of what is on its way arrive, mostly the oldest."""
        if self.due:
            index = self.random.randrange(len(self.due)) if self.faulty and self.random.random() < 0.5 else 0
            self.due.pop(index)()

    def _copies(self) -> int:
        return self.random.choice((0, 1, 1, 1, 1, 1, 1, 2, 3)) if self.faulty else 1

    def _arrive(self, call: Callable[[CovarianceStore], Any], answered: Callable[[Any], None]) -> None:
        assert self.store.life is not None
        try:
            answer: Any = call(self.store.life.store)
        except (RunEnded, StoreError) as error:  # a registration may be late
            answer = error
        for _ in range(self._copies()):
            self.due.append(lambda: answered(answer))


@dataclass
class Rank:
    """A worker as its sender and its packer are, without threads."""

    rank: int
    windows: int
    network: Network
    config: StoreConfig
    truth: Truth
    folder: str
    scalars: list[tuple[str, int, int, float]]
    window: int = 0
    sent: int = 0
    first: bool = True
    left: bool = False
    kept: dict[int, tuple[Delta, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.random = self.network.random
        self.source = source(self.rank)
        self.outbox = Outbox(self.config, LAYERS, self.folder)
        self.rows = np.random.default_rng([self.rank, self.random.getrandbits(32)])
        self.network.send(lambda store: store.register(self.source, self.config, LAYERS), lambda answer: None)

    def record(self) -> None:
        """Pack a delta of some rows; it may close the window."""
        if self.window == self.windows:
            return
        rows = random_layer_rows(self.rows, most=6) if self.random.random() < 0.9 else {}
        closes = self.random.random() < 0.3
        scalars = ()
        if self.random.random() < 0.2:
            at = START + timedelta(seconds=self.sent)
            scalars = (Scalar(RUN, 0, self.rank, "loss", self.sent, float(self.sent), at),)
            self.scalars.append(("loss", self.sent, self.rank, float(self.sent)))
        delta, buffer = delta_of(self.source, self.sent, self.window, rows, closes=closes, scalars=scalars)
        park(self.outbox, delta, buffer, first=self.first, memory=0, limit=0)
        self.kept[self.sent] = delta, buffer
        remember(self.truth, rows, 10 * self.window)
        self.sent, self.window, self.first = self.sent + 1, self.window + closes, closes

    def offer(self) -> None:
        """Offer the first delta that the store does not have, as the sender does, or any other one that waits."""
        found = self.outbox.next()
        if found is None:
            return
        if self.random.random() < 0.5:
            found = self.kept[self.random.choice(self.outbox.waiting).seq]
        delta, buffer = found
        self.network.send(lambda store: store.take(delta, buffer), self.note)
        self.outbox.done(found[0].seq)

    def heartbeat(self) -> None:
        """Ask what the store has."""
        self.network.send(lambda store: store.heartbeat(self.source), self.note)

    def leave(self) -> None:
        """Take leave, once the store has everything."""
        if self.window == self.windows and not self.outbox.waiting and not self.left:
            self.network.send(lambda store: store.leave(self.source, completed=True, sent=self.sent), self.note)

    def note(self, answer: Any) -> None:
        """What the sender does with an answer."""
        if isinstance(answer, UnknownSource):
            held = self.outbox.held(0, self.sent, self.window, first=self.first)
            rejoin = self.network.send
            rejoin(lambda store: store.register(self.source, self.config, LAYERS, held), lambda _: self.offer_all())
        elif isinstance(answer, StoreError):
            self.network.final |= answer.final
        elif isinstance(answer, Ack):
            self.outbox.acknowledge(answer)
            self.left = self.left or (answer.left and (answer.saved or self.network.store.finished))

    def offer_all(self) -> None:
        """The store knows nothing."""
        self.outbox.offer_all()


def run_simulated(seed: int, savefile: str, folder: Path, num_shards: int = 1) -> Lives:
    """One run of two to four ranks, from its first row to the end; returns what became of its store."""
    rng = random.Random(seed)
    world = rng.randint(2, 4)
    own = config(
        savefile=savefile,
        world_size=world,
        publish_every=rng.choice((0.0, 0.005)),
        late_after=rng.choice((0.0, 0.01, 0.05)),
        snapshot_every=0.01,
    )
    failing, every = rng.choice((0.0, 0.0, 0.3)), rng.choice((0.002, 0.02, 0.5))
    store = lives_of(own, rng, num_shards, failing, every)
    network, truth, scalars = Network(store, rng), Truth(), list[tuple[str, int, int, float]]()
    windows = rng.randint(2, 6)
    ranks = [Rank(rank, windows, network, own, truth, str(folder / f"{rank}"), scalars) for rank in range(world)]
    kills, deadline = rng.randint(2, 6), time.monotonic() + WITHIN_S
    while kills or not store.finished or any(rank.outbox.waiting for rank in ranks):
        assert time.monotonic() < deadline, (seed, store.life and store.life.store.status(), ranks)
        rank = rng.choice(ranks)
        if rng.random() < 0.1:
            rank.record()
        rng.choice((rank.offer, rank.offer, network.step, network.step, network.step, rank.heartbeat, rank.leave))()
        if rng.random() < 0.05:
            time.sleep(0.001)  # the store's own threads have to get on, too
        # The last kill comes when ranks take their leave, or even after the end, which was saved.
        leaving = any(r.left for r in ranks) and not (store.failing and store.finished)
        if kills and rng.random() < (0.01 if kills > 1 else 0.02 * leaving):
            store.kill(damage=None if store.finished else rng.choice((None, "flip", "cut")))
            kills -= 1
        kills = 0 if store.finished and store.failing else kills
        network.faulty = kills > 0
    assert not network.final
    assert_published(savefile, truth, world)
    assert_scalars(savefile, scalars)
    return store


def assert_scalars(savefile: str, scalars: list[tuple[str, int, int, float]]) -> None:
    """The files hold exactly these values of the user's."""
    table = read_scalars(savefile).to_pylist()
    assert sorted((row["name"], row["step"], row["rank"], row["value"]) for row in table) == sorted(scalars)


@pytest.mark.parametrize("seed", range(times(24)))
def test_every_row_once_whatever_the_network_and_the_store_do(
    seed: int, savefile: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hasten(monkeypatch)
    run_simulated(seed, savefile, tmp_path / "spill")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(times(8)))
def test_every_row_once_with_shards(seed: int, savefile: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hasten(monkeypatch)
    run_simulated(1000 + seed, savefile, tmp_path / "spill", num_shards=2 + seed % 2)


def end_run(store: Incarnations, sent: int) -> None:
    """The only rank takes its leave, and everything is written."""
    assert store.life is not None
    core = store.life.store
    assert core.leave(source(0), completed=True, sent=sent).left
    assert core.wait_finished(30)


@pytest.mark.parametrize("dies_before", ["nothing", "covariances/", "spectra/"])
@pytest.mark.parametrize("saved", [True, False])
def test_a_window_is_published_over_what_the_killed_store_showed(dies_before: str, saved: bool, savefile: str) -> None:
    """Whether a snapshot has a part of the window, or does not know it."""
    own = config(savefile=savefile, world_size=1, snapshot_every=3600.0)
    store, truth, rows = Incarnations(own, random.Random(0), every=3600.0), Truth(), np.random.default_rng(0)
    layers = [random_layer_rows(rows, share=1.0) for _ in range(4)]
    deltas = [delta_of(source(0), seq, 0, part, closes=seq == 3) for seq, part in enumerate(layers)]
    for part in layers:
        remember(truth, part, 0)
    store.start()
    store.life.store.register(source(0), own, LAYERS)
    for delta in deltas[:3]:  # shown live, each in a revision of its own
        assert store.life.store.take(*delta).merged
        if delta is deltas[2]:
            store.life.storage.dies_before = dies_before
            store.life.store.attempts[0].windows[0].revision += 1  # one that the next made needless before its turn
        store.life.store.flush(0.5)
        if saved and delta is deltas[0]:
            assert store.life.store.saver.wait_saved(store.life.store._version, WITHIN_S)
    store.kill()
    assert [store.life.store.take(*delta).merged for delta in deltas] == [not saved, True, True, True]
    end_run(store, 4)
    assert_published(savefile, truth, 1)


# --- real trackers -------------------------------------------------------------------------------------


class Unreliable(CovarianceStore):
    """The store as a worker reaches it: calls and answers get lost, come twice, or long after nobody waits for them."""

    def __init__(self, store: Lives, seed: int) -> None:
        self.incarnations, self.random = store, random.Random(seed)

    def _call(self, method: str, *args: Any, **options: Any) -> Any:
        fate = self.random.choice(("", "", "", "", "", "lost", "unanswered", "repeated", "delayed"))
        if fate == "delayed":
            threading.Timer(self.random.uniform(0, 0.1), self._in_silence, (method, args, options)).start()
        if fate in ("lost", "delayed"):
            raise StoreError(f"the store did not answer {method} in time")
        answer = self._arrive(method, args, options)
        if fate == "repeated":
            answer = self._arrive(method, args, options)
        if fate == "unanswered":
            raise StoreError(f"the store did not answer {method} in time")
        return answer

    def _arrive(self, method: str, args: Any, options: Any) -> Any:
        life = self.incarnations.life
        if life is None:
            raise StoreError("the store is unavailable")
        try:
            return getattr(life.store, method)(*args, **options)
        finally:
            if not life.storage.alive:  # whatever it answered
                raise StoreError("the store is unavailable")

    def _in_silence(self, method: str, args: Any, options: Any) -> None:
        with contextlib.suppress(Exception):
            self._arrive(method, args, options)

    def settings(self) -> StoreConfig:
        return self.incarnations.config

    def end(self, *_: object) -> None:
        """It ends by itself."""


for _method in ("register", "take", "heartbeat", "progress", "leave", "flush", "wait_finished"):
    setattr(Unreliable, _method, functools.partialmethod(Unreliable._call, _method))


def make_model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


class Trainer(threading.Thread):
    """One rank that trains, with a tracker as users have it; it keeps its rows itself."""

    def __init__(self, rank: int, store: Lives, windows: int, seed: int, spill: Path) -> None:
        super().__init__(name=f"rank-{rank}")
        self.rank, self.windows, self.random = rank, windows, random.Random(f"{seed} {rank}")
        self.unreliable = Unreliable(store, self.random.getrandbits(32))
        self.spill, self.truth = spill, Truth()
        self.scalars: list[tuple[str, int, int, float]] = []
        self.problem: BaseException | str | None = None

    def run(self) -> None:
        try:
            self.train()
        except BaseException as error:
            self.problem = error

    def train(self) -> None:
        model, twin = make_model(), make_model()  # untracked, for the truth
        twin.load_state_dict(model.state_dict())
        options = {"rank": self.rank, "publish_every": 0.005, "spill_dir": str(self.spill / f"{self.rank}")}
        tracker = SaturationTracker(modules=model, store=self.unreliable, **options)
        for window in range(self.windows):
            for number in range(self.random.randrange(5)):
                model.train(self.random.random() < 0.6)
                self.batch(model, twin, 10 * window)
                if self.random.random() < 0.2:
                    tracker.add_scalar("loss", number, step=1000 * window + number)
                    self.scalars.append(("loss", 1000 * window + number, self.rank, float(number)))
                time.sleep(self.random.uniform(0, 0.03))
            tracker.add_saturations(10 * window)
        tracker.close(WITHIN_S)
        self.problem = tracker._shipper.lost or (len(tracker._shipper.outbox) and "not everything was delivered")

    def batch(self, model: nn.Sequential, twin: nn.Sequential, step: int) -> None:
        """One forward, whose outputs are kept."""
        seed = self.random.getrandbits(32)
        x = torch.randn(self.random.randint(1, 20), 4, generator=torch.Generator().manual_seed(seed)) + 5
        with torch.no_grad():
            model(x)
            phase = "train" if model.training else "eval"
            for name, rows in (("0", twin[0](x)), ("2", twin(x))):
                self.truth.setdefault((phase, step, name), []).append(rows.double().numpy())


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "num_shards"), [(seed, 1 + (seed % 4 == 3)) for seed in range(times(8))])
def test_every_row_once_with_real_trackers(
    seed: int, num_shards: int, savefile: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hasten(monkeypatch)
    SaturationTracker("unused", modules=make_model(), nosave=True).close()  # the first one takes its time
    rng = random.Random(seed)
    world = rng.randint(2, 4)
    late, every = rng.choice((0.0, 0.02)), rng.choice((0.01, 0.2))
    own = config(savefile=savefile, world_size=world, publish_every=0.02, late_after=late, snapshot_every=every)
    store = lives_of(own, rng, num_shards, rng.choice((0.0, 0.2)), every)
    trainers = [Trainer(rank, store, 25, seed, tmp_path) for rank in range(world)]
    for trainer in trainers:
        trainer.start()
    for _ in range(8):
        time.sleep(rng.uniform(0.01, 0.3))
        if not store.finished:
            store.kill(damage=rng.choice((None, "flip", "cut")))
    for trainer in trainers:
        trainer.join(WITHIN_S)
    assert [trainer.problem for trainer in trainers if trainer.is_alive() or trainer.problem] == []
    truth, scalars = Truth(), []
    for trainer in trainers:
        scalars += trainer.scalars
        for key, parts in trainer.truth.items():
            truth.setdefault(key, []).extend(parts)
    assert_published(savefile, truth, world)
    assert_scalars(savefile, scalars)
    assert not Path(savefile, "undelivered").exists()
