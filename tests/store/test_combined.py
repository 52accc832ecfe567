"""Deltas that are merged before the wire: the same figures as without, and each counts once, whatever fails."""

from __future__ import annotations

import pickle
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from delve_ray import read_covariances, read_scalars, read_spectra
from delve_ray.analysis import read_embeddings
from delve_ray.errors import DeltaRefused, DelveRayError, StoreError, StoreLost, UnknownSource
from delve_ray.moments import F64
from delve_ray.reservoir import UNBOUNDED, pack, smallest
from delve_ray.storage import Storage
from delve_ray.store import combiner as combiner_module
from delve_ray.store.combiner import CombinedStore, Combiner
from delve_ray.store.core import CovarianceStore
from delve_ray.store.merging import combine
from delve_ray.store.protocol import Ack, Bundle, Delta, LayerInfo, Source
from delve_ray.store.saving import Saver
from delve_ray.writers.base import Scalar
from tests.chaos.processes import times
from tests.store.six_layers import FEATURES, LAYERS, Sender, check, local_shards, mortal, some_rows, with_widths
from tests.store.six_layers import layers as layers  # the fixture
from tests.stores import Keeper, Worker, config, until

NODE = range(4)
"""Ranks of one node."""
EXACT = 1e-12


def widths_of(delta: Delta) -> list[int]:
    return [FEATURES[layer] for layer, *_ in delta.entries]


def bundle_of(offers: Sequence[tuple[Delta, F64]], embed_rows: int = 0) -> tuple[Bundle, F64]:
    return combine([(delta, buffer, widths_of(delta)) for delta, buffer in offers], embed_rows)


def together(take: Callable[[Delta, F64], Any], offers: Sequence[tuple[Delta, F64]]) -> list[Any]:
    """What all workers are answered that call at the same time; an error is its answer."""

    def call(offer: tuple[Delta, F64]) -> Any:
        try:
            return take(*offer)
        except DelveRayError as error:
            return error

    with ThreadPoolExecutor(len(offers)) as pool:
        return list(pool.map(call, offers))


def whole(worker: Worker, rng: np.random.Generator, step: int, closes: bool, embed_rows: int) -> tuple[Delta, F64]:
    """A delta with all that one can have: weights, non-finite rows, a sample of rows, a scalar."""
    rows = some_rows(rng)
    delta, buffer = with_widths(worker, rows, step, closes)
    entries = tuple((layer, phase, n, int(rng.integers(0, 3))) for layer, phase, n, _ in delta.entries)
    weights = tuple(float(n * rng.choice([1.0, 2.0, 1 / 3])) for _, _, n, _ in entries) if rng.random() < 0.7 else ()
    samples, packed = [], []
    for (layer, phase), values in sorted(rows.items()):
        kept = smallest(rng.exponential(size=len(values)), values, UNBOUNDED, embed_rows)
        samples.append((layer, phase, kept.keys.size, kept.bound))
        packed.append(pack(kept))
    scalar = Scalar("r", 0, worker.source.rank, f"loss{worker.source.rank}", step, float(rng.random()), NOW)
    buffer = np.concatenate([buffer, *packed])
    delta = replace(
        delta, entries=entries, weights=weights, samples=tuple(samples), scalars=(scalar,), complete=rng.random() < 0.9
    )
    return delta.sealed(buffer), buffer


NOW = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No rank is given up, however slow the machine."""
    monkeypatch.setattr(combiner_module, "MISSES", 10**6)


# --- figures -------------------------------------------------------------------------------------------------


def same(ours: Any, theirs: Any) -> bool:
    """Equality, of floats but for rounding."""
    if isinstance(theirs, float | list) and theirs is not None and not isinstance(theirs, str):
        ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
        return bool(
            np.allclose(ours, theirs, rtol=EXACT, atol=EXACT * max(1.0, float(np.abs(theirs).max(initial=0.0))))
        )
    return bool(ours == theirs)


@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.usefixtures("patient")
def test_the_files_are_those_without_a_combiner(tmp_path: Path, num_shards: int) -> None:
    rng = np.random.default_rng(num_shards)
    options = config(
        savefile=str(tmp_path / "alone"),
        save_to=("parquet",),
        stats=("saturation", "trace", "cov", "embed"),
        world_size=len(NODE),
        embed_rows=6,
    )
    alone = CovarianceStore(options)
    others = [Worker(alone, rank, options) for rank in NODE]
    store: Any
    if num_shards == 1:
        store = CovarianceStore(replace(options, savefile=str(tmp_path / "run")))
    else:
        store = local_shards(tmp_path / "run", num_shards, world_size=len(NODE), embed_rows=6)
    workers = [Worker(store, rank, store.settings()) for rank in NODE]
    combiner = Combiner(store, LAYERS, 6)
    for step in range(3):
        for part in range(2):
            offers = []
            for worker, other in zip(workers, others, strict=True):
                seed = int(rng.integers(1 << 40))
                offers.append(whole(worker, np.random.default_rng(seed), step, part == 1, 6))
                alone.take(*whole(other, np.random.default_rng(seed), step, part == 1, 6))
            acks = together(combiner.take, offers)
            assert [(ack.merged, ack.next_seq) for ack in acks] == [(True, worker.seq) for worker in workers]
            combiner.patience = 60.0  # all are known now
    for each in (*workers, *others):
        each.leave()
    assert store.wait_finished(60)
    assert alone.wait_finished(60)
    for read in (read_spectra, read_covariances, read_scalars):
        left, right = (read(tmp_path / name).drop_columns(["wall_time"]).to_pylist() for name in ("run", "alone"))
        assert len(left) == len(right) > 0
        for ours, theirs in zip(left, right, strict=True):
            for name, value in ours.items():
                assert name == "revision" or same(value, theirs[name]), (name, value, theirs[name])
    points = [read_points(tmp_path / name) for name in ("run", "alone")]
    assert points[0].keys() == points[1].keys()
    for key, value in points[0].items():
        assert np.allclose(value, points[1][key], rtol=1e-7, atol=1e-7), key  # eigenvectors magnify the rounding
    status = store.status()
    for counts in (status, *status.get("shards", [])):
        # All but the first round came in one bundle each.
        assert counts["bundles"] >= 5
        assert counts["bundled"] >= 5 * len(NODE)
        assert counts["deltas"] == 6 * len(NODE)


def read_points(path: Path) -> dict[Any, F64]:
    found: dict[Any, list[Any]] = {}
    for row in read_embeddings(path).to_pylist():
        key = (row["step"], row["phase"], row["layer"])
        found.setdefault(key, []).append([value for name, value in sorted(row.items()) if name in ("x", "y", "z")])
    return {key: np.sort(np.array(values, np.float64), axis=0) for key, values in found.items()}


# --- what is taken, and what is not --------------------------------------------------------------------------------


def node_store(**changes: Any) -> tuple[CovarianceStore, list[Worker], Keeper]:
    keeper = Keeper()
    store = CovarianceStore(config(**{"world_size": len(NODE), **changes}), writers=[keeper])
    return store, [Worker(store, rank) for rank in range(store.config.world_size)], keeper


def offers_of(workers: Sequence[Worker], step: int = 0, closes: bool = True, seed: int = 0) -> list[Any]:
    rng = np.random.default_rng(seed)
    return [with_widths(worker, some_rows(rng, 1.0), step, closes) for worker in workers]


def samples_of(keeper: Keeper, window: int = -1) -> set[int]:
    return {row.samples for row in keeper.windows[window].rows}


def count_of(offers: Sequence[tuple[Delta, F64]]) -> dict[tuple[int, int], int]:
    counts: dict[tuple[int, int], int] = {}
    for delta, _ in offers:
        for layer, phase, n, _ in delta.entries:
            counts[layer, phase] = counts.get((layer, phase), 0) + n
    return counts


def published_counts(keeper: Keeper) -> dict[tuple[int, int], int]:
    return {(int(row.layer[5:]), ("train", "eval").index(row.phase)): row.samples for row in keeper.windows[-1].rows}


def test_a_bundle_is_taken_whole_and_once() -> None:
    store, workers, keeper = node_store()
    offers = offers_of(workers)
    sent = bundle_of(offers)
    acks = store.take_bundle(*sent)
    assert [(ack.merged, ack.next_seq) for ack in acks if ack] == [(True, 1)] * 4
    again = store.take_bundle(*sent)
    assert [(ack.merged, ack.next_seq) for ack in again if ack] == [(False, 1)] * 4
    for worker in workers:
        worker.leave()
    assert store.wait_finished(60)
    assert published_counts(keeper) == count_of(offers)
    assert (store.counts["bundles"], store.counts["bundled"], store.counts["deltas"]) == (1, 4, 4)


@pytest.mark.parametrize("there", [0, 2, 3])
def test_one_delta_that_is_there_already_leaves_the_others_to_themselves(there: int) -> None:
    store, workers, keeper = node_store()
    offers = offers_of(workers)
    store.take(*offers[there])
    before = store.status()["bytes_in"]
    acks = store.take_bundle(*bundle_of(offers))
    assert [ack is not None for ack in acks] == [rank == there for rank in NODE]
    assert store.status()["bytes_in"] == before
    for rank, offer in enumerate(offers):
        assert store.take(*offer).merged == (rank != there)
    for worker in workers:
        worker.leave()
    assert store.wait_finished(60)
    assert published_counts(keeper) == count_of(offers)


@pytest.mark.usefixtures("patient")
def test_each_error_comes_out_at_its_worker() -> None:
    store, workers, keeper = node_store()
    combiner = Combiner(store, LAYERS, 0, patience=0.05)
    first = offers_of(workers, 0, False)
    together(combiner.take, first)
    combiner.patience = 60.0
    good = offers_of(workers, 5, True)
    broken = good[1][1].copy()
    broken[3] = np.nan
    stranger = replace(good[2][0], source=replace(good[2][0].source, source="stranger", rank=9)).sealed(good[2][1])
    offers = [good[0], (good[1][0].sealed(broken), broken), (stranger, good[2][1]), good[3]]
    combiner.forget(good[2][0].source)
    with ThreadPoolExecutor(1) as pool:
        strange = pool.submit(together, combiner.take, offers[2:3])
        until(lambda: combiner.ranks == 4)  # from now on all wait for all
        others = together(combiner.take, [*offers[:2], offers[3]])
        found = [*others[:2], *strange.result(60), others[2]]
    assert isinstance(found[1], DeltaRefused)
    assert "non-finite" in str(found[1])
    assert isinstance(found[2], UnknownSource)
    assert [found[0].merged, found[3].merged] == [True, True]
    combiner.patience = 0.0
    assert combiner.take(*good[1]).merged
    other = replace(good[2][0], step=7).sealed(good[2][1])
    with pytest.raises(DeltaRefused, match="closes window 0 as step 7"):
        combiner.take(other, good[2][1])
    assert combiner.take(*good[2]).merged
    for worker in workers:
        worker.leave()
    assert store.wait_finished(60)
    assert published_counts(keeper) == count_of([*first, *good])


def test_ranks_of_one_bundle_must_agree_on_the_step() -> None:
    store, workers, _ = node_store()
    offers = [offers_of(workers[:1], 3)[0], offers_of(workers[1:2], 4)[0]]
    assert store.take_bundle(*bundle_of(offers)) == (None, None)
    assert store.take(*offers[0]).merged
    with pytest.raises(DeltaRefused, match="as step 4"):
        store.take(*offers[1])


def test_a_replaced_source_costs_no_other_its_rows() -> None:
    keeper = Keeper()
    store = CovarianceStore(config(), writers=[keeper])
    first, old = (Worker(store, rank, token="t") for rank in range(2))
    offers = offers_of([first, old])
    new = Worker(store, 1, token="t", name="new", pid=500)
    found = together(Combiner(store, LAYERS, 0, patience=0.05).take, offers)
    assert found[0].merged
    assert isinstance(found[1], DeltaRefused)
    assert "has been replaced" in str(found[1])
    ours = offers_of([new], seed=5)
    assert store.take(*ours[0]).merged
    for worker in (first, new):
        worker.leave()
    assert store.wait_finished(60)
    assert published_counts(keeper) == count_of([offers[0], *ours])


def test_a_late_bundle_corrects_a_window_that_waits_in_a_file(tmp_path: Path) -> None:
    options = config(savefile=str(tmp_path), save_to=("parquet",), world_size=4, late_after=0.2)
    store = CovarianceStore(options, saver=Saver(Storage(tmp_path), 0.05))
    workers = [Worker(store, rank) for rank in NODE]
    offers = offers_of(workers)
    assert all(store.take_bundle(*bundle_of(offers[:2])))
    until(lambda: store.status()["parked_windows"] == 1)
    acks = store.take_bundle(*bundle_of(offers[2:]))
    assert [ack.merged for ack in acks if ack] == [True, True]
    for worker in workers:
        worker.leave()
    assert store.wait_finished(60)
    rows = read_spectra(tmp_path).to_pylist()
    found = {(int(row["layer"][5:]), ("train", "eval").index(row["phase"])): row["samples"] for row in rows}
    assert found == count_of(offers)
    assert {row["workers"] for row in rows} == {4}


def test_what_is_too_late_is_left_out_one_by_one() -> None:
    store, workers, keeper = node_store(world_size=4, silent_after=3600.0)
    offers = offers_of(workers)
    for member in (store.attempts[-1].members[rank] for rank in (2, 3)):
        member.heard -= 7200.0  # silent for so long that nothing waits for it
    assert all(store.take_bundle(*bundle_of(offers[:2])))
    until(lambda: 0 not in store.attempts[-1].windows, "the silent ones are waited for")
    assert store.take_bundle(*bundle_of(offers[2:])) == (None, None)
    assert store.counts["late"] == 0
    found = together(Combiner(store, LAYERS, 0, patience=0.05).take, offers[2:])
    assert [(ack.merged, ack.late, ack.next_seq) for ack in found] == [(False, True, 1)] * 2
    assert store.counts["late"] == 2
    assert published_counts(keeper) == count_of(offers[:2])


def test_layers_of_two_widths_do_not_go_together() -> None:
    store, workers, _ = node_store(world_size=2)
    offers = offers_of(workers[:1])
    rng = np.random.default_rng(3)
    delta, buffer = workers[1].next({(4, 0): rng.normal(size=(5, 6)), (1, 0): rng.normal(size=(5, 3))}, 0, True)
    offers.append((replace(delta, widths=((4, 6),)).sealed(buffer), buffer))
    combiner = Combiner(store, LAYERS, 0, patience=0.05)
    found = together(combiner.take, offers)
    assert sorted(len(ack.refused) for ack in found) == [0, 1]
    assert store.counts["bundles"] == 0
    assert all(ack.merged for ack in found)


TAMPERED: dict[str, tuple[Callable[[Bundle, F64], Any], str]] = {
    "no bundle": (lambda b, x: (b.headers[0], x), "no bundle"),
    "no headers": (lambda b, x: (replace(b, headers=()).sealed(x), x), "no bundle"),
    "a list": (lambda b, x: (replace(b, headers=list(b.headers)), x), "no bundle"),  # type: ignore[arg-type]
    "not deltas": (lambda b, x: (replace(b, headers=(None,)), x), "no delta"),  # type: ignore[arg-type]
    "short": (lambda b, x: (b.sealed(x[:-1]), x[:-1]), "its buffer is"),
    "float32": (lambda b, x: (b, x.astype(np.float32)), "its buffer is"),
    "changed bit": (lambda b, x: (b, x + (np.arange(x.size) == 2)), "its checksum"),
    "changed header": (lambda b, x: (with_header(b, closes=False), x), "checksum of its bundle"),
    "checksum": (lambda b, x: (replace(b, checksum=None), x), "checksum of its bundle"),  # type: ignore[arg-type]
    "twice": (lambda b, x: (replace(b, headers=(b.headers[0], *b.headers)).sealed(x), x), "source twice"),
    "run": (lambda b, x: (with_source(b, run="other").sealed(x), x), "belongs to run 'other'"),
    "token": (lambda b, x: (with_source(b, token="other").sealed(x), x), "is of attempt"),
    "attempt": (lambda b, x: (with_header(b, attempt=1).sealed(x), x), "is of attempt"),
    "window": (lambda b, x: (with_header(b, window=1).sealed(x), x), "is of attempt"),
    "step": (lambda b, x: (with_header(b, step=1.5).sealed(x), x), "no 64-bit integer"),
    "counts": (lambda b, x: (with_count(b, 1, 0).sealed(x), x), "in its headers"),
    "non-finite counts": (lambda b, x: (with_count(b, 0, 1).sealed(x), x), "in its headers"),
    "weights": (lambda b, x: (with_header(b, weights=(1.0,) * 12).sealed(x), x), "weights"),
    "fewer entries": (lambda b, x: (with_header(b, entries=()).sealed(x), x), "in its headers"),
    "samples": (lambda b, x: (with_header(b, samples=((0, 0, 0, 1.0),)).sealed(x), x), "lacks samples"),
    "widths": (lambda b, x: (with_header(b, widths=((4, 5),)).sealed(x), x), "other layers"),
    "scalars": (lambda b, x: (with_header(b, scalars=("x",)).sealed(x), x), "among its scalars"),
    "nan": (lambda b, x: with_value(b, x, np.nan), "non-finite"),
    "inf": (lambda b, x: with_value(b, x, np.inf), "non-finite"),
}


def with_header(bundle: Bundle, **changes: Any) -> Bundle:
    return replace(bundle, headers=(replace(bundle.headers[0], **changes), *bundle.headers[1:]))


def with_source(bundle: Bundle, **changes: Any) -> Bundle:
    return with_header(bundle, source=replace(bundle.headers[0].source, **changes))


def with_count(bundle: Bundle, more: int, nonfinite: int) -> Bundle:
    (layer, phase, n, bad), *rest = bundle.headers[0].entries
    return with_header(bundle, entries=((layer, phase, n + more, bad + nonfinite), *rest))


def with_value(bundle: Bundle, buffer: F64, value: float) -> tuple[Bundle, F64]:
    changed = buffer.copy()
    changed[0] = value
    return bundle.sealed(changed), changed


@pytest.mark.parametrize("name", TAMPERED)
@pytest.mark.parametrize("num_shards", [1, 2])
def test_what_is_no_bundle_is_refused_and_changes_nothing(tmp_path: Path, name: str, num_shards: int) -> None:
    tamper, words = TAMPERED[name]
    store, workers, _ = node_store(world_size=2)
    take: Any = store.take_bundle
    if num_shards > 1:
        sharded = local_shards(tmp_path, num_shards)
        workers = [Worker(sharded, rank, sharded.config) for rank in range(2)]
        take = sharded.take_bundle
    offers = offers_of(workers)
    bundle, buffer = bundle_of(offers)
    bad = tamper(bundle, buffer)
    if num_shards == 1:
        with pytest.raises(DeltaRefused, match=words):
            take(*bad)
        status = store.status()
        assert (status["bytes"], status["deltas"], status["refused"]) == (0, 0, 1)
        assert store.attempts[-1].windows == {}
    elif name not in ("changed header", "changed bit", "checksum", "a list", "float32"):  # the cut makes its own
        with pytest.raises((DeltaRefused, AttributeError)):
            take(*bad)
    assert [ack.merged for ack in take(bundle, buffer) if ack] == [True, True]


# --- the combiner --------------------------------------------------------------------------------------------------


class Recorder:
    """A store that notes how it is called, and answers nothing but acks."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []
        self.gate = threading.Event()
        self.gate.set()

    def take(self, delta: Delta, buffer: F64) -> Ack:
        self.calls.append([delta.source.rank])
        self.gate.wait(60)
        return Ack(0, next_seq=delta.seq + 1)

    def take_bundle(self, bundle: Bundle, buffer: F64) -> tuple[Ack, ...]:
        self.calls.append(sorted(header.source.rank for header in bundle.headers))
        self.gate.wait(60)
        return tuple(Ack(0, next_seq=header.seq + 1) for header in bundle.headers)


def fakes(count: int) -> list[Worker]:
    store = CovarianceStore(config(world_size=count), writers=[])
    return [Worker(store, rank) for rank in range(count)]


@pytest.mark.usefixtures("patient")
def test_while_a_bundle_is_on_its_way_the_next_gathers() -> None:
    workers, store = fakes(4), Recorder()
    combiner = Combiner(store, LAYERS, 0, patience=60.0)  # type: ignore[arg-type]
    store.gate.clear()
    offers = offers_of(workers, 0, False)
    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(combiner.take, *offers[0])  # alone: nobody else is known
        until(lambda: store.calls == [[0]])
        rest = [pool.submit(combiner.take, *offer) for offer in offers[1:]]
        until(lambda: combiner.ranks == 4)
        store.gate.set()
        assert first.result(60).next_seq == 1
        again = pool.submit(combiner.take, *offers_of(workers[:1], 0, False, 1)[0])
        assert [future.result(60).next_seq for future in (*rest, again)] == [1, 1, 1, 2]
    assert store.calls == [[0], [0, 1, 2, 3]]
    assert combiner.idle


@pytest.mark.usefixtures("patient")
def test_there_is_a_bound_on_bytes() -> None:
    workers, store = fakes(4), Recorder()
    offers = offers_of(workers)
    room = sum(sorted(buffer.nbytes for _, buffer in offers)[-2:])
    combiner = Combiner(store, LAYERS, 0, patience=60.0, most_bytes=room)  # type: ignore[arg-type]
    store.gate.clear()
    with ThreadPoolExecutor(8) as pool:
        calls = [pool.submit(combiner.take, *offer) for offer in offers]
        until(lambda: combiner.ranks == 4)
        store.gate.set()
        combiner.patience = 0.0
        for call in calls:
            call.result(60)
    assert sorted(rank for call in store.calls for rank in call) == [0, 1, 2, 3]
    assert max(map(len, store.calls)) <= 2


def test_a_rank_that_stays_away_is_waited_for_a_few_times_only() -> None:
    workers, store = fakes(3), Recorder()
    combiner = Combiner(store, LAYERS, 0, patience=0.02)  # type: ignore[arg-type]
    combiner.take(*offers_of(workers[2:], 0, False)[0])
    for _ in range(combiner_module.MISSES):
        assert together(combiner.take, offers_of(workers[:2], 0, False))
    until(lambda: combiner.ranks == 2)
    combiner.patience = 60.0
    assert together(combiner.take, offers_of(workers[:2], 0, False))
    assert store.calls[-1] == [0, 1]
    combiner.forget(workers[1].source)
    assert combiner.take(*offers_of(workers[:1], 0, False)[0]).next_seq > 0


# --- a worker's side -----------------------------------------------------------------------------------------------


class Wire:
    """A link to a combiner that is replaced when it is killed, with calls that are lost on the way or back."""

    def __init__(self, make: Callable[[], Combiner], dice: random.Random, faults: float) -> None:
        self.make, self.dice, self.faults = make, dice, faults
        self.combiner = make()
        self.lost = 0

    def kill(self) -> None:
        """Calls that wait in the old one are still answered, to nobody."""
        self.combiner = self.make()

    def take(self, delta: Delta, buffer: F64) -> Ack | Exception:
        chance = self.dice.random()
        combiner = self.combiner
        if chance < self.faults:
            self.lost += 1
            raise StoreError("the call was lost")
        if chance < 2 * self.faults:  # it comes later, when the worker has gone on
            self.lost += 1
            threading.Timer(0.05 * self.dice.random(), self._quietly, (combiner, delta, buffer)).start()
            raise StoreError("the call came too late")
        answer = self._quietly(combiner, delta, buffer)
        if chance < 3 * self.faults or combiner is not self.combiner:
            self.lost += 1
            raise StoreError("the answer was lost")
        return answer

    def _quietly(self, combiner: Combiner, delta: Delta, buffer: F64) -> Ack | Exception:
        try:
            return combiner.take(delta, buffer)
        except DelveRayError as error:
            return error

    def forget(self, source: Source) -> None:
        self.combiner.forget(source)


@pytest.mark.slow
@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("seed", range(times(3)))
def test_whatever_is_lost_or_killed_every_row_counts_once(tmp_path: Path, seed: int, num_shards: int) -> None:
    rng, dice = np.random.default_rng(seed), random.Random(seed)
    stores = mortal(tmp_path, num_shards, seed, world_size=len(NODE))
    direct = stores.reached
    wire = Wire(lambda: Combiner(direct, LAYERS, 256, patience=0.02), dice, 0.08)
    senders = [Sender(CombinedStore(direct, lambda: wire, again=0.01), rank, stores.config) for rank in NODE]
    sent: dict[int, list[Any]] = {}
    with ThreadPoolExecutor(len(NODE)) as pool:
        for step in range(5):
            for part in range(2):
                for sender in senders:
                    rows = some_rows(rng)
                    sent.setdefault(step, []).append(rows)
                    sender.add(rows, step, part == 1)
                running = [pool.submit(sender.until_there) for sender in senders if dice.random() < 0.8]
                if dice.random() < 0.4:
                    wire.kill()
                if dice.random() < 0.25:
                    stores.kill()
                for future in running:
                    future.result(60)
                if dice.random() < 0.3:
                    time.sleep(0.1)  # for a snapshot
        list(pool.map(Sender.until_there, senders))
        list(pool.map(Sender.leave, senders))
    assert direct.wait_finished(60), direct.status()
    check(str(tmp_path), sent, workers=len(NODE))
    assert wire.lost > 0


def test_without_a_combiner_deltas_go_straight_to_the_store_and_it_is_tried_again() -> None:
    store, workers, _ = node_store(world_size=1)
    tried: list[str] = []
    working = Combiner(store, LAYERS, 0, patience=0.0)

    class Gone:
        def take(self, delta: Delta, buffer: F64) -> Ack:
            tried.append("call")
            raise StoreError("the store's process has ended", final=True)

        def forget(self, source: Source) -> None: ...

    links: list[Any] = [OSError("no node"), Gone(), working]

    def find() -> Any:
        tried.append("find")
        if isinstance(links[0], Exception):
            raise links.pop(0)
        return links.pop(0)

    combined = CombinedStore(store, find, again=0.0)
    for _ in range(4):
        assert combined.take(*offers_of(workers, 0, False)[0]).merged
    assert tried == ["find", "find", "call", "find"]
    patient = CombinedStore(store, lambda: Gone(), again=60.0)
    for _ in range(3):
        assert patient.take(*offers_of(workers, 0, False)[0]).merged
    assert tried.count("call") == 2


def test_a_combiner_is_there_before_the_first_delta() -> None:
    store, workers, _ = node_store(world_size=1)
    found: list[Any] = [OSError("no node yet"), Through(Combiner(store, LAYERS, 0))]

    def find() -> Any:
        link = found.pop(0)
        if isinstance(link, Exception):
            raise link
        return link

    combined = CombinedStore(store, find)
    combined.begin()  # whoever is in trouble now is looked for again
    assert len(found) == 1
    combined.begin()
    assert not found
    combined.following = after = lambda seq: None
    link = combined._link
    assert combined.take(*offers_of(workers, 0, False)[0]).merged
    assert combined._link is link
    assert link.following is after


def test_a_store_that_is_lost_may_be_an_older_one_of_the_run() -> None:
    store, workers, _ = node_store(world_size=1)

    class Other:
        """A combiner of a run of this name that has ended."""

        following: Any = None

        def take(self, delta: Delta, buffer: F64) -> Exception:
            return StoreLost("the store's process has ended", final=True)

        def forget(self, source: Source) -> None: ...

    link = Other()
    combined = CombinedStore(store, lambda: link)
    combined.following = after = lambda seq: None
    assert combined.take(*offers_of(workers, 0, False)[0]).merged
    assert link.following is after
    good = offers_of(workers, 0, False)[0]
    with pytest.raises(DeltaRefused, match="checksum"):
        combined.take(replace(good[0], checksum=1), good[1])
    assert combined.take(*good).merged


def test_a_store_that_fails_in_the_middle_is_not_offered_the_same_again() -> None:
    """What it has of the bundle is not known: each worker hears of it, as of a delta of its own."""
    store, workers, _ = node_store(world_size=2)
    offered: list[str] = []

    class Failing:
        def take(self, delta: Delta, buffer: F64) -> Ack:
            offered.append("take")
            return store.take(delta, buffer)

        def take_bundle(self, bundle: Bundle, buffer: F64) -> tuple[Ack | None, ...]:
            offered.append("bundle")
            raise StoreError("the store failed in take_bundle", final=True)

    combiner = Combiner(Failing(), LAYERS, 0, patience=0.5)  # type: ignore[arg-type]
    for worker in workers:
        combiner.take(*offers_of([worker], 0, False)[0])
    offered.clear()
    combiner.patience = 60.0
    links = [CombinedStore(store, lambda: Through(combiner)) for _ in workers]
    offers = iter(zip(links, offers_of(workers), strict=True))
    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(link.take, *offer) for link, offer in offers]
    for call in calls:
        with pytest.raises(StoreError, match="failed in take_bundle"):
            call.result()
    assert offered == ["bundle"]
    assert store.counts["deltas"] == 2


class Through:
    """A link without faults."""

    following: Any = None

    def __init__(self, combiner: Combiner) -> None:
        self.combiner = combiner

    def take(self, delta: Delta, buffer: F64) -> Ack | Exception:
        try:
            return self.combiner.take(delta, buffer)
        except DelveRayError as error:
            return error

    def forget(self, source: Source) -> None:
        self.combiner.forget(source)


@pytest.mark.parametrize("error", [StoreLost("gone", final=True), UnknownSource("new"), DeltaRefused("bad")])
def test_an_answer_that_is_an_error_stays_what_it_is_between_processes(error: DelveRayError) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), again.__dict__) == (type(error), str(error), error.__dict__)


def test_all_but_deltas_goes_straight_to_the_store() -> None:
    def nobody() -> Any:
        raise AssertionError("it is not asked")

    store = CovarianceStore(config(world_size=1), writers=[Keeper()])
    combined = CombinedStore(store, nobody)
    worker = Worker(combined, 0, store.config)  # type: ignore[arg-type]
    assert combined.settings() == store.config
    assert combined.heartbeat(worker.source).next_seq == 0
    assert combined.take_bundle(*bundle_of(offers_of([worker])))[0] is not None
    assert combined.flush(60)
    assert combined.progress().missing == store.progress().missing
    assert combined.leave(worker.source, completed=True, sent=1, timeout=1.0).left
    assert combined.wait_finished(60)
    assert combined.status()["bundles"] == 1
    combined.end(worker.source)
    assert combined.abandon()


def test_a_store_in_the_process_takes_no_notice() -> None:
    from delve_ray.connect import through_combiner

    store = CovarianceStore(config(), writers=[])
    assert through_combiner(store, "r", [LayerInfo("fc", "Linear", 1)]) is store


def test_a_combiner_that_is_released_while_it_is_asked_for_takes_the_delta(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Leaving releases it, and the sender may be on its way to it."""
    store = CovarianceStore(config(world_size=1), writers=[Keeper()])
    worker = Worker(store, 0)
    combiner = Combiner(store, LAYERS, 0, patience=0.0)

    class Own:
        def take(self, delta: Delta, buffer: F64) -> Ack:
            return combiner.take(delta, buffer)

        def forget(self, source: Source) -> None:
            combiner.forget(source)

        @property
        def following(self) -> Any:
            return None

        @following.setter
        def following(self, following: Any) -> None:
            combined.end(worker.source)

    combined = CombinedStore(store, Own)
    seen = list[Delta]()
    monkeypatch.setattr(combiner, "take", lambda delta, buffer: (seen.append(delta), store.take(delta, buffer))[1])
    delta, buffer = with_widths(worker, some_rows(np.random.default_rng(0)), 0, closes=True)
    assert combined.take(delta, buffer).merged
    assert seen == [delta]
    assert "does not answer" not in caplog.text
