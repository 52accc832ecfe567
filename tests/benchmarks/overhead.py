"""Steps with `max_overhead`, against untracked ones."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from tests.benchmarks.models import Workload
from tests.benchmarks.steps import STATS, Trainer, check_same_losses
from tests.benchmarks.timing import Samples, alternate
from tests.benchmarks.trackers import attach_ours

SHARE = 0.02
"""What is asked for."""
_WARM_UP = 5
"""Blocks of steps in which the tracker may find its rate."""
_WINDOW = 4
"""Blocks of a window: every window costs a forward of each layer, whatever the share, and accumulators of its own."""
_TIMEOUT_S = 600.0


def measure_overhead(workload: Workload, windows: int) -> dict[str, Samples]:
    """Seconds per step, "tracked" and "untracked"; each block of steps is a window.

    Closing the window is part of the block's last step; that it is published is waited for, and not timed: the store
    of a large training has cores of its own. Raises NotImplementedError while the option is not built.
    """
    torch.manual_seed(0)
    model = workload.build()
    trainers = {name: Trainer(model, workload) for name in ("untracked", "tracked")}
    block = workload.block
    with (
        tempfile.TemporaryDirectory() as name,
        attach_ours(trainers["tracked"].model, Path(name), STATS, max_overhead=SHARE) as tracker,
    ):
        closed: list[int] = []

        def step(number: int) -> None:
            trainers["tracked"].step(number)
            if number % (_WINDOW * block) == _WINDOW * block - 1:
                tracker.add_saturations()
                closed.append(number)

        def wait(_: str, __: int) -> None:
            # Before any step: the one that follows a window's end is an untracked one as often as not.
            if closed:
                closed.clear()
                tracker.flush(_TIMEOUT_S)

        variants = {"untracked": trainers["untracked"].step, "tracked": step}
        samples = alternate(variants, calls=windows * block, block=block, warmup=_WARM_UP * block, before=wait)
    check_same_losses(workload.name, {name: trainer.loss.item() for name, trainer in trainers.items()})
    return samples
