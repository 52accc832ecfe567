"""From accumulators to a delta: all layers of a window, or of a part of it, in one float64 buffer."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from delve_ray.moments import F64
from delve_ray.recorder import Harvest
from delve_ray.reservoir import Reservoir, pack
from delve_ray.schema import PHASES
from delve_ray.selection import TrackedLayer
from delve_ray.store.protocol import Delta, Source
from delve_ray.workspace import Workspace
from delve_ray.writers.base import Scalar

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Pending:
    """What one delta will carry: harvested, not yet packed."""

    window: int
    step: int
    closes: bool
    labelled: bool
    harvest: Harvest
    scalars: list[Scalar]
    complete: bool = True
    _packed_bytes: int | None = None

    def hand_over(self) -> None:
        """From now on the accumulators are the packer's, who changes them: what they hold is as it is now."""
        self._packed_bytes = self.nbytes

    @property
    def nbytes(self) -> int:
        """Bytes of the accumulators and their samples; of those that the packer has, as many as it was given."""
        if self._packed_bytes is not None:
            return self._packed_bytes
        samples = [accumulator.reservoir for accumulator in self.harvest.values()]
        held = sum(accumulator.held_bytes for accumulator in self.harvest.values())
        return held + sum(sample.held_bytes for sample in samples if sample is not None)


class Packer:
    """Packs what was harvested from these layers, and says which of them have non-finite rows."""

    def __init__(self, layers: Sequence[TrackedLayer]) -> None:
        self._layers = layers
        self._warned: set[tuple[int, int]] = set()
        self._workspace = Workspace(torch.device("cpu"))  # the recorder's is the training thread's

    def __call__(self, item: Pending, source: Source, attempt: int, seq: int) -> tuple[Delta, F64]:
        """Wait for the device and pack all layers into one buffer; each accumulator is freed once it is packed."""
        keys = sorted(item.harvest)
        buffer = np.empty(sum(item.harvest[key].moments_size for key in keys))
        entries, weights = [], []
        reservoirs: list[tuple[int, int, Reservoir]] = []
        widths: dict[int, int] = {}
        start = 0
        for index, phase in keys:
            accumulator = item.harvest.pop((index, phase))
            features = accumulator.features
            size = accumulator.moments_size
            n, nonfinite, weight = accumulator.drain_into(buffer[start : start + size], self._workspace)
            reservoir = None if accumulator.reservoir is None else accumulator.reservoir.drain()
            if n or nonfinite:
                start += size
                entries.append((index, phase, n, nonfinite))
                weights.append(weight)
                if self._layers[index].features is None:
                    widths[index] = features
                if reservoir is not None:
                    reservoirs.append((index, phase, reservoir))
        self._warn_nonfinite(entries, item)
        delta = Delta(
            source,
            attempt,
            seq,
            item.window,
            item.step,
            item.closes,
            item.labelled,
            tuple(entries),
            tuple(widths.items()),
            tuple(item.scalars),
            item.complete,
            () if weights == [n for _, _, n, _ in entries] else tuple(weights),
            tuple((index, phase, kept.keys.size, kept.bound) for index, phase, kept in reservoirs),
        )
        if reservoirs:
            return delta, np.concatenate([buffer[:start], *(pack(kept) for _, _, kept in reservoirs)])
        # What is kept is what was filled, not what might have been.
        return delta, buffer[:start] if 2 * start > buffer.size else buffer[:start].copy()

    def _warn_nonfinite(self, entries: Sequence[tuple[int, int, int, int]], item: Pending) -> None:
        """Say which layers have non-finite rows, once per layer, phase and window however often it is flushed."""
        for index, phase, n, nonfinite in entries:
            if nonfinite and (index, phase) not in self._warned:
                self._warned.add((index, phase))
                log.warning(
                    "layer %s, %s, step %d: %d of %d rows are not finite and were left out",
                    self._layers[index].name,
                    PHASES[phase],
                    item.step,
                    nonfinite,
                    nonfinite + n,
                )
        if item.closes:
            self._warned.clear()
