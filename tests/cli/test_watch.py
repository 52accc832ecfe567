"""`delve-ray status --watch`: what is shown of real stores, and when it ends."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from delve_ray.cli import main, status
from delve_ray.cli.board import MOST_RANKS, board, state_line
from delve_ray.cli.watch import Seen, follow, in_place
from delve_ray.errors import StoreError
from delve_ray.store.answers import MOST_WINDOWS
from delve_ray.store.core import CovarianceStore
from tests.chaos.processes import family, wait_until
from tests.leftovers import kill
from tests.stores import Keeper, Worker, config, published, rows, source, until

ENDED = {"run": "r", "world_size": 2, "end": {"time": "2026-01-02T04:05:06+00:00", "why": "closed"}}


class Slow(Keeper):
    """A writer that waits until it may go on."""

    def __init__(self) -> None:
        super().__init__("slow")
        self.go_on = threading.Event()

    def write(self, window: Any) -> None:
        assert self.go_on.wait(30)
        super().write(window)


def shown(state: dict[str, Any]) -> list[str]:
    """What is shown of a status, by line, with single spaces."""
    console = Console(record=True, width=120, file=io.StringIO())
    console.print(board(state))
    return [" ".join(line.split()) for line in console.export_text().splitlines()]


@pytest.fixture(scope="module")
def behind() -> Iterator[dict[str, Any]]:
    """The status of a store of three ranks: 0 is two windows ahead, one writer waits and one fails."""
    options = config(world_size=3)
    slow = Slow()
    store = CovarianceStore(options, writers=[slow, Keeper("broken", fail=True)])
    workers = [Worker(store, rank, options) for rank in range(2)]
    for step in range(3):
        workers[0].send({(1, 0): rows(20, 5)}, step=10 * step, closes=True)
    workers[1].send({(1, 0): rows(20, 5)}, closes=True)
    third = Worker(store, 2, options)
    third.send({}, closes=True)
    published(store, 1)
    store.heartbeat(source(1), {"memory_bytes": 3 << 20, "disk_bytes": 5 << 20, "lost": 4})
    until(lambda: store.status()["writers"][1]["last_error"])
    yield store.status()
    slow.go_on.set()
    kill(store)  # its end would wait for the writer that fails


def test_ranks_windows_memory_and_writers(behind: dict[str, Any]) -> None:
    lines = shown(behind)
    assert lines[0] == "run r: runs"
    assert lines[2] == "attempt 0; 3 of 3 ranks have joined, 0 left"
    assert lines[3] == "windows: 1 published, 2 open, 1 wait for writers or late ranks, 0 in files"
    assert lines[4].startswith(f"memory: {behind['bytes'] / 2**20:.1f} MiB of moments; 5 deltas merged, ")
    at = lines.index("window step open for without ranks")
    assert re.fullmatch(r"1 10 \d+\.\d s rank 1, 2", lines[at + 1])
    assert re.fullmatch(r"2 20 \d+\.\d s rank 1, 2", lines[at + 2])
    at = lines.index("rank behind window deltas heard in memory on disk lost process")
    assert re.fullmatch(r"0 0 3 3 \d+\.\d s ago 0\.0 MiB 0\.0 MiB 0 host:100", lines[at + 1])
    assert re.fullmatch(r"1 2 1 1 \d+\.\d s ago 3\.0 MiB 5\.0 MiB 4 host:101", lines[at + 2])
    assert re.fullmatch(r"2 2 1 1 \d+\.\d s ago 0\.0 MiB 0\.0 MiB 0 host:102", lines[at + 3])
    at = lines.index("writer written behind by fails for given up last error")
    assert lines[at + 1] == "slow 0 1 0.0 MiB - 0 -"
    assert re.fullmatch(r"broken 0 1 0\.0 MiB \d+\.\d s 0 TypeError: no space for this", lines[at + 2])
    assert lines[-1].startswith("problem: writer broken has failed to write step 0 for ")


def test_a_status_on_one_line(behind: dict[str, Any]) -> None:
    parts = state_line(behind).split("; ")
    assert parts[:3] == ["run r: runs", "1 published", "2 open"]
    assert re.fullmatch(r"window 1 waits \d+\.\d s for rank 1, 2", parts[3])
    assert re.fullmatch(r"rank [12] is 2 behind, heard \d+\.\d s ago", parts[5])
    assert parts[6] == "outboxes 3.0 MiB in memory, 5.0 MiB on disk"
    assert parts[8:10] == [
        "slow is 1 behind, gave up 0",
        "broken is 1 behind, gave up 0 (TypeError: no space for this)",
    ]
    assert "\n" not in state_line(behind | {"problems": ["a\nb\x1b[31m"]})


def test_shards_and_snapshots(behind: dict[str, Any]) -> None:
    silent = {"problems": ["shard 1 does not answer: it\nis away"]}
    snapshots = {"written": 5, "failed": 1, "seconds": 0.25, "pending": True, "last_error": "disk full"}
    state = behind | {"shards": [behind | {"bytes": 2 << 20, "problems": []}, silent], "snapshots": snapshots}
    lines = shown(state | {"bytes": 1 << 20, "bytes_in": 0, "shards": [{"bytes_in": 3 << 20}, {"bytes_in": 4 << 20}]})
    assert lines[4].startswith("memory: 1.0 MiB of moments; 5 deltas merged, 7.0 MiB; ")
    lines = shown(state)
    at = lines.index("shard published open deltas memory problems")
    assert lines[at + 1] == "0 1 2 5 2.0 MiB -"
    assert lines[at + 2] == "1 ? ? ? ? shard 1 does not answer: it is away"
    assert "snapshots: 5 written, 1 failed, the last one in 0.25 s, one is due; last error: disk full" in lines
    assert "problem: shard 1: shard 1 does not answer: it is away" in state_line(state)


def test_of_many_ranks_and_windows_those_that_matter_are_shown() -> None:
    options = config(world_size=40)
    store = CovarianceStore(options, writers=[])
    workers = [Worker(store, rank, options) for rank in range(40)]
    for step in range(MOST_WINDOWS + 3):
        for worker in workers[:-1]:
            worker.send({}, step=step, closes=True)
    lines = shown(store.status())
    assert any(re.fullmatch(rf"39 {MOST_WINDOWS + 3} 0 0 .* host:139", line) for line in lines)
    assert sum(bool(re.search(r"host:\d+$", line)) for line in lines) == MOST_RANKS
    assert f"and {40 - MOST_RANKS} more, none further behind" in lines
    assert "and 3 more windows" in lines
    store.finish("test")


# --- the loop ----------------------------------------------------------------------------------------------


def state(**more: Any) -> dict[str, Any]:
    return {"run": "r", "world_size": 1, "published": 0, "finished": False} | more


def followed(*looks: Seen) -> tuple[int, list[Seen], list[float]]:
    """Exit code, what was drawn, and the pauses; asking once more than there are looks fails."""
    left, drawn, pauses = list(looks), [], []  # type: ignore[var-annotated]
    code = follow(lambda: left.pop(0), lambda seen, last: drawn.append((seen, last)), 2.5, pauses.append)
    assert not left
    return code, drawn, pauses


AWAY = Seen("r", {}, None, "the store does not answer (ActorUnavailableError)")
GONE = Seen("r", {}, None, "run 'r' has no store in this Ray cluster", gone=True)


def test_it_ends_as_the_run_ends_and_waits_for_a_store_that_is_away() -> None:
    running, done = Seen("r", {}, state(published=3)), Seen("r", {}, state(published=4, finished=True))
    code, drawn, pauses = followed(running, AWAY, AWAY, running, done)
    assert code == 0
    assert pauses == [2.5] * 4
    assert drawn == [(running, None), (AWAY, running), (AWAY, running), (running, running), (done, running)]


def test_a_store_that_is_gone(capsys: pytest.CaptureFixture[str]) -> None:
    running = Seen("r", {}, state())
    ended = Seen("r", ENDED, None, GONE.trouble, gone=True)
    assert followed(running, ended)[0] == 0, "run.json says that it has ended"
    assert followed(running, GONE)[0] == 0, "and from here run.json is not to be read"
    assert capsys.readouterr().err == ""
    assert followed(GONE)[0] == 2
    said = "delve-ray: r: no run.json there; run 'r' has no store in this Ray cluster\n"
    assert capsys.readouterr().err == said
    killed = Seen("r", ENDED | {"end": None}, None, GONE.trouble, gone=True)
    assert followed(running, killed)[0] == 2
    assert "run.json does not say that the run has ended" in capsys.readouterr().err


def test_ctrl_c_ends_it() -> None:
    def interrupted(_: float) -> None:
        raise KeyboardInterrupt

    assert follow(lambda: Seen("r", {}, state()), lambda *_: None, 1.0, interrupted) == 0


def test_in_place_the_last_state_stays() -> None:
    file = io.StringIO()
    console = Console(record=True, width=100, height=50, file=file, force_terminal=True)
    with in_place(console) as draw:
        looks = (Seen("r", {}, state(published=1)), AWAY, Seen("r", {}, state(published=2, finished=True)))
        code = follow(iter(looks).__next__, draw, 1.0, lambda _: None)
    assert code == 0
    frames = console.export_text()
    assert "does not answer (ActorUnavailableError)\nthis is how it was when it last answered" in frames
    assert frames.index("1 published") < frames.index("does not answer") < frames.index("run r: has finished")
    assert "\x1b[1A" in file.getvalue(), "it goes up to where the frame before began"
    assert file.getvalue().count("run r: has finished") >= 1


# --- the command -------------------------------------------------------------------------------------------


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """A cluster whose store answers with these statuses, one after the other, and then is gone."""
    answers: list[Any] = []

    @contextmanager
    def connect(address: str) -> Iterator[Any]:
        if address == "nowhere:1":
            raise StoreError("no Ray cluster answers at nowhere:1 (refused)")
        yield None

    def ask(name: str, answer: Any) -> Any:
        if not answers:
            raise status.NoStore(f"run {name!r} has no store in this Ray cluster")
        found = answers.pop(0)
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(status, "cluster", connect)
    monkeypatch.setattr(status, "ask", ask)
    return answers.extend


def test_lines_without_a_terminal(cluster: Callable[[Any], None], capsys: pytest.CaptureFixture[str]) -> None:
    cluster([state(published=1), StoreError("the store does not answer\n(GetTimeoutError)"), state(finished=True)])
    assert main(["status", "r", "--watch", "-n", "0.001", "--address", "head:1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    times, texts = zip(*(line.split(" ", 1) for line in lines), strict=True)
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", time) for time in times)
    assert texts[0].startswith("run r: runs; 1 published; 0 open; ")
    assert texts[1] == "run r: the store does not answer (GetTimeoutError)"
    assert texts[2].startswith("run r: has finished")


def test_one_object_per_line(
    cluster: Callable[[Any], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.json").write_text(json.dumps(ENDED | {"end": None}))
    cluster([state(problems=["a\nb\x9b31m"]), StoreError("away")])
    assert main(["status", str(tmp_path), "--watch", "-n", "0.001", "--address", "head:1", "--json"]) == 2
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["running"] for line in lines] == [True, False, False]
    assert [line["trouble"] for line in lines] == [None, "away", "run 'r' has no store in this Ray cluster"]
    assert lines[0]["store"]["problems"] == ["a\nb\x9b31m"]
    assert all(line["run"] == "r" for line in lines)


def test_what_cannot_be_watched(
    cluster: Callable[[Any], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def error(*arguments: str) -> str:
        assert main(["status", *arguments, "--watch"]) == 2
        return capsys.readouterr().err

    assert "no run.json there; give --address or set RAY_ADDRESS" in error(str(tmp_path))
    assert error("r", "--address", "nowhere:1") == "delve-ray: no Ray cluster answers at nowhere:1 (refused)\n"
    assert error("r", "--address", "head:1", "-n", "0") == "delve-ray: --interval 0.0: expected seconds above 0\n"
    assert "has no store in this Ray cluster" in error("r", "--address", "head:1")
    (tmp_path / "run.json").write_text(json.dumps(ENDED | {"end": None}))
    assert "--watch asks the store of run 'r' itself" in error(str(tmp_path))
    (tmp_path / "run.json").write_text(json.dumps(ENDED))
    assert main(["status", str(tmp_path), "--watch", "--address", "head:1"]) == 0
    assert "ended 2026-01-02T04:05:06+00:00: closed" in capsys.readouterr().out


def test_a_secret_in_a_uri_is_not_shown(
    cluster: Callable[[Any], None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(status, "run_json", lambda run: {})
    for more in ((), ("--address", "head:1"), ("--address", "head:1", "--json")):
        cluster([StoreError("run 's3://key:secret@bucket/r' is away"), state(published=1)] if more else [])
        assert main(["status", "s3://key:secret@bucket/r", "--watch", "-n", "0.001", *more]) == (0 if more else 2)
        said = "".join(capsys.readouterr())
        assert "s3://key:***@bucket/r" in said
        assert "secret" not in said


def run_watched(savefile: str) -> None:
    """A run of two ranks that is watched from its begin to its end, its store being killed in between."""
    import ray

    import delve_ray
    from tests.chaos.processes import workers

    context = ray.init(
        address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20
    )
    handle = delve_ray.start_store(savefile, run="seen", world_size=2, save_to="parquet", snapshot_every=0.2)
    command = [sys.executable, "-m", "delve_ray.cli", "status", savefile, "--watch", "--interval", "0.2", "--json"]
    command[4:5] = ["seen", "--address", context.address_info["address"]]
    watcher = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert watcher.stdout is not None
    lines: list[dict[str, Any]] = []
    reader = threading.Thread(target=lambda: lines.extend(map(json.loads, watcher.stdout or [])), daemon=True)
    reader.start()

    def wait_seen(holds: Callable[[dict[str, Any]], Any], what: str) -> dict[str, Any]:
        began = len(lines)
        found: dict[str, Any] = wait_until(
            lambda: next((line["store"] for line in lines[began:] if line["store"] and holds(line["store"])), None),
            what,
        )
        return found

    with workers(range(2)) as ranks:
        ray.get([rank.track.remote(savefile, "parquet", run="seen", world_size=2) for rank in ranks])
        wait_seen(lambda s: len(s["ranks"]) == 2, "both ranks")
        for step in range(2):
            ray.get(ranks[0].window.remote(step, [step]))
        late = wait_seen(lambda s: s["ranks"]["1"]["lag"] == 2, "the lag")
        assert late["open_windows"] == [0, 1], late
        assert [window["missing"] for window in late["windows"]] == [[1], [1]], late
        assert late["published"] == late["writers"][0]["written"] == 0, late
        ray.get(ranks[1].window.remote(0, [7]))
        closed = wait_seen(lambda s: s["published"] == 1 and s["writers"][0]["written"] == 1, "the first window")
        assert closed["open_windows"] == [1], closed
        assert closed["ranks"]["1"]["lag"] == 1, closed
        ray.kill(handle, no_restart=False)
        wait_seen(lambda s: s["pid"] != closed["pid"] and len(s["ranks"]) == 2, "the store that was started anew")
        ray.get(ranks[1].window.remote(1, [8]))
        wait_seen(lambda s: s["published"] == 2 and s["ranks"]["1"]["lag"] == 0, "the second window")
        ray.get([rank.call.remote("close") for rank in ranks])
        assert watcher.wait(60) == 0
        reader.join(60)
    assert lines[-1]["store"] is None or lines[-1]["store"]["finished"], lines[-1]
    ray.shutdown()
    print("it was seen")


@pytest.mark.slow
@pytest.mark.ray
def test_a_real_run_is_watched(savefile: str, tmp_path: Path) -> None:
    with family(tmp_path) as processes:
        assert "it was seen" in processes.run(run_watched, savefile)
