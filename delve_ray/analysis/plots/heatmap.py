"""A statistic of every layer at every step, as colours."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from delve_ray.analysis.plots.canvas import (
    ABSENT_COLOUR,
    MAX_TITLE,
    SHARES,
    finish,
    is_logarithmic,
    label_steps,
    name_layers,
    new_figure,
    percent,
    stat_label,
    text,
)
from delve_ray.analysis.plots.choices import only_run, phases_of, select_stat, stat_matrix
from delve_ray.analysis.windows import network_order
from delve_ray.schema import F64

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh
    from matplotlib.figure import Figure

_MAX_NAMED = 44
_INCHES_PER_LAYER = 0.2


def stat_heatmap(
    spectra: pa.Table,
    path: str | os.PathLike[str] | None = None,
    *,
    stat: str = "saturation",
    phase: str | None = None,
) -> Figure:
    """A statistic of each layer at each step as a colour: layers from the input on top to the output below.

    Colours are logarithmic where all values are above 0 and spread over more than a factor of 1000; those of shares
    begin at 0. A cell is grey where the layer has no value in that window, or one that is not finite.

    Args:
        spectra: What `read_spectra` returned, of one run.
        path: Write the figure there, in the format of the name's ending (.png, .pdf, .svg).
        stat: Column of a statistic, such as "saturation", "effective_rank" or "alpha".
        phase: "train" or "eval"; by default both, beside each other with the same colours.

    Returns:
        A `matplotlib.figure.Figure` that pyplot knows nothing of. Each mesh holds an array of (layers, steps).

    Raises:
        ImportError: matplotlib is not installed.
        OptionError: no statistic has this name.
        ReadError: a column is missing, no row has a value of it, there are several runs, or nothing to draw.
    """
    spectra = select_stat(spectra, stat)
    run = only_run(spectra)
    phases = phases_of(spectra, phase)
    layers = network_order(spectra)
    matrices = {name: stat_matrix(spectra, name, layers, stat) for name in phases}
    norm = colour_norm(stat, np.concatenate([values.ravel() for _, values in matrices.values()]))
    rows = min(len(layers), _MAX_NAMED)
    figure = new_figure(5.5 + 3.5 * len(phases), max(3.0, 1.4 + _INCHES_PER_LAYER * rows))
    axes = figure.subplots(1, len(phases), sharey=True, squeeze=False)[0].tolist()
    for panel, (name, (steps, values)) in zip(axes, matrices.items(), strict=True):
        mesh = draw_mesh(panel, step_edges(steps), values, norm)
        panel.set_title(name, fontsize=10)
        label_steps(panel, steps)
    name_layers(axes[0].yaxis, layers, _MAX_NAMED, fontsize=8)
    axes[0].set_ylim(len(layers) - 0.5, -0.5)
    add_colour_bar(figure, axes, mesh, stat)
    figure.suptitle(f"{stat_label(stat).capitalize()} per layer and step, run {text(run, MAX_TITLE)}", fontsize=11)
    return finish(figure, path)


def step_edges(steps: Sequence[int]) -> F64:
    """Where each step's column begins and ends: half-way to its neighbours, which may be unevenly far.

    >>> step_edges([0, 10, 40]).tolist(), step_edges([7]).tolist()
    ([-5.0, 5.0, 25.0, 55.0], [6.5, 7.5])
    """
    at = np.asarray(steps, np.float64)
    if at.size == 1:
        return np.array([at[0] - 0.5, at[0] + 0.5])
    between: F64 = (at[1:] + at[:-1]) / 2
    return np.concatenate([[2 * at[0] - between[0]], between, [2 * at[-1] - between[-1]]])


def colour_norm(stat: str, values: F64) -> Any:
    """The scale from a statistic's finite values to colours."""
    from matplotlib.colors import LogNorm, Normalize

    finite = values[np.isfinite(values)]
    if is_logarithmic(stat, values):
        return LogNorm(float(finite.min()), float(finite.max()))
    low = 0.0 if stat in SHARES else float(finite.min(initial=np.inf))
    high = float(finite.max(initial=-np.inf))
    return (
        Normalize(low, high) if low < high else Normalize(low - 0.5, low + 0.5) if np.isfinite(low) else Normalize(0, 1)
    )


def draw_mesh(axes: Axes, edges: F64, values: F64, norm: Any) -> QuadMesh:
    """Rows of colours from the top down, their columns between `edges`; what is not finite stays grey."""
    axes.set_facecolor(ABSENT_COLOUR)
    rows = np.arange(len(values) + 1) - 0.5
    return axes.pcolormesh(edges, rows, np.ma.masked_invalid(values), norm=norm, cmap="viridis", rasterized=True)


def add_colour_bar(figure: Figure, panels: Sequence[Axes], mesh: QuadMesh, stat: str) -> None:
    """What value a colour means."""
    label = f"{stat_label(stat)} (grey: none)"
    shown = percent() if stat in SHARES else None
    figure.colorbar(mesh, ax=panels, label=label, format=shown, pad=0.02, aspect=30)
