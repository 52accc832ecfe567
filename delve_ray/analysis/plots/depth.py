"""Saturation along the depth of the network: the picture in which a tail of idle layers is seen."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from delve_ray.analysis.plots.canvas import (
    DARK_PHASE_COLOURS,
    MAX_TITLE,
    PHASE_COLOURS,
    finish,
    halo,
    name_depth,
    new_figure,
    percent,
    text,
    tidy,
    top_share,
)
from delve_ray.analysis.plots.choices import by_layer, only_run, select, step_of, windows_of
from delve_ray.analysis.windows import network_order
from delve_ray.schema import F64

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MAX_BESIDE = 24
"""Up to so many layers have the bars of both phases beside each other; more have a panel per phase."""
_MAX_NAMED = 60
_MAX_COUNTED = 12
"""Up to so many layers have their dimensions written at the bars."""
_HATCH = "////"
_ABSENT = "–"


def saturation_per_layer(
    spectra: pa.Table,
    path: str | os.PathLike[str] | None = None,
    *,
    phase: str | None = None,
    step: int | None = None,
) -> Figure:
    """Saturation of each layer in network order: train beside eval, the mean as a line, undersampled layers hatched.

    A tail, layers towards the output that hardly use their width, shows as bars below the mean on the right
    (Shenk et al., Feature Space Saturation during Training, arXiv 2006.08679). Up to 12 layers have their intrinsic
    dimensionality written at the bar, and their features below the name; more than 24 have a panel per phase. A layer
    without a saturation has no bar.

    Args:
        spectra: What `read_spectra` returned, of one run.
        path: Write the figure there, in the format of the name's ending (.png, .pdf, .svg).
        phase: "train" or "eval"; by default both.
        step: The step whose windows are drawn; by default the last one of each phase.

    Returns:
        A `matplotlib.figure.Figure` that pyplot knows nothing of.

    Raises:
        ImportError: matplotlib is not installed.
        ReadError: a column is missing, there are several runs, or nothing to draw.
    """
    spectra = select(spectra, ("features", "samples", "saturation", "intrinsic_dimensionality"))
    run = only_run(spectra)
    windows = windows_of(spectra, step, phase)
    layers = network_order(pa.concat_tables(windows.values()))
    shown = {name: _window(rows, layers) for name, rows in windows.items()}
    beside = len(layers) <= _MAX_BESIDE
    panels = 1 if beside else len(shown)
    figure = new_figure(9 if beside else 12, 5.2 if panels == 1 else 7.6)
    axes = figure.subplots(panels, 1, sharex=True, sharey=True, squeeze=False)[:, 0].tolist()
    for index, (name, window) in enumerate(shown.items()):
        shift, width = _place(index, len(shown)) if beside else (0.0, 0.9)
        _draw(axes[index % panels], window, name, shift, width)
    _label_axes(axes, layers, list(shown.values()))
    _add_legend(figure, shown)
    figure.suptitle(f"Saturation per layer, run {text(run, MAX_TITLE)}", fontsize=11)
    return finish(figure, path)


@dataclass(frozen=True, slots=True)
class _Window:
    """What is drawn of one phase: float64 of shape (layers,), NaN for none; `mean` is that of the metrics."""

    step: int
    saturations: F64
    dimensions: F64
    features: F64
    undersampled: npt.NDArray[np.bool_]
    mean: float | None


def _window(rows: pa.Table, layers: Sequence[str]) -> _Window:
    saturations = by_layer(rows, "saturation", layers)
    saturations = np.where(np.isfinite(saturations), saturations, np.nan)
    features, samples = by_layer(rows, "features", layers), by_layer(rows, "samples", layers)
    return _Window(
        step=step_of(rows),
        saturations=saturations,
        dimensions=by_layer(rows, "intrinsic_dimensionality", layers),
        features=features,
        undersampled=samples < features,  # from the counts: files of before it was a column have it, too
        mean=None if np.isnan(saturations).all() else float(np.nanmean(saturations)),
    )


def _place(index: int, count: int) -> tuple[float, float]:
    """Of one phase's bars, how far they are from the layer's place, and their width."""
    width = 0.8 / count
    return (index - (count - 1) / 2) * width, width


def _draw(axes: Axes, window: _Window, phase: str, shift: float, width: float) -> None:
    """A phase's bars and their mean."""
    places = np.arange(window.saturations.size) + shift
    hatches = [_HATCH if scarce else "" for scarce in window.undersampled]
    style: dict[str, Any] = {"color": PHASE_COLOURS[phase], "edgecolor": "white", "linewidth": 0, "hatch": hatches}
    axes.bar(places, window.saturations, width, label=phase, **style)
    if window.mean is not None:
        style = {"color": DARK_PHASE_COLOURS[phase], "linestyle": "--", "linewidth": 1.2}
        axes.axhline(window.mean, label=f"{phase} mean", **style)
    if places.size <= _MAX_COUNTED:
        for place, height, dimension in zip(places, window.saturations, window.dimensions, strict=True):
            shown, above = (_ABSENT, 0.0) if np.isnan(height) else (_count(dimension), height)
            _write(axes, shown, (place, above), (0, 2), va="bottom", fontsize=_small(places.size), path_effects=halo())


def _small(layers: int) -> float:
    """A size of text at which four digits fit on a bar."""
    return 7.0 if layers <= 8 else 6.0


def _count(number: float) -> str:
    return "" if np.isnan(number) else f"{number:.0f}"


def _write(axes: Axes, words: str, at: tuple[float, float], points: tuple[int, int], **style: Any) -> None:
    """Small words so many points from a place."""
    axes.annotate(words, at, points, textcoords="offset points", ha="center", **style)


def _label_axes(panels: Sequence[Axes], layers: Sequence[str], windows: Sequence[_Window]) -> None:
    counted = len(layers) <= _MAX_COUNTED
    top = top_share(np.concatenate([window.saturations for window in windows]))
    for axes in panels:
        axes.set_ylabel("saturation")
        axes.set_ylim(0.0, top * (1.06 if counted else 1.02))
        axes.yaxis.set_major_formatter(percent())
        tidy(axes)
        axes.grid(visible=False, axis="x")
    bottom = panels[-1]
    name_depth(bottom, layers, _MAX_NAMED)
    if not counted:
        bottom.set_xlabel(f"{len(layers)} layers, from the input to the output", fontsize=8, color="0.35")
        return
    for place in range(len(layers)):
        features = next((window.features[place] for window in windows if window.features[place] > 0), np.nan)
        below: Any = ("data", "axes fraction")
        _write(bottom, _count(features), (place, 0.0), (0, -3), va="top", xycoords=below, fontsize=7, color="0.35")
    bottom.tick_params(axis="x", pad=14)
    bottom.set_xlabel("at the bars: intrinsic dimensionality; below them: features", fontsize=8, color="0.35")


def _add_legend(figure: Figure, windows: Mapping[str, _Window]) -> None:
    """What the colours, lines and hatches mean, below the picture."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    entries: list[Any] = []
    for name, window in windows.items():
        entries.append(Patch(color=PHASE_COLOURS[name], label=f"{name}, step {window.step}"))
        if window.mean is not None:
            label = f"mean {window.mean:.1%}"
            entries.append(Line2D([], [], color=DARK_PHASE_COLOURS[name], linestyle="--", label=label))
    if any(window.undersampled.any() for window in windows.values()):
        entries.append(Patch(facecolor="0.5", edgecolor="white", hatch=_HATCH, label="fewer samples than features"))
    figure.legend(handles=entries, loc="outside lower center", frameon=False, fontsize=9, ncols=len(entries))
