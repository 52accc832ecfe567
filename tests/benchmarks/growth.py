"""How the costs grow: the recorder's and the store's time with what there is of layers, width, rows, flushes, senders.

An exponent is the slope of a straight line through the logarithms of times and sizes: 0 for a constant cost, 1 for one
in proportion, 2 for a square.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from tests.benchmarks.feeder import Feeder, Load
from tests.benchmarks.recording import Replay
from tests.benchmarks.report import Section, markdown_cells, milliseconds
from tests.benchmarks.timing import Samples, alternate, calls_lasting, median
from tests.benchmarks.trackers import attach_ours

TEXT = """\
Medians of sizes that take turns. An exponent is the slope of a line through the logarithms, 1 for a cost in proportion;
small sizes are ruled by what every call costs, so that of the last two tells more of what comes beyond.
The recorder: all hooks of one forward, of layers that compute nothing. The store: CPU time in which it takes a window's
deltas, checks them and merges them, without the publishing thread; senders are simulated, and all of them send each
flush. Neither is meant to know how many batches or rows came before.
"""
_SAMPLE_S = 0.005


@dataclass(frozen=True, slots=True)
class Series:
    """One line of the table: what grows, the rest of the setting, and seconds by size."""

    what: str
    grows: str
    fixed: str
    sizes: tuple[int, ...]
    measure: Callable[[Sequence[int], int], dict[int, float]]

    def cells(self, samples: int) -> tuple[str, ...]:
        """Measured."""
        seconds = self.measure(self.sizes, samples)
        return (
            self.what,
            self.grows,
            self.fixed,
            ", ".join(map(str, self.sizes)),
            ", ".join(milliseconds(seconds[size]).removesuffix(" ms") for size in self.sizes),
            *(f"{exponent(sizes, [seconds[size] for size in sizes]):.2f}" for sizes in (self.sizes, self.sizes[-2:])),
        )


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """Slope of the least-squares line through (log size, log seconds).

    >>> round(exponent([1, 2, 4], [3.0, 12.0, 48.0]), 6)
    2.0
    """
    return float(np.polyfit(np.log(sizes), np.log(np.maximum(seconds, 1e-9)), 1)[0])


# --- the recorder --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Shape:
    """Layers of one width that get so many rows."""

    layers: int = 4
    width: int = 256
    rows: int = 512


def recorder_seconds(grows: str, sizes: Sequence[int], samples: int) -> dict[int, float]:
    """Seconds of one forward's hooks, by size of one field of `Shape`."""
    variants: dict[str, Callable[[int], object]] = {}
    counts: dict[str, int] = {}
    trackers = []
    with tempfile.TemporaryDirectory() as folder:
        for size in sizes:
            shape = replace(Shape(), **{grows: size})
            model = nn.Sequential(*(Replay(1, shape.width) for _ in range(shape.layers)))
            output = torch.randn(shape.rows, shape.width, generator=torch.Generator().manual_seed(0))
            trackers.append(attach_ours(model, Path(folder) / str(size), ("lsat",), nosave=True))
            forward = partial(model, output)
            counts[str(size)] = count = calls_lasting(_SAMPLE_S, forward)
            variants[str(size)] = partial(_repeat, forward, count)
        found = alternate(variants, calls=samples, block=1, warmup=1)
        for tracker in trackers:
            tracker.close()
    return {size: median(found[str(size)] / counts[str(size)]).value for size in sizes}


def _repeat(call: Callable[[], object], count: int, _: int) -> None:
    for _ in range(count):
        call()


# --- the store -----------------------------------------------------------------------------------------


def store_seconds(grows: str, sizes: Sequence[int], samples: int) -> dict[int, float]:
    """CPU seconds of the store per window, by size of one field of `Load`."""
    feeders = {size: Feeder(replace(Load(), **{grows: size})) for size in sizes}
    buffers = {size: feeder.buffer() for size, feeder in feeders.items()}
    seconds: dict[int, list[float]] = {size: [] for size in sizes}
    for number in range(1 + samples):
        for size, feeder in feeders.items():
            spent = feeder.send(buffers[size])
            if number:
                seconds[size].append(spent)
    return {size: median(_samples(values)).value for size, values in seconds.items()}


def _samples(values: Sequence[float]) -> Samples:
    return np.array(values, dtype=np.float64)


# --- the table -----------------------------------------------------------------------------------------


def all_series() -> list[Series]:
    """Everything that grows."""
    recorder = [
        ("layers", "512 rows of width 256", (1, 4, 16, 64)),
        ("width", "4 layers, 512 rows", (32, 128, 512, 2048)),
        ("rows", "4 layers of width 256", (128, 512, 2048, 8192)),
    ]
    store = [
        ("layers", "width 256, a sender, a flush", (1, 4, 16, 64)),
        ("width", "4 layers, a sender, a flush", (32, 128, 512, 2048)),
        ("flushes", "4 layers of width 256, a sender", (1, 4, 16, 64)),
        ("senders", "4 layers of width 256, a flush", (1, 4, 16, 64, 256)),
    ]
    return [
        *(Series("recorder, a forward", g, f, s, partial(recorder_seconds, g)) for g, f, s in recorder),
        *(Series("store, a window", g, f, s, partial(store_seconds, g)) for g, f, s in store),
    ]


def growth_section(samples: int) -> Section:
    """The table of all series."""
    headings = ("what", "grows with", "at", "sizes", "ms", "exponent", "of the last two")
    return Section("How the costs grow", TEXT, markdown_cells(headings, (s.cells(samples) for s in all_series())))


if __name__ == "__main__":
    print(growth_section(5))
