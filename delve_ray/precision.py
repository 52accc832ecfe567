"""How far the rounding of products reaches, by the name of the option `precision`. No torch in here."""

from __future__ import annotations

PRODUCT_EPS = {"float32": 2.0**-23, "float64": 2.0**-52, "tf32": 2.0**-22, "bfloat16": 2.0**-18}
"""ε of `spectrum.rounding_floor`. TF32 and bfloat16 round each centred value by up to u = 2^-11 and 2^-9 of it. What
that adds is independent of the values and so nearly uncorrelated with them: on eigenvalues that should be zero it
leaves its own variance, below u²·λ1."""
