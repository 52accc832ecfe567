"""What a writer is: four methods, called from one thread, with everything already computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Protocol, runtime_checkable

from delve_ray.schema import PublishedWindow
from delve_ray.storage import Storage


@dataclass(frozen=True, slots=True)
class Scalar:
    """One value that the user recorded beside the spectra, with `SaturationTracker.add_scalar`."""

    run: str
    attempt: int
    rank: int
    name: str
    step: int
    value: float
    wall_time: datetime
    trial: str | None = None


@dataclass(frozen=True, slots=True)
class WriterRun:
    """What a writer is told of the run that it writes.

    Attributes:
        run: the run's name.
        storage: the run's directory; a writer's own files lie in a folder of the writer's name.
        trial: id of the Ray Tune trial that the run is, and `trial_config` the trial's config; None elsewhere.
        model: numbers about the model, such as `num_parameters`.
    """

    run: str
    storage: Storage
    trial: str | None = None
    trial_config: Mapping[str, Any] | None = None
    model: Mapping[str, int] = field(default_factory=dict)


def remembered(run: WriterRun, writer: str) -> str | None:
    """What `remember` noted for a writer of this run, in this process or an earlier one."""
    try:
        return run.storage.read_bytes(f"writers/{writer}").decode()
    except (OSError, UnicodeDecodeError):
        return None


def remember(run: WriterRun, writer: str, number: str) -> None:
    """Note, in the run's directory, the number under which a service knows the run, for a store that is restarted."""
    run.storage.write_atomic(f"writers/{writer}", number.encode())


@runtime_checkable
class Writer(Protocol):
    """A destination of published windows. Any object that has this is one; nothing has to be inherited.

    It is made by the user, or by its name from the options in `writer_args`, and must then be picklable: it is used in
    the process of the store, elsewhere. There one thread calls its methods, one at a time. A writer may raise: the
    store reports it under the writer's name and goes on with the other writers. Where the destination failed (OSError,
    such as a full disk), the same call is made again until it succeeds, so writing something twice must do no harm;
    other errors are taken for faults that time does not mend, and the window is given up after a few tries. What
    `open` raises refuses the run.

    Example:
        >>> class Lowest:
        ...     name = "lowest"
        ...     def open(self, run): self.run = run.run
        ...     def write(self, window):
        ...         row = min(window.rows, key=lambda row: row.stats["saturation"])
        ...         print(f"{self.run}, step {window.step}: {row.layer} has {row.stats['saturation']:.0%}")
        ...     def write_scalars(self, scalars): pass
        ...     def close(self): pass
        >>> isinstance(Lowest(), Writer)
        True
    """

    name: str

    def open(self, run: WriterRun) -> None:
        """Prepare for a run; called once, before all else, in the store's process. A restarted store calls it anew."""

    def write(self, window: PublishedWindow) -> None:
        """Write one revision of one window. When it returns, a reader sees all of it.

        `window.final` is False for what is published while the window is open. A final window may come again with a
        higher revision, corrected by what came late.
        """

    def write_scalars(self, scalars: list[Scalar]) -> None:
        """Write user scalars. When it returns, a reader sees all of them."""

    def close(self) -> None:
        """Flush and release; called once, after the last write."""
