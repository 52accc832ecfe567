"""Moments of rows in the host's memory, where values can be looked at."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from delve_ray.accumulator import FLOAT32_MAX, LARGEST, Accumulator
from delve_ray.chunks import chunks
from delve_ray.moments import F64
from delve_ray.workspace import Workspace, ieee_products

_SQUARES = {torch.float32: (1e-30, FLOAT32_MAX), torch.float64: (0.0, float(np.finfo(np.float64).max))}
"""Between these a product's largest sum of squares is right: below, float32 squares are subnormal and lose digits."""
_CENTRE_NOISE = {torch.float32: 8 * 2.0**-23, torch.float64: 8 * 2.0**-52}
"""Relative error of a computed mean. A spread below it is made of the mean's own rounding: a constant feature's
would not be zero."""
_BIAS = 5e-7
"""Largest relative error of a float32 product's diagonal. Where rows take only a few distinct values (bfloat16 far
from zero, two-valued features, a constant background), so do the products, and a float32 sum rounds the same way at
every step: 2.7e-6 at 8192 rows. The first group and now and then another are looked at; a layer that fails the test
goes on in float64."""


class HostAccumulator(Accumulator):
    """An accumulator in the host's memory: non-finite rows and products that leave float32 are seen, and redone."""

    def __init__(self, features: int, workspace: Workspace, precision: torch.dtype = torch.float32) -> None:
        super().__init__(features, workspace, precision)
        # numpy adds float32 to float64 four times as fast as torch, and indexes without a dispatch
        self._sums_np: F64 = self._sums.numpy()
        self._counts_np: F64 = self._counts.numpy()

    def add(self, rows: Tensor, keep: Tensor | None = None, weight: float = 1.0) -> None:
        """See `Accumulator.add`."""
        x = self._checked(rows)
        if keep is not None and x.device.type == "cpu":
            x = x if keep.all() else x[keep]
            keep = None
        if x.numel() == 0 or self.adding:
            return
        if x.device != self.workspace.device:
            x, keep = x.to(self.workspace.device), None if keep is None else keep.to(self.workspace.device)
            x = x if keep is None else x[keep]
        for chunk in chunks(x if x.dim() > 1 else x.unsqueeze(0)):
            self._add_group(chunk, weight)

    def _add_group(self, x: Tensor, weight: float) -> None:
        """Look at the mean, which is non-finite as soon as any value is, and at the product."""
        wide = x.dtype == torch.float64
        centre = x.mean(tuple(range(x.dim() - 1)), dtype=torch.float64 if wide else torch.float32)
        if x.element_size() == 2:  # a mean of half precision is on the values' own grid
            centre = centre.to(x.dtype).to(torch.float32)
        offset = centre.abs().amax().item()
        n = x.numel() // self.features
        if offset < (LARGEST if wide else FLOAT32_MAX):
            centred, residual = self._centre(x, centre, n, self.precision)
            product_np = self._product(centred)[0].numpy()
            largest = float(product_np[self._plan.diagonal].max())
            smallest, most = _SQUARES[self.precision]
            noise = n * (_CENTRE_NOISE[centre.dtype] * offset) ** 2
            sound = max(smallest, noise) < largest < most
            if sound and self._waiting in (0, self._plan.groups) and self.precision == torch.float32:
                sound = self._unbiased(centred, product_np)
            if sound or not (wide or centred.any()):
                self._keep(n, centre, residual, product_np, weight)
                return
        self._add_irregular(x.reshape(n, self.features), weight)

    def _unbiased(self, centred: Tensor, product_np: npt.NDArray[Any]) -> bool:
        """Whether float32 sums this layer's products well; if not, float64 does from now on."""
        diagonal = product_np[self._plan.diagonal]
        exact = np.square(centred.numpy(), dtype=np.float64).sum(axis=0)
        if np.abs(diagonal - exact).max() <= _BIAS * exact.max():
            return True
        self.precision = torch.float64
        return False

    def _add_irregular(self, rows: Tensor, weight: float) -> None:
        """A group that float32 or a rounded mean cannot do: leave out and count bad rows, take the rest in float64.

        The first row is subtracted before the mean is taken, so that identical rows have no variance at all.
        """
        # False for NaN, too. A float32 comparison would take LARGEST itself for inf.
        good = (rows.abs() <= min(LARGEST, torch.finfo(rows.dtype).max)).all(dim=1)
        n = int(good.sum())
        self._dropped += rows.shape[0] - n
        if n:
            kept = rows[good].double()
            centre = kept[0] + (kept - kept[0]).mean(0)
            centred, residual = self._centre(kept, centre, n, torch.float64)
            self._keep(n, centre, residual, self._product(centred)[0].numpy(), weight)

    def _centre(self, x: Tensor, centre: Tensor, n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Centred rows, shape (n, D), in scratch memory in the order in which x lies, and their sum."""
        if dtype == torch.float64:
            centre = centre.to(dtype)
        if x.dim() > 2 and x.stride(-1) != 1:  # a feature map: gathering its rows takes longer than their product
            x_DN = x.movedim(-1, 0)
            maps = torch.sub(x_DN, centre.view(-1, *[1] * (x.dim() - 1)), out=self.workspace.rows(x_DN.shape, dtype))
            centred = maps.view(self.features, n).t()
        else:
            centred = torch.sub(x, centre, out=self.workspace.rows(x.shape, dtype)).view(n, self.features)
        return centred, centred.sum(0)

    def _product(self, centred: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The upper blocks of centredᵀ·centred, in scratch memory."""
        flat, blocks = self.workspace.product(self._plan, centred.dtype)
        with ieee_products(centred.device):
            for (first, height, _), block in zip(self._plan.blocks, blocks, strict=True):
                # With `out=` autocast leaves the product alone.
                torch.mm(centred[:, first : first + height].t(), centred[:, first:], out=block)
        return flat, blocks

    def _keep(self, n: int, centre: Tensor, residual: Tensor, product_np: npt.NDArray[Any], weight: float) -> None:
        self.adding = True
        if weight != 1:
            product_np = product_np * weight
        np.add(self._sums_np, product_np, out=self._sums_np)
        slot = self._slot()
        self._rows += n
        self._counts_np[slot] = n * weight
        torch.div(residual, n, out=self._residuals[slot])
        torch.add(self._residuals[slot], centre, out=self._means[slot])
        self.adding = False
