"""Accumulating the moments of a layer's rows where the rows are: on the device, inside the forward hook.

Shapes in names: N observations, D features, K groups waiting to be folded.

Each piece of a batch is a group of its own: it is centred by its own mean, so that products in float32 are
safe at any offset (raw float32 sums are not: at mean/spread 700 they turn an intrinsic dimensionality of 99
into 71), and its scatter is added to a float64 sum. What the merge formula adds between groups (see
`moments`) needs only their counts and means, so these wait and are folded in with one matrix product for
many groups.

The float32 mean c that centres a group is rounded. With r = Σ(z − c) the exact mean is c + r/n and the
scatter about it is Σ(z − c)ᵀ(z − c) − n·(r/n)(r/n)ᵀ; the correction is folded in with the same product.

Only the upper triangle is computed and kept, in blocks of rows: `workspace.BlockPlan`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from delve_ray.moments import F64, Moments, pack_block, triangle_size
from delve_ray.workspace import Workspace, block_plan, ieee_products, zeros

_CHUNK_ELEMENTS = 1 << 20
"""Elements of a batch that are reduced at a time: 4 MB of scratch, which stays in the cache."""
_CHUNK_ROWS = (1024, 8192)
"""Fewest and most rows that a chunk may have. A float32 product over 2^16 rows is wrong by 5e-7 of λ1, over 2^18
by 1.6e-6; over 2^13 it is right to 2e-7. With too few rows, adding the product costs more than computing it."""
_NARROW = 16
"""Below this many features a product is memory bound, and BLAS sums it naively (5e-5 of λ1 at 2^18 rows): it is
taken in float64, which costs nothing there."""
_LARGEST = 1e140
"""Values beyond it count as non-finite: their squares leave float64 as soon as they are summed."""
_FLOAT32_MAX = float(np.finfo(np.float32).max)
_SQUARES = {torch.float32: (1e-30, _FLOAT32_MAX), torch.float64: (0.0, float(np.finfo(np.float64).max))}
"""Between these a product's largest sum of squares is right: below, float32 squares are subnormal and lose digits."""
_CENTRE_NOISE = {torch.float32: 8 * 2.0**-23, torch.float64: 8 * 2.0**-52}
"""Relative error of a computed mean. A spread below it is made of the mean's own rounding: a constant feature's
would not be zero."""
_BIAS = 5e-7
"""Largest relative error of a float32 product's diagonal. Where rows take only a few distinct values (bfloat16 far
from zero, two-valued features, a constant background), so do the products, and a float32 sum rounds the same way at
every step: 2.7e-6 at 8192 rows. The first group and now and then another are looked at; a layer that fails the test
goes on in float64."""
_GRID_ROWS = 128
"""Rows from which a device learns how coarse a centre may be."""
_LARGEST_SCALING = 100
"""Rows on a device are scaled up by 2^100 at most: 2^-149, the smallest float32, is then 2^-49."""


class Accumulator:
    """The moments of one layer in one phase, on one device.

    `add` takes rows of shape (…, D), any float dtype, any strides, and keeps nothing of them. On the CPU it
    looks at the values (non-finite rows, products that leave float32) and takes a float64 path where needed;
    on other devices it never synchronises: the same cases are handled by masks and scaling. Not thread-safe.

    Memory: `nbytes`; for wide layers less than 5d².
    """

    def __init__(self, features: int, workspace: Workspace, precision: torch.dtype = torch.float32) -> None:
        self.features = features
        self.workspace = workspace
        self.precision = torch.float64 if features < _NARROW else precision
        self.checked = workspace.device.type == "cpu"
        self._plan = block_plan(features)
        self._sums = zeros(self._plan.size, workspace.device)
        self._blocks = self._plan.views(self._sums)
        # Row 0 is the group of everything folded so far; a group's residual is r/n, see the module's head.
        self._counts = zeros(self._plan.groups + 1, workspace.device)
        self._means = zeros((self._plan.groups + 1, features), workspace.device)
        self._residuals = zeros((self._plan.groups + 1, features), workspace.device)
        self._waiting = 0
        # Stays set when an interrupt, or no memory, parts a sum from its count; then nothing is added any more.
        self.adding = False
        self._dropped = zeros((), workspace.device, torch.int64)
        self._ready = torch.cuda.Event() if workspace.device.type == "cuda" else None
        if self.checked:  # numpy adds float32 to float64 four times as fast as torch, and indexes without a dispatch
            self._sums_np: F64 = self._sums.numpy()
            self._counts_np: F64 = self._counts.numpy()

    def add(self, rows: Tensor, keep: Tensor | None = None) -> None:
        """Add rows of shape (…, D); with `keep`, boolean of shape (…), only those where it is True.

        Raises ValueError for another width and TypeError for a dtype that is no float.
        """
        x = rows.detach()
        if x.dim() == 0 or x.shape[-1] != self.features:
            raise ValueError(
                f"rows of shape {tuple(x.shape)} do not have {self.features} features in the last dimension"
            )
        if not x.is_floating_point():
            raise TypeError(f"rows are {x.dtype}; moments are taken of floating point values")
        if keep is not None and x.device.type == "cpu" and self.checked:
            x = x if keep.all() else x[keep]
            keep = None
        if x.numel() == 0 or self.adding:
            return
        if x.device != self.workspace.device:
            x, keep = x.to(self.workspace.device), None if keep is None else keep.to(self.workspace.device)
        if self.workspace.used is not None:
            torch.cuda.current_stream(self.workspace.device).wait_event(self.workspace.used)
        if keep is not None:  # its number of rows is not known here, so they stay, as rows that do not count
            x = x.reshape(-1, self.features)
            size = _chunk_rows(self.features)
            for chunk, chunk_keep in zip(x.split(size), keep.reshape(-1).split(size), strict=True):
                self._add_deferred(chunk, chunk_keep)
        else:
            add_group = self._add_checked if self.checked else self._add_deferred
            for chunk in _chunks(x if x.dim() > 1 else x.unsqueeze(0)):
                add_group(chunk)
        if self._ready is not None and self.workspace.used is not None:
            stream = torch.cuda.current_stream(self.workspace.device)
            self._ready.record(stream)
            self.workspace.used.record(stream)

    # --- one group ---------------------------------------------------------------------------------------

    def _add_checked(self, x: Tensor) -> None:
        """A group on the CPU: look at the mean, which is non-finite as soon as any value is, and at the product."""
        wide = x.dtype == torch.float64
        centre = x.mean(tuple(range(x.dim() - 1)), dtype=torch.float64 if wide else torch.float32)
        if x.element_size() == 2:  # see _on_grid; a mean of half precision is on the values' own grid
            centre = centre.to(x.dtype).to(torch.float32)
        offset = centre.abs().amax().item()
        n = x.numel() // self.features
        if offset < (_LARGEST if wide else _FLOAT32_MAX):
            centred, residual = self._centre(x, centre, n, self.precision)
            product_np = self._product(centred)[0].numpy()
            largest = float(product_np[self._plan.diagonal].max())
            smallest, most = _SQUARES[self.precision]
            noise = n * (_CENTRE_NOISE[centre.dtype] * offset) ** 2
            sound = max(smallest, noise) < largest < most
            if sound and self._waiting in (0, self._plan.groups) and self.precision == torch.float32:
                sound = self._unbiased(centred, product_np)
            if sound or not (wide or centred.any()):
                self._keep(n, centre, residual, product_np)
                return
        self._add_irregular(x.reshape(n, self.features))

    def _unbiased(self, centred: Tensor, product_np: npt.NDArray[Any]) -> bool:
        """Whether float32 sums this layer's products well; if not, float64 does from now on."""
        diagonal = product_np[self._plan.diagonal]
        exact = np.square(centred.numpy(), dtype=np.float64).sum(axis=0)
        if np.abs(diagonal - exact).max() <= _BIAS * exact.max():
            return True
        self.precision = torch.float64
        return False

    def _add_irregular(self, rows: Tensor) -> None:
        """A group that float32 or a rounded mean cannot do: leave out and count bad rows, take the rest in float64.

        The first row is subtracted before the mean is taken, so that identical rows have no variance at all.
        """
        # False for NaN, too. A float32 comparison would take _LARGEST itself for inf.
        good = (rows.abs() <= min(_LARGEST, torch.finfo(rows.dtype).max)).all(dim=1)
        n = int(good.sum())
        self._dropped += rows.shape[0] - n
        if n:
            kept = rows[good].double()
            centre = kept[0] + (kept - kept[0]).mean(0)
            centred, residual = self._centre(kept, centre, n, torch.float64)
            self._keep(n, centre, residual, self._product(centred)[0].numpy())

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

    def _keep(self, n: int, centre: Tensor, residual: Tensor, product_np: npt.NDArray[Any]) -> None:
        self.adding = True
        np.add(self._sums_np, product_np, out=self._sums_np)
        slot = self._slot()
        self._counts_np[slot] = n
        torch.div(residual, n, out=self._residuals[slot])
        torch.add(self._residuals[slot], centre, out=self._means[slot])
        self.adding = False

    def _add_deferred(self, x: Tensor, keep: Tensor | None = None) -> None:
        """A group on a device that must not be waited for: every case is handled by masks and scaling.

        Rows are scaled by a power of two before they are squared, so that no float32 product overflows or
        vanishes, and the product is scaled back in float64.
        """
        dtype = torch.float64 if x.dtype == torch.float64 else self.precision
        rows = self.workspace.rows(x.shape, dtype).copy_(x).view(-1, self.features)
        largest = _LARGEST if dtype == torch.float64 else _FLOAT32_MAX
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
        _, blocks = self._product(rows)
        up = torch.ldexp(torch.ones((), dtype=torch.float64, device=x.device), exponent)
        self.adding = True
        for total, block in zip(self._blocks, blocks, strict=True):
            total.addcmul_(block.double(), up * up)
        slot = self._slot()
        self._counts[slot] = n
        self._residuals[slot] = residual * up
        self._means[slot] = (residual + centre) * up
        self.adding = False

    def _product(self, centred: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The upper blocks of centredᵀ·centred, in scratch memory."""
        flat, blocks = self.workspace.product(self._plan, centred.dtype)
        with ieee_products(centred.device):
            for (first, height, _), block in zip(self._plan.blocks, blocks, strict=True):
                # With `out=` autocast leaves the product alone.
                torch.mm(centred[:, first : first + height].t(), centred[:, first:], out=block)
        return flat, blocks

    # --- between groups ----------------------------------------------------------------------------------

    def _slot(self) -> int:
        """Index of the next group, after folding the waiting ones if there is no room."""
        if self._waiting == self._plan.groups:
            self._fold()
        self._waiting += 1
        return self._waiting

    def _fold(self) -> None:
        """Fold the waiting groups' means and residuals into the sums and into group 0."""
        used = slice(0, self._waiting + 1)
        if not self._waiting:
            return
        counts, means, residuals = self._counts[used], self._means[used], self._residuals[used]
        total = counts.sum()
        # Differences from one of the means, so that the sum does not round at the size of the offset. An
        # empty group has mean 0; the last group always has rows on the CPU, elsewhere it does no more harm.
        reference = means[-1]
        mean = reference + (counts[:, None] * (means - reference)).sum(0) / total.clamp(min=1)
        weight = counts.sqrt()[:, None]
        between = (means - mean) * weight
        rounding = residuals * weight
        left, right = torch.cat([between, rounding]), torch.cat([between, -rounding])
        for (first, height, _), block in zip(self._plan.blocks, self._blocks, strict=True):
            block.addmm_(left[:, first : first + height].t(), right[:, first:])
        self._counts.zero_()
        self._residuals.zero_()
        self._counts[0] = total
        self._means[0] = mean
        self._waiting = 0

    # --- reading -----------------------------------------------------------------------------------------

    def drain_into(self, buffer: F64) -> tuple[int, int]:
        """Write mean (d) and packed scatter (d(d+1)/2) into `buffer`; returns (observations, non-finite rows).

        Called by the sender's thread, on an accumulator that no hook can reach any more. Waits for the
        device; the accumulator is used up.
        """
        expected = self.features + triangle_size(self.features)
        if buffer.shape != (expected,):
            raise ValueError(
                f"the buffer has shape {buffer.shape}, moments of {self.features} features need ({expected},)"
            )
        if self._ready is not None:
            self._ready.synchronize()
        self._fold()
        buffer[: self.features] = self._means[0].cpu().numpy()
        packed = buffer[self.features :]
        dense = self._sums.cpu()
        # What centring a constant feature rounds may be taken away once too often: -1e-30 for a variance of 0.
        variances = dense.numpy()[self._plan.diagonal]
        dense.numpy()[self._plan.diagonal] = np.maximum(variances, 0.0)
        start = 0
        for block in self._plan.views(dense):
            height, width = block.shape
            size = triangle_size(height) + height * (width - height)
            pack_block(block.numpy(), packed[start : start + size])
            start += size
        return int(self._counts[0]), int(self._dropped)

    def moments(self) -> Moments:
        """The moments so far, as float64 on the host; uses the accumulator up like `drain_into`."""
        buffer = np.empty(self.features + triangle_size(self.features))
        n, _ = self.drain_into(buffer)
        return Moments.from_packed(n, buffer[: self.features], buffer[self.features :])

    @staticmethod
    def nbytes(features: int) -> int:
        """Bytes that an accumulator of this many features holds."""
        plan = block_plan(features)
        return 8 * (plan.size + (2 * features + 1) * (plan.groups + 1))


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


def _chunk_rows(features: int) -> int:
    """Most rows of a chunk."""
    fewest, most = _CHUNK_ROWS
    return min(most, max(fewest, _CHUNK_ELEMENTS // features))


def _chunks(x: Tensor) -> Iterator[Tensor]:
    """Pieces of x, shape (…, D), cut along its leading dimensions into a bounded number of rows each."""
    features = x.shape[-1]
    limit = _chunk_rows(features)
    rows = x.numel() // features
    if rows <= limit:
        yield x
        return
    if x.is_contiguous():
        yield from x.view(-1, features).split(limit)
    elif rows // x.shape[0] <= limit:
        yield from x.split(limit * x.shape[0] // rows)
    else:
        for item in x:
            yield from _chunks(item)
