"""Tables of spectra, as `read_spectra` returns them, without a run that wrote them."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from delve_ray.schema import SPECTRA_SCHEMA
from tests.windows import START

ROW: dict[str, Any] = {
    "run": "run",
    "attempt": 0,
    "phase": "train",
    "step": 0,
    "layer": "conv1",
    "layer_type": "Linear",
    "features": 10,
    "samples": 100,
    "nonfinite_rows": 0,
    "workers": 2,
    "world_size": 2,
    "revision": 0,
    "final": True,
    "threshold": 0.99,
    "saturation": 0.5,
    "intrinsic_dimensionality": 5,
    "eigenvalues": [2.0, 1.0],
    "mean_norm": 1.5,
    "sketched": False,
    "wall_time": START,
}


def spectra_table(*rows: dict[str, Any]) -> pa.Table:
    """One row of spectra for each of `rows`, which say what differs from `ROW`."""
    return pa.Table.from_pylist([ROW | row for row in rows], schema=SPECTRA_SCHEMA)


def network(layers: list[str], steps: int = 1, phases: tuple[str, ...] = ("eval", "train"), **changes: Any) -> pa.Table:
    """A run of `steps` windows; layer l has saturation (l + 1) / (layers + step + 1), less a tenth in eval."""
    return spectra_table(
        *(
            {
                "phase": phase,
                "step": step,
                "layer": layer,
                "saturation": (index + 1) / (len(layers) + step + 1) * (0.9 if phase == "eval" else 1.0),
                **changes,
            }
            for phase in phases
            for step in range(steps)
            for index, layer in enumerate(layers)
        )
    )
