"""What a writer's queue holds, how large it is, and which of its failures may pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import pyarrow as pa

from delve_ray.schema import LayerRow

Done = Callable[[bool], None]
"""What is called once something is written (True) or given up (False)."""

ROW_BYTES = 1024
"""What a row is taken to need beside its arrays, and what one user scalar is."""


@dataclass(slots=True, eq=False)
class Item:
    """What is queued: a window, named by `key` (attempt, window), or a list of user scalars."""

    job: Callable[[], None]
    step: int
    nbytes: int
    done: list[Done]
    key: tuple[int, int] | None = None
    revision: int = 0
    live: bool = False
    faults: int = 0
    failing_since: float | None = None
    settled: bool = False

    def __str__(self) -> str:
        return f"step {self.step}" if self.key else f"scalars from step {self.step} on"

    def become(self, newer: Item) -> None:
        """Take the place of an older revision; who waits for that one waits for this one."""
        self.job, self.step, self.nbytes = newer.job, newer.step, newer.nbytes
        self.revision, self.live = newer.revision, newer.live
        self.done += newer.done

    def release(self) -> None:
        """Let go of the rows."""
        self.job, self.nbytes = (lambda: None), 0


def may_pass(error: Exception) -> bool:
    """Whether an error is the destination's, which may come back, and not a fault of the writer or the rows.

    Arrow's errors about values (ArrowInvalid, ArrowTypeError, ...) are Python's ValueError, TypeError, ... as well.
    """
    faults = (ValueError, TypeError, LookupError, NotImplementedError)
    return isinstance(error, (OSError, pa.ArrowException)) and not isinstance(error, faults)


def row_bytes(row: LayerRow) -> int:
    """What a row is taken to need in memory."""
    arrays = (row.eigenvalues, row.mean, row.covariance, row.embedding)
    return ROW_BYTES + sum(array.nbytes for array in arrays if array is not None)


def count_items(keys: Iterable[tuple[int, int] | None]) -> str:
    """Items in words, by their keys: "3 windows and 1 scalar list"."""
    counts = Counter("scalar list" if key is None else "window" for key in keys)
    return " and ".join(f"{count} {noun}{'s' * (count > 1)}" for noun, count in sorted(counts.items(), reverse=True))
