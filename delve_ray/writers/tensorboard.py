"""TensorBoard: one scalar per metric key, a histogram of every layer's eigenspectrum, and pictures where asked for."""

from __future__ import annotations

import io
import logging
import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from typing import Any

import numpy as np
import numpy.typing as npt

from delve_ray.checks import check_flag
from delve_ray.errors import OptionError
from delve_ray.schema import F64, PublishedWindow, metric_key, window_metrics
from delve_ray.storage import Storage
from delve_ray.writers.base import Scalar, WriterRun
from delve_ray.writers.projector import embedding_names, write_embeddings

log = logging.getLogger(__name__)

FOLDER = "tensorboard"
_RGBA = 4
FIGURE_DPI = 90
"""Of the images: with it they are 1080 pixels wide, or 810 where there are few layers."""
FINEST_BIN = 0.1
"""Width of a histogram's bins in decades, where the spectrum leaves room for it."""
MAX_BINS = 64
"""Above this many bins their width is doubled; TensorBoard itself draws about 30."""


class TensorBoardWriter:
    """Writes final windows and user scalars to event files in `<savefile>/tensorboard`.

    A final window becomes one event at its step and wall time, with a scalar for each entry of
    `delve_ray.schema.window_metrics`, under its key, and per layer and phase a histogram of log10 of the
    positive eigenvalues under `eigenspectrum/<phase>/<layer>` (none where no eigenvalue is positive).
    Tags are the keys to the letter: layer names are not rewritten. Values are float32, as TensorBoard has
    them: what exceeds 3.4e38 shows as infinite.

    Live revisions (`final=False`) are left out, because they would put several points on one step. A
    corrected final revision, or a restarted attempt that replays a step, adds a newer point on that step;
    the Parquet files say which one holds. So does a write that is made again because its flush failed: it
    may add the same point twice.

    Embeddings (`stats=["embed"]`) go to the projector: the last window's of each phase and layer.

    An event file that was removed while it was open, or its directory, is followed by a new one. What fails
    half-way is followed by a new file, too, because nothing can be read behind half an event.

    With `writer_args={"tensorboard": {"figures": True}}` a final window also has two images of each phase, drawn by
    `delve_ray.analysis.plots`: `saturation_per_layer/<phase>` and `eigenspectra/<phase>`. For both phases they take
    0.9 s of one CPU core and 0.2 MB with 5 layers of 512 features, 2 s and 0.5 MB with 50 or 300; without them a window
    takes 2 to 60 ms and 8 to 500 kB. The thread that writes draws them, in the process of the store: without Ray that
    is the training's own, which matplotlib then shares with what else draws there. Needs the package matplotlib, and
    raises OptionError without it. What cannot be drawn is logged, and costs no values.

    Only for local directories: an event file grows, and object stores have no growing files. Raises
    NotImplementedError for others, OptionError without the package tensorboardX, OSError when a write fails.
    """

    name = "tensorboard"

    def __init__(self, storage: Storage, figures: bool = False) -> None:
        if not storage.is_local:
            raise NotImplementedError(
                f"save_to='tensorboard' needs a local savefile, not savefile={storage.uri!r}: event files grow, and "
                "only whole files can be put there; choose a local savefile or save_to='parquet'"
            )
        try:
            from tensorboardX.proto import event_pb2
        except ImportError as error:
            raise OptionError(
                f"save_to='tensorboard' needs the package tensorboardX ({error}): pip install tensorboardX"
            ) from error
        if check_flag("figures", figures) and find_spec("matplotlib") is None:
            raise OptionError(
                "writer_args={'tensorboard': {'figures': True}} needs matplotlib: pip install \"delve_ray[plot]\""
            )
        self._figures = figures
        self._new_event = event_pb2.Event
        self._storage = storage
        self._directory = os.path.join(storage.local_path, FOLDER)
        self._file: _EventFile | None = None

    def open(self, run: WriterRun) -> None:
        """Nothing to prepare: a file is made when there is something to write."""

    def write(self, window: PublishedWindow) -> None:
        """Write a final window; a live one, or one without rows, leaves the files as they are."""
        if not window.final or not window.rows:
            return
        event = self._event(window.step, window.wall_time.timestamp())
        for key, value in window_metrics(window.rows).items():
            event.summary.value.add(tag=key, simple_value=value)
        for row in window.rows:
            histogram = spectrum_histogram(row.eigenvalues)
            if histogram is not None:
                event.summary.value.add(tag=metric_key("eigenspectrum", row.phase, row.layer), histo=histogram)
        for tag, image in self._drawn(window).items():
            event.summary.value.add(tag=tag, image=image)
        if embeddings := embedding_names(list(window.rows)):  # first: they may be written twice, an event may not
            write_embeddings(self._storage, FOLDER, embeddings)
        self._append([event])

    def write_scalars(self, scalars: list[Scalar]) -> None:
        """Write user scalars under their own names."""
        events = []
        for scalar in scalars:
            event = self._event(scalar.step, scalar.wall_time.timestamp())
            event.summary.value.add(tag=scalar.name, simple_value=scalar.value)
            events.append(event)
        self._append(events)

    def close(self) -> None:
        """Close the event file; a later write would start a new one."""
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def _drawn(self, window: PublishedWindow) -> dict[str, dict[str, Any]]:
        """The pictures of a window, by tag, where they were asked for; one that cannot be drawn costs no numbers."""
        if not self._figures:
            return {}
        try:
            return window_figures(window)
        except Exception:
            log.exception("figures of run %r, step %d cannot be drawn; its values are written", window.run, window.step)
            return {}

    def _event(self, step: int, wall_time: float) -> Any:
        return self._new_event(step=step, wall_time=wall_time)

    def _append(self, events: list[Any]) -> None:
        """Append events and flush: when this returns, a reader sees them."""
        if not events:
            return
        if self._file is not None and not self._file.is_there():
            self._drop()  # what is written to a removed file, nobody sees
        file = self._file = self._file or _EventFile(self._directory, self._event)
        try:
            file.append(events)
        except OSError:
            self._drop()
            raise

    def _drop(self) -> None:
        """Let go of the open file; the next write starts a new one."""
        file, self._file = self._file, None
        if file is not None:
            with suppress(OSError):
                file.close()
            with suppress(OSError):
                file.remove_if_empty()


class _EventFile:
    """A new event file in `directory`; `new_event(step, wall_time)` makes the event that names its version.

    The class far below SummaryWriter is used on purpose: SummaryWriter hands events to another thread, so that
    its flush() may return before they are written, and rewrites tags. Its file names have a resolution of one
    second and overwrite each other, so a suffix makes them unique, and sorts them by time of creation, which
    is the order in which TensorBoard reads them.
    """

    def __init__(self, directory: str, new_event: Callable[[int, float], Any]) -> None:
        from tensorboardX.record_writer import RecordWriter

        os.makedirs(directory, exist_ok=True)
        now = time.time_ns()
        name = f"events.out.tfevents.{now // 10**9}.{socket.gethostname()}.{now:020d}.{os.getpid()}"
        self._path = os.path.join(directory, name)
        self._records = RecordWriter(self._path)
        self._inode = _inode(self._path)
        self._empty = True
        version = new_event(0, now / 1e9)
        version.file_version = "brain.Event:2"
        self._records.write(version.SerializeToString())

    def is_there(self) -> bool:
        """Whether the file still has its name."""
        return self._inode is not None and _inode(self._path) == self._inode

    def append(self, events: list[Any]) -> None:
        """Append events and flush. After an OSError the file may end in half an event and is of no more use."""
        for event in events:
            self._records.write(event.SerializeToString())
        self._records.flush()
        self._empty = False

    def close(self) -> None:
        """Close the file."""
        self._records.close()

    def remove_if_empty(self) -> None:
        """Remove a file that nothing was appended to: else every try during an outage would leave one."""
        if self._empty and self.is_there():
            os.unlink(self._path)


def _inode(path: str) -> tuple[int, int] | None:
    """Device and inode of a file; None when it is gone. While the file is open, no other one gets the same."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def spectrum_histogram(eigenvalues: F64) -> dict[str, Any] | None:
    """log10 of the positive, finite eigenvalues as the fields of a TensorBoard histogram; None without any.

    Bins start at multiples of their width, so that those of different steps line up. The width is
    `FINEST_BIN` decades, doubled until at most `MAX_BINS` bins cover the spectrum.

    >>> spectrum_histogram(np.array([10.0, 1.0, 1.0, 0.0]))["bucket"]
    [2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]
    """
    positive = eigenvalues[np.isfinite(eigenvalues) & (eigenvalues > 0)]
    if positive.size == 0:
        return None
    decades: F64 = np.log10(positive)
    width = FINEST_BIN
    bins = _bin_numbers(decades, width)
    while bins.max() - bins.min() >= MAX_BINS:
        width *= 2
        bins = _bin_numbers(decades, width)
    counts = np.bincount(bins - bins.min())
    right_edges = (bins.min() + 1 + np.arange(counts.size)) * width
    return {
        "min": float(decades.min()),
        "max": float(decades.max()),
        "num": float(decades.size),
        "sum": float(decades.sum()),
        "sum_squares": float(decades @ decades),
        "bucket_limit": right_edges.tolist(),
        "bucket": counts.tolist(),
    }


def _bin_numbers(decades: F64, width: float) -> npt.NDArray[np.int64]:
    return np.floor(decades / width).astype(np.int64)


def window_figures(window: PublishedWindow) -> dict[str, dict[str, Any]]:
    """Saturation per layer and eigenspectra of each phase, as the fields of TensorBoard images by tag."""
    from delve_ray.analysis.plots import eigenspectra, saturation_per_layer
    from delve_ray.writers.parquet import spectra_table

    spectra = spectra_table(window)
    images = {}
    for phase in dict.fromkeys(row.phase for row in window.rows):
        for name, draw in (("saturation_per_layer", saturation_per_layer), ("eigenspectra", eigenspectra)):
            images[f"{name}/{phase}"] = _image(draw(spectra, phase=phase))
    return images


def _image(figure: Any) -> dict[str, Any]:
    """A matplotlib figure as the fields of a TensorBoard image."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=FIGURE_DPI)
    png = file.getvalue()
    # A PNG begins with a signature of 8 bytes, and a header whose data are width and height.
    width, height = (int.from_bytes(png[start : start + 4], "big") for start in (16, 20))
    return {"width": width, "height": height, "colorspace": _RGBA, "encoded_image_string": png}
