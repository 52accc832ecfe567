"""Two processes that torchrun starts, without Ray Train: they meet in one store of a Ray cluster.

    python examples/torchrun.py

starts a small Ray cluster on this machine and runs itself twice under torchrun. With a cluster of your own, set
RAY_ADDRESS and call `torchrun --nproc-per-node 2 your_script.py`: torchrun tells each process its RANK and WORLD_SIZE,
and the tracker connects to the cluster that RAY_ADDRESS names. `accelerate launch` does the same: with_accelerate.py.
It needs delve_ray[examples], and writes to runs/torchrun-<time>/ below the working directory.
"""

import os

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # works offline
os.environ.setdefault("RAY_AUTH_MODE", "token")  # what Ray does anyway; said here, it need not warn about it

import logging
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from delve_ray import SaturationTracker, read_spectra
from delve_ray.analysis.table import layer_table

EPOCHS = 5


def train(savefile):
    """What each process does."""
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(rank)
    digits = load_digits()
    images = torch.tensor(digits.data[rank::world_size][:896], dtype=torch.float32) / 8 - 1
    labels = torch.tensor(digits.target[rank::world_size][:896])
    model = DistributedDataParallel(nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    # The run's name is what the processes meet by; rank and world size are torchrun's.
    with SaturationTracker(savefile, ["parquet", "tensorboard"], model, run=Path(savefile).name) as tracker:
        for epoch in range(EPOCHS):
            for batch in torch.randperm(len(labels)).split(32):
                loss = F.cross_entropy(model(images[batch]), labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            tracker.add_saturations(step=epoch)
    dist.destroy_process_group()


def launch(savefile, launcher):
    """Start Ray here, and two processes with its address."""
    import ray

    context = ray.init(
        address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING
    )
    try:
        environment = os.environ | {"RAY_ADDRESS": context.address_info["gcs_address"], "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, "-m", *launcher, __file__, savefile], env=environment, check=True)
    finally:
        ray.shutdown()


def main():
    savefile = str(Path("runs", f"torchrun-{datetime.now():%Y%m%d-%H%M%S}").absolute())
    print("Starting Ray and two processes …", flush=True)
    launch(savefile, ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"])
    print(f"\n{layer_table(read_spectra(savefile))}\n\nFiles  {Path(savefile).relative_to(Path.cwd())}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        train(sys.argv[1])
    else:
        main()
