"""The saver: a thread that writes the store's state to files, so that a store that is killed goes on where it was.

A snapshot is one file, whole or not there, with a checksum. The last two are kept. What workers may forget is what
both have: if the newest is damaged, the one before it and what the workers still hold make up everything.

Windows that are published and wait for a late rank are parked: each in a file of its own, out of the memory and the
snapshots.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa

from delve_ray.errors import ReadError
from delve_ray.frames import decode, encode
from delve_ray.storage import Storage
from delve_ray.store.state import Frozen, State, cut_arrays, thaw, window_entries
from delve_ray.store.window import Cut, Entry

log = logging.getLogger(__name__)

FOLDER = "store"
KEPT = 2
"""Snapshots that are kept: the newest, and the one before it."""
RETRY_S = (1.0, 60.0)
"""First and longest pause after a snapshot that could not be written."""
SHARE = 10
"""Writing snapshots takes at most one part in so many of the time, however slow the storage is."""
HURRY_S, HURRIED_SHARE = 0.2, 2
"""Pause between snapshots that somebody waits for, and their share."""
SOON_S = 1.0
"""Pause between snapshots after a window has ended."""
JOIN_S = 30.0
"""How long the last snapshot may take."""


class Saved(Protocol):
    """What a saver asks of its store."""

    def freeze(self) -> Frozen:
        """A consistent cut through the state."""

    def parkable(self) -> Sequence[tuple[Any, int, list[list[float]], list[Cut]]]:
        """Windows to park: a handle, its version, and what of its entries goes into the file."""

    def parked(self, handle: Any, version: int, name: str) -> None:
        """A window is in a file; if nothing has arrived since, its entries leave the memory."""


class _Replaced(Exception):
    """Another store has taken over the run, and this one saves nothing more."""


@dataclass(frozen=True, slots=True)
class _Snapshot:
    name: str
    version: int
    marks: dict[str, int]
    parked: frozenset[str]


def _taken(cuts: list[Cut]) -> Iterator[Cut]:
    cuts.reverse()
    while cuts:
        yield cuts.pop()


def load_window(storage: Storage, name: str) -> dict[tuple[int, int], Entry]:
    """The entries of a parked window. Raises ReadError or OSError."""
    where = f"{storage.uri}/{FOLDER}/{name}"
    header, arrays = decode(storage.read_buffer(f"{FOLDER}/{name}"), "window", where)
    try:
        return window_entries(header["entries"], iter(arrays), where)
    except (KeyError, TypeError, ValueError) as error:
        raise ReadError(f"{where} does not describe a window ({error})") from error


def save_once(storage: Storage, frozen: Frozen) -> None:
    """Write a state as the newest snapshot that a storage has. Raises OSError."""
    saver = Saver(storage, 0.0)
    number = max((int(name.split("-")[1]) + 1 for name in saver.snapshots()), default=0)
    pieces = encode("snapshot", frozen.header, cut_arrays(frozen.cuts))
    storage.write_atomic(f"{FOLDER}/snapshot-{number:06d}-{0:010d}.arrow", pieces)


def rescue_folder(run: str) -> str:
    """A folder on this machine for what a run's savefile has no room for; the run's name is in it as a hash alone."""
    return os.path.join(tempfile.gettempdir(), f"delve_ray-rescue-{hashlib.sha256(run.encode()).hexdigest()[:16]}")


class Saver:
    """Saves a store under `<savefile>/store`, every `every` seconds while something changes, and when asked.

    All methods may be called from any thread; those that take a timeout wait, the others do not.
    """

    def __init__(self, storage: Storage, every: float) -> None:
        self.storage = storage
        self.every = every
        self.saved_version = -1
        """The version of the store's state that a restarted store is sure to have."""
        self.written = 0
        self.failed = 0
        self.last_error: str | None = None
        self.damaged: list[str] = []
        self._store: Saved | None = None
        self.incarnation = 0
        """Lives of the store before this one, as far as its snapshots tell."""
        self._number = 0
        self._kept: list[_Snapshot] = []
        self._wanted = -1
        self._longest = every
        self._until = -1  # the version up to which it is that long
        self._stopping = False
        self._pause = 0.0
        self._took = 0.0
        self._last = float("-inf")
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="delve_ray-saver", daemon=True)

    # --- called by the store -------------------------------------------------------------------------------

    def load(self) -> State | None:
        """The newest state that is whole, None where there is none; damaged snapshots are set aside, by name.

        Later snapshots come after all that are there. Raises OSError when the storage cannot be read.
        """
        names = sorted(self.snapshots(), reverse=True)
        for folder in (FOLDER, "spectra", "covariances", "scalars"):  # the process before this one may have been killed
            self.storage.delete_temporaries(folder)
        self.incarnation = max((int(name.split("-")[1]) + 1 for name in names), default=0)
        for name in names:
            where = f"{self.storage.uri}/{FOLDER}/{name}"
            try:
                header, arrays = decode(self.storage.read_buffer(f"{FOLDER}/{name}"), "snapshot", where)
                return thaw(header, arrays, where)
            except ReadError as error:
                log.error("%s; it is set aside as damaged-%s, and the one before it is used", error, name)
                self.damaged.append(str(error))
                self.storage.move(f"{FOLDER}/{name}", f"{FOLDER}/damaged-{name}")
        return None

    def start(self, store: Saved) -> None:
        """Save this store from now on."""
        self._store = store
        self._thread.start()

    def notify(self, version: int) -> None:
        """The state has changed."""
        with self._changed:
            self._wanted = version
            self._changed.notify_all()

    def hurry(self) -> None:
        """Somebody waits for what has changed: save it at once."""
        self._within(HURRY_S)

    def soon(self) -> None:
        """A window has ended: save what has changed without waiting for long."""
        self._within(SOON_S)

    def _within(self, pause: float) -> None:
        with self._changed:
            self._longest, self._until = min(self._longest, pause), self._wanted
            self._changed.notify_all()

    def wait_saved(self, version: int, timeout: float) -> bool:
        """Wait until a version of the state is safe; False when it takes longer, or cannot be written."""
        failed = self.failed
        self.hurry()
        with self._changed:
            self._changed.wait_for(lambda: self.saved_version >= version or self.failed > failed, timeout)
            return self.saved_version >= version

    def durable(self, source: str) -> int:
        """A restarted store is sure to have every delta of a source before this one."""
        with self._changed:
            return self._kept[-KEPT].marks.get(source, 0) if len(self._kept) >= KEPT else 0

    def stop(self) -> None:
        """Save the last state once, if there is any, and end the thread; the snapshots before it go."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join(JOIN_S)

    def status(self) -> dict[str, Any]:
        """Counts and the last error, for people."""
        with self._changed:
            return {
                "written": self.written,
                "failed": self.failed,
                "seconds": self._took,
                "pending": self._wanted > self.saved_version,
                "last_error": self.last_error,
                "damaged": list(self.damaged),
            }

    def problems(self) -> list[str]:
        """What is wrong with the snapshots, in words."""
        with self._changed:
            found = [] if self.last_error is None else [f"snapshots cannot be written: {self.last_error}"]
            return found + self.damaged

    # --- the thread ----------------------------------------------------------------------------------------

    def _due_in(self) -> float:
        """Seconds until the next snapshot; infinite when there is nothing to save."""
        if self._until <= self.saved_version:  # and what came later can wait, however busy the run is
            self._longest = self.every
        if self._wanted <= self.saved_version:
            return float("inf")
        share = HURRIED_SHARE if self._longest <= HURRY_S else SHARE
        pause = self._pause or max(self._longest, share * self._took)
        return max(0.0, self._last + pause - time.monotonic())

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._stopping and (due := self._due_in()) > 0:
                    self._changed.wait(None if due == float("inf") else due)
                stopping = self._stopping
                if stopping and self._wanted < 0:
                    return
            try:
                began = time.monotonic()
                self._save()
                with self._changed:
                    self.written += 1
                    self._pause, self.last_error = 0.0, None
                    self._took = time.monotonic() - began
            except Exception as error:  # whatever the storage raises: the state is still there, and is saved later
                self._fail(error)
                stopping = stopping or isinstance(error, _Replaced)
            with self._changed:
                self._last = time.monotonic()
                self._changed.notify_all()
            if stopping:
                return

    def _fail(self, error: Exception) -> None:
        with self._changed:
            self.failed += 1
            self._pause = min(max(2 * self._pause, RETRY_S[0]), RETRY_S[1])
            self.last_error = f"{type(error).__name__}: {error}"
            pause = self._pause
        if isinstance(error, _Replaced):
            log.error("%s: %s; this one saves nothing more", self.storage.uri, error)
            return
        expected = isinstance(error, OSError | pa.ArrowException)
        log.error(
            "%s: the store's state cannot be saved (%s); workers keep what is not saved; trying again in %.0f s",
            self.storage.uri,
            self.last_error,
            pause,
            exc_info=None if expected else error,
        )

    def _save(self) -> None:
        assert self._store is not None
        self._check_alone()
        for handle, version, index, cuts in self._store.parkable():
            name = f"window-{uuid.uuid4().hex}.arrow"
            self._put(name, "window", {"entries": index}, cuts)
            self._store.parked(handle, version, name)
        frozen = self._store.freeze()
        name = f"snapshot-{self.incarnation:06d}-{self._number:010d}.arrow"
        self._put(name, "snapshot", frozen.header, frozen.cuts)
        self._number += 1
        with self._changed:
            self._kept = [*self._kept[1 - KEPT :], _Snapshot(name, frozen.version, frozen.marks, frozen.parked)]
            if len(self._kept) >= KEPT:
                self.saved_version = self._kept[-KEPT].version
            kept = self._kept[-1:] if self._stopping else self._kept
        if len(kept) == KEPT or self._stopping:
            self._clean(kept)

    def _put(self, name: str, kind: str, header: dict[str, Any], cuts: list[Cut]) -> None:
        """Write a frame. The cuts are taken out of their list, so that what was merged anew is freed layer by layer."""
        self.storage.write_atomic(f"{FOLDER}/{name}", encode(kind, header, cut_arrays(_taken(cuts))))

    def _check_alone(self) -> None:
        """Give way to a store that was started later: Ray has restarted this one's actor elsewhere."""
        newest = max(self.snapshots(), default="")
        if newest and int(newest.split("-")[1]) > self.incarnation:
            raise _Replaced(f"a later store of this run has written {newest}")

    def snapshots(self) -> list[str]:
        """Names of the snapshots that are there."""
        names = [name.rpartition("/")[2] for name in self.storage.list_files(FOLDER, ".arrow")]
        return [name for name in names if name.startswith("snapshot-") and name.count("-") == 2]

    def _clean(self, kept: Sequence[_Snapshot]) -> None:
        """Delete snapshots and parked windows that nothing refers to any more."""
        needed = {snapshot.name for snapshot in kept}.union(*(snapshot.parked for snapshot in kept))
        for path in self.storage.list_files(FOLDER, ".arrow"):
            name = path.rpartition("/")[2]
            if name not in needed and name.startswith(("snapshot-", "window-")):
                self.storage.delete(path)
