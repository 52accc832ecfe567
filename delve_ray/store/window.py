"""A window in the store: what has arrived for it, who has closed it, and what of it is published."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from delve_ray.moments import F64, PackedTotal
from delve_ray.reservoir import Reservoir, merge
from delve_ray.schema import LayerRow, PublishedWindow
from delve_ray.sketch import columns_of, new_total, packed_size


@dataclass(frozen=True, slots=True)
class Collected:
    """Moments that nobody changes any more: observations, non-finite rows, mean, packed scatter, total weight.

    The scatter of a wide layer is a sketch, see `sketch`: its length tells.
    """

    n: int
    nonfinite: int
    mean: F64
    packed: F64
    weight: float

    @property
    def columns(self) -> int:
        """Columns of the sketch, 0 of a whole scatter. Raises ValueError for a length that is neither's."""
        found = columns_of(self.packed.size, self.mean.size)
        if found is None:
            raise ValueError(f"{self.packed.size} values are no packed scatter of {self.mean.size} features")
        return found


class Entry:
    """The merged moments of one layer in one phase of a window.

    Deltas go into an active total. `freeze` sets it aside, which takes no time whatever its size, and the next delta
    begins a new one; a cut merges what was set aside, outside of the lock that deltas need. So whoever publishes or
    saves holds up nobody, and what it holds never changes. Memory: 4d² bytes, and 4d² more while there is an active
    total beside what was set aside; of a layer that is sketched with k `columns`, 8d(k+1).

    `reservoir` is a sample of the same rows, where one is asked for. `row` is the publisher's: the last row, and the
    triangle that it was made of.
    """

    __slots__ = (
        "_active",
        "_collecting",
        "_frozen",
        "_lock",
        "_merging",
        "columns",
        "features",
        "n",
        "nonfinite",
        "reservoir",
        "row",
    )

    def __init__(
        self,
        features: int,
        collected: Collected | None = None,
        reservoir: Reservoir | None = None,
        columns: int = 0,
    ) -> None:
        self.features = features
        self.columns = columns if collected is None else collected.columns
        self.reservoir = reservoir
        self.n = 0
        self.nonfinite = 0
        self.row: tuple[F64, LayerRow] | None = None
        self._active: tuple[PackedTotal, int] | None = None
        self._frozen: list[tuple[PackedTotal, int]] = []
        self._lock = threading.Lock()  # never held while anything is merged
        self._merging = threading.Lock()
        self._collecting = threading.Lock()
        if collected is not None:
            self.reserve()
            self.add(collected.n, collected.nonfinite, collected.mean, collected.packed, collected.weight)

    @property
    def nbytes(self) -> int:
        """Bytes of the totals."""
        with self._lock:
            totals = len(self._frozen) + (self._active is not None)
        sample = 0 if self.reservoir is None else self.reservoir.nbytes
        return self.packed_bytes * totals + sample

    @property
    def packed_bytes(self) -> int:
        """Bytes of one packed scatter."""
        return 8 * packed_size(self.features, self.columns)

    def reserve(self) -> None:
        """Take the memory that `add` will need. Raises MemoryError, and then nothing has changed."""
        with self._lock:
            if self._active is None:
                self._active = new_total(self.features, self.columns), 0

    def add(self, n: int, nonfinite: int, mean: F64, packed: F64, weight: float) -> None:
        """Merge a delta's moments; `weight` is that of its n observations together."""
        with self._merging:
            with self._lock:
                total, before = self._active or (new_total(self.features, self.columns), 0)
            total.add(n, mean, packed, weight)
            with self._lock:
                self._active = total, before + nonfinite
                self.n += n
                self.nonfinite += nonfinite

    def sample(self, reservoir: Reservoir, size: int) -> None:
        """Merge a delta's sample of rows, of which `size` stay; before its moments, so that no cut has those alone."""
        with self._merging:
            parts = [reservoir] if self.reservoir is None else [self.reservoir, reservoir]
            self.reservoir = merge(parts, size)

    def freeze(self) -> Cut:
        """Set aside what has arrived so far, and say what that is; waits for a delta that is being merged."""
        with self._merging, self._lock:
            if self._active is not None:
                self._frozen.append(self._active)
                self._active = None
            return Cut(self, tuple(self._frozen), self.reservoir)

    def collect(self, parts: tuple[tuple[PackedTotal, int], ...]) -> Collected:
        """Merge what a cut has; nothing ever changes the result."""
        with self._collecting:
            if not parts:
                return Collected(0, 0, np.zeros(self.features), np.zeros(self.packed_bytes // 8), 0.0)
            total, nonfinite = parts[0]
            total.result()  # folds; from now on nothing writes into this total
            if len(parts) > 1:
                total = total.copy()
                for other, more in parts[1:]:
                    total.add(*other.result(), other.weight)
                    nonfinite += more
                total.result()
                with self._lock:
                    if tuple(self._frozen[: len(parts)]) == parts:
                        self._frozen[: len(parts)] = [(total, nonfinite)]
            n, mean, packed = total.result()
            return Collected(n, nonfinite, mean, packed, total.weight)


@dataclass(frozen=True, slots=True)
class Cut:
    """What an entry had at one instant, whatever arrives later."""

    entry: Entry
    parts: tuple[tuple[PackedTotal, int], ...]
    reservoir: Reservoir | None = None

    @property
    def n(self) -> int:
        """Observations."""
        return sum(total.n for total, _ in self.parts)

    @property
    def weight(self) -> float:
        """Total weight of the observations."""
        return sum((total.weight for total, _ in self.parts), 0.0)

    @property
    def nonfinite(self) -> int:
        """Non-finite rows."""
        return sum(nonfinite for _, nonfinite in self.parts)

    def collect(self) -> Collected:
        """The moments."""
        return self.entry.collect(self.parts)


@dataclass(frozen=True, slots=True)
class Job:
    """One publication of a window, as the publisher gets it."""

    attempt: int
    ordinal: int
    step: int
    revision: int
    final: bool
    workers: int
    world_size: int
    window: Window
    complete: bool = False
    parts: Mapping[int, PublishedWindow] | None = None
    """What shards have published of it, in place of the window's own entries."""


@dataclass(slots=True)
class Window:
    """The window with ordinal `ordinal` of an attempt; `step` is its label, a guess until a rank closes it.

    Attributes:
        closed: ranks that have sent all that they have of it.
        broken: ranks that have lost rows of it.
        first_closed: when the first rank closed it, by the monotonic clock.
        changed: whether something has arrived since the last publication.
        published: whether it has been published as final.
        unwritten: final publications that not all writers have written.
        parked: name of the file that holds its entries while they are not in memory.
        version: rises with everything that arrives.
        awaits: a rank that had not closed it when somebody looked, see `Attempt.is_awaited`.
    """

    ordinal: int
    step: int
    labelled: bool = False
    entries: dict[tuple[int, int], Entry] = field(default_factory=dict)
    closed: set[int] = field(default_factory=set)
    broken: set[int] = field(default_factory=set)
    first_closed: float | None = None
    revision: int = 0
    changed: bool = False
    published: bool = False
    unwritten: int = 0
    parked: str | None = None
    version: int = 0
    awaits: int | None = None

    def entry(self, layer: int, phase: int, features: int) -> Entry:
        """The entry of a layer and phase, made when it is first needed."""
        found = self.entries.get((layer, phase))
        if found is None:
            found = self.entries[layer, phase] = Entry(features)
        return found

    def touch(self) -> None:
        """Note that something has arrived."""
        self.changed = True
        self.version += 1

    def job(self, attempt: int, world_size: int, left: set[int], *, final: bool) -> Job:
        """The next publication of this window; the ranks in `left` have closed every window."""
        closed = self.closed | left
        workers, complete = len(closed - self.broken), len(closed) >= world_size
        job = Job(attempt, self.ordinal, self.step, self.revision, final, workers, world_size, self, complete)
        self.revision += 1
        self.changed = False
        if final:
            self.published = True
            self.unwritten += 1
        return job
