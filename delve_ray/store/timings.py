"""How long the store's parts take, noted where it happens and picked up by whoever publishes it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

MOST = 4096
"""Durations that wait to be picked up; of more, the oldest go."""

Duration = tuple[str, str, float]
"""What took its time, whose (such as a writer's name, or nothing), and the seconds."""


class Timings:
    """Durations since the last `drain`; may be used from any thread.

    >>> timings = Timings()
    >>> timings.note("merge", 0.25)
    >>> timings.drain(), timings.drain()
    ([('merge', '', 0.25)], [])
    """

    def __init__(self) -> None:
        self._noted: deque[Duration] = deque(maxlen=MOST)

    def note(self, what: str, seconds: float, whose: str = "") -> None:
        """Note a duration."""
        self._noted.append((what, whose, seconds))  # atomic, and never more than MOST

    @contextmanager
    def of(self, what: str, whose: str = "") -> Iterator[None]:
        """Note how long the block takes, if it does not raise."""
        began = time.perf_counter()
        yield
        self.note(what, time.perf_counter() - began, whose)

    def drain(self) -> list[Duration]:
        """What was noted since the last call."""
        found = []
        while self._noted:
            found.append(self._noted.popleft())
        return found
