"""The table of layers: a run's last window, or another one, as text."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import pyarrow as pa

from delve_ray.analysis.keys import matching
from delve_ray.analysis.windows import check_phase, distinct, network_order, require_columns, select_windows, steps_of
from delve_ray.schema import samples_per_feature

WIDTH = 80
"""Columns of text, unless said otherwise."""
NOTHING_YET = "No window is published yet."

COLUMNS = (
    *("run", "phase", "step", "layer", "layer_type", "features", "samples", "nonfinite_rows"),
    *("workers", "world_size", "final", "threshold", "intrinsic_dimensionality", "saturation"),
)
"""The columns of the spectra that `layer_table` needs."""
OPTIONAL_COLUMNS = ("saturation_low", "saturation_high")
"""Those that it shows where they are there."""
_MIN_BAR, _MAX_BAR = 5, 20
_RATIO = 6
"""Characters of n/d and a space; it is there where the bars keep `_MIN_BAR_BESIDE_RATIO`."""
_MIN_BAR_BESIDE_RATIO = 8
_MIN_TREND, _MAX_TREND = 4, 12
_MIN_BAR_BESIDE_TREND = 4
_LEVELS = "▁▂▃▄▅▆▇█"
_MIN_NAME = 8
_MAX_TYPE = 8
_ABSENT = "–"

Row = Mapping[str, Any]
"""One row of the spectra, by column."""


def layer_table(
    spectra: pa.Table, *, step: int | None = None, phase: str | None = None, width: int = WIDTH, trend: bool = False
) -> str:
    """A run's layers in network order: width, observations, intrinsic dimensionality and saturation of each.

    Args:
        spectra: What `read_spectra` returned; several runs give one table each, headed by the run.
        step: Show this step's windows; by default the last of each phase.
        phase: "train" or "eval"; by default both, beside each other.
        width: Columns of text to fit into. Bars shrink first, then n/d (samples / features) goes, then the trend, then
            names of layers are abbreviated.
        trend: Draw the course of each layer's saturation up to that step as well, where there are several steps.

    Returns:
        Lines without a trailing newline. The line `mean` is the unweighted mean over layers, as in the metrics.
        Below the table stand what was left out, who is missing, and which layers are undersampled (n < d), where
        there is anything to say.

    Raises:
        ReadError: a column is missing, or the step or phase has no rows.
    """
    require_columns(spectra, COLUMNS)
    check_phase(phase)
    spectra = spectra.select([*COLUMNS, *(name for name in OPTIONAL_COLUMNS if name in spectra.column_names)])
    runs = distinct(spectra.column("run"))
    if not runs:
        return NOTHING_YET
    tables = [_run_table(matching(spectra, run=run), step, phase, width, trend) for run in runs]
    if len(runs) == 1:
        return tables[0]
    return "\n\n".join(f"run {run}\n{table}" for run, table in zip(runs, tables, strict=True))


def _run_table(spectra: pa.Table, step: int | None, phase: str | None, width: int, trend: bool) -> str:
    windows: dict[str, dict[str, Row]] = {}
    steps = select_windows(spectra, step, phase)
    for name, shown in steps.items():
        rows = matching(spectra, phase=name, step=shown).to_pylist()
        windows[name] = {row["layer"]: row for row in rows}
    layers = [layer for layer in network_order(spectra) if any(layer in rows for rows in windows.values())]
    courses = {name: _courses(spectra, name, shown) for name, shown in steps.items()} if trend else {}
    lines, with_ratio, with_trend = _lay_out(layers, windows, steps, courses, width)
    notes = _notes(windows, with_ratio)
    if with_trend:
        notes.insert(1, "was: saturation over the steps, from 0 to the layer's own highest")
    return "\n".join(line.rstrip() for line in [*lines, *notes])


def _courses(spectra: pa.Table, phase: str, step: int) -> Mapping[str, Sequence[float | None]]:
    """Each layer's saturation at every step that the phase has up to `step`."""
    rows = matching(spectra, phase=phase)
    there = [shown for shown in steps_of(spectra, phase) if shown <= step]
    place = {shown: at for at, shown in enumerate(there)}
    courses: dict[str, list[float | None]] = {}
    columns = (rows.column(name).to_pylist() for name in ("layer", "step", "saturation"))
    for layer, at, value in zip(*columns, strict=True):
        if at in place:
            courses.setdefault(layer, [None] * len(there))[place[at]] = value
    return courses


def _lay_out(
    layers: Sequence[str],
    windows: Mapping[str, Mapping[str, Row]],
    steps: Mapping[str, int],
    courses: Mapping[str, Mapping[str, Sequence[float | None]]],
    width: int,
) -> tuple[list[str], bool, bool]:
    """Heading, one line per layer, and the mean; columns as wide as they must be, the bars take what is left.

    The other values say whether there was room for n/d, and for the courses, where there are any.
    """
    # Of a phase: a gap of 2, samples 7, dimension 4, the bar, per cent 4, and a space between each.
    room = width - len(" features") - len(windows) * (2 + 7 + 1 + 4 + 1 + 1 + 4)
    rows_of = {layer: next(rows[layer] for rows in windows.values() if layer in rows) for layer in layers}
    left, room = _left_columns(rows_of, room, len(windows) * _MIN_BAR)
    room //= len(windows)
    trend_width = _trend_width(courses, room)
    room -= trend_width + 1 if trend_width else 0
    with_ratio = room >= _RATIO + _MIN_BAR_BESIDE_RATIO
    shortest = _MIN_BAR_BESIDE_TREND if trend_width else _MIN_BAR
    bar_width = min(_MAX_BAR, max(shortest, room - (_RATIO if with_ratio else 0)))

    counts = f"{'samples':>7} {'n/d':>5} {'dim':>4}" if with_ratio else f"{'samples':>7} {'dim':>4}"
    title = f"{'saturation':<{bar_width + 5}}"
    if trend_width:  # where the bars are shorter than their heading, the next one gives way
        title = f"{title} was".ljust(bar_width + 5 + 1 + trend_width)
    heads = [f"{counts} {title}"] * len(windows)
    titles = [f" {name}, step {steps[name]} ".center(len(heads[0]), "─") for name in windows]
    lines = ["  ".join([" " * len(left[0]), *titles]), "  ".join([left[0], *heads])]
    for layer, described in zip(layers, left[1:], strict=True):
        cells = [_cell(rows.get(layer), bar_width, with_ratio) for rows in windows.values()]
        if trend_width:
            lanes = [sparkline(courses[name].get(layer, ()), trend_width) for name in windows]
            cells = [f"{cell} {lane:<{trend_width}}" for cell, lane in zip(cells, lanes, strict=True)]
        lines.append("  ".join([described, *cells]))
    saturations = [_saturation(mean_saturation(rows.values()), bar_width) for rows in windows.values()]
    means = [f"{'':{len(counts)}} {saturation}".ljust(len(heads[0])) for saturation in saturations]
    return [*lines, "  ".join(["mean".ljust(len(left[0])), *means])], with_ratio, bool(trend_width)


def _trend_width(courses: Mapping[str, Mapping[str, Sequence[float | None]]], room: int) -> int:
    """Columns for the course of a layer; 0 where there is one step alone, or no room beside the shortest bars."""
    most = max((len(course) for layers in courses.values() for course in layers.values()), default=0)
    room -= _MIN_BAR_BESIDE_TREND + 1
    return 0 if most < 2 or room < _MIN_TREND else min(_MAX_TREND, room, max(most, _MIN_TREND))


def _left_columns(rows: Mapping[str, Row], room: int, bars: int) -> tuple[list[str], int]:
    """Name, type and features of each layer below their heading, and the room that they leave for the bars.

    `room` is for name, type and bars, which want `bars` at least. Where not even abbreviated names fit beside the
    types, the types go.
    """
    types = [shorten(printable(str(row["layer_type"] or _ABSENT)), _MAX_TYPE) for row in rows.values()]
    type_width = 1 + max(map(len, [*types, "type"]))
    if max(len(abbreviate(layer, 0)) for layer in rows) > room - bars - type_width:
        types, type_width = [""] * len(types), 0
    longest = max(map(len, [*map(printable, rows), "layer"]))
    name_width = min(longest, max(_MIN_NAME, room - bars - type_width))
    lines = [f"{'layer':<{name_width}}{' type'[:type_width]:<{type_width}} features"]
    for (layer, row), kind in zip(rows.items(), types, strict=True):
        described = f" {kind}" if type_width else ""
        name = shorten_layer(layer, name_width)
        lines.append(f"{name:<{name_width}}{described:<{type_width}} {_count(row['features']):>8}")
    return lines, room - name_width - type_width


def _cell(row: Row | None, bar_width: int, with_ratio: bool) -> str:
    """What one layer did in one phase."""
    shown = row or {"samples": None, "features": None, "intrinsic_dimensionality": None, "saturation": None}
    dimension = shown["intrinsic_dimensionality"]
    counts = [
        f"{_count(shown['samples']):>7}",
        *([f"{_ratio(_samples_per_feature(shown)):>5}"] if with_ratio else []),
        f"{_ABSENT if dimension is None else str(dimension):>4}",
    ]
    return f"{' '.join(counts)} {_saturation(shown['saturation'], bar_width)}"


def _samples_per_feature(row: Row) -> float | None:
    """n/d from a row's counts, so that files of before it was a column have it, too."""
    known = row["samples"] is not None and row["features"] is not None
    return samples_per_feature(row["samples"], row["features"]) if known else None


def _ratio(value: float | None) -> str:
    """n/d in at most five characters; what is below 1 is not rounded to it.

    >>> _ratio(0.004), _ratio(0.36), _ratio(0.999), _ratio(12.34), _ratio(4581.7), _ratio(1_234_567.0)
    ('<0.01', '0.36', '0.99', '12.3', '4582', '1e+06')
    """
    if value is None:
        return _ABSENT
    if 0 < value < 0.01:
        return "<0.01"
    value = min(value, 0.99) if value < 1 else value
    for bound, digits in ((9.995, 2), (99.95, 1), (99999.5, 0)):
        if value < bound:
            return f"{value:.{digits}f}"
    return f"{value:.0e}"


def _saturation(share: float | None, bar_width: int) -> str:
    """A share as a bar and per cent."""
    if share is None or not math.isfinite(share):
        return f"{'':{bar_width}} {_ABSENT:>4}"
    return f"{bar(share, bar_width)} {share:>4.0%}"


def bar(share: float, width: int) -> str:
    """A share in [0, 1] of `width` characters, to half a character; more than nothing is never drawn as nothing.

    >>> bar(0.55, 10), bar(0.0, 4), bar(0.001, 4)
    ('━━━━━╸────', '────', '╸───')
    """
    halves = round(min(max(share, 0.0), 1.0) * 2 * width)
    if share > 0:
        halves = max(halves, 1)
    return ("━" * (halves // 2) + "╸" * (halves % 2)).ljust(width, "─")


def sparkline(values: Sequence[float | None], width: int) -> str:
    """A course of values, from 0 to the highest, in at most `width` characters; where there is no value is a blank.

    Of more values than characters, each character is the mean of consecutive ones.

    >>> sparkline([0.1, 0.2, None, 0.4, 0.8], 10), sparkline([0.0, 0.0, 1.0, 0.0], 2)
    ('▂▃ ▅█', '▁█')
    """
    count = min(width, len(values))
    ends = [round(index * len(values) / count) for index in range(count + 1)] if count else []
    means: list[float | None] = []
    for start, end in pairwise(ends):
        finite = [value for value in values[start:end] if value is not None and math.isfinite(value)]
        means.append(sum(finite) / len(finite) if finite else None)
    highest = max((value for value in means if value is not None), default=0.0)
    levels = len(_LEVELS) - 1
    return "".join(
        " " if value is None else _LEVELS[round(max(value, 0.0) / highest * levels) if highest > 0 else 0]
        for value in means
    )


def mean_saturation(rows: Iterable[Row]) -> float | None:
    """The unweighted mean over the rows whose saturation is finite; None without any."""
    values = [row["saturation"] for row in rows if row["saturation"] is not None and math.isfinite(row["saturation"])]
    return sum(values) / len(values) if values else None


def shorten_layer(name: str, width: int) -> str:
    """A layer's name in `width` characters: abbreviated, and if that is still too long, without its beginning."""
    short = abbreviate(printable(name), width)
    return short if len(short) <= width else "…" + short[len(short) - width + 1 :]


def abbreviate(name: str, width: int) -> str:
    """A dotted name whose parts, from the left, lose all but their first letter and number until it fits.

    Numbers stay, because they tell layers apart, and so does the last part.

    >>> abbreviate("model.layers.31.self_attn.q_proj", 24), abbreviate("layer4.1.downsample.0", 10)
    ('m.l.31.self_attn.q_proj', 'l4.1.d.0')
    """
    parts = name.split(".")
    for index, part in enumerate(parts[:-1]):
        if len(".".join(parts)) <= width:
            break
        number = re.search(r"\d*$", part)
        parts[index] = part if part.isdigit() else part[:1] + (number[0] if number else "")
    return ".".join(parts)


def shorten(text: str, width: int) -> str:
    """A text in `width` characters; what is too long loses its end.

    >>> shorten("NonDynamicallyQuantizableLinear", 8)
    'NonDyna…'
    """
    return text if len(text) <= width else text[: width - 1] + "…"


def printable(text: str) -> str:
    r"""The text with what would break a line or steer a terminal escaped.

    >>> printable("a\nb")
    'a\\nb'
    """
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def _count(number: int | None) -> str:
    """A count in at most seven characters.

    >>> _count(45824), _count(1_234_567), _count(98_765_432_100)
    ('45824', '1234567', '98.8G')
    """
    if number is None:
        return _ABSENT
    if number < 10**7:
        return str(number)
    for unit in "MGTP":
        number_of = number / 1000 ** ("MGTP".index(unit) + 2)
        if number_of < 999.95:
            return f"{number_of:.1f}{unit}"
    return f"{number:.1e}"


def _notes(windows: Mapping[str, Mapping[str, Row]], with_ratio: bool) -> list[str]:
    """What the numbers mean, and in which windows something is missing."""
    rows = [row for layers in windows.values() for row in layers.values()]
    shares = [f"{100 * value:g} %" for value in sorted({row["threshold"] for row in rows if row["threshold"]})]
    notes = [f"dim: dimensions that hold {' or '.join(shares) or 'δ'} of the variance; saturation: dim / features"]
    if with_ratio or any(map(_undersampled, rows)):
        notes.append("n/d: samples / features")
    for phase, layers in windows.items():
        if any(row["final"] is False for row in layers.values()):
            notes.append(f"{phase}: live, the window is still open")
        closed = [(row["workers"], row["world_size"]) for row in layers.values() if row["workers"] is not None]
        workers, world_size = min(closed, default=(None, None))
        if workers is not None and world_size is not None and workers < world_size:
            notes.append(f"{phase}: {workers} of {world_size} workers have closed the window")
        left_out = {layer: str(row["nonfinite_rows"]) for layer, row in layers.items() if row["nonfinite_rows"]}
        if left_out:
            notes.append(f"{phase}: non-finite rows left out: {_first(left_out)}")
        scarce = {layer: _ratio(_samples_per_feature(row)) for layer, row in layers.items() if _undersampled(row)}
        sketched = {
            layer: f"{row['saturation_low']:.0%} to {row['saturation_high']:.0%}"
            for layer, row in layers.items()
            if row.get("saturation_low") is not None and row.get("saturation_high") is not None
        }
        if sketched:
            notes.append(f"{phase}: sketched, with bounds of the saturation: {_first(sketched)}")
        if without := {layer: "" for layer in sketched if layers[layer]["saturation"] is None}:
            notes.append(f"{phase}: the mean is without {_first(without)}")
        if scarce:
            notes.append(f"{phase}: undersampled, n/d is below 1: {_first(scarce)}")
    return notes


def _undersampled(row: Row) -> bool:
    """Whether a row has fewer samples than features."""
    ratio = _samples_per_feature(row)
    return ratio is not None and ratio < 1


def _first(layers: Mapping[str, str], shown: int = 3) -> str:
    """The first few layers with what is said of them, and how many more there are.

    >>> _first({"a": "1", "b": "2", "c": "3", "d": "4", "e": "5"})
    'a 1, b 2, c 3 and 2 more layers'
    """
    named = ", ".join(f"{printable(layer)} {said}".rstrip() for layer, said in list(layers.items())[:shown])
    more = len(layers) - shown
    return named + (f" and {more} more layer{'s' if more > 1 else ''}" if more > 0 else "")
