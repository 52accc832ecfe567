"""Layers' outputs in two dimensions: a panel per layer, coloured by label."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from delve_ray.analysis.plots.canvas import MAX_TITLE, PHASE_COLOURS, evenly, finish, halo, new_figure, text
from delve_ray.analysis.plots.choices import choose_layers, floats, only_run, select, step_of, windows_of
from delve_ray.analysis.windows import network_order
from delve_ray.schema import F64

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_PANELS = 12
"""So many layers are drawn where none are named; half of them in each of two phases."""
MAX_NAMED_PANELS = 48
"""So many of those that are named."""
LABEL_COLOURS = (
    *("#3f90da", "#ffa90e", "#bd1f01", "#832db6", "#92dadd"),
    *("#a96b59", "#e76300", "#b9ac70", "#717581", "#94a4a2"),
)
"""Ten colours that can be told apart (Petroff, Accessible Color Sequences for Data Visualization, arXiv 2107.02270),
the greys last."""
UNLABELLED = "0.75"
"""Colour of the crosses that have no label."""
_COLUMNS = 4


def embedding(
    embeddings: pa.Table,
    path: str | os.PathLike[str] | None = None,
    *,
    layers: Sequence[str] | str | None = None,
    phase: str | None = None,
    step: int | None = None,
) -> Figure:
    """The outputs of layers in two dimensions, a panel per layer and phase, a point per observation.

    Up to ten different labels have a colour each, and stand in words at the median of their points; more are coloured
    along a scale, in ascending order, and points without a label are grey crosses; where nothing has a label, all have
    the phase's colour. Points without finite coordinates are left out. Both axes of a panel have one scale, which
    differs from panel to panel.

    Args:
        embeddings: What `read_embeddings` returned, of one run: columns run, phase, step, layer, x and y. A column
            `label` of integers may be added.
        path: Write the figure there, in the format of the name's ending (.png, .pdf, .svg).
        layers: Names of layers; by default 12 of them, or 6 of each of two phases, spread evenly over depth. Of more
            than 48, 48 likewise.
        phase: "train" or "eval"; by default both.
        step: The step whose windows are drawn; by default the last one of each phase.

    Returns:
        A `matplotlib.figure.Figure` that pyplot knows nothing of.

    Raises:
        ImportError: matplotlib is not installed.
        ReadError: a column is missing, there are several runs, an unknown layer, or nothing to draw.
    """
    embeddings = select(embeddings, ("x", "y"), optional=("label",))
    if "label" not in embeddings.column_names:
        embeddings = embeddings.append_column("label", pa.nulls(embeddings.num_rows, pa.int32()))
    run = only_run(embeddings)
    windows = windows_of(embeddings, step, phase)
    order = _order(windows)
    chosen, some = choose_layers(order, layers, MAX_PANELS // len(windows), MAX_NAMED_PANELS)
    labels = _labels(windows, chosen)
    figure, panels = _panels(len(chosen), len(windows))
    for index, (name, window) in enumerate(windows.items()):
        for axes, layer in zip(panels[index], chosen, strict=True):
            _draw(
                axes, window.filter(pc.field("layer") == layer), labels, UNLABELLED if labels else PHASE_COLOURS[name]
            )
            axes.set_title(f"{text(layer)}\n{name}, step {step_of(window)}", fontsize=8.5)
    figure.suptitle(f"Embeddings of outputs, {some}run {text(run, MAX_TITLE)}", fontsize=11)
    some_lack_one = any(window.column("label").null_count for window in windows.values())
    _add_legend(figure, labels, some_lack_one, [axes for row in panels for axes in row])
    return finish(figure, path)


def _order(windows: Mapping[str, pa.Table]) -> list[str]:
    """The layers in network order; of the many rows of each, one tells it."""
    tables = []
    for name, window in windows.items():
        layers = pc.unique(window.column("layer"))  # in the order of their first rows
        same: dict[str, Any] = {"run": [""] * len(layers), "phase": [name] * len(layers), "step": [0] * len(layers)}
        tables.append(pa.table({**same, "layer": layers}))
    return network_order(pa.concat_tables(tables))


def _labels(windows: Mapping[str, pa.Table], layers: Sequence[str]) -> list[int]:
    """The different labels of what is drawn, ascending."""
    wanted = pa.array(layers, pa.string())
    columns = [window.filter(pc.is_in(window.column("layer"), wanted)).column("label") for window in windows.values()]
    found = pc.unique(pa.chunked_array([chunk for column in columns for chunk in column.chunks], columns[0].type))
    return sorted(label for label in found.to_pylist() if label is not None)


def _panels(layers: int, phases: int) -> tuple[Figure, list[list[Axes]]]:
    """A figure with a panel for each phase and layer: each phase has rows of its own."""
    rows = -(-layers // (6 if phases > 1 and layers <= 6 else _COLUMNS))
    columns = -(-layers // rows)
    figure = new_figure(max(5.0, 2.4 * columns + 0.8), 1.0 + 2.6 * rows * phases)
    grid = figure.subplots(rows * phases, columns, squeeze=False)
    panels = []
    for index in range(phases):
        block = grid[index * rows : (index + 1) * rows].ravel().tolist()
        for unused in block[layers:]:
            unused.remove()
        panels.append(block[:layers])
    return figure, panels


def _draw(axes: Axes, rows: pa.Table, labels: Sequence[int], unlabelled: str) -> None:
    """The points of one layer, in the order of the rows, so that no label lies on top of the others."""
    axes.set(xticks=[], yticks=[])
    x, y, label = (floats(rows.column(name)) for name in ("x", "y", "label"))
    there = np.isfinite(x) & np.isfinite(y)
    x, y, label = x[there], y[there], label[there]
    if x.size == 0:
        axes.text(0.5, 0.5, "no points", transform=axes.transAxes, ha="center", va="center", fontsize=8, color="0.35")
        return
    size = float(np.clip(3000 / x.size, 1.5, 18))
    known = np.isfinite(label)
    unknown: dict[str, Any] = {"marker": "x", "linewidths": 0.8} if labels else {"marker": "o", "linewidths": 0}
    axes.scatter(x[~known], y[~known], s=size, c=unlabelled, rasterized=True, **unknown)
    colours = label_colours(len(labels))[np.searchsorted(labels, label[known])] if known.any() else unlabelled
    axes.scatter(x[known], y[known], s=size, c=colours, linewidths=0, alpha=0.8, rasterized=True)
    axes.set_aspect("equal", adjustable="datalim")
    for each in labels if len(labels) <= len(LABEL_COLOURS) else ():
        if (own := label == each).any():
            at = (float(np.median(x[own])), float(np.median(y[own])))
            axes.text(*at, str(each), ha="center", va="center", fontsize=8, weight="bold", path_effects=halo())


def label_colours(count: int) -> F64:
    """A colour for each of so many labels: float64, (labels, 4)."""
    from matplotlib import colormaps
    from matplotlib.colors import to_rgba_array

    if count <= len(LABEL_COLOURS):
        return np.asarray(to_rgba_array(LABEL_COLOURS[:count]), np.float64)
    return np.asarray(colormaps["viridis"](np.linspace(0.0, 1.0, count)), np.float64)


def _add_legend(figure: Figure, labels: Sequence[int], some_lack_one: bool, panels: Sequence[Axes]) -> None:
    """The labels' colours: an entry each, or a scale."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, ListedColormap
    from matplotlib.lines import Line2D

    colours = label_colours(len(labels))
    if len(labels) > len(LABEL_COLOURS):
        scale = ScalarMappable(BoundaryNorm(np.arange(len(labels) + 1) - 0.5, len(labels)), ListedColormap(colours))
        bar = figure.colorbar(scale, ax=panels, pad=0.02, aspect=30, label="label (grey: none)")
        ticks = evenly(len(labels), 9)
        bar.set_ticks(ticks, labels=[str(labels[index]) for index in ticks])
        bar.ax.tick_params(length=0, which="both")
    elif labels:
        entries = [
            Line2D([], [], color=colour, marker="o", linestyle="", ms=5, label=str(label))
            for label, colour in zip(labels, colours, strict=True)
        ]
        if some_lack_one:
            entries.append(Line2D([], [], color=UNLABELLED, marker="x", linestyle="", ms=5, label="none"))
        columns = max(1, int(figure.get_figwidth() / 0.7) - 1)
        figure.legend(
            handles=entries, loc="outside lower center", frameon=False, fontsize=9, ncols=columns, title="label"
        )
