"""What recording takes, computed before anything is allocated, and which layers fit."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

import torch

from delve_ray import device_reservoir
from delve_ray.chunks import chunk_rows
from delve_ray.cuda.lane import SPARE_BYTES
from delve_ray.device_accumulator import DeviceAccumulator
from delve_ray.errors import OptionError
from delve_ray.host_accumulator import HostAccumulator, stage_rows
from delve_ray.reservoir import packed_size
from delve_ray.selection import TrackedLayer
from delve_ray.store.protocol import moments_size

log = logging.getLogger(__name__)

MIN_OUTBOX_BYTES = 4 << 20
"""Packed deltas that stay in memory in any case, however small the layers are."""


def fit_memory(
    layers: Sequence[TrackedLayer], *, max_features: int, max_memory: int, embed_rows: int = 0
) -> list[TrackedLayer]:
    """The layers that may be recorded, those of unknown width included: their first forward decides.

    Layers wider than `max_features` are left out, with a warning. Raises OptionError when none is left, or when
    the others take more than `max_memory` bytes.
    """
    tracked = [layer for layer in layers if layer.features is None or layer.features <= max_features]
    for layer in layers:
        if layer.features is not None and layer.features > max_features:
            log.warning("layer %s %s", layer.name, too_wide(layer.features, max_features))
    if not tracked:
        raise OptionError(f"max_features={max_features} leaves no layer out of {[layer.features for layer in layers]}")
    needed = worker_bytes(known_widths(tracked), embed_rows)
    if needed > max_memory:
        widest = sorted(tracked, key=lambda layer: -(layer.features or 0))[:3]
        raise OptionError(
            f"max_memory={max_memory} bytes, but recording {len(tracked)} layers takes up to {needed} in each worker; "
            f"leave some out, or raise it; the widest: {', '.join(f'{w.name} ({w.features})' for w in widest)}"
        )
    log.info("recording %d layers takes up to %.1f MiB in this worker", len(tracked), needed / (1 << 20))
    return tracked


def too_wide(features: int, max_features: int) -> str:
    """In words, why a layer is left out."""
    gib = worker_bytes([features]) / (1 << 30)
    return f"has {features} features and is left out; raise max_features={max_features} to record it ({gib:.1f} GiB)"


def known_widths(layers: Iterable[TrackedLayer]) -> list[int]:
    """The widths that are known without a forward."""
    return [layer.features for layer in layers if layer.features is not None]


def worker_bytes(widths: Sequence[int], embed_rows: int = 0) -> int:
    """Bytes that recording layers of these widths takes at most, on the device and the host of one worker together.

    For every layer the accumulators of both phases, twice (those being filled and those handed over), its share of one
    packed delta of both phases, and as much again for what is sent and not yet safe; for all layers together the
    scratch memory of the training thread and that of the packer. `embed_rows` rows of each are kept beside them.
    """
    total = sum(
        4 * (_accumulator_bytes(features) + device_reservoir.nbytes(embed_rows, features))
        + _delta_bytes(features, embed_rows)
        for features in widths
    )
    scratch = max(
        (
            HostAccumulator.scratch_bytes(features, chunk_rows(features))
            + HostAccumulator.scratch_bytes(features, stage_rows(features))
            for features in widths
        ),
        default=0,
    )
    spare = SPARE_BYTES if widths and torch.cuda.is_available() else 0
    return total + scratch + spare + outbox_bytes(widths, embed_rows)


def _accumulator_bytes(features: int) -> int:
    """Of an accumulator wherever it may be: on the host, or on a GPU where there is one."""
    on_host = HostAccumulator.nbytes(features)
    return max(on_host, DeviceAccumulator.nbytes(features)) if torch.cuda.is_available() else on_host


def _delta_bytes(features: int, embed_rows: int) -> int:
    """Of a layer in a packed delta of both phases."""
    return 16 * (moments_size(features) + packed_size(embed_rows, features))


def outbox_bytes(widths: Sequence[int], embed_rows: int = 0) -> int:
    """Bytes of packed deltas that stay in memory until they are safe: one of both phases; the rest lies on disk."""
    packed = sum(_delta_bytes(features, embed_rows) for features in widths)
    return max(MIN_OUTBOX_BYTES, packed) if any(widths) else 0
