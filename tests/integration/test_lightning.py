"""Lightning: the real Trainer, alone and with two of Ray Train's workers; one figure in every place."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import delve_ray
from tests.events import tag_values

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("lightning") is None, reason="needs lightning"),  # not imported: see below
]

KEY = "saturation/eval/mean"
EPOCHS = 3


def make_module(package: str = "lightning.pytorch") -> Any:
    from importlib import import_module

    import torch

    pl = import_module(package)

    class Digits(pl.LightningModule):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Sequential(torch.nn.Linear(64, 24), torch.nn.ReLU(), torch.nn.Linear(24, 10))

        def training_step(self, batch: Any, index: int) -> Any:
            return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def validation_step(self, batch: Any, index: int) -> None:
            self.log("accuracy", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=3e-3)

    return Digits()


def loaders() -> tuple[Any, Any]:
    import torch
    from sklearn.datasets import load_digits
    from torch.utils.data import DataLoader, TensorDataset

    data = load_digits()
    x, y = torch.tensor(data.data, dtype=torch.float32) / 8 - 1, torch.tensor(data.target)
    return (
        DataLoader(TensorDataset(x[:1280], y[:1280]), 64, shuffle=True),
        DataLoader(TensorDataset(x[1280:1760], y[1280:1760]), 60),
    )


def trainer_of(package: str, folder: Path, *callbacks: Any, **options: Any) -> Any:
    from importlib import import_module

    pl = import_module(package)
    return pl.Trainer(
        max_epochs=options.pop("max_epochs", EPOCHS),
        accelerator="cpu",
        devices=1,
        default_root_dir=str(folder),
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"logger": import_module(f"{package}.loggers").CSVLogger(str(folder)), **options},
    )


def mean_saturation(path: Any, phase: str, step: int) -> float:
    rows = delve_ray.read_spectra(path, filters=[("phase", "==", phase), ("step", "==", step)]).to_pylist()
    assert {row["layer"] for row in rows} == {"net.0", "net.2"}
    return sum(row["saturation"] for row in rows) / len(rows)


@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
def test_one_figure_in_every_place(tmp_path: Path, package: str) -> None:
    """In a process of its own, in which nobody has imported the other package."""
    program = (
        "import importlib, sys\n"
        "from pathlib import Path\n"
        f"importlib.import_module({package!r})\n"
        "from delve_ray.integrations.lightning import SaturationCallback\n"
        "from tests.integration.test_lightning import loaders, make_module, trainer_of\n"
        "callback = SaturationCallback()\n"
        f"trainer = trainer_of({package!r}, Path({str(tmp_path)!r}), callback)\n"
        f"module = make_module({package!r})\n"
        "trainer.fit(module, *loaders())\n"
        "print({k: v.item() for k, v in trainer.callback_metrics.items()})\n"
        "print(trainer.log_dir)\n"
        "assert callback.tracker is None\n"
        "assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())\n"
        "assert ('lightning' in sys.modules) is " + str(package != "pytorch_lightning") + "\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    metrics, folder = done.stdout.splitlines()[-2:]
    found, run = json.loads(metrics.replace("'", '"')), Path(folder, "saturation")
    rows = delve_ray.read_spectra(run).to_pylist()
    assert {(r["phase"], r["step"], r["samples"]) for r in rows} == {
        (phase, step, samples) for step in range(EPOCHS) for phase, samples in (("train", 1280), ("eval", 480))
    }, "the sanity check is not among the rows"
    with open(Path(folder, "metrics.csv"), newline="") as file:
        logged = [row for row in csv.DictReader(file) if row[KEY]]
    for phase in ("train", "eval"):
        key = f"saturation/{phase}/mean"
        values = [mean_saturation(run, phase, step) for step in range(EPOCHS)]
        assert found[key] == pytest.approx(values[-1], rel=1e-6)
        assert [float(row[key]) for row in logged] == pytest.approx(values, rel=1e-6)
        assert [tag_values(run, key)[step] for step in range(EPOCHS)] == pytest.approx(values, rel=1e-6)


def test_a_resumed_fit_goes_on_with_its_files(tmp_path: Path) -> None:
    from delve_ray.integrations.lightning import SaturationCallback

    run = tmp_path / "run"
    first = trainer_of("lightning.pytorch", tmp_path, SaturationCallback(run, "parquet"), max_epochs=2)
    first.fit(make_module(), *loaders())
    first.save_checkpoint(tmp_path / "last.ckpt")
    callback = SaturationCallback(run, "parquet", resume=True)
    again = trainer_of("lightning.pytorch", tmp_path, callback, max_epochs=4)
    again.fit(make_module(), *loaders(), ckpt_path=str(tmp_path / "last.ckpt"))
    rows = delve_ray.read_spectra(run).to_pylist()
    assert {(row["attempt"], row["step"]) for row in rows} == {(0, 0), (0, 1), (1, 2), (1, 3)}
    assert callback.state_dict()["next_step"] == 4


def test_one_callback_for_several_fits(tmp_path: Path) -> None:
    """Each has its own windows, and a directory of its own."""
    from delve_ray.integrations.lightning import SaturationCallback

    callback = SaturationCallback(save_to="parquet")
    for _ in range(2):
        trainer = trainer_of("lightning.pytorch", tmp_path, callback, max_epochs=2, logger=False)
        trainer.fit(make_module(), *loaders())
        assert KEY in trainer.callback_metrics
    for name in ("saturation", "saturation-1"):
        assert {row["step"] for row in delve_ray.read_spectra(tmp_path / name).to_pylist()} == {0, 1}
    trainer = trainer_of("lightning.pytorch", tmp_path, callback, fast_dev_run=True, logger=False)
    trainer.fit(make_module(), *loaders())
    assert not (tmp_path / "saturation-2").exists(), "a dry run leaves no files"


def test_metrics_of_windows_of_steps(tmp_path: Path) -> None:
    """The loggers get each window's own; with accumulated gradients a step is an optimizer's."""
    from delve_ray.integrations.lightning import SaturationCallback

    callback = SaturationCallback(tmp_path / "run", "parquet", every_n_steps=4, metrics="saturation/*")
    trainer = trainer_of("lightning.pytorch", tmp_path, callback, max_epochs=1, accumulate_grad_batches=2)
    trainer.fit(make_module(), *loaders())
    rows = delve_ray.read_spectra(tmp_path / "run", filters=[("phase", "==", "train")]).to_pylist()
    means = {step: sum(r["saturation"] for r in rows if r["step"] == step) / 2 for step in (4, 8, 10)}
    assert {(r["step"], r["samples"]) for r in rows} == {(4, 8 * 64), (8, 8 * 64), (10, 4 * 64)}
    key = "saturation/train/mean"
    with open(Path(trainer.log_dir, "metrics.csv"), newline="") as file:
        logged = {int(row["step"]): float(row[key]) for row in csv.DictReader(file) if row.get(key)}
    assert {step: logged[step] for step in (4, 8)} == pytest.approx({step: means[step] for step in (4, 8)}, rel=1e-6)


def test_a_store_that_is_away_does_not_end_the_fit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from delve_ray.integrations.lightning import SaturationCallback

    callback = SaturationCallback(tmp_path / "run", "parquet")
    trainer = trainer_of("lightning.pytorch", tmp_path, callback, max_epochs=2, logger=False)
    module = make_module()

    def lose(*_: Any) -> None:
        if trainer.current_epoch == 1 and callback.tracker._shipper.lost is None:
            callback.tracker._shipper._lose("on purpose")

    module.on_train_epoch_start = lose
    trainer.fit(module, *loaders())
    assert trainer.current_epoch == 2
    assert "the metrics of the last window are missing: on purpose" in caplog.text


def test_windows_of_steps_and_no_metrics(tmp_path: Path) -> None:
    from delve_ray.integrations.lightning import SaturationCallback

    callback = SaturationCallback(tmp_path / "run", "parquet", every_n_steps=15, metrics=None)
    trainer = trainer_of("lightning.pytorch", tmp_path, callback, max_epochs=2, logger=False)
    trainer.fit(make_module(), *loaders())
    rows = delve_ray.read_spectra(tmp_path / "run", filters=[("layer", "==", "net.0")]).to_pylist()
    assert [(r["phase"], r["step"], r["samples"]) for r in rows if r["phase"] == "train"] == [
        ("train", 15, 15 * 64),
        ("train", 30, 15 * 64),
        ("train", 40, 10 * 64),
    ]
    assert not any(key.startswith("saturation") for key in trainer.callback_metrics)


def test_a_fit_that_fails_leaves_its_rows(tmp_path: Path) -> None:
    from delve_ray.integrations.lightning import SaturationCallback

    module = make_module()
    seen = []

    def fails(batch: Any, batch_idx: int) -> Any:
        seen.append(batch_idx)
        if len(seen) > 25:
            raise RuntimeError("on purpose")
        return module.net(batch[0]).square().mean()

    module.training_step = fails
    callback = SaturationCallback(tmp_path / "run", "parquet")
    with pytest.raises(RuntimeError, match="on purpose"):
        trainer_of("lightning.pytorch", tmp_path, callback).fit(module, *loaders())
    rows = delve_ray.read_spectra(tmp_path / "run", filters=[("layer", "==", "net.0")]).to_pylist()
    assert [(r["step"], r["samples"]) for r in rows if r["phase"] == "train"] == [(0, 20 * 64), (1, 5 * 64)]
    assert not module.net[0]._forward_hooks


def train(config: dict[str, Any]) -> None:
    """One of Ray Train's workers."""
    import lightning.pytorch as pl
    import ray.train.lightning
    import torch

    from delve_ray.integrations.lightning import SaturationCallback

    torch.manual_seed(1)
    trainer = pl.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        devices="auto",
        strategy=ray.train.lightning.RayDDPStrategy(),
        plugins=[ray.train.lightning.RayLightningEnvironment()],
        callbacks=[SaturationCallback(), ray.train.lightning.RayTrainReportCallback()],
        enable_progress_bar=False,
        enable_checkpointing=False,
        logger=False,
    )
    ray.train.lightning.prepare_trainer(trainer).fit(make_module(), *loaders())


@pytest.mark.ray
def test_two_workers_of_ray_train(ray_session: None, tmp_path: Path) -> None:
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    result = TorchTrainer(
        train,
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(name="lightning", storage_path=str(tmp_path)),
    ).fit()
    run = tmp_path / "lightning" / "saturation"
    rows = delve_ray.read_spectra(run).to_pylist()
    assert {(r["phase"], r["step"], r["samples"], r["workers"]) for r in rows} == {
        (phase, step, samples, 2) for step in range(EPOCHS) for phase, samples in (("train", 1280), ("eval", 480))
    }
    last = mean_saturation(run, "eval", EPOCHS - 1)
    assert result.metrics[KEY] == pytest.approx(last, rel=1e-6)
    assert tag_values(run, KEY)[EPOCHS - 1] == pytest.approx(last, rel=1e-6)
