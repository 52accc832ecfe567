"""What merging before the wire spares the store: calls, bytes and seconds of a window, for the sources of one node.

`python -m tests.benchmarks.combining` prints the table. The same deltas go to one store as they are, and through a
combiner to another, window by window in turns; read the ratios. All is in one process: what the network would take is
to be had from the bytes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from delve_ray.moments import F64
from delve_ray.store.combiner import Combiner
from delve_ray.store.core import CovarianceStore
from delve_ray.store.protocol import Ack, Bundle, Delta
from tests.benchmarks.intake import SIZES, buffer_of, delta_of, entries_of, layers_of, quiet_config, source_of

SOURCES = 8
"""Workers of one node, one for each GPU."""
T = TypeVar("T")


@dataclass(slots=True)
class Cost:
    """What windows cost, one value for each.

    Calls into the store and their bytes; CPU seconds in the store; seconds of its merges alone, by the clock (most of
    the others are the door's scan); and seconds until all sources have their answers.
    """

    calls: list[float] = field(default_factory=list)
    nbytes: list[float] = field(default_factory=list)
    store_s: list[float] = field(default_factory=list)
    merge_s: list[float] = field(default_factory=list)
    answered_s: list[float] = field(default_factory=list)


class TimedStore(CovarianceStore):
    """A store that notes how long it was busy with what came in."""

    def __init__(self, widths: Sequence[int], sources: int) -> None:
        super().__init__(quiet_config(sources, stats=("saturation",)), writers=[])
        for rank in range(sources):
            self.register(source_of(rank), self.config, layers_of(widths))
        self.busy, self.calls = 0.0, 0

    def take(self, delta: Delta, buffer: F64) -> Ack:
        """See `CovarianceStore.take`."""
        return self._timed(super().take, delta, buffer)

    def take_bundle(self, bundle: Bundle, buffer: F64) -> tuple[Ack | None, ...]:
        """See `CovarianceStore.take_bundle`."""
        return self._timed(super().take_bundle, bundle, buffer)

    def _timed(self, call: Callable[..., T], *args: object) -> T:
        start = time.thread_time()  # what else runs on this machine does not count
        answer = call(*args)
        self.busy += time.thread_time() - start
        self.calls += 1
        return answer


def deltas_of(sources: int, window: int, entries: tuple[tuple[int, int, int, int], ...], buffer: F64) -> list[Delta]:
    """The one delta that each source has for a window."""
    return [
        delta_of(source_of(rank), window, entries, closes=True, window=window).sealed(buffer) for rank in range(sources)
    ]


def measure_combining(widths: Sequence[int], windows: int, sources: int = SOURCES) -> dict[str, Cost]:
    """The costs of windows after the first, "alone" and "combined", in turns."""
    stores = {name: TimedStore(widths, sources) for name in ("alone", "combined")}
    costs = {name: Cost() for name in stores}
    combiner = Combiner(stores["combined"], layers_of(widths), 0)
    buffer, entries = buffer_of(widths, 0), entries_of(widths)
    with ThreadPoolExecutor(sources) as pool:
        for window in range(windows + 1):
            deltas = deltas_of(sources, window, entries, buffer)
            for name, store in stores.items():
                store.timings.drain()
                before = store.busy, store.calls, store.counts["bytes"]
                start = time.perf_counter()
                if name == "alone":
                    for delta in deltas:
                        store.take(delta, buffer)
                else:
                    list(pool.map(lambda delta: combiner.take(delta, buffer), deltas))
                answered = time.perf_counter() - start
                # The publisher decomposes meanwhile; it is waited for, so that the other way does not pay for it.
                merge = sum(seconds for what, _, seconds in store.timings.drain() if what == "merge")
                while store.progress().published <= window:
                    time.sleep(1e-3)
                if window:
                    cost = costs[name]
                    cost.calls.append(store.calls - before[1])
                    cost.nbytes.append(store.counts["bytes"] - before[2])
                    cost.store_s.append(store.busy - before[0])
                    cost.merge_s.append(merge)
                    cost.answered_s.append(answered)
            combiner.patience = 60.0  # all are known now
    for store in stores.values():
        store.finish("measured")
        store.wait_finished(60)
    return costs


def combining_table(windows: int) -> str:
    """All sizes, as Markdown: medians, and the medians of the ratios of pairs of windows."""
    head = ["delta", "", "calls", "MB in", "in the store, CPU s", "merges, s", "until answered, s"]
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    for size, widths in SIZES.items():
        costs = measure_combining(widths, windows)
        columns = ("calls", "nbytes", "store_s", "merge_s", "answered_s")
        for name, cost in costs.items():
            medians = [statistics.median(getattr(cost, column)) for column in columns]
            cells = [f"{medians[0]:.0f}", f"{1e-6 * medians[1]:.1f}", *(f"{value:.4f}" for value in medians[2:])]
            lines.append(f"| {size} | {name} | {' | '.join(cells)} |")
        ratios = [
            statistics.median(
                ours / theirs
                for ours, theirs in zip(
                    getattr(costs["combined"], column), getattr(costs["alone"], column), strict=True
                )
            )
            for column in columns
        ]
        lines.append(f"| {size} | ratio | {' | '.join(f'{value:.3f}' for value in ratios)} |")
        print("\n".join(lines[-3:]), flush=True)
    return "\n".join(lines)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.combining", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few windows: shows that it runs, its ratios are rough")
    parser.add_argument("--windows", type=int, help="windows of each size (15)")
    options = parser.parse_args()
    print(f"\n{SOURCES} sources on one node, a delta of each per window.\n")
    print("\n" + combining_table(options.windows or (3 if options.quick else 15)))


if __name__ == "__main__":
    main()
