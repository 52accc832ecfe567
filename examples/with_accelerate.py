"""Hugging Face Accelerate with two processes: nothing but the tracker's line is added to its loop.

    python examples/with_accelerate.py

starts a small Ray cluster on this machine and runs itself in two processes. With a cluster of your own, set RAY_ADDRESS
and call `accelerate launch your_script.py`. It needs delve_ray[examples] and the package accelerate, and
writes to runs/accelerate-<time>/ below the working directory.
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
import torch.nn.functional as F
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from delve_ray import SaturationTracker, read_spectra
from delve_ray.analysis.table import layer_table

EPOCHS = 5


def train(savefile):
    """What each process does."""
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 8 - 1
    loader = DataLoader(TensorDataset(images, torch.tensor(digits.target)), batch_size=32, shuffle=True)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    # The run's name is what the processes meet by; rank and world size are the launcher's.
    with SaturationTracker(savefile, ["parquet", "tensorboard"], model, run=Path(savefile).name) as tracker:
        for epoch in range(EPOCHS):
            for batch, labels in loader:
                loss = F.cross_entropy(model(batch), labels)
                optimizer.zero_grad()
                accelerator.backward(loss)
                optimizer.step()
            tracker.add_saturations(step=epoch)
    accelerator.end_training()


def launch(savefile):
    """Start Ray here, and two processes with its address. On GPUs `accelerate launch` would; on CPUs it wants MPI."""
    import ray

    context = ray.init(
        address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING
    )
    try:
        environment = os.environ | {"RAY_ADDRESS": context.address_info["gcs_address"], "OMP_NUM_THREADS": "1"}
        launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        subprocess.run([sys.executable, "-m", *launcher, __file__, savefile], env=environment, check=True)
    finally:
        ray.shutdown()


def main():
    savefile = str(Path("runs", f"accelerate-{datetime.now():%Y%m%d-%H%M%S}").absolute())
    print("Starting Ray and two processes …", flush=True)
    launch(savefile)
    print(f"\n{layer_table(read_spectra(savefile))}\n\nFiles  {Path(savefile).relative_to(Path.cwd())}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        train(sys.argv[1])
    else:
        main()
