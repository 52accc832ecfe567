"""Sketched layers from a worker to the files: the door, merging, snapshots, parked windows, parcels, shards."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from delve_ray import SaturationTracker, read_covariances, read_spectra
from delve_ray.errors import DeltaRefused, OptionError, ReadError, RegistrationError
from delve_ray.memory import fit_memory, worker_bytes
from delve_ray.moments import F64, Moments
from delve_ray.parcels import decode_parcel, encode_parcel
from delve_ray.recorder import Recorder, RecorderOptions
from delve_ray.reservoir import Reservoir
from delve_ray.schema import LayerRow
from delve_ray.selection import select_layers
from delve_ray.sketch import WHOLE, SketchRule, omega, sketch_size
from delve_ray.storage import Storage
from delve_ray.store.assignment import assign
from delve_ray.store.core import CovarianceStore
from delve_ray.store.protocol import Delta, LayerInfo, StoreConfig
from delve_ray.store.publisher import _decomposing_bytes
from delve_ray.store.publishing import entry_row
from delve_ray.store.saving import Saver
from delve_ray.store.sharded import LocalShards
from delve_ray.store.state import config_of, window_entries
from delve_ray.store.window import Collected, Entry
from tests.chaos.sharded import ShardedIncarnations
from tests.stores import Keeper, Worker, config, published, until, written

WIDE, SIZE = 90, 16
LAYERS = [LayerInfo("narrow", "Linear", 5), LayerInfo("wide", "Linear", WIDE), LayerInfo("wider", "Linear", 100)]
RULE = SketchRule(64, SIZE)
OPTIONS: dict[str, Any] = {"max_features": 64, "sketch_size": SIZE}


class SketchingWorker(Worker):
    """Sends sketches of wide layers."""

    def __init__(self, *args: Any, rule: SketchRule = RULE, **changes: Any) -> None:
        super().__init__(*args, **changes)
        self.rule = rule

    def delta(self, rows: dict[tuple[int, int], np.ndarray], step: int, closes: bool) -> tuple[Delta, np.ndarray]:
        entries, parts = [], [np.empty(0)]
        for (layer, phase), values in sorted(rows.items()):
            moments = Moments.from_rows(values)
            entries.append((layer, phase, moments.n, 0))
            parts += [moments.mean, packed(moments, self.rule)]
        delta = Delta(self.source, self.attempt, self.seq, self.window, step, closes, closes, tuple(entries))
        buffer = np.concatenate(parts)
        return delta.sealed(buffer), buffer


def packed(moments: Moments, rule: SketchRule = RULE) -> F64:
    columns = rule.columns(moments.features)
    if not columns:
        return moments.packed()
    test = omega(moments.features, columns).dense(0, moments.features)
    return np.concatenate([np.diag(moments.scatter), (moments.scatter @ test).ravel()])


def some_rows(seed: int) -> dict[tuple[int, int], F64]:
    rng = np.random.default_rng(seed)
    return {
        (index, 0): rng.normal(size=(40, layer.features or 0)) @ np.diag(0.8 ** np.arange(layer.features or 0)) + 2
        for index, layer in enumerate(LAYERS)
    }


@pytest.fixture(autouse=True)
def layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.stores.LAYERS", LAYERS)


def sketched_row(rows: F64, options: StoreConfig) -> LayerRow:
    """What is to be published of rows, without a store."""
    moments = Moments.from_rows(rows)
    entry = Entry(moments.features, columns=RULE.columns(moments.features))
    entry.add(moments.n, 0, moments.mean, packed(moments), float(moments.n))
    cut = entry.freeze()
    return entry_row(cut, cut.collect(), LayerInfo("x", "Linear", None), "train", options)


def same(row: Any, expected: LayerRow) -> None:
    """A published row is this one, up to the rounding of another order of sums."""
    assert (row.sketched, row.samples) == (True, expected.samples)
    scale = expected.stats["trace"]
    size = min(row.eigenvalues.size, expected.eigenvalues.size)
    np.testing.assert_allclose(row.eigenvalues[:size], expected.eigenvalues[:size], atol=1e-8 * scale)
    assert row.unseen_variance == pytest.approx(expected.unseen_variance, abs=1e-6 * scale)
    assert row.stats["trace"] == pytest.approx(scale, rel=1e-12)
    assert (row.saturation_low, row.saturation_high) == (expected.saturation_low, expected.saturation_high)


def own(savefile: str = "/nowhere", **changes: Any) -> StoreConfig:
    return config(savefile=savefile, **({"product_eps": 2.0**-52} | OPTIONS | changes))


def send_all(workers: list[SketchingWorker], windows: int = 1) -> list[dict[int, F64]]:
    """Each window in three deltas of each worker; the rows of each layer."""
    sent = []
    for window in range(windows):
        parts = [some_rows(100 * window + number) for number in range(3 * len(workers))]
        for number, part in enumerate(parts):
            workers[number % len(workers)].send(part, step=window, closes=number >= 2 * len(workers))
        sent.append({layer: np.concatenate([part[layer, 0] for part in parts]) for layer in range(len(LAYERS))})
    return sent


# --- merging and publishing -----------------------------------------------------------------------------------


def test_what_several_ranks_send_is_published_as_the_sketch_of_all_rows() -> None:
    keeper = Keeper()
    store = CovarianceStore(own(), writers=[keeper])
    (sent,) = send_all([SketchingWorker(store, rank) for rank in range(2)])
    written(store, 1)
    narrow, wide, wider = keeper.windows[0].rows
    assert (narrow.sketched, narrow.saturation_low, narrow.unseen_variance) == (False, None, None)
    assert narrow.covariance is not None
    for row, layer in ((wide, 1), (wider, 2)):
        same(row, sketched_row(sent[layer], store.config))
        exact = np.linalg.eigvalsh(np.cov(sent[layer].T, bias=True))[::-1]
        head = row.eigenvalues
        assert (head <= exact[: head.size] * (1 + 1e-9)).all()
        assert (exact[: head.size] <= head + row.unseen_variance + 1e-6 * exact.sum()).all()
        assert row.covariance is None
        np.testing.assert_allclose(row.mean, sent[layer].mean(0), atol=1e-12)
        np.testing.assert_array_equal(store.spectrum(LAYERS[layer].name, "train"), head)
        with pytest.raises(OptionError, match=r"has \d+ features, more than max_features=64, and is sketched"):
            store.covariance(LAYERS[layer].name, "train")
    assert store.covariance("narrow", "train").shape == (5, 5)
    kept = sum(8 * RULE.packed_size(layer.features or 0) for layer in LAYERS)
    until(lambda: store.status()["bytes"] == kept, "what answers spectrum(), and no more")


def test_a_sketched_layer_without_a_finite_row_has_a_row_of_zeros() -> None:
    found = Collected(0, 7, np.zeros(WIDE), np.zeros(sketch_size(WIDE, SIZE)), 0.0)
    entry = Entry(WIDE, found)
    assert entry.columns == SIZE
    row = entry_row(entry.freeze(), found, LAYERS[1], "train", own())
    assert (row.samples, row.stats["trace"], row.unseen_variance, row.eigenvalues.size) == (0, 0.0, 0.0, 0)


def test_an_embedding_lies_along_the_leading_vectors() -> None:
    rows = some_rows(3)[1, 0]
    moments = Moments.from_rows(rows)
    entry = Entry(WIDE, Collected(40, 0, moments.mean, packed(moments), 40.0))
    entry.sample(Reservoir(np.linspace(0.1, 0.4, 40), rows, 0.5), 40)
    cut = entry.freeze()
    row = entry_row(cut, cut.collect(), LAYERS[1], "train", own(stats=("embed",)))
    assert row.embedding is not None
    assert row.embedding.shape == (40, 2)
    np.testing.assert_allclose(row.embedding.var(0), row.eigenvalues[:2], rtol=0.05)


def test_a_decomposition_of_a_sketch_takes_no_square_of_its_width() -> None:
    assert _decomposing_bytes(Entry(50_000, columns=1024)) < 200 << 20
    assert _decomposing_bytes(Entry(1000)) == 24_000_000


# --- the door -------------------------------------------------------------------------------------------------


def test_the_door_knows_how_long_a_sketch_is() -> None:
    store = CovarianceStore(own(), writers=[])
    worker = SketchingWorker(store, 0)
    delta, buffer = worker.next(some_rows(0))
    for wrong in (buffer[:-1], np.append(buffer, 0.0)):
        with pytest.raises(DeltaRefused, match="its entries need float64 of shape"):
            store.take(delta.sealed(wrong), wrong)
    whole = np.concatenate([np.zeros(WIDE), Moments.from_rows(some_rows(0)[1, 0]).packed()])
    one = replace(delta, entries=(delta.entries[1],))
    with pytest.raises(DeltaRefused, match=rf"need float64 of shape \({WIDE + sketch_size(WIDE, SIZE)},\)"):
        store.take(one.sealed(whole), whole)
    negative = buffer.copy()
    negative[20 + WIDE] = -1.0  # 5 + 15 values of the narrow layer, then the mean
    with pytest.raises(DeltaRefused, match="layer wide, phase train has a scatter with a negative diagonal"):
        store.take(delta.sealed(negative), negative)
    changed = buffer.copy()
    changed[-1] = np.nan
    with pytest.raises(DeltaRefused, match="layer wider, phase train has non-finite moments"):
        store.take(delta.sealed(changed), changed)
    assert store.status()["bytes"] == 0
    assert store.take(delta, buffer).merged


@pytest.mark.parametrize("name", ["max_features", "sketch_size"])
def test_a_worker_that_sketches_otherwise_does_not_fit(name: str) -> None:
    store = CovarianceStore(own(), writers=[])
    SketchingWorker(store, 0)
    with pytest.raises(RegistrationError, match=name):
        SketchingWorker(store, 1, own(**{name: OPTIONS[name] + 8}))


# --- files ----------------------------------------------------------------------------------------------------


def test_a_restarted_store_goes_on_with_its_sketches(tmp_path: Path) -> None:
    options = own(str(tmp_path / "run"), save_to=("parquet",), snapshot_every=3600.0, stats=("trace",))
    store = CovarianceStore(options, saver=Saver(Storage(options.savefile), 3600.0))
    workers = [SketchingWorker(store, rank) for rank in range(2)]
    first = some_rows(1)
    workers[0].send(first)
    assert store.saver is not None
    assert store.saver.wait_saved(store._version, 60)
    store.saver.stop()
    restarted = CovarianceStore(replace(options, resume=True), saver=Saver(Storage(options.savefile), 3600.0))
    restarted.restore()
    second = some_rows(2)
    for worker in workers:
        worker.store = restarted
    workers[0].send(second, closes=True)
    workers[1].send({}, closes=True)
    written(restarted, 1)
    rows = {row["layer"]: row for row in read_spectra(options.savefile).to_pylist()}
    for layer in (1, 2):
        expected = sketched_row(np.concatenate([first[layer, 0], second[layer, 0]]), options)
        row = rows[LAYERS[layer].name]
        assert (row["samples"], row["sketched"], row["features"]) == (80, True, LAYERS[layer].features)
        assert row["unseen_variance"] == pytest.approx(expected.unseen_variance, abs=1e-6 * row["trace"])
        assert row["saturation_high"] == expected.saturation_high


def test_a_window_out_of_a_file_has_sketches_by_the_length_of_its_arrays() -> None:
    values = np.arange(float(sketch_size(WIDE, SIZE)))
    index = [[0, 0, WIDE, 4, 1]]
    entries = window_entries(index, iter([np.ones(WIDE), values]), "here")
    collected = entries[0, 0].freeze().collect()
    assert (entries[0, 0].columns, collected.columns, collected.n, collected.nonfinite) == (SIZE, SIZE, 4, 1)
    np.testing.assert_array_equal(collected.packed, values)
    with pytest.raises(ReadError, match="here is damaged"):
        window_entries(index, iter([np.ones(WIDE), values[:-1]]), "here")


def test_a_configuration_of_before_there_were_sketches_has_none() -> None:
    values = own().on_disk()
    del values["max_features"], values["sketch_size"]
    assert config_of(values).sketching.columns(100_000) == 0
    assert config_of(own().on_disk()).sketching == RULE


def test_a_parcel_keeps_a_sketch() -> None:
    store = CovarianceStore(own(), writers=[])
    delta, buffer = SketchingWorker(store, 0).next(some_rows(5))
    data = b"".join(bytes(piece) for piece in encode_parcel(delta, buffer, store.config, LAYERS, first=True))
    parcel = decode_parcel(data, "there")
    assert parcel.delta == delta
    assert parcel.config.sketching == RULE
    np.testing.assert_array_equal(parcel.buffer, buffer)
    assert store.take(parcel.delta, parcel.buffer).merged


def test_shards_publish_what_one_store_does(tmp_path: Path) -> None:
    keeper = Keeper()
    one = CovarianceStore(own(), writers=[keeper])
    options = own(str(tmp_path / "run"), num_shards=3, save_to=("parquet",), stats=("trace",))
    sharded: Any = LocalShards(options, lambda _: None)
    for store in (one, sharded):
        workers = [SketchingWorker(store, rank, options if store is sharded else None) for rank in range(2)]
        send_all(workers, windows=2)
        published(store, 2)
        for worker in workers:
            worker.leave()
        assert store.wait_finished(60)
    rows = {(row["step"], row["layer"]): row for row in read_spectra(options.savefile).to_pylist()}
    assert len(rows) == 6
    for window in keeper.windows:
        for expected in window.rows:
            row = rows[window.step, expected.layer]
            assert row["sketched"] == expected.sketched
            assert row["eigenvalues"] == expected.eigenvalues.tolist()
            assert row["unseen_variance"] == expected.unseen_variance


def test_shards_are_assigned_by_the_cost_of_a_sketch() -> None:
    infos = [LayerInfo(name, "Linear", width) for name, width in zip("abc", (500, 100, 100), strict=True)]
    assert assign(infos, 2, WHOLE) == [0, 1, 1]
    assert assign(infos, 2, SketchRule(200, 8)) == [0, 0, 1], "500·10 values are fewer than 100·103/2"


def test_a_front_that_is_started_anew_knows_which_shard_has_a_sketched_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One shard corrects a window, and the other is gone: what that one had published is in the files."""
    infos = [LayerInfo(name, "Linear", width) for name, width in zip("abc", (100, 60, 60), strict=True)]
    assert (assign(infos, 2, RULE), assign(infos, 2, WHOLE)) == ([0, 0, 1], [0, 1, 1])
    monkeypatch.setattr("tests.stores.LAYERS", infos)
    monkeypatch.setattr("delve_ray.store.parts.TOGETHER_S", 0.05)
    rng = np.random.default_rng(0)
    rows = [{(index, 0): rng.normal(size=(40, info.features)) for index, info in enumerate(infos)} for _ in range(2)]
    options = own(str(tmp_path), save_to=("parquet",), stats=("trace",), late_after=0.05)
    lives = ShardedIncarnations(options, random.Random(0), num_shards=2)
    lives.start()
    early, late = (SketchingWorker(lives.reached, rank, lives.config) for rank in range(2))
    early.send(rows[0], closes=True)
    until(lambda: any(tmp_path.glob("spectra/*.parquet")))
    front = lives.front.life.store
    assert front.saver.wait_saved(front._version, 20)
    lives.kill(process=lives.front)
    lives.shards[1].end()
    assert lives.front.reached.assigned() == {"a": 0, "b": 0, "c": 1}
    delta, buffer = late.next(rows[1], closes=True)
    widths = [infos[layer].features for layer, *_ in delta.entries]
    piece = lives.reached._cut(delta, buffer, widths)[0]
    assert lives.shards[0].reached.take(*piece).merged
    assert lives.front.reached.take(replace(delta, entries=()).sealed(np.empty(0)), np.empty(0)).merged
    until(lambda: max(read_spectra(tmp_path).column("samples").to_pylist()) == 80)
    found = [(row["layer"], row["samples"], row["workers"]) for row in read_spectra(tmp_path).to_pylist()]
    assert found == [("a", 80, 1), ("b", 80, 1), ("c", 40, 1)]


# --- a tracker ------------------------------------------------------------------------------------------------


def wide_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 100), nn.ReLU(), nn.Linear(100, 50))


def test_a_tracker_sketches_wide_layers_end_to_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, savefile = wide_model(), str(tmp_path / "run")
    x = torch.randn(500, 6, generator=torch.Generator().manual_seed(1))
    writers = ["parquet", "csv", "tensorboard", "npy", "console"]
    with (
        caplog.at_level("INFO"),
        SaturationTracker(savefile, writers, model, max_features=64, sketch_size=10, stats=["lsat", "trc", "cov"]) as t,
    ):
        for batch in x.split(64):
            model(batch)
        t.add_saturations()
        metrics = t.metrics(wait=True)
    assert "sketch_size=10 is rounded up to 16" in caplog.text
    assert "layer 0 has 100 features, more than max_features=64, and is sketched with 16 columns" in caplog.text
    rows = {row["layer"]: row for row in read_spectra(savefile).to_pylist()}
    exact = np.linalg.eigvalsh(np.cov(model[0](x).detach().double().numpy().T, bias=True))[::-1]
    row = rows["0"]
    assert (row["sketched"], rows["2"]["sketched"], row["samples"]) == (True, False, 500)
    head = np.array(row["eigenvalues"])
    np.testing.assert_allclose(head, exact[:6], rtol=1e-3)
    assert row["intrinsic_dimensionality"] == 1 + int(np.searchsorted(np.cumsum(exact) / exact.sum(), 0.99))
    assert metrics["saturation/train/0"] == row["saturation"] == row["saturation_low"] == row["saturation_high"]
    assert row["trace"] == pytest.approx(exact.sum(), rel=1e-6)
    assert 0 <= row["unseen_variance"] < 1e-3 * row["trace"]
    assert [each["layer"] for each in read_covariances(savefile).to_pylist()] == ["2"]


def test_a_width_that_a_forward_tells_is_sketched_as_well(savefile: str, caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Conv2d(2, 8, 3)
    x = torch.randn(50, 2, 6, 6)
    options: dict[str, Any] = {"conv_method": "flatten", "max_features": 64, "sketch_size": 16}
    with caplog.at_level("INFO"), SaturationTracker(savefile, "parquet", model, **options) as tracker:
        model(x)
        tracker.add_saturations()
        tracker.metrics(wait=True)
    (row,) = read_spectra(savefile).to_pylist()
    assert (row["features"], row["sketched"], row["samples"]) == (128, True, 50)
    values = model(x).detach().flatten(1).double().numpy()
    assert row["trace"] == pytest.approx(values.var(0).sum(), rel=1e-6)
    assert "has 128 features, more than max_features=64, and is sketched" in caplog.text


def test_a_sketch_that_would_be_larger_than_the_covariance_is_none(
    savefile: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = nn.Linear(3, 20)
    with SaturationTracker(savefile, "parquet", model, max_features=10) as tracker:
        model(torch.randn(90, 3))
        tracker.add_saturations()
        assert tracker.store is not None
    (row,) = read_spectra(savefile).to_pylist()
    assert (row["sketched"], len(row["eigenvalues"])) == (False, 20)
    assert "sketch_size=1024 would be larger than its covariance: it is recorded whole" in caplog.text


def test_a_given_store_says_what_is_sketched(savefile: str) -> None:
    store = CovarianceStore(
        StoreConfig("r", savefile, 1, stats=("trace",), publish_every=0.0, silent_after=0.0, **OPTIONS)
    )
    model = wide_model()
    with SaturationTracker(modules=model, store=store) as tracker:
        model(torch.randn(30, 6))
        tracker.add_saturations()
    assert [row["sketched"] for row in read_spectra(savefile).to_pylist()] == [True, False]


# --- memory ---------------------------------------------------------------------------------------------------


def test_memory_counts_a_sketch_as_one() -> None:
    rule = SketchRule(8192, 1024)
    sketch = 8 * 50_000 * 1025
    needed = worker_bytes([50_000], 0, rule)
    assert 4 * sketch + 2 * 2 * sketch <= needed < 14 * sketch
    assert needed < worker_bytes([50_000]) / 10
    layers = select_layers(nn.Sequential(nn.Linear(2, 300), nn.Linear(300, 4)))
    options: dict[str, Any] = {"max_features": 200, "sketch_size": 16}
    needed = worker_bytes([300, 4], 0, SketchRule(200, 16))
    assert fit_memory(layers, max_memory=needed, **options) == layers
    with pytest.raises(OptionError, match=rf"max_memory={needed - 1} .* lower sketch_size"):
        fit_memory(layers, max_memory=needed - 1, **options)


def test_a_recorder_of_sketches_stays_within_the_bytes_that_are_stated() -> None:
    model = nn.Linear(8, 1200)
    recorder = Recorder(select_layers(model), RecorderOptions(max_features=1000, sketch_size=64))
    recorder.start()
    harvests = []
    for _ in range(2):
        model.train()(torch.randn(400, 8))
        model.eval()(torch.randn(400, 8))
        harvests += recorder.harvest(end_of_window=False).values()
    recorder.close()
    taken = 0
    for accumulator in harvests:
        tensors = [value for value in vars(accumulator).values() if isinstance(value, torch.Tensor)]
        own = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
        taken += sum(own.values())
        assert sum(own.values()) <= accumulator.held_bytes + 64
    assert 4 * 8 * sketch_size(1200, 64) < taken <= worker_bytes([1200], 0, recorder.options.sketching)
