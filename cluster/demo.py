"""A small network learns to read digits on the nodes of a Ray cluster; its spectra go where all of them can write.

    STORAGE_PATH=s3://bucket/runs python demo.py --workers 4 --gpu

On a node of the cluster, or as a Ray job; STORAGE_PATH is what Ray Train calls `storage_path`. All nodes need
delve_ray[train] and scikit-learn. What concerns delve_ray are the lines with `tracker`.
"""

from __future__ import annotations

import argparse
import os
from datetime import datetime

import ray
import ray.train
import torch
import torch.distributed as dist
from ray.train.torch import TorchTrainer, get_device, prepare_model
from sklearn.datasets import load_digits
from torch import nn

from delve_ray import SaturationTracker, read_scalars, read_spectra
from delve_ray.analysis.table import layer_table

BATCH = 32


def train_worker(config):
    """What each worker does."""
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    device = get_device()
    torch.manual_seed(rank)  # other batches on each rank; DDP gives all of them the weights of rank 0
    model = prepare_model(
        nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    digits = load_digits()
    rows = slice(rank, len(digits.target) // world_size * world_size, world_size)  # equally many on all ranks
    images = torch.tensor(digits.data[rows] / 8 - 1, dtype=torch.float32, device=device)
    labels = torch.tensor(digits.target[rows], device=device)
    nodes = [""] * world_size
    dist.all_gather_object(nodes, ray.get_runtime_context().get_node_id())

    with SaturationTracker("saturation", "parquet", model) as tracker:  # below the run's directory
        for epoch in range(config["epochs"]):
            for batch in torch.randperm(len(labels), device=device).split(BATCH):
                loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            if rank == 0:
                tracker.add_scalar("nodes", len(set(nodes)), step=epoch)
            tracker.add_saturations(step=epoch)
            metrics = tracker.metrics(wait=True)
            saturation = {key: value for key, value in metrics.items() if key.startswith("saturation/")}
            ray.train.report({"loss": loss.item(), **saturation})


def main():
    """Train on the cluster, and show the layers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--gpu", action="store_true", help="one GPU for each worker")
    parser.add_argument("--epochs", type=int, default=5)
    arguments = parser.parse_args()
    storage = os.environ.get("STORAGE_PATH")
    if not storage:
        parser.error("set STORAGE_PATH to a directory or a URI that all nodes can write to, such as s3://bucket/runs")

    ray.init(address="auto", log_to_driver=False)  # never a Ray of its own
    name = f"demo-{datetime.now():%Y%m%d-%H%M%S}"
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"epochs": arguments.epochs},
        scaling_config=ray.train.ScalingConfig(
            num_workers=arguments.workers, use_gpu=arguments.gpu, placement_strategy="SPREAD"
        ),
        run_config=ray.train.RunConfig(name=name, storage_path=storage),
    )
    trainer.fit()

    run = f"{storage.rstrip('/')}/{name}/saturation"
    spectra = read_spectra(run)
    nodes = int(read_scalars(run).column("value")[-1].as_py())
    print(f"{layer_table(spectra)}\n\n{arguments.workers} workers on {nodes} nodes\nFiles  {run}")
    if min(spectra.column("workers").to_pylist()) < arguments.workers:
        raise SystemExit("Not all workers have contributed to all rows.")


if __name__ == "__main__":
    main()
