"""Extra time of a training step: three copies of one model, untracked, with delve and with ours, step by step."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from tests.benchmarks.models import Workload
from tests.benchmarks.timing import Samples, alternate, joined
from tests.benchmarks.trackers import attach_delve, attach_ours, check_same_layers

STATS = ("lsat",)
LEARNING_RATE = 0.01


class Trainer:
    """One copy of the model with its optimizer; remembers its last loss."""

    def __init__(self, model: nn.Module, workload: Workload, device: str = "cpu") -> None:
        self.model = copy.deepcopy(model).to(device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=LEARNING_RATE, momentum=0.9)
        self.batches = [(inputs.to(device), labels.to(device)) for inputs, labels in workload.batches()]
        self.loss = torch.zeros(())

    def step(self, number: int) -> None:
        """Forward, loss, backward, optimizer on the batch of this number."""
        inputs, labels = self.batches[number % len(self.batches)]
        self.optimizer.zero_grad(set_to_none=True)
        self.loss = F.cross_entropy(self.model(inputs), labels)
        self.loss.backward()
        self.optimizer.step()


def one_round(workload: Workload, blocks: int, device: str = "cpu") -> dict[str, Samples]:
    """Seconds per step of "untracked", "delve" and "ours"; models, optimizers and trackers are new.

    Raises RuntimeError when tracking changed the training, or the trackers record different layers: then the times
    are not of the same work.
    """
    torch.manual_seed(0)
    model = workload.build()
    trainers = {name: Trainer(model, workload, device) for name in ("untracked", "delve", "ours")}
    with tempfile.TemporaryDirectory() as name:
        theirs = attach_delve(trainers["delve"].model, Path(name), STATS, device)
        with attach_ours(trainers["ours"].model, Path(name), STATS) as ours:
            check_same_layers(ours, theirs)
            steps: dict[str, Callable[[int], object]] = {name: trainer.step for name, trainer in trainers.items()}
            calls, block = blocks * workload.block, workload.block
            samples = alternate(steps, calls=calls, block=block, warmup=block, device=device)
    check_same_losses(workload.name, {name: trainer.loss.item() for name, trainer in trainers.items()}, device)
    return samples


def check_same_losses(what: str, losses: dict[str, float], device: str = "cpu") -> None:
    """Raises RuntimeError unless all copies of a model learned the same.

    To the bit on the CPU; on a GPU two untracked copies may differ, too: the order of its atomic sums is free.
    """
    low, high = min(losses.values()), max(losses.values())
    if high - low > (0.0 if torch.device(device).type == "cpu" else 0.01 * high):
        raise RuntimeError(f"{what}: the losses differ after the same steps: {losses}")


def measure_steps(workload: Workload, rounds: int, blocks: int, device: str = "cpu") -> dict[str, Samples]:
    """All samples of `rounds` rounds of `blocks` blocks of steps each."""
    return joined([one_round(workload, blocks, device) for _ in range(rounds)])
