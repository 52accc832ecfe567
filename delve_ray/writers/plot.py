"""Plots: the layers of every window, and all windows' saturation over the steps, as pictures that keep up."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from delve_ray.errors import OptionError
from delve_ray.schema import SPECTRA_SCHEMA, PublishedWindow
from delve_ray.writers.base import Scalar, WriterRun
from delve_ray.writers.parquet import spectra_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FREE_S = 10.0
"""How long drawing may take in a run, whatever the run's length: enough for every window of most runs."""
SHARE = 0.1
"""Of the run's time, what drawing may take beyond that."""
_STEPS = "plot/saturation.png"
_NUMBERS = "plot/saturation.parquet"
_COLUMNS = ("run", "attempt", "phase", "step", "revision", "layer", "saturation")
_SCHEMA = pa.schema([SPECTRA_SCHEMA.field(name) for name in _COLUMNS])


class PlotWriter:
    """Draws final windows: `<savefile>/plot/<phase>/<step>.png` and `plot/saturation.png`.

    The first shows the saturation of a window's layers, the second that of each layer over all steps, redrawn with
    every window. The numbers of the second are in `plot/saturation.parquet`, so that a store which is restarted goes
    on with the picture. A corrected window is drawn again, and a later attempt replaces the steps that it replays.
    Live windows and user scalars are not drawn.

    Drawing takes time, and shares the process with the training where there is no Ray: beyond `FREE_S` seconds it takes
    at most the share `SHARE` of the run's time. Where windows come faster than that, some have no picture of their own,
    and `saturation.png` follows later; at the end both are up to date, and the numbers are at any time.

    `figsize` is the pictures' width and height in inches, `fontsize` that of all their text in points. Raises
    OptionError without matplotlib, OSError when the storage does.
    """

    name = "plot"

    def __init__(self, figsize: Sequence[float] | None = None, fontsize: float | None = None) -> None:
        self._figsize = None if figsize is None else _check_figsize(figsize)
        if fontsize is not None and not _is_length(fontsize):
            raise OptionError(f"fontsize={fontsize!r} must be a number of points above 0, such as 12")
        self._fontsize = fontsize
        self._waiting: dict[tuple[str, int], pa.Table] = {}  # windows to draw, by phase and step
        self._pictured: set[tuple[str, int]] = set()
        self._drawn = True  # whether the picture over the steps has every window

    def open(self, run: WriterRun) -> None:
        """Find the numbers of before, if there are any."""
        try:
            import matplotlib  # noqa: F401
        except ImportError as error:
            raise OptionError(f"save_to='plot' needs matplotlib ({error}): pip install 'delve_ray[plot]'") from error
        self._storage = run.storage
        self._numbers = self._read()
        self._drawn = not self._numbers.num_rows
        self._opened, self._spent = time.monotonic(), 0.0

    def write(self, window: PublishedWindow) -> None:
        """Note a final window's numbers, and draw it where there is time."""
        if not window.final or not window.rows:
            return
        table = spectra_table(window)
        phases = [
            phase
            for phase in dict.fromkeys(row.phase for row in window.rows)
            if self._attempt(phase, window.step) <= window.attempt
        ]
        if not phases:
            return
        self._note(table, window.step, phases)
        for phase in phases:
            self._wait(phase, window.step, table)
        if self._spent <= FREE_S + SHARE * (time.monotonic() - self._opened):
            self._draw()

    def write_scalars(self, scalars: list[Scalar]) -> None:
        """User scalars are not drawn."""

    def close(self) -> None:
        """Draw what has waited."""
        self._draw()

    # --- the numbers -------------------------------------------------------------------------------------------

    def _read(self) -> pa.Table:
        """The numbers that a writer before this one has left."""
        try:
            with self._storage.open_input(_NUMBERS) as stream:
                return pq.read_table(stream).select(_COLUMNS).cast(_SCHEMA)
        except FileNotFoundError:
            return _SCHEMA.empty_table()
        except (pa.ArrowException, LookupError) as error:
            raise OptionError(
                f"save_to='plot' goes on with {self._storage.path(_NUMBERS)}, which cannot be read ({error}); remove it"
            ) from error

    def _attempt(self, phase: str, step: int) -> int:
        """The attempt that this phase and step are of; -1 where they are new."""
        found = pc.max(self._numbers.column("attempt").filter(_is_of(self._numbers, phase, step))).as_py()
        return -1 if found is None else int(found)

    def _note(self, rows: pa.Table, step: int, phases: Sequence[str]) -> None:
        """Put the rows of these phases in the place of those of their step; on return they are on disk."""
        kept, added = self._numbers, []
        for phase in phases:
            kept = kept.filter(pc.invert(_is_of(kept, phase, step)))
            added.append(rows.filter(_is_of(rows, phase, step)).select(_COLUMNS).replace_schema_metadata(None))
        self._numbers = pa.concat_tables([kept, *added]).combine_chunks()
        data = io.BytesIO()
        pq.write_table(self._numbers, data, compression="zstd")
        self._storage.write_atomic(_NUMBERS, data.getvalue())
        self._drawn = False

    # --- the pictures ------------------------------------------------------------------------------------------

    def _wait(self, phase: str, step: int, table: pa.Table) -> None:
        """Draw a window when there is time: of those that have no picture yet the last one of its phase is enough."""
        passed_over = [key for key in self._waiting if key[0] == phase and key[1] < step and key not in self._pictured]
        for key in passed_over:
            del self._waiting[key]
        self._waiting[phase, step] = table

    def _draw(self) -> None:
        """Draw what waits, and the picture over the steps unless it has every window."""
        from delve_ray.analysis.plots import saturation_over_steps, saturation_per_layer

        began = time.monotonic()
        try:
            for phase, step in list(self._waiting):
                table = self._waiting[phase, step]
                name = f"plot/{phase}/{step:010d}.png"
                self._storage.write_atomic(name, self._png(saturation_per_layer(table, phase=phase, step=step)))
                del self._waiting[phase, step]
                self._pictured.add((phase, step))
            if not self._drawn:
                self._storage.write_atomic(_STEPS, self._png(saturation_over_steps(self._numbers)))
                self._drawn = True
        except OSError:
            raise  # the same call comes again
        except Exception:
            self._waiting.clear()  # a window that cannot be drawn must not stop those after it
            raise
        finally:
            self._spent += time.monotonic() - began

    def _png(self, figure: Figure) -> bytes:
        if self._figsize is not None:
            figure.set_size_inches(*self._figsize)
        if self._fontsize is not None:
            from matplotlib.text import Text

            for text in figure.findobj(Text):
                text.set_fontsize(self._fontsize)
        data = io.BytesIO()
        figure.savefig(data, format="png")
        return data.getvalue()


def _is_of(table: pa.Table, phase: str, step: int) -> pa.ChunkedArray:
    """Which rows are of this phase and step. A mask, as expressions take a hundred times longer on small tables."""
    return pc.and_(pc.equal(table.column("phase"), phase), pc.equal(table.column("step"), step))


def _check_figsize(figsize: Any) -> tuple[float, float]:
    sizes = tuple(figsize) if isinstance(figsize, Sequence) and not isinstance(figsize, str) else ()
    if len(sizes) != 2 or not all(map(_is_length, sizes)):
        raise OptionError(f"figsize={figsize!r} must be a width and a height in inches, such as (9, 5)")
    return sizes


def _is_length(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
