"""A savefile whose disk is full, whose directory goes, or whose files were cut: rows wait, and nothing is torn.

The store is in this process, in an actor, or in a front, which publishes, and shards, which save what they have.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import delve_ray
from delve_ray.storage import Storage
from delve_ray.store.core import CovarianceStore
from delve_ray.store.protocol import StoreConfig
from tests.chaos.processes import (
    NEVER_S,
    STATS,
    Worker,
    check_rows,
    family,
    make_model,
    outputs,
    run_file,
    statuses,
    store,
    store_log,
    wait_until,
)

pytestmark = pytest.mark.slow

DISK_BYTES, ROOM_BYTES = 20 << 20, 4 << 20
STEPS, BATCHES = range(6), range(4)
FEATURES = {"by a file": (6, 5), "by covariances": (500, 490)}
"""Of the layers, by what fills the disk: in the second case a window's covariances take 2 MB, compressed over 1. Two
shards have one each."""
SMALL = FEATURES["by a file"]


# --- disks and stores ----------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 20 MB."""
    where = tmp_path / "disk"
    where.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "none", str(where)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a tmpfs cannot be mounted here: that takes root")
    try:
        yield where
    finally:
        subprocess.run(["umount", "--lazy", str(where)], check=True)


def fill(ballast: Path, leave: int = 0) -> None:
    """Fill the disk that a file is on, but for so many bytes, with that file."""
    with ballast.open("wb", buffering=0) as stream:
        with pytest.raises(OSError) as full:
            while True:
                stream.write(bytes(1 << 16))
        assert full.value.errno == errno.ENOSPC
        stream.truncate(max(0, stream.tell() - leave))


@dataclass
class Place:
    """A store wherever it is: what a tracker takes, what it and its shards say of themselves, and what they log."""

    store: Any
    statuses: Callable[[], list[dict[str, Any]]]
    log: Callable[[], str]


@contextlib.contextmanager
def in_process(savefile: str, caplog: pytest.LogCaptureFixture) -> Iterator[Place]:
    """A store as a tracker makes it without Ray."""
    config = StoreConfig("in-process", savefile, 1, stats=STATS, publish_every=0.0, silent_after=0.0)
    core = CovarianceStore(config)
    yield Place(core, lambda: [core.status()], lambda: caplog.text)


@contextlib.contextmanager
def in_ray(savefile: str, name: str, num_shards: int) -> Iterator[Place]:
    """An actor, or a front and shards, which write snapshots to the savefile as well."""
    with store(savefile, name, silent_after=NEVER_S, num_shards=num_shards) as handle:
        wait_until(lambda: all("pid" in status for status in statuses(handle)), "all shards")
        pids = [status["pid"] for status in statuses(handle)]
        yield Place(handle, lambda: statuses(handle), lambda: store_log(*pids))


IN_RAY = {"alone": 1, "shards": 2}
"""The number of shards of the stores that are actors."""


@pytest.fixture(params=["in process", *(pytest.param(name, marks=pytest.mark.ray) for name in IN_RAY)])
def place(request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture) -> Callable[[str], Any]:
    """What makes a store of a savefile."""
    if request.param == "in process":
        return lambda savefile: in_process(savefile, caplog)
    request.getfixturevalue("ray_session")
    return lambda savefile: in_ray(savefile, request.node.name, IN_RAY[request.param])


# --- full disks ----------------------------------------------------------------------------------------


def check_trouble(place: Place, savefile: str, *, to_the_brim: bool) -> None:
    """All stores say that the disk is full, and have lost nothing; `to_the_brim`: there is no room for anything."""
    statuses = wait_until(
        lambda: (s := place.statuses())[0]["writers"][0]["last_error"] and s, "an error of the writer"
    )
    front, shards = statuses[0], statuses[1:]
    assert "No space left on device" in front["writers"][0]["last_error"]
    assert front["writers"][0]["queued"] > 0
    assert any("has failed to write step" in problem for problem in front["problems"])
    assert "writer parquet failed to write step" in place.log()
    for status in statuses:
        assert [(writer["failed"], writer["dropped"]) for writer in status["writers"]] == [(0, 0)]
        assert status["waiting_windows"] > 0, "what is published and not written is kept"
    # Without shards that have the moments, a front's snapshot is so small that there may be room for it.
    for index in range(len(statuses)) if to_the_brim or not shards else range(1, len(statuses)):
        if "snapshots" in statuses[index]:
            check_unsaved(place, index)
    assert delve_ray.read_spectra(savefile).num_rows < len(STEPS) * len(SMALL), "what is there can be read"


def check_unsaved(place: Place, index: int) -> None:
    """The store says that its state cannot be saved."""
    status = wait_until(
        lambda: (s := place.statuses()[index])["snapshots"]["last_error"] and s, "an error of the saver"
    )
    assert "No space left on device" in status["snapshots"]["last_error"]
    assert any("snapshots cannot be written" in problem for problem in status["problems"])
    assert f"{status['savefile']}: the store's state cannot be saved" in place.log()


@pytest.mark.parametrize("filled", FEATURES)
def test_rows_wait_for_a_full_disk(disk: Path, filled: str, place: Callable[[str], Any]) -> None:
    savefile, ballast, features = str(disk / "run"), disk / "ballast", FEATURES[filled]
    with place(savefile) as here:
        worker = Worker(0, features)
        worker.track(store=here.store)
        worker.window(0, BATCHES)
        worker.tracker.flush()
        fill(ballast, ROOM_BYTES if filled == "by covariances" else 0)
        for step in STEPS[1:]:
            worker.window(step, BATCHES)
        metrics = worker.tracker.metrics(wait=True)  # computed, whatever the disk says
        check_trouble(here, savefile, to_the_brim=filled == "by a file")
        assert worker.tracker.is_recording()
        ballast.unlink()
        worker.tracker.close()
        log = here.log()
    model = make_model(features)
    rows = check_rows(savefile, {step: outputs(step, {0: BATCHES}, model) for step in STEPS})
    assert [(row["workers"], row["final"]) for row in rows] == [(1, True)] * len(STEPS)
    assert metrics["saturation/train/0"] == rows[-1]["saturation"]
    assert "writer parquet works again after" in log
    end = run_file(savefile)["end"]
    assert (end["why"], end["problems"]) == ("closed", [])
    assert list(Path(savefile).rglob("*.tmp")) == [], "nothing is left of files that could not be written"


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("num_shards", IN_RAY.values(), ids=IN_RAY)
def test_a_run_that_ends_on_a_full_disk_is_written_once_there_is_room(
    disk: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, num_shards: int
) -> None:
    savefile, ballast = str(disk / "run"), disk / "ballast"
    with in_ray(savefile, "late-disk", num_shards) as here:
        worker = Worker(0, SMALL)
        worker.track(store=here.store, spill_dir=tmp_path / "spill")
        worker.window(0, BATCHES)
        worker.tracker.flush()
        fill(ballast)
        for step in STEPS[1:]:
            worker.window(step, BATCHES)
        worker.tracker.close(timeout=3.0)
        assert "rank 0 of run late-disk did not take leave in time: the files are not complete yet" in caplog.text
        ballast.unlink()
        wait_until(lambda: here.statuses()[0]["finished"], "the end of the run")
    check_rows(savefile, {step: outputs(step, {0: BATCHES}, make_model(SMALL)) for step in STEPS})
    end = run_file(savefile)["end"]
    assert (end["why"], end["problems"]) == ("closed", [])


def test_a_savefile_that_is_removed_is_made_anew(savefile: str, place: Callable[[str], Any]) -> None:
    with place(savefile) as here:
        worker = Worker(0, SMALL)
        worker.track(store=here.store)
        worker.window(0, BATCHES)
        worker.tracker.flush()
        wait_until(
            lambda: not any(status.get("snapshots", {}).get("pending") for status in here.statuses()),
            "stores that have saved everything",
        )
        shutil.rmtree(savefile)
        for step in STEPS[1:]:
            worker.window(step, BATCHES)
        worker.tracker.flush()
        assert delve_ray.read_spectra(savefile).column("step").to_pylist() == [s for s in STEPS[1:] for _ in SMALL]
        worker.tracker.close()
    check_rows(savefile, {step: outputs(step, {0: BATCHES}, make_model(SMALL)) for step in STEPS[1:]})
    content = run_file(savefile)
    assert (content["end"]["why"], content["end"]["problems"]) == ("closed", [])
    assert [attempt["attempt"] for attempt in content["attempts"]] == [0]
    assert [layer["name"] for layer in content["layers"]] == ["0", "1"]


# --- files that a kill has cut -------------------------------------------------------------------------

CUT = 2
"""The step whose covariances are there and whose spectra are not."""


def train(savefile: str, begin: int, die: bool, resume: bool) -> None:
    """Train without Ray from a step on; the process may die between two files."""
    write = Storage.write_atomic

    def write_or_die(self: Storage, relative: str, data: Any) -> None:
        if relative.startswith(f"spectra/000000-{CUT:010d}"):
            os.kill(os.getpid(), signal.SIGKILL)
        write(self, relative, data)

    if die:
        Storage.write_atomic = write_or_die
    worker = Worker(0)
    worker.track(savefile, "parquet", stats=STATS, resume=resume)
    for step in STEPS[begin:]:
        worker.window(step, BATCHES)
        worker.tracker.flush()
    worker.tracker.close()


def test_a_run_that_was_cut_between_covariances_and_spectra_reads(savefile: str, tmp_path: Path) -> None:
    with family(tmp_path) as processes:
        assert processes.start(train, savefile, 0, True, False).wait(120) == -signal.SIGKILL
        files = {kind: sorted(os.listdir(Path(savefile, kind))) for kind in ("spectra", "covariances")}
        assert len(files["covariances"]) == len(files["spectra"]) + 1
        assert delve_ray.read_spectra(savefile).column("step").to_pylist() == list(range(CUT))
        ahead = delve_ray.read_covariances(savefile).to_pylist()
        assert [(row["step"], row["samples"]) for row in ahead] == [(step, 16 * 4) for step in range(CUT + 1)]
        assert run_file(savefile)["end"] is None
        processes.run(train, savefile, CUT, False, True)
    rows = check_rows(savefile, {step: outputs(step, {0: BATCHES}) for step in STEPS})
    assert [row["attempt"] for row in rows] == [0 if step < CUT else 1 for step in STEPS]
    assert run_file(savefile)["end"]["why"] == "closed"
