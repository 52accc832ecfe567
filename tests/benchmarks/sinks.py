"""A store that measures what it is sent, and may keep none of it: then only the worker's own work is left."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn

from delve_ray import SaturationTracker
from delve_ray.moments import F64, triangle_size
from delve_ray.store.core import CovarianceStore
from delve_ray.store.protocol import Ack, Delta, StoreConfig


def config(run: str = "bench", world_size: int = 1, **options: Any) -> StoreConfig:
    """A run that writes no files, publishes the saturation alone, and waits for nobody."""
    quiet = {"publish_every": 0.0, "late_after": 0.0, "silent_after": 0.0}
    return StoreConfig(
        run,
        "/nowhere",
        world_size,
        save_to=(),
        stats=("saturation",),
        **quiet | options,  # type: ignore[arg-type]
    )


class Sink(CovarianceStore):
    """A store in this process that counts bytes; without `keeps`, it takes the headers and drops the rows."""

    def __init__(self, *, keeps: bool) -> None:
        super().__init__(config())
        self.keeps = keeps
        self.bytes = 0
        """Of all deltas so far: their buffers, and their headers as Ray serialises them."""
        self.itemsize = 0
        """Bytes of one number of a buffer."""

    def take(self, delta: Delta, buffer: F64) -> Ack:
        """See `Store.take`."""
        self.bytes += buffer.nbytes + len(pickle.dumps(delta, protocol=5))
        self.itemsize = buffer.dtype.itemsize
        if self.keeps:
            return super().take(delta, buffer)
        nothing = np.empty(0)
        return super().take(replace(delta, entries=(), widths=()).sealed(nothing), nothing)


def attach_to(store: CovarianceStore, model: nn.Module, **options: Any) -> SaturationTracker:
    """Our tracker on a given store."""
    return SaturationTracker(modules=model, store=store, publish_every=0, **options)


def width(module: nn.Module) -> int:
    """Features of a Linear layer, a convolution or an LSTM."""
    for name in ("out_features", "out_channels", "hidden_size"):
        if hasattr(module, name):
            return int(getattr(module, name))
    raise TypeError(f"{type(module).__name__} has no width that is known here")


def widths(model: nn.Module, layers: Sequence[str]) -> list[int]:
    """Features of the layers of these names."""
    modules = dict(model.named_modules())
    return [width(modules[name]) for name in layers]


def triangles(sizes: Sequence[int]) -> int:
    """Numbers in the packed triangles of layers of these widths."""
    return sum(map(triangle_size, sizes))
