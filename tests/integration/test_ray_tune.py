"""Ray Tune: a store per trial, the trial's figures wherever somebody looks for them, nothing left behind."""

from __future__ import annotations

import glob
import json
import os
from pathlib import Path
from typing import Any

import pytest

import delve_ray
from delve_ray.errors import OptionError, ReadError
from delve_ray.integrations.tune import rank, ranking_table
from tests.chaos.processes import wait_until
from tests.events import tag_values

pytestmark = [pytest.mark.slow, pytest.mark.ray]

KEY = "saturation/eval/mean"
WAYS_TO_END = ("closed", "the processes of all its workers have ended")
"""A trial that fails or is stopped may be killed before it can close."""


def make_model(width: int) -> Any:
    import torch

    torch.manual_seed(width)
    return torch.nn.Sequential(
        torch.nn.Linear(64, width),
        torch.nn.ReLU(),
        torch.nn.Linear(width, width),
        torch.nn.ReLU(),
        torch.nn.Linear(width, 10),
    )


def digits() -> tuple[Any, Any, Any, Any]:
    import torch
    from sklearn.datasets import load_digits

    data = load_digits()
    x, y = torch.tensor(data.data, dtype=torch.float32) / 8 - 1, torch.tensor(data.target)
    return x[:1200], y[:1200], x[1200:], y[1200:]


def epochs(model: Any, count: int, lr: float = 1e-2) -> Any:
    """Train on digits; yields the accuracy after each epoch, of which train and eval rows were recorded."""
    import torch

    x, y, test_x, test_y = digits()
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for _ in range(count):
        model.train()
        for batch in torch.arange(len(x)).split(100):
            loss = torch.nn.functional.cross_entropy(model(x[batch]), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            yield (model(test_x).argmax(1) == test_y).float().mean().item()


def trial(config: dict[str, Any]) -> None:
    """As users write it: a relative savefile, and no word of who this is. It may fail, and it may never close."""
    from ray import tune

    model = make_model(config["width"])
    tracker = delve_ray.SaturationTracker("saturation", ["parquet", "tensorboard"], model)
    for epoch, accuracy in enumerate(epochs(model, config.get("epochs", 2))):
        tracker.add_saturations(step=epoch)
        if config.get("fails") and epoch:
            raise RuntimeError("on purpose")
        tune.report({"accuracy": accuracy, **tracker.metrics(wait=True)})
    if config.get("closes", True):
        tracker.close()


def fit(tmp_path: Path, function: Any, space: dict[str, Any], **config: Any) -> Any:
    from ray import tune

    run_config = {"failure_config": config.pop("failure_config")} if "failure_config" in config else {}
    tuner = tune.Tuner(
        tune.with_resources(function, {"cpu": 1}),
        param_space=space,
        tune_config=tune.TuneConfig(**config),
        run_config=tune.RunConfig(name="sweep", storage_path=str(tmp_path / "results"), verbose=0, **run_config),
    )
    return tuner.fit()


def stores() -> list[str]:
    """Stores that the cluster has."""
    from ray.util import list_named_actors

    return [actor["name"] for actor in list_named_actors(all_namespaces=True) if actor["namespace"] == "delve_ray"]


def nothing_is_left(seconds: float = 60.0) -> None:
    wait_until(lambda: not stores(), f"the end of {stores()}", seconds)


@pytest.fixture(scope="module")
def swept(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """20 trials, 4 at a time, 5 of which fail on purpose; a third of those that end well do not close.

    Processes serve several trials, one after the other.
    """
    from ray import tune

    tmp_path = tmp_path_factory.mktemp("sweep")
    ways = [{"fails": index % 4 == 3, "closes": index % 3 > 0} for index in range(20)]
    space = {"width": tune.grid_search([4 + index for index in range(20)]), "lr": 0.1, "nested": {"a": (1, 2)}}

    def function(config: dict[str, Any]) -> None:
        trial(config | ways[config["width"] - 4])

    results = fit(tmp_path, function, space, max_concurrent_trials=4, reuse_actors=True)
    nothing_is_left()
    return results, tmp_path


def test_a_sweep_with_failures_ranks_what_has_finished(swept: tuple[Any, Path]) -> None:
    results, _ = swept
    assert len(results.errors) == 5
    table = rank(results, within=1.0)
    assert table.num_rows == 15
    found = {result.config["width"]: result for result in results if result.error is None}
    rows = table.to_pylist()
    assert sorted(row["config/width"] for row in rows) == sorted(found)
    assert [row[KEY] for row in rows] == sorted((r.metrics[KEY] for r in found.values()), reverse=True)
    for row in rows:
        width = row["config/width"]
        assert row["num_parameters"] == 64 * width + width + width * width + width + 10 * width + 10
        assert row["accuracy"] == found[width].metrics["accuracy"]
        assert row["config/nested/a"] == [1, 2]
        assert row["path"] == found[width].path
        wasted = [layer["features"] - layer["intrinsic_dimensionality"] for layer in row["wasted"]]
        assert wasted == sorted(wasted, reverse=True)
        assert 0 < len(wasted) <= 3
        assert min(wasted) > 0
    text = ranking_table(table)
    assert f"{rows[0]['trial']} wastes most in {rows[0]['wasted'][0]['layer']} (" in text
    assert "left out, as they failed or did not report both metrics: 5 (" in text


def test_the_figures_are_the_same_everywhere(swept: tuple[Any, Path]) -> None:
    """In Tune's result, its tables, the Parquet files and TensorBoard."""
    results, _ = swept
    frame = results.get_dataframe().set_index("trial_id")
    best = results.get_best_result(KEY, "max")
    assert best.metrics[KEY] == max(r.metrics[KEY] for r in results if r.error is None or KEY in r.metrics)
    for result in results:
        path = Path(result.path, "saturation")
        rows = delve_ray.read_spectra(path).to_pylist()
        assert {row["trial"] for row in rows} == {result.metrics["trial_id"]}
        config = json.loads(rows[0]["trial_config"])
        assert config == {"width": result.config["width"], "lr": 0.1, "nested": {"a": [1, 2]}}
        last = max(row["step"] for row in rows if result.error is None or row["step"] < 1)
        for phase in ("train", "eval"):
            of_phase = [r["saturation"] for r in rows if (r["phase"], r["step"]) == (phase, last) and r["final"]]
            key = f"saturation/{phase}/mean"
            assert len(of_phase) == 3
            assert sum(of_phase) / 3 == pytest.approx(result.metrics[key], rel=1e-12)
            assert frame.loc[result.metrics["trial_id"], key] == result.metrics[key]
            assert tag_values(path, key)[last] == pytest.approx(result.metrics[key], rel=1e-6)


def test_failed_trials_leave_readable_files(swept: tuple[Any, Path]) -> None:
    results, _ = swept
    for result in results:
        run = json.loads(Path(result.path, "saturation", "run.json").read_text())
        assert run["end"]["why"] in WAYS_TO_END
        steps = {row["step"] for row in delve_ray.read_spectra(Path(result.path, "saturation")).to_pylist()}
        assert steps == {0, 1}


def test_nothing_is_left_of_a_sweep(swept: tuple[Any, Path]) -> None:
    _, tmp_path = swept
    assert not stores()
    left = [name for name in glob.glob(f"{tmp_path}/**/*", recursive=True) if name.endswith((".lock", ".tmp"))]
    assert not left


def test_a_trial_that_is_stopped_ends_its_run(ray_session: None, tmp_path: Path) -> None:
    """ASHA stops trials in the middle; their processes are gone before anybody could close anything."""
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler

    results = fit(
        tmp_path,
        trial,
        {"width": tune.grid_search([2, 3, 24, 32]), "epochs": 6, "closes": False},
        scheduler=ASHAScheduler(max_t=6, grace_period=1, reduction_factor=2),
        metric=KEY,
        mode="max",
        max_concurrent_trials=2,
    )
    iterations = {result.config["width"]: result.metrics["training_iteration"] for result in results}
    assert min(iterations.values()) < 6, "some were stopped"
    nothing_is_left()
    for result in results:
        run = json.loads(Path(result.path, "saturation", "run.json").read_text())
        assert run["end"]["why"] in WAYS_TO_END
        steps = {r["step"] for r in delve_ray.read_spectra(Path(result.path, "saturation")).to_pylist() if r["final"]}
        assert set(range(result.metrics["training_iteration"])) <= steps


def test_a_trial_that_is_tried_again_goes_on_with_its_run(ray_session: None, tmp_path: Path) -> None:
    from ray import tune

    marker = str(tmp_path / "failed")

    def function(config: dict[str, Any]) -> None:
        fails = not os.path.exists(marker)
        if fails:
            Path(marker).touch()
        trial(config | {"fails": fails})

    failures = tune.FailureConfig(max_failures=1)
    (result,) = fit(tmp_path, function, {"width": 8}, failure_config=failures)
    assert result.error is None
    nothing_is_left()
    run = json.loads(Path(result.path, "saturation", "run.json").read_text())
    assert [attempt["attempt"] for attempt in run["attempts"]] == [0, 1]
    rows = delve_ray.read_spectra(Path(result.path, "saturation")).to_pylist()
    assert {(row["attempt"], row["step"]) for row in rows} == {(1, 0), (1, 1)}
    assert {row["samples"] for row in rows if row["phase"] == "train"} == {1200}


def test_a_full_cluster_still_has_room_for_the_stores(ray_session: None, tmp_path: Path) -> None:
    """All CPUs are the trials'; a store that asked for one would wait for ever."""
    import ray
    from ray import tune

    cpus = int(ray.cluster_resources()["CPU"])
    results = fit(tmp_path, trial, {"width": tune.grid_search([4, 5]), "epochs": 1})
    assert not results.errors

    def wide(config: dict[str, Any]) -> None:
        trial(config)

    tuner = tune.Tuner(
        tune.with_resources(wide, {"cpu": cpus}),
        param_space={"width": 6, "epochs": 1},
        run_config=tune.RunConfig(name="full", storage_path=str(tmp_path / "full"), verbose=0),
    )
    (result,) = tuner.fit()
    assert result.error is None
    assert KEY in result.metrics
    nothing_is_left()


class Trainable:
    """The class API; made a Trainable where Ray is imported."""

    def setup(self, config: dict[str, Any]) -> None:
        self.model = make_model(config["width"])
        self.loop = enumerate(epochs(self.model, 3))
        self.tracker = delve_ray.SaturationTracker(None, "parquet", self.model)

    def step(self) -> dict[str, Any]:
        epoch, accuracy = next(self.loop)
        self.tracker.add_saturations(step=epoch)
        return {"accuracy": accuracy, **self.tracker.metrics(wait=True), "done": epoch == 2}

    def cleanup(self) -> None:
        self.tracker.close()


def test_the_class_interface(ray_session: None, tmp_path: Path) -> None:
    from ray import tune

    tuner = tune.Tuner(
        type("OfTune", (Trainable, tune.Trainable), {}),
        param_space={"width": 5},
        run_config=tune.RunConfig(name="class", storage_path=str(tmp_path / "class"), verbose=0),
    )
    (result,) = tuner.fit()
    rows = delve_ray.read_spectra(Path(result.path, "saturation")).to_pylist()
    assert {row["step"] for row in rows} == {0, 1, 2}
    assert {row["trial"] for row in rows} == {result.metrics["trial_id"]}
    assert json.loads(rows[0]["trial_config"]) == {"width": 5}
    nothing_is_left()


def test_optuna_searches_by_saturation(ray_session: None, tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    from ray import tune
    from ray.tune.search.optuna import OptunaSearch

    space = {"width": tune.randint(2, 30), "epochs": 1}
    search = OptunaSearch(metric=KEY, mode="min", seed=0)
    results = fit(tmp_path, trial, space, search_alg=search, num_samples=4, max_concurrent_trials=2)
    assert not results.errors
    best = results.get_best_result(KEY, "min")
    assert best.metrics[KEY] == min(result.metrics[KEY] for result in results)
    values = [study_trial.value for study_trial in search._ot_study.trials]
    assert sorted(values) == sorted(result.metrics[KEY] for result in results), "what Optuna was told"
    nothing_is_left()


def population(config: dict[str, Any]) -> None:
    """A trial of population-based training: it may go on from another one's checkpoint, with another config."""
    import tempfile

    import torch
    from ray import tune

    model = make_model(8)
    start = 0
    if (checkpoint := tune.get_checkpoint()) is not None:
        with checkpoint.as_directory() as folder:
            state = torch.load(f"{folder}/state.pt", weights_only=True)
        model.load_state_dict(state["model"])
        start = state["epoch"]
    with delve_ray.SaturationTracker("saturation", "parquet", model) as tracker:
        for epoch, accuracy in enumerate(epochs(model, 6 - start, lr=config["lr"]), start):
            tracker.add_saturations(step=epoch)
            with tempfile.TemporaryDirectory() as folder:
                torch.save({"model": model.state_dict(), "epoch": epoch + 1}, f"{folder}/state.pt")
                metrics = {"accuracy": accuracy, "epoch": epoch, **tracker.metrics(wait=True)}
                tune.report(metrics, checkpoint=tune.Checkpoint.from_directory(folder))


def test_population_based_training(ray_session: None, tmp_path: Path) -> None:
    from ray import tune
    from ray.tune.schedulers import PopulationBasedTraining

    scheduler = PopulationBasedTraining(
        time_attr="training_iteration",
        perturbation_interval=2,
        quantile_fraction=0.5,
        hyperparam_mutations={"lr": tune.loguniform(1e-4, 1e-2)},
        synch=True,
    )
    space = {"lr": tune.grid_search([1e-5, 3e-3])}
    results = fit(tmp_path, population, space, scheduler=scheduler, metric=KEY, mode="max", max_concurrent_trials=2)
    assert not results.errors, results.errors
    assert scheduler._num_perturbations > 0, "a trial went on from another's checkpoint"
    nothing_is_left()
    attempts = []
    for result in results:
        path = Path(result.path, "saturation")
        rows = delve_ray.read_spectra(path).to_pylist()
        assert {row["step"] for row in rows} == set(range(6))
        run = json.loads((path / "run.json").read_text())
        attempts.append(len(run["attempts"]))
        means: dict[tuple[int, int], float] = {}
        for row in delve_ray.read_spectra(path, attempts="all", filters=[("phase", "==", "eval")]).to_pylist():
            key = row["attempt"], row["step"]
            means[key] = means.get(key, 0.0) + row["saturation"] / 3
        for line in Path(result.path, "result.json").read_text().splitlines():
            told = json.loads(line)  # what the scheduler compared
            assert any(
                step == told["epoch"] and mean == pytest.approx(told[KEY], rel=1e-12)
                for (_, step), mean in means.items()
            )
    assert max(attempts) > 1


def train_in_trial(config: dict[str, Any]) -> None:
    """One of two workers of a trainer that a trial has started."""
    import ray.train
    import torch
    from ray.train.torch import prepare_model

    worker = ray.train.get_context().get_world_rank()
    torch.manual_seed(worker)
    model = prepare_model(make_model(config["width"]))
    with delve_ray.SaturationTracker("saturation", "parquet", model, trial=config["trial"]) as tracker:
        for epoch, accuracy in enumerate(epochs(model, 2)):
            tracker.add_saturations(step=epoch)
            tracker.metrics(wait=True)
            ray.train.report({"accuracy": accuracy})


def trainer_trial(config: dict[str, Any]) -> None:
    """The form that Ray recommends: a function of Tune's that starts a trainer, and hands its trial on."""
    import ray.train
    from ray.train.torch import TorchTrainer
    from ray.tune.integration.ray_train import TuneReportCallback

    from delve_ray.integrations.report import SaturationReportCallback
    from delve_ray.integrations.tune import current_trial

    here = current_trial()
    TorchTrainer(
        train_in_trial,
        train_loop_config=config | {"trial": here},
        scaling_config=ray.train.ScalingConfig(num_workers=2),
        run_config=ray.train.RunConfig(
            name=f"train-{here.id}",
            storage_path=config["storage"],
            callbacks=[SaturationReportCallback("saturation/*"), TuneReportCallback()],
        ),
    ).fit()


def test_a_trainer_inside_a_trial(ray_session: None, tmp_path: Path) -> None:
    from ray import tune

    space = {"width": tune.grid_search([4, 6]), "storage": str(tmp_path / "train")}
    results = fit(tmp_path, trainer_trial, space, max_concurrent_trials=1)
    assert not results.errors, results.errors
    nothing_is_left()
    table = rank(results, within=1.0)
    assert table.num_rows == 2
    for result in results:
        rows = delve_ray.read_spectra(Path(result.path, "saturation")).to_pylist()
        assert {row["trial"] for row in rows} == {result.metrics["trial_id"]}
        assert {(row["workers"], row["world_size"]) for row in rows} == {(2, 2)}
        assert {row["samples"] for row in rows if row["phase"] == "train"} == {2 * 1200}
        final = [r["saturation"] for r in rows if (r["phase"], r["step"]) == ("eval", 1)]
        assert result.metrics[KEY] == pytest.approx(sum(final) / 3, rel=1e-12), "the callback's, of the last window"
        assert "trace/eval/mean" not in result.metrics


def test_what_does_not_rank() -> None:
    with pytest.raises(OptionError, match="results is a str, not the ResultGrid"):
        rank("results")
    with pytest.raises(ReadError, match="none of 0 trials"):
        rank([])
    with pytest.raises(OptionError, match="trial='x' is no trial"):
        delve_ray.SaturationTracker("unused", "parquet", make_model(2), trial="x")  # type: ignore[arg-type]
