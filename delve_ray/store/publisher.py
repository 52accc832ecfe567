"""The publisher: a thread that turns windows into rows, hands them to the writers and keeps the latest answers."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from delve_ray.moments import F64
from delve_ray.schema import PHASES, LayerRow, PublishedWindow, window_metrics
from delve_ray.store.protocol import LayerInfo, StoreConfig
from delve_ray.store.publishing import WriterThread, layer_row
from delve_ray.store.window import Job
from delve_ray.writers.base import Scalar, Writer

log = logging.getLogger(__name__)

_POLL_S = 0.5
"""How often the publisher looks for live windows and for silence when nothing is submitted."""
_FINISH_TIMEOUT_S = 120.0
"""How long the writers may take to write what is queued when the run ends."""


@dataclass(frozen=True, slots=True)
class Latest:
    """The last published moments of a layer and phase; the packed scatter is float64, d(d+1)/2."""

    step: int
    n: int
    mean: F64
    packed: F64


class Publisher:
    """Publishes jobs one after the other, on a thread of its own, in the order in which they are submitted.

    `poll` is called about twice a second, on that thread, and returns the open windows that are due for a live
    publication. All methods may be called from any thread.
    """

    def __init__(
        self,
        config: StoreConfig,
        layers: Sequence[LayerInfo],
        writers: Sequence[Writer],
        poll: Callable[[], Sequence[Job]],
    ) -> None:
        self.config = config
        self.layers = list(layers)
        self.writers = [WriterThread(writer) for writer in writers]
        self.finished = threading.Event()
        self._poll = poll
        self._jobs: deque[Job] = deque()
        self._pending = 0
        self._ending = False
        self._published: Counter[int] = Counter()
        self._latest: dict[tuple[int, int], Latest] = {}
        self._metrics: dict[str, float] = {}
        self._problems: list[str] = []
        self._changed = threading.Condition()
        threading.Thread(target=self._run, name="delve_ray-publisher", daemon=True).start()

    def submit(self, jobs: Sequence[Job], *, end: bool = False) -> None:
        """Publish these jobs; with `end`, close the writers afterwards and finish."""
        with self._changed:
            self._jobs.extend(jobs)
            self._pending += len(jobs)
            self._ending = self._ending or end
            self._changed.notify_all()

    def write_scalars(self, scalars: Sequence[Scalar], attempt: int) -> None:
        """Hand user scalars to the writers, marked with the run's own names."""
        stamped = [replace(s, run=self.config.run, trial=self.config.trial, attempt=attempt) for s in scalars]
        for writer in self.writers:
            writer.write_scalars(stamped)

    # --- answers -------------------------------------------------------------------------------------------

    def published(self, attempt: int) -> int:
        """Number of final windows published of an attempt."""
        with self._changed:
            return self._published[attempt]

    def metrics(self) -> dict[str, float]:
        """Metric keys and values of the last final window of each phase."""
        with self._changed:
            return dict(self._metrics)

    def latest(self, layer: int, phase: int) -> Latest | None:
        """The last published moments of a layer in a phase."""
        with self._changed:
            return self._latest.get((layer, phase))

    def latest_bytes(self) -> int:
        """Bytes kept to answer `latest`."""
        with self._changed:
            return sum(latest.packed.nbytes for latest in self._latest.values())

    def problems(self) -> list[str]:
        """What could not be published or written, in words."""
        with self._changed:
            problems = list(self._problems)
        return problems + [
            f"writer {w.writer.name} failed {w.failed} times, last: {w.last_error}" for w in self.writers if w.failed
        ]

    def flush(self, timeout: float) -> bool:
        """Wait until everything submitted so far is published and written; False when that takes longer."""
        deadline = time.monotonic() + timeout
        with self._changed:
            if not self._changed.wait_for(lambda: self._pending == 0, timeout):
                return False
        if self._ending:
            return self.finished.wait(max(0.0, deadline - time.monotonic()))
        return all(writer.drain(max(0.0, deadline - time.monotonic())) for writer in self.writers)

    # --- the thread ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._changed:
                if not self._jobs and not self._ending:
                    self._changed.wait(_POLL_S)
                job = self._jobs.popleft() if self._jobs else None
                ending = self._ending
            if job is not None:
                self._publish(job)
                with self._changed:
                    self._pending -= 1
                    self._changed.notify_all()
            elif ending:
                break
            else:
                for live in self._poll():
                    self._publish(live)
        deadline = time.monotonic() + _FINISH_TIMEOUT_S
        for writer in self.writers:
            if not writer.close(max(0.0, deadline - time.monotonic())):
                self._problem(f"writer {writer.writer.name} did not finish within {_FINISH_TIMEOUT_S:.0f} s")
        self.finished.set()

    def _publish(self, job: Job) -> None:
        rows: list[LayerRow] = []
        for (index, phase), entry in job.entries:
            try:
                n, nonfinite, mean, packed = entry.snapshot(final=job.final)
                rows.append(layer_row(self.layers[index], PHASES[phase], n, nonfinite, mean, packed, self.config))
            except Exception as error:  # one layer's decomposition must not cost the others their rows
                self._problem(f"layer {self.layers[index].name}, step {job.step}: {type(error).__name__}: {error}")
                continue
            with self._changed:
                self._latest[index, phase] = Latest(job.step, n, mean, packed)
        window = PublishedWindow(
            run=self.config.run,
            attempt=job.attempt,
            window=job.ordinal,
            step=job.step,
            revision=job.revision,
            final=job.final,
            workers=job.workers,
            world_size=self.config.world_size,
            wall_time=datetime.now(UTC),
            rows=rows,
            trial=self.config.trial,
            trial_config=self.config.trial_config,
        )
        for writer in self.writers:
            writer.write(window)
        if job.final:
            self._announce(job.attempt, rows)

    def _announce(self, attempt: int, rows: list[LayerRow]) -> None:
        """Make a final window's metrics the latest; phases without rows keep theirs."""
        metrics = window_metrics(rows)
        phases = {row.phase for row in rows}
        with self._changed:
            kept = {key: value for key, value in self._metrics.items() if key.split("/", 2)[1] not in phases}
            self._metrics = kept | metrics
            self._published[attempt] += 1
            self._changed.notify_all()

    def _problem(self, what: str) -> None:
        log.error("run %s: %s", self.config.run, what)
        with self._changed:
            self._problems.append(what)
