"""A savefile on S3: the same files as on a disk, whatever the network and the server do meanwhile."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import uuid
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pytest
import torch
from torch import nn

import delve_ray
from delve_ray import OptionError, SaturationTracker, read_covariances, read_scalars, read_spectra
from delve_ray.analysis import read_embeddings
from delve_ray.cli import main
from delve_ray.moments import unpack_triangle
from delve_ray.recovery import recover
from delve_ray.storage import S3_ATTEMPTS, Data, Storage, masked
from delve_ray.store import run_file
from delve_ray.store.core import CovarianceStore
from delve_ray.store.protocol import StoreConfig
from delve_ray.store.run_file import read_run
from delve_ray.store.saving import Saver
from delve_ray.store.sharded import LocalShards
from delve_ray.store.writing import WriterThread
from delve_ray.writers.parquet import ParquetWriter
from tests import stores
from tests.chaos.processes import REPOSITORY, STATS, WITHIN_S, Worker, check_rows, outputs, wait_until
from tests.helpers import TOLERANCE
from tests.s3 import BUCKET, HOST, KEY, QUOTED, SECRET, Proxy, Server, uri
from tests.windows import layer_row, window

pytest.importorskip("moto.server", reason='needs moto, pip install "moto[s3]" flask flask-cors')

STEPS, BATCHES = range(4), range(2)
PART = 10 << 20
"""From so many bytes on pyarrow puts a file in parts."""


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    here = Server()
    yield here
    here.end()


@pytest.fixture
def proxy(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy before the server; what fails behind it is tried again after a fraction of the usual pauses."""
    monkeypatch.setitem(WriterThread.__init__.__kwdefaults__, "retry_s", (0.05, 0.2))
    monkeypatch.setattr("delve_ray.store.saving.RETRY_S", (0.05, 0.2))
    here = Proxy(server, seed=20260101)
    yield here
    here.end()


@pytest.fixture
def place() -> str:
    """A path of the bucket that nothing else has."""
    return f"runs/{uuid.uuid4().hex}"


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that fails is not repeated by pyarrow, so that an outage is met by what is tested here."""
    monkeypatch.setattr("delve_ray.storage.S3_ATTEMPTS", 1)


def files(server: Server, path: str) -> dict[str, bytes]:
    """What lies below a path of the bucket, by name; directories' marks left out."""
    selector = pafs.FileSelector(f"{BUCKET}/{path}", recursive=True, allow_not_found=True)
    found = [info.path for info in server.filesystem.get_file_info(selector) if info.type == pafs.FileType.File]
    read = {}
    for name in found:
        with server.filesystem.open_input_file(name) as stream:
            read[name.removeprefix(f"{BUCKET}/{path}/")] = stream.read()
    return read


def direct(server: Server, path: str) -> str:
    return uri(server.port, path)


# --- a run from beginning to end -----------------------------------------------------------------------


def train(savefile: str, steps: range, **options: Any) -> dict[str, float]:
    """Train two layers, the same whenever it is called with the same steps; the metrics of the last window."""
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 3))
    options = {"stats": ["lsat", "trc", "cov", "embed"], "embed_rows": 20, "publish_every": 0, "run": "r"} | options
    with SaturationTracker(savefile, ["parquet", "npy"], model, **options) as tracker:
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            for phase in (True, False):
                model.train(phase)
                model(torch.randn(64, 4, generator=generator))
            tracker.add_scalar("loss", 1 / (1 + step), step)
            tracker.add_saturations(step)
        return tracker.metrics(wait=True)


READERS = (read_spectra, read_covariances, read_embeddings, read_scalars)


def everything(savefile: str, **options: Any) -> list[pa.Table]:
    """All that can be read of a run, but for the time at which it was written."""
    return [read(savefile, **options).drop_columns(["wall_time"]) for read in READERS]


def unhashed(name: str) -> str:
    return re.sub("[0-9a-f]{32}", "", name)


def test_a_run_is_the_same_as_on_a_disk(
    server: Server, proxy: Proxy, place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    local, remote = str(tmp_path / "run"), proxy.uri(place)
    assert train(local, range(3)) == train(remote, range(3))
    first = everything(remote)
    assert [table.num_rows for table in first] == [12, 12, 240, 3]
    assert all(ours.equals(theirs) for ours, theirs in zip(first, everything(local), strict=True))

    with pytest.raises(OptionError, match="holds a run already") as refused:
        train(remote, range(3, 5))
    assert QUOTED not in str(refused.value)
    assert all(ours.equals(theirs) for ours, theirs in zip(first, everything(remote), strict=True))

    assert train(local, range(2, 5), resume=True) == train(remote, range(2, 5), resume=True)
    for options in ({}, {"attempts": "all"}, {"filters": [("step", ">=", 2)], "columns": None}):
        mine, theirs = everything(remote, **options), everything(local, **options)
        assert all(ours.equals(other) for ours, other in zip(mine, theirs, strict=True)), options
    of_one = {"columns": ["step", "eigenvalues"], "filters": [("layer", "==", "2"), ("phase", "==", "eval")]}
    assert read_spectra(remote, **of_one).equals(read_spectra(local, **of_one))
    assert read_spectra(remote, **of_one).num_rows == 5
    assert read_spectra(proxy.uri(place.split("/")[0])).num_rows >= 20, "runs are found below a directory"

    shown = []
    for savefile in (remote, local):
        assert main(["summary", savefile, "--json"]) == 0
        shown.append([{**row, "wall_time": None, "path": None} for row in json.loads(capsys.readouterr().out)])
    assert shown[0] == shown[1]
    assert len(shown[0]) == 4

    content = read_run(Storage(remote))
    assert (content["run"], content["end"]["why"], content["end"]["problems"]) == ("r", "closed", [])
    assert [attempt["attempt"] for attempt in content["attempts"]] == [0, 1]
    assert content["options"]["savefile"] == masked(remote)
    found, on_disk = files(server, place), [path for path in Path(local).rglob("*") if path.is_file()]
    # User scalars are named by a hash in which the time is, too.
    assert sorted(map(unhashed, found)) == sorted(unhashed(str(path.relative_to(local))) for path in on_disk)
    assert not any(secret.encode() in data for data in found.values() for secret in (SECRET, QUOTED))


@pytest.mark.parametrize(("writer", "error"), [("csv", OptionError), ("tensorboard", NotImplementedError)])
def test_files_that_grow_are_refused_and_nothing_is_begun(
    server: Server, proxy: Proxy, place: str, writer: str, error: type[Exception]
) -> None:
    with pytest.raises(error, match=f"save_to='{writer}' needs a local savefile.*only whole files can be put") as told:
        SaturationTracker(proxy.uri(place), ["parquet", writer], nn.Linear(2, 2))
    assert QUOTED not in str(told.value)
    assert files(server, place) == {}


# --- faults --------------------------------------------------------------------------------------------


class Reader:
    """Reads a run again and again while it is written, and keeps what was wrong with what it saw."""

    def __init__(self, savefile: str) -> None:
        self._savefile = savefile
        self._ended = threading.Event()
        self.rounds, self.problems = 0, list[str]()
        self.seen: dict[tuple[Any, ...], Any] = {}
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Reader:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(WITHIN_S)
        assert self.rounds
        assert self.problems == []

    def _run(self) -> None:
        while not self._ended.is_set():
            try:
                self._look()
            except Exception as error:  # whatever it is, a reader of such a run must not see it
                self.problems.append(f"{type(error).__name__}: {error}")
            self.rounds += 1
            self._ended.wait(0.2)

    def _look(self) -> None:
        storage = Storage(self._savefile)
        if not storage.exists("run.json"):
            return
        read_run(storage)
        columns = ["phase", "step", "layer", "samples", "eigenvalues"]
        rows = read_spectra(storage, columns).to_pylist()
        keys = [(row["phase"], row["step"], row["layer"]) for row in rows]
        covariances = read_covariances(storage, ["phase", "step", "layer"]).to_pylist()
        with_covariance = {(row["phase"], row["step"], row["layer"]) for row in covariances}
        if len(set(keys)) < len(keys):
            self.problems.append(f"twice: {keys}")
        if not set(keys) <= with_covariance:
            self.problems.append("spectra without their covariances")
        if not self.seen.keys() <= set(keys):
            self.problems.append("what was there is gone")
        self.seen |= dict(zip(keys, rows, strict=True))


def in_process(savefile: str, run: str = "r", finish_timeout: float = 60.0) -> CovarianceStore:
    """A store as a tracker makes it without Ray."""
    config = StoreConfig(run, savefile, 1, stats=STATS, publish_every=0.0, silent_after=0.0)
    return CovarianceStore(config, finish_timeout=finish_timeout)


def tracked(store: CovarianceStore, **options: Any) -> Worker:
    worker = Worker(0)
    worker.track(store=store, **options)
    return worker


def expected(steps: Any = STEPS) -> dict[int, Any]:
    return {step: outputs(step, {0: BATCHES}) for step in steps}


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["busy", "cut request", "cut response", "no response", "slow"])
def test_nothing_is_lost_torn_or_twice(server: Server, proxy: Proxy, place: str, hasty: None, fault: str) -> None:
    store = in_process(proxy.uri(place))
    worker = tracked(store)
    shares = {} if fault == "slow" else {fault.replace(" ", "_"): 0.4}
    proxy.delay = 0.05 if fault == "slow" else 0.0
    with Reader(direct(server, place)) as reader, proxy.faulty(**shares):
        for step in STEPS:
            worker.window(step, BATCHES)
        worker.tracker.close()
        wait_until(lambda: len(reader.seen) == len(STEPS), "the reader to see all")
    assert fault == "slow" or proxy.count(fault) > 0
    rows = check_rows(direct(server, place), expected())
    assert [(row["workers"], row["final"]) for row in rows] == [(1, True)] * len(STEPS)
    end = read_run(Storage(direct(server, place)))["end"]
    assert (end["why"], end["problems"]) == ("closed", [])
    written = store.running().writers[0].status()
    assert (written["failed"], written["dropped"], written["queued"]) == (0, 0, 0)


@pytest.mark.slow
def test_what_pyarrow_repeats_reaches_nobody(
    server: Server, proxy: Proxy, place: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Single faults and short ones: no writer sees them."""
    store = in_process(proxy.uri(place))
    worker = tracked(store)
    with proxy.faulty("PUT", in_a_row=S3_ATTEMPTS - 2, busy=0.2, cut_request=0.2, no_response=0.2):
        for step in STEPS:
            worker.window(step, BATCHES)
        worker.tracker.flush()
        assert store.running().writers[0].status()["last_error"] is None
        worker.tracker.close()
    assert sum(map(proxy.count, ("busy", "cut request", "no response"))) > 0
    assert "failed to write" not in caplog.text
    check_rows(direct(server, place), expected())


def check_trouble(store: CovarianceStore, caplog: pytest.LogCaptureFixture) -> None:
    """The store says that the storage is away, and keeps what cannot be written."""
    writer = wait_until(lambda: (s := store.status()["writers"][0])["last_error"] and s, "an error of the writer")
    assert "AWS Error" in writer["last_error"]
    assert writer["failed"] == writer["dropped"] == 0
    assert writer["queued"] > 0
    assert any("has failed to write step" in problem for problem in store.progress().problems)
    assert "writer parquet failed to write step" in caplog.text
    assert SECRET not in caplog.text
    assert QUOTED not in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("outage", ["refused", "silent"])
def test_training_goes_on_while_the_storage_is_away(
    server: Server,
    proxy: Proxy,
    place: str,
    hasty: None,
    caplog: pytest.LogCaptureFixture,
    outage: str,
) -> None:
    store = in_process(proxy.uri(place))
    worker = tracked(store)
    worker.window(0, BATCHES)
    worker.tracker.flush()
    with proxy.away() if outage == "refused" else server.stopped():
        for step in STEPS[1:]:
            worker.window(step, BATCHES)
            metrics = worker.tracker.metrics(wait=True)  # closed, merged and decomposed, with nobody there
        assert worker.tracker.is_recording()
        assert len(read_spectra(direct(server, place))) == 1 if outage == "refused" else True
        writer = store.status()["writers"][0]
        assert (writer["written"], writer["queued"]) == (1, len(STEPS) - 1)
        if outage == "refused":
            check_trouble(store, caplog)
    worker.tracker.flush()
    assert outage == "silent" or "writer parquet works again after" in caplog.text
    worker.tracker.close()
    rows = check_rows(direct(server, place), expected())
    assert metrics["saturation/train/Linear"] == rows[-1]["saturation"]
    assert read_run(Storage(direct(server, place)))["end"]["problems"] == []


def test_an_end_without_storage_says_so_and_keeps_what_there_is(
    server: Server,
    proxy: Proxy,
    place: str,
    hasty: None,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    savefile = proxy.uri(place)
    store = in_process(savefile, finish_timeout=0.3)
    worker = tracked(store, spill_dir=tmp_path / "spill")
    worker.window(0, BATCHES)
    worker.tracker.flush()
    with proxy.away():
        for step in STEPS[1:]:
            worker.window(step, BATCHES)
        worker.tracker.close()
        assert store.finished, "close has waited for the end, and not for the storage"
        problems = " ".join(store.progress().problems)
    assert "writer parquet did not finish within 0 s" in problems
    (rescue,) = tmp_path.glob("delve_ray-rescue-*")
    assert f"`delve-ray recover {masked(savefile)} {rescue}` writes it" in problems
    assert "run r: what could not be written is kept on" in caplog.text
    assert QUOTED not in caplog.text + problems
    assert len(read_spectra(savefile)) < len(STEPS)
    assert main(["recover", savefile, str(rescue)]) == 0
    check_rows(savefile, expected())
    assert read_run(Storage(savefile))["end"]["why"] == "recovered"


END = """
import sys, torch, delve_ray
from delve_ray import storage
storage.S3_ATTEMPTS, storage.S3_SILENT_S = 1, 1.0
from delve_ray.store.core import CovarianceStore
from delve_ray.store.protocol import StoreConfig
store = CovarianceStore(StoreConfig("r", sys.argv[1], 1, publish_every=0.0, silent_after=0.0), finish_timeout=0.2)
model = torch.nn.Linear(4, 6)
tracker = delve_ray.SaturationTracker(store=store, modules=model)
model(torch.randn(8, 4))
print("ready", flush=True)
sys.stdin.readline()
tracker.add_saturations(0)
tracker.close(timeout=1.0)
print("closed", flush=True)
"""


@pytest.mark.slow
def test_a_process_ends_though_the_storage_says_nothing(server: Server, place: str, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": REPOSITORY, "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", END, direct(server, place)],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        with server.stopped():
            output, log = process.communicate("go\n", timeout=WITHIN_S)
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, output) == (0, "closed\n"), log
    assert "rank 0 of run r did not take leave in time" in log or "writer parquet did not" in log
    assert QUOTED not in log


# --- the store's state ---------------------------------------------------------------------------------


def remote(savefile: str, **changes: Any) -> CovarianceStore:
    config = stores.config(savefile=savefile, save_to=("parquet",), snapshot_every=3600.0, **changes)
    return CovarianceStore(config, saver=Saver(Storage(savefile), 3600.0))


@pytest.mark.slow
def test_a_store_that_is_started_anew_goes_on_during_faults(server: Server, proxy: Proxy, place: str) -> None:
    savefile = proxy.uri(place)
    first = remote(savefile)
    workers = [stores.Worker(first, rank) for rank in range(2)]
    parts = [stores.rows(n, 5, 1e3) for n in (20, 30, 5, 8)]
    with proxy.faulty(in_a_row=2, busy=0.08, cut_request=0.08, cut_response=0.08, no_response=0.08):
        workers[0].send({(1, 0): parts[0]}, step=3)
        workers[1].send({(1, 0): parts[1]}, step=3)
        assert first.saver is not None
        assert first.saver.wait_saved(first._version, WITHIN_S)
        not_saved = workers[0].next({(1, 0): parts[2]}, step=3)
        assert not first.take(*not_saved).saved
        # Another one has begun before this one has ended, as when Ray has lost sight of it.
        second = remote(savefile)
        assert second.restore()
        for worker in workers:
            worker.store = second
        assert second.heartbeat(workers[0].source).next_seq == 1
        assert second.take(*not_saved).merged
        assert not second.take(*not_saved).merged
        workers[1].send({(1, 0): parts[3]}, step=3, closes=True)
        workers[0].send({}, step=3, closes=True)
        for worker in workers:
            worker.leave()
        assert second.wait_finished(WITHIN_S)
    (row,) = read_covariances(savefile).to_pylist()
    assert (row["samples"], row["workers"], row["step"], row["attempt"]) == (63, 2, 3, 0)
    reference = np.cov(np.concatenate(parts).T, bias=True)
    assert np.abs(unpack_triangle(np.asarray(row["covariance"]), 5) - reference).max() < TOLERANCE * reference.max()
    assert [name for name in files(server, place) if name.startswith("store/snapshot-")], "of its end"
    assert second.progress().problems == ()


@pytest.mark.slow
def test_shards_have_their_rows_and_snapshots_there(server: Server, proxy: Proxy, place: str) -> None:
    options = stores.config(savefile=proxy.uri(place), save_to=("parquet",), num_shards=2, snapshot_every=3600.0)
    sharded: Any = LocalShards(options, lambda own: Saver(Storage(own.savefile), 3600.0))
    workers = [stores.Worker(sharded, rank, options) for rank in range(2)]
    parts = {(layer, rank): stores.rows(20 + rank, d, 1e3) for layer, d in ((0, 3), (1, 5)) for rank in range(2)}
    with proxy.faulty(in_a_row=2, busy=0.08, cut_request=0.08, cut_response=0.08, no_response=0.08):
        for rank, worker in enumerate(workers):
            worker.send({(layer, 0): parts[layer, rank] for layer in (0, 1)}, step=3)
        for shard in sharded.local_shards:
            assert shard.saver.wait_saved(shard._version, WITHIN_S)
        saved = {name.rpartition("/")[0] for name in files(server, place) if "snapshot-" in name}
    with proxy.away():
        for worker in workers:
            worker.send({}, step=3, closes=True)
        wait_until(lambda: sharded.progress().published == 1, "a window that cannot be written yet")
    for worker in workers:
        worker.leave()
    assert sharded.wait_finished(WITHIN_S)
    assert {"shards/0/store", "shards/1/store"} <= saved
    rows = {row["layer"]: row for row in read_covariances(direct(server, place)).to_pylist()}
    assert set(rows) == {"conv", "fc"}
    for layer, name in enumerate(("conv", "fc")):
        assert (rows[name]["samples"], rows[name]["workers"]) == (41, 2)
        reference = np.cov(np.concatenate([parts[layer, rank] for rank in range(2)]).T, bias=True)
        found = unpack_triangle(np.asarray(rows[name]["covariance"]), len(reference))
        assert np.abs(found - reference).max() < TOLERANCE * np.linalg.eigvalsh(reference)[-1]
    assert sharded.progress().problems == ()


class Away:
    """A store that one of its workers cannot reach."""

    def __init__(self, store: CovarianceStore) -> None:
        self.store, self.away = store, False

    def __getattr__(self, name: str) -> Any:
        if self.away and name in ("take", "heartbeat", "leave", "progress", "flush"):
            raise delve_ray.StoreError("no answer")
        return getattr(self.store, name)


def test_what_was_not_delivered_is_merged_into_a_run_on_s3(
    server: Server,
    proxy: Proxy,
    place: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    savefile = proxy.uri(place)
    store = in_process(savefile)
    worker = tracked(store, spill_dir=tmp_path / "spill")
    link = worker.tracker._shipper.store = Away(store)  # type: ignore[assignment]
    worker.window(0, BATCHES)
    worker.tracker.flush()
    link.away = True
    for step in STEPS[1:]:
        worker.window(step, BATCHES)
    worker.tracker.close(timeout=0.3)
    store.finish("closed")
    assert store.wait_finished(WITHIN_S)
    assert read_spectra(savefile).num_rows == 1
    (folder,) = (tmp_path / "spill").glob("*-undelivered")
    assert f"`delve-ray recover {masked(savefile)} {folder}` merges it" in caplog.text
    opened: list[str] = []  # moto looks at no key

    def reopened(config: StoreConfig, **options: Any) -> CovarianceStore:
        opened.append(config.savefile)
        return CovarianceStore(config, **options)

    monkeypatch.setattr("delve_ray.recovery.CovarianceStore", reopened)
    outcomes = recover(savefile, [folder])
    assert opened == [savefile], "with the key that no file has"
    assert {(outcome.step, outcome.merged) for outcome in outcomes} >= {(step, True) for step in STEPS[1:]}
    check_rows(savefile, expected())
    assert list(folder.glob("delta-*")) == []
    assert not any(secret.encode() in data for data in files(server, place).values() for secret in (SECRET, QUOTED))


# --- files: large, many, replaced, removed --------------------------------------------------------------


def pending_uploads(server: Server, path: str) -> int:
    """Uploads of files below a path that were begun and neither completed nor given up."""
    return server.request("GET", f"/{BUCKET}?uploads").decode().count(f"<Key>{path}/")


@pytest.mark.slow
def test_a_covariance_of_many_parts(server: Server, proxy: Proxy, place: str) -> None:
    features = 1900
    triangle = np.random.default_rng(0).normal(size=features * (features + 1) // 2)  # which nothing compresses
    row = layer_row("wide", features=features, covariance=triangle, mean=np.zeros(features))
    storage = Storage(proxy.uri(place))
    writer = ParquetWriter(storage)
    with proxy.faulty("PUT", in_a_row=2, cut_request=0.5):  # connections break in the middle of some parts
        writer.write(window([row]))
    assert proxy.count("cut request") > 0
    (found,) = read_covariances(direct(server, place)).column("covariance")
    assert np.array_equal(found.values.to_numpy(), triangle)
    assert len(files(server, place)["covariances/000000-0000000000-000000.parquet"]) > PART


@pytest.mark.slow
def test_half_an_upload_is_no_file(server: Server, proxy: Proxy, place: str, hasty: None) -> None:
    storage = Storage(proxy.uri(place))
    data = np.random.default_rng(1).bytes(2 * PART + 5)
    storage.write_atomic("a/kept", b"before")
    broken: list[str] = []

    def only_the_first_part(method: str, target: str) -> None:
        proxy.shares = {"cut request": 1.0} if method == "PUT" and "partNumber=2" in target else {}
        broken.extend([target] * bool(proxy.shares))

    proxy.before = only_the_first_part
    for name in ("a/kept", "a/new"):
        with pytest.raises(OSError, match="AWS Error"):
            storage.write_atomic(name, data)
    assert len(broken) == 2
    assert pending_uploads(server, place) == 2, "they had begun"
    assert storage.list_files("a", "") == ["a/kept"]
    assert storage.read_bytes("a/kept") == b"before"
    proxy.before, proxy.shares = (lambda method, target: None), {}
    for name in ("a/kept", "a/new"):
        storage.write_atomic(name, data)
        assert storage.read_bytes(name) == data


def test_what_cannot_be_made_leaves_what_was_there(server: Server, place: str) -> None:
    def pieces() -> Iterator[bytes]:
        yield b"the first half"
        raise MemoryError("no room for the second")

    storage = Storage(direct(server, place))
    storage.write_atomic("kept", b"before")
    for name in ("kept", "new"):
        with pytest.raises(MemoryError):
            storage.write_atomic(name, pieces())
    assert files(server, place) == {"kept": b"before"}


@pytest.mark.slow
def test_a_directory_of_more_files_than_one_page(server: Server, proxy: Proxy, place: str) -> None:
    connection = HTTPConnection(HOST, server.port)
    names = [f"spectra/{number:06d}.parquet" for number in range(1001)]
    for name in names:
        connection.request("PUT", f"/{BUCKET}/{place}/{name}", b"")
        assert connection.getresponse().read() == b""
    connection.close()
    assert Storage(proxy.uri(place)).list_files("spectra", ".parquet") == names
    assert proxy.requests["GET", "fine"] == 2, "two pages"


def test_a_file_that_is_replaced_while_it_is_read_is_whole(server: Server, proxy: Proxy, place: str) -> None:
    other, storage = Storage(direct(server, place)), Storage(proxy.uri(place))
    for before, after in ((b"short", b"a longer one"), (b"a longer one", b"short")):
        other.write_atomic("run.json", before)
        replace = iter([after])

        def replaced(method: str, target: str, new: Iterator[bytes] = replace) -> None:
            if method == "GET" and target.endswith("run.json") and (data := next(new, None)):
                other.write_atomic("run.json", data)

        proxy.before = replaced
        assert storage.read_bytes("run.json") == after
        assert next(replace, None) is None, "it was replaced between its size and its content"


def test_rows_that_are_superseded_while_they_are_read(server: Server, proxy: Proxy, place: str) -> None:
    writer = ParquetWriter(Storage(direct(server, place)))
    writer.write(window([layer_row(samples=1)], final=False))
    newer = iter([window([layer_row(samples=2)], revision=1)])

    def superseded(method: str, target: str) -> None:
        if method == "GET" and target.endswith("000000.parquet") and (new := next(newer, None)):
            writer.write(new)

    proxy.before = superseded
    assert read_spectra(proxy.uri(place), ["samples", "final"]).to_pylist() == [{"samples": 2, "final": True}]
    assert next(newer, None) is None
    with pytest.raises(FileNotFoundError):
        Storage(proxy.uri(place)).read_bytes("spectra/000000-0000000000-000000.parquet")


def test_of_two_that_write_a_new_file_the_second_is_told(server: Server, place: str) -> None:
    storage = Storage(direct(server, place))
    assert storage.write_new("run.json", b"one")
    assert not storage.write_new("run.json", b"two")
    assert storage.read_bytes("run.json") == b"one"


class Failing(Storage):
    """A storage whose next writes fail."""

    failures, tries = 0, 0

    def write_atomic(self, relative: str, data: Data) -> None:
        self.tries += 1
        if self.failures:
            self.failures -= 1
            raise OSError("busy")
        super().write_atomic(relative, data)


@pytest.mark.parametrize(("problems", "failures", "tries", "end"), [([], 2, 3, "closed"), (["disk"], 2, 1, None)])
def test_the_end_of_a_run_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, problems: list[str], failures: int, tries: int, end: str | None
) -> None:
    """But not where other files could not be written either, for who closes the run waits for it."""
    monkeypatch.setattr(run_file, "END_RETRY_S", (0.0, 0.0, 0.0))
    storage = Failing(tmp_path / "run")
    described = run_file.RunFile(storage, stores.config(savefile=str(tmp_path / "run")), stores.LAYERS)
    storage.failures, storage.tries = failures, 0
    described.end("closed", problems)
    assert storage.tries == tries
    assert (read_run(storage)["end"] or {}).get("why") == end


# --- what a URI opens ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_request_is_repeated_so_often_and_a_small_file_takes_one(proxy: Proxy, place: str) -> None:
    storage = Storage(proxy.uri(place))
    for name in ("a", "b"):
        proxy.requests.clear()
        storage.write_atomic(name, name.encode())
        assert proxy.requests == {("PUT", "fine"): 1}
    proxy.requests.clear()
    with proxy.faulty(busy=1.0), pytest.raises(OSError, match="SLOW_DOWN"):
        storage.write_atomic("c", b"3")
    assert proxy.requests == {("PUT", "busy"): S3_ATTEMPTS}
    assert storage.list_files("", "") == ["a", "b"]


@pytest.mark.slow
def test_a_server_that_says_nothing_is_an_error(
    server: Server, place: str, monkeypatch: pytest.MonkeyPatch, hasty: None
) -> None:
    monkeypatch.setattr("delve_ray.storage.S3_SILENT_S", 1.0)
    storage = Storage(direct(server, place))
    with server.stopped(), pytest.raises(OptionError, match=r"savefile='s3://\w+:\*\*\*@bucket.*Timeout") as told:
        storage.prepare()
    assert QUOTED not in str(told.value)


CHANGED = {"connect_timeout", "request_timeout", "allow_delayed_open"}


def opened(text: str) -> pafs.FileSystem:
    return Storage(text).filesystem


def plain(text: str) -> pafs.FileSystem:
    return pafs.FileSystem.from_uri(text)[0]


def pickled(filesystem: pafs.FileSystem) -> dict[str, Any]:
    """The options that a filesystem of S3 is made of."""
    options: dict[str, Any] = filesystem.__reduce__()[1][0]
    return options | {"region": filesystem.region}


def test_options_of_a_uri_hold(server: Server) -> None:
    bucket = f"bucket-{uuid.uuid4().hex}"
    closed = uri(server.port, "run").replace(BUCKET, bucket)
    with pytest.raises(OptionError, match="cannot write there"):
        Storage(closed).prepare()
    Storage(f"{closed}&allow_bucket_creation=true&region=eu-north-1").prepare()
    Storage(closed).prepare()
    assert Storage(f"{closed}&region=eu-north-1").filesystem.region == "eu-north-1"
    ours, theirs = (pickled(open_uri(f"{closed}&allow_bucket_deletion=true&region=x")) for open_uri in (opened, plain))
    assert {name for name in ours if ours[name] != theirs[name]} == CHANGED, "all else is as the URI says"
    of_uris = "s3://bucket/run?region=eu-north-1&tls_verify_certificates=false"  # which only a URI can say
    assert opened(of_uris).equals(plain(of_uris))
    with pytest.raises(OptionError, match=r"Unexpected query parameter.*'speed'"):
        Storage(f"{closed}&speed=high")


def test_keys_come_from_the_environment(server: Server, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    storage = Storage(f"s3://{BUCKET}/{place}?endpoint_override={HOST}:{server.port}&scheme=http")
    storage.write_atomic("x", b"1")
    assert files(server, place) == {"x": b"1"}


@pytest.mark.slow
def test_google_storage_is_not_asked_for_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("delve_ray.storage.GCS_RETRY_S", 1)
    with pytest.raises(OSError, match="Retry policy exhausted"):
        Storage(f"gs://anonymous@bucket/run?endpoint_override={HOST}:9&scheme=http").exists("x")
    own = "gs://anonymous@bucket/run?retry_limit_seconds=7"
    assert Storage(own).filesystem.equals(pafs.FileSystem.from_uri(own)[0])


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://key:secret@bucket/run", "s3://key:***@bucket/run"),
        ("s3://key:sec%2Fret@bucket/a@b?region=x", "s3://key:***@bucket/a@b?region=x"),
        ("s3://key:sec/ret@bucket/run", "s3://key:***@bucket/run"),
        ("hdfs://host:8020/runs/a@b", "hdfs://host:8020/runs/a@b"),
        ("s3://bucket/a:b@c", "s3://bucket/a:b@c"),
        ("/runs/a:b@c", "/runs/a:b@c"),
    ],
)
def test_passwords_are_masked(text: str, shown: str) -> None:
    assert masked(text) == shown


def test_a_key_that_is_not_quoted_stays_out_of_messages() -> None:
    with pytest.raises(OptionError, match="Cannot parse URI") as told:
        Storage("s3://key:sec/ret@bucket/run")
    assert "sec/ret" not in str(told.value)


def test_what_opens_a_storage_elsewhere(server: Server, place: str, tmp_path: Path) -> None:
    text = direct(server, place)
    Storage(Storage(text).child("a/b").savefile).write_atomic("c", b"1")
    assert files(server, place) == {"a/b/c": b"1"}
    assert Storage(tmp_path / "run").child("x").savefile == str(tmp_path / "run" / "x")
    made = pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem())
    with pytest.raises(OptionError, match="no URI describes this 'subtree' filesystem"):
        _ = Storage("run", filesystem=made).savefile
