"""Plots of spectra with matplotlib, which is imported when the first one is drawn."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from delve_ray.analysis.table import shorten_layer
from delve_ray.analysis.windows import check_phase, distinct, network_order, require_columns, steps_of
from delve_ray.errors import ReadError
from delve_ray.schema import F64, PHASES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_LEGEND = 12
"""Up to so many layers have an entry each in the legend; more get a colour bar, and a panel per phase."""
_STYLES: dict[str, Literal["-", "--"]] = {"train": "-", "eval": "--"}
_MAX_MARKED_STEPS = 30
_MAX_LABEL = 28
_DPI = 120


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
    require_columns(spectra, ("run", "phase", "step", "layer", "saturation"))
    phases = [name for name in (PHASES if check_phase(phase) is None else (str(phase),)) if steps_of(spectra, name)]
    runs = distinct(spectra.column("run"))
    if len(runs) > 1:
        raise ReadError(f"spectra hold {len(runs)} runs ({', '.join(runs[:3])}, …); give those of one")
    if not phases:
        raise ReadError(
            "spectra hold no window to draw" if phase is None else f"spectra hold no window of phase={phase!r}"
        )
    figure_class, canvas_class = _matplotlib()
    layers = network_order(spectra)
    figure: Figure = figure_class(figsize=(9, 4.8), dpi=_DPI, layout="constrained")
    canvas_class(figure)
    panels = len(phases) if len(layers) > MAX_LEGEND else 1
    axes = figure.subplots(1, panels, sharex=True, sharey=True, squeeze=False)[0].tolist()
    colours = depth_colours(len(layers))
    for index, name in enumerate(phases):
        _draw(axes[index % panels], spectra, name, layers, colours)
        axes[index % panels].set_title(name if len(layers) > MAX_LEGEND else "", fontsize=10)
    figure.suptitle(f"Saturation per layer, run {_text(runs[0], 60)}", fontsize=11)
    _label_axes(axes, sorted({step for name in phases for step in steps_of(spectra, name)}))
    if len(layers) > MAX_LEGEND:
        _add_colour_bar(figure, axes, layers, colours)
    else:
        _add_legend(figure, layers, colours, phases)
    if path is not None:
        figure.savefig(path)
    return figure


def _draw(axes: Axes, spectra: pa.Table, phase: str, layers: Sequence[str], colours: Sequence[Any]) -> None:
    """A line for each layer that has a saturation in this phase."""
    steps, values = saturation_matrix(spectra, phase, layers)
    marker = "o" if len(steps) <= _MAX_MARKED_STEPS else ""
    width = 1.6 if len(layers) <= MAX_LEGEND else 1.0
    for layer, colour, line in zip(layers, colours, values, strict=True):
        if np.isfinite(line).any():
            label = f"{phase} {layer}"
            axes.plot(steps, line, _STYLES[phase], color=colour, label=label, lw=width, marker=marker, ms=2 * width)


def saturation_matrix(spectra: pa.Table, phase: str, layers: Sequence[str]) -> tuple[list[int], F64]:
    """The steps of a phase, ascending, and each layer's saturation at each: float64, (layers, steps), NaN for none."""
    rows = spectra.filter(pc.field("phase") == phase)
    steps = steps_of(spectra, phase)
    matrix = np.full((len(layers), len(steps)), np.nan)
    layer = pc.index_in(rows.column("layer"), pa.array(layers)).to_numpy()
    step = pc.index_in(rows.column("step"), pa.array(steps, pa.int64())).to_numpy()
    matrix[layer, step] = rows.column("saturation").to_numpy()
    return steps, matrix


def depth_colours(count: int) -> list[Any]:
    """One colour per layer, dark at the input and light at the output; the lightest yellow is left out."""
    from matplotlib import colormaps

    return [colormaps["viridis"](0.9 * depth / max(count - 1, 1)) for depth in range(count)]


def _matplotlib() -> tuple[Any, Any]:
    """The figure and the canvas that draws it without a display."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('plots need matplotlib: pip install "delve_ray[plot]"') from error
    return Figure, FigureCanvasAgg


def _label_axes(panels: Sequence[Axes], steps: Sequence[int]) -> None:
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    panels[0].set_ylabel("saturation")
    for axes in panels:
        axes.set_xlabel("step")
        axes.set_ylim(-0.02, 1.02)
        if len(steps) == 1:
            axes.set_xlim(steps[0] - 0.5, steps[0] + 0.5)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)


def _add_legend(figure: Figure, layers: Sequence[str], colours: Sequence[Any], phases: Sequence[str]) -> None:
    """The layers' colours and the phases' styles, beside the plot."""
    from matplotlib.lines import Line2D

    entries = [
        Line2D([], [], color=colour, linewidth=3, label=_text(layer, _MAX_LABEL))
        for layer, colour in zip(layers, colours, strict=True)
    ]
    entries += [Line2D([], [], color="0.3", linestyle=_STYLES[phase], label=phase) for phase in phases]
    figure.legend(handles=entries, loc="outside right upper", frameon=False, fontsize=9)


def _add_colour_bar(figure: Figure, panels: Sequence[Axes], layers: Sequence[str], colours: Sequence[Any]) -> None:
    """The depth that a colour means, with the names of some layers; the input on top, as in a listing."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, ListedColormap

    norm = BoundaryNorm(np.arange(len(layers) + 1) - 0.5, len(layers))
    bar = figure.colorbar(ScalarMappable(norm, ListedColormap(colours)), ax=panels, pad=0.02, aspect=30)
    named = np.unique(np.linspace(0, len(layers) - 1, MAX_LEGEND).round().astype(int)).tolist()
    bar.set_ticks(named, labels=[_text(layers[index], _MAX_LABEL) for index in named], fontsize=8)
    bar.ax.tick_params(length=0, which="both")
    bar.ax.invert_yaxis()


def _text(name: str, length: int) -> str:
    """A name as matplotlib shows it: a dollar would start a formula, a leading underscore hide a legend's entry."""
    shown = shorten_layer(name, length).replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown
