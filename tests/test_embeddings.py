"""stats="embed", from the forward to the file: which rows, in which coordinates, of all ranks, through failures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from delve_ray import OptionError, SaturationTracker, read_covariances
from delve_ray.analysis import read_embeddings
from delve_ray.errors import DeltaRefused
from delve_ray.moments import unpack_triangle
from delve_ray.outbox import Outbox
from delve_ray.parcels import decode_parcel, encode_parcel
from delve_ray.reservoir import UNBOUNDED, embed, merge, pack, smallest
from delve_ray.schema import F64
from delve_ray.storage import Storage
from delve_ray.store.core import CovarianceStore
from delve_ray.store.protocol import Delta
from delve_ray.store.saving import Saver, save_once
from delve_ray.writers.parquet import ParquetWriter
from tests.stores import LAYERS, Keeper, Worker, config, park, rows, written
from tests.windows import layer_row, window

STATS = ("saturation", "cov", "embed")


def points(path: Any, **where: Any) -> F64:
    """The coordinates of one layer's window, (k, 2)."""
    table = read_embeddings(path, ["x", "y"], [(name, "==", value) for name, value in where.items()])
    return np.stack([table.column(name).to_numpy() for name in ("x", "y")], axis=1)


def sorted_rows(values: F64) -> F64:
    return values[np.lexsort(values.T)]


def test_the_rows_of_a_layer_along_its_eigenvectors(savefile: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 1))
    batches = [torch.randn(15, 4) for _ in range(2)]
    with SaturationTracker(savefile, "parquet", model, stats=list(STATS), embed_rows=40) as tracker:
        for batch in batches:
            model(batch)
        tracker.add_saturations(step=3)
        model.eval()
        model(batches[0])
        tracker.add_saturations(step=4)
    outputs = model[0](torch.cat(batches)).detach().double().numpy()
    found = read_covariances(savefile, filters=[("layer", "==", "0"), ("phase", "==", "train")]).to_pylist()[0]
    covariance = unpack_triangle(np.array(found["covariance"]), 6)
    expected = embed(outputs, outputs.mean(axis=0), covariance)
    assert sorted_rows(points(savefile, layer="0", phase="train")) == pytest.approx(sorted_rows(expected), abs=1e-5)
    eigenvalues = np.linalg.eigvalsh(np.cov(outputs.T, bias=True))[::-1]
    assert points(savefile, layer="0", phase="train").var(axis=0) == pytest.approx(eigenvalues[:2], rel=1e-5)
    assert (points(savefile, layer="2", phase="train")[:, 1] == 0).all()  # one feature
    assert len(points(savefile, layer="0", phase="eval", step=4)) == 15
    table = read_embeddings(savefile, filters=[("layer", "==", "0"), ("phase", "==", "train")])
    assert table.column("point").to_pylist() == list(range(30))
    assert set(table.column("step").to_pylist()) == {3}


def test_no_more_rows_than_asked_for_and_others_with_another_seed(savefile: str) -> None:
    model = nn.Conv2d(3, 4, 1)
    torch.manual_seed(0)
    images = torch.randn(5, 3, 8, 8)
    outputs = model(images).detach().permute(0, 2, 3, 1).reshape(-1, 4).double().numpy()
    seen = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        path = f"{savefile}-{name}"
        with SaturationTracker(path, "parquet", model, stats=list(STATS), embed_rows=12, seed=seed) as tracker:
            model(images)
            tracker.add_saturations()
        found = read_covariances(path).to_pylist()[0]
        covariance = unpack_triangle(np.array(found["covariance"]), 4)
        every = {tuple(point) for point in embed(outputs, np.array(found["mean"]), covariance).round(4)}
        seen.append(points(path))
        assert seen[-1].shape == (12, 2)
        assert {tuple(point) for point in seen[-1].round(4)} <= every
    assert np.array_equal(seen[0], seen[1])
    assert not np.array_equal(seen[0], seen[2])


def test_the_default_is_256_and_without_embed_nothing_is_kept(savefile: str) -> None:
    model = nn.Linear(3, 2)
    for stats in ("embed", "lsat"):
        with SaturationTracker(f"{savefile}-{stats}", "parquet", model, stats=stats) as tracker:
            model(torch.randn(1000, 3))
            accumulators = tracker._recorder._accumulators.values()
            assert [each.reservoir is not None for each in accumulators] == [stats == "embed"]
            tracker.add_saturations()
    assert len(points(f"{savefile}-embed")) == 256
    assert len(points(f"{savefile}-lsat")) == 0
    assert not Path(f"{savefile}-lsat", "embeddings").exists()


@pytest.mark.parametrize("bad", [0, -1, 2.5, "many", True])
def test_a_bad_number_of_rows_is_refused(savefile: str, bad: Any) -> None:
    with pytest.raises(OptionError, match="embed_rows"):
        SaturationTracker(savefile, "parquet", nn.Linear(3, 2), stats="embed", embed_rows=bad)


def test_rows_that_do_not_fit_the_memory_are_refused_at_construction(savefile: str) -> None:
    model = nn.Linear(3, 1000)
    with SaturationTracker(savefile, "parquet", model, stats="lsat", max_memory=200 << 20):
        pass
    with pytest.raises(OptionError, match="max_memory"):
        SaturationTracker(f"{savefile}-2", "parquet", model, stats="embed", embed_rows=10_000, max_memory=200 << 20)


# --- in the store --------------------------------------------------------------------------------------------


def sampled(worker: Worker, values: F64, seed: int, size: int = 8, *, closes: bool = False) -> tuple[Delta, F64]:
    """The worker's next delta, of rows of layer fc, with a sample of them."""
    delta, buffer = worker.next({(1, 0): values}, closes=closes)
    keys = np.random.default_rng(seed).exponential(size=len(values))
    kept = smallest(keys, values, UNBOUNDED, size)
    whole = np.concatenate([buffer, pack(kept)])
    return replace(delta, samples=((1, 0, kept.keys.size, kept.bound),)).sealed(whole), whole


def expected_points(parts: list[F64], size: int = 8) -> F64:
    """What one process with all rows would publish."""
    samples = [
        smallest(np.random.default_rng(seed).exponential(size=len(part)), part, UNBOUNDED, len(part))
        for seed, part in enumerate(parts)
    ]
    whole = np.concatenate(parts)
    return embed(merge(samples, size).rows, whole.mean(axis=0), np.cov(whole.T, bias=True))


def parts_of(count: int) -> list[F64]:
    rng = np.random.default_rng(5)
    return [rng.normal(size=(int(n), 5)) @ np.diag([5.0, 3, 2, 1, 1]) + 7 for n in rng.integers(3, 30, count)]


def embed_config(**changes: Any) -> Any:
    return config(stats=STATS, embed_rows=8, **changes)


def test_the_ranks_deltas_make_one_sample_in_whatever_order() -> None:
    parts = parts_of(4)
    keeper = Keeper()
    store = CovarianceStore(embed_config(world_size=2), writers=[keeper])
    workers = [Worker(store, rank, embed_config(world_size=2)) for rank in range(2)]
    deltas = [sampled(workers[seed % 2], part, seed, closes=seed > 1) for seed, part in enumerate(parts)]
    for index in (2, 1, 3, 0, 2):  # one comes twice
        store.take(*deltas[index])
    written(store, 1)
    (row,) = keeper.windows[-1].rows
    assert row.embedding == pytest.approx(expected_points(parts), abs=1e-8)


def test_a_restarted_store_has_the_sample(savefile: str) -> None:
    parts = parts_of(3)
    options = embed_config(savefile=savefile, world_size=1, snapshot_every=3600.0)
    first = CovarianceStore(options, writers=[], saver=Saver(Storage(savefile), 3600.0))
    worker = Worker(first, 0, options)
    for seed, part in enumerate(parts[:2]):
        first.take(*sampled(worker, part, seed))
    save_once(Storage(savefile), first.freeze())
    keeper = Keeper()
    second = CovarianceStore(options, writers=[keeper], saver=Saver(Storage(savefile), 3600.0))
    assert second.restore()
    second.take(*sampled(worker, parts[2], 2, closes=True))
    written(second, 1)
    assert keeper.windows[-1].rows[0].embedding == pytest.approx(expected_points(parts), abs=1e-8)
    first.finish("test")
    second.finish("test")


def test_a_delta_with_a_sample_goes_through_files(tmp_path: Path) -> None:
    store = CovarianceStore(embed_config(world_size=1), writers=[])
    delta, buffer = sampled(Worker(store, 0, embed_config(world_size=1)), rows(20, 5), 0)
    content = b"".join(bytes(memoryview(p)) for p in encode_parcel(delta, buffer, store.config, LAYERS, first=True))
    parcel = decode_parcel(content, "here")
    assert parcel.delta == delta
    assert np.array_equal(parcel.buffer, buffer)
    outbox = Outbox(store.config, LAYERS, str(tmp_path / "spill"))
    park(outbox, delta, buffer, first=True, memory=0, limit=0)
    found = outbox.next()
    assert found is not None
    assert store.take(*found).merged


@pytest.mark.parametrize(
    ("samples", "words"),
    [
        (((1, 0, 8),), "no tuples of a layer"),
        (((1, 0, 8, 3),), "no tuples of a layer"),
        (((1, 1, 8, 3.0),), "no entry, or twice"),
        (((0, 0, 8, 3.0),), "no entry, or twice"),
        (((1, 0, 8, 3.0), (1, 0, 8, 3.0)), "no entry, or twice"),
        (((1, 0, -1, 3.0),), "-1 rows"),
        (((1, 0, 1 << 40, 3.0),), "rows of layer index 1"),
        (((1, 0, 7, 3.0),), "its buffer is"),
        (((1, 0, 8, 0.0),), "from 0 to its bound"),
        (((1, 0, 8, float("nan")),), "from 0 to its bound"),
        (((1, 0, 8, float("inf")),), "from 0 to its bound"),
        (((1, 0, 8, 1e-9),), "from 0 to its bound"),
        ([(1, 0, 8, 3.0)], "no tuples of a layer"),
    ],
)
def test_a_sample_that_cannot_be_is_refused_and_changes_nothing(samples: Any, words: str) -> None:
    store = CovarianceStore(embed_config(world_size=1), writers=[])
    good, buffer = sampled(Worker(store, 0, embed_config(world_size=1)), rows(20, 5), 0)
    with pytest.raises(DeltaRefused, match=words):
        store.take(replace(good, samples=samples).sealed(buffer), buffer)
    for place, value in ((-1, np.nan), (-48, 1e9), (-48, -1.0)):  # a row, and the first key
        bad = buffer.copy()
        bad[place] = value
        with pytest.raises(DeltaRefused, match="sample"):
            store.take(good.sealed(bad), bad)
    assert store.take(good, buffer).merged


# --- on disk -------------------------------------------------------------------------------------------------


def test_a_revision_replaces_the_points_and_one_without_any_takes_them_away(tmp_path: Path) -> None:
    writer = ParquetWriter(Storage(tmp_path))
    many, few = np.arange(6.0).reshape(3, 2), np.arange(2.0).reshape(1, 2)
    writer.write(window([layer_row("a", embedding=many), layer_row("b")], final=False))
    assert points(tmp_path, layer="a").tolist() == many.tolist()
    writer.write(window([layer_row("a", embedding=few), layer_row("b", embedding=many)], revision=1))
    assert points(tmp_path, layer="a").tolist() == few.tolist()
    assert points(tmp_path, layer="b").tolist() == many.tolist()
    writer.write(window([layer_row("a", embedding=many)], attempt=1, window=4))
    table = read_embeddings(tmp_path, ["attempt", "layer", "point"], attempts="all")
    assert table.group_by("attempt").aggregate([("point", "count")]).to_pylist() == [
        {"attempt": 0, "point_count": 4},
        {"attempt": 1, "point_count": 3},
    ]
    writer.write(window([layer_row("a")], attempt=1, window=4, revision=1))
    assert len(points(tmp_path)) == 0
    assert [len(list((tmp_path / name).iterdir())) for name in ("spectra", "embeddings")] == [2, 1]
