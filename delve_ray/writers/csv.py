"""CSV: a row per layer and window in one file, user scalars in another."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Sequence
from typing import Any

from delve_ray.errors import OptionError
from delve_ray.schema import EXTRA_STATS, SCALAR_STATS, PublishedWindow
from delve_ray.writers.base import Scalar, WriterRun

SPECTRA = (
    *("run", "trial", "attempt", "phase", "step", "revision", "layer", "layer_type", "features", "samples"),
    *("nonfinite_rows", "workers", "world_size", "threshold", *SCALAR_STATS, *EXTRA_STATS),
    *("sketched", "saturation_low", "saturation_high", "unseen_variance", "wall_time"),
)
"""Columns of spectra.csv: what there is of a layer's window but lists."""
SCALARS = ("run", "trial", "attempt", "rank", "name", "step", "value", "wall_time")
"""Columns of scalars.csv."""


class CsvWriter:
    """Appends final windows to `<savefile>/csv/spectra.csv` and user scalars to `csv/scalars.csv`.

    Of the rows of one attempt, phase, step and layer, that with the highest revision holds. What is null in the
    Parquet files is empty. Live windows are left out. Only for local directories, as a file grows: another savefile
    raises OptionError. Raises OSError when a write fails; what it left half-written is cut off by the next one.
    """

    name = "csv"

    def open(self, run: WriterRun) -> None:
        """Find the files of before, if there are any."""
        if not run.storage.is_local:
            raise OptionError(
                f"save_to='csv' needs a local savefile, not savefile={run.storage.uri!r}: the files grow, and only "
                f"whole files can be put there; choose a local savefile or save_to='parquet'"
            )
        folder = os.path.join(run.storage.local_path, "csv")
        self._spectra = _File(os.path.join(folder, "spectra.csv"), SPECTRA)
        self._scalars = _File(os.path.join(folder, "scalars.csv"), SCALARS)

    def write(self, window: PublishedWindow) -> None:
        """Append the rows of a final window."""
        if window.final:
            self._spectra.append(_row(window, row) for row in window.rows)

    def write_scalars(self, scalars: list[Scalar]) -> None:
        """Append user scalars."""
        self._scalars.append([_text(getattr(scalar, name)) for name in SCALARS] for scalar in scalars)

    def close(self) -> None:
        """Nothing is open between two writes."""


def _row(window: PublishedWindow, row: Any) -> list[str]:
    values = [row.stats.get(name, getattr(row, name, getattr(window, name, None))) for name in SPECTRA]
    return [_text(value) for value in values]


def _text(value: Any) -> str:
    return "" if value is None else value.isoformat() if hasattr(value, "isoformat") else str(value)


class _File:
    """A file that only grows, by whole lines."""

    def __init__(self, path: str, columns: Sequence[str]) -> None:
        self._path, self._columns = path, columns
        self._size: int | None = None  # up to which it is whole; None where that has to be looked at
        # Where a row has the values of the file's columns; None for a column that it has no value of.
        self._places: list[int | None] = list(range(len(columns)))

    def append(self, rows: Iterable[Sequence[str]]) -> None:
        """Append rows; on return they are on disk. A crash may leave half of them: cut off by the next append."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        lines = list(rows)
        if not lines:
            return
        os.makedirs(os.path.dirname(self._path), exist_ok=True)
        with open(self._path, "ab+") as file:
            end = file.seek(0, os.SEEK_END)
            if self._size is None or self._size > end:
                self._size = _whole(file, end)
                self._places = self._places_in(file)
            file.truncate(self._size)
            if not self._size:
                writer.writerow(self._columns)
            writer.writerows([[line[place] if place is not None else "" for place in self._places] for line in lines])
            file.write(text.getvalue().encode())
            file.flush()
            os.fsync(file.fileno())
            self._size = file.seek(0, os.SEEK_END)

    def _places_in(self, file: Any) -> list[int | None]:
        """Where the values of the file's columns are in a row; another version may have begun it with others."""
        file.seek(0)
        heads = next(csv.reader([file.readline().decode(errors="replace")]), []) if self._size else self._columns
        return [self._columns.index(name) if name in self._columns else None for name in heads]


def _whole(file: Any, end: int) -> int:
    """How much of a file consists of whole rows: up to the last line break that is not inside quotes."""
    file.seek(0)
    data: bytes = file.read(end)
    while (end := data.rfind(b"\n", 0, end)) >= 0:
        if data.count(b'"', 0, end) % 2 == 0:
            return end + 1
    return 0
