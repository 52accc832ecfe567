"""Malformed deltas and registrations: each is refused in words, and the store stays as it was."""

from __future__ import annotations

import contextlib
import gc
import pickle
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import fields, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest

from delve_ray.errors import DeltaRefused, UnknownSource
from delve_ray.sketch import WHOLE
from delve_ray.store.assignment import assign
from delve_ray.store.attempt import AHEAD
from delve_ray.store.core import CovarianceStore
from delve_ray.store.door import MAX_COUNT, MAX_NAME
from delve_ray.store.protocol import Ack, Delta, Held, LayerInfo, Source, moments_size
from delve_ray.store.sharded import LocalShards
from delve_ray.writers.base import Scalar
from tests.chaos.harness import HUGE, LAYERS, RUN, WRONG, Hostile, HostileText, Rows, config, delta_of, is_wrong, source
from tests.chaos.harness import random_layer_rows as rows_of
from tests.chaos.processes import memory, times
from tests.helpers import covariance_error, two_pass_covariance

ROUNDS = 100_000
MOST_BYTES = 16 << 20
"""What the process may grow by in the second half of the rounds."""
COUNTERS = ("refused", "repeated", "late", "bytes", "ranks", "windows")
CONFIG = config(world_size=3, save_to=())


class Running:
    """A store in the middle of a run of three ranks.

    Rank 0 is at its fourth delta, with the sixth there already; rank 1 has closed a window; rank 2 has not come.
    """

    def __init__(self, num_shards: int = 1) -> None:
        self.rng = np.random.default_rng(7)
        self.store: Any = CovarianceStore(CONFIG, writers=[])
        self.stores: list[CovarianceStore] = [self.store]
        if num_shards > 1:
            self.store = LocalShards(replace(CONFIG, num_shards=num_shards), lambda _: None)
            self.stores = [self.store.local_front, *self.store.local_shards]
        self.assigned = assign(LAYERS, num_shards, WHOLE)
        for rank in range(2):
            self.store.register(source(rank), CONFIG, LAYERS)
        self.rows: list[Rows] = []
        for rank, seq in [(0, 0), (0, 1), (0, 2), (0, 5), (1, 0)]:
            self.send(rank, seq, closes=rank == 1)
        assert self.store.flush(30)
        self.before = self.state()

    def send(self, rank: int, seq: int, *, closes: bool = False) -> None:
        """A good delta."""
        rows = rows_of(self.rng, share=1.0)
        assert self.store.take(*delta_of(source(rank), seq, 0, rows, closes=closes)).merged
        self.rows.append(rows)

    def holder(self, layer: int) -> CovarianceStore:
        """The store that has a layer's moments."""
        return self.stores[self.assigned[layer] + (len(self.stores) > 1)]

    def state(self) -> Any:
        """Everything that a delta may change, as data that can be compared."""
        published = {
            (layer.name, phase): self.holder(index).covariance(layer.name, phase).tobytes()
            for index, layer in enumerate(LAYERS)
            for phase in ("train", "eval")
        }
        return [self._state_of(store) for store in self.stores], published

    def _state_of(self, store: CovarianceStore) -> Any:
        status, frozen = store.status(), store.freeze()
        ranks = {rank: {k: v for k, v in said.items() if k != "silent_s"} for rank, said in status["ranks"].items()}
        status = {key: value for key, value in status.items() if key not in COUNTERS}
        moments = [cut.collect() for cut in frozen.cuts]
        arrays = [(part.n, part.nonfinite, part.mean.tobytes(), part.packed.tobytes()) for part in moments]
        return status, ranks, frozen.version, frozen.header, frozen.marks, arrays

    def check_exact(self) -> None:
        """A good delta is merged, and what is published is that of all rows."""
        self.send(0, 3)
        assert self.store.flush(30)
        for index, layer in enumerate(LAYERS):
            store = self.holder(index)
            for phase, name in enumerate(("train", "eval")):
                rows = np.concatenate([part[index, phase] for part in self.rows if (index, phase) in part])
                latest = store.running().latest(index, phase)
                assert latest is not None
                assert latest.n == len(rows)
                assert covariance_error(store.covariance(layer.name, name), two_pass_covariance(rows)) < 1e-12


# --- how deltas are made malformed ---------------------------------------------------------------------

Made = tuple[Any, Any, str]
"""A delta, its buffer, and what becomes of it: refused, unknown, repeated or busy."""
ROWS = {(0, 0): np.arange(12.0).reshape(4, 3), (1, 1): np.arange(10.0).reshape(2, 5) ** 2, (2, 0): np.eye(4)}
GOOD, GOOD_BUFFER = delta_of(source(0), 3, 0, ROWS)  # the first that the store does not have


def changed(buffer: Any = GOOD_BUFFER, *, sealed: bool = True, expected: str = "refused", **changes: Any) -> Made:
    """The good delta with other values, under a checksum that fits where there can be one."""
    delta = replace(GOOD, **changes)
    if sealed and "checksum" not in changes:
        try:
            delta = delta.sealed(np.ascontiguousarray(buffer, dtype=np.float64))
        except Exception:
            return delta, buffer, expected
    return delta, buffer, expected


def flipped_bits(rng: random.Random) -> Made:
    """Bits of one number, or of several bytes in the header, changed on the way."""
    data, start = bytearray(GOOD_BUFFER.tobytes()), 8 * rng.randrange(GOOD_BUFFER.size)
    for place in rng.sample(range(64), rng.choice((1, 1, 2, 9))):
        data[start + place // 8] ^= 1 << place % 8
    which, place = rng.randrange(len(GOOD.entries)), rng.randrange(4)
    entry = tuple(value ^ ((index == place) << rng.randrange(64)) for index, value in enumerate(GOOD.entries[which]))
    name = rng.choice(("attempt", "seq", "window", "step", "checksum"))
    return rng.choice(
        (
            changed(np.frombuffer(bytes(data), np.float64), sealed=False),
            changed(sealed=False, **{name: getattr(GOOD, name) ^ (1 << rng.randrange(64))}),
            changed(sealed=False, entries=(*GOOD.entries[:which], entry, *GOOD.entries[which + 1 :])),
            changed(sealed=False, **{name: not getattr(GOOD, name) for name in ("closes", "complete")}),
        )
    )


def wrong_length(rng: random.Random) -> Made:
    size = rng.choice((0, 1, GOOD_BUFFER.size - 1, GOOD_BUFFER.size + 1, rng.randrange(3 * GOOD_BUFFER.size), 10_000))
    return changed(np.resize(GOOD_BUFFER, size if size != GOOD_BUFFER.size else size + 1))


def wrong_array(rng: random.Random) -> Made:
    size = GOOD_BUFFER.size
    hidden = np.arange(size) == rng.randrange(size)
    dtype = rng.choice((np.float32, np.float16, np.int64, np.uint64, np.float128, ">f8", object, "U8", "M8[s]"))
    array = rng.choice(
        (
            GOOD_BUFFER.astype(np.int64).astype(dtype),
            GOOD_BUFFER.astype([("x", "f8")]),
            GOOD_BUFFER.reshape(rng.choice(((1, -1), (-1, 1), (1, -1, 1)))),
            np.array(3.0),
            np.ma.MaskedArray(np.where(hidden, np.nan, GOOD_BUFFER), mask=hidden),
            GOOD_BUFFER[::-1],
            np.resize(GOOD_BUFFER, 2 * size)[::2],
            np.lib.stride_tricks.as_strided(GOOD_BUFFER, (size,), (0,)),
            *(GOOD_BUFFER.tolist(), GOOD_BUFFER.tobytes(), GOOD_BUFFER.data, *WRONG),
        )
    )
    plain = type(array) is np.ndarray and array.shape == (size,) and array.dtype == np.float64
    return changed(array, sealed=not plain)


def wrong_moments(rng: random.Random) -> Made:
    buffer = GOOD_BUFFER.copy()
    if rng.random() < 0.5:
        buffer[rng.randrange(buffer.size)] = rng.choice((np.nan, np.inf, -np.inf))
    else:
        buffer[rng.choice((3, 6, 8))] = -(10.0 ** rng.randint(-300, 300))  # on the diagonal
    return changed(buffer)


def wrong_entries(rng: random.Random) -> Made:
    """Entries that cannot be, a sum with what is there that a file cannot hold, and widths that cannot be."""
    layer, phase, n, nonfinite = GOOD.entries[0]
    size = moments_size(3)
    count = rng.choice((-1, -n, -(2**63), MAX_COUNT, 2**63, 2**64, HUGE, -HUGE))
    index = rng.choice((-1, 3, 2**31, 2**63, HUGE, -HUGE))
    width = rng.choice((0, -1, -HUGE, 3, 5, 2**20, 2**31, 2**63, HUGE))
    entry = rng.choice(
        (
            (layer, phase, count, nonfinite),
            (layer, phase, n, count),
            (index, phase, n, nonfinite),
            (layer, rng.choice((-1, 2, 2**40, HUGE)), n, nonfinite),
            (layer, phase, MAX_COUNT - rng.randint(1, 5), 0),
        )
    )
    return rng.choice(
        (
            changed(np.zeros(size), entries=(entry,), widths=()),
            changed(np.zeros(2 * size), entries=(GOOD.entries[0],) * 2, widths=()),
            changed(np.ones(size), entries=((layer, phase, 0, 0),), widths=()),
            changed(widths=rng.choice((((2, width),), ((2, 4), (2, width)), ((0, width + 1),), ((index, 4),), ()))),
        )
    )


def wrong_weights(rng: random.Random) -> Made:
    """Weights that are none, or not one for each entry, or of no observations."""
    good = tuple(float(n) for _, _, n, _ in GOOD.entries)
    none = (0.0, -0.0, -1.0, float("nan"), float("inf"), 2.0**100, 1e308, 5e-324, 2, True, None, np.float64(2))
    place = rng.randrange(len(good))
    one_bad = (*good[:place], rng.choice(none), *good[place + 1 :])
    several = (one_bad, good[1:], (*good, 1.0), list(good), [], np.array(good), Hostile(), (Hostile(),) * 3)
    empty = changed(np.zeros(9), entries=((0, 0, 0, 4),), widths=(), weights=(1.0,))
    return empty if rng.random() < 0.1 else changed(weights=rng.choice(several))


def another_source(rng: random.Random) -> Made:
    name = rng.choice(("run", "token", "rank", "source", "host", "pid"))
    values = ("", "other", "x" * MAX_NAME, "x" * (MAX_NAME + 1), "\ud800", "r\x00", "../r")
    value: Any = rng.choice((1, 2, 3, 2**31 - 1, 10**6) if name in ("rank", "pid") else values)
    no_name = isinstance(value, str) and (len(value) > MAX_NAME or value == "\ud800")
    unknown = (name == "token" and not no_name) or (name == "rank" and value > 1)
    return changed(source=replace(GOOD.source, **{name: value}), expected="unknown" if unknown else "refused")


def wrong_type(rng: random.Random) -> Made:
    of_source = rng.random() < 0.3
    name = rng.choice([field.name for field in fields(Source if of_source else Delta)])
    value = rng.choice([value for value in WRONG if is_wrong(name, value) or (name == "source" and not of_source)])
    return changed(**({"source": replace(GOOD.source, **{name: value})} if of_source else {name: value}))


def wrong_place(rng: random.Random) -> Made:
    """Another attempt, a window that cannot be, a number that is too far or was there, a step of others."""
    return rng.choice(
        (
            changed(attempt=rng.choice((1, 2, 2**31 - 1, 2**31, -1, HUGE))),
            changed(window=rng.choice((1, 2, 2**31, MAX_COUNT - 1, MAX_COUNT, -1, HUGE))),
            changed(seq=rng.choice((-1, MAX_COUNT, 2**63, HUGE))),
            changed(seq=4, window=rng.choice((2, 3, 10**9))),
            changed(seq=rng.choice((3 + AHEAD, 10**6, MAX_COUNT - 1)), expected="busy"),
            changed(seq=rng.choice((0, 1, 2, 5)), expected="repeated"),
            changed(step=rng.choice((2**63, -(2**63) - 1, HUGE, -HUGE))),
            changed(step=1, labelled=True),
        )
    )


def wrong_scalar(rng: random.Random) -> Made:
    scalar = Scalar(RUN, 0, 0, "loss", 1, 0.5, datetime(2026, 1, 2, tzinfo=UTC))
    names = ("", "x" * (MAX_NAME + 1), "\udcff", None, 3, b"loss", HostileText("a"), Hostile())
    name, values = rng.choice(
        (
            ("name", names),
            ("value", (None, "1", 1, True, np.float64(1), np.float32(1), 1j, Hostile())),
            ("step", (None, 1.0, True, 2**63, -HUGE, "1", np.int64(1), Hostile())),
            ("rank", (1, -1, None, 0.0, False, np.int64(0), "0", Hostile())),
            ("wall_time", (None, 0.0, "now", scalar.wall_time.date(), Hostile())),
            (rng.choice(("trial", "run", "attempt")), (Hostile(), HostileText("t"))),
        )
    )
    bad = replace(scalar, **{name: rng.choice(values)})
    return changed(scalars=rng.choice(((bad,), (scalar, bad), [bad], bad, (None,), ("loss",), (scalar, 5))))


def unfinished(rng: random.Random) -> Made:
    """What a sender of another version may bring: some fields are missing, of the delta or of its source."""
    src, delta = Source.__new__(Source), Delta.__new__(Delta)
    for made, whole in ((src, GOOD.source), (delta, GOOD)):
        names = [field.name for field in fields(whole)]
        for name in rng.sample(names, rng.randrange(len(names) // 2, len(names))):
            object.__setattr__(made, name, getattr(whole, name))
    return rng.choice(((delta, GOOD_BUFFER, "refused"), changed(source=src, sealed=False)))


def no_delta(rng: random.Random) -> Made:
    return rng.choice([*WRONG, GOOD.source, GOOD.entries]), GOOD_BUFFER, "refused"


def repeated(rng: random.Random) -> Made:
    return *delta_of(source(0), rng.choice((0, 1, 2, 5)), 0, ROWS), "repeated"


BROKEN = [flipped_bits, wrong_length, wrong_array, wrong_moments, wrong_entries, wrong_type, wrong_scalar, unfinished]
MALFORMED = [*BROKEN, wrong_weights, another_source, wrong_place, no_delta, repeated]


def outcome(take: Callable[[Any, Any], Ack], delta: Any, buffer: Any) -> str:
    """What becomes of a delta, or the error that should not be."""
    try:
        ack = take(delta, buffer)
    except DeltaRefused:
        return "refused"
    except UnknownSource:
        return "unknown"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:60]}"
    return "merged" if ack.merged else "busy" if ack.busy else "repeated"


# --- the tests -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_hundred_thousand_malformed_deltas_change_nothing() -> None:
    rng, running, wrong, counts = random.Random(20260101), Running(), Counter[str](), Counter[str]()
    rounds, resident = times(ROUNDS), 0
    for number in range(rounds):
        make = MALFORMED[number % len(MALFORMED)]
        delta, buffer, expected = make(rng)
        became = outcome(running.store.take, delta, buffer)
        counts[became] += 1
        if became != expected:
            wrong[f"{make.__name__}: {became}"] += 1
        if became == "merged":  # the store is another one now: begin again
            running, counts = Running(), Counter()
        if number == rounds // 2:
            gc.collect()
            resident = memory()["RssAnon"]
        if number % 5000 == 0:
            assert running.state() == running.before
    gc.collect()
    assert memory()["RssAnon"] - resident < MOST_BYTES
    assert running.state() == running.before
    status = running.store.status()
    assert (status["refused"], status["repeated"]) == (counts["refused"], counts["repeated"])
    running.check_exact()
    assert not wrong, wrong


def overflows(delta: Any) -> bool:
    """Whether it is wrong by what its layer has counted before alone: that its own shard knows, and no other."""
    try:
        return any(2 * entry[2] > MAX_COUNT or 2 * entry[3] > MAX_COUNT for entry in delta.entries)
    except Exception:
        return False


@pytest.mark.parametrize("num_shards", [1, 2])
@pytest.mark.parametrize("make", MALFORMED)
def test_a_malformed_delta_is_refused(make: Callable[[random.Random], Made], num_shards: int) -> None:
    rng, running, wrong = random.Random(make.__name__), Running(num_shards), Counter[str]()
    for _ in range(400):
        delta, buffer, expected = make(rng)
        if num_shards > 1 and overflows(delta):
            continue
        became = outcome(running.store.take, delta, buffer)
        wrong[f"{became} instead of {expected}"] += became != expected
    assert not +wrong, +wrong
    assert running.state() == running.before
    running.check_exact()


def test_rows_in_another_stride_or_read_only_are_as_good() -> None:
    running = Running()
    for seq, view in ((3, np.repeat(GOOD_BUFFER, 2)[::2]), (4, np.frombuffer(GOOD_BUFFER.tobytes(), np.float64))):
        assert running.store.take(replace(GOOD, seq=seq).sealed(GOOD_BUFFER), view).merged
        running.rows.append(ROWS)
    assert running.store.flush(30)
    rows = np.concatenate([part[1, 1] for part in running.rows if (1, 1) in part])
    assert covariance_error(running.store.covariance("fc", "eval"), two_pass_covariance(rows)) < 1e-12


def malformed_registration(rng: random.Random) -> tuple[Any, Any, Any, Any]:
    """One of the arguments is malformed; the rank is the one that has not come, and would be welcome."""
    good, name = source(2), rng.choice([field.name for field in fields(Source)])
    value = rng.choice([value for value in WRONG if is_wrong(name, value)])
    other = ({"stats": ("trace",)}, {"savefile": "/other"}, {"world_size": 2}, {"threshold": 0.5})
    part = rng.choice(("attempt", "seq", "window", "whole"))
    kind = bool if part == "whole" else int
    bad = rng.choice([v for v in WRONG if type(v) is not kind or (kind is int and not 0 <= v < MAX_COUNT)])
    held = Held(**({"attempt": 0, "seq": 0, "window": 0, "whole": True} | {part: bad}))
    layers = (LAYERS[:1], LAYERS[::-1], [LayerInfo("conv", "Conv2d", 4), *LAYERS[1:]], [None], *WRONG)
    source_or_not = (replace(good, **{name: value}), replace(good, rank=rng.choice((3, -1, 0, 2**40))), *WRONG)
    return rng.choice(
        (
            (rng.choice(source_or_not), CONFIG, LAYERS, None),
            (good, rng.choice((*(replace(CONFIG, **changes) for changes in other), *WRONG)), LAYERS, None),
            (good, CONFIG, rng.choice(layers), None),
            (good, CONFIG, LAYERS, rng.choice((held, *WRONG[1:]))),
            (source(2, token="new"), CONFIG, LAYERS, rng.choice((replace(held, attempt=rng.choice((0, -1))), held))),
        )
    )


def test_malformed_registrations_change_nothing() -> None:
    rng, running, welcome = random.Random(5), Running(), Counter[str]()
    for _ in range(2000):
        arguments = malformed_registration(rng)
        with contextlib.suppress(Exception):
            running.store.register(*arguments)
            welcome["held" if arguments[3] is not None else "source, config or layers"] += 1
            running = Running()
        assert running.store.status()["attempt"] == 0
    assert running.state() == running.before
    running.check_exact()
    assert not welcome, "registrations that were not refused"


def can_be_sent(delta: Any, buffer: Any) -> bool:
    """Whether a sender in another process could offer it at all."""
    try:
        pickle.dumps((delta, buffer))
    except Exception:
        return False
    return True


@pytest.mark.slow
@pytest.mark.ray
def test_a_malformed_delta_does_not_end_the_actor(ray_session: None) -> None:
    import ray

    from delve_ray.store import actor

    handle = actor.start(config(save_to=()))
    try:
        remote = actor.RemoteStore(handle)
        for rank in range(2):
            remote.register(source(rank), config(save_to=()), LAYERS)
        for seq in (0, 1, 2, 5):
            assert remote.take(*delta_of(source(0), seq, 0, ROWS)).merged
        assert remote.take(*delta_of(source(1), 0, 0, {}, closes=True)).merged
        assert remote.flush(30)
        before, matrix = remote.status(), ray.get(handle.covariance.remote("fc", "eval"))
        rng, wrong, counts = random.Random(11), Counter[str](), Counter[str]()
        for number in range(times(480)):
            make = MALFORMED[number % len(MALFORMED)]
            delta, buffer, expected = make(rng)
            if can_be_sent(delta, buffer):
                became = outcome(lambda *sent: ray.get(handle.take.remote(*sent)), delta, buffer)
                wrong[f"{make.__name__}: {became} instead of {expected}"] += became != expected
                counts[became] += 1
        assert not +wrong, +wrong
        assert counts.total() >= times(300)
        with pytest.raises(DeltaRefused, match=r"delta 3 of rank 0 \(run 'r', attempt 0, pid 100 on host\) is refused"):
            remote.take(GOOD, GOOD_BUFFER[:-1])
        after = remote.status()
        same = [key for key in before if key not in COUNTERS]
        assert {key: after[key] for key in same} == {key: before[key] for key in same}, "its pid, for one"
        assert after["ranks"][0]["deltas"] == 3
        assert (after["refused"], after["repeated"]) == (counts["refused"] + 1, counts["repeated"])
        assert remote.take(GOOD, GOOD_BUFFER).merged
        assert remote.flush(30)
        assert covariance_error(ray.get(handle.covariance.remote("fc", "eval")), matrix) < 1e-12, "the same rows again"
    finally:
        ray.kill(handle, no_restart=True)
