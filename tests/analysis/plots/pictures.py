"""What is drawn in a figure: its artists' data, and where its texts lie."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np

FIVE = ["conv1", "conv2", "conv3", "hidden", "output"]
FORTY = [f"model.layers.{index // 4}.part{index % 4}" for index in range(40)]
MANY = [f"model.decoder.layers.{index // 4}.self_attention.long_projection_{'qkvo'[index % 4]}" for index in range(300)]
HOSTILE = ["$x_{", "_hidden %s", "a\nb", "<b>&amp;</b>", "x" * 200]


def lines_of(axes: Any) -> dict[str, tuple[list[float], list[float]]]:
    """Of every line: {label: (x, y)}."""
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()}


def bars_of(axes: Any) -> dict[str, list[Any]]:
    """Of every series of bars: {label: bars}."""
    return {container.get_label(): list(container) for container in axes.containers}


def words_of(figure: Any) -> list[str]:
    """The entries of all legends."""
    legends = [*figure.legends, *(axes.get_legend() for axes in figure.axes if axes.get_legend())]
    return [text.get_text() for legend in legends for text in legend.get_texts()]


def drawn_texts(figure: Any) -> list[tuple[str, float, Any]]:
    """Every text that is really drawn: (text, rotation, extent in pixels)."""
    from matplotlib.text import Text

    figure.draw_without_rendering()
    found: dict[int, tuple[str, float, Any]] = {}
    draw = Text.draw

    def record(self: Any, renderer: Any, *args: Any, **kwargs: Any) -> None:
        if self.get_visible() and self.get_text().strip():
            found[id(self)] = (self.get_text(), self.get_rotation(), Text.get_window_extent(self, renderer))
        draw(self, renderer, *args, **kwargs)

    Text.draw = record
    try:
        figure.canvas.draw()
    finally:
        Text.draw = draw
    return list(found.values())


def assert_legible(figure: Any, apart: float = 0.5) -> None:
    """Every text lies inside of the figure, and none upon another: by `apart` pixels in width or height at least.

    Slanted texts have boxes that overlap where they do not, so those are only checked against the figure's edge.
    """
    texts = drawn_texts(figure)
    assert texts
    for text, _, box in texts:
        inside = box.x0 >= -1 and box.y0 >= -1 and box.x1 <= figure.bbox.width + 1 and box.y1 <= figure.bbox.height + 1
        assert inside, f"{text!r} at {box} leaves {figure.bbox}"
    upright = [(text, box) for text, rotation, box in texts if rotation % 90 == 0]
    for (one, a), (other, b) in combinations(upright, 2):
        width, height = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
        assert min(width, height) <= apart, f"{one!r} lies upon {other!r}: {a} {b}"


def luminance(colour: Any) -> float:
    """How light a colour is."""
    from matplotlib.colors import to_rgb

    return float(np.dot(to_rgb(colour), [0.2126, 0.7152, 0.0722]))
