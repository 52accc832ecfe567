"""Moments of rows on a device that must not be waited for: every case is handled by masks and scaling.

Outputs of few rows are copied into a stage and reduced when it is full, on a side stream; those of many rows are
reduced where they are, on the stream of the forward, which costs it little more than a copy would.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from delve_ray.accumulator import Accumulator
from delve_ray.chunks import chunk_rows
from delve_ray.cuda.lane import Lane, follow, kernels
from delve_ray.groups import centre_group
from delve_ray.moments import F64
from delve_ray.staging import Stage, cut, stage_bytes, stage_rows
from delve_ray.workspace import Workspace, ieee_products, zeros

_PRODUCTS = {"float32": 0, "float64": 0, "tf32": 1, "bfloat16": 2}
"""How the kernels multiply, by the name of the option `precision`."""


class DeviceAccumulator(Accumulator):
    """An accumulator on a GPU; it never synchronises, and launches nothing that depends on values.

    `products` names what centred values are rounded to before they are multiplied: "float32" leaves them as they are,
    and so does "tf32" or "bfloat16" where Triton is missing.
    """

    _rows: Tensor
    _dropped: Tensor

    def __init__(
        self,
        features: int,
        workspace: Workspace,
        precision: torch.dtype = torch.float32,
        products: str = "float32",
    ) -> None:
        if workspace.lane is None:
            workspace.lane = Lane(workspace.device)
        self._lane: Lane = workspace.lane
        self._products = _PRODUCTS[products]
        with self._lane.work():
            super().__init__(features, workspace, precision)
            self._weight = zeros((), workspace.device).fill_(1.0)
            self._hints = [zeros(features, workspace.device, dtype) for dtype in (torch.float32, torch.int32)]
        self._weight_value = 1.0
        self._stage: Stage | None = None
        # The kernels keep what was folded in rows 0 and 1 by turns.
        self._folded = 0
        # The stream that the sums were last changed on.
        self._changed_on: Any = self._lane.stream
        self._kernels: Any = kernels(workspace.device) if self.precision == torch.float32 else None
        if self._kernels is not None:
            self._total = self._kernels.Total(
                self._sums, self._counts, self._means, self._rows, self._dropped, *self._hints, self._weight
            )

    def add(self, rows: Tensor, keep: Tensor | None = None, weight: float = 1.0) -> None:
        """See `Accumulator.add`."""
        x = self._checked(rows)
        if x.numel() == 0 or self.adding:
            return
        device = self.workspace.device
        if x.device != device:
            x, keep = x.to(device), None if keep is None else keep.to(device)
        if x.dim() == 1:
            x, keep = x.unsqueeze(0), None if keep is None else keep.reshape(1)
        stream = self._lane.current()
        if weight != self._weight_value:
            self._reweigh(weight)
        stage, n = self._stage, x.numel() // self.features
        if stage is not None and n < stage.room and 2 * n < stage.capacity and x.dtype == stage.dtype:
            stage.enter(stream)
            stage.put(x, keep, n)
        else:
            self._add_pieces(x, keep, stream)

    def _add_pieces(self, x: Tensor, keep: Tensor | None, stream: Any) -> None:
        """Add rows that need another stage, or none."""
        pieces = [(x, keep)]
        while pieces:
            x, keep = pieces.pop()
            n = x.numel() // self.features
            if 2 * n >= stage_rows(self.features, x.element_size()) and self._add_directly(x, keep, stream):
                continue
            stage = self._open_stage(x, stream)
            if n <= stage.room:
                stage.put(x, keep, n)
                if not stage.room:
                    self._reduce_stage(self._lane)
            elif stage.fill and stage.room < n // x.shape[0] and not (x.dim() > 1 and x.is_contiguous()):
                self._reduce_stage(self._lane)
                pieces.append((x, keep))
            else:
                pieces += reversed(list(cut(x, keep, stage.room)))

    def _reweigh(self, weight: float) -> None:
        """Rows that are added from now on have this weight."""
        self._reduce_stage(self._lane)
        with self._lane.work():
            follow(self._lane.stream, [self._changed_on])
            self._weight.fill_(weight)
        self._changed_on = self._lane.stream
        self._weight_value = weight

    def _open_stage(self, x: Tensor, stream: Any) -> Stage:
        """A stage of x's dtype, with room."""
        stage = self._stage
        if stage is not None and stage.dtype != x.dtype:
            self._reduce_stage(self._lane)
            stage = None
        if stage is None:
            stage = self._stage = Stage(self._lane, x, stream)
        stage.enter(stream)
        return stage

    # --- reducing ------------------------------------------------------------------------------------------

    def _add_directly(self, x: Tensor, keep: Tensor | None, stream: Any) -> bool:
        """Reduce rows where they are, if the kernels can read them well; in order with what the stage holds."""
        if self._kernels is None or x.dtype == torch.float64:
            return False
        place = self._kernels.place_of(x)
        if place is None or (place.is_map and place.align * x.element_size() < 8):
            return False
        self._reduce(self._lane.direct_scratch(stream), x, place, None if keep is None else keep.reshape(-1), stream)
        return True

    def _reduce_stage(self, lane: Lane, scratch: Any = None) -> None:
        """Reduce what is staged, on the side stream."""
        stage, self._stage = self._stage, None
        if stage is None or not stage.fill:
            return
        stage.hand_over(lane.stream)
        rows, keep = stage.rows(), stage.keep()
        with lane.work():
            if self._kernels is not None and stage.dtype != torch.float64:
                place = self._kernels.place_of(rows)
                self._reduce(scratch or lane.scratch(), rows, place, keep, lane.stream)
            else:
                self._settle()
                size = chunk_rows(self.features)
                keeps = [None] * (1 + len(rows) // size) if keep is None else keep.split(size)
                for chunk, chunk_keep in zip(rows.split(size), keeps, strict=False):
                    self._add_group(chunk, self._weight_value, chunk_keep)
        lane.give(stage.buffer)

    def _reduce(self, scratch: Any, x: Tensor, place: Any, keep: Tensor | None, stream: Any) -> None:
        """Let the kernels merge rows into what was folded."""
        follow(stream, [self._changed_on])
        self._changed_on = stream
        self.adding = True
        if self._waiting:
            self._fold()
        scratch.reduce(x, place, keep, self._total, self._folded, self._products)
        self._folded = 1 - self._folded
        self.adding = False

    def _settle(self) -> None:
        """On the side stream from now on, with what was folded in row 0."""
        follow(self._lane.stream, [self._changed_on])
        self._changed_on = self._lane.stream
        if self._folded:
            self._counts[0], self._means[0] = self._counts[1], self._means[1]
            self._folded = 0

    def _add_group(self, x: Tensor, weight: float, keep: Tensor | None = None) -> None:
        """Reduce a group."""
        dtype = torch.float64 if x.dtype == torch.float64 else self.precision
        rows = self.workspace.rows(x.shape, dtype).copy_(x).view(-1, self.features)
        group = centre_group(rows, keep, wide=dtype == torch.float64)
        blocks = self._product(rows)
        self.adding = True
        for total, block in zip(self._blocks, blocks, strict=True):
            total.addcmul_(block.double(), group.up * group.up, value=weight)
        self._note(group, weight)
        self.adding = False

    def _product(self, centred: Tensor) -> list[Tensor]:
        """The upper blocks of centredᵀ·centred, in scratch memory."""
        _, blocks = self.workspace.product(self._plan, centred.dtype)
        with ieee_products(centred):
            for (first, height, _), block in zip(self._plan.blocks, blocks, strict=True):
                # With `out=` autocast leaves the product alone.
                torch.mm(centred[:, first : first + height].t(), centred[:, first:], out=block)
        return blocks

    # --- reading -------------------------------------------------------------------------------------------

    def _finish(self) -> None:
        # The recorder's scratch memory is in use by the forwards that go on meanwhile.
        self.workspace = Workspace(self.workspace.device)
        if self._stage is not None:
            scratch = None if self._kernels is None else self._kernels.Scratch(self.workspace.device)
            self._reduce_stage(self._lane, scratch)
        with self._lane.work():
            self._settle()
            self._fold()

    def _read(self) -> tuple[F64, F64, int, int, float]:
        return self._read_through(self._lane)

    @property
    def held_bytes(self) -> int:
        """Bytes that this accumulator holds now; layers with outputs of many rows never have a stage."""
        return self.nbytes(self.features) - (0 if self._stage is not None else _staging_bytes(self.features))

    @staticmethod
    def nbytes(features: int) -> int:
        """Bytes that an accumulator of this many features holds at most, those of its stage included."""
        return Accumulator.nbytes(features) + 8 * features + _staging_bytes(features)


def _staging_bytes(features: int) -> int:
    """Bytes of a stage and of the mask of its rows."""
    return stage_bytes(features) + stage_rows(features, 1)
