"""Sketched layers whose deltas come late, twice, merged with others or out of files: the rows are as straight away."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from delve_ray import OptionError, SaturationTracker, read_spectra
from delve_ray.moments import F64, Moments
from delve_ray.recorder import Recorder
from delve_ray.recovery import recover
from delve_ray.reservoir import UNBOUNDED, pack, smallest
from delve_ray.schema import LayerRow, PublishedWindow
from delve_ray.sketch import WHOLE, sketch_size
from delve_ray.storage import Storage
from delve_ray.store import combiner as combiner_module
from delve_ray.store.assignment import assign
from delve_ray.store.combiner import Combiner
from delve_ray.store.core import CovarianceStore
from delve_ray.store.merging import combine
from delve_ray.store.protocol import Delta, LayerInfo
from delve_ray.store.publishing import entry_row
from delve_ray.store.saving import Saver
from delve_ray.store.window import Entry
from tests.store.test_combined import together
from tests.store.test_sharded import Sharded
from tests.store.test_sketches import LAYERS, OPTIONS, RULE, SIZE, SketchingWorker, own, packed, some_rows
from tests.store.test_sketches import layers as layers  # the fixture
from tests.stores import Keeper, until, written
from tests.test_recovery import Away

WIDE, NARROW = 100, 50
EPS32 = 2.0**-23


def model_of(seed: int = 0) -> nn.Module:
    """A wide layer "0", which is sketched, and a narrow one, "2"."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, WIDE), nn.ReLU(), nn.Linear(WIDE, NARROW))


def batch(step: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(40 + step, 6, generator=torch.Generator().manual_seed(100 * seed + step))


def outputs(step: int, seed: int = 0) -> F64:
    """The rows of the wide layer, of a model that nobody tracks."""
    rows: F64 = model_of(seed)[0](batch(step, seed)).detach().double().numpy()  # type: ignore[index]
    return rows


def contents(savefile: str, *leave_out: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = read_spectra(savefile).drop_columns(["wall_time", *leave_out]).to_pylist()
    return rows


def store_at(savefile: str, **changes: Any) -> CovarianceStore:
    options = own(savefile, **({"save_to": ("parquet",), "stats": ("trace",), "product_eps": EPS32} | changes))
    return CovarianceStore(options, saver=Saver(Storage(savefile), options.snapshot_every))


def exact_row(rows: F64, row: dict[str, Any], tolerance: float = 1e-5) -> None:
    """A row of a sketched layer is the sketch of these rows, which is computed in float64 in one piece."""
    moments = Moments.from_rows(rows)
    entry = Entry(moments.features, columns=SIZE)
    entry.add(moments.n, 0, moments.mean, packed(moments), float(moments.n))
    cut = entry.freeze()
    expected = entry_row(cut, cut.collect(), LayerInfo("x", "Linear", None), "train", own(product_eps=EPS32))
    scale = expected.stats["trace"]
    found = np.array(row["eigenvalues"])
    size = min(found.size, expected.eigenvalues.size)
    assert (row["sketched"], row["samples"], size > 0) == (True, len(rows), True)
    np.testing.assert_allclose(found[:size], expected.eigenvalues[:size], atol=tolerance * scale)
    assert found[size:].sum() + expected.eigenvalues[size:].sum() <= tolerance * scale
    assert row["trace"] == pytest.approx(scale, rel=tolerance)
    assert row["unseen_variance"] == pytest.approx(expected.unseen_variance, abs=tolerance * scale)


# --- parked on disk ------------------------------------------------------------------------------------------------


def track(savefile: str, spill: Path, *, away: bool, steps: int = 4) -> list[dict[str, Any]]:
    """What is published of some windows, of which all but the first are closed while the store is away."""
    store = store_at(savefile, world_size=1, snapshot_every=0.05)
    model, link = model_of(), Away(store)
    tracker = SaturationTracker(modules=model, store=store, publish_every=0, spill_dir=spill)
    tracker._shipper.store = link  # type: ignore[assignment]
    outbox = tracker._shipper.outbox
    for step in range(steps):
        model(batch(step))
        link.away = away and step > 0
        tracker.add_saturations(step)
        assert link.away or tracker._shipper.flush(20)
    if away:
        until(lambda: outbox.status()["unmerged"] == steps - 1 and outbox.memory_bytes == 0)
        delta_bytes = 8 * (WIDE + sketch_size(WIDE, SIZE) + NARROW + NARROW * (NARROW + 1) // 2)
        assert outbox.status()["disk_bytes"] >= (steps - 1) * delta_bytes
        link.away = False
        assert tracker._shipper.flush(20)
        outbox.offer_all()  # a sender that never learned of the answers
        tracker._shipper.wake()
    tracker.close()
    assert outbox.status()["lost"] == 0
    assert not spill.exists() or list(spill.iterdir()) == [], "nothing is left behind"
    return contents(savefile)


def test_what_waited_on_disk_is_what_goes_straight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    straight = track(str(tmp_path / "straight"), tmp_path / "unused", away=False)
    monkeypatch.setattr(Recorder, "outbox_bytes", property(lambda self: 0))  # nothing may stay in memory
    parked = track(str(tmp_path / "parked"), tmp_path / "spill", away=True)
    assert [(row["step"], row["layer"], row["sketched"]) for row in parked] == [
        (step, layer, layer == "0") for step in range(4) for layer in ("0", "2")
    ]
    assert parked == straight, "to the bit"
    for row in parked[::2]:
        exact_row(outputs(row["step"]), row)


def test_what_a_rank_could_not_deliver_is_recovered_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    savefile = str(tmp_path / "run")
    store = store_at(savefile, snapshot_every=0.05, late_after=0.05)
    models = [model_of(rank) for rank in range(2)]
    trackers = [
        SaturationTracker(modules=model, store=store, rank=rank, publish_every=0, spill_dir=tmp_path / f"spill{rank}")
        for rank, model in enumerate(models)
    ]
    link = trackers[1]._shipper.store = Away(store)  # type: ignore[assignment]
    sent: dict[int, list[F64]] = {}
    for step in range(2):
        link.away = step > 0
        for rank, model in enumerate(models):
            model(batch(step, rank))
            sent.setdefault(step, []).append(outputs(step, rank))
            trackers[rank].add_saturations(step)
            assert link.away or trackers[rank]._shipper.flush(20)
    for tracker in trackers:  # the second writes what the store has already, too
        tracker._shipper.outbox.write_all(str(tmp_path / "elsewhere"))
    trackers[1].close(timeout=0.5)
    assert "ends without having delivered rows of steps [1]" in caplog.text
    until(lambda: store.progress().published == 2)
    trackers[0].close(timeout=0.3)
    store.finish("closed")
    assert store.wait_finished(20)
    assert [row["workers"] for row in contents(savefile) if row["layer"] == "0"] == [2, 1]
    outcomes = recover(savefile, [tmp_path / "elsewhere"], force=True)
    assert outcomes
    assert all(outcome.merged for outcome in outcomes)
    rows = [row for row in contents(savefile) if row["layer"] == "0"]
    assert [(row["step"], row["workers"]) for row in rows] == [(0, 2), (1, 2)]
    for row in rows:
        exact_row(np.concatenate(sent[row["step"]]), row)


# --- attempts, snapshots -------------------------------------------------------------------------------------------


def test_a_resumed_run_replaces_the_sketches_that_it_replays(tmp_path: Path) -> None:
    savefile = str(tmp_path / "run")

    def run(steps: range, seed: int, **options: Any) -> None:
        model = model_of(seed)
        with SaturationTracker(savefile, "parquet", model, **(OPTIONS | options)) as tracker:
            for step in steps:
                model(batch(step, seed))
                tracker.add_saturations(step)

    run(range(3), 1)
    run(range(2, 4), 2, resume=True)
    rows = [row for row in contents(savefile) if row["layer"] == "0"]
    assert [(row["step"], row["attempt"]) for row in rows] == [(0, 0), (1, 0), (2, 1), (3, 1)]
    for row in rows:
        exact_row(outputs(row["step"], row["attempt"] + 1), row)


@pytest.mark.parametrize("changes", [{"sketch_size": SIZE + 8}, {"max_features": 200}], ids=["larger", "whole"])
def test_a_run_that_goes_on_with_other_sketches_publishes_those_that_it_had(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    """Its store was killed with a window that was never published."""
    savefile = str(tmp_path / "run")
    store = store_at(savefile, snapshot_every=0.02)
    workers = [SketchingWorker(store, rank, token="none:0") for rank in range(2)]
    first = [some_rows(1), some_rows(2)]
    workers[0].send(first[0], closes=True)
    workers[1].send(first[1])
    until(lambda: all(store.heartbeat(worker.source).saved for worker in workers))
    assert store.saver is not None
    store.saver.stop()
    resumed = CovarianceStore(replace(store.config, world_size=1, resume=True, **changes))
    rule = resumed.config.sketching
    late = SketchingWorker(resumed, 0, token="none:0", rule=rule)
    until(lambda: read_spectra(savefile).num_rows == 3)
    head = [row["eigenvalues"] for row in contents(savefile) if row["layer"] == "wide"]
    assert resumed.spectrum("wide", "train").tolist() == head[0]
    with pytest.raises(OptionError, match="is sketched"):
        resumed.covariance("wide", "train")
    late.send(some_rows(3), step=1, closes=True)
    late.leave()
    assert resumed.wait_finished(20)
    before, after = ([row for row in contents(savefile) if row["attempt"] == attempt] for attempt in (0, 1))
    for layer in (1, 2):
        exact_row(rows_of(first, layer), before[layer], 1e-9)
        assert (after[layer]["samples"], after[layer]["sketched"]) == (
            40,
            bool(rule.columns(before[layer]["features"])),
        )
        assert len(after[layer]["eigenvalues"]) >= len(before[layer]["eigenvalues"])


def rows_of(parts: Sequence[dict[tuple[int, int], F64]], layer: int) -> F64:
    return np.concatenate([part[layer, 0] for part in parts])


def check_files(savefile: str, parts: Sequence[dict[tuple[int, int], F64]], workers: int = 2) -> None:
    """The files have the rows of all parts, which float64 sums, once."""
    rows = {row["layer"]: row for row in contents(savefile)}
    assert len(rows) == read_spectra(savefile).num_rows == len(LAYERS)
    for layer, info in enumerate(LAYERS):
        row, every = rows[info.name], rows_of(parts, layer)
        assert (row["samples"], row["workers"], row["final"]) == (len(every), workers, True)
        if row["sketched"]:
            exact_row(every, row, 1e-9)
        else:
            exact = np.linalg.eigvalsh(np.cov(every.T, bias=True))[::-1]
            np.testing.assert_allclose(row["eigenvalues"], exact, atol=1e-9 * exact[0])


def test_a_window_that_waits_for_a_late_rank_outlives_its_store(tmp_path: Path) -> None:
    """It is published, lies in a file, the store is killed, and the rank comes to the one after it."""
    savefile = str(tmp_path / "run")
    store = store_at(savefile, late_after=0.1, snapshot_every=0.05)
    workers = [SketchingWorker(store, rank) for rank in range(2)]
    parts = [some_rows(1), some_rows(2)]
    workers[0].send(parts[0], closes=True)
    until(lambda: store.status()["parked_windows"] == 1)
    until(lambda: store.heartbeat(workers[0].source).saved)
    assert {row["workers"] for row in contents(savefile)} == {1}
    assert store.saver is not None
    store.saver.stop()
    again = CovarianceStore(replace(store.config, resume=True), saver=Saver(Storage(savefile), 0.05))
    again.restore()
    for worker in workers:
        worker.store = again
    workers[1].send(parts[1], closes=True)
    for worker in workers:
        worker.leave()
    assert again.wait_finished(20)
    check_files(savefile, parts)


# --- merged before the wire ----------------------------------------------------------------------------------------


def whole(worker: SketchingWorker, seed: int, closes: bool) -> tuple[Delta, F64]:
    """A delta with weights and samples of rows."""
    rng, rows = np.random.default_rng(seed), some_rows(seed)
    delta, buffer = worker.next(rows, 0, closes)
    samples, pieces = [], []
    for (layer, phase), values in sorted(rows.items()):
        kept = smallest(rng.exponential(size=len(values)), values, UNBOUNDED, 6)
        samples.append((layer, phase, kept.keys.size, kept.bound))
        pieces.append(pack(kept))
    body = np.concatenate([buffer, *pieces])
    weights = tuple(float(n) for _, _, n, _ in delta.entries)
    return replace(delta, weights=weights, samples=tuple(samples)).sealed(body), body


def test_merged_deltas_are_the_sketch_of_all_their_rows() -> None:
    store = CovarianceStore(own(world_size=3), writers=[])
    parts = [some_rows(seed) for seed in range(3)]
    offers = [SketchingWorker(store, rank).next(part, 0, True) for rank, part in enumerate(parts)]
    widths = [layer.features or 0 for layer in LAYERS]
    bundle, body = combine([(delta, buffer, widths) for delta, buffer in offers], 0, RULE)
    assert [entry[2] for entry in bundle.total.entries] == [120] * 3
    assert body.size == sum(map(RULE.moments_size, widths))
    start = 0
    for layer, width in enumerate(widths):
        moments = Moments.from_rows(rows_of(parts, layer))
        expected = np.concatenate([moments.mean, packed(moments)])
        found = body[start : start + expected.size]
        np.testing.assert_allclose(found[:width], expected[:width], atol=1e-12)
        np.testing.assert_allclose(found[width:], expected[width:], atol=1e-11 * float(np.trace(moments.scatter)))
        start += expected.size
    assert all(ack is not None and ack.merged for ack in store.take_bundle(bundle, body))


@pytest.mark.parametrize("num_shards", [1, 2])
def test_the_files_are_those_without_a_combiner(
    tmp_path: Path, num_shards: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(combiner_module, "MISSES", 10**6)  # no rank is given up, however slow the machine
    options: dict[str, Any] = {"stats": ("trace", "embed"), "embed_rows": 6, "save_to": ("parquet",), **OPTIONS}
    alone = store_at(str(tmp_path / "alone"), **(options | {"product_eps": 2.0**-23}))
    store: Any = store_at(str(tmp_path / "run"), **options)
    if num_shards > 1:
        sharded = Sharded(str(tmp_path / "run"), num_shards, embed_rows=6, **OPTIONS)
        store = sharded.store
    workers = [SketchingWorker(store, rank, store.settings()) for rank in range(2)]
    others = [SketchingWorker(alone, rank, alone.config) for rank in range(2)]
    combiner, parts = Combiner(store, LAYERS, 6, RULE), []
    for number in range(3):
        offers = []
        for rank in range(2):
            seed = 10 * number + rank
            parts.append(some_rows(seed))
            offers.append(whole(workers[rank], seed, number == 2))
            alone.take(*whole(others[rank], seed, number == 2))
        assert [ack.merged for ack in together(combiner.take, offers)] == [True, True]
        combiner.patience = 60.0  # both are known now
    for each in (*workers, *others):
        each.leave()
    assert store.wait_finished(30)
    assert alone.wait_finished(30)
    assert store.status()["bundles"] >= 2
    for savefile in (tmp_path / "run", tmp_path / "alone"):
        check_files(str(savefile), parts)


# --- shards --------------------------------------------------------------------------------------------------------

MIXED = [LayerInfo("whole", "Linear", 60), LayerInfo("wide", "Linear", 90), LayerInfo("wider", "Linear", 100)]
"""Of which other shards have the layers than if none were sketched."""


@pytest.fixture
def mixed(layers: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert assign(MIXED, 2, RULE) != assign(MIXED, 2, WHOLE)
    monkeypatch.setattr("delve_ray.store.parts.TOGETHER_S", 0.2)
    for module in ("tests.stores", "tests.store.test_sketches", __name__):
        monkeypatch.setattr(f"{module}.LAYERS", MIXED)


@pytest.mark.usefixtures("mixed")
@pytest.mark.parametrize("kill", ["kill_shard", "kill_front"])
def test_shards_that_are_started_anew_go_on_with_their_sketches(tmp_path: Path, kill: str) -> None:
    sharded = Sharded(str(tmp_path), 2, **OPTIONS)
    workers = [SketchingWorker(sharded.store, rank, sharded.config) for rank in range(2)]  # type: ignore[arg-type]
    parts = [some_rows(seed) for seed in range(4)]
    for worker, part in zip(workers, parts, strict=False):
        worker.send(part)
    until(lambda: all(sharded.store.heartbeat(worker.source).saved for worker in workers))
    getattr(sharded, kill)(*([1] if kill == "kill_shard" else []))
    for worker, part in zip(workers, parts[2:], strict=True):
        worker.send(part, closes=True)
        worker.leave()
    assert sharded.store.wait_finished(30), sharded.store.status()
    check_files(str(tmp_path), parts)


@pytest.mark.usefixtures("mixed")
def test_a_front_that_is_started_anew_finds_the_layers_of_each_shard(tmp_path: Path) -> None:
    """One shard corrects its part of a window, of which the files have the other's."""
    sharded = Sharded(str(tmp_path), 2, late_after=0.1, **OPTIONS)
    workers = [SketchingWorker(sharded.store, rank, sharded.config) for rank in range(2)]  # type: ignore[arg-type]
    workers[0].send(some_rows(0), closes=True)
    until(lambda: read_spectra(tmp_path).num_rows == 3)
    until(lambda: sharded.store.heartbeat(workers[0].source).saved)
    for shard in sharded.shards:  # which then have nothing to offer again
        until(lambda: shard.running().flush(1.0))  # noqa: B023
        sharded._stop(shard)
    sharded.kill_front()
    (first, *_), before = contents(str(tmp_path)), {row["layer"]: row for row in contents(str(tmp_path))}
    assigned = dict(zip((info.name for info in MIXED), assign(MIXED, 2, RULE), strict=True))
    corrected = [corrected_row(info.name, info.features or 0) for info in MIXED if assigned[info.name] == 1]
    sharded.front.accept(1, PublishedWindow("r", 0, 0, 0, 1 << 30, True, 1, 2, now(), corrected))
    sharded.front.take(*workers[1].next({}, 0, True))  # the shards have not heard of the second rank's end yet
    until(lambda: contents(str(tmp_path))[0]["revision"] > first["revision"])
    after = contents(str(tmp_path), "revision", "workers")
    assert [row["layer"] for row in after] == ["whole", "wide", "wider"]
    for row in after:
        if assigned[row["layer"]] == 1:
            assert row["samples"] == 77
        else:
            assert row == {name: before[row["layer"]][name] for name in row}


def corrected_row(name: str, features: int) -> LayerRow:
    keeper = Keeper()
    store = CovarianceStore(own(), writers=[keeper])
    workers = [SketchingWorker(store, rank) for rank in range(2)]
    for worker in workers:
        worker.send(some_rows(worker.source.rank), closes=True)
    written(store, 1)
    row = next(row for row in keeper.windows[0].rows if row.layer == name)
    assert row.features == features
    return replace(row, samples=77)


def now() -> Any:
    from datetime import UTC, datetime

    return datetime.now(UTC)
