"""Two or more runs beside each other, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import pyarrow as pa

from delve_ray.analysis.keys import matching
from delve_ray.analysis.table import WIDTH, printable, shorten_layer
from delve_ray.analysis.windows import network_order, require_columns, select_windows
from delve_ray.errors import OptionError, ReadError
from delve_ray.schema import EXTRA_STATS, PHASES, SCALAR_STATS, SPECTRA_SCHEMA

_STATS = (*SCALAR_STATS, *EXTRA_STATS)
_SHARES = ("saturation", "correlation_saturation")
_WINDOW = ("run", "phase", "step", "layer", "layer_type", "features", "samples", "threshold")
_MAX_NAME, _MIN_NAME = 32, 12
_CELL = 8
_MOST_NAMED = 3
_ABSENT = "–"

Row: TypeAlias = Mapping[str, Any]


def comparison_columns(stat: str = "saturation") -> list[str]:
    """The columns of the spectra that `compare` needs for a statistic. Raises OptionError for an unknown one.

    >>> comparison_columns("trace")[-2:]
    ['threshold', 'trace']
    """
    if stat not in _STATS:
        raise OptionError(f"stat={stat!r} is no statistic; valid: {', '.join(_STATS)}")
    return [*_WINDOW, stat]


def compare(
    runs: Mapping[str, pa.Table], *, stat: str = "saturation", phase: str | None = None, step: int | None = None
) -> pa.Table:
    """Each layer of each run in one window of each phase, and how far its statistic is from that of the first run.

    Args:
        runs: What `read_spectra` returned of each run, by a label that tells them apart; the first is what the others
            are compared with. `comparison_columns` names the columns that are needed.
        stat: The statistic to compare, by its long name.
        phase: "train" or "eval"; by default both.
        step: Compare the windows of this step; by default the last of each phase of each run, which may be different
            steps.

    Returns:
        One row per phase, layer and run that has the layer: `label`, columns of the spectra (`run`, `phase`, `step`,
        `layer`, `layer_type`, `features`, `samples`, `threshold`, and the statistic under its name), and `difference`
        float64, that of the first run taken from it; null where one of the two is null or not finite, or the first run
        has no such layer. Phases come train first, layers in the order of the networks, runs as given.

    Raises:
        OptionError: an unknown statistic.
        ReadError: fewer than two runs; a table that lacks a column or holds several runs; a phase or a step without
            rows.

    >>> one = {"run": ["a"], "phase": ["train"], "step": [4], "layer": ["fc"], "layer_type": ["Linear"],
    ...        "features": [8], "samples": [64], "threshold": [0.99], "saturation": [0.5]}
    >>> other = pa.table(one | {"saturation": [0.75]})
    >>> compare({"a": pa.table(one), "b": other}).select(["label", "saturation", "difference"]).to_pylist()[1]
    {'label': 'b', 'saturation': 0.75, 'difference': 0.25}
    """
    columns = comparison_columns(stat)
    if len(runs) < 2:
        raise ReadError(f"{len(runs)} runs with rows; give at least two to compare")
    chosen = {label: _chosen(label, table, columns, step, phase) for label, table in runs.items()}
    order = network_order(pa.concat_tables([_renamed(label, table, columns) for label, table in runs.items()]))
    rows: list[dict[str, Any]] = []
    for name in PHASES:
        for layer in order:
            first = chosen[next(iter(runs))].get((name, layer))
            rows += [
                {"label": label, **row, "difference": _difference(row, first, stat)}
                for label in runs
                if (row := chosen[label].get((name, layer)))
            ]
    fields = [pa.field("label", pa.string()), *(SPECTRA_SCHEMA.field(name) for name in columns)]
    return pa.Table.from_pylist(rows, schema=pa.schema([*fields, pa.field("difference", pa.float64())]))


def _chosen(
    label: str, table: pa.Table, columns: Sequence[str], step: int | None, phase: str | None
) -> dict[tuple[str, str], Row]:
    """The rows of a run's windows by phase and layer."""
    require_columns(table, columns)
    table = table.select(columns)
    rows: list[Row] = []
    for name, shown in select_windows(table, step, phase).items():
        rows += matching(table, phase=name, step=shown).to_pylist()
    if len(names := {row["run"] for row in rows}) > 1:
        raise ReadError(f"{label} holds the runs {', '.join(sorted(names))}; give each a label of its own")
    return {(row["phase"], row["layer"]): row for row in rows}


def _renamed(label: str, table: pa.Table, columns: Sequence[str]) -> pa.Table:
    """A run's keys under its label, since different runs may have one name."""
    keys = table.select(["phase", "step", "layer"])
    return keys.append_column("run", pa.array([label] * keys.num_rows, pa.string()))


def _difference(row: Row, first: Row | None, stat: str) -> float | None:
    if first is None or not (_finite(row[stat]) and _finite(first[stat])):
        return None
    return float(row[stat] - first[stat])


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def comparison_table(comparison: pa.Table, *, width: int = WIDTH) -> str:
    """What `compare` returned, as lines of text without a trailing newline.

    Runs are lettered in the order given, A being what the others are compared with. Where the columns of all do not fit
    into `width`, there are several tables, each with A. Below stand what is not the same in all runs. Raises ReadError
    for another table.
    """
    names = comparison.column_names
    if names[:1] != ["label"] or names[-1:] != ["difference"] or len(names) != len(_WINDOW) + 3:
        raise ReadError(f"a table with columns {names} is no comparison; compare() makes one")
    stat, rows = names[-2], comparison.to_pylist()
    labels = list(dict.fromkeys(row["label"] for row in rows))
    letters = dict(zip(labels, _letters(), strict=False))
    lines = [f"{letters[label]}  {printable(label)}" for label in labels]
    by_place = {(row["phase"], row["layer"], row["label"]): row for row in rows}
    for phase in dict.fromkeys(row["phase"] for row in rows):
        layers = list(dict.fromkeys(row["layer"] for row in rows if row["phase"] == phase))
        steps = {row["label"]: row["step"] for row in rows if row["phase"] == phase}
        different = len(set(steps.values())) > 1
        shown = ", ".join(f"{letters[label]} {step}" for label, step in steps.items())
        lines += ["", f"{stat}, {phase}, step {shown if different else next(iter(steps.values()))}"]
        for others in _blocks([label for label in labels[1:] if label in steps], width):
            cells = {key[1:]: row for key, row in by_place.items() if key[0] == phase}
            lines += _block(layers, [labels[0], *others], letters, cells, stat, width)
    return "\n".join(line.rstrip() for line in [*lines, "", *_notes(rows, labels, letters, stat)]).rstrip()


def _letters() -> Iterator[str]:
    """A, B, … Z, A1, B1, …"""
    number = 0
    while True:
        yield from (f"{letter}{number or ''}" for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ")
        number += 1


def _blocks(others: Sequence[str], width: int) -> Iterator[Sequence[str]]:
    """The runs besides the first, as many at a time as have room beside it."""
    room = width - _MIN_NAME - 2 * (_CELL + 1)
    at_a_time = max(1, room // (2 * (_CELL + 1)))
    for start in range(0, max(len(others), 1), at_a_time):
        yield others[start : start + at_a_time]


def _block(
    layers: Sequence[str],
    labels: Sequence[str],
    letters: Mapping[str, str],
    cells: Mapping[tuple[str, str], Row],
    stat: str,
    width: int,
) -> list[str]:
    """Heading, a line per layer, and the mean of what stands above it."""
    first, *others = labels
    taken = (_CELL + 1) * 2 + 2 * len(others) * (_CELL + 1)
    longest = max(len(printable(name)) for name in (*layers, "layer"))
    name_width = min(longest, max(_MIN_NAME, min(_MAX_NAME, width - taken)))
    heads = [letters[first]]
    for label in others:
        heads += [letters[label], f"{letters[label]} − {letters[first]}"]
    lines = [" ".join([f"{'layer':<{name_width}}", f"{'features':>{_CELL}}", *(f"{head:>{_CELL}}" for head in heads)])]
    columns: list[list[float]] = [[] for _ in heads]
    for layer in layers:
        rows = [cells.get((layer, label)) for label in labels]
        values = [None if rows[0] is None else rows[0][stat]]
        for row in rows[1:]:
            values += [None, None] if row is None else [row[stat], row["difference"]]
        shown = [_shown(value, stat, signed=bool(at) and at % 2 == 0) for at, value in enumerate(values)]
        name = shorten_layer(layer, name_width)
        lines.append(" ".join([f"{name:<{name_width}}", f"{_features(rows):>{_CELL}}", *shown]))
        for column, value in zip(columns, values, strict=True):
            column += [] if value is None or not math.isfinite(value) else [value]
    means = [sum(column) / len(column) if column else None for column in columns]
    shown = [_shown(value, stat, signed=bool(at) and at % 2 == 0) for at, value in enumerate(means)]
    return [*lines, " ".join([f"{'mean':<{name_width}}", " " * _CELL, *shown])]


def _features(rows: Sequence[Row | None]) -> str:
    """The layer's width; those of all runs where they differ."""
    widths = [None if row is None else row["features"] for row in rows]
    distinct = {features for features in widths if features is not None}
    if len(distinct) == 1:
        return str(distinct.pop())
    shown = "/".join(_ABSENT if features is None else str(features) for features in widths)
    return shown if len(shown) <= _CELL else "differ"


def _shown(value: float | None, stat: str, *, signed: bool) -> str:
    if value is None or math.isnan(value):
        return f"{_ABSENT:>{_CELL}}"
    sign = "+" if signed else ""
    if stat in _SHARES:
        return f"{100 * value:{sign}.1f} %".rjust(_CELL)
    return f"{value:{sign}.4g}".rjust(_CELL)


def _notes(rows: Sequence[Row], labels: Sequence[str], letters: Mapping[str, str], stat: str) -> list[str]:
    """What the numbers mean, and in what the runs differ otherwise."""
    notes = ["differences are in percentage points"] if stat in _SHARES else []
    thresholds: dict[float, list[str]] = {}
    for label in labels:
        for value in dict.fromkeys(row["threshold"] for row in rows if row["label"] == label):
            thresholds.setdefault(value, []).append(letters[label])
    depends = stat in ("saturation", "intrinsic_dimensionality") or stat.startswith("correlation_")
    if depends and len(thresholds) > 1:
        said = "; ".join(f"{', '.join(who)} {value:g}" for value, who in thresholds.items() if value is not None)
        notes.append(f"the thresholds differ: {said}; compare with --threshold takes the same for all")
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    complete = True
    for label in labels:
        own = {row["layer"] for row in rows if row["label"] == label}
        if lacking := [layer for layer in layers if layer not in own]:
            notes.append(f"{letters[label]} has no {_named(lacking)}")
            complete = False
        if without := [row["layer"] for row in rows if row["label"] == label and row[stat] is None]:
            notes.append(f"{letters[label]} has no {stat} of {_named(dict.fromkeys(without))}")
            complete = False
    return notes if complete else [*notes, "mean: of what stands in each column"]


def _named(layers: Iterable[str]) -> str:
    """The first few layers, and how many more there are."""
    names = [printable(layer) for layer in layers]
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + more
