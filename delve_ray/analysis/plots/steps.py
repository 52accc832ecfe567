"""Saturation over the steps of a training, a line per layer."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from delve_ray.analysis.plots.canvas import (
    MAX_LEGEND,
    MAX_TITLE,
    STYLES,
    add_depth_bar,
    depth_colours,
    finish,
    label_steps,
    new_figure,
    show_stat,
    text,
    tidy,
)
from delve_ray.analysis.plots.choices import only_run, phases_of, select, stat_matrix
from delve_ray.analysis.windows import network_order, steps_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MAX_MARKED_STEPS = 30
_MAX_THICK_LINES = 60


def saturation_over_steps(
    spectra: pa.Table, path: str | os.PathLike[str] | None = None, phase: str | None = None
) -> Figure:
    """Saturation of each layer over the steps: train solid, eval dashed, coloured by depth in the network.

    Args:
        spectra: What `read_spectra` returned, of one run.
        path: Write the figure there, in the format of the name's ending (.png, .pdf, .svg).
        phase: "train" or "eval"; by default both.

    Returns:
        A `matplotlib.figure.Figure` that pyplot knows nothing of. The lines' labels are "<phase> <layer>"; a window
        in which a layer has no saturation is a gap in its line.

    Raises:
        ImportError: matplotlib is not installed.
        ReadError: a column is missing, there are several runs, or nothing to draw.
    """
    spectra = select(spectra, ("saturation",))
    phases = phases_of(spectra, phase)
    run = only_run(spectra)
    layers = network_order(spectra)
    figure = new_figure(9, 4.8)
    panels = len(phases) if len(layers) > MAX_LEGEND else 1
    axes = figure.subplots(1, panels, sharex=True, sharey=True, squeeze=False)[0].tolist()
    colours = depth_colours(len(layers))
    for index, name in enumerate(phases):
        _draw(axes[index % panels], spectra, name, layers, colours)
        axes[index % panels].set_title(name if len(layers) > MAX_LEGEND else "", fontsize=10)
    figure.suptitle(f"Saturation per layer, run {text(run, MAX_TITLE)}", fontsize=11)
    _label_axes(axes, sorted({step for name in phases for step in steps_of(spectra, name)}))
    if len(layers) > MAX_LEGEND:
        add_depth_bar(figure, axes, layers, colours)
    else:
        _add_legend(figure, layers, colours, phases)
    return finish(figure, path)


def _draw(axes: Axes, spectra: pa.Table, phase: str, layers: Sequence[str], colours: Sequence[Any]) -> None:
    """A line for each layer that has a saturation in this phase."""
    steps, values = stat_matrix(spectra, phase, layers, "saturation")
    marker = "o" if len(steps) <= _MAX_MARKED_STEPS else ""
    width = 1.6 if len(layers) <= MAX_LEGEND else 1.0 if len(layers) <= _MAX_THICK_LINES else 0.5
    for layer, colour, line in zip(layers, colours, values, strict=True):
        if np.isfinite(line).any():
            label = f"{phase} {layer}"
            axes.plot(steps, line, STYLES[phase], color=colour, label=label, lw=width, marker=marker, ms=2 * width)


def _label_axes(panels: Sequence[Axes], steps: Sequence[int]) -> None:
    panels[0].set_ylabel("saturation")
    for axes in panels:
        if len(steps) == 1:
            axes.set_xlim(steps[0] - 0.5, steps[0] + 0.5)
        show_stat(axes, "y", "saturation", np.ones(1))
        label_steps(axes, steps)
        tidy(axes)


def _add_legend(figure: Figure, layers: Sequence[str], colours: Sequence[Any], phases: Sequence[str]) -> None:
    """The layers' colours and the phases' styles, beside the plot."""
    from matplotlib.lines import Line2D

    entries = [
        Line2D([], [], color=colour, linewidth=3, label=text(layer))
        for layer, colour in zip(layers, colours, strict=True)
    ]
    entries += [Line2D([], [], color="0.3", linestyle=STYLES[phase], label=phase) for phase in phases]
    figure.legend(handles=entries, loc="outside right upper", frameon=False, fontsize=9)
