"""Ctrl-C and kills of whole programs: what was finished can be read, and no process is left."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

import delve_ray
from tests.chaos.processes import (
    STATS,
    Family,
    Worker,
    check_rows,
    family,
    outputs,
    published,
    run_file,
    times,
    wait_until,
)

pytestmark = pytest.mark.slow

BATCHES = range(4)
FINISHED = 2
"""Windows that are published before a program is interrupted."""
ENDLESS = 1_000_000
RAYS_AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")


# --- programs ------------------------------------------------------------------------------------------


def loop(tracker: Any, worker: Worker, steps: range) -> None:
    """A training loop; each window is there, from all ranks, before the next one begins."""
    for step in steps:
        worker.batches(step, BATCHES[:2])
        time.sleep(0.05)  # somewhere in here it is interrupted
        worker.batches(step, BATCHES[2:])
        tracker.add_saturations(step)
        tracker.metrics(wait=True)
        tracker.flush()


def train(savefile: str, with_ray: bool, with_statement: bool, steps: list[int], resume: bool = False) -> None:
    """Train in this process, without Ray or with one of its own."""
    if with_ray:
        import ray

        ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=100 << 20)
    worker = Worker(0)
    worker.track(savefile, "parquet", stats=STATS, resume=resume)
    with worker.tracker if with_statement else contextlib.nullcontext():
        loop(worker.tracker, worker, range(*steps))


def interrupt_anywhere(folder: str, seed: int, rounds: int) -> None:
    """Interrupt training loops at any instant; prints how many windows each had closed."""

    pressed: list[bool] = []

    def press(*_: object) -> None:
        pressed.append(True)
        raise KeyboardInterrupt

    signal.signal(signal.SIGALRM, press)
    chance = random.Random(seed)
    closed = [0] * rounds
    for number in range(rounds):
        pressed.clear()
        worker = Worker(0)
        worker.track(f"{folder}/{number}", "parquet", stats=STATS)
        with contextlib.suppress(KeyboardInterrupt), worker.tracker:
            signal.setitimer(signal.ITIMER_REAL, chance.uniform(0.001, 0.02))
            while not pressed:  # what is raised in a finalizer comes to nothing
                worker.window(closed[number], BATCHES)
                closed[number] += 1
    print("closed", json.dumps(closed))


def train_worker(config: dict[str, Any]) -> None:
    """A worker of Ray Train."""
    import ray.train

    rank = ray.train.get_context().get_world_rank()
    worker = Worker(rank)
    worker.track("saturation", "parquet", stats=STATS, rank=rank)
    loop(worker.tracker, worker, range(ENDLESS))


def fit(storage: str) -> None:
    """Train with Ray Train, in a Ray of its own."""
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    ray.init(address="local", num_cpus=4, include_dashboard=False, object_store_memory=100 << 20)
    run_config = RunConfig(name="interrupted", storage_path=storage)
    TorchTrainer(train_worker, scaling_config=ScalingConfig(num_workers=2), run_config=run_config).fit()


# --- what they leave behind ----------------------------------------------------------------------------


def finished_steps(savefile: str) -> list[int]:
    """Steps that are published as final, in a run that may not have begun."""
    try:
        table = delve_ray.read_spectra(savefile, columns=["step"], filters=[("final", "==", True)])
    except delve_ray.ReadError:
        return []
    steps: list[int] = table.column("step").to_pylist()
    return steps


def wait_finished(program: subprocess.Popen[bytes], processes: Family, savefile: str) -> None:
    """Wait until a program has published what it is to be interrupted after."""

    def there() -> bool:
        assert program.poll() is None, processes.output()
        return len(finished_steps(savefile)) >= FINISHED

    wait_until(there, "windows")


def interrupt(program: subprocess.Popen[bytes], processes: Family, presses: int = 1) -> str:
    """Press Ctrl-C, which reaches all in the terminal's foreground; what was said, once nobody is left.

    A Ray that is interrupted while it shuts down leaves its own agents to notice that.
    """
    for _ in range(presses):
        with contextlib.suppress(ProcessLookupError):  # it may have ended by the first
            os.killpg(program.pid, signal.SIGINT)
        time.sleep(0.1)
    try:
        program.wait(60)
    except subprocess.TimeoutExpired:
        pytest.fail(f"it goes on after Ctrl-C:\n{processes.output()}")
    processes.wait_gone(besides=RAYS_AGENTS if presses > 1 else ())
    return processes.output()


def check_finished(savefile: str, ranks: range, *, killed: bool = False) -> list[Any]:
    """Every window but the last is exact and complete; the last one may have been open. The rows of the others."""
    rows = [row for _, row in sorted(published(savefile, killed=killed).items())]
    assert [row["step"] for row in rows] == list(range(len(rows)))
    whole = [row["step"] for row in rows if row["samples"] == 16 * len(ranks) * len(BATCHES)]
    assert len(whole) >= FINISHED
    assert whole == list(range(len(whole)))
    assert len(rows) <= len(whole) + 1
    everything = {step: outputs(step, dict.fromkeys(ranks, BATCHES)) for step in whole}
    checked = check_rows(savefile, everything, more=True, killed=killed)
    assert {(row["workers"], row["final"]) for row in checked[:-1]} == {(len(ranks), True)}
    return checked


@pytest.mark.parametrize("with_statement", [True, False], ids=["with", "plain"])
@pytest.mark.parametrize("with_ray", [False, pytest.param(True, marks=pytest.mark.ray)], ids=["alone", "in Ray"])
def test_ctrl_c_in_a_training_loop_leaves_its_files(
    savefile: str, tmp_path: Path, with_ray: bool, with_statement: bool
) -> None:
    with family(tmp_path) as processes:
        program = processes.start(train, savefile, with_ray, with_statement, [ENDLESS])
        wait_finished(program, processes, savefile)
        said = interrupt(program, processes)
    assert "KeyboardInterrupt" in said
    check_finished(savefile, range(1))
    assert run_file(savefile)["end"]["why"] == "closed"
    assert run_file(savefile)["end"]["problems"] == []


def test_ctrl_c_at_any_instant_costs_the_open_window_at_most(tmp_path: Path) -> None:
    with family(tmp_path) as processes:
        said = processes.run(interrupt_anywhere, str(tmp_path / "runs"), 7, times(30))
    (line,) = (line for line in said.splitlines() if line.startswith("closed "))
    for number, closed in enumerate(json.loads(line.removeprefix("closed "))):
        savefile = str(tmp_path / "runs" / str(number))
        expected = {step: outputs(step, {0: BATCHES}) for step in range(closed)}
        rows = check_rows(savefile, expected, more=True)
        assert [(row["workers"], row["final"]) for row in rows] == [(1, True)] * closed, number
        assert len(published(savefile)) <= closed + 1, number
        assert (run_file(savefile)["end"]["why"], run_file(savefile)["end"]["problems"]) == ("closed", [])


@pytest.mark.parametrize("with_ray", [False, pytest.param(True, marks=pytest.mark.ray)], ids=["alone", "in Ray"])
def test_ctrl_c_pressed_again_and_again_ends_the_program(savefile: str, tmp_path: Path, with_ray: bool) -> None:
    """What was written stays; what was to be delivered at the end may be given up."""
    with family(tmp_path) as processes:
        program = processes.start(train, savefile, with_ray, True, [ENDLESS])
        wait_finished(program, processes, savefile)
        interrupt(program, processes, presses=5)
    check_finished(savefile, range(1))
    assert run_file(savefile)["layers"] == [{"name": "Linear", "layer_type": "Linear", "features": 6}]


@pytest.mark.ray
def test_ctrl_c_in_a_driver_of_ray_train_leaves_its_files(tmp_path: Path) -> None:
    savefile = str(tmp_path / "storage" / "interrupted" / "saturation")
    with family(tmp_path) as processes:
        program = processes.start(fit, str(tmp_path / "storage"))
        wait_finished(program, processes, savefile)
        interrupt(program, processes)
    check_finished(savefile, range(2))
    assert [attempt["attempt"] for attempt in run_file(savefile)["attempts"]] == [0]


def test_a_killed_program_is_resumed(savefile: str, tmp_path: Path) -> None:
    with family(tmp_path) as processes:
        program = processes.start(train, savefile, False, True, [ENDLESS])
        wait_finished(program, processes, savefile)
        os.kill(program.pid, signal.SIGKILL)
        program.wait()
        check_finished(savefile, range(1), killed=True)
        assert run_file(savefile)["end"] is None
        replayed = len(finished_steps(savefile)) - 1
        processes.run(train, savefile, False, True, [replayed, replayed + 3], True)
        processes.wait_gone()
    rows = check_rows(savefile, {step: outputs(step, {0: BATCHES}) for step in range(replayed + 3)})
    assert [row["attempt"] for row in rows] == [0] * replayed + [1] * 3
    assert [attempt["attempt"] for attempt in run_file(savefile)["attempts"]] == [0, 1]
    assert json.loads(Path(savefile, "run.json").read_bytes())["end"]["why"] == "closed"
