"""What a worker has packed and the store does not safely have: in memory up to a bound, beyond that on disk.

A delta that was packed never changes and is never merged with another. It is forgotten when a restarted store would
have it, too; until then it may have to be offered again.
"""

from __future__ import annotations

import contextlib
import getpass
import hashlib
import logging
import os
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from delve_ray.errors import ReadError
from delve_ray.moments import F64
from delve_ray.parcels import decode_parcel, encode_parcel, parcel_name
from delve_ray.storage import Storage
from delve_ray.store.protocol import Ack, Delta, Held, LayerInfo, StoreConfig

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Item:
    """A packed delta: its buffer, or the file that holds it; `first` says that it is the first of its window."""

    delta: Delta
    buffer: F64 | None
    nbytes: int
    first: bool
    path: str | None = None
    merged: bool = False
    sending: bool = False
    writing: bool = False

    @property
    def busy(self) -> bool:
        """Whether it is to stay as it is."""
        return self.sending or self.writing


def spill_folder(run: str, source: str, spill_dir: str | None) -> str:
    """Where a worker's deltas lie that do not fit its memory: in a folder that is the user's alone, by default.

    The run's name, which is the user's, has no part in the path but by its hash.
    """
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        user = str(os.getuid())
    base = spill_dir or os.path.join(
        tempfile.gettempdir(), f"delve_ray-{hashlib.sha256(user.encode()).hexdigest()[:8]}"
    )
    return os.path.join(base, f"{hashlib.sha256(run.encode()).hexdigest()[:16]}-{source[:12]}")


class Outbox:
    """The deltas of one worker, by sequence number; all methods may be called from any thread.

    `memory` is the number of bytes of buffers that stay in memory. What is beyond goes to `folder`; where that cannot
    be written, memory is used up to `limit`, and after that the rows of the newest delta are given up: its header
    remains, and tells the store that this rank's share of the window is incomplete.
    """

    def __init__(self, config: StoreConfig, layers: Sequence[LayerInfo], folder: str) -> None:
        self.folder = folder
        self.lost_rows: list[str] = []
        """What was given up, in words."""
        self.memory_bytes = 0
        """Bytes of buffers in memory."""
        self.unmerged = 0
        """Deltas that the store has not merged."""
        self._config = config
        self._layers = list(layers)
        self._items: dict[int, _Item] = {}
        self._told_full = False
        # Reentrant: a signal handler that closes the tracker may interrupt a thread that has it.
        self._lock = threading.RLock()

    # --- in -------------------------------------------------------------------------------------------------

    def put(self, delta: Delta, buffer: F64, *, first: bool) -> None:
        """Take in a packed and sealed delta; `make_room` is to follow."""
        with self._lock:
            self._items[delta.seq] = _Item(delta, buffer, buffer.nbytes, first)
            self._count()

    def make_room(self, *, memory: int, limit: int) -> None:
        """On return no more than the bound is in memory, or what is being sent."""
        while (item := self._excess(memory)) is not None:
            try:
                self._spill(item)
            except OSError as error:
                with self._lock:
                    item.writing = False
                    told, self._told_full = self._told_full, True
                if not told:
                    log.error("%s: what waits for the store cannot be put there (%s)", self.folder, error)
                if self._excess(max(limit, memory), claim=False) is None:
                    return
                self._give_up(item, str(error))

    def _count(self) -> None:
        """Called with the lock held, after every change."""
        self.memory_bytes = sum(item.nbytes for item in self._items.values() if item.buffer is not None)
        self.unmerged = sum(not item.merged for item in self._items.values())

    def _excess(self, memory: int, *, claim: bool = True) -> _Item | None:
        """The buffer to put on disk next, if there are too many: what is needed last."""
        with self._lock:
            if self.memory_bytes <= memory:
                return None
            idle = [item for _, item in sorted(self._items.items()) if item.buffer is not None and not item.busy]
            # What is merged is only needed if the store is lost; of the rest, the newest waits longest.
            candidates = [item for item in idle if item.merged and item.nbytes] or [
                i for i in reversed(idle) if i.nbytes
            ]
            if not candidates:
                return None
            candidates[0].writing = claim
            return candidates[0]

    def _spill(self, item: _Item) -> None:
        assert item.buffer is not None
        os.makedirs(self.folder, mode=0o700, exist_ok=True)
        path = os.path.join(self.folder, parcel_name(item.delta))
        try:
            with open(path, "wb") as stream:
                for piece in self._encode(item.delta, item.buffer, item.first):
                    stream.write(piece)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(path)
            raise
        with self._lock:
            item.buffer, item.path, item.writing, self._told_full = None, path, False, False
            self._count()
            gone = item.delta.seq not in self._items
        if gone:
            self._unlink(path)

    def _encode(self, delta: Delta, buffer: F64, first: bool) -> Iterator[bytes | pa.Buffer]:
        return encode_parcel(delta, buffer, self._config, self._layers, first=first)

    def _give_up(self, item: _Item, why: str, *, unless_merged: bool = False) -> None:
        """Give up the rows of a delta, but of one that is being offered meanwhile, or is safe."""
        with self._lock:
            if item.sending or self._items.get(item.delta.seq) is not item or (unless_merged and item.merged):
                return
            self._empty(item)
            self._count()
            self.lost_rows.append(f"rows of step {item.delta.step} ({why})")
        log.error(
            "rank %d: rows of step %d are given up, as neither memory nor %s holds them; the step's rows will say so",
            item.delta.source.rank,
            item.delta.step,
            self.folder,
        )

    def _empty(self, item: _Item) -> None:
        """Keep the header alone, which says that rows are missing."""
        nothing = np.empty(0)
        item.delta = replace(item.delta, entries=(), widths=(), weights=(), samples=(), complete=False).sealed(nothing)
        item.buffer, item.nbytes, item.path = nothing, 0, None

    # --- out ------------------------------------------------------------------------------------------------

    def next(self) -> tuple[Delta, F64] | None:
        """The first delta that the store has not merged; `done` is to be called for it."""
        while True:
            with self._lock:
                waiting = (item for _, item in sorted(self._items.items()) if not item.merged)
                item = next(waiting, None)
                if item is None:
                    return None
                if item.buffer is not None:
                    item.sending = True
                    return item.delta, item.buffer
                path = item.path or ""
            try:
                return item.delta, decode_parcel(
                    Storage(os.path.dirname(path)).read_buffer(os.path.basename(path)), path
                ).buffer
            except (OSError, ReadError) as error:
                # Then its header is next, unless it is the store's by now, and the file is gone for that reason.
                self._give_up(item, f"{path} cannot be read: {error}", unless_merged=True)

    def following(self, seq: int) -> tuple[Delta, F64] | None:
        """What `next` will give after this delta, if it is in memory; it stays here, and may be put on disk."""
        with self._lock:
            later = (item for number, item in sorted(self._items.items()) if number > seq and not item.merged)
            item = next(later, None)
            return None if item is None or item.buffer is None else (item.delta, item.buffer)

    def done(self, seq: int) -> None:
        """A delta is not being sent any more."""
        with self._lock:
            if seq in self._items:
                self._items[seq].sending = False

    def acknowledge(self, ack: Ack) -> bool:
        """Note what the store has, and forget what is safe there; whether something has to be offered again."""
        with self._lock:
            again = False
            safe = [seq for seq in self._items if seq < ack.durable]
            for seq, item in self._items.items():
                merged = seq < ack.next_seq or seq in ack.above
                again |= item.merged and not merged
                item.merged = merged
            gone = [self._items.pop(seq) for seq in safe]
            self._count()
        for item in gone:
            if item.path is not None:
                self._unlink(item.path)
        return again

    def offer_all(self) -> None:
        """The store knows nothing: everything is to be offered again."""
        with self._lock:
            for item in self._items.values():
                item.merged = False
            self._count()

    def held(self, attempt: int, next_seq: int, window: int, *, first: bool) -> Held:
        """What is here, for a store that does not know this worker.

        The arguments describe the next delta, which is the first that there is when nothing is here.
        """
        with self._lock:
            if not self._items:
                return Held(attempt, next_seq, window, first)
            item = self._items[min(self._items)]
            return Held(attempt, item.delta.seq, item.delta.window, item.first)

    # --- answers --------------------------------------------------------------------------------------------

    @property
    def waiting(self) -> list[Delta]:
        """Deltas that the store has not merged."""
        with self._lock:
            return [item.delta for _, item in sorted(self._items.items()) if not item.merged]

    def __len__(self) -> int:
        """Deltas that are not safe in the store."""
        return len(self._items)

    def status(self) -> dict[str, int]:
        """Deltas and bytes, in memory and on disk."""
        with self._lock:
            disk = [item.nbytes for item in self._items.values() if item.path is not None]
            return {
                "deltas": len(self._items),
                "unmerged": sum(not item.merged for item in self._items.values()),
                "memory_bytes": self.memory_bytes,
                "disk_bytes": sum(disk),
                "on_disk": len(disk),
                "lost": len(self.lost_rows),
            }

    # --- the end --------------------------------------------------------------------------------------------

    def write_all(self, folder: str) -> list[str]:
        """Write everything that is here into a folder, for a recovery; the paths. Raises OSError."""
        os.makedirs(folder, exist_ok=True)
        storage = Storage(folder)
        paths = []
        with self._lock:
            items = [(item.delta, item.buffer, item.path, item.first) for _, item in sorted(self._items.items())]
        for delta, buffer, path, first in items:
            name = parcel_name(delta)
            if buffer is not None:
                storage.write_atomic(name, self._encode(delta, buffer, first))
            elif path is not None:
                try:
                    storage.write_atomic(name, Storage(os.path.dirname(path)).read_buffer(os.path.basename(path)))
                except FileNotFoundError:
                    if delta.seq in self._items:
                        raise
                    continue  # a late answer: the store has it
            paths.append(os.path.join(folder, name))
        return paths

    def clear(self) -> None:
        """Forget everything, files included."""
        with self._lock:
            gone, self._items = list(self._items.values()), {}
            self._count()
        for item in gone:
            if item.path is not None:
                self._unlink(item.path)
        with contextlib.suppress(OSError):
            os.rmdir(self.folder)

    def _unlink(self, path: str) -> None:
        with contextlib.suppress(OSError):
            os.unlink(path)
