"""Processes that tests start, stop, kill and count, and workers whose rows their rank, step and batch determine."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

import delve_ray
from delve_ray.moments import unpack_triangle
from tests.helpers import TOLERANCE, two_pass_covariance

F64 = npt.NDArray[np.float64]

REPOSITORY = str(Path(__file__).resolve().parents[2])
FACTOR = max(1.0, float(os.environ.get("DELVE_RAY_CHAOS", "1")))
"""How much longer than in CI the tests of this folder run."""
MARK = "DELVE_RAY_CHAOS_FAMILY"
STATS = ("saturation", "cov")
WITHIN_S = 120.0
"""How long anything may take that a test waits for, on a machine that is busy otherwise."""
NEVER_S = 3600.0


def times(count: int) -> int:
    """A number of repetitions: this many in CI."""
    return int(count * FACTOR)


def wait_until(condition: Callable[[], Any], what: str, within: float = WITHIN_S) -> Any:
    """Wait until a condition holds, and return what it gave. Raises AssertionError when it takes too long."""
    deadline = time.monotonic() + within
    while not (found := condition()):
        assert time.monotonic() < deadline, f"still waiting after {within:g} s: {what}"
        time.sleep(0.1)
    return found


# --- a family of processes -----------------------------------------------------------------------------


class Family:
    """Processes that a test starts and all that those start, Ray's included: they carry one mark in their environment.

    What they print goes into a file in `folder`.
    """

    def __init__(self, folder: Path) -> None:
        self._mark = uuid.uuid4().hex
        self._folder = folder
        self._logs: list[Path] = []

    def start(self, function: Callable[..., object], *args: object) -> subprocess.Popen[bytes]:
        """Start a module's function in a process that leads a group of its own, as a terminal's command does."""
        code = f"import json, sys; from {function.__module__} import {function.__name__} as main; "
        command = [sys.executable, "-c", code + "main(*json.loads(sys.argv[1]))", json.dumps(args)]
        environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_ADDRESS")}
        environment |= {MARK: self._mark, "PYTHONPATH": REPOSITORY, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        self._logs.append(self._folder / f"output-{len(self._logs)}.txt")
        with self._logs[-1].open("wb") as stream:
            return subprocess.Popen(
                command, env=environment, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
            )

    def run(self, function: Callable[..., object], *args: object, within: float = 240.0) -> str:
        """Run a module's function in a process, and return what it printed; it has to end well."""
        process = self.start(function, *args)
        try:
            code = process.wait(within)
        except subprocess.TimeoutExpired:
            code = None
        assert code == 0, f"it ended with {code}:\n{self.output()}"
        return self.output()

    def output(self) -> str:
        """What the process that was started last has printed."""
        return self._logs[-1].read_text(errors="replace")

    def pids(self) -> list[int]:
        """Those that run."""
        mark = f"{MARK}={self._mark}".encode()
        return [pid for pid in _processes() if mark in _read(pid, "environ").split(b"\0")]

    def wait_gone(self, within: float = 20.0, *, besides: tuple[str, ...] = ()) -> None:
        """Wait until none is left, `besides` those of such titles. Raises AssertionError that names those that are."""
        deadline = time.monotonic() + within
        while left := [name for pid in self.pids() if (name := title(pid)) and not name.startswith(besides)]:
            assert time.monotonic() < deadline, f"left behind: {left}"
            time.sleep(0.2)

    def end(self) -> None:
        """Kill those that are left, each by its number."""
        while left := self.pids():
            for pid in left:
                send(pid, signal.SIGKILL)
            time.sleep(0.1)


@contextlib.contextmanager
def family(folder: Path) -> Iterator[Family]:
    """A family of which nobody is left in the end."""
    members = Family(folder)
    try:
        yield members
    finally:
        members.end()


def send(pid: int, number: int) -> None:
    """Send a signal to a process that may be gone."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    """A process that does nothing meanwhile."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        send(pid, signal.SIGCONT)


def title(pid: int) -> str:
    """What a process calls itself."""
    return _read(pid, "cmdline").replace(b"\0", b" ").decode(errors="replace").strip()


def memory(pid: int | str = "self") -> dict[str, int]:
    """Bytes of a process's memory by the names of /proc, such as VmRSS, VmHWM (its peak) and RssAnon."""
    lines = (line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {words[0].rstrip(":"): 1024 * int(words[1]) for words in lines if words[-1] == "kB"}


def _processes() -> list[int]:
    """All that run, but for those that have ended and wait for their parent."""
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return [pid for pid in pids if b") Z " not in _read(pid, "stat")]


def _read(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""


# --- rows that everybody can compute -------------------------------------------------------------------


class Branches(nn.ModuleList):
    """Layers of one input. What it gives has the columns of all of them, one after the other."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([layer(x) for layer in self], dim=1)


Features = int | Sequence[int]
"""Of one Linear, or of several with the same input."""


def make_model(features: Features = 6) -> nn.Module:
    """A Linear of 4 to so many features, or several, always the same."""
    with torch.random.fork_rng():
        if isinstance(features, int) or len(features) == 1:
            (features,) = [features] if isinstance(features, int) else features
            torch.manual_seed(features)
            return nn.Linear(4, features)
        torch.manual_seed(sum(features))
        return Branches(nn.Linear(4, each) for each in features)


def batch(rank: int, step: int, number: int, rows: int = 16) -> torch.Tensor:
    """The inputs of a rank's batch in a step."""
    seed = int(np.random.SeedSequence([rank, step, number]).generate_state(1)[0])
    return torch.randn(rows, 4, generator=torch.Generator().manual_seed(seed))


def outputs(step: int, batches: Mapping[int, Iterable[int]], model: nn.Module | None = None) -> F64:
    """What the model gives in a step for batches by rank, in float64: the rows that should be counted."""
    model = model or make_model()
    with torch.no_grad():
        parts = [model(batch(rank, step, number)) for rank, numbers in batches.items() for number in numbers]
    return np.asarray(torch.cat(parts).double().numpy())


class Worker:
    """One rank, as a Ray actor or in this process: batches, windows, and its tracker's answers."""

    def __init__(self, rank: int, features: Features = 6) -> None:
        self.rank = rank
        self.model = make_model(features)

    def track(self, *args: Any, **options: Any) -> int:
        """Make the tracker, which ships nothing by itself before a window is closed; the process's number."""
        options = {"rank": self.rank, "publish_every": NEVER_S} | options
        self.tracker = delve_ray.SaturationTracker(*args, modules=self.model, **options)
        return os.getpid()

    def batches(self, step: int, numbers: Sequence[int]) -> None:
        """See batches of a step."""
        with torch.no_grad():
            for number in numbers:
                self.model(batch(self.rank, step, number))

    def window(self, step: int, numbers: Sequence[int] = ()) -> None:
        """See batches of a step, and close its window."""
        self.batches(step, numbers)
        self.tracker.add_saturations(step)

    def call(self, method: str, *args: Any, **options: Any) -> Any:
        """Call a method of the tracker."""
        return getattr(self.tracker, method)(*args, **options)

    def outbox(self) -> dict[str, int]:
        """What waits here."""
        return self.tracker._shipper.outbox.status()


# --- what was published --------------------------------------------------------------------------------


def published(savefile: str, *, killed: bool = False) -> dict[tuple[str, int, str], dict[str, Any]]:
    """The rows of spectra and covariances together, by phase, step and layer; each there once, and in both.

    But for the covariances of one window: a writer that is killed may have written those and not yet the spectra.
    """
    spectra, covariances = (
        {(row["phase"], row["step"], row["layer"]): row for row in table.to_pylist()}
        for table in (delve_ray.read_spectra(savefile), delve_ray.read_covariances(savefile))
    )
    assert len(spectra) == delve_ray.read_spectra(savefile).num_rows, "no row twice"
    assert spectra.keys() <= covariances.keys()
    ahead = {(phase, step) for phase, step, _ in covariances.keys() - spectra.keys()}
    assert not ahead or (killed and len(ahead) == 1 and max(ahead)[1] > max(step for _, step, _ in spectra))
    return {key: covariances[key] | row for key, row in spectra.items()}


OF_A_WINDOW = ("run", "attempt", "revision", "workers", "world_size", "final", "samples", "wall_time")
"""Columns in which all layers that see the same batches agree: a window is published as one."""


def check_rows(savefile: str, expected: Mapping[int, F64], *, more: bool = False, killed: bool = False) -> list[Any]:
    """Compare the published steps of all layers with these rows, whose columns are those of the layers in order.

    Returns what was published of the first layer, by step; in `OF_A_WINDOW` the others are equal. With `more` there may
    be other steps, too.
    """
    found = published(savefile, killed=killed)
    layers, steps = (sorted({key[place] for key in found}) for place in (2, 1))
    assert layers in ([], ["Linear"], [str(index) for index in range(len(layers))])
    assert set(found) == {("train", step, layer) for step in steps for layer in layers}
    assert sorted(expected) == (sorted(set(steps) & expected.keys()) if more else steps)
    for step, rows in expected.items():
        own = [found["train", step, layer] for layer in layers]
        *ends, width = np.cumsum([row["features"] for row in own])
        assert width == rows.shape[1], step
        for row, values in zip(own, np.split(rows, ends, axis=1), strict=True):
            _check_row(row, values)
            assert [row[name] for name in OF_A_WINDOW] == [own[0][name] for name in OF_A_WINDOW], step
    return [found["train", step, layers[0]] for step in sorted(expected)]


def _check_row(row: Mapping[str, Any], rows: F64) -> None:
    """Compare what was published of a layer in a step with these rows."""
    reference = two_pass_covariance(rows)
    eigenvalues = np.linalg.eigvalsh(reference)[::-1]
    covariance = unpack_triangle(np.asarray(row["covariance"]), reference.shape[0])
    assert row["samples"] == len(rows), row["step"]
    assert np.abs(covariance - reference).max() < TOLERANCE * eigenvalues[0], row["step"]
    assert np.abs(np.asarray(row["eigenvalues"]) - eigenvalues).max() < TOLERANCE * eigenvalues[0], row["step"]


def run_file(savefile: str) -> dict[str, Any]:
    """run.json."""
    content: dict[str, Any] = json.loads(Path(savefile, "run.json").read_bytes())
    return content


# --- stores in Ray -------------------------------------------------------------------------------------


def store_log(*pids: int) -> str:
    """What the processes of actors in this Ray have written to their logs."""
    import ray._private.worker

    logs = Path(ray._private.worker._global_node.get_logs_dir_path())
    paths = (path for pid in pids for path in sorted(logs.glob(f"worker-*-{pid}.err")))
    return "".join(path.read_text(errors="replace") for path in paths)


def statuses(handle: Any) -> list[dict[str, Any]]:
    """What a store says of itself, and after it what its shards do."""
    import ray

    status = ray.get(handle.status.remote())
    return [status, *status.get("shards", [])]


@contextlib.contextmanager
def store(savefile: str, run: str, **options: Any) -> Iterator[Any]:
    """A store in this Ray, ended in the end whatever state it is in, with its shards."""
    import ray

    from delve_ray.store import actor
    from delve_ray.store.protocol import StoreConfig

    options = {"world_size": 1, "stats": STATS, "snapshot_every": 0.5, "num_shards": 1} | options
    handle = actor.start(StoreConfig(run=run, savefile=savefile, publish_every=0.0, **options))
    try:
        yield handle
    finally:
        shards = range(options["num_shards"]) if options["num_shards"] > 1 else ()
        for shard in (None, *shards):
            with contextlib.suppress(delve_ray.StoreError):  # it has ended, and its name is free for the next
                while True:
                    ray.kill(actor.find(run, shard=shard), no_restart=True)
                    time.sleep(0.02)


@contextlib.contextmanager
def workers(ranks: Iterable[int], features: Features = 6) -> Iterator[list[Any]]:
    """Workers as Ray actors, each in a process of its own."""
    import ray

    made = [ray.remote(Worker).options(num_cpus=0.1).remote(rank, features) for rank in ranks]
    try:
        yield made
    finally:
        for worker in made:
            ray.kill(worker)
