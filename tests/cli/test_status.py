import json
import subprocess
import sys
from contextlib import contextmanager

import pytest

from delve_ray.cli import main, status
from delve_ray.errors import StoreError

ENDED = {
    "run": "first",
    "world_size": 2,
    "created": "2026-01-02T03:04:05+00:00",
    "options": {"savefile": "/runs/first"},
    "attempts": [{"attempt": 0}, {"attempt": 1}],
    "end": {"time": "2026-01-02T04:05:06+00:00", "why": "no \x1b[31msign of life", "problems": ["disk full"]},
}
RUNNING = ENDED | {"end": None}
STATE = {
    "run": "first",
    "savefile": "/runs/first",
    "attempt": 1,
    "world_size": 3,
    "published": 7,
    "open_windows": [7, 8],
    "bytes": 3 << 20,
    "ending": None,
    "finished": False,
    "ranks": {
        0: {"window": 8, "deltas": 31, "silent_s": 0.25, "left": False, "host": "node-a", "pid": 11, "outbox": None},
        1: {"window": 7, "deltas": 30, "silent_s": 12.5, "left": True, "host": "node-b", "pid": 12, "outbox": None},
    },
    "writers": [{"name": "parquet", "written": 7, "queued": 1, "failed": 0, "dropped": 0, "last_error": "disk full"}],
    "problems": ["writer parquet waits"],
}


class FakeStore:
    """What get_store returns, as far as the command asks it."""

    def __init__(self, state):
        self.status = self
        self._state = state

    def remote(self):
        return self._state


@pytest.fixture
def cluster(monkeypatch):
    """A cluster with one run; what it is asked is noted."""
    asked = []

    @contextmanager
    def connect(address):
        asked.append(address)
        if address == "nowhere:1":
            raise StoreError("no Ray cluster answers at nowhere:1 (refused)")
        yield lambda reference: reference

    def get_store(run):
        asked.append(run)
        if run != "first":
            raise StoreError(f"run {run!r} has no store in this Ray cluster")
        return FakeStore(STATE)

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(status, "cluster", connect)
    monkeypatch.setattr("delve_ray.store.launch.get_store", get_store)
    return asked


@pytest.fixture
def run(tmp_path):
    def write(content):
        (tmp_path / "run.json").write_text(json.dumps(content))
        return str(tmp_path)

    return write


def test_a_running_store_says_how_it_is(cluster, run, capsys):
    assert main(["status", run(RUNNING), "--address", "head:6379"]) == 0
    assert cluster == ["head:6379", "first"]
    assert capsys.readouterr().out.splitlines() == [
        "run first: runs",
        "savefile /runs/first",
        "attempt 1; 2 of 3 ranks have joined, 1 have left",
        "windows: 7 published, 2 open; 3.0 MiB in memory",
        "",
        "rank  window  deltas   silent  process",
        "   0       8      31    0.2 s  node-a:11",
        "   1       7      30   12.5 s  node-b:12  has left",
        "",
        "writer parquet: 7 written, 1 queued, 0 failed, 0 dropped; last error: disk full",
        "problem: writer parquet waits",
    ]


def test_a_store_with_shards_says_what_they_have(cluster, run, capsys, monkeypatch):
    shards = [{"run": "first", "bytes": 5 << 20, "problems": []}, {"problems": ["shard 1 does not answer: lost"]}]
    state = STATE | {"bytes": 0, "shards": shards, "problems": ["shard 1: shard 1 does not answer: lost", "disk"]}
    monkeypatch.setattr("delve_ray.store.launch.get_store", lambda name: FakeStore(state))
    assert main(["status", run(RUNNING), "--address", "head:6379"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[3] == "windows: 7 published, 2 open; 5.0 MiB in memory"
    assert lines[-2:] == ["problem: shard 1: shard 1 does not answer: lost", "problem: disk"]


def test_json_and_the_address_from_the_environment(cluster, run, capsys, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "env:6379")
    assert main(["status", run(RUNNING), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert cluster[0] == "env:6379"
    assert (row["run"], row["running"], row["world_size"], row["end"]) == ("first", True, 3, None)
    assert row["store"]["ranks"]["1"]["silent_s"] == 12.5


def test_a_store_by_the_name_of_its_run(cluster, capsys):
    assert main(["status", "first", "--address", "head:6379"]) == 0
    assert capsys.readouterr().out.startswith("run first: runs\n")
    assert main(["status", "second", "--address", "head:6379"]) == 2
    said = capsys.readouterr()
    assert said.err == "delve-ray: second: no run.json there; run 'second' has no store in this Ray cluster\n"


def test_a_secret_in_a_uri_is_not_shown(cluster, capsys, monkeypatch):
    there = "s3://key:secret@bucket/r"
    monkeypatch.setattr(status, "run_json", lambda run: {})
    for more in ((), ("--json",), ("--address", "head:6379"), ("--address", "nowhere:1")):
        assert main(["status", there, *more]) == 2
        said = "".join(capsys.readouterr())
        assert "s3://key:***@bucket/r" in said
        assert "secret" not in said


def test_a_run_that_has_ended(cluster, run, capsys):
    assert main(["status", run(ENDED)]) == 0
    assert cluster == []
    assert capsys.readouterr().out.splitlines() == [
        "run first: has ended",
        "began 2026-01-02T03:04:05+00:00, world size 2, 2 attempts",
        r"ended 2026-01-02T04:05:06+00:00: no \x1b[31msign of life",
        "problem: disk full",
    ]
    assert main(["status", run(ENDED), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["running"], row["end"], row["store"]) == (False, ENDED["end"], None)
    assert row["savefile"] == "/runs/first"


def test_a_run_that_has_ended_has_no_store_and_that_is_no_trouble(cluster, run, capsys):
    assert main(["status", run(ENDED | {"run": "other"}), "--address", "head:6379"]) == 0
    assert capsys.readouterr().err == ""


def test_a_cluster_that_does_not_answer(cluster, run, capsys):
    assert main(["status", run(RUNNING), "--address", "nowhere:1"]) == 2
    said = capsys.readouterr()
    assert said.out.startswith("run first: has not ended, as far as run.json says\n")
    assert said.err == "delve-ray: no Ray cluster answers at nowhere:1 (refused)\n"


def test_without_an_address(cluster, run, capsys):
    assert main(["status", run(RUNNING)]) == 0
    assert "--address or RAY_ADDRESS" in capsys.readouterr().out


def test_neither_a_run_nor_an_address(cluster, tmp_path, capsys):
    assert main(["status", str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"delve-ray: {tmp_path}: no run.json there; give --address or set RAY_ADDRESS")


def test_local_would_start_a_cluster(run, capsys):
    assert main(["status", run(RUNNING), "--address", "local"]) == 2
    assert "--address local would start a new cluster" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.ray
def test_a_real_store(tmp_path):
    """In a process of its own, whose Ray ends with it."""
    program = f"""
import json, ray, subprocess, sys
import delve_ray
context = ray.init(address="local", num_cpus=1, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
address = context.address_info["address"]
handle = delve_ray.start_store({str(tmp_path / "run")!r}, run="real", world_size=1, save_to="parquet")
ask = [sys.executable, "-m", "delve_ray.cli", "status", "real", "--address", address, "--json"]
done = subprocess.run(ask, capture_output=True, text=True, timeout=120)
assert done.returncode == 0, done.stderr
(row,) = json.loads(done.stdout)
assert row["run"] == "real" and row["running"] and row["store"]["ranks"] == {{}}, row
ray.kill(handle, no_restart=True)
ask[4] = "unknown"
done = subprocess.run(ask, capture_output=True, text=True, timeout=120)
assert done.returncode == 2 and "has no store in this Ray cluster" in done.stderr, done.stderr
ray.shutdown()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
