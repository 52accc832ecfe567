"""The digits of quickstart.py in one process, without Ray: the store lives in the process.

    python examples/no_ray.py

It needs delve_ray[examples], and writes to runs/no-ray-<time>/ below the working directory.
"""

import sys
from datetime import datetime
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

from delve_ray import SaturationTracker, read_spectra
from delve_ray.analysis.table import layer_table

EPOCHS = 5
BATCH = 64


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


def load():
    """The 1797 images, 8×8 each: training and test, as (images, labels)."""
    digits = load_digits()
    images = (torch.tensor(digits.images, dtype=torch.float32)[:, None] - 4.9) / 6.0  # about mean 0, variance 1
    labels = torch.tensor(digits.target)
    parts = train_test_split(range(len(labels)), test_size=0.25, random_state=0, stratify=digits.target)
    return [(images[part], labels[part]) for part in parts]


def main():
    run_directory = Path("runs", f"no-ray-{datetime.now():%Y%m%d-%H%M%S}")
    torch.manual_seed(0)
    model = DigitsCNN()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    (train_images, train_labels), (test_images, test_labels) = load()

    with SaturationTracker(run_directory, save_to=["parquet", "tensorboard"], modules=model) as tracker:
        for epoch in range(EPOCHS):
            model.train()
            for batch in torch.randperm(len(train_labels)).split(BATCH):
                optimizer.zero_grad()
                F.cross_entropy(model(train_images[batch]), train_labels[batch]).backward()
                optimizer.step()
            model.eval()
            with torch.no_grad():
                accuracy = (model(test_images).argmax(1) == test_labels).float().mean().item()
            tracker.add_scalar("accuracy", accuracy, step=epoch)
            tracker.add_saturations(step=epoch)
            saturation = tracker.metrics(wait=True)["saturation/train/mean"]
            print(
                f"epoch {epoch + 1}/{EPOCHS}   accuracy {accuracy:6.1%}   mean saturation {saturation:.0%}", flush=True
            )

    assert "ray" not in sys.modules  # nothing has imported it
    print(f"\n{layer_table(read_spectra(run_directory))}\n\nFiles  {run_directory}")


if __name__ == "__main__":
    main()
