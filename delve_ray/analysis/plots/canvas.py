"""What the pictures share in drawing: the figure, names as they are shown, colours, scales and axes of layers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from delve_ray.analysis.table import abbreviate, printable
from delve_ray.schema import F64

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from matplotlib.ticker import Formatter

MAX_LEGEND = 12
"""Up to so many layers have an entry each in the legend; more get a colour bar, and a panel per phase."""
MAX_LABEL = 28
"""Characters of a layer's name in a picture."""
MAX_TITLE = 60
"""Characters of a run's name in a title."""
STYLES: dict[str, Literal["-", "--"]] = {"train": "-", "eval": "--"}
PHASE_COLOURS = {"train": "#0072B2", "eval": "#E69F00"}
DARK_PHASE_COLOURS = {"train": "#00314D", "eval": "#7A5200"}
"""Of lines that cross what has the phase's colour."""
CATEGORIES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000", "#B0A000")
"""Okabe and Ito's colours, which the colour-blind can tell apart (jfly.uni-koeln.de/color), their yellow darkened."""
ABSENT_COLOUR = "0.85"
"""Of cells and points that have no value."""
SHARES = frozenset({"saturation", "correlation_saturation"})
"""Statistics between 0 and 1, shown in per cent."""
LARGEST = 1e250
"""Axes hold values up to this, and from its inverse: margins beyond float64 would be no numbers."""
_LOG_FROM = 1000.0
_MAX_NAMED_STEPS = 4
_MAX_LEVEL_CHARACTERS = 70
"""So many characters of names stand beside each other along the depth of the narrowest picture."""
_DPI = 120


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of this size in inches, with a canvas that needs no display.

    Raises ImportError, with what to install, where matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('plots need matplotlib: pip install "delve_ray[plot]"') from error
    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def finish(figure: Figure, path: str | os.PathLike[str] | None) -> Figure:
    """Write the figure where there is a path, and return it."""
    if path is not None:
        figure.savefig(path)
    return figure


def text(name: str, length: int = MAX_LABEL) -> str:
    r"""A name as matplotlib shows it: a dollar would start a formula, a leading underscore hide a legend's entry.

    >>> text("a$b"), text("_hidden"), text("line\nbreak")
    ('a\\$b', ' _hidden', 'line\\nbreak')
    """
    shown = shorten_middle(abbreviate(printable(name), length), length).replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown


def shorten_middle(name: str, length: int) -> str:
    """A name in `length` characters: the numbers of its blocks stand in front, and what the layer does at its end.

    >>> shorten_middle("m.d.l.17.s.very_long_projection_q_proj", 24)
    'm.d.l.17.s…ection_q_proj'
    """
    if len(name) <= length:
        return name
    front = (length - 1) * 2 // 5 + 1
    return f"{name[:front]}…{name[len(name) - (length - 1 - front) :]}"


def stat_label(stat: str) -> str:
    """A statistic's name in words."""
    return stat.replace("_", " ")


def evenly(count: int, most: int) -> list[int]:
    """Indices of at most `most` of `count` things, the first and the last among them.

    >>> evenly(5, 12), evenly(300, 4)
    ([0, 1, 2, 3, 4], [0, 100, 199, 299])
    """
    indices: list[int] = np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int)).tolist()
    return indices


def depth_colours(count: int) -> list[Any]:
    """One colour per layer, dark at the input and light at the output; the lightest yellow is left out."""
    from matplotlib import colormaps

    return [colormaps["viridis"](0.9 * depth / max(count - 1, 1)) for depth in range(count)]


def add_depth_bar(figure: Figure, panels: Sequence[Axes], layers: Sequence[str], colours: Sequence[Any]) -> None:
    """The depth that a colour means, with the names of some layers; the input on top, as in a listing."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, ListedColormap

    norm = BoundaryNorm(np.arange(len(layers) + 1) - 0.5, max(len(layers), 1))
    bar = figure.colorbar(ScalarMappable(norm, ListedColormap(colours)), ax=panels, pad=0.02, aspect=30)
    named = evenly(len(layers), MAX_LEGEND)
    bar.set_ticks(named, labels=[text(layers[index]) for index in named], fontsize=8)
    bar.ax.tick_params(length=0, which="both")
    bar.ax.invert_yaxis()


def name_layers(axis: Axis, layers: Sequence[str], most: int, **style: Any) -> None:
    """Names of at most `most` of the layers, spread evenly, at their indices along an axis."""
    named = evenly(len(layers), most)
    axis.set_ticks(named, labels=[text(layers[index]) for index in named], **style)
    axis.set_tick_params(length=3 if len(named) < len(layers) else 0)


def name_depth(axes: Axes, layers: Sequence[str], most: int) -> None:
    """Layers along the x axis, from the input on the left to the output on the right."""
    style: dict[str, Any] = {"fontsize": 7, "rotation": 90}
    if len(layers) <= MAX_LEGEND:
        style = {"fontsize": 9, "rotation": 40, "ha": "right", "rotation_mode": "anchor"}
        if max(len(text(layer)) for layer in layers) * len(layers) <= _MAX_LEVEL_CHARACTERS:
            style = {"fontsize": 9}
    name_layers(axes.xaxis, layers, most, **style)
    axes.set_xlim(-0.6, len(layers) - 0.4)


def is_logarithmic(stat: str, values: F64) -> bool:
    """Whether values are better read by their logarithms: all above 0, and the largest 1000 times the smallest."""
    finite = values[np.isfinite(values)]
    if stat in SHARES or finite.size == 0 or finite.min() <= 0:
        return False
    return bool(np.log10(finite.max()) - np.log10(finite.min()) > np.log10(_LOG_FROM))


def percent() -> Formatter:
    """Shares as per cent, with no more digits than they need."""
    from matplotlib.ticker import FuncFormatter

    return FuncFormatter(lambda share, _: f"{100 * share:g}%")


def top_share(values: F64) -> float:
    """Where an axis of shares ends: a tenth above the largest, at most at 1.

    >>> round(top_share(np.array([0.1, 0.4, np.nan])), 12), top_share(np.array([0.95])), top_share(np.array([np.nan]))
    (0.44, 1.0, 1.0)
    """
    largest = float(values[np.isfinite(values)].max(initial=0.0))
    return min(1.1 * largest, 1.0) if largest > 0 else 1.0


def halo() -> list[Any]:
    """A white rim that keeps text legible on top of lines."""
    from matplotlib.patheffects import withStroke

    return [withStroke(linewidth=2, foreground="white")]


def show_stat(axes: Axes, which: Literal["x", "y"], stat: str, values: F64) -> None:
    """A statistic along an axis: shares in per cent from 0 up, others logarithmic where that reads better."""
    if stat in SHARES:
        top = top_share(values)
        axes.set(**{f"{which}lim": (-0.02 * top, 1.02 * top)})
        (axes.xaxis if which == "x" else axes.yaxis).set_major_formatter(percent())
    elif is_logarithmic(stat, values):
        axes.set(**{f"{which}scale": "log"})


def label_steps(axes: Axes, steps: Sequence[int]) -> None:
    """Whole steps along the x axis."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("step")
    if len(steps) <= _MAX_NAMED_STEPS:
        axes.set_xticks(steps)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))


def tidy(axes: Axes) -> None:
    """A light grid, and no frame where there is nothing to read off."""
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
