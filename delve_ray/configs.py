"""A trial's config: as JSON has it, and flat, as tables have it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def plain(value: Any) -> Any:
    """A config's value as JSON has it; what JSON does not have as text.

    >>> plain({"lr": 0.1, "widths": (8, 16), 3: float("inf")})
    {'lr': 0.1, 'widths': [8, 16], '3': 'inf'}
    """
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:  # numpy's and torch's scalars
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A config's entries by path, as Ray Tune's own tables have them.

    >>> flatten({"lr": 0.1, "model": {"width": 8}})
    {'lr': 0.1, 'model/width': 8}
    """
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}/")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
