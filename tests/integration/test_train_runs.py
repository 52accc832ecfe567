"""What a Ray Train run needs no word for: where files lie, metrics in reports, how it goes on, and where it runs."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest

import delve_ray
from tests.chaos.processes import family, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.ray]

KEY = "saturation/train/mean"
ROWS = 40


def make_model() -> Any:
    import torch

    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))


def epoch_rows(rank: int, epoch: int) -> Any:
    import torch

    return torch.randn(ROWS, 6, generator=torch.Generator().manual_seed(1000 * rank + epoch))


def checkpoint_of(state: dict[str, Any]) -> Any:
    import ray.train

    folder = tempfile.mkdtemp()
    Path(folder, "state.json").write_text(json.dumps(state))
    return ray.train.Checkpoint.from_directory(folder)


def fit(worker: Any, tmp_path: Path | str, name: str, *, workers: Any = 2, config: Any = None, **run: Any) -> Any:
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    scaling = workers if isinstance(workers, ScalingConfig) else ScalingConfig(num_workers=workers)
    return TorchTrainer(
        worker,
        train_loop_config=config or {},
        scaling_config=scaling,
        run_config=RunConfig(name=name, storage_path=str(tmp_path), **run),
    ).fit()


def saturations(path: Path, step: int) -> list[float]:
    rows = delve_ray.read_spectra(path, filters=[("step", "==", step)]).to_pylist()
    return [row["saturation"] for row in rows]


def silent(config: dict[str, Any]) -> None:
    """No savefile, and no metrics in the loop's own reports."""
    import ray.train

    rank = ray.train.get_context().get_world_rank()
    model = make_model()
    with delve_ray.SaturationTracker(save_to="parquet", modules=model) as tracker:
        for epoch in range(3):
            model(epoch_rows(rank, epoch))
            tracker.add_saturations(step=epoch)
            tracker.metrics(wait=True)  # so that the test knows which window is the last one
            reported = {"epoch": epoch, "trace/train/mean": -1.0} if epoch < 2 else {"epoch": epoch}
            ray.train.report(reported, checkpoint=checkpoint_of({}))


def test_a_callback_adds_the_metrics_to_every_report(ray_session: None, tmp_path: Path) -> None:
    from delve_ray.integrations.report import SaturationReportCallback

    callbacks = [SaturationReportCallback(["saturation/*", "trace/*"])]
    result = fit(silent, tmp_path, "silent", callbacks=callbacks)
    path = tmp_path / "silent" / "saturation"
    found = [metrics for _, metrics in result.best_checkpoints]
    assert [metrics["epoch"] for metrics in found] == [0, 1, 2]
    for metrics in found:
        values = saturations(path, metrics["epoch"])
        assert len(values) == 2
        assert metrics[KEY] == pytest.approx(sum(values) / 2, rel=1e-12)
    assert [metrics["trace/train/mean"] for metrics in found[:2]] == [-1.0, -1.0], "what the loop says itself, holds"
    assert found[2]["trace/train/mean"] > 0
    assert result.metrics[KEY] == found[2][KEY]
    assert not any(key.startswith("effective_rank") for key in result.metrics)


def test_a_callback_without_a_store_fails_no_report(ray_session: None, tmp_path: Path) -> None:
    from delve_ray.errors import OptionError
    from delve_ray.integrations.report import SaturationReportCallback

    def untracked(config: dict[str, Any]) -> None:
        import ray.train

        ray.train.report({"loss": 1.0}, checkpoint=checkpoint_of({}))

    result = fit(untracked, tmp_path, "untracked", workers=1, callbacks=[SaturationReportCallback()])
    assert result.metrics == {"loss": 1.0}
    for wrong in ((), "", [3], None):
        with pytest.raises(OptionError, match="is no pattern over metric keys"):
            SaturationReportCallback(wrong)  # type: ignore[arg-type]


def resumed(config: dict[str, Any]) -> None:
    """Windows without a step: the checkpoint has the count. The first attempt fails between two checkpoints."""
    import ray.train

    rank = ray.train.get_context().get_world_rank()
    model = make_model()
    first, checkpoint = 0, ray.train.get_checkpoint()
    with delve_ray.SaturationTracker("saturation", "parquet", model) as tracker:
        if checkpoint is not None:
            with checkpoint.as_directory() as folder:
                state = json.loads(Path(folder, "state.json").read_text())
            first = state["epoch"]
            tracker.load_state_dict(state["saturation"])
        for epoch in range(first, 5):
            model(epoch_rows(rank, epoch))
            tracker.add_saturations()
            if epoch == 3 and checkpoint is None:
                tracker.flush()
                raise RuntimeError("on purpose")
            state = {"epoch": epoch + 1, "saturation": tracker.state_dict()}
            ray.train.report({}, checkpoint=checkpoint_of(state) if epoch % 2 else None)


def test_a_checkpoint_has_the_count_of_windows(ray_session: None, tmp_path: Path) -> None:
    from ray.train import FailureConfig

    fit(resumed, tmp_path, "resumed", failure_config=FailureConfig(max_failures=1))
    rows = delve_ray.read_spectra(tmp_path / "resumed" / "saturation", filters=[("layer", "==", "0")]).to_pylist()
    assert [(r["attempt"], r["step"], r["samples"], r["workers"]) for r in rows] == [
        (0, 0, 2 * ROWS, 2),
        (0, 1, 2 * ROWS, 2),
        (1, 2, 2 * ROWS, 2),
        (1, 3, 2 * ROWS, 2),
        (1, 4, 2 * ROWS, 2),
    ]


def grown(config: dict[str, Any]) -> None:
    """Trains until it has been with two workers for two epochs; a checkpoint after each epoch."""
    import ray.train
    import torch

    rank, world_size = ray.train.get_context().get_world_rank(), ray.train.get_context().get_world_size()
    model, start, checkpoint = make_model(), 0, ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            start = json.loads(Path(folder, "state.json").read_text())["epoch"]
    with delve_ray.SaturationTracker("saturation", "parquet", model) as tracker:
        last = start + 2 if world_size == 2 else 1000
        for epoch in range(start, last):
            model(epoch_rows(rank, epoch))
            tracker.add_saturations(step=epoch)
            tracker.metrics(wait=True)
            if rank == 0 and world_size == 1:
                Path(config["alone"]).touch()
            ray.train.report({"world_size": world_size}, checkpoint=checkpoint_of({"epoch": epoch + 1}))
            torch.manual_seed(epoch)


def train_on_a_growing_cluster(storage: str) -> None:
    """One node, and a second one as soon as the training has begun; the workers are then two."""
    import threading

    import ray
    from ray.cluster_utils import Cluster
    from ray.train import ScalingConfig

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    alone = f"{storage}/alone"
    os.makedirs(storage)
    scaling = ScalingConfig(
        num_workers=(1, 2), resources_per_worker={"worker": 1}, elastic_resize_monitor_interval_s=1.0
    )

    def train() -> None:
        fit(grown, storage, "elastic", workers=scaling, config={"alone": alone})

    try:
        cluster.add_node(num_cpus=1, resources={"worker": 1})
        ray.init(address=cluster.address, log_to_driver=False)
        thread = threading.Thread(target=train)  # Ray adds nodes in the main thread alone
        thread.start()
        wait_until(lambda: os.path.exists(alone), "the first epoch")
        cluster.add_node(num_cpus=1, resources={"worker": 1})
        thread.join()
        print("nodes", len([node for node in ray.nodes() if node["Alive"]]))
    finally:
        ray.shutdown()
        cluster.shutdown()


def test_an_elastic_run_on_a_growing_cluster(tmp_path: Path) -> None:
    from ray.train import ScalingConfig

    if not hasattr(ScalingConfig, "elastic_resize_monitor_interval_s"):
        pytest.skip("this Ray's worker groups keep their size")
    storage = tmp_path / "storage"
    with family(tmp_path) as cluster:
        assert "nodes 3" in cluster.run(train_on_a_growing_cluster, str(storage))
        cluster.wait_gone()
    rows = delve_ray.read_spectra(storage / "elastic" / "saturation", filters=[("layer", "==", "0")]).to_pylist()
    steps = [row["step"] for row in rows]
    assert steps == list(range(len(steps))), "none is missing, none is twice"
    alone = [row for row in rows if row["world_size"] == 1]
    together = [row for row in rows if row["world_size"] == 2]
    assert [*alone, *together] == rows
    assert len(alone) >= 1
    assert len(together) == 2
    assert {(row["attempt"], row["samples"], row["workers"]) for row in together} == {(1, 2 * ROWS, 2)}
    assert {(row["attempt"], row["samples"], row["workers"]) for row in alone} == {(0, ROWS, 1)}
