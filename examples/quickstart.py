"""A small CNN learns to read digits on two Ray Train workers, and we see how much of each layer's width it uses.

    python examples/quickstart.py

It needs delve_ray[examples] and no GPU, takes about a minute, and writes to runs/quickstart-<time>/ below the
working directory. What concerns delve_ray are the lines with `tracker` in `train_worker`.
"""

import os

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # works offline
os.environ.setdefault("RAY_AUTH_MODE", "token")  # what Ray does anyway; said here, it need not warn about it

import logging
import shlex
import shutil
import sys
import threading
from datetime import datetime
from pathlib import Path

import ray
import ray.train
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ray.train.torch import TorchTrainer, prepare_model
from ray.util.queue import Queue
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

from delve_ray import SaturationTracker, read_scalars, read_spectra
from delve_ray.analysis.plots import saturation_over_steps
from delve_ray.analysis.table import layer_table

WORKERS = 2
EPOCHS = 5
BATCH = 32


class DigitsCNN(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.conv3 = nn.Conv2d(32, 64, 3, padding=1)
        self.hidden = nn.Linear(64 * 2 * 2, 128)
        self.output = nn.Linear(128, 10)

    def forward(self, images_N1HW):
        x = F.relu(self.conv1(images_N1HW))
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.max_pool2d(F.relu(self.conv3(x)), 2)
        return self.output(F.relu(self.hidden(x.flatten(1))))


def load_shards(rank, world_size):
    """This rank's share of the 1797 images, 8×8 each: training and test, as (images, labels)."""
    digits = load_digits()
    images = (torch.tensor(digits.images, dtype=torch.float32)[:, None] - 4.9) / 6.0  # about mean 0, variance 1
    labels = torch.tensor(digits.target)
    train, test = train_test_split(range(len(labels)), test_size=0.25, random_state=0, stratify=digits.target)
    train = train[: len(train) // world_size * world_size]  # DDP wants equally many batches on all ranks
    return [(images[part[rank::world_size]], labels[part[rank::world_size]]) for part in (train, test)]


def train_epoch(model, optimizer, images, labels):
    """One pass in random order; the sum of the losses and their number."""
    model.train()
    total = 0.0
    for batch in torch.randperm(len(labels)).split(BATCH):
        loss = F.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item() * len(batch)
    return total, len(labels)


@torch.no_grad()
def evaluate(model, images, labels):
    """How many are right, and of how many."""
    model.eval()
    return (model(images).argmax(1) == labels).sum().item(), len(labels)


def train_worker(config):
    """What each of the two workers does."""
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    torch.manual_seed(rank)  # other batches on each rank; DDP gives all of them the weights of rank 0
    model = prepare_model(DigitsCNN())
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    train_shard, test_shard = load_shards(rank, world_size)

    with SaturationTracker(config["savefile"], save_to=["parquet", "tensorboard"], modules=model) as tracker:
        for epoch in range(EPOCHS):
            sums = torch.tensor([*train_epoch(model, optimizer, *train_shard), *evaluate(model, *test_shard)])
            dist.all_reduce(sums)  # over all ranks
            loss, accuracy = (sums[0] / sums[1]).item(), (sums[2] / sums[3]).item()
            if rank == 0:
                tracker.add_scalar("accuracy", accuracy, step=epoch)
            tracker.add_saturations(step=epoch)
            metrics = tracker.metrics(wait=True)
            saturation = {key: value for key, value in metrics.items() if key.startswith("saturation/")}
            ray.train.report({"loss": loss, "accuracy": accuracy, **saturation})
            if rank == 0:
                config["progress"].put(
                    f"epoch {epoch + 1}/{EPOCHS}   loss {loss:.3f}   accuracy {accuracy:6.1%}   "
                    f"mean saturation: train {saturation['saturation/train/mean']:.0%}, "
                    f"eval {saturation['saturation/eval/mean']:.0%}"
                )


def train_on_ray(run_directory):
    """Start Ray on this machine, train, and end it. Whatever goes wrong in a worker is raised here."""
    # Ray Train logs much to the driver's terminal. Here it stays in Ray's log files, and rank 0 sends what is worth
    # reading through a queue. With log_to_driver=True one sees everything, what workers print included.
    ray.init(
        address="local",
        num_cpus=max(4, os.cpu_count() or 1),  # enough for the workers and what Ray Train adds, on a small machine, too
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.WARNING,
    )
    try:
        progress = Queue(actor_options={"num_cpus": 0})
        printer = threading.Thread(target=print_lines, args=(progress,))
        printer.start()
        trainer = TorchTrainer(
            train_worker,
            train_loop_config={"savefile": str(run_directory), "progress": progress},
            scaling_config=ray.train.ScalingConfig(num_workers=WORKERS),
            run_config=ray.train.RunConfig(name=run_directory.name, storage_path=str(run_directory.parent)),
        )
        try:
            trainer.fit()
        finally:
            progress.put(None)
            printer.join()
    finally:
        ray.shutdown()


def print_lines(progress):
    while (line := progress.get()) is not None:
        print(line, flush=True)


def check(spectra, scalars):
    """That every layer has a final row of both ranks for every epoch and phase, and that the network has learnt."""
    layers = [name for name, module in DigitsCNN().named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    expected = {(phase, epoch, layer) for phase in ("train", "eval") for epoch in range(EPOCHS) for layer in layers}
    rows = spectra.to_pylist()
    complete = {(row["phase"], row["step"], row["layer"]) for row in rows if row["final"] and row["workers"] == WORKERS}
    if complete != expected or any(row["saturation"] is None for row in rows):
        raise SystemExit(f"The spectra are not complete: {sorted(expected ^ complete)}")
    accuracies = scalars.column("value").to_pylist()
    if len(accuracies) != EPOCHS or accuracies[-1] < 0.8:
        raise SystemExit(f"The network has not learnt to read digits; accuracy per epoch: {accuracies}")


def command(script, module):
    """How to call a script of this Python environment, whether it is activated or not."""
    path = Path(sys.executable).with_name(script)
    found = shutil.which(script)
    if not path.exists():
        return f"{shlex.quote(sys.executable)} -m {module}"
    if found is not None and path.samefile(found):
        return script
    return shlex.quote(str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path))


def main():
    run_directory = Path("runs", f"quickstart-{datetime.now():%Y%m%d-%H%M%S}").absolute()
    print(f"Starting Ray and {WORKERS} workers, which takes about half a minute …", flush=True)
    train_on_ray(run_directory)

    spectra, scalars = read_spectra(run_directory), read_scalars(run_directory)
    check(spectra, scalars)
    picture = run_directory / "saturation.png"
    saturation_over_steps(spectra, picture)
    shown = shlex.quote(str(run_directory.relative_to(Path.cwd())))
    print(f"\n{layer_table(spectra)}\n")
    print(f"Files        {shown}")
    print(f"Picture      {picture.relative_to(Path.cwd())}")
    print(f"TensorBoard  {command('tensorboard', 'tensorboard.main')} --logdir {shown}")
    print(f"This table   {command('delve-ray', 'delve_ray.cli')} summary {shown}")


if __name__ == "__main__":
    main()
