"""Symmetric products on the CPU: which kernel computes them, from which layout, and in how many blocks.

Letters: N observations, D features. Rows lie either as x_ND, one observation after the other, or as x_DN, one feature
after the other, both contiguous. Only blocks that hold some of the upper triangle are computed.

torch.mm is MKL's, which does not use AVX-512 on AMD; oneDNN's kernels are compiled for the processor that they run on.
Measured in µs (AMD EPYC, AVX-512, 2 threads, torch 2.13, float32); turning x_ND into x_DN takes 100 per 2^18 values:

    N      D      torch.mm   the same in blocks   oneDNN on x_DN   the same in blocks
    8192   32     94                              68
    8192   64     370                             191
    2048   128    352        310 (4)              158
    1024   256    667        555 (8)              291              246 (2)
    1024   512    2558       1740 (8)             1119             840 (2)
    1024   1024   10350      6600 (8)             4440             3000 (4)
    512    4096   84300      47000 (8)            54800            21100 (8)

`python -m tests.benchmarks.products` measures again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from delve_ray.workspace import block_plan

_TURNED = 128
"""Fewest features of which rows are turned for oneDNN; with fewer, that takes longer than it saves."""
_FEWEST_ONEDNN = 32
"""Fewest features of which oneDNN is faster than torch.mm."""
_ONEDNN_BLOCKS = ((4096, 8), (1024, 4), (384, 2))
_MM_BLOCKS = ((256, 8), (128, 4))
"""(features from which on, blocks)."""


@dataclass(frozen=True, slots=True)
class Block:
    """Rows of a product from `first` on, from column `first` on, and which blocks of the plan they cover."""

    first: int
    values: Tensor
    covered: tuple[int, ...]


@lru_cache(maxsize=1)
def onednn() -> Any:
    """X·Wᵀ of float32 matrices by oneDNN, an operator of torch's own compiler; None where it is missing or no faster.

    It is used on processors with AVX-512, and tried on a small product, since torch does not promise it.
    """
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkldnn.is_available():
        return None
    try:
        operator = torch.ops.mkldnn._linear_pointwise.default
        x_DN = torch.arange(6, dtype=torch.float32, device="cpu").view(2, 3)
        found = operator(x_DN, x_DN, None, "none", [], "").tolist()
    except (AttributeError, RuntimeError, TypeError):
        return None
    return operator if found == [[5.0, 14.0], [14.0, 50.0]] else None


def wants_rows(features: int) -> bool:
    """Whether rows that lie one after the other are best left so; else they are turned first."""
    return features < _TURNED or onednn() is None


@lru_cache(maxsize=256)
def product_blocks(features: int, *, fast: bool) -> list[tuple[int, int, tuple[int, ...]]]:
    """Blocks (first row, number of rows, blocks of the plan that it covers) of a product, each computed by one call.

    >>> product_blocks(400, fast=True)
    [(0, 200, (0, 1, 2, 3)), (200, 200, (4, 5, 6, 7))]
    """
    plan = block_plan(features)
    wanted = next((count for least, count in (_ONEDNN_BLOCKS if fast else _MM_BLOCKS) if features >= least), 1)
    each = -(-len(plan.blocks) // wanted)
    found = []
    for start in range(0, len(plan.blocks), each):
        covered = plan.blocks[start : start + each]
        height = sum(height for _, height, _ in covered)
        found.append((covered[0][0], height, tuple(range(start, start + len(covered)))))
    return found


def upper_product(x: Tensor, *, by_rows: bool) -> Iterator[Block]:
    """The product XᵀX of x_ND (`by_rows`) or X·Xᵀ of x_DN, contiguous, float32 or float64, block by block."""
    features = x.shape[1] if by_rows else x.shape[0]
    fast = not by_rows and x.dtype == torch.float32 and features >= _FEWEST_ONEDNN
    linear = onednn() if fast else None
    left, right = (x.t(), x) if by_rows else (x, x.t())
    for first, height, covered in product_blocks(features, fast=linear is not None):
        if linear is not None:
            values = linear(x[first : first + height], x[first:], None, "none", [], "")
        else:
            # With `out=` autocast leaves the product alone.
            out = torch.empty((height, features - first), dtype=x.dtype, device=x.device)
            values = torch.mm(left[first : first + height], right[:, first:], out=out)
        yield Block(first, values, covered)
