"""The end of a tracker's thread, and the state that a checkpoint keeps."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

import pytest
import torch

import delve_ray.tracker
from delve_ray import OptionError, SaturationTracker, StoreError, read_spectra
from delve_ray.ending import close_with_thread
from tests.stores import until


def record(tracker: SaturationTracker, model: torch.nn.Module, **step: Any) -> None:
    model(torch.randn(20, 3))
    tracker.add_saturations(**step)


def steps_of(savefile: str) -> list[int]:
    return [row["step"] for row in read_spectra(savefile).to_pylist()]


def test_windows_are_numbered_on_from_a_checkpoint(savefile: str) -> None:
    model = torch.nn.Linear(3, 2)
    with SaturationTracker(savefile, "parquet", model, run="r") as tracker:
        record(tracker, model)
        record(tracker, model)
        state = tracker.state_dict()
        record(tracker, model)
    assert state == {"run": "r", "attempt": 0, "next_step": 2}
    with SaturationTracker(savefile, "parquet", model, resume=True) as tracker:
        tracker.load_state_dict(state)
        record(tracker, model)
        record(tracker, model)
        assert tracker.state_dict() == {"run": "r", "attempt": 1, "next_step": 4}
    rows = [(row["attempt"], row["step"]) for row in read_spectra(savefile).to_pylist()]
    assert rows == [(0, 0), (0, 1), (1, 2), (1, 3)]


def test_what_is_left_open_gets_the_next_number(savefile: str) -> None:
    model = torch.nn.Linear(3, 2)
    with SaturationTracker(savefile, "parquet", model) as tracker:
        tracker.load_state_dict({"next_step": 7, "run": "another", "more": 1})
        model(torch.randn(5, 3))
    assert steps_of(savefile) == [7]


@pytest.mark.parametrize("state", [{}, {"step": 3}, None, 3, {"next_step": -1}, {"next_step": "3"}])
def test_a_state_that_is_none(savefile: str, state: Any) -> None:
    model = torch.nn.Linear(3, 2)
    with SaturationTracker(savefile, "parquet", model) as tracker:
        with pytest.raises(OptionError, match="next_step"):
            tracker.load_state_dict(state)
        record(tracker, model)
    assert steps_of(savefile) == [0]


def test_a_state_that_comes_too_late(savefile: str) -> None:
    model = torch.nn.Linear(3, 2)
    with SaturationTracker(savefile, "parquet", model) as tracker:
        record(tracker, model, step=4)
        with pytest.raises(StoreError, match="after window 4 was closed"):
            tracker.load_state_dict({"next_step": 9})
        record(tracker, model)
    assert steps_of(savefile) == [4, 5]
    with pytest.raises(StoreError, match="after close"):
        tracker.load_state_dict({"next_step": 9})


def test_closing_with_the_thread() -> None:
    closed, go_on = threading.Event(), threading.Event()

    def train() -> None:
        close_with_thread(closed.set)
        go_on.wait()

    thread = threading.Thread(target=train)
    thread.start()
    assert not closed.wait(0.1)
    go_on.set()
    assert closed.wait(60)


def test_the_main_thread_is_left_to_the_process() -> None:
    threads = threading.active_count()
    close_with_thread(lambda: None)
    assert threading.active_count() == threads


def test_the_model_is_counted(savefile: str) -> None:
    import json
    from pathlib import Path

    shared = torch.nn.Linear(3, 3)
    model = torch.nn.Sequential(shared, shared, torch.nn.LazyLinear(2))
    shared.bias.requires_grad_(False)
    with SaturationTracker(savefile, "parquet", model):
        pass
    found = json.loads(Path(savefile, "run.json").read_text())
    assert found["model"] == {"num_parameters": 12, "num_trainable_parameters": 9}
    assert not {"writers", "writer_args", "model"} & set(found["options"])


@pytest.mark.parametrize(("rank", "world_size", "found"), [("1", "2", True), ("", "2", False), ("x", "y", False)])
def test_rank_and_world_size_of_a_launcher(
    savefile: str, monkeypatch: pytest.MonkeyPatch, rank: str, world_size: str, found: bool
) -> None:
    from delve_ray.connect import identify

    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world_size)
    identity = identify(savefile, "run", None, None)
    assert (identity.rank, identity.world_size) == ((1, 2) if found else (0, 1))
    assert identify(savefile, "run", 0, 1).world_size == 1, "what the user says, holds"


def test_a_ray_address_where_nobody_is(savefile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from delve_ray.connect import identify

    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    assert not identify(savefile, "run", 0, 1).on_ray, "one process alone needs no cluster"


def test_who_closes_second_waits_for_the_first_and_closes_nothing(
    savefile: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the end of the process, and where the thread that trained has ended, somebody may be closing already."""
    tracker = SaturationTracker(savefile, "parquet", torch.nn.Linear(3, 2))
    began, go_on, order = threading.Event(), threading.Event(), list[str]()
    depart = delve_ray.tracker.depart

    def slow(*args: Any, **options: Any) -> None:
        tracker.close()  # as a signal handler may, in the same thread
        order.append("begins")
        began.set()
        assert go_on.wait(30)
        depart(*args, **options)
        order.append("ends")

    monkeypatch.setattr("delve_ray.tracker.depart", slow)
    first = threading.Thread(target=tracker.close, daemon=True)
    first.start()
    assert began.wait(30)

    def close() -> None:
        tracker.close()
        order.append("second")

    second = threading.Thread(target=close, daemon=True)
    second.start()
    second.join(0.3)  # until it is as far as it gets
    go_on.set()
    second.join(30)
    first.join(30)
    assert order == ["begins", "ends", "second"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no forks")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_records_nothing_and_waits_for_no_lock(savefile: str) -> None:
    """A thread that it does not have may have held the lock at that moment."""
    model = torch.nn.Linear(3, 2)
    output = model(torch.randn(4, 3))
    with SaturationTracker(savefile, "parquet", model) as tracker:
        held, go_on = threading.Event(), threading.Event()

        def hold() -> None:
            with tracker._recorder.lock:
                held.set()
                go_on.wait(60)

        thread = threading.Thread(target=hold, daemon=True)
        thread.start()
        assert held.wait(30)
        (hook,) = model._forward_hooks.values()
        child = os.fork()
        if not child:
            hook(model, (), output)
            os._exit(17 + tracker.is_recording())
        found: list[int] = []

        def ended() -> bool:
            pid, status = os.waitpid(child, os.WNOHANG)
            found.append(os.waitstatus_to_exitcode(status))
            return pid == child

        try:
            until(ended, "the child waits for a lock")
        finally:
            if found[-1] != 17:
                os.kill(child, signal.SIGKILL)
            go_on.set()
            thread.join(30)
        assert found[-1] == 17
        assert tracker.is_recording()
