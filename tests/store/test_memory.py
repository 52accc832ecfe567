"""What a store holds, array by array, against `store_bytes`."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from delve_ray.errors import OptionError
from delve_ray.moments import PackedTotal, triangle_size
from delve_ray.reservoir import Reservoir
from delve_ray.storage import Storage
from delve_ray.store.core import CovarianceStore
from delve_ray.store.memory import ENTRY_BYTES, pending_means, store_bytes
from delve_ray.store.protocol import Delta, LayerInfo, moments_size
from delve_ray.store.saving import Saver
from delve_ray.store.window import Window
from tests.stores import config, published, source

WIDTHS = (3, 40, 17)


class Fed:
    """A store whose ranks all send the same moments."""

    def __init__(self, widths: tuple[int, ...], ranks: int, phases: int) -> None:
        self.entries = tuple((layer, phase, 5, 0) for layer in range(len(widths)) for phase in range(phases))
        self.buffer = np.ones(phases * sum(map(moments_size, widths)))
        options = config(world_size=ranks, stats=("saturation",))
        self.store = CovarianceStore(options, writers=[])
        self.sources = [source(rank) for rank in range(ranks)]
        self.sent = [0] * ranks
        for item in self.sources:
            layers = [LayerInfo(f"layer{index}", "Linear", width) for index, width in enumerate(widths)]
            self.store.register(item, options, layers)

    def send(self, rank: int, window: int, *, closes: bool) -> None:
        delta = Delta(self.sources[rank], 0, self.sent[rank], window, window, closes, closes, self.entries)
        self.sent[rank] += 1
        assert self.store.take(delta.sealed(self.buffer), self.buffer).merged

    def window_bytes(self) -> int:
        """Of all arrays of all windows."""
        return sum(map(held_bytes, self.store.attempts[-1].windows.values()))

    def latest_bytes(self, phases: int) -> int:
        """Of all arrays of the last publication."""
        found = [
            self.store.running().latest(layer, phase)
            for layer in range(len(self.store.layers))
            for phase in range(phases)
        ]
        return sum(latest.mean.nbytes + latest.packed.nbytes for latest in found if latest is not None)


def held_bytes(window: Window) -> int:
    totals: list[PackedTotal] = []
    for entry in window.entries.values():
        totals += [total for total, _ in entry._frozen]
        totals += [] if entry._active is None else [entry._active[0]]
    return sum(total.packed.nbytes + sum(mean.nbytes for mean in total._means) for total in totals)


@pytest.mark.parametrize("phases", [1, 2])
@pytest.mark.parametrize("ranks", [2, 33, 70])
def test_windows_and_the_last_publication_take_what_the_formula_says(ranks: int, phases: int) -> None:
    fed = Fed(WIDTHS, ranks, phases)
    objects = ENTRY_BYTES * phases * len(WIDTHS)
    for windows in (1, 2, 3):  # rank 0 keeps all of them open
        for rank in range(1, ranks):
            fed.send(rank, windows - 1, closes=True)
        predicted = store_bytes(WIDTHS, phases=phases, windows=windows, deltas=ranks - 1, published=False)
        assert fed.window_bytes() == predicted.windows - windows * objects
        assert predicted.latest == 0
        assert fed.window_bytes() <= store_bytes(WIDTHS, phases=phases, windows=windows).windows
    for window in range(3):
        fed.send(0, window, closes=True)
    published(fed.store, 3)
    fed.send(0, 3, closes=False)
    assert fed.latest_bytes(phases) == store_bytes(WIDTHS, phases=phases).latest


def test_a_total_keeps_as_many_means_as_the_formula_says() -> None:
    total = PackedTotal(4)
    for deltas in range(100):
        assert len(total._means) == pending_means(deltas)
        total.add(3, np.ones(4), np.ones(triangle_size(4)))


def test_reservoirs_are_counted() -> None:
    with_rows = store_bytes([8], deltas=1, embed_rows=100)
    rows = Reservoir(np.zeros(100), np.zeros((100, 8)), 1.0)
    assert with_rows.windows - store_bytes([8], deltas=1).windows == rows.nbytes
    assert with_rows.aside == store_bytes([8], deltas=1).aside, "a sample is not set aside"


def test_the_peak_has_room_for_decompositions_side_by_side() -> None:
    one, four = (store_bytes([256, 1024, 1024], cores=cores).decomposing for cores in (1, 4))
    assert one == 24 * 1024**2
    assert four == 24 * (2 * 1024**2 + 256**2)
    assert store_bytes([16384], cores=64).decomposing == 24 * 16384**2, "2 GiB hold none: one at a time"


@pytest.mark.parametrize("name", ["phases", "windows", "sources", "cores"])
def test_numbers_below_their_range_are_refused(name: str) -> None:
    with pytest.raises(OptionError, match=name):
        store_bytes([4], **{name: 0})  # type: ignore[arg-type]


def test_a_snapshot_frees_what_it_merged_layer_by_layer(tmp_path: Path) -> None:
    """Two totals of each layer become one, of one layer after the other."""
    widths = (256,) * 16
    fed = Fed(widths, 1, 1)
    saver = Saver(Storage(tmp_path), 1e9)
    saver._store = fed.store
    packed = 8 * sum(map(triangle_size, widths))
    tracemalloc.start()
    try:
        fed.send(0, 0, closes=False)
        saver._save()
        fed.send(0, 0, closes=False)
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        saver._save()
        after, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert before - after == pytest.approx(packed, rel=0.1), "both were merged"
    assert peak - before < 0.5 * packed
