"""The publisher: a thread that turns windows into rows, hands them to the writers and keeps the latest answers.

Decompositions are what takes its time. They are without vectors, the widest first, and shared with a few threads where
the store has cores to itself: LAPACK releases the GIL. A layer that has got nothing since it was last published, live
or final, is not decomposed again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Protocol

from delve_ray.moments import F64
from delve_ray.nystrom import head_bytes
from delve_ray.schema import PHASES, LayerRow, PublishedWindow, window_metrics
from delve_ray.store.crew import Crew
from delve_ray.store.metrics import Metrics
from delve_ray.store.protocol import LayerInfo, StoreConfig
from delve_ray.store.publishing import WIDE, Compute, entry_row, joined, layer_row
from delve_ray.store.timings import Timings
from delve_ray.store.window import Entry, Job, Window
from delve_ray.store.writing import WriterThread
from delve_ray.writers.base import Scalar, Writer

log = logging.getLogger(__name__)

_POLL_S = 0.5
"""How often the publisher looks for live windows and for silence when nothing is submitted."""
DECOMPOSING_BYTES = 2 << 30
"""Memory of the decompositions that run side by side: as many as have room for a layer of the widest kind each."""
BYTES_PER_ENTRY = 24
"""Of a matrix that is decomposed, per value: itself, LAPACK's copy of it, and what its statistics take."""


def _decomposing_bytes(entry: Entry) -> int:
    """What the decomposition of a layer takes."""
    return head_bytes(entry.columns) if entry.columns else BYTES_PER_ENTRY * entry.features**2


@dataclass(frozen=True, slots=True)
class Latest:
    """The last published moments of a layer and phase; the packed scatter is float64, d(d+1)/2, or a sketch.

    The covariance is the packed scatter over `weight`, which is `n` where nothing was sampled.
    """

    step: int
    n: int
    weight: float
    mean: F64
    packed: F64


class _Countdown:
    """Calls back once it was called itself by each of several writers, with whether all have written; at once where
    there are none.
    """

    def __init__(self, count: int, then: Callable[[bool], None]) -> None:
        self._count = count
        self._written = True
        self._then = then
        self._lock = threading.Lock()
        if not count:
            then(True)

    def __call__(self, written: bool) -> None:
        with self._lock:
            self._count -= 1
            self._written = self._written and written
            done = not self._count
        if done:
            self._then(self._written)


class Owner(Protocol):
    """What a publisher asks of its store, on the publisher's and the writers' threads, with no lock held."""

    def poll(self) -> Sequence[Job]:
        """About twice a second: the open windows that are due for a live publication."""

    def unpark(self, window: Window) -> None:
        """Bring a window's entries into memory."""

    def announced(self, job: Job) -> None:
        """A final window is decomposed, and `metrics` has it."""

    def written(self, job: Job, everywhere: bool) -> None:
        """Every writer has written a final window, or has given it up."""

    def ended(self) -> None:
        """The writers are closed."""


class Publisher:
    """Publishes jobs one after the other, on a thread of its own, in the order in which they are submitted.

    All methods may be called from any thread.
    """

    def __init__(
        self,
        config: StoreConfig,
        layers: Sequence[LayerInfo],
        writers: Sequence[Writer],
        owner: Owner,
        finish_timeout: float,
        cores: int = 1,
        timings: Timings | None = None,
        compute: Compute = layer_row,
        elsewhere: int = 0,
    ) -> None:
        self.config = config
        self._timings = timings or Timings()
        self.layers = list(layers)
        self.writers = [WriterThread(writer, timings=self._timings) for writer in writers]
        self.finished = threading.Event()
        self._owner = owner
        self._compute = compute
        # One core is for what comes in; who waits for others takes none.
        self._own_threads = max(1, cores - 1)
        self._crew = Crew(self._own_threads + elsewhere, "delve_ray-spectrum")
        self._elsewhere = elsewhere
        self._finish_timeout = finish_timeout
        self._jobs: deque[Job] = deque()
        self._pending = 0
        self._ending = False
        self._latest: dict[tuple[int, int], Latest] = {}
        self._metrics = Metrics()
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

    def write_scalars(self, scalars: Sequence[Scalar], written: Callable[[bool], None]) -> None:
        """Hand user scalars to the writers; `written` is called once all have written them, or given them up."""
        done = _Countdown(len(self.writers), written)
        for writer in self.writers:
            writer.write_scalars(list(scalars), done)

    def restore_metrics(self, metrics: Mapping[str, float]) -> None:
        """Begin with the metrics of the store before this one."""
        with self._changed:
            self._metrics = Metrics(metrics)

    # --- answers -------------------------------------------------------------------------------------------

    def metrics(self) -> Metrics:
        """Metric keys and values of the last final window of each phase."""
        with self._changed:
            return self._metrics

    def latest(self, layer: int, phase: int) -> Latest | None:
        """The last published moments of a layer in a phase."""
        with self._changed:
            return self._latest.get((layer, phase))

    def latest_bytes(self) -> int:
        """Bytes kept to answer `latest`."""
        with self._changed:
            return sum(latest.packed.nbytes for latest in self._latest.values())

    def unpublished(self) -> list[str]:
        """What could not be published, in words."""
        with self._changed:
            return list(self._problems)

    def problems(self) -> list[str]:
        """What could not be published or written, in words."""
        return self.unpublished() + [problem for writer in self.writers if (problem := writer.problem()) is not None]

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
                self._try(job)
                with self._changed:
                    self._pending -= 1
                    self._changed.notify_all()
            elif ending:
                break
            else:
                for live in self._poll():
                    self._try(live)
        self._crew.close()
        deadline = time.monotonic() + self._finish_timeout
        for writer in self.writers:
            writer.end()
        for writer in self.writers:
            if not writer.close(max(0.0, deadline - time.monotonic())):
                self.problem(f"writer {writer.writer.name} did not finish within {self._finish_timeout:.0f} s")
        try:
            self._owner.ended()
        finally:
            self.finished.set()

    def _poll(self) -> Sequence[Job]:
        try:
            return self._owner.poll()
        except Exception as error:  # nothing that is foreseen; what is submitted is published all the same
            what = f"the store failed when its publisher looked for work: {type(error).__name__}: {error}"
            if what not in self._problems:
                self.problem(what)
            return ()

    def _try(self, job: Job) -> None:
        """Publish; what goes wrong costs this publication alone, and nobody waits for it."""
        try:
            self._publish(job)
        except Exception as error:
            self.problem(f"step {job.step} cannot be published: {type(error).__name__}: {error}")
            if job.final:
                self._owner.announced(job)

    def _publish(self, job: Job) -> None:
        self._owner.unpark(job.window)
        with self._timings.of("publish"):
            if job.parts is None:
                rows = self._rows(job.step, job.window.entries.copy())
            else:
                rows = joined(job.parts.values(), self.layers)
        window = PublishedWindow(
            run=self.config.run,
            attempt=job.attempt,
            window=job.ordinal,
            step=job.step,
            revision=job.revision,
            final=job.final,
            workers=job.workers,
            world_size=job.world_size,
            wall_time=datetime.now(UTC),
            rows=rows,
            trial=self.config.trial,
            trial_config=self.config.trial_config,
            complete=job.complete,
            shards={shard: (part.workers, part.complete) for shard, part in (job.parts or {}).items()},
        )
        if job.final:
            self.announce(rows)
            self._owner.announced(job)
        done = _Countdown(len(self.writers), partial(self._owner.written, job)) if job.final else None
        for writer in self.writers:
            writer.write(window, done)

    def _rows(self, step: int, entries: Mapping[tuple[int, int], Entry]) -> list[LayerRow]:
        """A window's rows, in the order of the layers; the widest are decomposed first, several at a time."""
        widest_first = sorted(entries, key=lambda key: (-entries[key].features, key))
        largest = max((_decomposing_bytes(entry) for entry in entries.values()), default=1)
        fitting = max(1, DECOMPOSING_BYTES // largest)
        found = self._crew.run(
            [partial(self._row, step, key, entries[key]) for key in widest_first],
            threads=min(self._own_threads, fitting) + self._others(entries),
        )
        rows = dict(zip(widest_first, found, strict=True))
        return [row for key in sorted(rows) if (row := rows[key]) is not None]

    def _others(self, entries: Mapping[tuple[int, int], Entry]) -> int:
        """How many threads may wait for layers that are decomposed elsewhere."""
        wide = [2 * entry.packed_bytes for entry in entries.values() if entry.features >= WIDE]  # here and on its way
        return min(self._elsewhere, len(wide), DECOMPOSING_BYTES // max(wide, default=1))

    def _row(self, step: int, key: tuple[int, int], entry: Entry) -> LayerRow | None:
        """The row of one layer, None where nothing is merged yet; an error costs that one alone."""
        index, phase = key
        try:
            cut = entry.freeze()
            found = cut.collect()
            if not found.n and not found.nonfinite:  # its first delta is being merged
                return None
            row = entry_row(cut, found, self.layers[index], PHASES[phase], self.config, self._compute)
        except Exception as error:
            self.problem(f"layer {self.layers[index].name}, step {step}: {type(error).__name__}: {error}")
            return None
        with self._changed:
            self._latest[key] = Latest(step, found.n, found.weight, found.mean, found.packed)
        return row

    def announce(self, rows: Sequence[LayerRow]) -> None:
        """Make a final window's metrics the latest; phases without rows keep theirs."""
        metrics = window_metrics(rows)
        phases = {row.phase for row in rows}
        with self._changed:
            kept = {key: value for key, value in self._metrics.items() if key.split("/", 2)[1] not in phases}
            self._metrics = Metrics(kept | metrics)

    def problem(self, what: str) -> None:
        """Note, and say, what could not be published."""
        log.error("run %s: %s", self.config.run, what)
        with self._changed:
            self._problems.append(what)
