"""Moments of rows in the host's memory, where values can be looked at.

Small batches are held back: a hook copies their rows into the accumulator's stage, and one group is made of many of
them. A product over 1024 rows costs about what eight over 128 would save: their sums into float64, their bookkeeping,
and a good part of the product itself.

Of narrow layers, whose products are cheap, passes over the rows and calls count. So most of their groups are not
centred by their own mean but by that of a group before, in the pass that copies them, and kept where that is near
enough: `_reduce_shifted`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from delve_ray.accumulator import FLOAT32_MAX, LARGEST, Accumulator
from delve_ray.chunks import chunks
from delve_ray.moments import F64
from delve_ray.products import Block, onednn, product_blocks, upper_product, wants_rows
from delve_ray.workspace import Workspace, empty, ieee_products

_STAGE_ELEMENTS = 1 << 19
_STAGE_ROWS = (1024, 8192)
"""A stage has 2 MB, but no fewer rows than these and no more; of float64 rows, half as many."""
_SQUARES = {torch.float32: (1e-30, FLOAT32_MAX), torch.float64: (0.0, float(np.finfo(np.float64).max))}
"""Between these a product's largest sum of squares is right: below, float32 squares are subnormal and lose digits."""
_CENTRE_NOISE = {torch.float32: 8 * 2.0**-23, torch.float64: 8 * 2.0**-52}
"""Relative error of a computed mean. A spread below it is made of the mean's own rounding: a constant feature's
would not be zero."""
_SHIFTED = 16
"""Groups that share a centre at most; the first of them is looked at with care."""
_NEAR = 0.25
"""Largest distance of a mean from a centre, squared, in units of the largest variance. The float32 product is then
less exact by this share at most."""
_PROBES = 4
"""Features of each group whose squares are summed a second time, in turn."""
_RUN = 512
"""Squares that are summed one after the other."""
_LARGEST_ERROR = 2e-6
_BIAS = 4e-7
"""Largest error of a float32 product's diagonal, of its largest entry, and that of its sum. Where rows take only a few
distinct values (bfloat16 far from zero, two-valued features, a constant background), so do the products, and a float32
sum rounds the same way at every step: by 1.5e-5 at 8192 rows. Sums that round at random are below 1.2e-6 and 2e-7."""


@dataclass(slots=True)
class _Group:
    """Centred rows, (n, D) `by_rows`, else (D, n), and what is known of them: D values each.

    `mean` is what was subtracted, `residual` the mean of what is left, None where it does not matter. `squares` are
    the sums of squares, None where the rows are float64.
    """

    n: int
    weight: float
    mean: npt.NDArray[Any]
    residual: F64 | None
    centred: Tensor
    by_rows: bool
    squares: F64 | None = None
    largest: float = 0.0


def stage_rows(features: int) -> int:
    """Rows that are held back at most."""
    fewest, most = _STAGE_ROWS
    return min(most, max(fewest, _STAGE_ELEMENTS // features))


class HostAccumulator(Accumulator):
    """An accumulator in the host's memory: non-finite rows and products that leave float32 are seen, and redone."""

    def __init__(self, features: int, workspace: Workspace, precision: torch.dtype = torch.float32) -> None:
        super().__init__(features, workspace, precision)
        # numpy adds float32 to float64 four times as fast as torch, and indexes without a dispatch
        self._blocks_np: list[F64] = [block.numpy() for block in self._blocks]
        self._counts_np: F64 = self._counts.numpy()
        self._means_np: F64 = self._means.numpy()
        self._residuals_np: F64 = self._residuals.numpy()
        self._rows, self._dropped = 0, 0
        self._capacity = stage_rows(features)
        self._stage: Tensor | None = None
        self._staged = 0
        # What rows must have in common to wait together: dtype, whether they are feature maps, weight.
        self._kind: tuple[torch.dtype, bool, float] | None = None
        # Groups that share a centre: how many more may, and Σw(z − centre) and Σw of those that did.
        self._narrow = len(product_blocks(features, fast=onednn() is not None)) == 1
        self._whole = tuple(range(len(self._plan.blocks)))
        self._shift: Tensor | None = None
        self._shift_left = 0
        self._shifted: F64 = np.zeros(features)
        self._shifted_count = 0.0

    def add(self, rows: Tensor, keep: Tensor | None = None, weight: float = 1.0) -> None:
        """See `Accumulator.add`."""
        x = self._checked(rows)
        if self.adding:
            return
        if x.device != self.workspace.device:
            x, keep = x.to(self.workspace.device), None if keep is None else keep.to(self.workspace.device)
        if keep is not None:
            x = x if keep.all() else x[keep]
        n = x.numel() // self.features
        if n == 0:
            return
        capacity = self._capacity // 2 if x.dtype == torch.float64 else self._capacity
        if 2 * n <= capacity:
            self._hold_back(x, n, weight, capacity)
            return
        for chunk in chunks(x if x.dim() > 1 else x.unsqueeze(0)):
            n = chunk.numel() // self.features
            if 2 * n <= capacity:
                self._hold_back(chunk, n, weight, capacity)
            else:
                self._reduce(chunk, n, weight, chunk.dtype)

    # --- small batches -------------------------------------------------------------------------------------

    def _hold_back(self, x: Tensor, n: int, weight: float, capacity: int) -> None:
        """Copy rows into the stage, which holds (N, D), or (D, N) of feature maps: as they lie in memory."""
        maps = x.dim() > 2 and x.stride(-1) != 1
        kind = (x.dtype, maps, weight)
        if kind != self._kind or self._staged + n > capacity:
            self._reduce_stage()
            self._kind = kind
        stage = self._stage_for(x.dtype, capacity)
        first, last = self._staged, self._staged + n
        if maps:
            stage.view(self.features, -1)[:, first:last].view(self.features, *x.shape[:-1]).copy_(x.movedim(-1, 0))
        else:
            stage[first:last].view(x.shape).copy_(x)
        self._staged = last
        if last + n > capacity:
            self._reduce_stage()

    def _stage_for(self, dtype: torch.dtype, capacity: int) -> Tensor:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        if self._stage is None or self._stage.dtype != wide:
            self._stage = empty((capacity, self.features), wide, self.workspace.device)
        return self._stage

    def _reduce_stage(self) -> None:
        """Make a group of the rows that were held back."""
        if not self._staged:
            return
        assert self._stage is not None
        assert self._kind is not None
        dtype, maps, weight = self._kind
        n = self._staged
        rows = self._stage.view(self.features, -1)[:, :n].t() if maps else self._stage[:n]
        # An interrupt from here on parts the rows of earlier forwards from their count, too.
        self.adding, self._staged = True, 0
        self._reduce(rows, n, weight, dtype)
        self.adding = False

    def _finish(self) -> None:
        if self.precision == torch.float64:
            self._end_shift()  # those groups' products are in float32
        self._reduce_stage()
        self._stage = None
        self._end_shift()

    # --- one group -----------------------------------------------------------------------------------------

    def _reduce(self, x: Tensor, n: int, weight: float, dtype: torch.dtype) -> None:
        """Look at the mean, which is non-finite as soon as any value is, and at the squares.

        `dtype` is what the rows were before they came into the stage.
        """
        if self._shift_left and dtype != torch.float64 and self._reduce_shifted(x, n, weight):
            return
        loaded, by_rows = self._load(x, n)
        axis = 0 if by_rows else 1  # of the observations
        centre = loaded.mean(axis)
        if dtype.itemsize == 2:  # a mean of half precision is on the values' own grid
            centre = centre.to(dtype).to(torch.float32)
        mean = centre.numpy()
        offset = max(float(mean.max()), -float(mean.min()))
        if not offset < (LARGEST if dtype == torch.float64 else FLOAT32_MAX):
            self._add_irregular(x.reshape(n, self.features), weight)
            return
        centred = self._centre(loaded, centre.unsqueeze(axis))
        squares = self._squares(centred, axis)
        largest = float(squares.max())
        smallest, most = _SQUARES[self.precision]
        noise = n * (_CENTRE_NOISE[centre.dtype] * offset) ** 2
        if max(smallest, noise) < largest < most or (dtype != torch.float64 and not centred.any()):
            residual = None
            # Where no mean is above the spread, what a float32 one is rounded by changes the covariance by 1e-10.
            if n * offset * offset > largest or dtype.itemsize == 2 or self.precision == torch.float64:
                residual = np.divide(centred.sum(axis).numpy(), n, dtype=np.float64)
            self._keep(_Group(n, weight, mean, residual, centred, by_rows, squares, largest))
            if self._narrow and self.precision == torch.float32:
                self._end_shift()
                self._shift, self._shift_left = centre, _SHIFTED
        else:
            self._add_irregular(x.reshape(n, self.features), weight)

    def _load(self, x: Tensor, n: int, centre: Tensor | None = None) -> tuple[Tensor, bool]:
        """The rows in scratch memory, float64 if they are, else float32: (n, D), or (D, n); and whether the first.

        With a `centre`, float32, less that.
        """
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        by_rows = False
        if x.dim() > 1 and x.stride(-1) != 1:  # a feature map lies feature by feature already
            x = x.movedim(-1, 0)
            loaded = self.workspace.scratch("rows", (self.features, n), dtype)
            centre = None if centre is None else centre.view(-1, *[1] * (x.dim() - 1))
        elif wants_rows(self.features):
            loaded, by_rows = self.workspace.scratch("rows", (n, self.features), dtype), True
        else:
            if x.dim() != 2 or x.dtype != dtype or not x.is_contiguous():
                # torch turns a matrix quickly only if it is contiguous and of the same type.
                x = self.workspace.scratch("turned", x.shape, dtype).copy_(x).view(n, self.features)
            loaded = self.workspace.scratch("rows", (self.features, n), dtype).copy_(x.t())
            return loaded if centre is None else loaded.sub_(centre[:, None]), False
        if centre is None:
            loaded.view(x.shape).copy_(x)
        else:
            torch.sub(x, centre, out=loaded.view(x.shape))
        return loaded, by_rows

    def _centre(self, loaded: Tensor, centre: Tensor) -> Tensor:
        """Centred rows in the products' precision, in scratch memory."""
        if loaded.dtype == torch.float32 and self.precision == torch.float64:
            loaded = self.workspace.scratch("centred", loaded.shape, torch.float64).copy_(loaded)
        centred = loaded.sub_(centre)
        if centred.dtype != self.precision:
            centred = self.workspace.scratch("centred", loaded.shape, self.precision).copy_(centred)
        return centred

    def _squares(self, centred: Tensor, axis: int) -> F64:
        """The features' sums of squares, right to 1e-7: short runs, or cascades, whatever the rows hold."""
        n = centred.shape[axis]
        if axis == 1 and n % _RUN == 0 and centred.dtype == torch.float32:  # a pass that writes nothing
            norms: F64 = torch.linalg.vector_norm(centred.view(len(centred), -1, _RUN), dim=2).numpy()
            sums: F64 = np.square(norms, dtype=np.float64).sum(1)
            return sums
        squares = torch.mul(centred, centred, out=self.workspace.scratch("squares", centred.shape, centred.dtype))
        sums = squares.sum(axis).numpy().astype(np.float64)
        return sums

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
            centred = kept - centre
            self._keep(_Group(n, weight, centre.numpy(), centred.mean(0).numpy(), centred, by_rows=True))

    def _keep(self, group: _Group) -> None:
        """Add a group: its product, of which one block is in memory at a time, and its mean."""
        self.adding = True
        with ieee_products(group.centred):
            for block in upper_product(group.centred, by_rows=group.by_rows):
                values = self._trusted(block, group)
                if group.weight != 1:
                    values = np.multiply(values, group.weight, dtype=np.float64)
                self._add_block(values, block.covered)
        slot = self._slot()
        self._rows += group.n
        self._counts_np[slot] = group.n * group.weight
        if group.residual is None:  # after a fold these are zeros
            self._means_np[slot] = group.mean
        else:
            self._residuals_np[slot] = group.residual
            np.add(group.mean, group.residual, out=self._means_np[slot])
        self.adding = False

    def _add_block(self, values: npt.NDArray[Any], covered: tuple[int, ...]) -> None:
        origin = self._plan.blocks[covered[0]][0]
        for index in covered:
            first, height, _ = self._plan.blocks[index]
            start = first - origin
            total = self._blocks_np[index]
            np.add(total, values[start : start + height, start:], out=total)

    def _trusted(self, block: Block, group: _Group) -> npt.NDArray[Any]:
        """A block's values with better sums of squares, or from float64 where float32 sums this layer badly.

        torch sums by cascades, right to 1e-7, a product in one long chain. In that of the diagonal, where nothing is
        negative, most of the product's error is, up to 1e-6.
        """
        values: npt.NDArray[Any] = block.values.numpy()
        if group.squares is None or values.dtype == np.float64:
            return values
        height = len(values)
        expected = group.squares[block.first : block.first + height]
        diagonal = np.einsum("ii->i", values[:, :height])
        apart = diagonal - expected
        limit = _LARGEST_ERROR * group.largest
        # Written so that what is not a number fails.
        if apart.max() <= limit and apart.min() >= -limit and abs(apart.sum()) <= _BIAS * expected.sum() + limit:
            diagonal[:] = expected
            return values
        self.precision = torch.float64  # from the next group on
        wide = (group.centred if group.by_rows else group.centred.t()).double()
        return (wide[:, block.first : block.first + height].t() @ wide[:, block.first :]).numpy()

    # --- groups that share a centre -------------------------------------------------------------------------

    def _reduce_shifted(self, x: Tensor, n: int, weight: float) -> bool:
        """Reduce a group about the centre of one before; False, with nothing done, where that is not near enough.

        All these groups together are one whose residual is the mean of what is left of them.
        """
        first = self._shift_left * _PROBES % max(1, self.features - _PROBES + 1)
        values, sums, probed = self._about_shift(x, n, first)
        diagonal = np.einsum("ii->i", values)
        largest = float(diagonal.max())
        far = max(float(sums.max()), -float(sums.min()))
        # Written so that what is not a number fails.
        if not (far * far <= _NEAR * n * largest and _SQUARES[torch.float32][0] < largest < FLOAT32_MAX):
            self._shift_left = 0
            return False
        apart = diagonal[first : first + _PROBES] - probed
        if not max(float(apart.max()), -float(apart.min())) <= _LARGEST_ERROR * largest:
            self._shift_left = 0
            return False
        self.adding = True
        self._add_block(values if weight == 1 else np.multiply(values, weight, dtype=np.float64), self._whole)
        self._rows += n
        self._shifted += sums if weight == 1 else np.multiply(sums, weight, dtype=np.float64)
        self._shifted_count += n * weight
        self._shift_left -= 1
        self.adding = False
        return True

    def _about_shift(self, x: Tensor, n: int, first: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any], F64]:
        """The product and the sums of rows less the shared centre, and the sums of squares of some features."""
        assert self._shift is not None
        probes = slice(first, first + _PROBES)
        centred, by_rows = self._load(x, n, self._shift)
        with ieee_products(centred):
            (block,) = upper_product(centred, by_rows=by_rows)
        axis = 0 if by_rows else 1
        probed = centred[:, probes] if by_rows else centred[probes]
        squares: F64 = torch.mul(probed, probed).sum(axis).numpy()
        return block.values.numpy(), centred.sum(axis).numpy(), squares

    def _end_shift(self) -> None:
        """Make one group of those that share a centre."""
        if self._shifted_count:
            assert self._shift is not None
            self.adding = True
            slot = self._slot()
            self._counts_np[slot] = self._shifted_count
            np.divide(self._shifted, self._shifted_count, out=self._residuals_np[slot])
            np.add(self._shift.numpy(), self._residuals_np[slot], out=self._means_np[slot])
            self._shifted[:] = 0.0
            self._shifted_count = 0.0
            self.adding = False
        self._shift_left = 0

    @property
    def held_bytes(self) -> int:
        """Bytes that this accumulator holds now; of its stage, those that are written, as others take no memory."""
        row = 0 if self._stage is None else self._stage.element_size() * self.features
        return Accumulator.nbytes(self.features) + row * self._staged

    @staticmethod
    def nbytes(features: int) -> int:
        """Bytes that an accumulator of this many features holds at most, its stage included."""
        return Accumulator.nbytes(features) + 4 * stage_rows(features) * features

    @staticmethod
    def scratch_bytes(features: int, rows: int) -> int:
        """Most bytes of scratch memory that groups of this many rows take, be they in float32 or in float64.

        A group has three buffers in the one case, or four in the other, and one block of a product in each.
        """
        return (3 * 4 + 4 * 8) * rows * features + (4 + 8) * features * features
