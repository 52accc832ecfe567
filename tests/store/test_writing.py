"""Writers on threads of their own: outages, faults, bounds and the end, on real files and real threads."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from delve_ray.schema import PublishedWindow
from delve_ray.storage import Storage
from delve_ray.store import writing
from delve_ray.store.writing import MAX_TRIES, ROW_BYTES, WriterThread
from delve_ray.writers.base import Scalar, Writer
from delve_ray.writers.parquet import ParquetWriter
from delve_ray.writers.tensorboard import TensorBoardWriter
from tests.windows import COVARIANCE, found, layer_row, scalar, window

SOON = (0.002, 0.004)
"""Pauses between tries, in seconds, for outages that a test ends itself."""
NEVER = (3600.0, 3600.0)
"""Pauses that no test outlives: what is tried again was tried again for another reason."""
DEADLINE_S = 60.0


class Gated:
    """A writer that keeps what it was given, and first does what the test says."""

    def __init__(self, act: Callable[[Any], None] = lambda item: None, name: str = "gated") -> None:
        self.name, self.act = name, act
        self.tries: list[Any] = []
        self.kept: list[Any] = []
        self.closed = 0

    def write(self, window: PublishedWindow) -> None:
        self._write((window.window, window.revision))

    def write_scalars(self, scalars: list[Scalar]) -> None:
        self._write([scalar.step for scalar in scalars])

    def close(self) -> None:
        self.closed += 1

    def _write(self, item: Any) -> None:
        self.tries.append(item)
        self.act(item)
        self.kept.append(item)


class Broken(Gated):
    """A writer whose destination fails until it is mended."""

    def __init__(self, error: Exception | None = None, name: str = "broken") -> None:
        super().__init__(self._fail, name)
        self.error: Exception | None = error or OSError(28, "No space left on device")

    def _fail(self, item: Any) -> None:
        if self.error is not None:
            raise self.error

    def mend(self) -> None:
        self.error = None


class Held(Gated):
    """A writer that does not come back from its first item until it is let go."""

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__(self._hold, "held")
        self.error = error
        self.holds, self.released = threading.Event(), threading.Event()

    def _hold(self, item: Any) -> None:
        if not self.released.is_set():
            self.holds.set()
            assert self.released.wait(DEADLINE_S)
            if self.error is not None:
                raise self.error


@pytest.fixture
def start() -> Iterator[Callable[..., WriterThread]]:
    """Starts writer threads, and ends them after the test."""
    started: list[WriterThread] = []

    def start(writer: Writer, **options: Any) -> WriterThread:
        started.append(WriterThread(writer, **({"retry_s": SOON} | options)))
        return started[-1]

    yield start
    for thread in started:
        if isinstance(thread.writer, Held):
            thread.writer.released.set()
        thread.close(0.0)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of one mebibyte."""
    directory = tmp_path / "disk"
    directory.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", directory], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"a full disk needs the right to mount a tmpfs ({error})")
    try:
        yield directory
    finally:
        subprocess.run(["umount", "-l", directory], check=True)


def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "the condition was not met in time"
        time.sleep(0.002)


def step(number: int, revision: int = 0, **changes: Any) -> PublishedWindow:
    row = layer_row("a", stats={"saturation": number / 8})
    return window([row], window=number, step=number, revision=revision, **changes)


def problem(thread: WriterThread) -> str | None:
    return thread.problem() and untimed(str(thread.problem()))


def untimed(text: str) -> str:
    return re.sub(r"[0-9]+ s\b", "… s", text)


def counts(thread: WriterThread) -> tuple[Any, ...]:
    status = thread.status()
    return tuple(status[name] for name in ("written", "failed", "dropped", "queued"))


@contextmanager
def said(caplog: pytest.LogCaptureFixture, *parts: str) -> Iterator[None]:
    """One more line in the log, and one alone, has all of these."""
    caplog.clear()
    yield
    lines = [record.getMessage() for record in caplog.records]
    assert len([line for line in lines if all(part in line for part in parts)]) == 1, lines


# --- outages of real directories ---------------------------------------------------------------------------


def test_a_full_disk_loses_nothing_and_keeps_the_order(disk: Path, start: Callable[..., WriterThread]) -> None:
    thread = start(ParquetWriter(Storage(disk / "run")))
    thread.write(step(0))
    assert thread.drain(DEADLINE_S)
    filler = disk / "filler"
    with pytest.raises(OSError, match="No space"):
        filler.write_bytes(bytes(1 << 20))
    done: list[Any] = []
    for number in (1, 2):
        thread.write(step(number), lambda written, number=number: done.append((number, written, problem(thread))))
    thread.write_scalars([scalar(step=5)], lambda written: done.append(("scalars", written, problem(thread))))
    until(lambda: thread.status()["waiting_s"] > 0)

    assert counts(thread) == (1, 0, 0, 3)
    assert "[Errno 28] No space left on device" in str(thread.last_error)
    assert problem(thread) == (
        "writer parquet has failed to write step 1 for … s (OSError: [Errno 28] No space left on device); "
        "1 window and 1 scalar list more wait"
    )
    assert found(disk / "run") == [(0, "a", 0.0)]
    assert done == []

    filler.unlink()
    assert thread.drain(DEADLINE_S)
    assert done == [(1, True, None), (2, True, None), ("scalars", True, None)]
    assert counts(thread) == (4, 0, 0, 0)
    assert (thread.status()["waiting_s"], thread.status()["queued_bytes"], problem(thread)) == (0.0, 0, None)
    assert found(disk / "run") == [(number, "a", number / 8) for number in range(3)]
    assert [name for name in os.listdir(disk / "run" / "spectra") if name.startswith(".")] == []


def test_events_on_a_full_disk(disk: Path, start: Callable[..., WriterThread]) -> None:
    thread = start(TensorBoardWriter(Storage(disk)))
    thread.write_scalars([scalar(value=0.0, step=0)])
    assert thread.drain(DEADLINE_S)
    filler = disk / "filler"
    with pytest.raises(OSError, match="No space"):
        filler.write_bytes(bytes(1 << 20))
    # More than the rest of the page that the file has already, so that half an event is written.
    many = [scalar(value=float(number), step=number) for number in range(1, 500)]
    thread.write_scalars(many)
    thread.write_scalars([scalar(value=500.0, step=500)])
    until(lambda: thread.status()["waiting_s"] > 0)
    filler.unlink()
    assert thread.drain(DEADLINE_S)
    assert thread.problem() is None

    read = EventAccumulator(str(disk / "tensorboard"), size_guidance={"scalars": 0})
    read.Reload()
    points = [(event.step, event.value) for event in read.Scalars("loss")]
    assert sorted(set(points)) == [(number, float(number)) for number in range(501)]
    assert points[-500:] == [(number, float(number)) for number in range(1, 501)]
    assert len(list((disk / "tensorboard").iterdir())) == 2


def test_a_file_in_the_way_of_a_directory(tmp_path: Path, start: Callable[..., WriterThread]) -> None:
    (tmp_path / "spectra").write_text("in the way")
    thread = start(ParquetWriter(Storage(tmp_path)))
    thread.write(step(1))
    until(lambda: thread.status()["waiting_s"] > 0)
    (tmp_path / "spectra").unlink()
    assert thread.drain(DEADLINE_S)
    assert found(tmp_path) == [(1, "a", 0.125)]
    assert problem(thread) is None


def test_a_removed_directory_is_made_anew(tmp_path: Path, start: Callable[..., WriterThread]) -> None:
    run = tmp_path / "run"
    thread = start(ParquetWriter(Storage(run)), retry_s=NEVER)
    thread.write(step(0))
    assert thread.drain(DEADLINE_S)
    shutil.rmtree(run)
    thread.write(step(1))
    assert thread.drain(DEADLINE_S)
    assert found(run) == [(1, "a", 0.125)]
    assert counts(thread) == (2, 0, 0, 0)


def test_a_failing_writer_does_not_delay_another(tmp_path: Path, start: Callable[..., WriterThread]) -> None:
    broken = start(Broken(), retry_s=NEVER)
    sound = start(ParquetWriter(Storage(tmp_path)))
    for number in range(5):
        for thread in (broken, sound):
            thread.write(step(number))
    assert sound.drain(DEADLINE_S)
    assert found(tmp_path, "step") == [(number,) for number in range(5)]
    assert counts(sound) == (5, 0, 0, 0)
    assert counts(broken) == (0, 0, 0, 5)


# --- trying again ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [OSError("gone"), TimeoutError(), pa.ArrowException("?"), pa.lib.ArrowMemoryError("no memory")]
)
def test_what_may_pass_is_tried_again_in_order(start: Callable[..., WriterThread], error: Exception) -> None:
    def fail_at_first(item: Any) -> None:
        if writer.tries.count(item) <= 2 * MAX_TRIES:
            raise error

    writer = Gated(fail_at_first)
    thread = start(writer)
    for number in range(3):
        thread.write(step(number))
        thread.write_scalars([scalar(step=10 * number)])
    assert thread.drain(DEADLINE_S)
    order = [(0, 0), [0], (1, 0), [10], (2, 0), [20]]
    assert writer.kept == order
    assert writer.tries == [item for item in order for _ in range(2 * MAX_TRIES + 1)]
    assert counts(thread) == (6, 0, 0, 0)
    assert problem(thread) is None
    assert type(error).__name__ in str(thread.status()["last_error"])


@pytest.mark.parametrize(
    "error", [TypeError("no"), ZeroDivisionError(), pa.ArrowInvalid("no"), pa.lib.ArrowTypeError("no")]
)
def test_a_fault_is_given_up_and_the_next_goes_on(
    start: Callable[..., WriterThread], error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    def stumble(item: Any) -> None:
        if item == (1, 0):
            raise error

    writer, done = Gated(stumble), []
    thread = start(writer)
    with said(caplog, "writer gated gave up step 1 after 3 tries", type(error).__name__):
        for number in range(3):
            thread.write(step(number), lambda written, number=number: done.append((number, written)))
        assert thread.drain(DEADLINE_S)
    assert writer.tries == [(0, 0), *[(1, 0)] * MAX_TRIES, (2, 0)]
    assert done == [(0, True), (1, False), (2, True)]
    assert counts(thread) == (2, 1, 0, 0)
    assert problem(thread) == (
        f"writer gated did not write 1 window (the last step 1: {type(error).__name__}: {error})"
    )


def test_pauses_double_up_to_the_longest(start: Callable[..., WriterThread], monkeypatch: pytest.MonkeyPatch) -> None:
    writer, pauses = Broken(), []

    def rest(self: WriterThread, item: Any, pause: float) -> bool:
        pauses.append(pause)
        if len(pauses) == 9:
            writer.mend()
        return True

    monkeypatch.setattr(WriterThread, "_rest", rest)
    thread = start(writer, retry_s=writing.RETRY_S)
    thread.write(step(0))
    assert thread.drain(DEADLINE_S)
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60, 60]


@pytest.mark.parametrize("how", ["drain", "close"])
def test_who_waits_is_not_kept_waiting_by_a_pause(start: Callable[..., WriterThread], how: str) -> None:
    writer = Broken()
    thread = start(writer, retry_s=NEVER)
    thread.write(step(0))
    thread.write(step(1))
    until(lambda: thread.status()["waiting_s"] > 0)
    writer.mend()
    assert getattr(thread, how)(DEADLINE_S)
    assert writer.kept == [(0, 0), (1, 0)]


def test_after_the_end_pauses_are_short(start: Callable[..., WriterThread]) -> None:
    writer = Broken()
    thread = start(writer, retry_s=(0.005, 3600.0))
    thread.write(step(0))
    until(lambda: len(writer.tries) > 5)  # the pauses of before would soon be minutes
    thread.end()
    tried = len(writer.tries)
    until(lambda: len(writer.tries) > tried + 50)
    writer.mend()
    assert thread.close(DEADLINE_S)


def test_an_outage_is_said_once_and_its_end_with_what_had_waited(
    start: Callable[..., WriterThread], caplog: pytest.LogCaptureFixture
) -> None:
    writer = Broken()
    thread = start(writer)
    for number in range(3):
        thread.write(step(number))
    until(lambda: len(writer.tries) > 8)
    thread.write_scalars([scalar()])
    (record,) = caplog.records
    assert record.levelname == "ERROR"
    assert "writer broken failed to write step 0, and tries again in 0.002 s" in record.getMessage()
    assert "OSError: [Errno 28] No space left on device" in record.getMessage()
    caplog.clear()
    writer.mend()
    assert thread.drain(DEADLINE_S)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert untimed(record.getMessage()) == (
        "writer broken works again after … s; 3 windows and 1 scalar list had waited"
    )

    with said(caplog, "writer broken failed to write step 7"):  # another outage is said at once
        writer.error = OSError("again")
        thread.write(step(7))
        until(lambda: len(caplog.records) > 0)


def test_a_long_outage_is_said_again(
    start: Callable[..., WriterThread], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "REPORT_EVERY_S", 0.0)
    thread = start(Broken())
    thread.write(step(0))
    until(lambda: len(caplog.records) >= 3)
    assert {record.getMessage().partition(",")[0] for record in caplog.records} == {
        "writer broken failed to write step 0"
    }


# --- the queue ---------------------------------------------------------------------------------------------


def test_live_revisions_that_wait_give_way_to_newer_ones(start: Callable[..., WriterThread]) -> None:
    writer, done = Held(), []

    def publish(number: int, revision: int, final: bool) -> None:
        thread.write(step(number, revision, final=final), lambda written: done.append((number, revision, written)))

    thread = start(writer)
    publish(1, 0, False)
    assert writer.holds.wait(DEADLINE_S)
    publish(1, 1, False)  # the one before is being written, and stays
    publish(0, 5, True)
    publish(1, 2, False)
    publish(2, 0, False)
    publish(1, 3, True)
    publish(1, 4, True)  # a correction: final windows give way to nothing
    publish(2, 1, False)
    assert thread.status()["queued"] == 5
    writer.released.set()
    assert thread.drain(DEADLINE_S)
    assert writer.kept == [(1, 0), (0, 5), (1, 3), (1, 4), (2, 1)]
    assert done == [
        *[(1, 0, True), (0, 5, True)],
        *[(1, 1, True), (1, 2, True), (1, 3, True)],  # done with the one that took their place
        *[(1, 4, True), (2, 0, True), (2, 1, True)],
    ]
    assert counts(thread) == (5, 0, 0, 0)
    assert thread.status()["queued_bytes"] == 0


def test_windows_of_other_attempts_do_not_give_way(start: Callable[..., WriterThread]) -> None:
    writer = Held()
    thread = start(writer)
    thread.write(step(9))
    assert writer.holds.wait(DEADLINE_S)
    thread.write(step(1, 4, attempt=0, final=False))
    thread.write(step(1, 5, attempt=1, final=False))
    writer.released.set()
    assert thread.drain(DEADLINE_S)
    assert writer.kept == [(9, 0), (1, 4), (1, 5)]


def test_bytes_are_those_of_the_arrays_and_a_share_per_row(start: Callable[..., WriterThread]) -> None:
    writer = Held()
    thread = start(writer)
    thread.write(window([layer_row(covariance=COVARIANCE), layer_row()]))
    assert writer.holds.wait(DEADLINE_S)
    arrays = 2 * (3 + 3) * 8 + 6 * 8  # eigenvalues and means, and one covariance
    assert thread.status()["queued_bytes"] == arrays + 3 * ROW_BYTES
    thread.write_scalars([scalar()] * 4)
    assert thread.status()["queued_bytes"] == arrays + 8 * ROW_BYTES


def big(number: int, **changes: Any) -> PublishedWindow:
    """A window of a bit more than a mebibyte."""
    return window([layer_row(covariance=np.zeros(1 << 17))], window=number, step=number, **changes)


def test_beyond_the_bound_the_oldest_are_given_up(
    start: Callable[..., WriterThread], caplog: pytest.LogCaptureFixture
) -> None:
    writer, done = Broken(), []
    thread = start(writer, max_bytes=4 << 20, retry_s=NEVER)

    def publish(number: int) -> None:
        thread.write(
            big(number), lambda written: done.append((number, written, threading.current_thread() is thread._thread))
        )

    publish(0)
    until(lambda: thread.status()["waiting_s"] > 0)
    publish(1)
    publish(2)
    assert counts(thread) == (0, 0, 0, 3)
    told = ("writer broken gave up step 1, the oldest", "4 MiB", "No space", "make room where it writes")
    with said(caplog, "the oldest"), said(caplog, *told):  # not for each of them
        for number in (3, 4, 5):
            publish(number)
            assert thread.status()["queued_bytes"] <= 4 << 20
    assert counts(thread) == (0, 0, 3, 3)
    until(lambda: len(done) == 3)  # during the outage
    assert problem(thread) == (
        "writer broken did not write 3 windows (the last step 3: OSError: [Errno 28] No space left on device), "
        "and has failed to write step 0 for … s (OSError: [Errno 28] No space left on device); 2 windows more wait"
    )
    writer.mend()
    assert thread.drain(DEADLINE_S)
    assert writer.kept == [(0, 0), (4, 0), (5, 0)]
    assert sorted(done) == [(n, n not in (1, 2, 3), True) for n in range(6)]
    assert problem(thread) == (
        "writer broken did not write 3 windows (the last step 3: OSError: [Errno 28] No space left on device)"
    )


def test_a_window_above_the_bound_is_written_all_the_same(start: Callable[..., WriterThread]) -> None:
    writer = Held()
    thread = start(writer, max_bytes=1 << 20)
    for number in range(3):
        thread.write(big(number))
        assert writer.holds.wait(DEADLINE_S)
    writer.released.set()
    assert thread.drain(DEADLINE_S)
    assert writer.kept == [(0, 0), (2, 0)]
    assert counts(thread) == (2, 0, 1, 0)


def test_what_a_newer_revision_makes_good_is_no_loss(start: Callable[..., WriterThread]) -> None:
    writer = Held()
    thread = start(writer, max_bytes=2 << 20)
    thread.write(step(0))
    assert writer.holds.wait(DEADLINE_S)
    thread.write(big(1, final=False))
    thread.write(big(2))
    until(lambda: counts(thread) == (0, 0, 1, 2))
    assert problem(thread) == "writer held did not write 1 window (the last step 1: the writer is too slow)"
    writer.released.set()
    assert thread.drain(DEADLINE_S)
    thread.write(big(1, revision=1))
    assert thread.drain(DEADLINE_S)
    assert problem(thread) is None
    assert counts(thread) == (3, 0, 1, 0)


def test_windows_from_many_threads_are_each_written_once(start: Callable[..., WriterThread]) -> None:
    writer = Gated()
    thread = start(writer)
    done: list[int] = []

    def publish(first: int) -> None:
        for number in range(first, first + 100):
            thread.write(step(number), lambda written, number=number: done.append(number))

    publishers = [threading.Thread(target=publish, args=(100 * n,)) for n in range(8)]
    for publisher in publishers:
        publisher.start()
    for publisher in publishers:
        publisher.join()
    assert thread.drain(DEADLINE_S)
    assert sorted(number for number, _ in writer.kept) == list(range(800))
    assert done == [number for number, _ in writer.kept]


def test_drain_says_when_it_takes_longer(start: Callable[..., WriterThread]) -> None:
    writer = Held()
    thread = start(writer)
    assert thread.drain(0.0)
    thread.write(step(0))
    assert not thread.drain(0.01)
    writer.released.set()
    assert thread.drain(DEADLINE_S)
    assert writer.kept == [(0, 0)]


def test_what_fails_after_a_window_does_not_stop_the_writer(
    start: Callable[..., WriterThread], caplog: pytest.LogCaptureFixture
) -> None:
    def fail(written: bool) -> None:
        raise RuntimeError("theirs")

    writer = Gated()
    thread = start(writer)
    with said(caplog, "writer gated: what was to be called after step 0 failed"):
        thread.write(step(0), fail)
        thread.write(step(1))
        assert thread.drain(DEADLINE_S)
    assert writer.kept == [(0, 0), (1, 0)]
    assert problem(thread) is None


# --- the end -----------------------------------------------------------------------------------------------


def test_close_writes_what_is_queued_and_closes_the_writer_once(start: Callable[..., WriterThread]) -> None:
    writer = Gated()
    thread = start(writer)
    for number in range(20):
        thread.write(step(number))
    assert thread.close(DEADLINE_S)
    assert thread.close(DEADLINE_S)
    assert (len(writer.kept), writer.closed) == (20, 1)
    assert not thread._thread.is_alive()
    assert thread.status() == {
        "name": "gated",
        "written": 20,
        "failed": 0,
        "dropped": 0,
        "queued": 0,
        "queued_bytes": 0,
        "waiting_s": 0.0,
        "last_error": None,
    }


def test_an_outage_ends_at_the_deadline_of_close(
    start: Callable[..., WriterThread], caplog: pytest.LogCaptureFixture
) -> None:
    writer, done = Broken(), []
    thread = start(writer, retry_s=NEVER)
    for number in range(4):
        thread.write(step(number), lambda written, number=number: done.append((number, written)))
    thread.write_scalars([scalar(step=9)], lambda written: done.append(("scalars", written)))
    until(lambda: thread.status()["waiting_s"] > 0)
    with said(
        caplog, "broken did not write 4 windows and 1 scalar list", "the last scalars from step 9 on", "No space"
    ):
        assert not thread.close(0.05)
    assert not thread._thread.is_alive()
    assert done == [*((number, False) for number in range(4)), ("scalars", False)]
    assert counts(thread) == (0, 0, 5, 0)
    assert thread.status()["queued_bytes"] == 0
    assert writer.closed == 1
    assert not thread.close(0.05)
    assert problem(thread) == (
        "writer broken did not write 4 windows and 1 scalar list "
        "(the last scalars from step 9 on: OSError: [Errno 28] No space left on device)"
    )


@pytest.mark.parametrize("error", [None, OSError("gone in between")])
def test_a_writer_that_does_not_come_back_holds_up_only_its_own_thread(
    start: Callable[..., WriterThread],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception | None,
) -> None:
    monkeypatch.setattr(writing, "_GRACE_S", 0.01)
    writer, done = Held(error), []
    thread = start(writer)
    for number in range(3):
        thread.write(step(number), lambda written, number=number: done.append((number, written)))
    assert writer.holds.wait(DEADLINE_S)
    with said(caplog, "writer held did not end in 0.01 s"):
        with said(caplog, "writer held did not write 2 windows, the last step 2: there was no more time"):
            assert not thread.close(0.01)
    assert counts(thread) == (0, 0, 2, 1)
    assert problem(thread) == (
        "writer held did not write 2 windows (the last step 2: there was no more time), and did not end in time"
    )
    writer.released.set()
    thread._thread.join(DEADLINE_S)
    assert sorted(done) == [(0, error is None), (1, False), (2, False)]
    assert writer.tries == [(0, 0)]
    assert writer.closed == 1
    assert counts(thread) == ((1, 0, 2, 0) if error is None else (0, 0, 3, 0))
    assert not thread.close(0.0)


def test_what_a_writer_has_no_time_for_is_given_up_when_it_comes_back(start: Callable[..., WriterThread]) -> None:
    writer, done = Held(), []
    thread = start(writer)
    for number in range(3):
        thread.write(step(number), lambda written, number=number: done.append((number, written)))
    assert writer.holds.wait(DEADLINE_S)
    closed: list[bool] = []
    closing = threading.Thread(target=lambda: closed.append(thread.close(0.0)))
    closing.start()
    until(lambda: thread._stopping)
    writer.released.set()
    closing.join(DEADLINE_S)
    thread._thread.join(DEADLINE_S)
    assert closed == [False]
    assert writer.kept == [(0, 0)]
    assert done == [(0, True), (1, False), (2, False)]
    assert counts(thread) == (1, 0, 2, 0)


def test_a_writer_that_cannot_be_closed_is_reported(
    start: Callable[..., WriterThread], caplog: pytest.LogCaptureFixture
) -> None:
    class Unclosed(Gated):
        def close(self) -> None:
            raise OSError("stale file handle")

    writer = Unclosed()
    thread = start(writer)
    thread.write(step(0))
    with said(caplog, "writer gated could not be closed"):
        assert thread.close(DEADLINE_S)
    assert writer.kept == [(0, 0)]
    assert counts(thread) == (1, 0, 0, 0)
    assert problem(thread) == "writer gated could not be closed (OSError: stale file handle)"


def test_what_comes_after_the_end_is_given_up_at_once(
    start: Callable[..., WriterThread], caplog: pytest.LogCaptureFixture
) -> None:
    writer, done = Gated(), []
    thread = start(writer)
    assert thread.close(DEADLINE_S)
    with said(caplog, "writer gated has ended: step 3 is not written"):
        thread.write(step(3), done.append)
    assert done == [False]
    assert writer.tries == []
    assert counts(thread) == (0, 0, 1, 0)
    assert thread.status()["queued_bytes"] == 0
    assert problem(thread) == "writer gated did not write 1 window (the last step 3: the writer had ended)"
