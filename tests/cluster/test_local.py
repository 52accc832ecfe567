"""The cluster on one machine, with the demo on it as a job, from nothing to nothing."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pyarrow.compute as pc
import pytest

from delve_ray import read_scalars, read_spectra
from delve_ray.analysis.table import layer_table
from tests.cluster.files import CLUSTER

MARK = "DELVE_RAY_TEST_CLUSTER"
TIMEOUT_S = 240
SETTLE_S = 30
LAYERS = ["0", "2", "4"]

needs_jobs = pytest.mark.skipif(
    importlib.util.find_spec("aiohttp_cors") is None, reason='needs job submission: pip install "ray[default]"'
)


def started_with(mark: str) -> list[int]:
    """Processes that inherited the mark."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={mark}".encode() in (process / "environ").read_bytes().split(b"\0"):
                found.append(int(process.name))
        except OSError:  # it has ended
            continue
    return found


def local(
    directory: Path, *arguments: str, meanwhile: Callable[[subprocess.Popen[str]], None] = lambda process: None
) -> tuple[int, str, str]:
    """Run local.py; its status, output and errors. Fails where it leaves processes or temporary files behind."""
    mark = uuid.uuid4().hex
    scratch = Path(tempfile.mkdtemp(prefix="d", dir="/tmp"))  # short, as Ray puts sockets below it
    process = subprocess.Popen(
        [sys.executable, CLUSTER / "local.py", *arguments],
        cwd=directory,
        env=os.environ | {MARK: mark, "OMP_NUM_THREADS": "1", "RAY_TMPDIR": str(scratch)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        meanwhile(process)
        output, errors = process.communicate(timeout=TIMEOUT_S)
        deadline = time.monotonic() + SETTLE_S
        while started_with(mark) and time.monotonic() < deadline:
            time.sleep(0.2)
        left = started_with(mark)
    finally:
        for pid in started_with(mark):
            os.kill(pid, signal.SIGKILL)
    assert not left, output + errors
    scratch.rmdir()  # which it can be when nothing is in it
    return process.returncode, output, errors


@needs_jobs
@pytest.mark.slow
@pytest.mark.ray
def test_the_demo_runs_as_a_job_on_nodes_of_their_own(tmp_path: Path) -> None:
    status, output, errors = local(tmp_path, "--storage", "shared")
    assert status == 0, output + errors
    (run,) = (tmp_path / "shared").glob("demo-*/saturation")
    spectra = read_spectra(run)
    rows = [(row["step"], row["layer"], row["workers"], row["final"]) for row in spectra.to_pylist()]
    assert sorted(rows) == sorted((step, layer, 2, True) for step in range(5) for layer in LAYERS)
    assert pc.sum(spectra.column("samples")).as_py() == 5 * len(LAYERS) * 1796
    assert set(read_scalars(run).column("value").to_pylist()) == {2.0}, "both workers on one node"
    assert f"{layer_table(spectra)}\n\n2 workers on 2 nodes\nFiles  {run}\n" in output
    assert output.endswith(f"Storage  {tmp_path / 'shared'}\n")


@needs_jobs
@pytest.mark.slow
@pytest.mark.ray
def test_a_job_that_fails_fails_here_and_one_that_is_ended_leaves_nothing(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import sys\nprint('arguments', sys.argv[1:], flush=True)\nsys.exit(5)\n")
    status, output, errors = local(tmp_path, "--nodes", "2", "script.py", "--epochs", "3")
    assert status == 1
    assert "arguments ['--epochs', '3']" in output
    assert "FAILED" in errors

    script.write_text("import time\nprint('runs', flush=True)\ntime.sleep(300)\n")

    def end(process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if line == "runs\n":
                return process.terminate()

    status, _, errors = local(tmp_path, "--nodes", "2", "script.py", meanwhile=end)
    assert status == 143, errors


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--nodes", "1"], "--nodes 1: at least 2 are needed"), (["missing.py"], "missing.py: no such file")],
)
def test_bad_arguments_are_refused_before_anything_starts(arguments: list[str], said: str, tmp_path: Path) -> None:
    status, output, errors = local(tmp_path, *arguments)
    assert (status, output) == (2, "")
    assert said in errors
