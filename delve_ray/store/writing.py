"""From rows to files: each writer on a thread of its own, which tries again while its destination is away."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Sequence
from functools import partial

from delve_ray.schema import PublishedWindow
from delve_ray.store.timings import Timings
from delve_ray.store.writing_items import ROW_BYTES as ROW_BYTES
from delve_ray.store.writing_items import Done, Item, count_items, may_pass, row_bytes
from delve_ray.writers.base import Scalar, Writer

log = logging.getLogger(__name__)

RETRY_S = (1.0, 60.0)
"""Seconds between the tries of what failed: the first pause, which doubles, and the longest."""
MAX_QUEUED_BYTES = 512 << 20
"""How many bytes of rows may wait for one writer before the oldest are given up."""
MAX_TRIES = 3
"""How often a window is tried that fails by a fault of its own or of the writer: time does not mend those."""
REPORT_EVERY_S = 60.0
"""Seconds between two reports of one trouble in the log."""
_GRACE_S = 1.0
"""How long a thread that was told to stop may take to say what it gave up."""


def _nothing() -> None:
    """What is done where there is nothing to do."""


class WriterThread:
    """One writer on its own thread: its failures and its slowness are its own.

    What fails because of the destination (OSError, or an Arrow error that is no fault of the rows) is kept and tried
    again, with longer and longer pauses, for as long as it takes, and what comes after it waits: order is kept. What
    fails otherwise is tried `MAX_TRIES` times and then given up. What waits is bounded: beyond `max_bytes` the oldest
    is given up, but never what is being written, nor the newest. All of that is counted, and said in the log.

    All methods may be called from any thread, except that `drain` and `close` must not be called by a `done`.
    """

    def __init__(
        self,
        writer: Writer,
        *,
        retry_s: tuple[float, float] | None = None,
        max_bytes: int = MAX_QUEUED_BYTES,
        timings: Timings | None = None,
    ) -> None:
        self.writer = writer
        self._timings = timings or Timings()
        self.written = self.failed = self.dropped = 0
        self.last_error: str | None = None
        self._retry_s = retry_s or RETRY_S
        self._max_bytes = max_bytes
        self._queue: OrderedDict[Item, None] = OrderedDict()
        self._live: dict[tuple[int, int], Item] = {}  # of the queue, by window
        self._given_up: deque[Item] = deque()  # their `done` has yet to be called
        self._current: Item | None = None
        self._bytes = 0
        self._lost: dict[tuple[int, int], int] = {}  # windows given up, by revision, and not made good since
        self._lost_lists = 0
        self._last_loss = ""
        self._trouble_since: float | None = None
        self._reported = self._reported_drop = float("-inf")
        self._ending = self._stopping = self._late = self._hurry = False
        self._not_closed = ""
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name=f"delve_ray-writer-{writer.name}", daemon=True)
        self._thread.start()

    def write(self, window: PublishedWindow, done: Done | None = None) -> None:
        """Queue a window; returns at once.

        `done` is called once, on the writer's thread: with True when the window is written, with False when it is
        given up. A live window that waits is replaced by a newer revision of it, and is done when that one is. After
        the end nothing is queued: `done(False)` is then called at once.
        """
        item = Item(
            partial(self.writer.write, window),
            step=window.step,
            nbytes=ROW_BYTES + sum(map(row_bytes, window.rows)),
            done=[done] if done else [],
            key=(window.attempt, window.window),
            revision=window.revision,
            live=not window.final,
        )
        self._put(item)

    def write_scalars(self, scalars: list[Scalar], done: Done | None = None) -> None:
        """Queue user scalars; `done` as for `write`."""
        step = min((scalar.step for scalar in scalars), default=0)
        job = partial(self.writer.write_scalars, scalars)
        self._put(Item(job, step, ROW_BYTES * (1 + len(scalars)), [done] if done else []))

    def drain(self, timeout: float) -> bool:
        """Wait until everything queued so far is written or given up; False when it takes longer (seconds).

        What failed is tried again at once rather than after its pause.
        """
        with self._changed:
            items = [*self._given_up, *([self._current] if self._current else []), *self._queue]
            self._hurry = self._trouble_since is not None
            self._changed.notify_all()
            # From the last one on, because that one is settled last.
            return self._changed.wait_for(lambda: all(item.settled for item in reversed(items)), timeout)

    def end(self) -> None:
        """Say that nothing more comes: what is queued is tried at once, then the writer is closed. Returns at once."""
        with self._changed:
            self._ending = True
            self._hurry = self._trouble_since is not None
            self._changed.notify_all()

    def close(self, timeout: float) -> bool:
        """Write what is queued, close the writer and end the thread; False when it takes longer (seconds).

        Then nothing is tried any more: what is left is given up, and the thread ends as soon as the writer returns.
        """
        self.end()
        self._thread.join(max(0.0, timeout))
        if self._thread.is_alive():
            with self._changed:
                self._stopping = True
                self._changed.notify_all()
            getattr(self.writer, "stop_waiting", _nothing)()  # of a writer that waits for others
            self._thread.join(_GRACE_S)
        if alive := self._thread.is_alive():
            log.error("writer %s did not end in %.3g s: it is still busy", self.writer.name, timeout)
            self._abandon(None)
        return not alive and not self._late

    def status(self) -> dict[str, object]:
        """Counts, what waits, and the last error, for people; `queued` counts what is being written, too."""
        with self._changed:
            since = self._current.failing_since if self._current else None
            return {
                "name": self.writer.name,
                "written": self.written,
                "failed": self.failed,
                "dropped": self.dropped,
                "queued": len(self._queue) + (self._current is not None),
                "queued_bytes": self._bytes,
                "waiting_s": time.monotonic() - since if since is not None else 0.0,
                "last_error": self.last_error,
            }

    def problem(self) -> str | None:
        """What is wrong with this writer now, or was lost, in a sentence; None when there is nothing."""
        with self._changed:
            item, problems = self._current, []
            if lost := count_items([*self._lost, *([None] * self._lost_lists)]):
                problems.append(f"did not write {lost} ({self._last_loss})")
            if item is not None and item.failing_since is not None:
                seconds = time.monotonic() - item.failing_since
                after = f"; {count_items(item.key for item in self._queue)} more wait" if self._queue else ""
                problems.append(f"has failed to write {item} for {seconds:.0f} s ({self.last_error}){after}")
            if self._not_closed:
                problems.append(f"could not be closed ({self._not_closed})")
            if self._stopping and self._thread.is_alive():
                problems.append("did not end in time")
        return f"writer {self.writer.name} {', and '.join(problems)}" if problems else None

    # --- the queue -------------------------------------------------------------------------------------------

    def _put(self, item: Item) -> None:
        oldest = None
        with self._changed:
            if ended := self._ending:
                self.dropped += 1
                self._lose(item, "the writer had ended")
            else:
                self._enqueue(item)
                while self._bytes > self._max_bytes and len(self._queue) > 1:
                    oldest = self._pop()
                    self._give_up([oldest], self.last_error or "the writer is too slow")
                self._changed.notify_all()
        if ended:
            log.error("writer %s has ended: %s is not written", self.writer.name, item)
            self._settle(item, written=False)
        elif oldest:
            self._report_dropped(oldest)

    def _enqueue(self, item: Item) -> None:
        older = self._live.pop(item.key, None) if item.key else None
        if older is not None and older.revision < item.revision:
            # It goes to the end of the queue, so that a final window never overtakes one that came before it.
            del self._queue[older]
            self._bytes -= older.nbytes
            older.become(item)
            item = older
        self._queue[item] = None
        self._bytes += item.nbytes
        if item.live and item.key:
            self._live[item.key] = item

    def _pop(self) -> Item:
        item, _ = self._queue.popitem(last=False)
        if item.key and self._live.get(item.key) is item:
            del self._live[item.key]
        return item

    def _give_up(self, items: Sequence[Item], reason: str) -> None:
        """Count items that are in the queue no more, and have the thread call their `done`."""
        self.dropped += len(items)
        for item in items:
            self._bytes -= item.nbytes
            self._lose(item, reason)
            item.release()
        self._given_up.extend(items)
        self._changed.notify_all()

    def _lose(self, item: Item, reason: str) -> None:
        if item.key:
            self._lost[item.key] = item.revision  # the newest, because they come in order
        else:
            self._lost_lists += 1
        self._last_loss = f"the last {item}: {reason}"

    def _report_dropped(self, item: Item) -> None:
        now = time.monotonic()
        if now >= self._reported_drop + REPORT_EVERY_S:
            self._reported_drop = now
            log.error(
                "writer %s gave up %s, the oldest, because more than %.3g MiB wait (so far it gave up %d; last error: "
                "%s): make room where it writes, or bring that place back, before more is lost",
                *(self.writer.name, item, self._max_bytes / 2**20, self.dropped, self.last_error or "none, it is slow"),
            )

    # --- the thread ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while (item := self._next()) is not None:
            self._settle(item, written=self._work(item))
        try:
            self.writer.close()
        except Exception as error:  # everything was written before: only said
            log.exception("writer %s could not be closed", self.writer.name)
            with self._changed:
                self.last_error = self._not_closed = f"{type(error).__name__}: {error}"

    def _next(self) -> Item | None:
        """The next item to write; None when there is none and none will come."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._given_up or self._ending)
                if not self._given_up and not (self._stopping and self._queue):
                    self._current = self._pop() if self._queue else None
                    return self._current
            self._tell_given_up()
            if self._stopping:
                self._abandon(None)

    def _work(self, item: Item) -> bool:
        """Try an item until it is written (True) or given up (False). No lock is held while the writer works."""
        pause, longest = self._retry_s
        while True:
            try:
                with self._timings.of("write", self.writer.name):
                    item.job()
            except Exception as error:  # whatever a writer raises must not reach the others
                if not self._note_failure(item, error, pause):
                    return False
            else:
                self._note_success(item)
                return True
            if not self._rest(item, pause):
                return False
            pause = self._retry_s[0] if self._ending else min(2 * pause, longest)

    def _note_failure(self, item: Item, error: Exception, pause: float) -> bool:
        """Count and report a failure; whether the item is to be tried again."""
        now, fault = time.monotonic(), not may_pass(error)
        with self._changed:
            reason = self.last_error = f"{type(error).__name__}: {error}"
            item.failing_since = item.failing_since or now
            self._trouble_since = self._trouble_since or now
            item.faults += fault
            if lost := item.faults >= MAX_TRIES:
                self.failed += 1
                self._lose(item, reason)
        if lost:
            log.error("writer %s gave up %s after %d tries: %s", self.writer.name, item, item.faults, reason)
        elif now >= self._reported + REPORT_EVERY_S and not self._stopping:
            self._reported = now
            log.error(
                "writer %s failed to write %s, and tries again in %.3g s (%d wait behind it): %s",
                *(self.writer.name, item, pause, len(self._queue), reason),
                exc_info=error if fault else None,  # where in the writer it was
            )
        return not lost

    def _note_success(self, item: Item) -> None:
        with self._changed:
            self.written += 1
            if item.key and self._lost.get(item.key, item.revision + 1) <= item.revision:
                del self._lost[item.key]  # by a newer revision
            item.failing_since = None
            since, self._trouble_since = self._trouble_since, None
            waited = [each.key for each in (item, *self._queue)] if since is not None else []
        if since is not None:
            self._reported, after = float("-inf"), time.monotonic() - since
            log.warning(
                "writer %s works again after %.0f s; %s had waited", self.writer.name, after, count_items(waited)
            )

    def _rest(self, item: Item, pause: float) -> bool:
        """Wait before the next try; False when there is to be none, and the item was given up with the others."""
        due = time.monotonic() + pause
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._hurry or self._stopping or self._given_up, max(0.0, due - time.monotonic())
                )
                hurry, self._hurry = self._hurry, False
            self._tell_given_up()
            if self._stopping:
                self._abandon(item)
                return False
            if hurry or time.monotonic() >= due:
                return True

    def _abandon(self, current: Item | None) -> None:
        """There is no more time: give up the queue, and `current` before it."""
        with self._changed:
            items = [*([current] if current else []), *self._queue]
            self._queue.clear()
            reason = self.last_error if current and self.last_error else "there was no more time"
            self._give_up(items, reason)
            self._late = self._late or bool(items)
        if items:
            lost = count_items(item.key for item in items)
            log.error("writer %s did not write %s, the last %s: %s", self.writer.name, lost, items[-1], reason)

    def _tell_given_up(self) -> None:
        while self._given_up:  # only this thread takes from it
            self._settle(self._given_up[0], written=False)
            with self._changed:
                self._given_up.popleft()

    def _settle(self, item: Item, *, written: bool) -> None:
        """Say what became of an item, once."""
        if item.settled:
            return
        for done in item.done:
            try:
                done(written)
            except Exception:  # theirs; the rows are where they are
                log.exception("writer %s: what was to be called after %s failed", self.writer.name, item)
        with self._changed:
            if item is self._current:
                self._current = None
                self._bytes -= item.nbytes
            item.settled = True
            item.release()
            self._changed.notify_all()
