"""Six layers for stores with shards: rows of them, a worker that goes on until all is there, what files must have."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from delve_ray import read_covariances, read_spectra
from delve_ray.errors import StoreError, UnknownSource
from delve_ray.moments import F64, unpack_triangle
from delve_ray.storage import Storage
from delve_ray.store import parts
from delve_ray.store.protocol import Held, LayerInfo, StoreConfig
from delve_ray.store.saving import Saver
from delve_ray.store.sharded import LocalShards
from tests.chaos.sharded import lives_of
from tests.helpers import covariance_error, two_pass_covariance
from tests.stores import Worker, config, until

WIDTHS = (9, 3, 12, 5, None, 7)
LAYERS = [LayerInfo(f"layer{index}", "Linear", width) for index, width in enumerate(WIDTHS)]
FEATURES = (9, 3, 12, 5, 4, 7)  # what the forward of layer4 tells
SAVE_EVERY_S = 0.05


@pytest.fixture(autouse=True)
def layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.stores.LAYERS", LAYERS)
    monkeypatch.setattr(parts, "TOGETHER_S", 0.2)


def run_config(savefile: str | Path, num_shards: int, **changes: Any) -> StoreConfig:
    """A run with files and snapshots."""
    values: dict[str, Any] = {"save_to": ("parquet",), "stats": ("saturation", "trace", "cov", "embed")}
    values |= {"num_shards": num_shards, "snapshot_every": SAVE_EVERY_S}
    return config(savefile=str(savefile), **(values | changes))


def local_shards(savefile: str | Path, num_shards: int, **changes: Any) -> LocalShards:
    """A front and shards in this process, which are saved and never killed."""
    own = run_config(savefile, num_shards, **changes)
    return LocalShards(own, lambda part: Saver(Storage(part.savefile), SAVE_EVERY_S))


def mortal(savefile: str | Path, num_shards: int, seed: int = 0, **changes: Any) -> Any:
    """Such a store, or one without shards, of which each process can be killed and started anew from its snapshots."""
    return lives_of(run_config(savefile, num_shards, **changes), random.Random(seed), num_shards, every=SAVE_EVERY_S)


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


def check(savefile: str, sent: dict[int, list[dict[tuple[int, int], F64]]], workers: int | dict[int, int] = 2) -> None:
    """The files have what was sent, by step, of every layer and phase; `workers` may differ by step."""
    ranks = workers if isinstance(workers, dict) else dict.fromkeys(sent, workers)
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
        assert (row["samples"], row["workers"], row["final"]) == (len(every), ranks[row["step"]], True), where
        matrix = unpack_triangle(np.array(covariances[where]["covariance"]), every.shape[1])
        assert covariance_error(matrix, two_pass_covariance(every)) < 1e-12
        assert covariances[where]["revision"] == row["revision"]
    for step, phase in {(row["step"], row["phase"]) for row in spectra}:
        in_order = [row["layer"] for row in spectra if (row["step"], row["phase"]) == (step, phase)]
        assert in_order == sorted(in_order)


class Sender:
    """A worker that keeps what no snapshot has, and offers it again, as its outbox does."""

    def __init__(self, store: Any, rank: int, options: StoreConfig) -> None:
        self.store, self.config = store, options
        self.worker = Worker(store, rank, options)
        self.kept: list[Any] = []

    def add(self, rows: Any, step: int, closes: bool) -> None:
        self.kept.append(with_widths(self.worker, rows, step, closes))

    def offer(self) -> Any:
        """Offer all that is kept once, and forget what is durable."""
        ack = None
        for delta, buffer in list(self.kept):
            ack = self.store.take(delta, buffer)
        if ack is not None:
            self.kept = [item for item in self.kept if item[0].seq >= ack.durable]
        return ack

    def until_there(self) -> None:
        def there() -> bool:
            try:
                ack = self.offer() or self.store.heartbeat(self.worker.source)
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
        self.store.register(self.worker.source, self.config, LAYERS, held)

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
