"""From moments to rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from delve_ray import nystrom, reservoir, spectrum
from delve_ray.moments import F64, packed_diagonal, unpack_triangle
from delve_ray.reservoir import Reservoir
from delve_ray.schema import PHASES, LayerRow, PublishedWindow
from delve_ray.stat_options import COVARIANCE_STAT
from delve_ray.store.protocol import LayerInfo, StoreConfig
from delve_ray.store.window import Collected, Cut


def layer_row(
    layer: LayerInfo,
    phase: str,
    found: Collected,
    config: StoreConfig,
    sample: Reservoir | None = None,
    eigenvalues: Callable[[F64], F64] | None = None,
) -> LayerRow:
    """The published row of one layer: one decomposition, shared by all statistics but those of other matrices.

    With no observations (all rows were non-finite) the spectrum is zero. The embedding of a sample of rows takes a
    decomposition of its own, with vectors, so that the eigenvalues are the same with it and without. `eigenvalues`
    decomposes the covariance, of which only the upper triangle is right, instead of LAPACK.
    """
    if found.columns:
        return _sketched_row(layer, phase, found, config, sample)
    n, mean = found.n, found.mean
    weight = found.weight or 1.0
    matrix = unpack_triangle(found.packed, mean.size, symmetric=False, divisor=weight)
    decomposed = (eigenvalues or spectrum.eigenvalues)(matrix)
    statistics = spectrum.statistics(
        decomposed,
        trace=float((packed_diagonal(found.packed, mean.size) / weight).sum()),
        samples=n,
        threshold=config.threshold,
        thresholds=config.thresholds,
        stats=config.stats,
        product_eps=config.product_eps,
        covariance=matrix,
        mean=mean,
    )
    return LayerRow(
        layer=layer.name,
        layer_type=layer.layer_type,
        phase=phase,
        features=mean.size,
        samples=n,
        nonfinite_rows=found.nonfinite,
        threshold=config.threshold,
        stats=statistics.values,
        eigenvalues=decomposed,
        mean=mean.copy(),
        covariance=found.packed / weight if COVARIANCE_STAT in config.stats else None,
        embedding=None if sample is None else reservoir.embed(sample.rows, mean, matrix),
        alpha_r2=statistics.alpha_r2,
        alpha_from=statistics.alpha_from,
        alpha_to=statistics.alpha_to,
        thresholds=config.thresholds,
        intrinsic_dimensionalities=statistics.intrinsic_dimensionalities,
    )


def _sketched_row(
    layer: LayerInfo, phase: str, found: Collected, config: StoreConfig, sample: Reservoir | None
) -> LayerRow:
    """The row of a layer of which there is a sketch: the head of its spectrum, and what that lets one say."""
    features = found.mean.size
    top = nystrom.head(
        found.packed,
        features,
        found.weight,
        config.product_eps,
        found.n if found.n else None,
        with_vectors=sample is not None,
    )
    known = nystrom.head_statistics(top, features, config.threshold, config.thresholds, config.stats)
    points = None
    if sample is not None and top.vectors is not None:
        points = reservoir.along(sample.rows, found.mean, top.vectors)
    return LayerRow(
        layer=layer.name,
        layer_type=layer.layer_type,
        phase=phase,
        features=features,
        samples=found.n,
        nonfinite_rows=found.nonfinite,
        threshold=config.threshold,
        stats=known.values,
        eigenvalues=top.eigenvalues,
        mean=found.mean.copy(),
        embedding=points,
        thresholds=config.thresholds,
        intrinsic_dimensionalities=known.dimensions,
        sketched=True,
        saturation_low=known.saturation_low,
        saturation_high=known.saturation_high,
        unseen_variance=top.unseen,
    )


WIDE = 1024
"""Features from which on a layer may be decomposed elsewhere: that takes 50 ms, and grows faster than what is sent."""
Compute = Callable[[LayerInfo, str, Collected, StoreConfig, Reservoir | None], LayerRow]
"""What turns moments into a row: `layer_row`, or something that has it done elsewhere."""


def entry_row(
    cut: Cut, found: Collected, layer: LayerInfo, phase: str, config: StoreConfig, compute: Compute = layer_row
) -> LayerRow:
    """The row of what a cut has collected, or that of its entry's last publication if nothing came since.

    What is kept on the entry is small: of the covariance, no copy.
    """
    entry = cut.entry
    if entry.row is not None and entry.row[0] is found.packed:  # a collected triangle never changes
        row = entry.row[1]
        with_covariance = COVARIANCE_STAT in config.stats and not row.sketched
        return replace(row, covariance=found.packed / (found.weight or 1.0)) if with_covariance else row
    row = compute(layer, phase, found, config, cut.reservoir if config.rows_to_embed else None)
    entry.row = found.packed, replace(row, covariance=None)
    return row


def joined(parts: Iterable[PublishedWindow], layers: Sequence[LayerInfo]) -> list[LayerRow]:
    """The rows of the parts that shards have published of one window, in the order of the layers."""
    order = {info.name: index for index, info in enumerate(layers)}
    rows = [row for part in parts for row in part.rows]
    return sorted(rows, key=lambda row: (order[row.layer], PHASES.index(row.phase)))
