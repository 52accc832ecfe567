"""Work shared by a few threads: numpy and LAPACK release the GIL, so that parts of one job run side by side."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


class Crew:
    """Up to `threads` threads, the caller's among them; the others are started when they are first needed.

    Example:
        >>> Crew(2).run([lambda: "a", lambda: "b", lambda: "c"])
        ['a', 'b', 'c']
    """

    def __init__(self, threads: int, name: str = "delve_ray-crew") -> None:
        self.threads = max(1, threads)
        self._pool = ThreadPoolExecutor(self.threads - 1, thread_name_prefix=name) if self.threads > 1 else None

    def run(self, tasks: Sequence[Callable[[], T]], threads: int | None = None) -> list[T]:
        """Run all tasks, begun in the order given, and return their results in that order; on `threads` at most.

        When one raises, no further one is begun, and the first error is raised once those under way have ended.
        """
        results: dict[int, T] = {}
        waiting = deque(enumerate(tasks))

        def work() -> None:
            try:
                while True:
                    try:
                        index, task = waiting.popleft()
                    except IndexError:
                        return
                    results[index] = task()
            except BaseException:
                waiting.clear()
                raise

        helpers: list[Future[None]] = []
        wanted = min(self.threads if threads is None else threads, self.threads, len(tasks)) - 1
        if self._pool is not None:
            with contextlib.suppress(RuntimeError):  # the interpreter ends, and starts no more threads
                helpers += [self._pool.submit(work) for _ in range(wanted)]
        try:
            work()
        finally:
            for helper in helpers:
                if not helper.cancel():
                    helper.exception()  # waits
        for helper in helpers:
            if not helper.cancelled():
                helper.result()
        return [results[index] for index in range(len(tasks))]

    def close(self) -> None:
        """End the threads, those at work once they have ended it; nothing is run from now on."""
        if self._pool is not None:
            self._pool.shutdown(wait=False)
