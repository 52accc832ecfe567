"""What a store answers to people and tools: covariances, spectra, progress, status."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from delve_ray.schema import PHASES
from delve_ray.storage import masked
from delve_ray.store.publisher import Latest

if TYPE_CHECKING:
    from delve_ray.store.attempt import Attempt
    from delve_ray.store.core import CovarianceStore

MOST_WINDOWS = 16
"""Open windows of which a status tells more than the number, the oldest ones."""


def find_latest(store: CovarianceStore, layer: str, phase: str) -> Latest:
    """The last published moments of a layer in a phase. Raises KeyError."""
    publisher = store.running()
    names = [info.name for info in store.layers]
    if layer not in names:
        raise KeyError(f"run {store.config.run!r} has no layer {layer!r}; its layers: {', '.join(names)}")
    if phase not in PHASES:
        raise KeyError(f"phase {phase!r} is none of {PHASES}")
    latest = publisher.latest(names.index(layer), PHASES.index(phase))
    if latest is None:
        raise KeyError(f"nothing of layer {layer!r} in phase {phase!r} has been published yet")
    return latest


def problems(store: CovarianceStore) -> list[str]:
    """What is wrong now or was lost, in words."""
    found = [] if store.publisher is None else store.publisher.problems()
    return found + ([] if store.saver is None else store.saver.problems())


def status(store: CovarianceStore) -> dict[str, Any]:
    """Ranks, windows, memory and writers; called with the store's lock held."""
    now = time.monotonic()
    current = store.attempts[-1] if store.attempts else None
    windows = [window for attempt in store.attempts for window in attempt.windows.values()]
    state: dict[str, Any] = {
        "run": store.config.run,
        "savefile": masked(store.config.savefile),
        "attempt": -1 if current is None else current.number,
        "world_size": store.config.world_size if current is None else current.world_size,
        "ranks": {},
        "open_windows": [],
        "windows": [],
        "waiting_windows": sum(window.published for window in windows),
        "parked_windows": sum(window.parked is not None for window in windows),
        **{name: count for name, count in store.counts.items() if name != "bytes"},
        "bytes_in": store.counts["bytes"],
        "bytes": sum(entry.nbytes for window in windows for entry in window.entries.values()),
        "problems": problems(store),
        "ending": store.ending,
    }
    if current is not None:
        state["open_windows"] = sorted(ordinal for ordinal, w in current.windows.items() if not w.published)
        state["published"] = current.published
        state["windows"] = _open_windows(current, now)
        first = max((member.next_window for member in current.members.values() if not member.left), default=0)
        for rank, member in sorted(current.members.items()):
            state["ranks"][rank] = {
                "deltas": member.next_seq,
                "window": member.next_window,
                "lag": 0 if member.left else first - member.next_window,
                "silent_s": now - member.heard,
                "left": member.left,
                "host": member.source.host,
                "pid": member.source.pid,
                "outbox": member.outbox,
            }
            if store.saver is not None:
                state["ranks"][rank]["durable"] = store.saver.durable(member.source.source)
    if store.saver is not None:
        state["snapshots"] = store.saver.status()
    if store.publisher is not None:
        state["bytes"] += store.publisher.latest_bytes()
        state["writers"] = [writer.status() for writer in store.publisher.writers]
        state["finished"] = store.publisher.finished.is_set()
    return state


def _open_windows(attempt: Attempt, now: float) -> list[dict[str, Any]]:
    """The oldest open windows: who has not closed each, and how long it waits since the first rank has."""
    open_windows = [(ordinal, window) for ordinal, window in sorted(attempt.windows.items()) if not window.published]
    return [
        {
            "window": ordinal,
            "step": window.step,
            "missing": list(attempt.missing(ordinal)),
            "waits_s": 0.0 if window.first_closed is None else now - window.first_closed,
        }
        for ordinal, window in open_windows[:MOST_WINDOWS]
    ]
