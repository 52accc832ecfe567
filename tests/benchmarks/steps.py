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
from tests.benchmarks.trackers import attach_delve, attach_ours

STATS = ("lsat",)
LEARNING_RATE = 0.01


class Trainer:
    """One copy of the model with its optimizer; remembers its last loss."""

    def __init__(self, model: nn.Module, workload: Workload) -> None:
        self.model = copy.deepcopy(model)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=LEARNING_RATE, momentum=0.9)
        self.batches = workload.batches()
        self.loss = torch.zeros(())

    def step(self, number: int) -> None:
        """Forward, loss, backward, optimizer on the batch of this number."""
        inputs, labels = self.batches[number % len(self.batches)]
        self.optimizer.zero_grad(set_to_none=True)
        self.loss = F.cross_entropy(self.model(inputs), labels)
        self.loss.backward()
        self.optimizer.step()


def one_round(workload: Workload, blocks: int) -> dict[str, Samples]:
    """Seconds per step of "untracked", "delve" and "ours"; models, optimizers and trackers are new.

    Raises RuntimeError when tracking changed the training: then the times are not of the same work.
    """
    torch.manual_seed(0)
    model = workload.build()
    trainers = {name: Trainer(model, workload) for name in ("untracked", "delve", "ours")}
    with tempfile.TemporaryDirectory() as name:
        attach_delve(trainers["delve"].model, Path(name), STATS)
        with attach_ours(trainers["ours"].model, Path(name), STATS):
            steps: dict[str, Callable[[int], object]] = {name: trainer.step for name, trainer in trainers.items()}
            samples = alternate(steps, calls=blocks * workload.block, block=workload.block, warmup=workload.block)
    losses = {name: trainer.loss.item() for name, trainer in trainers.items()}
    if len(set(losses.values())) != 1:
        raise RuntimeError(f"{workload.name}: the losses differ after the same steps: {losses}")
    return samples


def measure_steps(workload: Workload, rounds: int, blocks: int) -> dict[str, Samples]:
    """All samples of `rounds` rounds of `blocks` blocks of steps each."""
    return joined([one_round(workload, blocks) for _ in range(rounds)])
