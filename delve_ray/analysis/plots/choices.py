"""What the pictures share in choosing: which runs, windows, layers and statistics of a table are drawn."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from delve_ray.analysis.plots.canvas import LARGEST, evenly
from delve_ray.analysis.windows import check_phase, distinct, require_columns, select_windows, steps_of
from delve_ray.errors import OptionError, ReadError
from delve_ray.schema import EXTRA_STATS, F64, PHASES, SCALAR_STATS

STATS = (*SCALAR_STATS, *EXTRA_STATS, "samples_per_feature", "alpha_r2", "mean_norm")
"""Columns that a picture of a statistic can show."""
KEYS = ("run", "phase", "step", "layer")
"""Columns that say whose a row is."""


def select(spectra: pa.Table, columns: Iterable[str], optional: Iterable[str] = ()) -> pa.Table:
    """The keys of the rows and these columns, so that nothing copies eigenvalues that a picture does not need.

    Those of `optional` are there where the table has them. Raises ReadError for a column that is missing, or a table
    without rows.
    """
    wanted = tuple(dict.fromkeys((*KEYS, *columns)))
    require_columns(spectra, wanted)
    if spectra.num_rows == 0:
        raise ReadError("spectra hold no window to draw: nothing is published yet, or a filter left nothing")
    return spectra.select([*wanted, *(name for name in optional if name in spectra.column_names)])


def only_run(spectra: pa.Table) -> str:
    """The run of a table. Raises ReadError where it holds several."""
    runs = distinct(spectra.column("run"))
    if len(runs) > 1:
        names = ", ".join(map(str, runs[:3])) + (", …" if len(runs) > 3 else "")
        raise ReadError(f"spectra hold {len(runs)} runs ({names}); give those of one, or draw compare_runs")
    return str(runs[0])


def windows_of(spectra: pa.Table, step: int | None, phase: str | None) -> dict[str, pa.Table]:
    """The rows of each phase's window at `step`, by default its last; train before eval. Errors: `select_windows`."""
    chosen = select_windows(spectra.select(KEYS), step, phase)  # without the eigenvalues, which it would copy
    return {name: spectra.filter((pc.field("phase") == name) & (pc.field("step") == at)) for name, at in chosen.items()}


def phases_of(spectra: pa.Table, phase: str | None) -> list[str]:
    """The phases to draw that have rows. Raises ReadError for none, or another word."""
    phases = [name for name in (PHASES if check_phase(phase) is None else (str(phase),)) if steps_of(spectra, name)]
    if not phases:
        raise ReadError(
            "spectra hold no window to draw" if phase is None else f"spectra hold no window of phase={phase!r}"
        )
    return phases


def step_of(window: pa.Table) -> int:
    """The step of the rows of one window."""
    return int(window.column("step")[0].as_py())


def select_stat(spectra: pa.Table, stat: str) -> pa.Table:
    """The keys of the rows and one statistic; all else as `select`.

    Raises OptionError for an unknown name too, and ReadError for a statistic that no row has a value of.
    """
    if stat not in STATS:
        close = get_close_matches(str(stat), STATS, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise OptionError(f"stat={stat!r} is unknown; {hint}Valid names: {', '.join(STATS)}")
    selected = select(spectra, (stat,))
    if selected.column(stat).null_count == len(selected):
        filled = [
            name
            for name in STATS
            if name in spectra.column_names and spectra.column(name).null_count < spectra.num_rows
        ]
        sketched = "sketched" in spectra.column_names and pc.any(spectra.column("sketched")).as_py()
        why = "the layers are sketched, which do not tell it" if sketched else "name it in stats= when recording"
        raise ReadError(f"no row has a value of stat={stat!r}: {why}. There are: {', '.join(filled) or 'none'}")
    return selected


def choose_layers(
    order: Sequence[str], layers: Sequence[str] | str | None, default: int, most: int
) -> tuple[list[str], str]:
    """The layers to draw, in network order, and what a title says where those are not all.

    `default` of them, spread evenly over depth, where none are named; of those named at most `most`, likewise.
    Raises ReadError for an unknown name, or an empty list.

    >>> choose_layers(["a", "b", "c", "d", "e"], None, 3, 9)
    (['a', 'c', 'e'], '3 of 5 layers, evenly by depth, ')
    >>> choose_layers(["a", "b", "c"], ["c", "a"], 3, 9)
    (['a', 'c'], '')
    """
    if layers is None:
        return _thinned(order, default)
    named = [layers] if isinstance(layers, str) else list(layers)
    if not named:
        raise ReadError("layers=[] names none; leave it out for some of all")
    for name in named:
        if name not in order:
            close = get_close_matches(str(name), order, n=3, cutoff=0.4) or [
                order[index] for index in evenly(len(order), 3)
            ]
            raise ReadError(f"layers: no layer {name!r} among the {len(order)}; near: {', '.join(map(repr, close))}")
    wanted = [layer for layer in order if layer in set(named)]
    return _thinned(wanted, most)


def _thinned(layers: Sequence[str], most: int) -> tuple[list[str], str]:
    chosen = [layers[index] for index in evenly(len(layers), most)]
    thinned = len(chosen) < len(layers)
    return chosen, f"{len(chosen)} of {len(layers)} layers, evenly by depth, " if thinned else ""


def floats(column: pa.ChunkedArray) -> F64:
    """A column as float64, NaN for null; what is beyond the reach of axes counts as infinite, or as zero."""
    values = pc.fill_null(column.cast(pa.float64(), safe=False), np.nan).to_numpy()
    size = np.abs(values)
    return np.where(size > LARGEST, np.copysign(np.inf, values), np.where(size < 1 / LARGEST, 0.0, values))


def by_layer(window: pa.Table, column: str, layers: Sequence[str]) -> F64:
    """A column of one window's rows for each of `layers`: float64, NaN for none."""
    values = np.full(len(layers), np.nan)
    index = pc.index_in(window.column("layer"), pa.array(layers, pa.string())).fill_null(-1).to_numpy()
    values[index[index >= 0]] = floats(window.column(column))[index >= 0]
    return values


def stat_matrix(spectra: pa.Table, phase: str, layers: Sequence[str], stat: str) -> tuple[list[int], F64]:
    """The steps of a phase, ascending, and a layer's statistic at each: float64, (layers, steps), NaN for none."""
    rows = spectra.filter(pc.field("phase") == phase)
    steps = steps_of(rows, phase)
    matrix = np.full((len(layers), len(steps)), np.nan)
    layer = pc.index_in(rows.column("layer"), pa.array(layers, pa.string())).to_numpy()
    step = pc.index_in(rows.column("step"), pa.array(steps, pa.int64())).to_numpy()
    matrix[layer, step] = floats(rows.column(stat))
    return steps, matrix
