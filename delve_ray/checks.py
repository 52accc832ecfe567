"""Checks of option values; each error names the option, the value and what would be right. No torch in here."""

from __future__ import annotations

import math
import operator

from delve_ray.errors import OptionError

_INT64 = 1 << 63


def check_integer(option: str, value: object, *, at_least: int = 0) -> int:
    """An integer (numpy's, too) from `at_least` to the largest int64."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = -_INT64
    if not at_least <= number < _INT64:
        raise OptionError(f"{option}={value!r} must be an integer, at least {at_least} and below 2**63")
    return number


def check_seconds(option: str, value: object) -> float:
    """A finite number of seconds, not negative."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise OptionError(f"{option}={value!r} must be a number of seconds, at least 0")
    return float(value)


def check_flag(option: str, value: object) -> bool:
    """True or False and nothing else: "False" is a string, and true."""
    if not isinstance(value, bool):
        raise OptionError(f"{option}={value!r} must be True or False")
    return value


def check_name(option: str, value: object) -> str:
    """A non-empty string."""
    if not isinstance(value, str) or not value:
        raise OptionError(f"{option}={value!r} must be a non-empty string")
    return value


AUTO_SHARDS = 0
"""`num_shards` of a store that chooses it when it is started."""


def check_shards(value: object) -> int:
    """How many shards a store has; "auto" is `AUTO_SHARDS`."""
    if value == "auto":
        return AUTO_SHARDS
    if isinstance(value, str):
        raise OptionError(f"num_shards={value!r} must be an integer, at least 1, or 'auto'")
    return check_integer("num_shards", value, at_least=1)


def check_number(option: str, value: object, name: str) -> float:
    """What float() takes and float64 holds, other than text; `name` is what the value is called."""
    try:
        if isinstance(value, str | bytes):
            raise TypeError
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        raise OptionError(f"{option}={value!r} of {name!r} must be a number that float64 can hold") from None
