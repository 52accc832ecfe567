"""The tracker's options that say what is recorded, checked and put together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from delve_ray.checks import check_integer
from delve_ray.options import (
    check_device,
    check_fraction,
    check_max_samples,
    check_overhead,
    check_precision,
    check_rows,
)
from delve_ray.recorder import RecorderOptions


def recorder_options(given: Mapping[str, Any]) -> RecorderOptions:
    """What a recorder is told, from the tracker's options by name. Raises OptionError, NotImplementedError."""
    return RecorderOptions(
        check_rows(
            given["conv_method"],
            given["timeseries_method"],
            given["interpolation_strategy"],
            given["interpolation_downsampling"],
        ),
        log_interval=check_integer("log_interval", given["log_interval"], at_least=1),
        precision=check_precision(given["precision"], given["device"]),
        products=given["precision"],
        device=check_device(given["device"]),
        max_samples=check_max_samples(given["max_samples"]),
        sample_fraction=check_fraction("sample_fraction", given["sample_fraction"]),
        seed=check_integer("seed", given["seed"], at_least=0),
        max_overhead=check_overhead(given["max_overhead"]),
        max_memory=check_integer("max_memory", given["max_memory"], at_least=1),
    )
