"""The console: a line per final window, or its whole table."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

from delve_ray.checks import check_flag
from delve_ray.schema import LayerRow, PublishedWindow, window_metrics
from delve_ray.writers.base import Scalar, WriterRun


class ConsoleWriter:
    """Prints final windows and user scalars to the standard output of the store's process.

    Where the store is a Ray actor, Ray shows that in the driver's terminal, unless `log_to_driver` is off. A line tells
    the mean saturation and the layers that have the lowest and the highest, and of sketched layers without a saturation
    its bounds; with `table`, one follows per layer.
    """

    name = "console"

    def __init__(self, table: bool = False) -> None:
        self._table = check_flag("table", table)
        self._run = ""

    def open(self, run: WriterRun) -> None:
        """Note the run's name."""
        self._run = run.run

    def write(self, window: PublishedWindow) -> None:
        """Print a final window: a line for each of its phases."""
        if not window.final:
            return
        metrics = window_metrics(window.rows)
        lines = []
        for phase in dict.fromkeys(row.phase for row in window.rows):
            rows = [row for row in window.rows if row.phase == phase and (_is_known(row) or _is_bounded(row))]
            known = [row for row in rows if _is_known(row)]
            said = []
            if known:
                lowest, highest = (pick(known, key=lambda row: row.stats["saturation"]) for pick in (min, max))
                mean = metrics[f"saturation/{phase}/mean"]
                said.append(f"saturation {mean:.1%}, from {_told(lowest)} to {_told(highest)}")
            if len(known) < len(rows):
                said.append("only bounds of " + ", ".join(_bounds(row) for row in rows if not _is_known(row)))
            if said:
                lines.append(f"{self._run}  step {window.step}  {phase}: {'; '.join(said)}")
            if self._table and rows:
                lines += _layers(rows)
        self._print(lines)

    def write_scalars(self, scalars: list[Scalar]) -> None:
        """Print user scalars."""
        self._print([f"{self._run}  step {s.step}  {s.name}: {s.value:.6g}" for s in scalars])

    def close(self) -> None:
        """Nothing to release."""

    def _print(self, lines: Sequence[str]) -> None:
        if lines:
            sys.stdout.write("\n".join(lines) + "\n")  # one call, so that other processes' lines stay outside
            sys.stdout.flush()


def _is_known(row: LayerRow) -> bool:
    return math.isfinite(row.stats.get("saturation", math.nan))


def _is_bounded(row: LayerRow) -> bool:
    return row.saturation_low is not None and row.saturation_high is not None


def _told(row: LayerRow) -> str:
    return f"{row.layer} {row.stats['saturation']:.0%}"


def _bounds(row: LayerRow) -> str:
    return f"{row.layer} {row.saturation_low:.0%} to {row.saturation_high:.0%}"


def _layers(rows: Sequence[LayerRow]) -> list[str]:
    width = max(len(row.layer) for row in rows)
    lines = []
    for row in rows:
        if _is_known(row):
            dimension, share = f"{row.stats['intrinsic_dimensionality']:.0f}", f"{row.stats['saturation']:.1%}"
        else:
            dimension, share = "–", f"{row.saturation_low:.1%} to {row.saturation_high:.1%}"
        lines.append(f"  {row.layer:<{width}}  {dimension:>6} of {row.features:<6}  {share:>6}")
    return lines
