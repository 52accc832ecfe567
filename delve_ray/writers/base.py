"""What a writer is: three methods, called from one thread, with everything already computed."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from delve_ray.schema import PublishedWindow


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


class Writer(Protocol):
    """A destination of published windows.

    One thread calls the methods, one at a time. A writer may raise: the store reports it under the
    writer's name and goes on with the other writers. Where the destination failed (OSError, such as a full
    disk), the same call is made again until it succeeds, so writing something twice must do no harm; other
    errors are taken for faults that time does not mend, and the window is given up after a few tries.
    """

    name: str

    def write(self, window: PublishedWindow) -> None:
        """Write one revision of one window. When it returns, a reader sees all of it."""

    def write_scalars(self, scalars: list[Scalar]) -> None:
        """Write user scalars. When it returns, a reader sees all of them."""

    def close(self) -> None:
        """Flush and release; called once, after the last write."""
