"""Choosing among metric keys by patterns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

from delve_ray.errors import OptionError

Patterns: TypeAlias = str | Sequence[str]
"""One pattern over metric keys or several; "*" stands for anything."""


def check_patterns(metrics: Any) -> tuple[str, ...]:
    """The patterns of an option `metrics`. Raises OptionError for what is none."""
    patterns = (metrics,) if isinstance(metrics, str) else tuple(metrics) if isinstance(metrics, Sequence) else ()
    if not patterns or not all(isinstance(pattern, str) and pattern for pattern in patterns):
        raise OptionError(f"metrics={metrics!r} is no pattern over metric keys, such as 'saturation/*'")
    return patterns


def select(metrics: Mapping[str, float], patterns: Sequence[str]) -> dict[str, float]:
    """The metrics whose key fits one of the patterns.

    >>> select({"trace/train/fc": 2.0, "saturation/train/fc": 0.5}, ["saturation/*"])
    {'saturation/train/fc': 0.5}
    """
    return {key: value for key, value in metrics.items() if any(fnmatchcase(key, pattern) for pattern in patterns)}
