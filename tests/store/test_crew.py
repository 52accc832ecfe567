"""Work shared by threads: all of it, in order, and side by side."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial

import pytest

from delve_ray.store.crew import Crew


@pytest.mark.parametrize("threads", [0, 1, 2, 5])
@pytest.mark.parametrize("count", [0, 1, 2, 40])
def test_results_come_in_the_order_of_the_tasks(threads: int, count: int) -> None:
    crew = Crew(threads)
    for _ in range(3):
        assert crew.run([partial(pow, 2, k) for k in range(count)]) == [2**k for k in range(count)]


def test_tasks_run_side_by_side() -> None:
    met = threading.Barrier(3, timeout=20)
    assert sorted(Crew(3).run([met.wait] * 3)) == [0, 1, 2], "each waits for the others"


@pytest.mark.parametrize(("crew", "most"), [(Crew(1), None), (Crew(4), 1), (Crew(4), 0)])
def test_one_thread_is_the_callers(crew: Crew, most: int | None) -> None:
    begun: list[tuple[int, threading.Thread]] = []
    crew.run([partial(lambda k: begun.append((k, threading.current_thread())), k) for k in range(9)], most)
    assert begun == [(k, threading.current_thread()) for k in range(9)]


def test_an_error_is_raised_once_what_is_under_way_has_ended() -> None:
    failed, ended = threading.Event(), threading.Event()

    def fail() -> None:
        failed.set()
        raise ValueError("seven")

    def last() -> None:
        assert failed.wait(60)
        ended.set()

    begun: list[int] = []
    later: list[Callable[[], None]] = [partial(begun.append, k) for k in range(20)]
    crew = Crew(2)
    with pytest.raises(ValueError, match="seven"):
        crew.run([last, fail])
    assert ended.is_set()
    with pytest.raises(ValueError, match="seven"):
        Crew(1).run([fail, *later])
    assert begun == []
    assert crew.run([lambda: 1, lambda: 2]) == [1, 2], "it goes on"


def test_where_no_thread_can_be_started_the_caller_does_it_all() -> None:
    crew = Crew(3)
    assert crew._pool is not None
    crew._pool.shutdown()  # as the interpreter does when it ends
    assert crew.run([partial(pow, 3, k) for k in range(5)]) == [1, 3, 9, 27, 81]
