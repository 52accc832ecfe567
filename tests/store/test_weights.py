"""Observations that stand for several: their weights from the accumulator to what is published, and through files."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from delve_ray import DeltaRefused, ReadError, read_covariances, read_spectra
from delve_ray.frames import decode, encode
from delve_ray.moments import F64, pack_triangle, unpack_triangle
from delve_ray.outbox import Outbox
from delve_ray.packing import Packer, Pending
from delve_ray.parcels import Parcel, decode_parcel, encode_parcel
from delve_ray.recovery import recover
from delve_ray.storage import Storage
from delve_ray.store.core import CovarianceStore
from delve_ray.store.protocol import Ack, Delta, Source, fingerprint
from delve_ray.store.saving import Saver
from delve_ray.store.state import cut_arrays, freeze_window, window_entries
from delve_ray.store.window import Window
from tests.helpers import accumulator, covariance_error
from tests.stores import LAYERS, Keeper, Worker, config, park, rows, source, written

EXACT = 1e-11
"""Of λ1: what merging in float64 may differ by from two passes, at a mean of 1e3 spreads or less."""


@dataclass
class Group:
    """Rows that count `weight` times each."""

    values: F64
    weight: float


def groups(count: int, d: int = 5, seed: int = 0, offset: float = 0.0) -> list[Group]:
    rng = np.random.default_rng(seed)
    sizes, weights = rng.integers(1, 9, count), rng.choice([1.0, 2.0, 3.5, 100.0, 1 / 3], count)
    return [
        Group(rng.normal(size=(n, d)) * np.linspace(1, 3, d) + rng.normal() + offset, float(w))
        for n, w in zip(sizes, weights, strict=True)
    ]


def reference(parts: list[Group]) -> F64:
    """The weighted covariance by two passes over all rows."""
    values = np.concatenate([part.values for part in parts])
    weights = np.concatenate([np.full(len(part.values), part.weight) for part in parts])
    values = values - values[0]
    centred = values - weights @ values / weights.sum()
    return np.asarray((centred * weights[:, None]).T @ centred / weights.sum())


def samples(parts: list[Group]) -> int:
    return sum(len(part.values) for part in parts)


def moments(part: Group) -> tuple[float, F64]:
    """Weight, and mean and packed scatter as in a delta's buffer."""
    mean = part.values.mean(axis=0)
    centred = part.values - mean
    return len(part.values) * part.weight, np.concatenate([mean, pack_triangle(part.weight * centred.T @ centred)])


def weighted(worker: Worker, part: Group, *, closes: bool = False, step: int = 0) -> tuple[Delta, F64]:
    """The worker's next delta: the rows of layer fc in phase train. Without a weight where it is 1, as it is packed."""
    weight, buffer = moments(part)
    delta, _ = worker.next({(1, 0): part.values}, step=step, closes=closes)
    weights = () if part.weight == 1 else (weight,)
    return replace(delta, weights=weights).sealed(buffer), buffer


def check(store: CovarianceStore, parts: list[Group], tolerance: float = EXACT) -> None:
    expected = reference(parts)
    assert covariance_error(store.covariance("fc", "train"), expected) < tolerance
    assert np.allclose(store.spectrum("fc", "train"), np.linalg.eigvalsh(expected)[::-1], rtol=1e-6)


# --- merging -------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_weights_merge_to_two_passes_in_any_order(data: st.DataObject) -> None:
    offset = data.draw(st.sampled_from([0.0, 1e3, 1e5]), "offset")
    parts = groups(data.draw(st.integers(1, 80), "groups"), seed=data.draw(st.integers(0, 99), "seed"), offset=offset)
    keeper = Keeper()
    store = CovarianceStore(config(world_size=3), writers=[keeper])
    workers = [Worker(store, rank) for rank in range(3)]
    deltas = [weighted(data.draw(st.sampled_from(workers), "rank"), part) for part in parts]
    for index in data.draw(st.permutations(range(len(deltas))), "order"):
        assert store.take(*deltas[index]).merged
        if data.draw(st.booleans(), "live"):
            assert store.flush(60)
        assert not store.take(*deltas[index]).merged
    for worker in workers:
        worker.send({}, closes=True)
    written(store, 1)
    check(store, parts, 1e-9 if offset == 1e5 else EXACT)
    (row,) = keeper.windows[-1].rows
    assert row.samples == samples(parts), "rows, whatever they weigh"
    assert row.covariance is not None
    assert row.stats["trace"] == pytest.approx(np.trace(reference(parts)), rel=1e-6)
    total = sum(len(part.values) * part.weight for part in parts)
    mean = sum(part.weight * part.values.sum(axis=0) for part in parts) / total
    assert np.allclose(row.mean, mean, rtol=1e-12, atol=1e-12)


def test_a_weight_is_as_many_rows() -> None:
    part = rows(40, 5, 3.0)
    found = []
    for given_part in (Group(part, 3.0), Group(np.tile(part, (3, 1)), 1.0)):
        store = CovarianceStore(config(world_size=1), writers=[])
        store.take(*weighted(Worker(store, 0), given_part, closes=True))
        written(store, 1)
        found.append(store.covariance("fc", "train"))
    assert covariance_error(*found) < 1e-14


def test_other_layers_of_the_delta_keep_their_own_weights() -> None:
    store = CovarianceStore(config(world_size=1), writers=[])
    worker = Worker(store, 0)
    conv, fc = Group(rows(7, 3), 1.0), Group(rows(9, 5), 4.0)
    more = Group(rows(2, 5), 1.0)
    delta, _ = worker.next({(0, 0): conv.values, (1, 0): fc.values})
    buffer = np.concatenate([moments(conv)[1], moments(fc)[1]])
    store.take(replace(delta, weights=(7.0, 36.0)).sealed(buffer), buffer)
    store.take(*weighted(worker, more, closes=True))
    written(store, 1)
    check(store, [fc, more])
    assert covariance_error(store.covariance("conv", "train"), reference([conv])) < EXACT


# --- through files -------------------------------------------------------------------------------------


def saved_store(savefile: str, **changes: Any) -> CovarianceStore:
    own = config(savefile=savefile, save_to=("parquet",), snapshot_every=3600.0, world_size=1, **changes)
    return CovarianceStore(own, saver=Saver(Storage(savefile), 3600.0))


def test_weights_survive_a_restart(savefile: str) -> None:
    parts = groups(50)
    store = saved_store(savefile)
    worker = Worker(store, 0)
    for part in parts[:40]:
        store.take(*weighted(worker, part))
    assert store.saver is not None
    assert store.saver.wait_saved(store._version, 60)
    again = saved_store(savefile)
    assert again.restore()
    for part in parts[40:]:
        again.take(*weighted(worker, part))
    worker.store = again
    worker.send({}, closes=True)
    worker.leave()
    assert again.wait_finished(60)
    (row,) = read_covariances(savefile).to_pylist()
    assert row["samples"] == samples(parts)
    assert covariance_error(unpack_triangle(row["covariance"], 5), reference(parts)) < EXACT
    (row,) = read_spectra(savefile).to_pylist()
    assert row["trace"] == pytest.approx(np.trace(reference(parts)), rel=1e-9)


def frozen_window(parts: list[Group]) -> tuple[list[list[float]], bytes]:
    """A window with these parts as a file, like that of a parked one."""
    window = Window(0, 0)
    for part in parts:
        weight, buffer = moments(part)
        window.entry(1, 0, 5).add(len(part.values), 2, buffer[:5], buffer[5:], weight)
    index, cuts = freeze_window(window)
    pieces = [bytes(memoryview(piece)) for piece in encode("window", {"entries": index}, cut_arrays(cuts))]
    return index, b"".join(pieces)


@pytest.mark.parametrize("sampled", [True, False])
def test_a_parked_window_has_its_weights(sampled: bool) -> None:
    parts = groups(6) if sampled else [Group(part.values, 1.0) for part in groups(6)]
    weight = sum(len(part.values) * part.weight for part in parts)
    index, content = frozen_window(parts)
    header, arrays = decode(content, "window", "here")
    assert header["entries"] == index == [[1, 0, 5, samples(parts), 12, *([weight] if sampled else [])]]
    found = window_entries(header["entries"], iter(arrays), "here")[1, 0].freeze().collect()
    assert (found.n, found.nonfinite, found.weight) == (samples(parts), 12, pytest.approx(weight))
    assert covariance_error(unpack_triangle(found.packed / found.weight, 5), reference(parts)) < EXACT


def test_a_snapshot_with_more_than_a_weight_is_refused(savefile: str) -> None:
    with pytest.raises(ValueError, match="unpack"):
        window_entries([[1, 0, 5, 3, 0, 4.5, 1]], iter([np.zeros(5), np.zeros(15)]), "here")
    store = saved_store(savefile)
    store.take(*weighted(Worker(store, 0), groups(1)[0]))
    frozen = store.freeze()
    (entry,) = frozen.header["attempts"][0]["windows"][0]["entries"]
    entry += [1, 1, 1]
    Storage(savefile).write_atomic(
        "store/snapshot-000007-0000000000.arrow", encode("snapshot", frozen.header, cut_arrays(frozen.cuts))
    )
    saver = Saver(Storage(savefile), 3600.0)
    saver.load()
    assert any("does not describe a store" in word for word in saver.damaged)


def parcel_of(delta: Delta, buffer: F64) -> tuple[Parcel, dict[str, Any]]:
    """A delta through a file, and the file's header."""
    content = b"".join(bytes(memoryview(p)) for p in encode_parcel(delta, buffer, config(), LAYERS, first=True))
    return decode_parcel(content, "here"), decode(content, "delta", "here")[0]


def test_a_spilled_delta_has_its_weights(tmp_path: Path) -> None:
    parts = groups(5)
    store = CovarianceStore(config(world_size=1), writers=[])
    worker = Worker(store, 0)
    box = Outbox(store.config, LAYERS, str(tmp_path / "spill"))
    for part in parts:
        park(box, *weighted(worker, part), first=False, memory=0, limit=10**9)
    assert box.status()["on_disk"] == 5
    while (found := box.next()) is not None:
        ack = store.take(*found)
        assert ack.merged
        box.acknowledge(ack)
    worker.send({}, closes=True)
    written(store, 1)
    check(store, parts)


def test_a_delta_that_was_not_delivered_has_its_weights(savefile: str, tmp_path: Path) -> None:
    parts = groups(5)
    store = saved_store(savefile)
    worker = Worker(store, 0)
    store.take(*weighted(worker, parts[0]))
    box = Outbox(store.config, LAYERS, str(tmp_path / "spill"))
    for index, part in enumerate(parts[1:]):
        park(box, *weighted(worker, part, closes=index == 3), first=False, memory=10**9, limit=10**9)
    box.write_all(str(tmp_path / "left"))
    store.finish("closed")
    assert store.wait_finished(60)
    assert all(outcome.merged for outcome in recover(savefile, [tmp_path / "left"]))
    (row,) = read_covariances(savefile).to_pylist()
    assert row["samples"] == samples(parts)
    assert covariance_error(unpack_triangle(row["covariance"], 5), reference(parts)) < EXACT


def test_rows_that_are_given_up_leave_no_weight(tmp_path: Path) -> None:
    (tmp_path / "spill").write_text("in the way")
    store = CovarianceStore(config(world_size=1), writers=[])
    box = Outbox(store.config, LAYERS, str(tmp_path / "spill"))
    park(box, *weighted(Worker(store, 0), Group(rows(3, 5), 2.0), closes=True), first=True, memory=0, limit=0)
    delta, buffer = box.next() or (None, None)
    assert delta is not None
    assert not delta.complete
    assert store.take(delta, buffer).merged  # type: ignore[arg-type]


OLD = Delta(
    Source("r", "t", 1, "s1", "host", 101), 0, 3, 2, 20, True, True, ((0, 0, 4, 1), (2, 1, 2, 0)), widths=((2, 1),)
)
OLD_BUFFER = np.array([1.5, 0, 0, 0.25, 0, 0, 8.0, 0, 1.0, 2.0, 0.5])
OLD_CHECKSUM = 39527038598119915498726323999
"""What the version without weights has computed."""


def test_deltas_without_weights_are_what_they_were() -> None:
    assert fingerprint(OLD, OLD_BUFFER) == OLD_CHECKSUM
    parcel, header = parcel_of(OLD.sealed(OLD_BUFFER), OLD_BUFFER)
    assert "weights" not in header["delta"]
    assert parcel.delta == OLD.sealed(OLD_BUFFER)
    assert [OLD.weight(index) for index in range(2)] == [4.0, 2.0]
    changed = replace(OLD, weights=(8.0, 2.5))
    assert fingerprint(changed, OLD_BUFFER) != OLD_CHECKSUM
    assert fingerprint(replace(OLD, weights=(8.0, 2.25)), OLD_BUFFER) != fingerprint(changed, OLD_BUFFER)
    parcel, _ = parcel_of(changed.sealed(OLD_BUFFER), OLD_BUFFER)
    assert parcel.delta == changed.sealed(OLD_BUFFER)
    assert [parcel.delta.weight(index) for index in range(2)] == [8.0, 2.5]


@pytest.mark.parametrize("weights", ["x", [None], [[1]], 5, [{"a": 1}]])
def test_a_parcel_with_malformed_weights_is_refused(weights: Any) -> None:
    header = decode(
        b"".join(bytes(memoryview(p)) for p in encode_parcel(OLD, OLD_BUFFER, config(), LAYERS, first=True)),
        "delta",
        "here",
    )[0]
    header["delta"]["weights"] = weights
    content = b"".join(bytes(memoryview(piece)) for piece in encode("delta", header, [OLD_BUFFER]))
    with pytest.raises(ReadError, match="here does not describe a delta"):
        decode_parcel(content, "here")


# --- the door ------------------------------------------------------------------------------------------


NAN, INF = float("nan"), float("inf")
BAD_WEIGHTS: list[tuple[Any, str]] = [
    ((1.0,), "it has 1 weights for 2 entries"),
    ((1.0, 2.0, 3.0), "it has 3 weights for 2 entries"),
    *((bad, "its weights are no tuple of floats") for bad in ([4.0, 2.0], (4, 2.0), (True, 2.0), "ab", None)),
    ((np.float64(4.0), 2.0), "its weights are no tuple of floats"),
    *(((bad, 2.0), f"layer conv has a weight of {bad} for 4 observations") for bad in (NAN, INF, 0.0, -0.0)),
    ((4.0, -2.0), r"layer fc has a weight of -2.0 for 2 observations"),
    ((4.0, 1e300), r"layer fc has a weight of 1e\+300 for 2 observations"),
    ((4.0, 5e-324), r"layer fc has a weight of 5e-324 for 2 observations"),
]


@pytest.mark.parametrize(("weights", "message"), BAD_WEIGHTS)
def test_malformed_weights_are_refused_by_name_and_change_nothing(weights: Any, message: str) -> None:
    store = CovarianceStore(config(world_size=1), writers=[])
    worker = Worker(store, 0)
    part = Group(rows(10, 5), 2.5)
    store.take(*weighted(worker, part))
    before = store.freeze().header
    delta, buffer = worker.delta({(0, 0): rows(4, 3), (1, 0): rows(2, 5)}, 0, False)
    with pytest.raises(DeltaRefused, match=message):
        store.take(replace(delta, weights=weights).sealed(buffer), buffer)
    assert store.freeze().header == before
    assert store.status()["refused"] == 1
    worker.send({}, closes=True)
    written(store, 1)
    check(store, [part])


def test_non_finite_rows_alone_weigh_nothing() -> None:
    store = CovarianceStore(config(world_size=1), writers=[keeper := Keeper()])
    worker = Worker(store, 0)
    delta = Delta(worker.source, 0, 0, 0, 0, True, True, ((1, 0, 0, 6),), weights=(1.0,))
    with pytest.raises(DeltaRefused, match=r"layer fc has a weight of 1.0 for 0 observations"):
        store.take(delta.sealed(np.zeros(20)), np.zeros(20))
    assert store.take(replace(delta, weights=(0.0,)).sealed(np.zeros(20)), np.zeros(20)).merged
    written(store, 1)
    (row,) = keeper.windows[0].rows
    assert (row.samples, row.nonfinite_rows, row.stats["trace"]) == (0, 6, 0.0)


def test_a_weight_that_was_changed_on_the_way_is_noticed() -> None:
    store = CovarianceStore(config(world_size=1), writers=[])
    delta, buffer = weighted(Worker(store, 0), Group(rows(4, 5), 2.0))
    with pytest.raises(DeltaRefused, match="its checksum is not that of its content"):
        store.take(replace(delta, weights=(8.5,)), buffer)
    with pytest.raises(DeltaRefused, match="its checksum is not that of its content"):
        store.take(replace(delta, weights=()), buffer)


# --- the worker ----------------------------------------------------------------------------------------


def packed(weights: dict[tuple[int, int], list[float]]) -> tuple[Delta, F64, dict[tuple[int, int], list[Group]]]:
    """A delta of accumulators that got groups of these weights."""
    generator = torch.Generator().manual_seed(3)
    harvest, kept = {}, {}
    for (layer, phase), each in weights.items():
        total = harvest[layer, phase] = accumulator(LAYERS[layer].features or 0)
        kept[layer, phase] = []
        for weight in each:
            values = torch.randn(6, total.features, generator=generator)
            total.add(values, weight=weight)
            kept[layer, phase].append(Group(values.double().numpy(), weight))
    delta, buffer = Packer(LAYERS)(Pending(0, 0, True, True, harvest, []), source(0), 0, 0)  # type: ignore[arg-type]
    return delta, buffer, kept


def test_weights_are_packed_only_where_something_was_sampled() -> None:
    delta, _, _ = packed({(0, 0): [1.0, 1.0], (1, 0): [1.0]})
    assert (delta.entries, delta.weights) == (((0, 0, 12, 0), (1, 0, 6, 0)), ())
    delta, _, _ = packed({(0, 0): [1.0, 1.0], (1, 0): [4.0, 2.0], (1, 1): []})
    assert (delta.entries, delta.weights) == (((0, 0, 12, 0), (1, 0, 12, 0)), (12.0, 36.0))


def test_what_a_worker_packs_is_published_by_weight() -> None:
    store = CovarianceStore(config(world_size=1), writers=[])
    worker = Worker(store, 0)
    delta, buffer, kept = packed({(0, 0): [1.0, 1.0], (1, 0): [4.0, 1.0, 32.0]})
    ack: Ack = store.take(replace(delta, source=worker.source).sealed(buffer), buffer)
    assert ack.merged
    written(store, 1)
    check(store, kept[1, 0], 1e-6)
    assert covariance_error(store.covariance("conv", "train"), reference(kept[0, 0])) < 1e-6
