"""The digits of quickstart.py with plain Ray actors as workers: no Ray Train, no DistributedDataParallel.

    python examples/plain_actors.py

Each actor makes its own tracker and says which rank of which run it is; all of them meet in one store. The actors
train one network: after each backward pass they average their gradients with torch.distributed. It needs
delve_ray[examples], and writes to runs/plain-actors-<time>/ below the working directory.
"""

import os

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # works offline
os.environ.setdefault("RAY_AUTH_MODE", "token")  # what Ray does anyway; said here, it need not warn about it

import logging
import tempfile
from datetime import datetime
from pathlib import Path

import ray
import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

from delve_ray import SaturationTracker, read_spectra
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
    train = train[: len(train) // world_size * world_size]  # equally many batches on all ranks
    return [(images[part[rank::world_size]], labels[part[rank::world_size]]) for part in (train, test)]


@ray.remote(num_cpus=1)
class Worker:
    def __init__(self, rank, world_size, rendezvous, savefile):
        dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size)
        torch.manual_seed(0)  # the same weights in all workers
        self.model = DigitsCNN()
        torch.manual_seed(rank)  # other batches in each
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=2e-3)
        self.train_shard, self.test_shard = load_shards(rank, world_size)
        self.tracker = SaturationTracker(
            savefile,
            save_to=["parquet", "tensorboard"],
            modules=self.model,
            run=Path(savefile).name,
            rank=rank,
            world_size=world_size,
        )

    def run_epoch(self, epoch):
        """Train and evaluate once; the accuracy over all workers and the metrics of all layers."""
        images, labels = self.train_shard
        self.model.train()
        for batch in torch.randperm(len(labels)).split(BATCH):
            self.optimizer.zero_grad()
            F.cross_entropy(self.model(images[batch]), labels[batch]).backward()
            self.average_gradients()
            self.optimizer.step()
        images, labels = self.test_shard
        self.model.eval()
        with torch.no_grad():
            correct = (self.model(images).argmax(1) == labels).sum()
        sums = torch.stack([correct, torch.tensor(len(labels))])
        dist.all_reduce(sums)
        self.tracker.add_saturations(step=epoch)
        return (sums[0] / sums[1]).item(), self.tracker.metrics(wait=True)

    def average_gradients(self):
        for parameter in self.model.parameters():
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()

    def close(self):
        self.tracker.close()
        dist.destroy_process_group()


def train(savefile, scratch):
    # The workers meet through a file, on one machine; on several, with tcp://<address of one of them>:<port>.
    rendezvous = f"file://{scratch}/rendezvous"
    workers = [Worker.remote(rank, WORKERS, rendezvous, savefile) for rank in range(WORKERS)]
    for epoch in range(EPOCHS):
        accuracy, metrics = ray.get([worker.run_epoch.remote(epoch) for worker in workers])[0]
        saturation = metrics["saturation/train/mean"]
        print(f"epoch {epoch + 1}/{EPOCHS}   accuracy {accuracy:6.1%}   mean saturation {saturation:.0%}", flush=True)
    ray.get([worker.close.remote() for worker in workers])


def main():
    run_directory = Path("runs", f"plain-actors-{datetime.now():%Y%m%d-%H%M%S}").absolute()
    ray.init(
        address="local",
        num_cpus=max(WORKERS, os.cpu_count() or 1),
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.WARNING,
    )
    try:
        with tempfile.TemporaryDirectory() as scratch:
            train(str(run_directory), scratch)
    finally:
        ray.shutdown()
    print(f"\n{layer_table(read_spectra(run_directory))}\n\nFiles  {run_directory.relative_to(Path.cwd())}")


if __name__ == "__main__":
    main()
