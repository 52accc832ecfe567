"""Training against evaluation: one point per layer."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from delve_ray.analysis.plots.canvas import (
    MAX_TITLE,
    SHARES,
    add_depth_bar,
    depth_colours,
    finish,
    halo,
    is_logarithmic,
    new_figure,
    show_stat,
    stat_label,
    text,
    tidy,
    top_share,
)
from delve_ray.analysis.plots.choices import by_layer, only_run, select_stat, step_of, windows_of
from delve_ray.analysis.windows import network_order
from delve_ray.errors import ReadError
from delve_ray.schema import F64, PHASES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_FARTHEST = 5
"""So many layers, the farthest from the diagonal, are named."""
_AXES_POINTS = 320.0
"""About how many points the sides of the axes have, to keep numbers apart."""


def train_against_eval(
    spectra: pa.Table,
    path: str | os.PathLike[str] | None = None,
    *,
    step: int | None = None,
    stat: str = "saturation",
) -> Figure:
    """A statistic in eval against the same in train, a point per layer, coloured by depth; the diagonal is equality.

    The up to 5 layers that are farthest from the diagonal are numbered, and named with both values, farthest first:
    by the difference, or by the ratio where both axes are logarithmic (all values above 0, spread over a factor of
    1000). Layers that lack a finite value in either phase are left out.

    Args:
        spectra: What `read_spectra` returned, of one run.
        path: Write the figure there, in the format of the name's ending (.png, .pdf, .svg).
        step: The step whose windows are drawn; by default the last one of each phase.
        stat: Column of a statistic, such as "saturation", "effective_rank" or "alpha".

    Returns:
        A `matplotlib.figure.Figure` that pyplot knows nothing of.

    Raises:
        ImportError: matplotlib is not installed.
        OptionError: no statistic has this name.
        ReadError: a column is missing, no row has a value of it, there are several runs, a phase has no such window,
            or no layer has a value in both.
    """
    spectra = select_stat(spectra, stat)
    run = only_run(spectra)
    windows = windows_of(spectra, step, None)
    for name in PHASES:
        if name not in windows:
            at = "" if step is None else f" at step={step}"
            raise ReadError(f"spectra hold no window of phase={name!r}{at}; this picture needs train and eval")
    layers = network_order(spectra)
    train, evaluation = (by_layer(windows[name], stat, layers) for name in PHASES)
    drawn = np.flatnonzero(np.isfinite(train) & np.isfinite(evaluation))
    if drawn.size == 0:
        raise ReadError(f"no layer has a finite {stat} in both train and eval")
    figure = new_figure(7.4, 6.4)
    axes = figure.subplots()
    values = np.concatenate([train[drawn], evaluation[drawn]])
    colours = depth_colours(len(layers))
    _draw_diagonal(axes, stat, values)
    size = 60 if len(layers) <= 40 else 22
    shown = [colours[index] for index in drawn]
    axes.scatter(train[drawn], evaluation[drawn], s=size, c=shown, edgecolors="white", linewidths=0.5, zorder=3)
    far = farthest(train, evaluation, logarithmic=is_logarithmic(stat, values))
    _name_farthest(figure, axes, far, layers, (train, evaluation), stat)
    axes.set_xlabel(f"train, step {step_of(windows['train'])}")
    axes.set_ylabel(f"eval, step {step_of(windows['eval'])}")
    add_depth_bar(figure, [axes], layers, colours)
    figure.suptitle(f"{stat_label(stat).capitalize()} in train and eval, run {text(run, MAX_TITLE)}", fontsize=11)
    return finish(figure, path)


def farthest(train: F64, evaluation: F64, *, logarithmic: bool = False) -> list[int]:
    """Indices of up to `MAX_FARTHEST` layers off the diagonal, farthest first; those with a value in both alone.

    >>> farthest(np.array([0.5, 0.1, np.nan, 0.4]), np.array([0.4, 0.9, 0.2, 0.4]))
    [1, 0]
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        difference = np.abs(np.log(train) - np.log(evaluation) if logarithmic else train - evaluation)
    off = np.flatnonzero(np.isfinite(difference) & (difference > 0))
    order: list[int] = off[np.argsort(-difference[off], kind="stable")][:MAX_FARTHEST].tolist()
    return order


def _draw_diagonal(axes: Axes, stat: str, values: F64) -> None:
    """Both axes alike, and the line on which both phases are equal."""
    show_stat(axes, "x", stat, values)
    show_stat(axes, "y", stat, values)
    low, high = float(values.min()), float(values.max())
    if stat in SHARES:
        low, high = -0.02 * top_share(values), 1.02 * top_share(values)
    elif is_logarithmic(stat, values):
        room = 10.0 ** (0.05 * (math.log10(high) - math.log10(low)))
        low, high = low / room, high * room
    else:
        room = 0.05 * (high - low) or 0.5
        low, high = low - room, high + room
    axes.plot([low, high], [low, high], color="0.6", linestyle="--", linewidth=1, label="equal", zorder=1)
    axes.set(xlim=(low, high), ylim=(low, high))
    axes.set_aspect("equal", adjustable="box")
    tidy(axes)


def _name_farthest(
    figure: Figure, axes: Axes, far: Sequence[int], layers: Sequence[str], values: tuple[F64, F64], stat: str
) -> None:
    """A number at each of the farthest points, and a list of their names."""
    shares = [axes.transData.transform((values[0][index], values[1][index])) for index in far]
    inches = [axes.transAxes.inverted().transform(at) * _AXES_POINTS for at in shares]
    lines = []
    for number, (index, place) in enumerate(zip(far, _apart(inches), strict=True), 1):
        x, y = values[0][index], values[1][index]
        offset = place - inches[number - 1]
        line = {"arrowstyle": "-", "color": "0.5", "linewidth": 0.6, "shrinkA": 0, "shrinkB": 2}
        axes.annotate(
            str(number),
            (x, y),
            (float(offset[0]), float(offset[1])),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=9,
            zorder=4,
            arrowprops=line,
            path_effects=halo(),
        )
        lines.append(f"{number}  {text(layers[index])}: train {_shown(x, stat)}, eval {_shown(y, stat)}")
    if lines:
        figure.supxlabel("farthest from equal\n" + "\n".join(lines), x=0.1, ha="left", fontsize=8.5, color="0.2")


def _apart(points: Sequence[F64]) -> list[F64]:
    """Where the numbers of points stand, in points of the axes: apart from each other, and inside of the axes.

    The first choice is close by and away from the diagonal, where the fewest points are.
    """
    placed: list[F64] = []
    for point in points:
        away = 0.75 * np.pi if point[1] > point[0] else -0.25 * np.pi
        angles = away + np.radians([0, 45, -45, 90, -90, 135, -135, 180])
        around = [
            point + radius * np.array([np.cos(angle), np.sin(angle)]) for radius in (11, 24, 37, 50) for angle in angles
        ]
        free = (
            place
            for place in around
            if place.min() > 7 and place.max() < _AXES_POINTS - 7
            if all(np.abs(place - other).max() > 12 for other in placed)
        )
        placed.append(next(free, around[0]))
    return placed


def _shown(value: float, stat: str) -> str:
    return f"{value:.0%}" if stat in SHARES else f"{value:.3g}"
