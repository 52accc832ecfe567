"""An attempt of a run: its ranks, what the store has of each, and its windows. Bookkeeping only; no locks, no moments.

A source numbers its deltas. The store takes them in any order and each once, so it knows for every source the first
number that it does not have (`next_seq`) and the ones that it has beyond. A rank has closed a window when the delta
that says so and all before it are there.
"""

from __future__ import annotations

import itertools
import random
import threading
import time
from dataclasses import dataclass, field

from delve_ray.errors import DeltaRefused
from delve_ray.store.door import refusal
from delve_ray.store.processes import started
from delve_ray.store.protocol import MOST_MISSING, Delta, Source
from delve_ray.store.window import Window

AHEAD = 1024
"""How far beyond the first delta that is missing the store takes deltas of a source; others are to come later."""
_CHOICE = random.Random(0)  # of its own: the global generator is the training's


@dataclass(slots=True)
class Member:
    """A registered source and what the store has of it.

    Attributes:
        next_seq: the first delta that is not merged.
        above: merged ones beyond that.
        closing: of those, the ones that close a window, with its ordinal.
        next_window: the first window that this rank has not closed.
        gap: a window to which this source came when the store had already lost or missed a part of it.
        changed: version of the store's state at the last change of this member.
        left: whether it has completed, so that nothing waits for it.
        outbox: what waits at the source, by its own account.
        started: when its process was started, where this machine can see it.
        told: how many windows were published when an answer to it last brought the metrics; -1 before the first.
    """

    source: Source
    next_seq: int = 0
    above: set[int] = field(default_factory=set)
    closing: dict[int, int] = field(default_factory=dict)
    next_window: int = 0
    gap: int | None = None
    changed: int = 0
    left: bool = False
    heard: float = field(default_factory=time.monotonic)
    outbox: dict[str, int] = field(default_factory=dict)
    started: str | None = None
    told: int = -1
    # Held while a delta of this source is taken: repeated deliveries of one delta wait for the first.
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def gone(self) -> bool:
        """Whether its process was to be seen from here, and is not any more."""
        return self.started is not None and started(self.source) != self.started

    def has(self, seq: int) -> bool:
        """Whether a delta is merged."""
        return seq < self.next_seq or seq in self.above

    def check_window(self, delta: Delta) -> None:
        """Turn away a delta whose window does not fit its number. Raises DeltaRefused."""
        first, last = self.next_window, self.next_window + delta.seq - self.next_seq
        for seq, window in self.closing.items():
            first = max(first, window + 1) if seq < delta.seq else first
            last = min(last, window) if seq > delta.seq else last
        if not first <= delta.window <= last:
            which = f"window {first} is open" if first == last else f"its windows {first} to {last} may be open"
            raise refusal(delta, f"it is of window {delta.window} while {which}")

    def merged(self, delta: Delta) -> list[int]:
        """Note that a delta is merged; the windows that this rank has thereby closed."""
        self.above.add(delta.seq)
        if delta.closes:
            self.closing[delta.seq] = delta.window
        closed = []
        while self.next_seq in self.above:
            self.above.remove(self.next_seq)
            window = self.closing.pop(self.next_seq, None)
            if window is not None:
                closed.append(window)
                self.next_window = window + 1
            self.next_seq += 1
        return closed


@dataclass(slots=True)
class Attempt:
    """One attempt of a run: the workers that were started together share its `token`.

    Attributes:
        first_step: the step from which it replays: the label of the first window that a rank closed.
        published: windows before this one have been published as final.
        widths: features of layers whose first forward tells, by index.
        left: ranks that have completed: they have closed every window.
        waiting: ranks that have asked to leave and will ask again.
    """

    number: int
    token: str
    world_size: int
    first_step: int | None = None
    published: int = 0
    members: dict[int, Member] = field(default_factory=dict)
    windows: dict[int, Window] = field(default_factory=dict)
    widths: dict[int, int] = field(default_factory=dict)
    left: set[int] = field(default_factory=set)
    waiting: set[int] = field(default_factory=set)
    began: float = field(default_factory=time.monotonic)

    def admit(self, member: Member) -> None:
        """Make a source the member of its rank, in place of one that was."""
        rank = member.source.rank
        self.members[rank] = member
        self.waiting.discard(rank)
        if member.left:
            self.left.add(rank)
        else:
            self.left.discard(rank)

    def leave(self, member: Member) -> None:
        """Note that a member has completed."""
        member.left = True
        self.left.add(member.source.rank)

    @property
    def ranks(self) -> set[int]:
        """All ranks, registered or not."""
        return set(range(self.world_size))

    def heard(self, rank: int) -> float:
        """When a rank was last heard of, by the monotonic clock; one that never came, when the attempt began."""
        member = self.members.get(rank)
        return self.began if member is None else member.heard

    def awaited(self, window: Window, silent_before: float) -> set[int]:
        """Ranks that have not closed a window and may still; those not heard of since `silent_before` will not."""
        open_ranks = self.ranks - window.closed - self.left
        return {rank for rank in open_ranks if self.heard(rank) >= silent_before}

    def is_awaited(self, window: Window, silent_before: float) -> bool:
        """Whether `awaited` is not empty, at a cost that does not grow with the ranks.

        One that is awaited answers until it has closed the window. It was chosen at random, so that in whatever order
        n ranks close, the set is made about log n times, and not n times.
        """
        rank = window.awaits
        if rank is not None and rank not in window.closed and rank not in self.left:
            if self.heard(rank) >= silent_before:
                return True
        elif len(window.closed) >= self.world_size:
            return False
        found = self.awaited(window, silent_before)
        window.awaits = _CHOICE.choice(tuple(found)) if found else None
        return bool(found)

    def missing(self, ordinal: int) -> tuple[int, ...]:
        """Ranks that have not closed a window, whether they may still or not."""
        window = self.windows.get(ordinal)
        return tuple(sorted(self.ranks - self.left - (window.closed if window else set())))

    def first_missing(self, ordinal: int, most: int = MOST_MISSING + 1) -> tuple[int, ...]:
        """The first of `missing`: of a window that has just begun, no more than these are looked at."""
        window = self.windows.get(ordinal)
        closed = window.closed if window else ()
        there = (rank for rank in range(self.world_size) if rank not in closed and rank not in self.left)
        return tuple(itertools.islice(there, most))

    def window(self, delta: Delta) -> Window | None:
        """The window that a delta belongs to, made if it is new; None if it is settled, and nobody waits for it.

        The first rank to close a window sets its step. Raises DeltaRefused for another step than that.
        """
        rank = delta.source.rank
        window = self.windows.get(delta.window)
        if window is None:
            if delta.window < self.published:
                return None
            window = Window(delta.window, delta.step)
        elif delta.labelled and window.labelled and window.step != delta.step:
            raise refusal(
                delta,
                f"rank {rank} closes window {window.ordinal} as step {delta.step}, ranks {sorted(window.closed)} as "
                f"step {window.step}; call add_saturations(step) with the same steps in every worker",
            )
        return window

    def note(self, delta: Delta, member: Member, window: Window | None, now: float) -> None:
        """Note that a delta is merged into a window, or left out where there is none."""
        rank = delta.source.rank
        if window is not None:
            if delta.labelled or not window.labelled:
                window.step, window.labelled = delta.step, delta.labelled
            if not delta.complete or member.gap == delta.window:
                window.broken.add(rank)
            if delta.entries:
                window.touch()
        for ordinal in member.merged(delta):
            closed = self.windows.get(ordinal)
            if closed is not None:
                closed.closed.add(rank)
                closed.touch()
                closed.first_closed = now if closed.first_closed is None else closed.first_closed
                if closed.labelled and self.first_step is None:
                    self.first_step = closed.step


def check_late(delta: Delta, attempt: Attempt, current: Attempt) -> bool:
    """Whether a delta of the attempt before may be taken now; False says that it is too early to tell.

    The current attempt replaces the windows from its first step on; what belongs to one before it still counts, if
    another rank had closed it. Raises DeltaRefused.
    """
    if current.first_step is None:
        return False
    window = attempt.windows.get(delta.window)
    if window is None or not window.labelled or window.step >= current.first_step:
        raise DeltaRefused(
            f"delta {delta.seq} of rank {delta.source.rank} (run {delta.source.run!r}, pid {delta.source.pid} on "
            f"{delta.source.host}) is refused: it belongs to attempt {attempt.number}, and attempt {current.number} "
            f"replays from step {current.first_step}"
        )
    return True
