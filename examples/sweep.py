"""How wide and how deep should a CNN be for 8×8 digits? Ray Tune tries twelve; saturation says which one to take.

    python examples/sweep.py

It needs delve_ray[examples] and no GPU, takes about two minutes on two cores, and writes to runs/sweep-<time>/ below
the working directory. What concerns delve_ray are the lines with `tracker` in `train`, and `rank` at the end.
"""

import os

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # works offline
os.environ.setdefault("RAY_AUTH_MODE", "token")  # what Ray does anyway; said here, it need not warn about it
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # no tables of its own

import logging
import textwrap
from datetime import datetime
from pathlib import Path

import matplotlib
import ray
import torch
import torch.nn.functional as F
from matplotlib.ticker import PercentFormatter
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

from delve_ray import SaturationTracker
from delve_ray.integrations.tune import rank, ranking_table

WIDTHS = (4, 8, 16, 32)
DEPTHS = (1, 2, 3)
EPOCHS = 9
WITHIN = 0.01
SATURATION = "saturation/eval/mean"


def make_cnn(width, depth):
    """`depth` convolutions of `width` channels, of which the first two are pooled, and one hidden layer."""
    layers, channels, side = [], 1, 8
    for index in range(depth):
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
        channels = width
        if index < 2:
            layers.append(nn.MaxPool2d(2))
            side //= 2
    hidden = 4 * width
    layers += [nn.Flatten(), nn.Linear(width * side * side, hidden), nn.ReLU(), nn.Linear(hidden, 10)]
    return nn.Sequential(*layers)


def load():
    """1797 images of 8×8, a quarter of them for testing."""
    digits = load_digits()
    images = (torch.tensor(digits.images, dtype=torch.float32)[:, None] - 4.9) / 6.0  # about mean 0, variance 1
    labels = torch.tensor(digits.target)
    train, test = train_test_split(range(len(labels)), test_size=0.25, random_state=0, stratify=digits.target)
    return images[train], labels[train], images[test], labels[test]


def train(config):
    """One trial."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images, labels, test_images, test_labels = load()
    model = make_cnn(config["width"], config["depth"])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    with SaturationTracker("saturation", "parquet", model) as tracker:
        for epoch in range(EPOCHS):
            model.train()
            for batch in torch.randperm(len(labels)).split(64):
                loss = F.cross_entropy(model(images[batch]), labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            model.eval()
            with torch.no_grad():
                accuracy = (model(test_images).argmax(1) == test_labels).float().mean().item()
            tracker.add_saturations(step=epoch)
            saturation = {k: v for k, v in tracker.metrics(wait=True).items() if k.startswith("saturation/")}
            tune.report({"accuracy": accuracy, **saturation})


def sweep(directory):
    """Run the trials, two at a time; those that fall behind are stopped."""
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
    try:
        tuner = tune.Tuner(
            tune.with_resources(train, {"cpu": 1}),
            param_space={"width": tune.grid_search(list(WIDTHS)), "depth": tune.grid_search(list(DEPTHS))},
            tune_config=tune.TuneConfig(
                metric="accuracy",
                mode="max",
                scheduler=ASHAScheduler(max_t=EPOCHS, grace_period=3, reduction_factor=3),
                max_concurrent_trials=2,
            ),
            run_config=tune.RunConfig(name=directory.name, storage_path=str(directory.parent), verbose=0),
        )
        return tuner.fit()
    finally:
        ray.shutdown()


def plot(ranking, path):
    """Accuracy against saturation; a circle's area is the number of parameters."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    rows = ranking.to_pylist()
    for row in sorted(rows, key=lambda row: -row["num_parameters"]):
        best = row["place"] == 1
        colour = "tab:red" if best else "tab:blue" if row["contender"] else "tab:gray"
        size = row["num_parameters"] / 40 + 10
        axes.scatter(row[SATURATION], row["accuracy"], s=size, color=colour, alpha=0.45, edgecolor="white")
        name = f"{row['config/width']}×{row['config/depth']}" + (", take this" if best else "")
        above = (0, size**0.5 / 2 + 3)  # the circle's radius, in points
        where = (row[SATURATION], row["accuracy"])
        axes.annotate(name, where, textcoords="offset points", xytext=above, ha="center", fontsize=8)
    axes.margins(0.12, 0.2)
    axes.axhline(max(row["accuracy"] for row in rows) - WITHIN, color="tab:gray", linewidth=0.8, linestyle="--")
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set(xlabel="mean saturation over layers, evaluation", ylabel="accuracy on the test images")
    axes.set_title("width × depth; area: parameters; dashed: within 0.01 of the best", fontsize=9, loc="left")
    figure.savefig(path, dpi=130)


def advise(ranking):
    """Which network to take, and why."""
    rows = ranking.to_pylist()
    chosen = rows[0]
    contenders = [row for row in rows if row["contender"]]
    best = max(contenders, key=lambda row: row["accuracy"])
    names = {id(row): f"width {row['config/width']}, depth {row['config/depth']}" for row in (chosen, best)}
    text = (
        f"Take {names[id(chosen)]}: of the {len(contenders)} networks within {WITHIN} of the best accuracy, "
        f"{best['accuracy']:.3f}, it uses most of its width, {chosen[SATURATION]:.0%}. It has "
        f"{chosen['num_parameters']:,} parameters and an accuracy of {chosen['accuracy']:.3f}."
    )
    if best is not chosen:
        times = best["num_parameters"] / chosen["num_parameters"]
        text += (
            f" The most accurate one, {names[id(best)]}, uses {best[SATURATION]:.0%} and has {times:.1f} times the "
            f"parameters."
        )
    return textwrap.fill(text, 100)


def main():
    directory = Path("runs", f"sweep-{datetime.now():%Y%m%d-%H%M%S}").absolute()
    print(f"Training {len(WIDTHS) * len(DEPTHS)} networks, two at a time, which takes about two minutes …", flush=True)
    results = sweep(directory)
    if results.errors:
        raise SystemExit(f"{len(results.errors)} trials failed: {results.errors[0]}")
    ranking = rank(results, by=SATURATION, accuracy="accuracy", within=WITHIN)
    plot(ranking, directory / "sweep.png")
    print(f"\n{ranking_table(ranking)}\n\n{advise(ranking)}\n")
    print(f"Files    {directory.relative_to(Path.cwd())}")
    print(f"Picture  {(directory / 'sweep.png').relative_to(Path.cwd())}")


if __name__ == "__main__":
    main()
