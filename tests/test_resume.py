"""Runs that go on: which attempt a worker belongs to, and what of the earlier ones holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from delve_ray import OptionError, ReadError, RegistrationError, SaturationTracker, read_covariances, read_spectra
from delve_ray.connect import identify
from delve_ray.moments import unpack_triangle
from delve_ray.storage import Storage
from delve_ray.store.core import CovarianceStore
from delve_ray.store.saving import Saver
from tests.stores import Worker, config, rows, until


def run(savefile: str, steps: range, seed: int, **options: Any) -> dict[int, np.ndarray]:
    """Train a little; the rows of each step."""
    torch.manual_seed(seed)
    model, kept = nn.Linear(4, 3), {}
    with SaturationTracker(savefile, "parquet", model, stats="cov", **options) as tracker:
        for step in steps:
            kept[step] = model(torch.randn(10 + step, 4)).detach().double().numpy()
            tracker.add_saturations(step)
    return kept


def attempts_of(savefile: str) -> list[int]:
    return [attempt["attempt"] for attempt in json.loads(Path(savefile, "run.json").read_text())["attempts"]]


def test_a_second_attempt_replaces_the_windows_that_it_replays(savefile: str) -> None:
    first = run(savefile, range(5), seed=1)
    with pytest.raises(OptionError, match=r"holds a run already; .* or go on with that run by resume=True"):
        run(savefile, range(1), seed=2)
    second = run(savefile, range(3, 7), seed=2, resume=True)
    assert attempts_of(savefile) == [0, 1]
    truth = {**{(step, 0): first[step] for step in range(3)}, **{(step, 1): kept for step, kept in second.items()}}
    table = read_covariances(savefile).to_pylist()
    assert {(row["step"], row["attempt"]) for row in table} == set(truth)
    for row in table:
        kept = truth[row["step"], row["attempt"]]
        assert row["samples"] == len(kept)
        assert np.abs(unpack_triangle(row["covariance"], 3) - np.cov(kept.T, bias=True)).max() < 1e-6
    everything = read_spectra(savefile, attempts="all").to_pylist()
    assert [(row["step"], row["attempt"]) for row in everything] == [
        *((step, 0) for step in range(3)),
        *((step, attempt) for step in (3, 4) for attempt in (0, 1)),
        *((step, 1) for step in (5, 6)),
    ]
    assert read_covariances(savefile, attempts="all").num_rows == 9
    with pytest.raises(ReadError, match="attempts='first' is neither"):
        read_spectra(savefile, attempts="first")
    third = run(savefile, range(6, 7), seed=3, resume="once more")
    assert attempts_of(savefile) == [0, 1, 2]
    (row,) = [row for row in read_spectra(savefile).to_pylist() if row["step"] == 6]
    assert (row["attempt"], row["samples"]) == (2, len(third[6]))


def test_another_model_or_another_run_is_not_gone_on_with(savefile: str) -> None:
    run(savefile, range(1), seed=1)
    before = Path(savefile, "run.json").read_bytes()
    with pytest.raises(RegistrationError, match="exists with other layers: different Linear"):
        SaturationTracker(savefile, "parquet", nn.Linear(4, 9), resume=True)
    with pytest.raises(RegistrationError, match=r"holds run 'run', not 'other'; .* or run='run' to go on"):
        SaturationTracker(savefile, "parquet", nn.Linear(4, 3), resume=True, run="other")
    assert Path(savefile, "run.json").read_bytes() == before


def test_resume_begins_a_run_where_there_is_none(savefile: str) -> None:
    run(savefile, range(2), seed=1, resume=True)
    assert attempts_of(savefile) == [0]
    assert read_spectra(savefile).num_rows == 2


def test_what_a_store_that_was_killed_had_is_published_when_the_run_is_resumed(savefile: str) -> None:
    own = config(savefile=savefile, save_to=("parquet",), snapshot_every=0.02, world_size=2)
    store = CovarianceStore(own, saver=Saver(Storage(savefile), 0.02))
    workers = [Worker(store, rank, token="none:0") for rank in range(2)]
    workers[0].send({(1, 0): rows(9, 5)}, step=0, closes=True)
    workers[1].send({(1, 0): rows(4, 5)}, step=0)
    until(lambda: all(store.heartbeat(worker.source).saved for worker in workers))
    assert read_spectra(savefile).num_rows == 0, "rank 1 has not closed it"
    store.saver.storage.write_atomic = lambda *_: (_ for _ in ()).throw(OSError("killed"))  # type: ignore
    resumed = CovarianceStore(config(savefile=savefile, save_to=("parquet",), world_size=1, resume=True))
    late = Worker(resumed, 0, token="none:0")  # a launcher that gives every start the same name
    assert late.attempt == 1
    late.send({(1, 0): rows(30, 5)}, step=1, closes=True)
    late.leave()
    assert resumed.wait_finished(60)
    found = [(r["attempt"], r["step"], r["samples"], r["workers"], r["world_size"]) for r in _rows(savefile)]
    assert found == [(0, 0, 13, 1, 2), (1, 1, 30, 1, 1)]


def _rows(savefile: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = read_spectra(savefile).to_pylist()
    return found


def test_the_token_of_an_attempt(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = str(tmp_path / "run")

    def token(**options: Any) -> str:
        return identify(path, "r", 0, options.pop("world_size", 1), **options).token

    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert token() == token(resume=False) == ""
    assert token(resume="second") == token(resume="second", world_size=4) == "second"
    assert token(resume=True) != token(resume=True) != "", "of one rank, each start is an attempt of its own"
    with pytest.raises(OptionError, match=r"resume=True with world_size=2.*resume='second'"):
        token(resume=True, world_size=2)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job7")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    first = identify(path, "r", 0, 2)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    later = identify(path, "r", 1, 2)
    assert (first.token, first.resume, later.token, later.resume) == ("job7:0", False, "job7:2", True)
    assert token(resume=True, world_size=2) == "job7:2"
    assert token(resume="mine") == "mine"


@pytest.mark.parametrize("content", ["", "[]", "{", '{"run": "run", "layers": [{"name": 1}]}'])
def test_a_run_file_that_is_none_is_named(savefile: str, content: str) -> None:
    Path(savefile).mkdir()
    Path(savefile, "run.json").write_text(content)
    with pytest.raises(ReadError, match=r"run\.json"):
        SaturationTracker(savefile, "parquet", nn.Linear(4, 3), resume=True)
    assert Path(savefile, "run.json").read_text() == content
