"""Decompositions on a device of torch's, in float64, for layers so wide that reaching the device pays."""

from __future__ import annotations

import math
from functools import partial

import numpy as np

from delve_ray.moments import F64
from delve_ray.reservoir import Reservoir
from delve_ray.schema import LayerRow
from delve_ray.store.protocol import LayerInfo, StoreConfig
from delve_ray.store.publishing import layer_row
from delve_ray.store.window import Collected


def device_eigenvalues(covariance: F64, device: str) -> F64:
    """The eigenvalues of a covariance as `matrices.eigenvalues` gives them, decomposed on `device`.

    `covariance` is (d, d) float64, of which the upper triangle is read; the result is (d,) float64, descending,
    negatives from rounding clipped to 0. It differs from LAPACK's by rounding, under 1e-12 of λ1. The matrix is scaled
    by a power of two before, for not every library does that by itself. Takes some 3·8·d² bytes on the device. Raises
    ValueError for a matrix that is not finite, and what torch raises where the device fails (RuntimeError).

    >>> device_eigenvalues(np.array([[2.0, 1.0], [0.0, 2.0]]), "cpu").round(12).tolist()
    [3.0, 1.0]
    """
    import torch

    # Row by row, without a copy; numpy's max, unlike Python's, is NaN where there is one.
    largest = float(np.max([np.abs(row[index:]).max() for index, row in enumerate(covariance)], initial=0.0))
    if not math.isfinite(largest):
        raise ValueError(f"no finite eigenvalues: the {covariance.shape} covariance holds NaN or inf, or overflows")
    exponent = math.frexp(largest)[1]
    scaled = torch.from_numpy(np.ldexp(covariance, -exponent)).to(device)
    found = torch.linalg.eigvalsh(scaled, UPLO="U").cpu().numpy()
    descending: F64 = np.ldexp(np.maximum(found[::-1], 0.0), exponent)
    if not np.isfinite(descending).all():
        raise RuntimeError(f"the decomposition on {device} gave no finite eigenvalues")
    return descending


def device_row(
    layer: LayerInfo, phase: str, found: Collected, config: StoreConfig, sample: Reservoir | None, device: str
) -> tuple[LayerRow, str | None]:
    """The row of a layer, its own spectrum decomposed on a device; by LAPACK where that fails, and then why.

    Statistics of other matrices (correlation, RankMe) and embeddings remain LAPACK's.
    """
    on_device = partial(device_eigenvalues, device=device)
    try:
        return layer_row(layer, phase, found, config, sample, eigenvalues=on_device), None
    except Exception as error:  # out of memory, no driver, no torch; what is wrong with the layer is raised again
        row = layer_row(layer, phase, found, config, sample)
        return row, f"{type(error).__name__}: {error}"
