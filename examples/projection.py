"""What a network needs of its layers: the digits of quickstart.py, evaluated with every layer projected.

    python examples/projection.py

After training, each layer's output is projected onto the directions that hold the share δ of its variance, then onto as
many random ones. It needs delve_ray[examples], and writes to runs/projection-<time>/ below the working directory.
"""

from datetime import datetime
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.ticker import PercentFormatter
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

from delve_ray import SaturationTracker
from delve_ray.pca import project, sweep_thresholds

EPOCHS = 8
BATCH = 64
THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 1.0)
WITHIN = 0.02  # of the accuracy without projections
SEEDS = 3  # of the random directions


def make_cnn():
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(64 * 2 * 2, 128), nn.ReLU()),
        nn.Linear(128, 10),
    )


def load():
    """The 1797 images, 8×8 each: training and test, as (images, labels)."""
    digits = load_digits()
    images = (torch.tensor(digits.images, dtype=torch.float32)[:, None] - 4.9) / 6.0  # about mean 0, variance 1
    labels = torch.tensor(digits.target)
    parts = train_test_split(range(len(labels)), test_size=0.25, random_state=0, stratify=digits.target)
    return [(images[part], labels[part]) for part in parts]


def accuracy(model, images, labels):
    model.eval()
    with torch.no_grad():
        return (model(images).argmax(1) == labels).float().mean().item()


def train(model, images, labels, run_directory):
    """Train, and keep each layer's covariance: that is what "cov" among the statistics is for."""
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    with SaturationTracker(run_directory, "parquet", model, stats=["lsat", "idim", "cov"]) as tracker:
        for epoch in range(EPOCHS):
            model.train()
            for batch in torch.randperm(len(labels)).split(BATCH):
                optimizer.zero_grad()
                F.cross_entropy(model(images[batch]), labels[batch]).backward()
                optimizer.step()
            tracker.add_saturations(step=epoch)


def evaluate(model, run_directory, images, labels):
    """Rows of the sweep with the leading directions, and for each seed with random ones."""

    def measure():
        return accuracy(model, images, labels)

    with project(model, run_directory) as projection:  # the last epoch's covariances
        leading = sweep_thresholds(projection, measure, THRESHOLDS).to_pylist()
        random = []
        for seed in range(SEEDS):
            projection.randomize(seed)
            random.append(sweep_thresholds(projection, measure, THRESHOLDS).column("value").to_pylist())
    return leading, np.array(random)


def plot(leading, random, unprojected, path):
    """Accuracy against δ, and against the share of directions that is kept; the band is that of the seeds."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    values = [row["value"] for row in leading]
    kept = [row["saturation"] for row in leading]
    figure, panels = plt.subplots(1, 2, figsize=(9, 4), layout="constrained", sharey=True)
    for axes, places, label in (
        (panels[0], THRESHOLDS, "δ, the share of variance that each layer keeps"),
        (panels[1], kept, "share of its directions that a layer keeps, on average"),
    ):
        axes.axhline(unprojected, color="tab:gray", linewidth=0.8, linestyle="--", label="not projected")
        axes.plot(places, values, "o-", color="tab:blue", markersize=4, label="leading directions")
        axes.plot(places, random.mean(0), "s-", color="tab:orange", markersize=4, label="as many random ones")
        axes.fill_between(places, random.min(0), random.max(0), color="tab:orange", alpha=0.2, linewidth=0)
        axes.set_xlabel(label)
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    panels[0].set(ylabel="accuracy on the test images", ylim=(0, 1.03))
    panels[0].legend(frameon=False, loc="upper left", bbox_to_anchor=(0, 0.93))
    figure.savefig(path, dpi=130)


def main():
    run_directory = Path("runs", f"projection-{datetime.now():%Y%m%d-%H%M%S}")
    torch.manual_seed(0)
    model = make_cnn()
    (train_images, train_labels), (test_images, test_labels) = load()
    train(model, train_images, train_labels, run_directory)
    unprojected = accuracy(model, test_images, test_labels)
    leading, random = evaluate(model, run_directory, test_images, test_labels)

    print("     δ   directions   share of width   accuracy   with random directions")
    for row, values in zip(leading, random.T, strict=True):
        print(
            f"{row['threshold']:6.1%}   {row['intrinsic_dimensionality']:10d}   {row['saturation']:14.0%}   "
            f"{row['value']:8.1%}   {values.mean():.1%} ({values.min():.1%} to {values.max():.1%})"
        )
    print(f"not projected: {unprojected:.1%}\n")

    enough = next(row for row in leading if row["value"] >= unprojected - WITHIN)
    index = leading.index(enough)
    print(
        f"With {enough['saturation']:.0%} of its directions, which hold {enough['threshold']:.1%} of the variance, the "
        f"network reads {enough['value']:.1%} of the digits, with as many random ones {random[:, index].mean():.1%}.\n"
    )
    picture = run_directory / "accuracy.png"
    plot(leading, random, unprojected, picture)
    print(f"Files    {run_directory}\nPicture  {picture}")


if __name__ == "__main__":
    main()
