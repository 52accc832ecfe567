"""What a wait says that was in vain."""

from __future__ import annotations

import time
from typing import Any

import pytest

from delve_ray.errors import StoreError
from delve_ray.store.protocol import Progress
from delve_ray.waiting import wait_published
from tests.stores import source


class Stuck:
    """A shipper whose store gets no further."""

    def __init__(self, progress: Progress) -> None:
        self.source = source(0)
        self._progress = progress

    def progress(self, timeout: float) -> Progress:
        return self._progress


@pytest.mark.parametrize(
    ("progress", "why"),
    [
        (Progress(3, False, (1, 5)), r"ranks \[1, 5\] have not closed it; every rank calls add_saturations"),
        (Progress(3, False, problems=("the disk is full", "layer a")), "the disk is full; layer a$"),
        (Progress(3, False), "its store has all of it and is at work$"),
    ],
    ids=["ranks", "problems", "slow"],
)
def test_a_window_that_does_not_come_is_put_down_to_who_keeps_it(progress: Progress, why: str) -> None:
    shipper: Any = Stuck(progress)
    with pytest.raises(StoreError, match=rf"^window 3 of run 'r' is not published after 2 s: {why}"):
        wait_published(shipper, 4, time.monotonic(), 2.0)
