"""The table of a sweep: trials, best first, as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from delve_ray.analysis.table import WIDTH, printable, shorten
from delve_ray.errors import ReadError

_FIXED = ("place", "trial", "contender", "by_low", "by_high", "unresolved", "num_parameters", "wasted", "path")
_MOST_NAME = 24
_MOST_SHOWN = 5
"""Trials that are named of those that do not rank, or rank by an interval."""
_MOST_LAYERS = 3


def ranking_table(ranking: pa.Table, *, width: int = WIDTH) -> str:
    """What `rank_trials` returned, as lines of text without a trailing newline.

    The contenders come first, then the others. A metric of which only an interval is known stands as "low…high". Below
    stands which layers leave it open, where the first trial wastes most of its width, and which trials are left out.
    Raises ReadError for another table.
    """
    metrics = [name for name in ranking.column_names if name not in _FIXED and not name.startswith("config/")]
    if not set(_FIXED) <= set(ranking.column_names) or not 1 <= len(metrics) <= 2 or not ranking.num_rows:
        raise ReadError(f"a table with columns {ranking.column_names} is no ranking; rank() makes one")
    by, accuracy = metrics[0], metrics[-1]
    rows = ranking.to_pylist()
    names = [printable(str(row["trial"])) for row in rows]
    name_width = min(_MOST_NAME, max(map(len, [*names, "trial"])))
    heads = [shorten(_title(name), 12) for name in dict.fromkeys((accuracy, by))]
    head = f"{'#':>3}  {'trial':<{name_width}}  {'  '.join(f'{h:>10}' for h in heads)}  {'parameters':>10}  config"
    lines = []
    for contender, title in ((True, "about as accurate as the best"), (False, "less accurate")):
        shown = [(row, name) for row, name in zip(rows, names, strict=True) if row["contender"] is contender]
        if shown:
            order = by if contender else accuracy
            lines += [f"{title}, by {printable(order)}", head]
        for row, name in shown:
            values = "  ".join(f"{_metric(row, key, by):>10}" for key in dict.fromkeys((accuracy, by)))
            parameters = "–" if row["num_parameters"] is None else f"{row['num_parameters']:,}"
            line = f"{row['place']:>3}  {shorten(name, name_width):<{name_width}}  {values}  {parameters:>10}  "
            lines.append(line + shorten(_config(row), max(12, width - len(line))))
    return "\n".join(line.rstrip() for line in [*lines, *_open(rows, by), *_notes(ranking, rows[0])])


def _title(metric: str) -> str:
    """The statistic of a metric key, which is what a column has room for."""
    return printable(metric.partition("/")[0])


def _metric(row: Mapping[str, Any], key: str, by: str) -> str:
    """A metric of a trial, as an interval where its ends are apart."""
    low, high = row["by_low"], row["by_high"]
    if key == by and _is_interval(row):
        return f"{low:.2g}…{high:.2g}"
    return f"{row[key] if row[key] is not None else low:.4g}"


def _is_interval(row: Mapping[str, Any]) -> bool:
    """Whether the ends of a metric are so far apart that it shows."""
    low, high = row["by_low"], row["by_high"]
    return low is not None and high is not None and f"{low:.4g}" != f"{high:.4g}"


def _open(rows: Sequence[Mapping[str, Any]], by: str) -> list[str]:
    """Of which trials sketched layers leave the metric open, and what that does to their places."""
    bounded = [row for row in rows if _is_interval(row)]
    without = [row for row in rows if row["unresolved"] and row["by_low"] is None]
    notes = []
    if bounded:
        notes.append(f"an interval, as layers are sketched; ranked by the end that is certain: {_trials(bounded)}")
    if without:
        notes.append(f"without the layers that are sketched, which have no {_title(by)}: {_trials(without)}")
    return notes


def _trials(rows: Sequence[Mapping[str, Any]]) -> str:
    """The first few trials, and the layers of each that have no value."""
    named = [printable(str(row["trial"])) + _layers(row["unresolved"]) for row in rows[:_MOST_SHOWN]]
    return ", ".join(named) + (", …" if len(rows) > _MOST_SHOWN else "")


def _layers(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_LAYERS} more" if len(names) > _MOST_LAYERS else ""
    return f" ({', '.join(map(printable, names[:_MOST_LAYERS]))}{more})" if names else ""


def _config(row: Mapping[str, Any]) -> str:
    items = [(name.removeprefix("config/"), value) for name, value in row.items() if name.startswith("config/")]
    return printable(" ".join(f"{name}={_value(value)}" for name, value in items if value is not None))


def _value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _notes(ranking: pa.Table, first: Mapping[str, Any]) -> list[str]:
    notes = []
    wasted = [
        f"{printable(layer['layer'])} ({'at most ' if layer['sketched'] else ''}{layer['intrinsic_dimensionality']} of "
        f"{layer['features']} dimensions used)"
        for layer in first["wasted"]
    ]
    if wasted:
        notes.append(f"{printable(str(first['trial']))} wastes most in {', '.join(wasted)}")
    left_out = (ranking.schema.metadata or {}).get(b"left_out", b"").decode()
    if left_out:
        trials = [printable(name) for name in left_out.split("\n")]
        named = ", ".join(trials[:_MOST_SHOWN]) + (", …" if len(trials) > _MOST_SHOWN else "")
        notes.append(f"left out, as they failed or did not report both metrics: {len(trials)} ({named})")
    return notes
