"""Eigenspectra: eigenvalue against rank, a panel per layer."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from delve_ray.analysis.plots.canvas import (
    LARGEST,
    MAX_TITLE,
    PHASE_COLOURS,
    STYLES,
    finish,
    halo,
    new_figure,
    text,
    tidy,
)
from delve_ray.analysis.plots.choices import KEYS, choose_layers, only_run, select, step_of, windows_of
from delve_ray.analysis.windows import network_order
from delve_ray.errors import OptionError
from delve_ray.nystrom import Head
from delve_ray.schema import F64
from delve_ray.spectrum import check_thresholds, intrinsic_dimensionality, noise_edge

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_PANELS = 12
"""So many layers are drawn where none are named."""
MAX_NAMED_PANELS = 48
"""So many of those that are named."""
_MARKERS = "osD^vP"
_COLUMNS = 4
_LINEAR_UP_TO = 16
"""Ranks are logarithmic where a layer has more features."""
_DECADES = 10.0
_MAX_DOTTED = 32


def eigenspectra(
    spectra: pa.Table,
    path: str | os.PathLike[str] | None = None,
    *,
    layers: Sequence[str] | str | None = None,
    phase: str | None = None,
    step: int | None = None,
    thresholds: Sequence[float] | float | None = None,
) -> Figure:
    """Eigenvalues against their ranks, a panel per layer: train and eval, k(δ) marked, the edge of noise dotted.

    Both axes are logarithmic, so a power law λ_i ∝ i^-α is a straight line of slope -α; ranks are linear where no
    layer has more than 16 features. A panel shows ten decades below λ1; zeros have no place on it. A marker at rank
    k(δ) says that the eigenvalues up to there hold the share δ of the variance (`spectrum.intrinsic_dimensionality`),
    and the dotted line is the Marchenko-Pastur edge, above which `noise_rank` counts (`spectrum.noise_edge`). Of a
    sketched layer there is the head of the spectrum, with the bounds of k(δ) and without an edge.

    Args:
        spectra: What `read_spectra` returned, of one run.
        path: Write the figure there, in the format of the name's ending (.png, .pdf, .svg).
        layers: Names of layers; by default 12 of them, spread evenly over depth. Of more than 48, 48 likewise.
        phase: "train" or "eval"; by default both.
        step: The step whose windows are drawn; by default the last one of each phase.
        thresholds: Shares δ to mark, at most 6; by default those that the run recorded, or the first 6.

    Returns:
        A `matplotlib.figure.Figure` that pyplot knows nothing of.

    Raises:
        ImportError: matplotlib is not installed.
        OptionError: a threshold outside (0, 1], or too many.
        ReadError: a column is missing, there are several runs, an unknown layer, or nothing to draw.
    """
    given = () if thresholds is None else check_thresholds(thresholds)
    spectra = select(spectra, ("samples", "threshold", "eigenvalues"), optional=_OPTIONAL)
    run = only_run(spectra)
    windows = windows_of(spectra, step, phase)
    order = network_order(pa.concat_tables([window.select(KEYS) for window in windows.values()]))
    chosen, some = choose_layers(order, layers, MAX_PANELS, MAX_NAMED_PANELS)
    found = {name: _spectra_of(window, chosen, given) for name, window in windows.items()}
    marked = _marked(found)
    figure, panels = _panels(len(chosen))
    widest = max((each.eigenvalues.size for own in found.values() for each in own.values()), default=0)
    for axes, layer in zip(panels, chosen, strict=True):
        own = {name: of_phase[layer] for name, of_phase in found.items() if layer in of_phase}
        _draw_layer(axes, own, marked, logarithmic=widest > _LINEAR_UP_TO)
        axes.set_title(_title(layer, own), fontsize=8.5)
    _name_axes(panels)
    figure.suptitle(f"Eigenspectra, {some}run {text(run, MAX_TITLE)}", fontsize=11)
    _add_legend(figure, windows, marked)
    return finish(figure, path)


_OPTIONAL = ("thresholds", "features", "unseen_variance")


@dataclass(frozen=True, slots=True)
class _Spectrum:
    """What is drawn of one layer in one window; `unseen` is the variance that the head of a sketched layer lacks."""

    eigenvalues: F64
    samples: int | None
    thresholds: tuple[float, ...]
    features: int
    unseen: float | None = None

    def bounds(self, threshold: float) -> tuple[int, int]:
        """The smallest and the largest k(δ) that there may be: the same but for sketched layers."""
        if self.unseen is None:
            k = intrinsic_dimensionality(self.eigenvalues, threshold)
            return k, k
        rank = self.features if self.samples is None else min(self.features, max(self.samples - 1, 0))
        head = Head(self.eigenvalues, float(self.eigenvalues.sum()) + self.unseen, self.unseen, rank)
        return head.dimensionality(threshold)[:2]


def _spectra_of(window: pa.Table, layers: Sequence[str], given: tuple[float, ...]) -> dict[str, _Spectrum]:
    """The spectra of these layers in one window; `given` thresholds go before those of the row."""
    rows = window.filter(pc.is_in(window.column("layer"), pa.array(layers, pa.string())))
    spectra = {}
    for index, layer in enumerate(rows.column("layer").to_pylist()):
        several = rows.column("thresholds")[index].as_py() if "thresholds" in rows.column_names else None
        own = several or [rows.column("threshold")[index].as_py()]
        values = rows.column("eigenvalues")[index].values
        eigenvalues = np.empty(0) if values is None else values.to_numpy(zero_copy_only=False)
        features, unseen = (
            rows.column(name)[index].as_py() if name in rows.column_names else None for name in _OPTIONAL[1:]
        )
        spectra[layer] = _Spectrum(
            eigenvalues=eigenvalues,
            samples=rows.column("samples")[index].as_py(),
            thresholds=given or tuple(delta for delta in own if delta is not None)[: len(_MARKERS)],
            features=max(features or 0, eigenvalues.size),
            unseen=unseen,
        )
    return spectra


def _marked(found: Mapping[str, Mapping[str, _Spectrum]]) -> dict[float, str]:
    """A marker for each threshold, in ascending order."""
    deltas = sorted({delta for own in found.values() for each in own.values() for delta in each.thresholds})
    if len(deltas) > len(_MARKERS):
        raise OptionError(
            f"thresholds: {len(deltas)} of them ({', '.join(f'{delta:g}' for delta in deltas)}) cannot be told apart "
            f"in a picture; give at most {len(_MARKERS)}"
        )
    return dict(zip(deltas, _MARKERS, strict=False))


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    """A figure with a panel for each layer, in rows."""
    rows = -(-count // _COLUMNS)
    columns = -(-count // rows)
    figure = new_figure(max(5.0, 3.0 * columns), 1.3 + 2.3 * rows if count > 1 else 4.2)
    panels = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for unused in panels[count:]:
        unused.remove()
    return figure, panels[:count]


def _name_axes(panels: Sequence[Axes]) -> None:
    """What the axes are, once for each row and column."""
    for axes in panels:
        spec = axes.get_subplotspec()
        if spec is not None and spec.is_first_col():
            axes.set_ylabel("eigenvalue", fontsize=8)
    columns = spec.get_gridspec().ncols if (spec := panels[0].get_subplotspec()) is not None else 1
    for axes in panels[-columns:]:  # the last of each column
        axes.set_xlabel("rank", fontsize=8)


def _draw_layer(axes: Axes, own: Mapping[str, _Spectrum], marked: Mapping[float, str], logarithmic: bool) -> None:
    """The spectra of one layer, one of each phase."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    tidy(axes)
    axes.tick_params(labelsize=7)
    values = np.concatenate([np.empty(0), *(each.eigenvalues for each in own.values())])
    if np.isnan(_shown(values)).all():
        note = "no eigenvalues" if not values.size else "beyond 1e±250" if values.any() else "no variance"
        axes.text(0.5, 0.5, note, transform=axes.transAxes, ha="center", va="center", fontsize=8, color="0.35")
        axes.set(xticks=[], yticks=[])
        return
    dimensions = [_draw_spectrum(axes, name, spectrum, marked) for name, spectrum in own.items()]
    axes.text(0.04, 0.04, "\n".join(dimensions), transform=axes.transAxes, va="bottom", fontsize=7, path_effects=halo())
    bottom, top = _limits([spectrum.eigenvalues for spectrum in own.values()])
    axes.set_ylim(bottom, top)
    axes.set_yscale("log")
    decades = math.log10(top) - math.log10(bottom)
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades < 1.5 else (1.0,), numticks=7))
    features = max(spectrum.eigenvalues.size for spectrum in own.values())
    if logarithmic:
        axes.set_xscale("log")
        axes.set_xlim(0.9, max(features, 2) * 1.1)
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if features < 200 else (1.0,)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda rank, _: f"{rank:g}"))
    else:
        axes.set_xlim(0.5, features + 0.5)
        axes.locator_params(axis="x", integer=True)
    axes.minorticks_off()  # they would take two thirds of the drawing's time


def _limits(spectra: Sequence[F64]) -> tuple[float, float]:
    """What the axis of eigenvalues shows: of each spectrum the largest one and ten decades below it, if there are."""
    shown = [values[np.isfinite(values)] for values in map(_shown, spectra)]
    decades = [np.log10(values) for values in shown if values.size]
    top = max(float(logs.max()) for logs in decades)
    bottom = min(max(float(logs.min()), float(logs.max()) - _DECADES) for logs in decades)
    room = 0.06 * (top - bottom) + 0.06
    return 10.0 ** (bottom - room), 10.0 ** (top + room)


def _shown(values: F64) -> F64:
    """What has a place on a logarithmic axis, NaN for zeros and what is beyond its reach."""
    return np.where((values >= 1 / LARGEST) & (values <= LARGEST), values, np.nan)


def _draw_spectrum(axes: Axes, phase: str, spectrum: _Spectrum, marked: Mapping[float, str]) -> str:
    """One spectrum with its k(δ) and its edge of noise; what is written of it."""
    values, colour = spectrum.eigenvalues, PHASE_COLOURS[phase]
    dot = "." if values.size <= _MAX_DOTTED else ""
    ranks = np.arange(1, values.size + 1)
    axes.plot(ranks, _shown(values), STYLES[phase], color=colour, label=phase, linewidth=1.3, marker=dot, markersize=4)
    dimensions = {delta: spectrum.bounds(delta) for delta in sorted(spectrum.thresholds)}
    for delta, (low, k) in dimensions.items():
        if 0 < low == k <= values.size:
            at, label = ([k], [values[k - 1]]), f"{phase} k({delta:g})"
            axes.plot(*at, marked[delta], color=colour, label=label, ms=6, mec="white", mew=0.6, linestyle="")
    edge = 0.0 if spectrum.samples is None or spectrum.unseen is not None else noise_edge(values, spectrum.samples)
    if edge > 0:
        axes.axhline(edge, color=colour, linestyle=":", linewidth=1.2, label=f"{phase} noise edge")
    said = [f"{k}" if low == k else f"{low}…{k}" for low, k in dimensions.values()]
    return f"{phase}: k = {', '.join(said) or '–'}"


def _title(layer: str, own: Mapping[str, _Spectrum]) -> str:
    """The layer's name above its size."""
    features = max((spectrum.features for spectrum in own.values()), default=0)
    samples = [spectrum.samples for spectrum in own.values()]
    counts = " / ".join("–" if count is None else f"{count}" for count in samples)
    return f"{text(layer)}\n{features} features, {counts} samples"


def _add_legend(figure: Figure, windows: Mapping[str, pa.Table], marked: Mapping[float, str]) -> None:
    """What the colours, markers and dotted lines mean, below the picture."""
    from matplotlib.lines import Line2D

    entries = [
        Line2D([], [], color=PHASE_COLOURS[name], linestyle=STYLES[name], label=f"{name}, step {step_of(window)}")
        for name, window in windows.items()
    ]
    entries += [
        Line2D([], [], color="0.3", marker=marker, linestyle="", label=f"k of {100 * delta:g} % of variance")
        for delta, marker in marked.items()
    ]
    entries.append(Line2D([], [], color="0.3", linestyle=":", label="edge of noise (Marchenko–Pastur)"))
    columns = max(1, int(figure.get_figwidth() / 2.4))
    figure.legend(handles=entries, loc="outside lower center", frameon=False, fontsize=8.5, ncols=columns)
