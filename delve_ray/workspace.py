"""What the accumulators of a device have in common: the cut of a product into blocks, and scratch memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_GROUPS = 32
"""Most groups whose means wait before they are folded into the float64 sums."""


class BlockPlan:
    """How the upper triangle of a D×D product is cut into dense blocks of rows, laid out one after another.

    Block (first, height) holds rows first … first+height of the product from column `first` on. Four blocks
    compute 5/8 of the full product, eight 9/16; below 96 features one product is faster than several.

    `groups` is how many groups may wait; fewer where that many means would be large beside the sums. From 384
    features on, the sums of both phases and one block of a float32 product take at most 12d² bytes.
    """

    __slots__ = ("blocks", "diagonal", "features", "groups", "size")

    def __init__(self, features: int) -> None:
        count = 1 if features < 96 else 4 if features < 256 else 8
        self.features = features
        self.groups = _GROUPS if features < 256 else min(_GROUPS, features // 56)
        self.blocks: list[tuple[int, int, int]] = []
        diagonal = np.empty(features, dtype=np.int64)
        self.size = 0
        for first in range(0, features, -(-features // count)):
            height = min(-(-features // count), features - first)
            width = features - first
            diagonal[first : first + height] = self.size + np.arange(height) * (width + 1)
            self.blocks.append((first, height, self.size))
            self.size += height * width
        self.diagonal: npt.NDArray[np.int64] = diagonal

    def views(self, flat: Tensor) -> list[Tensor]:
        """The dense blocks, shape (height, D − first) each, as views of a flat buffer of `size` elements."""
        return [flat[start : start + h * (self.features - f)].view(h, -1) for f, h, start in self.blocks]


@lru_cache(maxsize=256)
def block_plan(features: int) -> BlockPlan:
    """The (cached) plan for a number of features."""
    return BlockPlan(features)


class Workspace:
    """Scratch memory that all accumulators of one device share; grows to the largest layer and stays there.

    Holds a chunk of centred rows and one product. Only valid until the next call, so accumulators that share
    a workspace are used under one lock.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.lane: Any = None  # of the accumulators on a device, see `cuda.lane`
        self._flat: dict[tuple[str, torch.dtype], Tensor] = {}
        self._products: dict[tuple[int, torch.dtype], tuple[Tensor, list[Tensor]]] = {}

    def _buffer(self, role: str, size: int, dtype: torch.dtype) -> Tensor:
        buffer = self._flat.get((role, dtype))
        if buffer is None or buffer.numel() < size:
            buffer = self._flat[role, dtype] = empty(size, dtype, self.device)
            if role == "product":
                self._products = {key: views for key, views in self._products.items() if key[1] != dtype}
        return buffer[:size]

    def rows(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """An uninitialised contiguous tensor of this shape."""
        return self.scratch("rows", shape, dtype)

    def scratch(self, role: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised contiguous tensor of this shape; those of different roles may be used side by side."""
        return self._buffer(role, math.prod(shape), dtype).view(shape)

    def product(self, plan: BlockPlan, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        """An uninitialised flat product and its blocks."""
        found = self._products.get((plan.features, dtype))
        if found is None:
            flat = self._buffer("product", plan.size, dtype)
            found = self._products[plan.features, dtype] = (flat, plan.views(flat))
        return found


def empty(size: int | tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised tensor."""
    # Tensors made inside inference mode could not be written to outside of it.
    with torch.inference_mode(False):
        return torch.empty(size, dtype=dtype, device=device)


def zeros(size: int | tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.float64) -> Tensor:
    """A tensor of zeros."""
    with torch.inference_mode(False):
        return torch.zeros(size, dtype=dtype, device=device)


@contextmanager
def ieee_products(device: torch.device) -> Iterator[None]:
    """Keep TF32 and bfloat16 out of float32 products, whatever the user chose for the training."""
    backends: Any = torch.backends
    backend: Any = backends.cuda.matmul if device.type == "cuda" else getattr(backends.mkldnn, "matmul", None)
    chosen = getattr(backend, "fp32_precision", None)
    if chosen in (None, "ieee", "none"):
        if chosen is None and device.type == "cuda" and backend.allow_tf32:  # torch < 2.9
            backend.allow_tf32 = False
            try:
                yield
            finally:
                backend.allow_tf32 = True
            return
        yield
        return
    # What comes from a wider setting is given back as such, so that it goes on following it.
    backend.fp32_precision = "none"
    inherited = backend.fp32_precision == chosen
    backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        backend.fp32_precision = "none" if inherited else chosen
