"""A group of rows on a device that must not be waited for: made ready for products by masks and scaling alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from delve_ray.accumulator import FLOAT32_MAX, LARGEST

_GRID_ROWS = 128
"""Rows from which a device learns how coarse a centre may be."""
_LARGEST_SCALING = 100
"""Rows on a device are scaled up by 2^100 at most: 2^-149, the smallest float32, is then 2^-49."""


@dataclass(frozen=True, slots=True)
class Group:
    """What is known of a group, all on its device: rows that count and rows left out, int64; the mean of the rows as
    they were, and of what was left after a rounded one was subtracted, float64 (D,); and what products are to be
    multiplied with, squared, float64.
    """

    n: Tensor
    dropped: Tensor
    mean: Tensor
    residual: Tensor
    up: Tensor


def centre_group(rows: Tensor, keep: Tensor | None, *, wide: bool) -> Group:
    """Centre rows (N, D), float32 or float64, in place; those that do not count become zeros.

    Rows are scaled by a power of two before they are squared, so that no float32 product overflows or vanishes; a
    product is scaled back in float64. `wide` says that the rows came as float64, and may be up to `LARGEST`.
    """
    largest = LARGEST if wide else FLOAT32_MAX
    good = (rows.abs() <= largest).all(dim=1, keepdim=True)
    if keep is None:
        n = good.sum(dtype=torch.int64)
        dropped = rows.shape[0] - n
    else:
        kept, good = keep.sum(dtype=torch.int64), good & keep[:, None]
        n = good.sum(dtype=torch.int64)
        dropped = kept - n
    rows.masked_fill_(~good, 0.0)
    exponent = torch.frexp(rows.abs().amax())[1].clamp(min=-_LARGEST_SCALING)
    down = torch.ldexp(torch.ones((), dtype=rows.dtype, device=rows.device), -exponent)
    rows.mul_(down)
    at_least_one = n.clamp(min=1)
    # Summed in float64, so that the mean of identical rows is that row.
    centre = (rows.sum(0, dtype=torch.float64) / at_least_one).to(rows.dtype)
    centre = _on_grid(centre, rows[:_GRID_ROWS], good[:_GRID_ROWS])
    rows.sub_(centre).masked_fill_(~good, 0.0)
    residual = rows.sum(0).double() / at_least_one
    up = torch.ldexp(torch.ones((), dtype=torch.float64, device=rows.device), exponent)
    return Group(n, dropped, (residual + centre) * up, residual * up, up)


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
