"""A reservoir that is filled where the rows are, inside the forward hook, and never waits for the device.

Which rows to take is decided on the host by random numbers alone. Once the reservoir is full, a batch gives it few rows
or none: how many of n keys fall below the bound is binomial, so neither n keys nor any work on the device is needed.
What does not count, because of a mask or because it is not finite, is only known later; it is left out when the
reservoir is drained.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from delve_ray.accumulator import LARGEST
from delve_ray.reservoir import UNBOUNDED, Reservoir, smallest
from delve_ray.schema import F64

I64 = npt.NDArray[np.int64]


class DeviceReservoir:
    """At most `size` rows of one layer and phase; `random` draws the keys. Not thread-safe.

    Memory: three times `size` rows, in float32 (float64 where the layer's output is).
    """

    def __init__(self, size: int, random: np.random.Generator) -> None:
        self.size = size
        self._random = random
        self._bound = UNBOUNDED
        self._keys: F64 = np.empty(0)
        self._rows: list[Tensor] = []
        self._counts: list[Tensor] = []  # whether a row counts, boolean
        self._event: torch.cuda.Event | None = None

    def offer(self, rows: Tensor, keep: Tensor | None = None, weight: float = 1.0) -> None:
        """Take some of the rows, of shape (…, D); `keep` and `weight` as in `Accumulator.add`."""
        chosen, keys = self._draw(rows.numel() // rows.shape[-1], weight)
        if not chosen.size:
            return
        index = _on_device(np.stack(np.unravel_index(chosen, rows.shape[:-1])), rows.device).unbind()
        taken = rows.detach()[index]
        self._rows.append(taken.to(torch.float64 if taken.dtype == torch.float64 else torch.float32))
        self._counts.append(torch.ones_like(index[0], dtype=torch.bool) if keep is None else keep[index])
        self._keys = np.concatenate([self._keys, keys])
        if self._keys.size > 2 * self.size:
            self._shrink()
        if rows.is_cuda:
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(rows.device))

    def _draw(self, count: int, weight: float) -> tuple[I64, F64]:
        """Which of `count` rows have a key below the bound, and these keys."""
        if self._bound < UNBOUNDED:
            share = -np.expm1(-weight * self._bound)
            hits = int(self._random.binomial(count, share))
            keys = -np.log1p(-share * self._random.random(hits)) / weight
            return self._random.choice(count, hits, replace=False, shuffle=False), keys
        keys = self._random.exponential(1.0 / weight, count)
        chosen = np.arange(count)
        if count > self.size:
            chosen = np.argpartition(keys, self.size)
            self._bound = float(keys[chosen[self.size]])
            chosen = chosen[: self.size]
        return chosen, keys[chosen]

    def _shrink(self) -> None:
        """Let go of all but the smallest keys."""
        order = np.argsort(self._keys, kind="stable")
        if order.size > self.size:
            self._bound = min(self._bound, float(self._keys[order[self.size]]))
        order = order[: self.size]
        self._keys = self._keys[order]
        index = _on_device(order, self._rows[0].device)
        self._rows = [torch.cat(self._rows).index_select(0, index)]
        self._counts = [torch.cat(self._counts).index_select(0, index)]

    def drain(self) -> Reservoir | None:
        """What was kept, on the host; waits for the device. None where nothing was offered."""
        if not self._rows:
            return None
        if self._event is not None:
            self._event.synchronize()
        rows = torch.cat([part.double().cpu() for part in self._rows]).numpy()
        counts = torch.cat([part.cpu() for part in self._counts]).numpy() & (np.abs(rows) <= LARGEST).all(axis=1)
        return smallest(self._keys[counts], rows[counts], self._bound, self.size)

    @property
    def held_bytes(self) -> int:
        """Bytes of the rows that are held."""
        return sum(part.nbytes for part in self._rows)


def nbytes(size: int, features: int) -> int:
    """Bytes of a reservoir at most: twice its size, and once more while it shrinks."""
    return 3 * size * 8 * features


def _on_device(index: I64, device: torch.device) -> Tensor:
    found = torch.from_numpy(np.ascontiguousarray(index, dtype=np.int64))
    return found.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else found.to(device)
