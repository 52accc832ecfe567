"""What may be asked of a spectrum: the options `stats` and `sat_threshold`, checked. No matrix is touched here."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

import numpy as np

from delve_ray.errors import OptionError
from delve_ray.schema import EXTRA_STATS, PHASES, SCALAR_STATS

COVARIANCE_STAT = "cov"  # the one statistic that is no scalar: the covariance itself is written
EMBED_STAT = "embed"  # neither: rows of the layer in two dimensions
CORRELATION_STATS = tuple(name for name in EXTRA_STATS if name.startswith("correlation_"))
"""The statistics of the correlation matrix: one decomposition for all of them."""
_CANONICAL = (*SCALAR_STATS, *EXTRA_STATS, COVARIANCE_STAT, EMBED_STAT)
_SHORT_NAMES = {
    "lsat": ("saturation",),
    "idim": ("intrinsic_dimensionality",),
    "trc": ("trace",),
    "dtrc": ("diagonal_trace",),
    "det": ("determinant",),
    "covariance": (COVARIANCE_STAT,),
    "correlation": CORRELATION_STATS,
}
_SHARE = "it is the share of variance to explain, a number in (0, 1] such as 0.99"


def check_threshold(value: object) -> float:
    """Return the option `sat_threshold` as a float, or raise OptionError if it is not a number in (0, 1].

    >>> check_threshold(0.99)
    0.99
    """
    if problem := _threshold_problem(value):
        raise OptionError(f"sat_threshold={value!r} is {problem}; {_SHARE}{_percent_hint(value)}")
    return float(value)  # type: ignore[arg-type]


def check_thresholds(value: object) -> tuple[float, ...]:
    """Return the option `sat_threshold`, one number or several, as floats in the order given.

    Takes a number in (0, 1], or a sequence or one-dimensional array of such numbers without repetitions. The first
    is the run's own. Raises OptionError for anything else, and says which of several is wrong.

    >>> check_thresholds(0.99), check_thresholds([0.9, 0.99, 0.999])
    ((0.99,), (0.9, 0.99, 0.999))
    """
    given = value.tolist() if isinstance(value, np.ndarray) else value
    if isinstance(given, (str, bytes)) or not isinstance(given, Sequence):
        return (check_threshold(given),)
    rule = "a list holds shares of variance to explain, numbers in (0, 1] such as 0.99, each once"
    if not given:
        raise OptionError(f"sat_threshold={value!r} is empty; {rule}")
    for item in given:
        if problem := _threshold_problem(item):
            raise OptionError(f"sat_threshold={value!r}: {item!r} is {problem}; {rule}{_percent_hint(item)}")
    thresholds = tuple(map(float, given))
    for index, threshold in enumerate(thresholds):
        if threshold in thresholds[:index]:
            raise OptionError(f"sat_threshold={value!r} has {threshold} twice; {rule}")
    return thresholds


def _threshold_problem(value: object) -> str | None:
    """What keeps a value from being a threshold, in words; None for a good one."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        return f"of type {type(value).__name__}"
    return None if 0 < value <= 1 else "out of range"


def _percent_hint(value: object) -> str:
    """How to write what looks like per cent."""
    in_percent = isinstance(value, (int, float, np.integer, np.floating)) and 1 < value <= 100
    return f"; for {value} percent write {value / 100:g}" if in_percent else ""  # type: ignore[operator]


def resolve_stats(stats: Sequence[str] | str | None) -> tuple[str, ...]:
    """Return the canonical names of the statistics asked for, in the order of the contract, each once.

    Takes long names, Delve's short ones (lsat, idim, cov, det, trc, dtrc, embed), "covariance", and "correlation" for
    the three of the correlation matrix; a bare string is one name. None is every scalar that the covariance's own
    spectrum gives: those of other matrices (`schema.EXTRA_STATS`) take a decomposition each, and are computed
    where they are named. Delve's names with a phase, such as "lsat_eval", are the same without it: there are always
    both. Raises OptionError for others.

    >>> resolve_stats(["cov", "trc", "lsat", "saturation"])
    ('saturation', 'trace', 'cov')
    """
    if stats is None:
        return SCALAR_STATS
    if not isinstance(stats, (str, Sequence, set, frozenset)):
        raise OptionError(f"stats={stats!r} is of type {type(stats).__name__}; it is a list of names or None")
    known, asked = (*_CANONICAL, *_SHORT_NAMES), set[str]()
    for given in [stats] if isinstance(stats, str) else stats:
        short, _, phase = str(given).rpartition("_")
        name = short if phase in PHASES and short in _SHORT_NAMES else given
        if name not in known:
            close = difflib.get_close_matches(str(name).lower(), known, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise OptionError(f"stats: unknown name {name!r}; {hint}Valid names: {', '.join(known)}")
        asked.update(_SHORT_NAMES.get(name, (name,)))
    return tuple(name for name in _CANONICAL if name in asked)
