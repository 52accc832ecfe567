"""Feature maps: the rows that `conv_method` makes of their positions, and interpolation before.

Letters in names: B batch, C channels, P positions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from delve_ray.errors import Unrecordable

if TYPE_CHECKING:
    from delve_ray.layers import RowOptions

_WIDE_ELEMENTS = 1 << 20
"""Values that are converted to float64 at a time."""
_LINEAR_BY_DIMENSIONS = {1: "linear", 2: "bilinear", 3: "trilinear"}


def feature_map_rows(x: Tensor, options: RowOptions) -> Tensor:
    """Rows of a feature map B×C×positions under `conv_method`, after interpolation where it is asked for."""
    if options.interpolation_strategy is not None and max(x.shape[2:], default=0) > options.interpolation_downsampling:
        x = _interpolate(x, options.interpolation_strategy, options.interpolation_downsampling)
    method = options.conv_method
    if method == "channelwise" or x.dim() == 2:
        return x.movedim(1, -1)
    x_BCP = x.flatten(2)
    if method == "mean":
        return _wide_mean(x_BCP)
    if method == "max":
        return x_BCP.amax(-1)
    return x_BCP.median(-1).values if method == "median" else x.flatten(1)


def _wide_mean(x_BCP: Tensor) -> Tensor:
    """Means over positions, in float64: at a mean far above the spread a float32 mean is wrong by too much of it."""
    if torch.compiler.is_compiling() or x_BCP.numel() <= _WIDE_ELEMENTS:
        return x_BCP.mean(-1, dtype=torch.float64)
    # torch converts before it sums: a piece at a time, in memory allocated once, or the copy is twice the output.
    batch, channels, positions = x_BCP.shape
    step = max(1, _WIDE_ELEMENTS // (channels * positions))
    wide = torch.empty((step, channels, positions), dtype=torch.float64, device=x_BCP.device)
    means = torch.empty((batch, channels), dtype=torch.float64, device=x_BCP.device)
    for first in range(0, batch, step):
        part = x_BCP[first : first + step].detach()
        torch.mean(wide[: len(part)].copy_(part), -1, out=means[first : first + len(part)])
    return means


def _interpolate(x: Tensor, strategy: str, size: int) -> Tensor:
    """`x` resized to `size` along every dimension of its positions, by torch's interpolate."""
    dimensions = x.dim() - 2
    mode = _LINEAR_BY_DIMENSIONS[dimensions] if strategy.endswith("linear") else strategy
    if mode == "bicubic" and dimensions != 2:
        raise Unrecordable(
            f"interpolation_strategy='bicubic' resizes maps of 2 dimensions, its output has {dimensions}; use 'area' "
            f"or 'linear'"
        )
    # Interpolation in half precision is not there on every device.
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    return F.interpolate(wide, size=(size,) * dimensions, mode=mode)
