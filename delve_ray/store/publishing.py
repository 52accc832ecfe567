"""From moments to rows."""

from __future__ import annotations

from delve_ray import spectrum
from delve_ray.moments import packed_diagonal, unpack_triangle
from delve_ray.schema import LayerRow
from delve_ray.store.protocol import LayerInfo, StoreConfig
from delve_ray.store.window import Collected


def layer_row(layer: LayerInfo, phase: str, found: Collected, config: StoreConfig) -> LayerRow:
    """The published row of one layer: one decomposition, shared by all statistics but those of other matrices.

    With no observations (all rows were non-finite) the spectrum is zero.
    """
    n, mean = found.n, found.mean
    covariance = found.packed / (found.weight or 1.0)
    matrix = unpack_triangle(covariance, mean.size, symmetric=False)
    eigenvalues = spectrum.eigenvalues(matrix)
    statistics = spectrum.statistics(
        eigenvalues,
        trace=float(packed_diagonal(covariance, mean.size).sum()),
        samples=n,
        threshold=config.threshold,
        thresholds=config.thresholds,
        stats=tuple(stat for stat in config.stats if stat != "cov"),
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
        eigenvalues=eigenvalues,
        mean=mean.copy(),
        covariance=covariance if "cov" in config.stats else None,
        alpha_r2=statistics.alpha_r2,
        alpha_from=statistics.alpha_from,
        alpha_to=statistics.alpha_to,
        thresholds=config.thresholds,
        intrinsic_dimensionalities=statistics.intrinsic_dimensionalities,
    )
