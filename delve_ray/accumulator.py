"""Accumulating the moments of a layer's rows where the rows are: on the device, inside the forward hook.

Shapes in names: N observations, D features, K groups waiting to be folded.

Rows are reduced in groups. Each group is centred by its own mean, so that products in float32 are safe at any offset
(raw float32 sums are not: at mean/spread 700 they turn an intrinsic dimensionality of 99 into 71), and its scatter is
added to a float64 sum. What the merge formula adds between groups (see `moments`) needs only their counts and means,
so these wait and are folded in with one matrix product for many groups.

The float32 mean c that centres a group is rounded. With r = Σ(z − c) the exact mean is c + r/n and the
scatter about it is Σ(z − c)ᵀ(z − c) − n·(r/n)(r/n)ᵀ; the correction is folded in with the same product.

A group may have a weight w: its rows then count as if each had been there w times. Only the upper triangle is computed
and kept, in blocks of rows: `workspace.BlockPlan`. How a group is reduced depends on where the rows are:
`host_accumulator` looks at values, `device_accumulator` never waits for the device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from delve_ray.moments import F64, Moments, pack_block, triangle_size
from delve_ray.workspace import Workspace, block_plan, rounds_products, zeros

if TYPE_CHECKING:
    from delve_ray.cuda.lane import Lane
    from delve_ray.device_reservoir import DeviceReservoir
    from delve_ray.groups import Group

NARROW = 16
"""Below this many features a product is memory bound, and BLAS sums it naively (5e-5 of λ1 at 2^18 rows): it is
taken in float64, which costs nothing there."""
LARGEST = 1e140
"""Values beyond it count as non-finite: their squares leave float64 as soon as they are summed."""
FLOAT32_MAX = float(np.finfo(np.float32).max)


class Drained(NamedTuple):
    """What an accumulator says of the moments that it hands over: rows, rows left out, and the rows' total weight."""

    n: int
    nonfinite: int
    weight: float


class Accumulator:
    """The moments of one layer in one phase, on one device.

    `add` takes rows of shape (…, D), any float dtype, any strides, and keeps nothing of them. Not thread-safe.

    Memory: `nbytes`; the sums of wide layers take less than 5d².
    """

    def __init__(self, features: int, workspace: Workspace, precision: torch.dtype = torch.float32) -> None:
        self.features = features
        self.workspace = workspace
        self.precision = torch.float64 if features < NARROW else precision
        self._groups = self._make_sums()
        # Row 0 is the group of everything folded so far; a count is the group's rows times their weight, a
        # residual is r/n, see the module's head.
        self._counts = zeros(self._groups + 1, workspace.device)
        self._means = zeros((self._groups + 1, features), workspace.device)
        self._residuals = zeros((self._groups + 1, features), workspace.device)
        self._waiting = 0
        # Stays set when an interrupt, or no memory, parts a sum from its count; then nothing is added any more.
        self.adding = False
        self.reservoir: DeviceReservoir | None = None
        """A sample of the same rows, where one is asked for; who adds offers them to it, too."""
        self._rows: Tensor | int = zeros((), workspace.device, torch.int64)
        self._dropped: Tensor | int = zeros((), workspace.device, torch.int64)

    def _make_sums(self) -> int:
        """Take the memory of the sums. Returns how many groups may wait."""
        self._plan = block_plan(self.features)
        self._sums = zeros(self._plan.size, self.workspace.device)
        self._blocks = self._plan.views(self._sums)
        return self._plan.groups

    def add(self, rows: Tensor, keep: Tensor | None = None, weight: float = 1.0) -> None:
        """Add rows of shape (…, D); with `keep`, boolean of shape (…), only those where it is True.

        Each counts as if it were there `weight` times. Raises ValueError for another width and TypeError for a dtype
        that is no float.
        """
        raise NotImplementedError

    def _checked(self, rows: Tensor) -> Tensor:
        """The rows without their graph, if they are some."""
        x = rows.detach() if rows.requires_grad else rows
        if x.dim() == 0 or x.shape[-1] != self.features:
            raise ValueError(
                f"rows of shape {tuple(x.shape)} do not have {self.features} features in the last dimension"
            )
        if not x.is_floating_point():
            raise TypeError(f"rows are {x.dtype}; moments are taken of floating point values")
        return x

    # --- between groups ----------------------------------------------------------------------------------

    def _slot(self) -> int:
        """Index of the next group, after folding the waiting ones if there is no room."""
        if self._waiting == self._groups:
            self._fold()
        self._waiting += 1
        return self._waiting

    def _note(self, group: Group, weight: float) -> None:
        """Note a group's mean and rows, once its product is in the sums."""
        slot = self._slot()
        self._rows += group.n
        self._dropped += group.dropped
        self._counts[slot] = group.n.double() * weight
        self._residuals[slot] = group.residual
        self._means[slot] = group.mean

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
        mean = reference + (counts[:, None] * (means - reference)).sum(0) / torch.where(total > 0, total, 1.0)
        weight = counts.sqrt()[:, None]
        between = (means - mean) * weight
        rounding = residuals * weight
        self._add_product(torch.cat([between, rounding]), torch.cat([between, -rounding]))
        self._counts.zero_()
        self._residuals.zero_()
        self._counts[0] = total
        self._means[0] = mean
        self._waiting = 0

    def _add_product(self, left: Tensor, right: Tensor) -> None:
        """Add leftᵀ·right to the sums, float64 matrices of D columns whose product is symmetric."""
        for (first, height, _), block in zip(self._plan.blocks, self._blocks, strict=True):
            block.addmm_(left[:, first : first + height].t(), right[:, first:])

    # --- reading -----------------------------------------------------------------------------------------

    @property
    def moments_size(self) -> int:
        """Values that `drain_into` writes."""
        return self.features + triangle_size(self.features)

    def _finish(self) -> None:
        """Reduce what still waits; called by the sender's thread."""

    def drain_into(self, buffer: F64, workspace: Workspace | None = None) -> Drained:
        """Write mean (d) and packed scatter (d(d+1)/2) into `buffer`, of `moments_size`.

        Called by the packer's thread, on an accumulator that no hook can reach any more, with scratch memory of that
        thread's own. Waits for the device; the accumulator is used up.
        """
        if workspace is not None and workspace.device == self.workspace.device:
            self.workspace = workspace
        if buffer.shape != (self.moments_size,):
            raise ValueError(
                f"the buffer has shape {buffer.shape}, moments of {self.features} features need ({self.moments_size},)"
            )
        if workspace is not None and rounds_products(self.workspace.device):
            # The training's own products go on meanwhile, rounded as the user wants them.
            self.precision = torch.float64
        self._finish()
        self._fold()
        sums, mean, n, dropped, weight = self._read()
        buffer[: self.features] = mean
        self._pack(sums, buffer[self.features :])
        return Drained(n, dropped, weight)

    def _pack(self, sums: F64, packed: F64) -> None:
        """Write the sums in packed form."""
        # What centring a constant feature rounds may be taken away once too often: -1e-30 for a variance of 0.
        sums[self._plan.diagonal] = np.maximum(sums[self._plan.diagonal], 0.0)
        start = 0
        for block in self._plan.views(torch.from_numpy(sums)):
            height, width = block.shape
            size = triangle_size(height) + height * (width - height)
            pack_block(block.numpy(), packed[start : start + size])
            start += size

    def _read(self) -> tuple[F64, F64, int, int, float]:
        """On the host: sums, mean, rows, rows left out and the rows' weight."""
        return self._sums.numpy(), self._means[0].numpy(), int(self._rows), int(self._dropped), float(self._counts[0])

    def _read_through(self, lane: Lane) -> tuple[F64, F64, int, int, float]:
        """`_read` of sums that lie on a device, as `lane` downloads them."""
        with lane.work():
            counted = [self._counts[0], *(torch.as_tensor(count).double() for count in (self._rows, self._dropped))]
            numbers = torch.stack(counted)
        weight, n, dropped = lane.download(numbers)
        return lane.download(self._sums), lane.download(self._means[0]), int(n), int(dropped), float(weight)

    def moments(self) -> Moments:
        """The moments so far, as float64 on the host; uses the accumulator up like `drain_into`."""
        buffer = np.empty(self.moments_size)
        n = self.drain_into(buffer).n
        return Moments.from_packed(n, buffer[: self.features], buffer[self.features :])

    @property
    def held_bytes(self) -> int:
        """Bytes that this accumulator holds now."""
        return self.nbytes(self.features)

    @staticmethod
    def nbytes(features: int) -> int:
        """Bytes that an accumulator of this many features holds at most."""
        plan = block_plan(features)
        return 8 * (plan.size + (2 * features + 1) * (plan.groups + 1))
