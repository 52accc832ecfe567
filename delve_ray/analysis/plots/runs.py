"""Several runs beside each other, layer by layer."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from delve_ray.analysis.plots.canvas import (
    CATEGORIES,
    finish,
    name_depth,
    name_layers,
    new_figure,
    show_stat,
    stat_label,
    text,
    tidy,
)
from delve_ray.analysis.plots.choices import by_layer, phases_of, select_stat
from delve_ray.analysis.plots.heatmap import add_colour_bar, colour_norm, draw_mesh
from delve_ray.analysis.windows import distinct, network_order, steps_of
from delve_ray.errors import ReadError
from delve_ray.schema import F64

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_LINES = len(CATEGORIES)
"""Up to so many runs are lines; more are rows of colours."""
_MARKERS = "osD^vP*X"
_MAX_NAMED = 60
_MAX_NAMED_RUNS = 40


def compare_runs(
    spectra: pa.Table,
    path: str | os.PathLike[str] | None = None,
    *,
    phase: str | None = None,
    step: int | None = None,
    stat: str = "saturation",
) -> Figure:
    """A statistic of each layer in several runs: a line per run along the depth, or with more than 8 runs a row.

    The layers are those of all runs in network order; where a run lacks one, or a finite value of it, there is a gap.

    Args:
        spectra: What `read_spectra` returned, of one or several runs.
        path: Write the figure there, in the format of the name's ending (.png, .pdf, .svg).
        phase: "train" or "eval"; by default both, train above eval.
        step: The step whose windows are drawn; by default the last one of each run and phase. A run that lacks it is
            left out, which the legend says.
        stat: Column of a statistic, such as "saturation", "effective_rank" or "alpha".

    Returns:
        A `matplotlib.figure.Figure` that pyplot knows nothing of. The lines' labels are the runs' names.

    Raises:
        ImportError: matplotlib is not installed.
        OptionError: no statistic has this name.
        ReadError: a column is missing, no row has a value of it, or nothing to draw.
    """
    spectra = select_stat(spectra, stat)
    phases = phases_of(spectra, phase)
    runs = distinct(spectra.column("run"))
    layers = network_order(spectra)
    found = {name: _of_runs(spectra, name, step, stat, runs, layers) for name in phases}
    if not any(steps for steps, _ in found.values()):
        raise ReadError(f"no run has a window of step={step}; leave it out for the last one of each")
    found = {name: (steps, values) for name, (steps, values) in found.items() if steps}
    values = np.concatenate([values for _, values in found.values()])
    if len(runs) <= MAX_LINES:
        figure = _lines(found, runs, layers, stat, values)
    else:
        figure = _rows(found, runs, layers, stat, values)
    at = "last step" if step is None else f"step {step}"
    figure.suptitle(
        f"{stat_label(stat).capitalize()} per layer of {len(runs)} run{'s' if len(runs) > 1 else ''}, {at}", fontsize=11
    )
    figure.axes[len(found) - 1].set_xlabel(
        f"{len(layers)} layers, from the input to the output", fontsize=8, color="0.35"
    )
    return finish(figure, path)


def _of_runs(
    spectra: pa.Table, phase: str, step: int | None, stat: str, runs: Sequence[str], layers: Sequence[str]
) -> tuple[dict[str, int], F64]:
    """The step that is drawn of each run that has it, and its statistic: float64, (runs, layers), NaN for none."""
    rows = spectra.filter(pc.field("phase") == phase)
    values = np.full((len(runs), len(layers)), np.nan)
    steps = {}
    for index, run in enumerate(runs):
        own = rows.filter(pc.field("run") == run)
        there = steps_of(own, phase)
        if there and (step is None or step in there):
            steps[run] = there[-1] if step is None else step
            values[index] = by_layer(own.filter(pc.field("step") == steps[run]), stat, layers)
    return steps, np.where(np.isfinite(values), values, np.nan)


def _lines(
    found: Mapping[str, tuple[Mapping[str, int], F64]],
    runs: Sequence[str],
    layers: Sequence[str],
    stat: str,
    values: F64,
) -> Figure:
    """A panel per phase with a line per run."""
    from matplotlib.lines import Line2D

    figure = new_figure(9 if len(layers) <= 24 else 12, 1.4 + 3.2 * len(found))
    panels: list[Axes] = figure.subplots(len(found), 1, sharex=True, sharey=True, squeeze=False)[:, 0].tolist()
    size = 5.0 if len(layers) <= 60 else 2.0
    looks = list(zip(runs, CATEGORIES, _MARKERS, strict=False))
    for axes, (phase, (steps, of_phase)) in zip(panels, found.items(), strict=True):
        for (run, colour, marker), line in zip(looks, of_phase, strict=True):
            if run in steps:
                axes.plot(range(len(layers)), line, color=colour, label=run, marker=marker, ms=size, lw=1.3)
        axes.set_title(phase, fontsize=10)
        axes.set_ylabel(stat_label(stat))
        show_stat(axes, "y", stat, values)
        tidy(axes)
    name_depth(panels[-1], layers, _MAX_NAMED)
    entries = [
        Line2D([], [], color=colour, marker=marker, ms=5, label=text(run, 36) + _lacking(run, found))
        for run, colour, marker in looks
    ]
    figure.legend(handles=entries, loc="outside right upper", frameon=False, fontsize=8.5)
    return figure


def _lacking(run: str, found: Mapping[str, tuple[Mapping[str, int], F64]]) -> str:
    """Which of the phases a run is not in."""
    lacking = [phase for phase, (steps, _) in found.items() if run not in steps]
    return f" (no {' or '.join(lacking)})" if lacking else ""


def _rows(
    found: Mapping[str, tuple[Mapping[str, int], F64]],
    runs: Sequence[str],
    layers: Sequence[str],
    stat: str,
    values: F64,
) -> Figure:
    """A panel per phase with a row of colours per run."""
    height = 0.9 + 0.2 * min(len(runs), _MAX_NAMED_RUNS)
    figure = new_figure(12, 1.4 + height * len(found))
    panels: list[Axes] = figure.subplots(len(found), 1, sharex=True, sharey=True, squeeze=False)[:, 0].tolist()
    norm = colour_norm(stat, values)
    for axes, (phase, (_, of_phase)) in zip(panels, found.items(), strict=True):
        mesh = draw_mesh(axes, np.arange(-0.5, len(layers)), of_phase, norm)
        axes.set_title(phase, fontsize=10)
    for axes in panels:  # shared ticks do not share their size
        name_layers(axes.yaxis, runs, _MAX_NAMED_RUNS, fontsize=7)
    panels[0].set_ylim(len(runs) - 0.5, -0.5)
    name_depth(panels[-1], layers, _MAX_NAMED)
    panels[-1].set_xlim(-0.5, len(layers) - 0.5)
    add_colour_bar(figure, panels, mesh, stat)
    return figure
