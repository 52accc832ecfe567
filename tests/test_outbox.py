"""What waits at a worker: bounded in memory, whole on disk, offered again until it is safe."""

from __future__ import annotations

import os
import stat
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest

from delve_ray.moments import F64
from delve_ray.outbox import Outbox, spill_folder
from delve_ray.parcels import decode_parcel, parcel_name
from delve_ray.storage import Storage
from delve_ray.store.protocol import Ack, Delta, LayerInfo, fingerprint
from tests.stores import config, park, source

SIZE = 1000
NBYTES = 8 * SIZE
LAYERS = [LayerInfo("a/../b", "Linear", 2)]


def delta(seq: int, **changes: object) -> Delta:
    fields: dict[str, object] = {
        "source": source(1, name="0123456789abcdef"),
        "attempt": 0,
        "seq": seq,
        "window": seq,
        "step": 10 + seq,
        "closes": True,
        "labelled": True,
        "entries": ((0, 0, 5, 0),),
    }
    return Delta(**{**fields, **changes})  # type: ignore[arg-type]


def values(seq: int) -> F64:
    return np.full(SIZE, float(seq))


@pytest.fixture
def box(tmp_path: Path) -> Outbox:
    return Outbox(config(run="../evil run"), LAYERS, str(tmp_path / "spill"))


def fill(box: Outbox, count: int, memory: int = 3 * NBYTES, limit: int = 10**9) -> None:
    for seq in range(count):
        park(box, delta(seq), values(seq), first=True, memory=memory, limit=limit)
        assert box.status()["memory_bytes"] <= max(memory, NBYTES)


def drain(box: Outbox, above: tuple[int, ...] = ()) -> list[int]:
    """Send what waits, one after the other, as the sender does; each is what was put in."""
    sent = []
    while (found := box.next()) is not None:
        header, buffer = found
        assert np.array_equal(buffer, values(header.seq))
        assert header.checksum == fingerprint(header, buffer), "whole, from memory or from disk"
        sent.append(header.seq)
        box.done(header.seq)
        box.acknowledge(Ack(0, next_seq=header.seq + 1, above=above))
    return sent


def test_what_does_not_fit_lies_on_disk_and_comes_back_in_order(box: Outbox) -> None:
    fill(box, 10)
    assert box.status() == {
        "deltas": 10,
        "unmerged": 10,
        "memory_bytes": 3 * NBYTES,
        "disk_bytes": 7 * NBYTES,
        "on_disk": 7,
        "lost": 0,
    }
    folder = Path(box.folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700, "other users do not see it"
    assert len(list(folder.iterdir())) == 7
    assert box.next() is not None
    assert box.next()[0].seq == 0, "the next to go is in memory"  # type: ignore[index]
    assert drain(box) == list(range(10))
    box.acknowledge(Ack(0, next_seq=10, durable=10))
    assert len(box) == 0
    assert list(folder.iterdir()) == [], "what is safe is not kept"
    box.clear()
    assert not folder.exists()


def test_what_is_merged_is_kept_until_it_is_durable(box: Outbox) -> None:
    fill(box, 6)
    assert drain(box) == [0, 1, 2, 3, 4, 5]
    assert len(box) == 6
    assert not box.acknowledge(Ack(0, next_seq=6, durable=2))
    assert len(box) == 4
    assert box.acknowledge(Ack(0, next_seq=3, above=(4,), durable=2)), "the store has gone back"
    assert [item.seq for item in box.waiting] == [3, 5]
    assert drain(box, above=(4,)) == [3, 5]
    box.offer_all()
    assert drain(box) == [2, 3, 4, 5]


def test_what_a_worker_still_has_is_told_to_a_store_that_lost_it(box: Outbox) -> None:
    held = box.held(3, 8, 4, first=True)
    assert (held.attempt, held.seq, held.window, held.whole) == (3, 8, 4, True)
    for seq in range(4, 7):
        park(box, delta(seq, attempt=3), values(seq), first=seq == 6, memory=10**9, limit=10**9)
    box.acknowledge(Ack(0, next_seq=7, durable=5))
    held = box.held(3, 7, 7, first=True)
    assert (held.attempt, held.seq, held.window, held.whole) == (3, 5, 5, False)


def test_a_folder_that_cannot_be_written_uses_memory_and_then_gives_rows_up(
    box: Outbox, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Path(box.folder).parent.joinpath("spill").write_text("in the way")
    for seq in range(6):
        park(box, delta(seq), values(seq), first=True, memory=NBYTES, limit=3 * NBYTES)
        assert box.status()["memory_bytes"] <= 3 * NBYTES
    assert box.status()["lost"] == 3
    assert [(d.seq, d.complete, bool(d.entries)) for d in box.waiting] == [
        (0, True, True),
        (1, True, True),
        (2, True, True),
        (3, False, False),
        (4, False, False),
        (5, False, False),
    ]
    assert all(d.closes for d in box.waiting), "the window still closes, and says what is missing"
    assert "rows of step 15 are given up" in caplog.text
    assert box.waiting[-1].checksum == fingerprint(box.waiting[-1], np.empty(0))


def test_a_file_that_went_away_or_was_damaged_is_an_incomplete_share(box: Outbox) -> None:
    fill(box, 3, memory=0)
    first, second = sorted(Path(box.folder).iterdir())[:2]
    first.unlink()
    second.write_bytes(second.read_bytes()[:-1])
    for seq in range(3):
        header, buffer = box.next() or (None, None)
        assert header is not None
        assert buffer is not None
        assert (header.seq, header.complete, buffer.size) == (seq, seq == 2, SIZE if seq == 2 else 0)
        box.acknowledge(Ack(0, next_seq=seq + 1))
    assert len(box.lost_rows) == 2


def test_what_follows_is_what_comes_next_as_long_as_it_is_in_memory(box: Outbox) -> None:
    fill(box, 4, memory=4 * NBYTES)
    found = box.following(0)
    assert found is not None
    assert (found[0].seq, np.array_equal(found[1], values(1))) == (1, True)
    box.acknowledge(Ack(0, next_seq=1, above=(1, 2)))
    found = box.following(0)
    assert found is not None
    assert found[0].seq == 3
    assert box.following(3) is None


def test_what_follows_on_disk_is_not_read_ahead(box: Outbox) -> None:
    fill(box, 3, memory=0)
    assert box.following(0) is None


def test_everything_can_be_written_for_a_recovery(box: Outbox, tmp_path: Path) -> None:
    fill(box, 5)
    paths = box.write_all(str(tmp_path / "undelivered"))
    assert [os.path.basename(path) for path in paths] == [parcel_name(delta(seq)) for seq in range(5)]
    for seq, path in enumerate(paths):
        parcel = decode_parcel(Path(path).read_bytes(), path)
        assert (parcel.delta.seq, parcel.first, parcel.layers) == (seq, True, tuple(LAYERS))
        assert parcel.config == config(run="../evil run")
        assert np.array_equal(parcel.buffer, values(seq))
        assert parcel.delta == delta(seq).sealed(values(seq))


@pytest.mark.parametrize("run", ["../../etc", "/absolute", "a\0b", "<b>", "ü" * 300, "."])
def test_a_runs_name_is_no_part_of_a_path(run: str, tmp_path: Path) -> None:
    folder = spill_folder(run, "0123456789abcdef", str(tmp_path))
    assert os.path.dirname(folder) == str(tmp_path)
    assert set(os.path.basename(folder)) <= set("0123456789abcdef-")
    assert folder != spill_folder(run + "x", "0123456789abcdef", str(tmp_path))
    assert os.path.dirname(spill_folder(run, "0123", None)).startswith(
        os.path.join(tempfile.gettempdir(), "delve_ray-")
    )


def answer_while_it_is_read(box: Outbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the store's answer to the first delta come when somebody begins to read its file."""
    read = Storage.read_buffer

    def late(self: Storage, name: str) -> object:
        box.acknowledge(Ack(0, next_seq=1, durable=1))
        return read(self, name)

    monkeypatch.setattr(Storage, "read_buffer", late)


def test_a_file_that_goes_because_the_store_has_it_is_no_loss(box: Outbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaving hears it from the store while the sender reads the file."""
    fill(box, 2, memory=0)
    answer_while_it_is_read(box, monkeypatch)
    header, buffer = box.next() or (None, None)
    assert header is not None
    assert buffer is not None
    assert header.seq == 1
    assert header.complete
    assert np.array_equal(buffer, values(1))
    assert box.lost_rows == []


def test_what_is_being_sent_is_not_given_up(box: Outbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sender takes it while it is written to a disk that is full."""
    taken = []

    def full(item: object) -> None:
        taken.append(box.next())
        raise OSError("no space left")

    monkeypatch.setattr(box, "_spill", full)
    park(box, delta(0), values(0), first=True, memory=0, limit=0)
    assert len(taken) == 1
    header, buffer = box.next() or (None, None)
    assert header is not None
    assert buffer is not None
    assert header.complete
    assert buffer.size == SIZE
    assert box.lost_rows == []


def test_what_a_late_answer_takes_away_needs_no_recovery(
    box: Outbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(box, 2, memory=0)
    answer_while_it_is_read(box, monkeypatch)
    paths = box.write_all(str(tmp_path / "kept"))
    assert paths == [str(tmp_path / "kept" / parcel_name(delta(1)))]


def test_a_signal_handler_may_look_where_its_thread_was_interrupted(box: Outbox) -> None:
    fill(box, 2)
    found = []

    def interrupted() -> None:
        with box._lock:
            found.append(len(box.waiting))

    thread = threading.Thread(target=interrupted, daemon=True)
    thread.start()
    thread.join(20)
    assert found == [2]
    assert box.unmerged == 2
