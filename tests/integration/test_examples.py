"""Each example as a newcomer runs it: in a process of its own, in a directory of its own."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
import uuid
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pytest

from delve_ray import read_scalars, read_spectra
from delve_ray.analysis.table import layer_table

pytestmark = [pytest.mark.slow, pytest.mark.ray]

EXAMPLES = Path(__file__).parents[2] / "examples"
LAYERS = ["conv1", "conv2", "conv3", "hidden", "output"]
EPOCHS = 5
MARK = "DELVE_RAY_TEST_EXAMPLE"
TIMEOUT_S = 280
SETTLE_S = 30


def started_with(mark):
    """Processes that inherited the mark, as {pid: command line}; zombies have no environment any more."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={mark}".encode() in (process / "environ").read_bytes().split(b"\0"):
                found[int(process.name)] = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:  # it has ended, or is not ours
            continue
    return found


def run_example(name, directory):
    """Run an example; what it printed. Fails when it does, or when it leaves processes behind."""
    mark = uuid.uuid4().hex
    environment = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "RAY_NAMESPACE")}
    run = subprocess.run(
        [sys.executable, EXAMPLES / name],
        cwd=directory,
        env=environment | {MARK: mark},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    deadline = time.monotonic() + SETTLE_S
    while (left := started_with(mark)) and time.monotonic() < deadline:
        time.sleep(0.2)
    for pid in left:
        os.kill(pid, 9)
    assert run.returncode == 0, run.stdout + run.stderr
    assert not left
    assert "Traceback" not in run.stderr
    return run.stdout


def check_run(output, run, workers):
    """That the table which was printed is that of the files, and that these are complete."""
    spectra = read_spectra(run)
    found = [(row["phase"], row["step"], row["layer"]) for row in spectra.to_pylist()]
    expected = [(phase, step, layer) for phase in ("train", "eval") for step in range(EPOCHS) for layer in LAYERS]
    assert sorted(found) == sorted(expected)
    assert set(spectra.column("final").to_pylist()) == {True}
    assert set(spectra.column("workers").to_pylist()) == {workers}
    table = layer_table(spectra)
    assert [line.split()[0] for line in table.splitlines()[2 : 2 + len(LAYERS)]] == LAYERS
    assert table in output
    progress = re.findall(r"^epoch (\d)/5 .*accuracy +([\d.]+)%", output, re.MULTILINE)
    assert [int(epoch) for epoch, _ in progress] == [1, 2, 3, 4, 5]
    assert float(progress[-1][1]) > 80
    assert list((run / "tensorboard").iterdir())
    return [float(accuracy) for _, accuracy in progress]


def test_quickstart(tmp_path):
    output = run_example("quickstart.py", tmp_path)
    (run,) = (tmp_path / "runs").iterdir()
    accuracies = check_run(output, run, workers=2)

    scalars = read_scalars(run).to_pylist()
    assert [(row["name"], row["step"], row["rank"]) for row in scalars] == [("accuracy", n, 0) for n in range(EPOCHS)]
    assert [100 * row["value"] for row in scalars] == pytest.approx(accuracies, abs=0.06)
    # Both shards of the test images were evaluated, and all but one of the training images were seen.
    rows = {(row["phase"], row["layer"]): row["samples"] for row in read_spectra(run).to_pylist()}
    assert (rows["eval", "output"], rows["train", "output"], rows["train", "conv1"]) == (450, 1346, 1346 * 64)

    printed = dict(re.findall(r"^(Files|Picture|TensorBoard|This table) +(.*)$", output, re.MULTILINE))
    assert (tmp_path / printed["Files"]).samefile(run)
    assert (tmp_path / printed["Picture"]).read_bytes().startswith(b"\x89PNG")
    assert output.startswith("Starting Ray")
    again = subprocess.run(
        [*shlex.split(printed["This table"]), "--json"], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert [row["layer"] for row in json.loads(again.stdout)] == LAYERS * 2
    tensorboard = shlex.split(printed["TensorBoard"])
    assert tensorboard[-2] == "--logdir"
    assert (tmp_path / tensorboard[-1]).samefile(run)
    version = subprocess.run([*tensorboard[:-2], "--version"], cwd=tmp_path, capture_output=True, timeout=120)
    assert version.returncode == 0


def test_plain_actors(tmp_path):
    output = run_example("plain_actors.py", tmp_path)
    (run,) = (tmp_path / "runs").iterdir()
    check_run(output, run, workers=2)
    assert (tmp_path / output.splitlines()[-1].split()[1]).samefile(run)


def test_no_ray(tmp_path):
    output = run_example("no_ray.py", tmp_path)
    (run,) = (tmp_path / "runs").iterdir()
    accuracies = check_run(output, run, workers=1)
    assert [100 * row["value"] for row in read_scalars(run).to_pylist()] == pytest.approx(accuracies, abs=0.06)
    assert (tmp_path / output.splitlines()[-1].split()[1]).samefile(run)


def test_sweep(tmp_path):
    output = run_example("sweep.py", tmp_path)
    (sweep,) = (tmp_path / "runs").iterdir()
    spectra = read_spectra(sweep)
    assert len(set(spectra.column("run").to_pylist())) == 12
    places = re.findall(
        r"^ +(\d+)  (\w+_\d+) +([\d.]+) +([\d.]+) +([\d,]+)  width=(\d+) depth=(\d)$", output, re.MULTILINE
    )
    assert [int(place) for place, *_ in places] == list(range(1, 13))
    _, trial, accuracy, saturation, parameters, width, depth = places[0]
    assert f"Take width {width}, depth {depth}: " in output
    rows = spectra.filter(pc.field("trial") == trial).to_pylist()
    last = max(row["step"] for row in rows)
    values = [row["saturation"] for row in rows if (row["phase"], row["step"]) == ("eval", last)]
    assert float(saturation) == pytest.approx(sum(values) / len(values), abs=5e-5)
    assert f"{parameters} parameters" in output
    assert max(float(row[2]) for row in places) - float(accuracy) <= 0.0101
    assert (sweep / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_projection(tmp_path):
    output = run_example("projection.py", tmp_path)
    (run,) = (tmp_path / "runs").iterdir()
    assert len(set(read_spectra(run).column("step").to_pylist())) == 8
    rows = re.findall(
        r"^ *([\d.]+)% +(\d+) +(\d+)% +([\d.]+)% +([\d.]+)% \(([\d.]+)% to ([\d.]+)%\)$", output, re.MULTILINE
    )
    thresholds, directions, shares, leading, random, lowest, highest = np.array(rows, dtype=float).T
    assert len(rows) == 12
    assert list(thresholds) == sorted(thresholds)
    assert list(directions) == sorted(directions)
    assert directions[-1] <= 16 + 32 + 64 + 128 + 10
    (unprojected,) = re.findall(r"^not projected: ([\d.]+)%$", output, re.MULTILINE)
    assert float(unprojected) > 90
    at = list(thresholds).index(99.0)
    assert shares[at] < 60  # half of the directions …
    assert leading[at] > float(unprojected) - 4  # … are as good as all, but not if they are random
    assert random[at] < leading[at] - 30
    assert leading[-1] == pytest.approx(float(unprojected), abs=0.7)
    assert ((lowest <= random) & (random <= highest)).all()
    files, picture = re.findall(r"^(?:Files|Picture) +(.*)$", output, re.MULTILINE)
    assert (tmp_path / files).samefile(run)
    assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["torchrun.py", "with_accelerate.py"])
def test_launchers(name, tmp_path):
    if name == "with_accelerate.py":
        pytest.importorskip("accelerate")
    output = run_example(name, tmp_path)
    (run,) = (tmp_path / "runs").iterdir()
    spectra = read_spectra(run)
    assert set(spectra.column("workers").to_pylist()) == {2}
    assert set(spectra.column("step").to_pylist()) == set(range(EPOCHS))
    assert set(spectra.column("samples").to_pylist()) == ({1792} if name == "torchrun.py" else {2 * 29 * 32})
    assert layer_table(spectra) in output
