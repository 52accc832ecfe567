"""From moments to rows, and from rows to writers: what a store does on threads of its own."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

from delve_ray import spectrum
from delve_ray.moments import F64, packed_diagonal, unpack_triangle
from delve_ray.schema import LayerRow, PublishedWindow
from delve_ray.store.protocol import LayerInfo, StoreConfig
from delve_ray.writers.base import Scalar, Writer

log = logging.getLogger(__name__)


def layer_row(
    layer: LayerInfo, phase: str, n: int, nonfinite: int, mean: F64, packed: F64, config: StoreConfig
) -> LayerRow:
    """The published row of one layer: one decomposition, shared by all statistics but those of other matrices.

    `packed` is the packed scatter of n observations. With n = 0 (all rows were non-finite) the spectrum is zero.
    """
    covariance = packed / max(n, 1)
    matrix = unpack_triangle(covariance, mean.size, symmetric=False)
    eigenvalues = spectrum.eigenvalues(matrix)
    statistics = spectrum.statistics(
        eigenvalues,
        trace=float(packed_diagonal(covariance, mean.size).sum()),
        samples=n,
        threshold=config.threshold,
        thresholds=config.thresholds,
        stats=tuple(stat for stat in config.stats if stat != "cov"),
        product_eps=config.product_eps,
        covariance=matrix,
        mean=mean,
    )
    return LayerRow(
        layer=layer.name,
        layer_type=layer.layer_type,
        phase=phase,
        features=mean.size,
        samples=n,
        nonfinite_rows=nonfinite,
        threshold=config.threshold,
        stats=statistics.values,
        eigenvalues=eigenvalues,
        mean=mean.copy(),
        covariance=covariance if "cov" in config.stats else None,
        alpha_r2=statistics.alpha_r2,
        alpha_from=statistics.alpha_from,
        alpha_to=statistics.alpha_to,
        thresholds=config.thresholds,
        intrinsic_dimensionalities=statistics.intrinsic_dimensionalities,
    )


class WriterThread:
    """One writer on its own thread: its failures and its slowness are its own.

    What a writer fails to write is reported in `status()` and in the log; the next window is tried again.
    """

    def __init__(self, writer: Writer) -> None:
        self.writer = writer
        self.written = 0
        self.failed = 0
        self.last_error: str | None = None
        self._queue: queue.SimpleQueue[tuple[bool, Callable[[], None]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"delve_ray-writer-{writer.name}", daemon=True)
        self._thread.start()

    def write(self, window: PublishedWindow) -> None:
        """Queue a window."""
        self._queue.put((True, lambda: self.writer.write(window)))

    def write_scalars(self, scalars: list[Scalar]) -> None:
        """Queue user scalars."""
        self._queue.put((True, lambda: self.writer.write_scalars(scalars)))

    def drain(self, timeout: float) -> bool:
        """Wait until everything queued so far was tried; False when it takes longer."""
        done = threading.Event()
        self._queue.put((False, done.set))
        return done.wait(timeout)

    def close(self, timeout: float) -> bool:
        """Write what is queued, close the writer and end the thread; False when it takes longer."""
        self._queue.put((False, self.writer.close))
        self._queue.put(None)
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def status(self) -> dict[str, object]:
        """Counts and the last error, for people."""
        return {
            "name": self.writer.name,
            "written": self.written,
            "failed": self.failed,
            "queued": self._queue.qsize(),
            "last_error": self.last_error,
        }

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            counts, job = item
            try:
                job()
                self.written += counts
            except Exception as error:  # whatever a writer raises must not reach the others
                self.failed += 1
                self.last_error = f"{type(error).__name__}: {error}"
                log.exception("writer %s failed; the other writers and the training go on", self.writer.name)
