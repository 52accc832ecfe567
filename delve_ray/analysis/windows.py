"""Which windows a table of spectra holds, and the order of its layers: what the table, plots and commands share."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from delve_ray.analysis.keys import Keys, matching, numbers
from delve_ray.errors import ReadError
from delve_ray.schema import PHASES


def require_columns(spectra: pa.Table, names: Iterable[str]) -> None:
    """Raise ReadError when a table of spectra lacks columns that are needed."""
    if missing := [name for name in names if name not in spectra.column_names]:
        raise ReadError(f"spectra lack the columns {', '.join(missing)}; read them with read_spectra(paths)")


def check_phase(phase: str | None) -> str | None:
    """A phase, or None for both. Raises ReadError for another word."""
    if phase is not None and phase not in PHASES:
        raise ReadError(f"phase={phase!r} is none of {', '.join(map(repr, PHASES))}; leave it out for both")
    return phase


def distinct(column: pa.ChunkedArray) -> list[str]:
    """The distinct values of a column, in the order in which they appear first."""
    values: list[str] = pc.unique(column).to_pylist()
    return values


def steps_of(spectra: pa.Table, phase: str) -> list[int]:
    """The steps that have rows of a phase, ascending."""
    return sorted(pc.unique(matching(spectra, phase=phase).column("step")).to_pylist())


def select_windows(spectra: pa.Table, step: int | None = None, phase: str | None = None) -> dict[str, int]:
    """Of one run, the window to show for each phase: {phase: step}, train before eval.

    That is the window of `step`, or without it the last one of each phase, which may be different steps. A run
    that has not published anything gives an empty dict. Raises ReadError for a step or phase that has no rows.
    """
    chosen: dict[str, int] = {}
    for name in PHASES if check_phase(phase) is None else (str(phase),):
        steps = steps_of(spectra, name)
        if steps and (step is None or step in steps):
            chosen[name] = steps[-1] if step is None else step
    if not chosen and spectra.num_rows:
        there = "; ".join(f"{name} {_span(steps)}" for name in PHASES if (steps := steps_of(spectra, name)))
        asked = " and ".join(
            f"{what}={value}" for what, value in (("step", step), ("phase", phase)) if value is not None
        )
        raise ReadError(f"no rows with {asked}; there are: {there}")
    return chosen


def _span(steps: list[int]) -> str:
    return f"step {steps[0]}" if len(steps) == 1 else f"{len(steps)} steps from {steps[0]} to {steps[-1]}"


def network_order(spectra: pa.Table) -> list[str]:
    """The layers in the order of the network, which is the order of the rows within each window.

    A layer that only some windows have comes after the one that precedes it there.

    >>> rows = [("a", 0), ("c", 0), ("a", 1), ("b", 1), ("c", 1)]
    >>> columns = {"layer": [row[0] for row in rows], "step": [row[1] for row in rows]}
    >>> network_order(pa.table(columns | {"run": ["r"] * 5, "phase": ["train"] * 5}))
    ['a', 'b', 'c']
    """
    window = Keys(spectra).codes(("run", "phase", "step"))
    by_window = np.argsort(window, kind="stable")
    layer = spectra.column("layer").combine_chunks().dictionary_encode(null_encoding="encode")
    names, index = layer.dictionary.to_pylist(), numbers(layer.indices)[by_window]
    listed = np.split(index, np.flatnonzero(np.diff(window[by_window])) + 1)
    order: list[str] = []
    for layers in dict.fromkeys(tuple(each.tolist()) for each in listed):  # most windows have the same
        place = 0
        for layer in (names[number] for number in layers):
            if layer in order:
                place = order.index(layer) + 1
            else:
                order.insert(place, layer)
                place += 1
    return order
