"""Moments of rows on a device that must not be waited for: every case is handled by masks and scaling."""

from __future__ import annotations

import torch
from torch import Tensor

from delve_ray.accumulator import FLOAT32_MAX, LARGEST, Accumulator
from delve_ray.chunks import chunk_rows, chunks
from delve_ray.workspace import Workspace, ieee_products

_GRID_ROWS = 128
"""Rows from which a device learns how coarse a centre may be."""
_LARGEST_SCALING = 100
"""Rows on a device are scaled up by 2^100 at most: 2^-149, the smallest float32, is then 2^-49."""


class DeviceAccumulator(Accumulator):
    """An accumulator on a GPU; it never synchronises, and launches nothing that depends on values."""

    def __init__(self, features: int, workspace: Workspace, precision: torch.dtype = torch.float32) -> None:
        super().__init__(features, workspace, precision)
        self._ready = torch.cuda.Event() if workspace.device.type == "cuda" else None

    def add(self, rows: Tensor, keep: Tensor | None = None, weight: float = 1.0) -> None:
        """See `Accumulator.add`."""
        x = self._checked(rows)
        if x.numel() == 0 or self.adding:
            return
        if x.device != self.workspace.device:
            x, keep = x.to(self.workspace.device), None if keep is None else keep.to(self.workspace.device)
        if self.workspace.used is not None:
            torch.cuda.current_stream(self.workspace.device).wait_event(self.workspace.used)
        if keep is not None:  # its number of rows is not known here, so they stay, as rows that do not count
            x = x.reshape(-1, self.features)
            size = chunk_rows(self.features)
            for chunk, chunk_keep in zip(x.split(size), keep.reshape(-1).split(size), strict=True):
                self._add_group(chunk, weight, chunk_keep)
        else:
            for chunk in chunks(x if x.dim() > 1 else x.unsqueeze(0)):
                self._add_group(chunk, weight)
        if self._ready is not None and self.workspace.used is not None:
            stream = torch.cuda.current_stream(self.workspace.device)
            self._ready.record(stream)
            self.workspace.used.record(stream)

    def _finish(self) -> None:
        if self._ready is not None:
            self._ready.synchronize()

    def _add_group(self, x: Tensor, weight: float, keep: Tensor | None = None) -> None:
        """Reduce a group.

        Rows are scaled by a power of two before they are squared, so that no float32 product overflows or
        vanishes, and the product is scaled back in float64.
        """
        dtype = torch.float64 if x.dtype == torch.float64 else self.precision
        rows = self.workspace.rows(x.shape, dtype).copy_(x).view(-1, self.features)
        largest = LARGEST if dtype == torch.float64 else FLOAT32_MAX
        good = (rows.abs() <= largest).all(dim=1, keepdim=True)
        if keep is None:
            n = good.sum(dtype=torch.int64)
            self._dropped += rows.shape[0] - n
        else:
            kept, good = keep.sum(dtype=torch.int64), good & keep[:, None]
            n = good.sum(dtype=torch.int64)
            self._dropped += kept - n
        rows.masked_fill_(~good, 0.0)
        exponent = torch.frexp(rows.abs().amax())[1].clamp(min=-_LARGEST_SCALING)
        down = torch.ldexp(torch.ones((), dtype=dtype, device=x.device), -exponent)
        rows.mul_(down)
        at_least_one = n.clamp(min=1)
        # Summed in float64, so that the mean of identical rows is that row.
        centre = (rows.sum(0, dtype=torch.float64) / at_least_one).to(dtype)
        centre = _on_grid(centre, rows[:_GRID_ROWS], good[:_GRID_ROWS])
        rows.sub_(centre).masked_fill_(~good, 0.0)
        residual = rows.sum(0).double() / at_least_one
        blocks = self._product(rows)
        up = torch.ldexp(torch.ones((), dtype=torch.float64, device=x.device), exponent)
        self.adding = True
        for total, block in zip(self._blocks, blocks, strict=True):
            total.addcmul_(block.double(), up * up, value=weight)
        slot = self._slot()
        self._rows += n
        self._counts[slot] = n * weight
        self._residuals[slot] = residual * up
        self._means[slot] = (residual + centre) * up
        self.adding = False

    def _product(self, centred: Tensor) -> list[Tensor]:
        """The upper blocks of centredᵀ·centred, in scratch memory."""
        _, blocks = self.workspace.product(self._plan, centred.dtype)
        with ieee_products(centred.device):
            for (first, height, _), block in zip(self._plan.blocks, blocks, strict=True):
                # With `out=` autocast leaves the product alone.
                torch.mm(centred[:, first : first + height].t(), centred[:, first:], out=block)
        return blocks


def _on_grid(centre: Tensor, rows: Tensor, good: Tensor) -> Tensor:
    """The centre, rounded to a power of two below an eighth of each feature's spread among some rows.

    Values of few digits, as half precision has far from zero, then differ from it by few digits, too, and
    float32 sums of their products are exact, where an arbitrary centre makes them round alike at every step.
    A feature that does not vary keeps its centre, so that its variance is 0.
    """
    differences = (rows - centre).masked_fill_(~good, 0.0)
    spread = (differences.square().sum(0) / good.sum().clamp(min=1)).sqrt()
    exponent = torch.frexp(spread)[1].clamp(min=-60) - 4
    grid = torch.ldexp(torch.ones_like(spread), exponent)
    return torch.where(spread > 0, torch.round(centre / grid) * grid, centre)
