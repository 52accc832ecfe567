"""Writers of users and of other services, in the process of a store that is a Ray actor."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

import delve_ray
from delve_ray.errors import OptionError
from tests.chaos.processes import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.ray]


class Lines:
    """Notes what it is called with, one line of JSON a call."""

    name = "lines"

    def __init__(self, secret: str = "") -> None:
        self.secret = secret

    def open(self, run: Any) -> None:
        os.makedirs(run.storage.local_path, exist_ok=True)
        self.path = os.path.join(run.storage.local_path, "lines.jsonl")
        self.note({"open": run.run, "pid": os.getpid(), "parameters": run.model["num_parameters"]})

    def write(self, window: Any) -> None:
        if window.final:
            self.note({"step": window.step, "saturation": {r.layer: r.stats["saturation"] for r in window.rows}})

    def write_scalars(self, scalars: list[Any]) -> None:
        self.note({"scalars": [[scalar.name, scalar.step, scalar.value] for scalar in scalars]})

    def close(self) -> None:
        self.note({"closed": True})

    def note(self, what: dict[str, Any]) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps(what) + "\n")


def notes(savefile: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(savefile, "lines.jsonl").read_text().splitlines()]


def record(tracker: Any, model: Any, step: int) -> None:
    import torch

    torch.manual_seed(step)
    model(torch.randn(50, 4))
    tracker.add_scalar("accuracy", step / 2, step=step)
    tracker.add_saturations(step=step)
    tracker.metrics(wait=True)


def test_a_users_writer_is_called_in_the_stores_process(ray_session: None, savefile: str) -> None:
    import torch

    model = torch.nn.Linear(4, 6)
    save_to = ["parquet", "csv", Lines("password")]
    args = {"csv": {}}
    with delve_ray.SaturationTracker(savefile, save_to, model, run="mine", writer_args=args) as tracker:
        pid = os.getpid()
        for step in range(2):
            record(tracker, model, step)
    found = notes(savefile)
    assert found[0]["open"] == "mine"
    assert found[0]["pid"] != pid
    assert found[0]["parameters"] == 4 * 6 + 6
    rows = {row["step"]: row["saturation"] for row in delve_ray.read_spectra(savefile).to_pylist()}
    assert [note for note in found if "step" in note] == [
        {"step": step, "saturation": {"Linear": rows[step]}} for step in range(2)
    ]
    scalars = [scalar for note in found for scalar in note.get("scalars", [])]
    assert scalars == [["accuracy", 0, 0.0], ["accuracy", 1, 0.5]]
    assert found[-1] == {"closed": True}
    assert len(Path(savefile, "csv", "spectra.csv").read_text().splitlines()) == 3
    options = json.loads(Path(savefile, "run.json").read_text())["options"]
    assert options["save_to"] == ["parquet", "csv", "lines"]
    written = b"".join(path.read_bytes() for path in Path(savefile).rglob("*") if path.is_file())
    assert b"password" not in written


def test_a_store_that_is_restarted_has_its_writers_again(ray_session: None, savefile: str) -> None:
    import ray
    import torch

    model = torch.nn.Linear(4, 6)
    with delve_ray.SaturationTracker(savefile, ["parquet", Lines()], model, run="restarted") as tracker:
        record(tracker, model, 0)
        tracker.flush()
        ray.kill(tracker.store, no_restart=False)
        record(tracker, model, 1)
    found = notes(savefile)
    pids = [note["pid"] for note in found if "open" in note]
    assert len(pids) == 2
    assert pids[0] != pids[1]
    assert {note["step"] for note in found if "step" in note} == {0, 1}
    assert [row["step"] for row in delve_ray.read_spectra(savefile).to_pylist()] == [0, 1]


def test_a_writer_that_cannot_travel(ray_session: None, savefile: str) -> None:
    import threading

    import torch

    writer = Lines()
    writer.lock = threading.Lock()  # type: ignore[attr-defined]
    with pytest.raises(OptionError, match="'lines' cannot be sent to the store's process"):
        delve_ray.SaturationTracker(savefile, ["parquet", writer], torch.nn.Linear(4, 6), run="stays")


def test_offline_services_beside_each_other(ray_session: None, savefile: str, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    pytest.importorskip("mlflow")
    import torch

    model = torch.nn.Linear(4, 6)
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    args = {"wandb": {"mode": "offline", "project": "tests"}, "mlflow": {"tracking_uri": uri}}
    nowhere = {"mlflow": {"tracking_uri": "nothing://here"}}
    with pytest.raises(OptionError, match="save_to='mlflow' cannot begin: "):
        delve_ray.SaturationTracker(f"{savefile}-no", ["mlflow"], model, run="refused", writer_args=nowhere)
    assert not Path(f"{savefile}-no", "run.json").exists(), "it may be tried again"
    names = ["parquet", "wandb", "mlflow"]
    with delve_ray.SaturationTracker(savefile, names, model, run="watched", writer_args=args) as tracker:
        for step in range(2):
            record(tracker, model, step)
    from tests.writers.test_mlflow import history, only_run
    from tests.writers.test_wandb import records

    rows = {row["step"]: row["saturation"] for row in delve_ray.read_spectra(savefile).to_pylist()}
    run = only_run(uri)
    assert history(uri, run.info.run_id, "saturation/train/Linear") == [(0, rows[0]), (1, rows[1])]
    ((about, _, logged),) = wait_until(lambda: records(Path(savefile)), "the offline run")
    assert about["name"] == "watched"
    found = {r["delve_ray/step"]: r["saturation/train/Linear"] for r in logged if "saturation/train/Linear" in r}
    assert found == rows
