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
from delve_ray.sketch import WHOLE, SketchRule
from delve_ray.sketch_accumulator import scratch_bytes, sketch_bytes

log = logging.getLogger(__name__)

MIN_OUTBOX_BYTES = 4 << 20
"""Packed deltas that stay in memory in any case, however small the layers are."""


def fit_memory(
    layers: Sequence[TrackedLayer], *, max_features: int, max_memory: int, embed_rows: int = 0, sketch_size: int = 0
) -> list[TrackedLayer]:
    """The layers that may be recorded, those of unknown width included: their first forward decides.

    Layers wider than `max_features` are sketched, or, without a `sketch_size`, left out with a warning. Raises
    OptionError when none is left, or when the others take more than `max_memory` bytes.
    """
    rule = SketchRule(max_features, sketch_size)
    wide = [layer for layer in layers if layer.features is not None and layer.features > max_features]
    tracked = [layer for layer in layers if sketch_size or layer not in wide]
    for layer in wide:
        say = log.info if rule.columns(layer.features or 0) else log.warning  # which is not what was asked for
        say("layer %s %s", layer.name, too_wide(layer.features or 0, rule))
    if not tracked:
        raise OptionError(f"max_features={max_features} leaves no layer out of {[layer.features for layer in layers]}")
    needed = worker_bytes(known_widths(tracked), embed_rows, rule)
    if needed > max_memory:
        widest = sorted(tracked, key=lambda layer: -(layer.features or 0))[:3]
        raise OptionError(
            f"max_memory={max_memory} bytes, but recording {len(tracked)} layers takes up to {needed} in each worker; "
            f"leave some out, {'lower sketch_size, ' if wide and sketch_size else ''}or raise it; the widest: "
            f"{', '.join(f'{w.name} ({w.features})' for w in widest)}"
        )
    log.info("recording %d layers takes up to %.1f MiB in this worker", len(tracked), needed / (1 << 20))
    return tracked


def too_wide(features: int, rule: SketchRule) -> str:
    """In words, what becomes of a layer of more than `max_features`."""
    whole, own = (worker_bytes([features], 0, which) / (1 << 30) for which in (WHOLE, rule))
    if not rule.size:
        return (
            f"has {features} features and is left out; raise max_features={rule.max_features} to record it "
            f"({whole:.1f} GiB), or give a sketch_size"
        )
    if not rule.columns(features):
        return (
            f"has {features} features, more than max_features={rule.max_features}, but a sketch of "
            f"sketch_size={rule.size} would be larger than its covariance: it is recorded whole"
        )
    return (
        f"has {features} features, more than max_features={rule.max_features}, and is sketched with {rule.size} "
        f"columns ({own:.1f} GiB; whole it would take {whole:.1f}): its row has the head of the spectrum, "
        f"with bounds, and there is no covariance of it"
    )


def known_widths(layers: Iterable[TrackedLayer]) -> list[int]:
    """The widths that are known without a forward."""
    return [layer.features for layer in layers if layer.features is not None]


def worker_bytes(widths: Sequence[int], embed_rows: int = 0, rule: SketchRule = WHOLE) -> int:
    """Bytes that recording layers of these widths takes at most, on the device and the host of one worker together.

    For every layer the accumulators of both phases, twice (those being filled and those handed over), its share of one
    packed delta of both phases, and as much again for what is sent and not yet safe; for all layers together the
    scratch memory of the training thread and that of the packer. `embed_rows` rows of each are kept beside them; `rule`
    says which are sketched.
    """
    total = sum(
        4 * (_accumulator_bytes(features, rule) + device_reservoir.nbytes(embed_rows, features))
        + _delta_bytes(features, embed_rows, rule)
        for features in widths
    )
    scratch = max(
        (_scratch_bytes(features, rule) for features in widths),
        default=0,
    )
    spare = SPARE_BYTES if widths and torch.cuda.is_available() else 0
    return total + scratch + spare + outbox_bytes(widths, embed_rows, rule)


def _scratch_bytes(features: int, rule: SketchRule) -> int:
    """Of the training thread and of the packer's."""
    if columns := rule.columns(features):
        return 2 * scratch_bytes(features, columns)
    rows = chunk_rows(features), stage_rows(features)
    return sum(HostAccumulator.scratch_bytes(features, each) for each in rows)


def _accumulator_bytes(features: int, rule: SketchRule) -> int:
    """Of an accumulator wherever it may be: on the host, or on a GPU where there is one."""
    if columns := rule.columns(features):
        return sketch_bytes(features, columns)
    on_host = HostAccumulator.nbytes(features)
    return max(on_host, DeviceAccumulator.nbytes(features)) if torch.cuda.is_available() else on_host


def _delta_bytes(features: int, embed_rows: int, rule: SketchRule) -> int:
    """Of a layer in a packed delta of both phases."""
    return 16 * (rule.moments_size(features) + packed_size(embed_rows, features))


def outbox_bytes(widths: Sequence[int], embed_rows: int = 0, rule: SketchRule = WHOLE) -> int:
    """Bytes of packed deltas that stay in memory until they are safe: one of both phases; the rest lies on disk."""
    packed = sum(_delta_bytes(features, embed_rows, rule) for features in widths)
    return max(MIN_OUTBOX_BYTES, packed) if any(widths) else 0
