"""Sketched moments of the rows of layers too wide for a scatter, on the CPU or a GPU: `sketch` says of what.

Rows are copied into a stage, be they few or many, and it is reduced when it is full: as a group centred by its own
mean, X, the sketch of whose scatter is Xᵀ(XΩ). Both products are made block by block of features, so that beside the
stage there is little else. Blocks of Ω are dense for that: on a CPU a product with the sparse matrix took 1.5 times as
long (512 rows, d = 65,536, k = 1024: 0.55 s, the dense one 0.35 s), and a GPU has dense products in hardware.

All is launched on the stream of the forward, and nothing waits for the device or depends on values.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from delve_ray.accumulator import Accumulator
from delve_ray.cuda.lane import Lane, follow
from delve_ray.groups import centre_group
from delve_ray.moments import F64
from delve_ray.sketch import omega, sketch_size, split
from delve_ray.staging import cut
from delve_ray.workspace import Workspace, empty, ieee_products, zeros

_BLOCK_VALUES = 1 << 20
"""Values of one block of Ω and of Y."""
_STAGE_VALUES = 1 << 20
"""Values of a stage at least: 4 MB."""
_MOST_GROUPS = 32
"""Group means that wait at most."""


def block_rows(columns: int) -> int:
    """Features that are worked on at a time."""
    return max(1, _BLOCK_VALUES // columns)


def stage_rows(features: int, columns: int) -> int:
    """Rows of a group: a stage takes a quarter of the sketch's bytes, or 4 MB.

    With fewer, Y would be read and written more often.
    """
    return max(columns // 2, _STAGE_VALUES // features, 1)


@lru_cache(maxsize=8)
def _on_device(features: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Columns and values of Ω's entries on a device, (d, ζ) int64 and float64."""
    found = omega(features, columns)
    with torch.inference_mode(False):
        return torch.from_numpy(found.columns.copy()).to(device), torch.from_numpy(found.values.copy()).to(device)


class SketchAccumulator(Accumulator):
    """An accumulator that keeps a sketch of `columns` columns: `drain_into` writes mean, diagonal and Y.

    Memory: `sketch_bytes`.
    """

    _rows: Tensor
    _dropped: Tensor

    def __init__(
        self, features: int, columns: int, workspace: Workspace, precision: torch.dtype = torch.float32
    ) -> None:
        self.columns = columns
        if workspace.lane is None:
            workspace.lane = Lane(workspace.device)
        self._lane: Lane = workspace.lane
        with self._lane.work():
            super().__init__(features, workspace, precision)
            # Copied once, on the side stream, so that this waits for nothing of the training.
            self._omega = _on_device(features, columns, workspace.device)
        self._capacity = stage_rows(features, columns)
        self._stage: Tensor | None = None
        self._keep: Tensor | None = None
        self._staged = 0
        # What rows must have in common to wait together: whether they came as float64, and their weight.
        self._kind: tuple[bool, float] | None = None
        # The stream that anything was last changed on.
        self._changed_on: Any = self._lane.stream

    def _make_sums(self) -> int:
        self._sums = zeros(sketch_size(self.features, self.columns), self.workspace.device)
        self._diagonal, self._sketch = self._sums[: self.features], self._sums[self.features :].view(self.features, -1)
        return waiting_groups(self.columns)

    def add(self, rows: Tensor, keep: Tensor | None = None, weight: float = 1.0) -> None:
        """See `Accumulator.add`."""
        x = self._checked(rows)
        if x.numel() == 0 or self.adding:
            return
        if x.device != self.workspace.device:
            device = self.workspace.device
            x, keep = x.to(device), None if keep is None else keep.to(device)
        if x.dim() == 1:
            x, keep = x.unsqueeze(0), None if keep is None else keep.reshape(1)
        self._enter(self._lane.current())
        kind = (x.dtype == torch.float64, weight)
        if kind != self._kind:
            self._reduce_stage()
            self._kind = kind
        pieces = [(x, keep)]
        while pieces:
            x, keep = pieces.pop()
            room = self._capacity - self._staged
            if x.numel() // self.features <= room:
                self._put(x, keep)
            else:
                pieces += reversed(list(cut(x, keep, room)))
            if self._staged == self._capacity:
                self._reduce_stage()

    def _enter(self, stream: Any) -> None:
        """Work goes onto this stream from now on."""
        follow(stream, [self._changed_on])
        self._changed_on = stream

    def _put(self, x: Tensor, keep: Tensor | None) -> None:
        """Copy rows (…, D) into the stage, where they must fit."""
        assert self._kind is not None
        wanted = torch.float64 if self._kind[0] else self.precision
        if self._stage is None or self._stage.dtype != wanted:
            self._stage = empty((self._capacity, self.features), wanted, self.workspace.device)
        first, last = self._staged, self._staged + x.numel() // self.features
        self._stage[first:last].view(x.shape).copy_(x)
        if keep is not None or self._keep is not None:
            if self._keep is None:
                self._keep = empty(self._capacity, torch.bool, self.workspace.device)
                self._keep[:first].fill_(True)
            if keep is None:
                self._keep[first:last].fill_(True)
            else:
                self._keep[first:last].view(keep.shape).copy_(keep)
        self._staged = last

    def _reduce_stage(self) -> None:
        """Make a group of the rows that are staged."""
        if not self._staged:
            return
        assert self._stage is not None
        assert self._kind is not None
        wide, weight = self._kind
        keep = None if self._keep is None else self._keep[: self._staged]
        rows = self._stage[: self._staged]
        self.adding = True
        self._staged, self._keep = 0, None
        if rows.dtype == self.precision or wide:
            self._add_group(rows, keep, weight, wide=wide)
        else:  # halves, so that it takes no more memory than a stage of float64 rows
            keeps = (None, None) if keep is None else keep.chunk(2)
            for part, part_keep in zip(rows.chunk(2), keeps, strict=False):
                self._add_group(part.to(self.precision), part_keep, weight, wide=False)
        self.adding = False

    def _add_group(self, rows: Tensor, keep: Tensor | None, weight: float, *, wide: bool) -> None:
        group = centre_group(rows, keep, wide=wide)
        self._add_sketch(rows, group.up * group.up, weight)
        self._note(group, weight)

    def _add_sketch(self, rows: Tensor, scale: Tensor, weight: float) -> None:
        """Add weight·scale times the diagonal of XᵀX, and XᵀXΩ, of rows X."""
        right = self._after(rows)
        for first, last in self._blocks_of_features():
            part = rows[:, first:last]
            self._diagonal[first:last].addcmul_(part.square().sum(0).double(), scale, value=weight)
            # With `out=` autocast leaves the product alone.
            block = empty((last - first, self.columns), rows.dtype, rows.device)
            with ieee_products(rows):
                torch.mm(part.t(), right, out=block)
            self._sketch[first:last].addcmul_(block.double(), scale, value=weight)

    def _after(self, rows: Tensor) -> Tensor:
        """rows·Ω, (n, k), in the rows' dtype."""
        columns, values = self._omega
        found = empty((len(rows), self.columns), rows.dtype, rows.device).zero_()
        height = min(block_rows(self.columns), self.features)
        dense = empty((height, self.columns), rows.dtype, rows.device)
        with ieee_products(rows):
            for first, last in self._blocks_of_features():
                block = dense[: last - first].zero_()
                block.scatter_(1, columns[first:last], values[first:last].to(rows.dtype))
                torch.addmm(found, rows[:, first:last], block, out=found)
        return found

    def _blocks_of_features(self) -> list[tuple[int, int]]:
        height = block_rows(self.columns)
        return [(first, min(first + height, self.features)) for first in range(0, self.features, height)]

    def _add_product(self, left: Tensor, right: Tensor) -> None:
        self._diagonal.add_((left * right).sum(0))
        after = self._after(right)
        for first, last in self._blocks_of_features():
            self._sketch[first:last].addmm_(left[:, first:last].t(), after)

    # --- reading -------------------------------------------------------------------------------------------

    @property
    def moments_size(self) -> int:
        """Values that `drain_into` writes."""
        return self.features + sketch_size(self.features, self.columns)

    def _finish(self) -> None:
        with self._lane.work():
            self._enter(self._lane.stream)
            self._reduce_stage()
            self._fold()
        self._stage = None

    def _pack(self, sums: F64, packed: F64) -> None:
        packed[:] = sums
        diagonal, _ = split(packed, self.features)
        np.maximum(diagonal, 0.0, out=diagonal)  # see `Accumulator._pack`

    def _read(self) -> tuple[F64, F64, int, int, float]:
        return self._read_through(self._lane)

    @property
    def held_bytes(self) -> int:
        """Bytes that this accumulator holds now."""
        staged = 0 if self._stage is None else self._stage.element_size() * self.features * self._capacity
        return sketch_bytes(self.features, self.columns, staged)


def waiting_groups(columns: int) -> int:
    """Groups that may wait: fewer where their means would be large beside the sketch."""
    return max(2, min(_MOST_GROUPS, columns // 16))


def sketch_bytes(features: int, columns: int, staged: int | None = None) -> int:
    """Bytes that an accumulator of a sketch holds at most: sums, waiting means, a stage, of float64 rows if it must."""
    sums = sketch_size(features, columns) + (2 * features + 1) * (waiting_groups(columns) + 1)
    return 8 * sums + (8 * stage_rows(features, columns) * features if staged is None else staged)


def scratch_bytes(features: int, columns: int) -> int:
    """Most bytes of scratch memory that a group or a fold takes beside its accumulator, in float64 if it must.

    What centring makes of the rows (their magnitudes, a mask), a block of Ω and one of Y, X·Ω; a fold's factors.
    """
    rows = stage_rows(features, columns)
    fold = 8 * 8 * (waiting_groups(columns) + 1) * features
    group = 10 * rows * features
    return max(group, fold) + 8 * (4 * block_rows(columns) * columns + rows * columns) + 16 * 8 * features
