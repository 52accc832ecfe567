"""The layers of known networks, and deltas of them for as many sources as are asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import numpy as np

from delve_ray.moments import F64
from delve_ray.sketch import WHOLE
from delve_ray.store.assignment import assign
from delve_ray.store.protocol import Delta, LayerInfo, Source, checksum, moments_size
from delve_ray.store.scanning import word_sum
from tests.benchmarks.intake import buffer_of, entries_of, layers_of

MAX_FEATURES = 8192
"""What a tracker records unless it is told otherwise; wider layers are left out."""
RUN = "scale"


@dataclass(frozen=True, slots=True)
class Shape:
    """Features of a network's layers, as a tracker finds them by itself: convolutions, Linear and Embedding layers."""

    name: str
    what: str
    all_widths: tuple[int, ...]

    @property
    def widths(self) -> list[int]:
        """Those that are recorded."""
        return [width for width in self.all_widths if width <= MAX_FEATURES]

    @property
    def left_out(self) -> Counter[int]:
        """How many layers of which width are too wide."""
        return Counter(width for width in self.all_widths if width > MAX_FEATURES)

    def scaled(self, scale: float) -> list[int]:
        """The recorded widths times a factor, at least 1.

        >>> SHAPES["resnet50"].scaled(0.25)[:3]
        [16, 16, 16]
        """
        return [max(1, round(scale * width)) for width in self.widths]


def _repeat(*counts: tuple[int, int]) -> tuple[int, ...]:
    return tuple(width for width, count in counts for _ in range(count))


SHAPES = {
    shape.name: shape
    for shape in (
        Shape(
            "resnet50",
            "ResNet-50: its 53 convolutions and the classifier",
            _repeat((64, 7), (128, 8), (256, 16), (512, 11), (1024, 7), (2048, 4), (1000, 1)),
        ),
        Shape(
            "vit-l",
            "ViT-L/16: the patches' convolution, in each of 24 blocks query, key, value, attention output and MLP "
            "output (1024) and the MLP's hidden layer (4096), and the classifier",
            _repeat((1024, 1 + 5 * 24), (4096, 24), (1000, 1)),
        ),
        Shape(
            "7b",
            "a transformer of 7 billion parameters (Llama 2): the embedding, in each of 32 blocks query, key, value, "
            "attention output and MLP output (4096); left out are the MLP's two hidden layers (11008) and the head "
            "(32000)",
            _repeat((4096, 1 + 5 * 32), (11008, 2 * 32), (32000, 1)),
        ),
    )
}


def delta_bytes(widths: Sequence[int]) -> int:
    """Bytes of the buffer of a delta of one phase of all layers.

    >>> delta_bytes([3, 1])
    88
    """
    return 8 * sum(map(moments_size, widths))


@dataclass(frozen=True, slots=True)
class Piece:
    """What one store gets of a delta; all sources bring the same moments under headers of their own."""

    entries: tuple[tuple[int, int, int, int], ...]
    buffer: F64
    words: int

    def header(self, source: Source, window: int) -> Delta:
        """The header of a source's only delta of a window, sealed without reading the buffer again."""
        delta = Delta(source, 0, window, window, window, True, True, self.entries)
        return replace(delta, checksum=checksum(delta, self.words))


class Deltas:
    """The pieces of a delta: one for each shard, and one without moments for the front, or one for a store alone."""

    def __init__(self, widths: Sequence[int], num_shards: int) -> None:
        self.widths = list(widths)
        self.layers: list[LayerInfo] = layers_of(widths)
        buffer, entries = buffer_of(widths, 0), entries_of(widths)
        self.nbytes = buffer.nbytes
        shards = assign(self.layers, num_shards, WHOLE)
        places = [slice(*ends) for ends in pairwise(accumulate(map(moments_size, widths), initial=0))]
        self.pieces: list[Piece] = []
        for shard in range(num_shards):
            own = [index for index, of in enumerate(shards) if of == shard]
            part = buffer if num_shards == 1 else np.concatenate([np.empty(0), *(buffer[places[i]] for i in own)])
            self.pieces.append(Piece(tuple(entries[index] for index in own), part, word_sum(part)))
        self.front = None if num_shards == 1 else Piece((), np.empty(0), 0)


def source_of(rank: int) -> Source:
    """A worker of the run, on a machine that the store does not see."""
    return Source(RUN, "token", rank, f"source-{rank}", "elsewhere", 1 + rank)


@dataclass(frozen=True, slots=True)
class Acks:
    """When each delta was offered and acknowledged: wall clock, shape (sources, windows)."""

    offered: F64
    acked: F64

    @property
    def seconds(self) -> float:
        """From the first offer to the last ack."""
        return float(self.acked.max() - self.offered.min())

    @property
    def lag(self) -> F64:
        """Seconds from offering to ack, of each delta."""
        return (self.acked - self.offered).reshape(-1)

    @property
    def behind(self) -> int:
        """The most windows by which the slowest source was ever behind the fastest.

        >>> Acks(np.zeros((2, 3)), np.array([[1.0, 2.0, 3.0], [2.5, 3.5, 4.5]])).behind
        2
        """
        complete = np.maximum.accumulate(self.acked.max(axis=0))  # the slowest source has so many windows by then
        first = self.acked.min(axis=0)
        behind = [window + 1 - int((complete <= at).sum()) for window, at in enumerate(first)]
        return max(behind)
