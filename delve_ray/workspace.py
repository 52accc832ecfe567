"""What the accumulators of a device have in common: the cut of a product into blocks, and scratch memory."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
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


class _Setting:
    """What the user lets float32 products of a device be rounded to: one setting for all threads of the process."""

    def __init__(self) -> None:
        self.lock = threading.RLock()  # a signal's handler that closes the tracker may interrupt who has it
        self.holders = 0
        self.restore: Callable[[], None] = lambda: None


_SETTINGS = {"cpu": _Setting(), "cuda": _Setting()}


def _setting(device: torch.device) -> _Setting:
    return _SETTINGS["cuda" if device.type == "cuda" else "cpu"]


def rounds_products(device: torch.device) -> bool:
    """Whether the user lets float32 products be rounded to TF32 or bfloat16, whoever keeps that out at the moment."""
    setting = _setting(device)
    with setting.lock:
        return setting.holders > 0 or not _is_ieee(_backend(device), device)


@contextmanager
def ieee_products(like: Tensor) -> Iterator[None]:
    """Keep TF32 and bfloat16 out of float32 products, whatever the user chose for the training.

    That is a setting of the whole process: only for the thread that trains, whose own products wait meanwhile. Another
    thread takes its products in float64, which knows no such setting, where `rounds_products` says so.
    """
    if like.dtype == torch.float64:
        yield
        return
    setting, backend = _setting(like.device), _backend(like.device)
    with setting.lock:
        if held := setting.holders > 0 or not _is_ieee(backend, like.device):
            if not setting.holders:
                setting.restore = _make_ieee(backend)
            setting.holders += 1
    try:
        yield
    finally:
        if held:
            with setting.lock:  # the last one restores it: the threads of DataParallel are in here side by side
                setting.holders -= 1
                if not setting.holders:
                    setting.restore()


def _backend(device: torch.device) -> Any:
    backends: Any = torch.backends
    return backends.cuda.matmul if device.type == "cuda" else getattr(backends.mkldnn, "matmul", None)


def _is_ieee(backend: Any, device: torch.device) -> bool:
    chosen = getattr(backend, "fp32_precision", None)
    if chosen is None:  # torch < 2.9
        return device.type != "cuda" or not backend.allow_tf32
    return chosen in ("ieee", "none")


def _make_ieee(backend: Any) -> Callable[[], None]:
    """Change the setting; returns what restores it."""
    chosen = getattr(backend, "fp32_precision", None)
    if chosen is None:
        backend.allow_tf32 = False
        return partial(setattr, backend, "allow_tf32", True)
    # What comes from a wider setting is given back as such, so that it goes on following it.
    backend.fp32_precision = "none"
    inherited = backend.fp32_precision == chosen
    backend.fp32_precision = "ieee"
    return partial(setattr, backend, "fp32_precision", "none" if inherited else chosen)
