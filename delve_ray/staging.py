"""Stages: where rows of a device's forwards wait until there are enough of them to be worth a reduction.

A copy is all that happens to them inside the hook; right afterwards the output may be changed in place.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from delve_ray.cuda.lane import Lane, follow
from delve_ray.workspace import empty

_STAGE_BYTES = 8 << 20
"""Size of a stage, for layers of up to 2048 features. A reduction costs some 20 µs however few rows it has."""
_STAGE_ROWS = 16384
"""Most rows of a stage."""


def stage_bytes(features: int) -> int:
    """Bytes of a layer's stage: at most half of what a product takes, where that is larger."""
    return min(max(_STAGE_BYTES, 2 * features**2), 8 * _STAGE_ROWS * features)


def stage_rows(features: int, itemsize: int) -> int:
    """Rows that a stage holds."""
    rows = min(_STAGE_ROWS, stage_bytes(features) // (itemsize * features))
    return rows - rows % 64  # kernels read whole vectors where the number of rows allows it


class Stage:
    """A buffer of up to `capacity` rows of one dtype, as they lie in the outputs: row by row or feature by feature."""

    def __init__(self, lane: Lane, like: Tensor, stream: Any) -> None:
        features = like.shape[-1]
        self.dtype = like.dtype
        self.capacity = stage_rows(features, like.element_size())
        self.buffer, self._writable = lane.take(stage_bytes(features))
        self.by_feature = features > 1 and like.stride(-1) != 1
        # A view made in inference mode could not be written to outside of it.
        with torch.inference_mode(False) if torch.is_inference_mode_enabled() else contextlib.nullcontext():
            typed = self.buffer[: self.capacity * features * like.element_size()].view(like.dtype)
            self._data = typed.view(features, -1) if self.by_feature else typed.view(-1, features)
        self._keep: Tensor | None = None
        self._masked = False
        self.fill = 0
        self.streams: list[Any] = []
        self.enter(stream)

    def enter(self, stream: Any) -> None:
        """Let this stream write."""
        if stream is not None and stream not in self.streams:
            stream.wait_event(self._writable)
            self.buffer.record_stream(stream)
            self.streams.append(stream)

    @property
    def room(self) -> int:
        """Rows that still fit."""
        return self.capacity - self.fill

    def put(self, x: Tensor, keep: Tensor | None, n: int) -> None:
        """Copy the n rows of x, (…, D), which must fit, and which of them count."""
        end = self.fill + n
        if x.dim() == 2:
            part = self._data.narrow(1, self.fill, n).t() if self.by_feature else self._data.narrow(0, self.fill, n)
            part.copy_(x)
        elif self.by_feature:
            part = self._data[:, self.fill : end]
            part.view(part.shape[0], *x.shape[:-1]).copy_(x.movedim(-1, 0))
        else:
            self._data[self.fill : end].view(x.shape).copy_(x)
        if keep is not None or self._masked:
            self._put_mask(keep, end)
        self.fill = end

    def _put_mask(self, keep: Tensor | None, end: int) -> None:
        if self._keep is None:
            self._keep = empty(self.capacity, torch.bool, self.buffer.device)
        if not self._masked:
            self._keep[: self.fill].fill_(True)
            self._masked = True
        part = self._keep[self.fill : end]
        if keep is None:
            part.fill_(True)
        else:
            part.view(keep.shape).copy_(keep)

    def rows(self) -> Tensor:
        """What there is, (fill, D)."""
        return self._data[:, : self.fill].t() if self.by_feature else self._data[: self.fill]

    def keep(self) -> Tensor | None:
        """Which of the rows count, None for all."""
        return self._keep[: self.fill] if self._keep is not None and self._masked else None

    def hand_over(self, stream: Any) -> None:
        """Let the side stream read."""
        if stream is not None:
            follow(stream, self.streams)
            if self._keep is not None:
                self._keep.record_stream(stream)


def cut(x: Tensor, keep: Tensor | None, room: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Rows (…, D) in two pieces, of which the first has at most `room` rows, or one by one along the first dimension.

    Cut along leading dimensions, so that the pieces are views.
    """
    if x.dim() > 2 and x.is_contiguous():
        x, keep = x.view(-1, x.shape[-1]), None if keep is None else keep.reshape(-1)
    items = room // (x[0].numel() // x.shape[-1])
    if items:
        yield x[:items], None if keep is None else keep[:items]
        yield x[items:], None if keep is None else keep[items:]
        return
    for index, item in enumerate(x):
        yield item, None if keep is None else keep[index]
