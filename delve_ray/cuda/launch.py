"""Launching the Triton kernels: block sizes, splits and scratch memory for a group of rows. See `wide` and `narrow`.

What depends only on the shape of a group, a plan, is kept: the next group of this shape costs little more than the
launches themselves.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from delve_ray.cuda import narrow, wide
from delve_ray.workspace import block_plan, empty

NARROW = 128
"""Most features of the narrow kernels."""
_PROGRAMS = 264
"""Programs that keep all multiprocessors of a large device busy."""
_SPLIT_ROWS = (128, 4096)
"""Fewest and most rows of a split: with fewer, adding the splits takes longer than computing them; a float32 sum of
more steps would come near its tolerance."""
_NARROW_TILES = ((64, 4, 256), (128, 8, 128))
"""Up to 64 and up to 128 features: side of the tile, warps, most splits."""
_NARROW_MERGE = (8, 128, 8)
"""Side of what a program of `narrow.merge` adds, splits that it adds at a time, warps."""
_TAKES_CONSTANTS = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 3)
_PLANS = 256
"""Shapes of groups that are remembered."""


class Total(NamedTuple):
    """The moments that a group is merged into: flat float64 blocks, counts and means in two rows, rows, rows left out.

    And the centres and exponents that the narrow kernels try first, and the weight of a row.
    """

    sums: Tensor
    counts: Tensor
    means: Tensor
    rows: Tensor
    dropped: Tensor
    hint_centres: Tensor
    hint_exponents: Tensor
    weight: Tensor


class Place(NamedTuple):
    """Where n = outer·inner rows of D features lie: row r at (r // inner)·stride_outer + (r % inner)·stride_n."""

    n: int
    features: int
    inner: int
    stride_outer: int
    stride_n: int
    stride_d: int

    @property
    def is_map(self) -> bool:
        """Whether the rows do not simply follow one another."""
        return self.inner != self.n

    @property
    def align(self) -> int:
        """So many rows of a feature map are side by side, from a multiple of it on: they are read at once."""
        return math.gcd(self.inner, self.stride_outer, self.stride_d, 16) if self.is_map and self.stride_n == 1 else 1


def place_of(x: Tensor) -> Place | None:
    """How the rows (…, D) of a tensor lie, where the kernels can read them as they are."""
    return _place(tuple(x.shape), x.stride())


@functools.lru_cache(maxsize=1024)
def _place(shape: tuple[int, ...], all_strides: tuple[int, ...]) -> Place | None:
    *sizes, features = shape
    *strides, stride_d = all_strides
    joined: list[tuple[int, int]] = []  # (size, stride), innermost last
    for size, stride in zip(sizes, strides, strict=True):
        if size == 1:
            continue
        if joined and joined[-1][1] == size * stride:
            joined[-1] = (joined[-1][0] * size, stride)
        else:
            joined.append((size, stride))
    reach = sum((size - 1) * stride for size, stride in zip(shape, all_strides, strict=True))
    if len(joined) > 2 or reach >= 1 << 31:
        return None
    inner, stride_n = joined[-1] if joined else (1, features)
    outer, stride_outer = joined[0] if len(joined) == 2 else (1, 0)
    return Place(outer * inner, features, inner, stride_outer, stride_n, stride_d)


_COMPILED: dict[tuple[Any, ...], Any] = {}
"""Compiled kernels by what they were compiled for."""


class _Launch:
    """A kernel with its grid and constants; from the second time on Triton need not find out what to run.

    `kind` is what Triton compiles it for beside the constants: types, alignments, strides of 1.
    """

    def __init__(
        self, kernel: Any, grid: tuple[int, ...], kind: tuple[Any, ...], warps: int = 4, **constants: Any
    ) -> None:
        self._kernel = kernel
        self._grid = (*grid, 1, 1)[:3]
        self._constants = constants
        self._values = tuple(constants.values())
        self._options = {"num_warps": warps, "num_stages": 3}
        self._key = (kernel, kind, self._values, warps)
        self._compiled: Any = _COMPILED.get(self._key)

    def __call__(self, *arguments: Any) -> None:
        if self._compiled is not None:
            # An address spares Triton asking the driver for it.
            given = [value.data_ptr() if isinstance(value, Tensor) else value for value in arguments]
            self._compiled[self._grid](*given, *self._values)
            return
        compiled = self._kernel[self._grid](*arguments, **self._constants, **self._options)
        # In older versions a compiled kernel did not take the constants.
        if _TAKES_CONSTANTS and hasattr(compiled, "packed_metadata"):
            self._compiled = _COMPILED[self._key] = compiled


Plan = Callable[[Tensor, "Tensor | None", Total, int], None]


class Scratch:
    """Memory in which kernels hand results to each other, and the plans that use it; for one stream at a time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._epoch = 0
        self._buffers: dict[str, Tensor] = {}
        self._plans: dict[tuple[Any, ...], Plan] = {}

    def reduce(self, x: Tensor, place: Place, keep: Tensor | None, total: Total, old: int, precision: int) -> None:
        """Merge rows, those to keep of them, into `total`, whose row `old` is replaced by `1 - old`.

        `keep` is boolean, contiguous, of n elements.
        """
        aligned = x.data_ptr() % 16 == 0, keep is None or keep.data_ptr() % 16 == 0
        key = (place, x.dtype, keep is None, aligned, precision)
        plan = self._plans.get(key)
        if plan is None:
            if len(self._plans) >= _PLANS:
                self._plans.clear()
            make = self._narrow if place.features <= NARROW else self._wide
            sizes = (place.n, place.features, place.stride_n, place.stride_d)
            kind = (self.device, x.dtype, *aligned, *[(size == 1, size % 16 == 0) for size in sizes])
            plan = self._plans[key] = make(place, kind, x.element_size() == 2, keep is not None, precision)
        plan(x, keep, total, old)

    def _get(self, role: str, size: int, dtype: torch.dtype) -> Tensor:
        """At least this many elements; zeros when they are new."""
        buffer = self._buffers.get(role)
        if buffer is None or buffer.numel() < size:
            buffer = self._buffers[role] = empty(size, dtype, self.device).zero_()
            self._plans.clear()  # they hold the smaller one
        return buffer

    def _narrow(self, place: Place, kind: tuple[Any, ...], half: bool, masked: bool, precision: int) -> Plan:
        n, features = place.n, place.features
        block, warps, most = _NARROW_TILES[features > 64]
        each = min(max(_up(-(-n // most), 32), _SPLIT_ROWS[0]), _SPLIT_ROWS[1])
        splits = -(-n // each)
        good = self._get("good", n, torch.int8)
        results = (
            self._get("partial", splits * block**2, torch.float32),
            self._get("counts", 2 * splits, torch.int32),
            self._get("means", splits * features, torch.float64),
            self._get("residuals", splits * features, torch.float64),
            self._get("exponents", splits * features, torch.int32),
        )
        constants = {"PRECISION": precision, "HALF": half, "MASKED": masked, "MAP": place.is_map, "ALIGN": place.align}
        reduce = _Launch(narrow.reduce, (splits,), kind, warps, **constants, BLOCK=block, BLOCK_N=32)
        side, step, merge_warps = _NARROW_MERGE
        programs = (block // side) ** 2
        merge = _Launch(narrow.merge, (programs,), (self.device,), merge_warps, BLOCK=block, BLOCK_M=side, BLOCK_S=step)
        sizes = (*place, each, 0.0)
        height = block_plan(features).blocks[0][1]

        def plan(x: Tensor, keep: Tensor | None, total: Total, old: int) -> None:
            hints = (total.hint_centres, total.hint_exponents)
            reduce(x, good if keep is None else keep, good, *results, *hints, *sizes)
            merged = (total.weight, *hints, total.rows, total.dropped, total.sums, total.counts, total.means)
            merge(*results, *merged, old, 1 - old, splits, features, height)

        return plan

    def _wide(self, place: Place, kind: tuple[Any, ...], half: bool, masked: bool, precision: int) -> Plan:
        n, features = place.n, place.features
        block, block_n, warps = _wide_tiles(features, n, half)
        cuts = -(-features // block)
        tiles = cuts * (cuts + 1) // 2
        splits = max(1, min(_PROGRAMS // tiles, n // _SPLIT_ROWS[0]), -(-n // _SPLIT_ROWS[1]))
        each = _up(-(-n // splits), block_n)
        splits = -(-n // each)
        columns = -(-features // 64)
        part = _up(max(64, -(-n // max(8, min(64, 512 // columns)))), 64)
        parts = -(-n // part)
        bad, dirty = self._get("bad", n, torch.int32), self._get("dirty", 1, torch.int32)
        statistics = (
            self._get("column_sums", parts * features, torch.float64),
            self._get("lows", parts * features, torch.float32),
            self._get("highs", parts * features, torch.float32),
            self._get("kept", parts, torch.int32),
        )
        means, residuals = (self._get(f"group_{role}", features, torch.float64) for role in ("means", "residuals"))
        centre, exponents = self._get("centre", features, torch.float32), self._get("scale", features, torch.int32)
        count = self._get("count", 1, torch.float64)
        partial = self._get("partial", splits * tiles * block**2, torch.float32)
        reading = {"MASKED": masked, "MAP": place.is_map, "ALIGN": place.align}
        first = _Launch(
            wide.columns, (parts, columns), kind, **reading, BLOCK_N=64 if features <= 512 else 32, BLOCK_D=64
        )
        second = _Launch(wide.centres, (-(-features // 16),), kind, **reading, HALF=half, BLOCK_P=64, BLOCK_D=16)
        third = _Launch(
            wide.products,
            (tiles, splits),
            kind,
            warps,
            PRECISION=precision,
            HALF=half,
            **reading,
            BLOCK=block,
            BLOCK_N=block_n,
        )
        side, step = (32, splits) if splits <= 2 else (16, 8 if splits <= 32 else 16)
        last = _Launch(
            wide.merge, (tiles * (block // side) ** 2,), (self.device,), BLOCK=block, BLOCK_M=side, BLOCK_S=step
        )
        sizes = tuple(place)
        ends = (tiles, splits, features, block_plan(features).blocks[0][1])

        def plan(x: Tensor, keep: Tensor | None, total: Total, old: int) -> None:
            self._epoch += 1
            source = (x, bad if keep is None else keep, bad, dirty, self._epoch)
            first(*source, *statistics, *sizes, part)
            described = (means, residuals, centre, exponents, count)
            second(*source, *statistics, *described, total.rows, total.dropped, parts, *sizes)
            third(*source, centre, exponents, partial, *sizes, each, 0.0)
            merged = (total.weight, total.sums, total.counts, total.means)
            last(partial, exponents, means, residuals, count, *merged, old, 1 - old, *ends)

        return plan


def _up(value: int, step: int) -> int:
    """The next multiple of step."""
    return -(-value // step) * step


def try_out(device: torch.device) -> None:
    """Compile and launch a small reduction; raises whatever is missing for it."""

    def zeros(*size: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.zeros(size, dtype=dtype, device=device)

    numbers = zeros(dtype=torch.int64), zeros(dtype=torch.int64)
    hints = zeros(16, dtype=torch.float32), zeros(16, dtype=torch.int32)
    total = Total(zeros(block_plan(16).size), zeros(2), zeros(2, 16), *numbers, *hints, zeros())
    Scratch(device).reduce(zeros(32, 16, dtype=torch.float32), Place(32, 16, 32, 0, 16, 1), None, total, 0, 0)


def _wide_tiles(features: int, n: int, half: bool) -> tuple[int, int, int]:
    """Side of the tiles of `wide.products`, rows that they take at a time, and warps."""
    if features <= 384 and (half or n < 1 << 15):
        return 64, 64, 4
    return (128, 64, 8) if half else (128, 32, 8)
