"""Covariances with a known spectrum, and those of rows."""

from __future__ import annotations

import numpy as np

from delve_ray.schema import F64

FLOAT64_EPS = float(np.finfo(np.float64).eps)


def random_rotation(features: int, seed: int = 0) -> F64:
    """Return an orthogonal matrix, uniformly distributed."""
    q, r = np.linalg.qr(np.random.default_rng(seed).normal(size=(features, features)))
    return np.asarray(q * np.sign(np.diag(r)))


def rotated(spectrum_d: F64, seed: int = 0) -> F64:
    """Return a covariance with the given eigenvalues and random eigenvectors."""
    rotation = random_rotation(spectrum_d.size, seed)
    return np.asarray((rotation * spectrum_d) @ rotation.T)


def population_covariance(rows: F64) -> F64:
    """Return the two-pass covariance of rows, divided by their number."""
    centred = rows - rows.mean(0)
    return np.asarray(centred.T @ centred / len(rows))
