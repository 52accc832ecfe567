"""Steps with `max_overhead`, against untracked ones."""

from __future__ import annotations

import tempfile
from functools import partial
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


def measure_overhead(workload: Workload, blocks: int) -> dict[str, Samples]:
    """Seconds per step, "tracked" and "untracked".

    The variants take turns by whole blocks of steps: a tracker tells the length of a step by its own model's forwards,
    and steps of the other in between would be part of it. Closing a window is part of its last step; that it is
    published is waited for, and not timed: the store of a large training has cores of its own.
    """
    torch.manual_seed(0)
    model = workload.build()
    trainers = {name: Trainer(model, workload) for name in ("untracked", "tracked")}
    size = workload.block
    with (
        tempfile.TemporaryDirectory() as name,
        attach_ours(trainers["tracked"].model, Path(name), STATS, max_overhead=SHARE) as tracker,
    ):
        closed: list[int] = []

        def run(name: str, block: int) -> None:
            for number in range(block * size, (block + 1) * size):
                trainers[name].step(number)

        def tracked(block: int) -> None:
            run("tracked", block)
            if block % _WINDOW == _WINDOW - 1:
                tracker.add_saturations()
                closed.append(block)

        def wait(_: str, __: int) -> None:
            # Before whatever comes next, which is an untracked block as often as not.
            if closed:
                closed.clear()
                tracker.flush(_TIMEOUT_S)

        variants = {"untracked": partial(run, "untracked"), "tracked": tracked}
        found = alternate(variants, calls=blocks, block=1, warmup=_WARM_UP, before=wait)
    check_same_losses(workload.name, {name: trainer.loss.item() for name, trainer in trainers.items()})
    return {name: seconds / size for name, seconds in found.items()}
