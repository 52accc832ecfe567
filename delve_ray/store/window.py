"""An open window in the store: what has arrived for it, and who has closed it."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import numpy as np

from delve_ray.errors import DeltaRefused
from delve_ray.moments import F64, PackedTotal, packed_diagonal
from delve_ray.schema import PHASES
from delve_ray.store.protocol import Delta, LayerInfo, moments_size


class Entry:
    """The merged moments of one layer in one phase of a window."""

    __slots__ = ("lock", "nonfinite", "sealed", "total")

    def __init__(self, features: int) -> None:
        self.total = PackedTotal(features)
        self.nonfinite = 0
        self.sealed = False
        self.lock = threading.Lock()

    def add(self, n: int, nonfinite: int, moments: F64) -> None:
        """Merge a delta's moments: mean and packed scatter, one after the other."""
        features = self.total.features
        with self.lock:
            if self.sealed:
                raise DeltaRefused("the window that this delta belongs to is published already")
            self.total.add(n, moments[:features], moments[features:])
            self.nonfinite += nonfinite

    def snapshot(self, *, final: bool) -> tuple[int, int, F64, F64]:
        """(observations, non-finite rows, mean, packed scatter); a copy, or, when final, the thing itself, sealed."""
        with self.lock:
            self.sealed = final
            total, nonfinite = (self.total if final else self.total.copy()), self.nonfinite
        n, mean, packed = total.result()
        return n, nonfinite, mean, packed


@dataclass(frozen=True, slots=True)
class Job:
    """One publication of a window, as the publisher gets it; with `final` nothing more arrives in its entries."""

    attempt: int
    ordinal: int
    step: int
    revision: int
    final: bool
    workers: int
    entries: list[tuple[tuple[int, int], Entry]]


@dataclass(slots=True)
class Window:
    """The window with ordinal `ordinal` of an attempt; `step` is its label, a guess until a rank closes it."""

    ordinal: int
    step: int
    labelled: bool = False
    entries: dict[tuple[int, int], Entry] = field(default_factory=dict)
    closed: set[int] = field(default_factory=set)
    revision: int = 0
    changed: bool = False

    def entry(self, layer: int, phase: int, features: int) -> Entry:
        """The entry of a layer and phase, made when it is first needed."""
        found = self.entries.get((layer, phase))
        if found is None:
            found = self.entries[layer, phase] = Entry(features)
        return found

    def job(self, attempt: int, *, final: bool) -> Job:
        """The next publication of this window; entries in the order of layers, then phases."""
        job = Job(
            attempt, self.ordinal, self.step, self.revision, final, len(self.closed), sorted(self.entries.items())
        )
        self.revision += 1
        self.changed = False
        return job


def _refusal(delta: Delta, what: str) -> DeltaRefused:
    source = delta.source
    return DeltaRefused(
        f"delta {delta.seq} of rank {source.rank} (run {source.run!r}, attempt {delta.attempt}, pid {source.pid} "
        f"on {source.host}) is refused: {what}"
    )


def _check_widths(delta: Delta, layers: list[LayerInfo]) -> None:
    """Turn away widths that are none or contradict the registration. Raises DeltaRefused."""
    for layer, features in delta.widths:
        if not 0 <= layer < len(layers):
            raise _refusal(delta, f"layer index {layer}, but the run has {len(layers)} layers")
        known = layers[layer].features or features
        if features < 1 or features != known:
            raise _refusal(
                delta,
                f"layer {layers[layer].name} has {features} features, and was registered with {layers[layer].features}",
            )


def check_delta(delta: Delta, buffer: F64, layers: list[LayerInfo]) -> list[int]:
    """Turn away whatever cannot be moments of this run's layers, with an error that names it.

    Checks the entries (layer, phase, counts, repetitions), the buffer (dtype, shape, finite) and what makes
    a scatter one (no negative diagonal; nothing at all without observations). Returns the width of each entry.
    Raises DeltaRefused.
    """

    def refuse(what: str) -> DeltaRefused:
        return _refusal(delta, what)

    _check_widths(delta, layers)
    widths = dict(delta.widths)
    seen: set[tuple[int, int]] = set()
    sizes = []
    for layer, phase, n, nonfinite in delta.entries:
        if not 0 <= layer < len(layers):
            raise refuse(f"layer index {layer}, but the run has {len(layers)} layers")
        if not 0 <= phase < len(PHASES):
            raise refuse(f"phase index {phase} of layer {layers[layer].name}, but the phases are {PHASES}")
        if n < 0 or nonfinite < 0 or n >= 1 << 62:
            raise refuse(f"layer {layers[layer].name} counts {n} observations and {nonfinite} non-finite rows")
        if (layer, phase) in seen:
            raise refuse(f"layer {layers[layer].name} stands twice in phase {PHASES[phase]}")
        seen.add((layer, phase))
        width = layers[layer].features or widths.get(layer)
        if width is None:
            raise refuse(f"it does not say how many features layer {layers[layer].name} has")
        sizes.append(width)
    expected = sum(map(moments_size, sizes))
    if buffer.dtype != np.float64 or buffer.shape != (expected,):
        raise refuse(
            f"its buffer is {buffer.dtype} of shape {buffer.shape}, its entries need float64 of shape ({expected},)"
        )
    start = 0
    for (layer, phase, n, _), features in zip(delta.entries, sizes, strict=True):
        moments = buffer[start : start + moments_size(features)]
        start += moments.shape[0]
        where = f"layer {layers[layer].name}, phase {PHASES[phase]}"
        if not np.isfinite(moments).all():
            raise refuse(f"{where} has non-finite moments")
        if n == 0 and moments.any():
            raise refuse(f"{where} has moments without observations")
        if (packed_diagonal(moments[features:], features) < 0).any():
            raise refuse(f"{where} has a scatter with a negative diagonal")
    return sizes
