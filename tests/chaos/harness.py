"""What tests of the store share: known rows, hostile values, a store that can be killed, what the files have to say."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from delve_ray import read_covariances, read_spectra, shipping, waiting
from delve_ray.errors import StoreError
from delve_ray.moments import F64, Moments, unpack_triangle
from delve_ray.schema import PHASES
from delve_ray.storage import Data, Storage, _pieces
from delve_ray.store import core, parts, publisher, saving, writing
from delve_ray.store.core import CovarianceStore
from delve_ray.store.protocol import Delta, LayerInfo, Source, StoreConfig
from delve_ray.store.saving import FOLDER, Saver
from delve_ray.writers.parquet import ParquetWriter
from tests.helpers import TOLERANCE, covariance_error, two_pass_covariance

RUN = "r"
LAYERS = [LayerInfo("conv", "Conv2d", 3), LayerInfo("fc", "Linear", 5), LayerInfo("lazy", "Linear", None)]
WIDTHS = (3, 5, 4)
"""Features of each layer; of the last only a delta tells them."""

Rows = dict[tuple[int, int], F64]
"""Rows by (layer index, phase index)."""
Truth = dict[tuple[str, int, str], list[F64]]
"""All rows that were ever recorded, by (phase, step, layer)."""


# --- deltas --------------------------------------------------------------------------------------------


def source(rank: int, name: str = "", token: str = "t") -> Source:
    """Rank `rank` of the run."""
    return Source(RUN, token, rank, name or f"source-{rank}", "host", 100 + rank)


def config(**changes: Any) -> StoreConfig:
    """A run of which nothing goes to files, with every option that makes it act by itself off."""
    values: dict[str, Any] = {
        "savefile": "/nowhere",
        "world_size": 2,
        "stats": ("trace", "cov"),
        "publish_every": 0.0,
        "silent_after": 0.0,
        "late_after": 0.0,
    }
    return StoreConfig(RUN, **(values | changes))


def random_layer_rows(rng: np.random.Generator, most: int = 12, share: float = 0.6) -> Rows:
    """A few correlated rows for a share of the layers and phases, away from zero."""
    found = {}
    for layer, width in enumerate(WIDTHS):
        for phase in range(len(PHASES)):
            if rng.random() < share:
                values = rng.normal(size=(int(rng.integers(1, most)), width)) * np.linspace(1, 3, width)
                values[:, 1:] += values[:, :-1]
                found[layer, phase] = values + 10
    return found


def pack(rows: Rows) -> tuple[dict[str, Any], F64]:
    """Entries, widths and buffer of a delta of these rows."""
    entries, parts = [], [np.empty(0)]
    for (layer, phase), values in sorted(rows.items()):
        moments = Moments.from_rows(values)
        entries.append((layer, phase, moments.n, 0))
        parts += [moments.mean, moments.packed()]
    widths = {layer: WIDTHS[layer] for layer, _ in rows if LAYERS[layer].features is None}
    return {"entries": tuple(entries), "widths": tuple(widths.items())}, np.concatenate(parts)


def remember(truth: Truth, rows: Rows, step: int) -> None:
    """Add rows to the truth."""
    for (layer, phase), values in rows.items():
        truth.setdefault((PHASES[phase], step, LAYERS[layer].name), []).append(values)


def delta_of(src: Source, seq: int, window: int, rows: Rows, *, closes: bool = False, **more: Any) -> tuple[Delta, F64]:
    """A sealed delta of these rows for a window, whose step is ten times its ordinal, and its buffer."""
    fields, buffer = pack(rows)
    delta = Delta(src, 0, seq, window, 10 * window, closes, closes, **(fields | more))
    return delta.sealed(buffer), buffer


# --- values that are none ------------------------------------------------------------------------------


class Hostile:
    """An object of which nothing can be asked."""

    def _refuse(self, *_: object) -> Any:
        raise RuntimeError("not to be touched")

    __repr__ = __str__ = __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __hash__ = _refuse  # type: ignore
    __len__ = __iter__ = __bool__ = __int__ = __index__ = __float__ = __getitem__ = __contains__ = _refuse


class HostileText(str):
    """A name that cannot be shown."""

    __slots__ = ()
    __repr__ = __str__ = __format__ = Hostile._refuse  # type: ignore[assignment]


class HostileTuple(tuple[Any, ...]):
    """A tuple that cannot be shown."""

    __slots__ = ()
    __repr__ = Hostile._refuse  # type: ignore[assignment]


HUGE = 10**5000
"""A number with more digits than Python is willing to write."""
WRONG: list[Any] = [
    *(None, "text", b"bytes", 1.5, float("nan"), True, 7, -1, HUGE, 2**64, {"a": 1}, {1, 2}, object(), (None,)),
    *(np.int64(0), np.float64(1.0), np.bool_(True), np.zeros(3), [[0, [1]]], [(0, 0, 1, 0)], ((0, 0, 1),)),
    *(((0, 0, 1.0, 0),), ((0, 0, True, 0),), ((0, 0, np.int64(1), 0),), (((0,), 0, 1, 0),), ([0, 0, 1, 0],)),
    *(((0, 0, Hostile(), 0),), HostileTuple(((0, 0, 1, 0),)), HostileText(RUN), Hostile()),
]
"""Values that most fields cannot have."""


def is_wrong(name: str, value: Any) -> bool:
    """Whether a field of a delta or a source cannot have one of these values, whatever else is right."""
    if name in ("attempt", "seq", "window", "step", "checksum", "rank", "pid"):
        return type(value) is not int or value in (HUGE, 2**64) or (value == -1 and name != "step")
    if name in ("closes", "labelled", "complete"):
        return type(value) is not bool
    return name not in ("run", "token", "source", "host") or type(value) is not str


# --- the end -------------------------------------------------------------------------------------------


def assert_published(savefile: str, truth: Truth, world_size: int) -> None:
    """The files hold exactly these rows: each once, as final, by all ranks."""
    table = {(row["phase"], row["step"], row["layer"]): row for row in read_covariances(savefile).to_pylist()}
    assert sorted(table) == sorted(truth)
    for key, row in table.items():
        rows = np.concatenate(truth[key])
        reference = two_pass_covariance(rows)
        assert (key, row["samples"], row["revision"]) == (key, len(rows), row["revision"])
        assert covariance_error(unpack_triangle(row["covariance"], rows.shape[1]), reference) <= TOLERANCE, key
        assert np.allclose(row["mean"], rows.mean(0), rtol=1e-9, atol=1e-9), key
        said = row["workers"], row["world_size"], row["final"]
        assert (key, *said) == (key, world_size, world_size, True), row["revision"]
    spectra = {(row["phase"], row["step"], row["layer"]): row for row in read_spectra(savefile).to_pylist()}
    assert {key: (row["samples"], row["final"]) for key, row in spectra.items()} == {
        key: (row["samples"], True) for key, row in table.items()
    }


def eventually(condition: Any, seconds: float = 30.0) -> None:
    """Wait for a condition that has to come true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.002)


def hasten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten every pause, so that much happens in a second."""
    monkeypatch.setattr(saving, "HURRY_S", 0.001)
    monkeypatch.setattr(saving, "SHARE", 1)
    monkeypatch.setattr(saving, "RETRY_S", (0.005, 0.02))
    monkeypatch.setattr(core, "SAVE_TIMEOUT_S", 0.5)
    monkeypatch.setattr(publisher, "_POLL_S", 0.005)
    monkeypatch.setattr(parts, "TOGETHER_S", 0.05)
    monkeypatch.setattr(parts, "PAUSE_S", (0.001, 0.02))
    monkeypatch.setattr(writing, "RETRY_S", (0.01, 0.05))
    monkeypatch.setattr(shipping, "HEARTBEAT_S", 0.02)
    monkeypatch.setattr(shipping, "RETRY_S", (0.001, 0.01))
    monkeypatch.setattr(waiting, "_PAUSE_S", (0.002, 0.02))
    monkeypatch.setattr("delve_ray.memory.MIN_OUTBOX_BYTES", 600)  # a few deltas; the rest goes to disk


# --- a store that can be killed ------------------------------------------------------------------------


class KilledError(OSError):
    """A process that was killed writes nothing."""


class MortalStorage(Storage):
    """A run's directory as one process writes it: nothing any more once the process is killed.

    Snapshots fail now and then, with the probability `failing`.
    """

    def __init__(self, savefile: str, failing: float, seed: int) -> None:
        super().__init__(savefile)
        self.alive = True
        self.dies_before = "nothing"
        """Where a name begins so, the process is killed before it writes that file."""
        self._failing = failing
        self._random = random.Random(seed)
        self._lock = threading.RLock()

    def kill(self) -> None:
        """End writing at this instant: what is being written is never seen, though a part of it may lie there."""
        self.alive = False
        with self._lock:
            folder = Path(self.local_path, FOLDER)
            if folder.exists():
                (folder / f".snapshot-cut.{self._random.getrandbits(32):08x}.tmp").write_bytes(b"a part")

    @contextmanager
    def _changing(self) -> Iterator[None]:
        with self._lock:
            self._check_alive()
            yield

    def _check_alive(self) -> None:
        if not self.alive:
            raise KilledError("killed")

    def _while_alive(self, data: Data) -> Iterator[Any]:
        for piece in _pieces(data):
            self._check_alive()
            yield piece
        self._check_alive()

    def write_atomic(self, relative: str, data: Data) -> None:
        with self._changing():
            self.alive = not relative.startswith(self.dies_before)
            if relative.startswith(FOLDER) and self._random.random() < self._failing:
                raise OSError("no space left on device")
            super().write_atomic(relative, self._while_alive(data))

    def write_new(self, relative: str, data: Data) -> bool:
        with self._changing():
            return super().write_new(relative, self._while_alive(data))

    def move(self, relative: str, to: str) -> None:
        with self._changing():
            super().move(relative, to)

    def delete(self, relative: str) -> None:
        with self._changing():
            super().delete(relative)

    def delete_temporaries(self, relative_dir: str) -> None:
        with self._changing():
            super().delete_temporaries(relative_dir)


@dataclass
class Life:
    """One process of a store, from its start to its end by a kill."""

    store: CovarianceStore
    storage: MortalStorage

    def kill(self) -> None:
        """From now on nothing of it is seen, as after SIGKILL; its threads end by themselves."""
        self.storage.kill()
        saver, running = self.store.saver, self.store.publisher
        assert saver is not None
        self.store.ended = lambda: None  # type: ignore[method-assign]
        with saver._changed:
            saver._stopping = True
            saver._changed.notify_all()
        if running is not None:
            for writer in running.writers:
                if isinstance(writer.writer, parts.PartWriter):
                    writer.writer.stop_waiting()
                with writer._changed:
                    writer._ending = writer._stopping = True
                    writer._changed.notify_all()
            running.submit([], end=True)


def make_store(config: StoreConfig, storage: Storage, saver: Saver) -> CovarianceStore:
    """A store with its files."""
    return CovarianceStore(config, writers=[ParquetWriter(storage)], saver=saver, finish_timeout=20.0)


@dataclass
class Incarnations:
    """The store of one run through all its lives; whoever calls while there is none gets no answer."""

    config: StoreConfig
    random: random.Random
    failing: float = 0.0
    every: float = 0.01
    make: Callable[[StoreConfig, MortalStorage, Saver], CovarianceStore] = make_store
    lives: int = 0
    restored: int = 0
    damaged: int = 0
    life: Life | None = None
    lock: threading.RLock = field(default_factory=threading.RLock)

    def start(self) -> None:
        """Begin the next life, as the actor's constructor does."""
        storage = MortalStorage(self.config.savefile, self.failing, self.random.getrandbits(32))
        store = self.make(self.config, storage, Saver(storage, self.every))
        if self.lives:
            self.restored += store.restore()
            store.config = core.replace(store.config, resume=True)
        self.lives += 1
        with self.lock:
            self.life = Life(store, storage)

    @property
    def reached(self) -> Any:
        """The store as a worker reaches it, through all its lives."""
        return Reached(self)

    @property
    def finished(self) -> bool:
        """Whether the run has ended and everything is written."""
        return self.life is not None and self.life.store.joined and self.life.store.finished

    def end(self) -> None:
        """Kill the store; nobody starts it anew."""
        with self.lock:
            life, self.life = self.life, None
        assert life is not None
        life.kill()

    def kill(self, *, damage: str | None = None) -> None:
        """Kill the store and start it anew; its newest snapshot may be damaged in between, and the start must say so.

        There is no damage where there is no snapshot before that one.
        """
        self.end()
        name = damage_newest(self.config.savefile, damage, self.random) if damage else None
        self.start()
        if name is not None:
            self.damaged += 1
            folder = Path(self.config.savefile, FOLDER)
            assert (folder / f"damaged-{name}").exists()
            assert not (folder / name).exists()
            assert self.life is not None
            said = self.life.store.status()["snapshots"]["damaged"]
            assert [line for line in said if name in line] == said
            assert len(said) == 1


class Reached:
    """A store through all its lives: it does not answer while there is none, nor what a life was asked that ends.

    Nor does a `caller` get through that was killed itself.
    """

    def __init__(self, lives: Incarnations, caller: MortalStorage | None = None) -> None:
        self._lives, self._caller = lives, caller

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            life = self._lives.life
            if life is None or (self._caller is not None and not self._caller.alive):
                raise StoreError("it is gone")
            try:
                return getattr(life.store, name)(*args, **options)
            finally:
                if not life.storage.alive:
                    raise StoreError("it is gone")

        return call


def snapshots(savefile: str) -> list[Path]:
    """The snapshots of a run, the newest last."""
    return sorted(Path(savefile, FOLDER).glob("snapshot-*.arrow"))


def damage_newest(savefile: str, kind: str, rng: random.Random) -> str | None:
    """Flip a bit of the newest snapshot, or cut it ("flip", "cut"), if there is one before it; its name."""
    found = snapshots(savefile)
    if len(found) < 2:
        return None
    data = bytearray(found[-1].read_bytes())
    if kind == "cut":
        del data[rng.randrange(len(data)) :]
    else:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    found[-1].write_bytes(data)
    return found[-1].name
