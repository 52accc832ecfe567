"""What was not delivered or not written, merged into a run that has ended."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from delve_ray import ReadError, SaturationTracker, StoreError, read_covariances, read_scalars, read_spectra
from delve_ray.cli import main
from delve_ray.moments import F64, unpack_triangle
from delve_ray.parcels import encode_parcel, parcel_name
from delve_ray.recovery import recover
from delve_ray.storage import Storage
from delve_ray.store.core import CovarianceStore
from delve_ray.store.protocol import LayerInfo
from delve_ray.store.saving import Saver
from tests.stores import LAYERS, Keeper, Worker, config, rows, until


class Away:
    """A store that some of its callers cannot reach."""

    def __init__(self, store: CovarianceStore) -> None:
        self.store = store
        self.away = False

    def __getattr__(self, name: str) -> Any:
        if self.away and name in ("take", "heartbeat", "leave", "progress", "flush"):
            raise StoreError("no answer")
        return getattr(self.store, name)


def two_ranks(savefile: str, **options: Any) -> tuple[CovarianceStore, list[nn.Module], list[SaturationTracker]]:
    own = config(savefile=savefile, save_to=("parquet",), snapshot_every=0.05, late_after=0.05, world_size=2)
    store = CovarianceStore(own, saver=Saver(Storage(savefile), 0.05))
    models = [nn.Linear(3, 5) for _ in range(2)]
    trackers = [
        SaturationTracker(modules=model, store=store, rank=rank, publish_every=0, **options)
        for rank, model in enumerate(models)
    ]
    return store, models, trackers


def train(model: nn.Module, count: int, kept: list[F64]) -> None:
    kept.append(model(torch.randn(count, 3)).detach().double().numpy())


def test_what_one_rank_could_not_deliver_corrects_the_run_afterwards(
    savefile: str, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    store, models, trackers = two_ranks(savefile)
    kept: dict[int, list[F64]] = {0: [], 1: [], 2: []}
    link = trackers[1]._shipper.store = Away(store)
    for step in range(3):
        link.away = step > 0
        for rank in range(2):
            train(models[rank], 10 * step + rank + 5, kept[step])
            trackers[rank].add_saturations(step)
            assert link.away or trackers[rank]._shipper.flush(60)
    trackers[1].add_scalar("loss", 0.5, 2)
    trackers[1].close(timeout=0.5)
    assert "ends without having delivered rows of steps [1, 2], 1 scalars" in caplog.text
    assert f"`delve-ray recover {savefile}` merges it" in caplog.text
    until(lambda: store.progress().published == 3)
    trackers[0].close(timeout=0.3)  # rank 1 has not left: the run goes on
    store.finish("closed")
    assert store.wait_finished(60)
    before = {row["step"]: row for row in read_spectra(savefile).to_pylist()}
    assert [before[step]["workers"] for step in range(3)] == [2, 1, 1]
    assert main(["recover", savefile, "--json"]) == 0
    outcomes = json.loads(capsys.readouterr().out)
    assert {(o["rank"], o["step"], o["samples"], o["merged"]) for o in outcomes} >= {(1, 1, 16, True), (1, 2, 26, True)}
    for row in read_covariances(savefile).to_pylist():
        together = np.concatenate(kept[row["step"]])
        assert (row["samples"], row["workers"]) == (len(together), 2), row["step"]
        error = unpack_triangle(row["covariance"], 5) - np.cov(together.T, bias=True)
        assert np.abs(error).max() < 1e-6
    assert [(r["name"], r["rank"], r["value"]) for r in read_scalars(savefile).to_pylist()] == [("loss", 1, 0.5)]
    assert json.loads(Path(savefile, "run.json").read_text())["end"]["why"] == "recovered"
    assert list(Path(savefile, "undelivered").iterdir()) == []
    assert main(["recover", savefile]) == 0
    assert "nothing to merge" in capsys.readouterr().out


def test_what_the_run_had_already_counts_once(savefile: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that never learned that its deltas had arrived writes them all."""
    monkeypatch.setattr("delve_ray.shipping.HEARTBEAT_S", 0.05)  # what is offered again waits for one
    _, models, trackers = two_ranks(savefile)
    kept: list[F64] = []
    for rank in range(2):
        train(models[rank], 20, kept)
        trackers[rank].add_saturations(0)
    assert all(tracker._shipper.flush(60) for tracker in trackers)
    for tracker in trackers:
        tracker._shipper.outbox.offer_all()
        tracker._shipper.outbox.write_all(str(tmp_path / "elsewhere"))
        tracker.close()
    outcomes = recover(savefile, [tmp_path / "elsewhere"])
    assert all(outcome.merged for outcome in outcomes)
    (row,) = read_covariances(savefile).to_pylist()
    assert (row["samples"], row["workers"]) == (40, 2)
    error = unpack_triangle(row["covariance"], 5) - np.cov(np.concatenate(kept).T, bias=True)
    assert np.abs(error).max() < 1e-6


def test_a_run_whose_store_never_wrote_anything_is_made_of_the_files_alone(tmp_path: Path) -> None:
    savefile = str(tmp_path / "run")
    model = nn.Linear(3, 5)
    tracker = SaturationTracker(savefile, "parquet", model, stats="cov", publish_every=0, spill_dir=tmp_path / "spill")
    tracker._shipper.store = link = Away(tracker._shipper.store)  # type: ignore[arg-type]
    link.away = True
    kept: list[F64] = []
    train(model, 30, kept)
    tracker.add_saturations(7)
    tracker.close(timeout=0.2)
    (undelivered,) = [path for path in Path(savefile, "undelivered").iterdir() if "0000000000.arrow" in path.name]
    target = str(tmp_path / "other")
    outcomes = recover(target, [undelivered])
    assert [(o.step, o.samples, o.merged) for o in outcomes] == [(7, 30, True)]
    (row,) = read_covariances(target).to_pylist()
    assert (row["step"], row["samples"], row["workers"]) == (7, 30, 1)
    assert np.abs(unpack_triangle(row["covariance"], 5) - np.cov(kept[0].T, bias=True)).max() < 1e-6


def test_rows_that_a_full_disk_kept_out_are_written_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The store ends while its savefile takes nothing; what it has lies elsewhere on the machine."""
    monkeypatch.setattr("delve_ray.store.windows.rescue_folder", lambda run: str(tmp_path / "rescue"))
    savefile = tmp_path / "run"
    own = config(savefile=str(savefile), save_to=("parquet",), world_size=1)
    store = CovarianceStore(own, finish_timeout=0.2)
    worker = Worker(store, 0)
    part = rows(25, 5)
    for blocked in ("spectra", "covariances", "store"):  # files in the way, which no permission lets anybody pass
        (savefile / blocked).write_text("in the way")
    worker.send({(1, 0): part}, step=9, closes=True)
    worker.leave()
    assert store.wait_finished(60)
    problems = " ".join(store.progress().problems)
    assert f"`delve-ray recover {savefile} {tmp_path / 'rescue'}` writes it" in problems
    assert json.loads((savefile / "run.json").read_text())["end"]["problems"] == list(store.progress().problems)
    for blocked in ("spectra", "covariances", "store"):
        (savefile / blocked).unlink()
    assert main(["recover", str(savefile), str(tmp_path / "rescue")]) == 0
    (row,) = read_covariances(savefile).to_pylist()
    assert (row["step"], row["samples"], row["workers"]) == (9, 25, 1)
    assert np.allclose(unpack_triangle(row["covariance"], 5), np.cov(part.T, bias=True), rtol=1e-10)


def test_a_run_that_goes_on_is_left_alone(savefile: str, capsys: pytest.CaptureFixture[str]) -> None:
    own = config(savefile=savefile, save_to=("parquet",), world_size=1, snapshot_every=0.05)
    store = CovarianceStore(own, saver=Saver(Storage(savefile), 0.05))
    worker = Worker(store, 0)
    worker.send({(1, 0): rows(25, 5)}, step=9, closes=True)
    until(lambda: worker.store.heartbeat(worker.source).saved)
    with pytest.raises(ReadError, match=r"the run has not ended, and its store saved its state \d+ s ago"):
        recover(savefile)
    assert main(["recover", savefile]) == 2
    assert "--force" in capsys.readouterr().err
    worker.leave()
    assert store.wait_finished(60)
    assert recover(savefile) == []


def test_what_cannot_be_merged_is_named_and_kept(savefile: str, capsys: pytest.CaptureFixture[str]) -> None:
    own = config(savefile=savefile, save_to=("parquet",), world_size=1)
    store = CovarianceStore(own, writers=None)
    worker = Worker(store, 0)
    delta, buffer = worker.next({(1, 0): rows(25, 5)}, step=9, closes=True)
    worker.leave(completed=False)
    other = [LAYERS[0], LayerInfo("fc", "Linear", 6)]
    storage = Storage(savefile)
    storage.write_atomic(f"undelivered/{parcel_name(delta)}", encode_parcel(delta, buffer, own, other, first=True))
    store.finish("closed")
    assert store.wait_finished(60)
    (outcome,) = recover(savefile)
    assert not outcome.merged
    assert "exists with other layers: different fc" in (outcome.problem or "")
    assert main(["recover", savefile]) == 2
    assert "is not merged" in capsys.readouterr().err
    assert storage.exists(f"undelivered/{parcel_name(delta)}"), "nothing is deleted that is not merged"


@pytest.mark.parametrize("content", [b"", b"x" * 100])
def test_a_damaged_file_is_named_and_nothing_is_done(savefile: str, content: bytes) -> None:
    model = nn.Linear(3, 5)
    with SaturationTracker(savefile, "parquet", model) as tracker:
        model(torch.randn(5, 3))
        tracker.add_saturations(0)
    before = read_spectra(savefile)
    Storage(savefile).write_atomic("undelivered/delta-x.arrow", content)
    with pytest.raises(ReadError, match=r"delta-x\.arrow is cut"):
        recover(savefile)
    assert read_spectra(savefile).equals(before)


def test_where_there_is_no_run_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(ReadError, match="no run there"):
        recover(tmp_path)
    with pytest.raises(ReadError, match="no such file or folder"):
        recover(tmp_path, [tmp_path / "nothing"])


def test_a_rescue_is_not_needed_where_everything_was_written(savefile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("delve_ray.store.windows.save_once", lambda *_: pytest.fail("nothing is missing"))
    own = config(savefile=savefile, save_to=("parquet",), world_size=1)
    store = CovarianceStore(own, writers=[keeper := Keeper()])
    worker = Worker(store, 0)
    worker.send({(1, 0): rows(25, 5)}, step=9, closes=True)
    worker.leave()
    assert store.wait_finished(60)
    assert len(keeper.windows) == 1
