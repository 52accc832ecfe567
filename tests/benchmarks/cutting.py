"""What a store with shards costs a sender beyond sending: a delta is checked whole, and cut into pieces.

`python -m tests.benchmarks.cutting` prints the table, with OMP_NUM_THREADS=1. The sender's thread: CPU time of a `take`
whose shards and front do nothing. A bare copy: numpy's, into memory that was just allocated, as the pieces are. Sending
it: the whole `take` by the clock, through Ray.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

from delve_ray.moments import F64
from delve_ray.store import actor
from delve_ray.store.protocol import Ack, Delta, StoreConfig
from delve_ray.store.sharded import ShardedStore
from tests.benchmarks.report import Section, markdown_cells
from tests.benchmarks.scale_local import config_of
from tests.benchmarks.scale_ray import scale_ray
from tests.benchmarks.scale_shapes import RUN, SHAPES, Deltas, source_of

SHARDS = (2, 4)
REPEATS = 12


class Nothing:
    """A shard, or a front, that takes everything and does nothing."""

    def take(self, delta: Delta, buffer: F64) -> Ack:
        """Say that it is merged."""
        return Ack(0, next_seq=delta.seq + 1)

    def heartbeat(self, *_: Any) -> Ack:
        """Say nothing."""
        return Ack(0)


def median_ms(call: Callable[[], object], clock: Callable[[], float]) -> float:
    """Median of the calls after the first."""
    spent = []
    for _ in range(REPEATS + 1):
        began = clock()
        call()
        spent.append(clock() - began)
    return 1e3 * statistics.median(spent[1:])


class _Sender:
    """Offers the same moments as delta after delta of one window."""

    def __init__(self, store: Any, deltas: Deltas) -> None:
        self.store, self.deltas, self.seq = store, deltas, 0

    def __call__(self) -> None:
        piece = self.deltas.pieces[0]
        delta = Delta(source_of(0), 0, self.seq, 0, 0, False, False, piece.entries)
        self.store.take(delta.sealed(piece.buffer), piece.buffer)
        self.seq += 1


def sealing(deltas: Deltas) -> Callable[[], object]:
    """What `_Sender` does beside the take."""
    piece = deltas.pieces[0]
    delta = Delta(source_of(0), 0, 0, 0, 0, False, False, piece.entries)
    return lambda: delta.sealed(piece.buffer)


def through_ray(deltas: Deltas, shards: int) -> float:
    """Milliseconds of a take by actors, on the clock."""
    with tempfile.TemporaryDirectory() as folder:
        config: StoreConfig = config_of(folder, 1, shards)
        store = actor.connect(actor.start(config))
        store.register(source_of(0), config, deltas.layers)
        sender = _Sender(store, deltas)
        spent = median_ms(sender, time.perf_counter)
        store.leave(source_of(0), completed=True, sent=sender.seq, timeout=60.0)
        store.wait_finished(60.0)
        store.end(source_of(0))
    return spent


def cutting_section(shape: str = "resnet50", width_scale: float = 1.0, shards: Sequence[int] = SHARDS) -> Section:
    """The table."""
    deltas = Deltas(SHAPES[shape].scaled(width_scale), 1)
    seal = median_ms(sealing(deltas), time.thread_time)
    copy = median_ms(deltas.pieces[0].buffer.copy, time.thread_time)
    lines = []
    with scale_ray():
        for number in shards:
            store = ShardedStore(Nothing(), [Nothing() for _ in range(number)])  # type: ignore[arg-type,list-item]
            store.know(deltas.layers, StoreConfig(RUN, "/nowhere", 1))
            own = median_ms(_Sender(store, deltas), time.thread_time) - seal
            sent = through_ray(deltas, number) - seal
            lines.append((str(number), f"{own:.1f} ms", f"{copy:.1f} ms", f"{sent:.1f} ms", f"{own / sent:.2f}"))
    return Section(
        f"Cutting, {shape} × {width_scale:g}",
        f"A delta of {1e-6 * deltas.nbytes:.0f} MB; medians of {REPEATS}.",
        markdown_cells(("shards", "the sender's thread", "a bare copy", "sending it", "share"), lines),
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.cutting", description=__doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="resnet50")
    parser.add_argument("--width-scale", type=float, default=1.0)
    options = parser.parse_args()
    print(cutting_section(options.shape, options.width_scale))
