"""NumPy: an archive of arrays per phase and step, covariances as square matrices among them."""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from delve_ray.checks import check_flag
from delve_ray.moments import unpack_triangle
from delve_ray.schema import EXTRA_STATS, INTERVAL, SCALAR_STATS, LayerRow, PublishedWindow
from delve_ray.storage import Storage
from delve_ray.writers.base import Scalar, WriterRun

Arrays: TypeAlias = Iterable[tuple[str, npt.NDArray[Any]]]

_WINDOW = ("attempt", "step", "revision", "workers", "world_size")
_COUNTS = ("features", "samples", "nonfinite_rows")


class NpyWriter:
    """Writes final windows to `<savefile>/npy/<phase>/<step>.npz` and user scalars to `npy/scalars/*.npy`.

    `numpy.load` opens an archive and reads of it what is asked for. Arrays of one value per layer, in network order:
    `layer`, `layer_type`, `features`, `samples`, `nonfinite_rows`, `threshold`, and each statistic under its long
    name, float64, NaN where a layer has none; where layers are sketched also `sketched`, bool, and `saturation_low`,
    `saturation_high` and `unseen_variance`. Per layer, float64: `eigenvalues/<layer>`, descending, (d,), of a sketched
    layer its head alone, `mean/<layer>`, (d,), with the stat "cov" `covariance/<layer>`, (d, d), and with "embed"
    `embedding/<layer>`, of shape (k, 2), k rows along the two leading eigenvectors. Single values: `attempt`, `step`,
    `revision`, `workers`, `world_size`; of several thresholds also `thresholds`, (t,), and
    `intrinsic_dimensionalities`, (layers, t).

    A corrected window replaces its file, and a later attempt those of the steps that it replays, never the other way
    round. Live windows are left out. A file of user scalars is one structured array with the fields attempt, rank,
    name, step, value and wall_time (UTC).

    With `zip`, archives are compressed. Raises OSError when the storage does.
    """

    name = "npy"

    def __init__(self, zip: bool = False) -> None:
        self._compressed = check_flag("zip", zip)
        self._attempts: dict[str, int] = {}  # of the files that are there, as far as this writer knows
        self._listed: set[str] = set()  # phases whose files of before are known

    def open(self, run: WriterRun) -> None:
        """Note where the run's files lie; they are looked at when there is something to write."""
        self._storage = run.storage

    def write(self, window: PublishedWindow) -> None:
        """Write a final window, one file per phase."""
        if not window.final:
            return
        for phase in dict.fromkeys(row.phase for row in window.rows):
            name = f"npy/{phase}/{window.step:010d}.npz"
            if self._attempt(phase, name) <= window.attempt:
                arrays = window_arrays(window, [row for row in window.rows if row.phase == phase])
                self._storage.write_atomic(name, _archive(arrays, self._compressed))
                self._attempts[name] = window.attempt

    def write_scalars(self, scalars: list[Scalar]) -> None:
        """Write user scalars; the same ones again go to the same file."""
        if scalars:
            data = io.BytesIO()
            np.lib.format.write_array(data, scalars_array(scalars), allow_pickle=False)
            content = data.getvalue()
            self._storage.write_atomic(f"npy/scalars/{hashlib.sha256(content).hexdigest()[:32]}.npy", content)

    def close(self) -> None:
        """Nothing to release: every file was complete when its call returned."""

    def _attempt(self, phase: str, name: str) -> int:
        """The attempt that wrote a file; -1 where there is none."""
        if phase not in self._listed:
            files = self._storage.list_files(f"npy/{phase}", ".npz")
            self._attempts |= {file: _UNREAD for file in files if file not in self._attempts}
            self._listed.add(phase)
        if self._attempts.get(name) == _UNREAD:
            self._attempts[name] = _stored_attempt(self._storage, name)
        return self._attempts.get(name, -1)


_UNREAD = -2


def _stored_attempt(storage: Storage, name: str) -> int:
    """The attempt of an archive on disk; -1 where it is gone, or no archive of ours."""
    try:
        with storage.open_input(name) as stream, np.load(stream, allow_pickle=False) as archive:
            return int(archive["attempt"])
    except (FileNotFoundError, zipfile.BadZipFile, ValueError, LookupError, EOFError):
        return -1


def window_arrays(window: PublishedWindow, rows: Sequence[LayerRow]) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """The arrays of one phase's rows by their names in the archive, one after the other: a matrix lives alone."""
    for name in _WINDOW:
        yield name, np.asarray(getattr(window, name), np.int64)
    for name in ("layer", "layer_type"):
        yield name, np.array([getattr(row, name) for row in rows], np.str_)
    for name in _COUNTS:
        yield name, np.array([getattr(row, name) for row in rows], np.int64)
    yield "threshold", np.array([row.threshold for row in rows], np.float64)
    for stat in (*SCALAR_STATS, *EXTRA_STATS):
        if any(row.stats.get(stat) is not None for row in rows):
            yield stat, np.array([row.stats.get(stat, np.nan) for row in rows], np.float64)
    if any(row.sketched for row in rows):
        yield "sketched", np.array([row.sketched for row in rows], np.bool_)
        for name in (*INTERVAL, "unseen_variance"):
            yield name, np.array([getattr(row, name) for row in rows], np.float64)  # None becomes NaN
    if rows[0].thresholds:
        yield "thresholds", np.array(rows[0].thresholds, np.float64)
        yield "intrinsic_dimensionalities", np.array([row.intrinsic_dimensionalities for row in rows], np.int64)
    for row in rows:
        yield f"eigenvalues/{row.layer}", np.asarray(row.eigenvalues, np.float64)
        yield f"mean/{row.layer}", np.asarray(row.mean, np.float64)
        if row.covariance is not None:
            yield f"covariance/{row.layer}", unpack_triangle(row.covariance, row.features)
        if row.embedding is not None:
            yield f"embedding/{row.layer}", np.asarray(row.embedding, np.float64)


def scalars_array(scalars: Sequence[Scalar]) -> npt.NDArray[Any]:
    """User scalars as one structured array, in their order."""
    names = np.array([scalar.name for scalar in scalars], np.str_)
    kinds = [("attempt", "<i4"), ("rank", "<i4"), ("name", names.dtype), ("step", "<i8"), ("value", "<f8")]
    array = np.zeros(len(scalars), [*kinds, ("wall_time", "<M8[us]")])
    array["name"] = names
    for field in ("attempt", "rank", "step", "value"):
        array[field] = [getattr(scalar, field) for scalar in scalars]
    array["wall_time"] = [scalar.wall_time.astimezone(UTC).replace(tzinfo=None) for scalar in scalars]
    return array


def _archive(arrays: Arrays, compressed: bool) -> Iterator[bytes]:
    """The pieces of an archive as `numpy.savez` writes it: the same for the same arrays, and never whole in memory."""
    sink = _Pieces()
    with zipfile.ZipFile(sink, "w") as archive:
        for name, array in arrays:
            member = zipfile.ZipInfo(f"{name}.npy")  # of a fixed date
            member.compress_type = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
            with archive.open(member, "w", force_zip64=True) as stream:
                np.lib.format.write_array(stream, array, allow_pickle=False)
            yield sink.take()
    yield sink.take()


class _Pieces(io.RawIOBase):
    """A file that can only be written, whose content is taken away as it comes."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._parts.append(bytes(data))
        return len(self._parts[-1])

    def take(self) -> bytes:
        """What was written since the last time."""
        taken, self._parts = b"".join(self._parts), []
        return taken
