"""The state of a run's store, and what of it goes into files: snapshots, parked windows, a rescue.

All state is under one lock that is never held while merging, packing, decomposing, writing or reading files.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Sequence

import pyarrow as pa

from delve_ray.errors import OptionError, ReadError, StoreError
from delve_ray.storage import Storage, masked
from delve_ray.store.attempt import Attempt, Member
from delve_ray.store.protocol import LayerInfo, StoreConfig
from delve_ray.store.publisher import Publisher
from delve_ray.store.publishing import Compute, layer_row
from delve_ray.store.run_file import RunFile
from delve_ray.store.saving import FOLDER, Saver, load_window, rescue_folder, save_once
from delve_ray.store.state import Frozen, State, freeze, freeze_window
from delve_ray.store.timings import Timings
from delve_ray.store.window import Cut, Window
from delve_ray.writers.base import Scalar, Writer

log = logging.getLogger(__name__)

FINISH_TIMEOUT_S = 60.0
"""How long the writers may take to write what is queued when the run ends."""


class SavedStore:
    """The state of a run's store. `WindowStore` adds what becomes of windows, `IntakeStore` the deltas.

    `cores` is how many cores it may use. In the process of a training loop that is one: the others are the loop's.
    `compute` turns moments into rows, and may have up to `elsewhere` of them done by others.
    """

    def __init__(
        self,
        config: StoreConfig,
        *,
        writers: Sequence[Writer] | None = None,
        saver: Saver | None = None,
        finish_timeout: float = FINISH_TIMEOUT_S,
        cores: int = 1,
        compute: Compute = layer_row,
        elsewhere: int = 0,
    ) -> None:
        self.config = config
        self._compute, self._elsewhere, self._cores = compute, elsewhere, cores
        self.layers: list[LayerInfo] = []
        self.attempts: list[Attempt] = []  # the current one last, and the one before it
        self.tokens: list[str | None] = []  # of all attempts, by number; None of one that nobody knows
        self.publisher: Publisher | None = None
        self.saver = saver
        self.counts = {"deltas": 0, "bytes": 0, "refused": 0, "late": 0, "repeated": 0}
        self.counts |= {"bundles": 0, "bundled": 0}  # of the deltas, those that came merged with each other
        self.timings = Timings()
        self.ending: str | None = None  # why
        self.abandoned = False  # whether no worker is left that could ask for anything
        self._given_writers = writers
        self._finish_timeout = finish_timeout
        self._run_file: RunFile | None = None
        self._on_disk: dict[tuple[int, int], int] = {}  # revisions that were there before this store
        self._scalars: dict[tuple[str, int], tuple[Scalar, ...]] = {}  # not written yet, by source and sequence number
        self._version = self._merging = 0
        self._freezing = False
        self._opening = False  # the writers, for the first worker
        self._next_live = time.monotonic() + config.publish_every
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        if saver is not None:
            saver.start(self)

    @property
    def run_savefile(self) -> str:
        """Where the run's files are."""
        return self.config.savefile

    @property
    def rescue_folder(self) -> str:
        """Where on this machine it keeps what the savefile has no room for."""
        return rescue_folder(self.config.run)

    def running(self) -> Publisher:
        """The publisher. Raises StoreError as long as no worker has come."""
        if self.publisher is None:
            raise StoreError(f"run {self.config.run!r} has no worker yet; a tracker registers when it is constructed")
        return self.publisher

    def _touch(self, member: Member | None = None) -> None:
        """Note that the state has changed, by a member or otherwise, so that the saver saves it."""
        self._version += 1
        if member is not None:
            member.changed = self._version
        if self.saver is not None:
            self.saver.notify(self._version)

    # --- windows in files -------------------------------------------------------------------------------------

    def unpark(self, window: Window) -> None:
        """Read a parked window's entries back; called without the lock."""
        name = window.parked
        if name is None:
            return
        try:
            entries, lost = load_window(Storage(self.config.savefile), name), False
        except (ReadError, OSError) as error:
            with self._lock:
                if window.parked != name:  # somebody else was first, and the file is not needed any more
                    return
            self.running().problem(f"what had come for step {window.step} is lost: {error}")
            entries, lost = {}, True
        with self._lock:
            if window.parked == name:
                window.entries, window.parked = entries, None
                window.broken |= window.closed if lost else set()

    def _rescue(self) -> None:
        """Keep what the writers could not write, where there is room: beside the files, or on this machine."""
        for place in (self.config.savefile, self.rescue_folder):
            try:
                storage = Storage(place)
                save_once(storage, self.freeze())
            except (OSError, OptionError, pa.ArrowException):
                continue
            where = storage.uri
            self.running().problem(
                f"what could not be written is kept on {socket.gethostname()} in {where}/{FOLDER}; "
                f"`delve-ray recover {masked(self.run_savefile)} {where}` writes it"
            )
            return
        self.running().problem("what could not be written is lost: there is no room for it on this machine either")

    # --- called by the saver ---------------------------------------------------------------------------------

    def freeze(self) -> Frozen:
        """A consistent cut: every delta is in it wholly or not at all."""
        with self._lock:
            self._hold()
            try:
                metrics = {} if self.publisher is None else self.publisher.metrics()
                state = State(self.config, self.layers, self.tokens, self.attempts, self.ending, self._scalars, metrics)
                return freeze(state, self._version)
            finally:
                self._release()

    def parkable(self) -> list[tuple[Window, int, list[list[float]], list[Cut]]]:
        """Windows that are published and written, and wait for a late rank."""
        with self._lock:
            self._hold()
            try:
                return [
                    (window, window.version, *freeze_window(window))
                    for attempt in self.attempts
                    for window in attempt.windows.values()
                    if window.published and not (window.unwritten or window.changed) and window.entries
                ]
            finally:
                self._release()

    def parked(self, handle: Window, version: int, name: str) -> None:
        """A window is in a file; if nothing has arrived since, its entries leave the memory."""
        with self._lock:
            if handle.version == version and not (handle.unwritten or handle.changed):
                handle.entries, handle.parked = {}, name

    def _hold(self) -> None:
        """Let no delta begin to be merged, and wait for those that are; the lock is held."""
        self._freezing = True
        while self._merging:
            self._changed.wait()

    def _release(self) -> None:
        self._freezing = False
        self._changed.notify_all()
