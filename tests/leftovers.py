"""What a test leaves running: its stores are ended here, and what else is left is the test's fault, or the package's.

A store of a run that goes on has threads that look after it, several times a second. What a hundred tests leave of
them takes the time of those that come after.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Collection
from typing import Any

WITHIN_S = 30.0
"""How long threads may take to end that were told to."""


def running() -> set[threading.Thread]:
    """The package's threads."""
    return {thread for thread in threading.enumerate() if thread.name.startswith("delve_ray-")}


def end_stores(threads: Collection[threading.Thread]) -> None:
    """Kill the stores whose publishers or savers are among these threads, unless they are ending by themselves."""
    from delve_ray.store.publisher import Publisher
    from delve_ray.store.saving import Saver

    owners = [getattr(getattr(thread, "_target", None), "__self__", None) for thread in threads]
    stores = [owner._owner for owner in owners if isinstance(owner, Publisher)]
    stores += [owner._store for owner in owners if isinstance(owner, Saver)]
    for store in {id(store): store for store in stores}.values():
        if store.ending is None:
            kill(store)


def kill(store: Any) -> None:
    """End a store's threads as a kill ends its process: nothing more is written, and nobody hears of it."""
    store.ended = lambda: None
    store.part_state = _gone  # of a front: its shards ask for as long as it lives
    saver, publisher = store.saver, store.publisher
    if saver is not None:
        saver._save = lambda: None
        with saver._changed:
            saver._stopping = True
            saver._changed.notify_all()
    if publisher is not None:
        for writer in publisher.writers:
            with writer._changed:
                writer._ending = writer._stopping = True
                writer._changed.notify_all()
        publisher.submit([], end=True)


def _gone(*_: object) -> None:
    from delve_ray.errors import StoreError

    raise StoreError("it is gone")


def left_of(before: Collection[threading.Thread]) -> list[str]:
    """End what has begun since `before`; names of the threads that do not end."""
    left = running().difference(before)
    if left:
        end_stores(left)
    deadline = time.monotonic() + WITHIN_S
    while left and time.monotonic() < deadline:
        time.sleep(0.002)
        left = running().difference(before)
    return sorted(thread.name for thread in left)
