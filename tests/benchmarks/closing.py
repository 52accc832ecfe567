"""Closing a window with several ranks: ours, against moments that the training thread sums and decomposes itself.

The other side is what one does with torchmetrics: every rank holds the moments of each layer as states, computing
reduces them over all ranks, and the result is computed from the sums, everything in the training thread. An
all_reduce per state is less work than torchmetrics' gathering of all ranks' states on each of them.
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

import delve_ray
from tests.benchmarks.memory import ROOT
from tests.benchmarks.models import WORKLOADS, Workload
from tests.benchmarks.shipping import thread_seconds
from tests.benchmarks.steps import Trainer
from tests.benchmarks.timing import Samples, no_garbage_collection

RANKS = 2
_STEPS = 2
"""Of a window."""
_THRESHOLD = 0.99
_TIMEOUT_S = 300.0
_OBJECT_STORE_BYTES = 400 << 20


class Sums:
    """Count, sum and Σzzᵀ of each layer's rows, in float64, by plain hooks: what a metric's states would hold."""

    def __init__(self, model: nn.Module, layers: tuple[str, ...]) -> None:
        self.states: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        modules = dict(model.named_modules())
        for name in layers:
            modules[name].register_forward_hook(self._hook(name))

    def _hook(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def add(_: nn.Module, __: Any, output: Any) -> None:
            z = (output[0] if isinstance(output, tuple) else output).detach().double()
            z_ND = z.movedim(1, -1).reshape(-1, z.shape[1]) if z.dim() == 4 else z
            new = (torch.tensor(float(len(z_ND)), dtype=torch.float64), z_ND.sum(0), z_ND.t() @ z_ND)
            old = self.states.get(name)
            self.states[name] = new if old is None else tuple(a + b for a, b in zip(old, new, strict=True))  # type: ignore[assignment]

        return add

    def compute(self) -> dict[str, tuple[float, float]]:
        """Trace and saturation of each layer over all ranks; waits for all of them. The states are used up."""
        found = {}
        for name, (count, total, products) in self.states.items():
            for state in (count, total, products):
                dist.all_reduce(state)
            mean = total / count
            covariance = products / count - torch.outer(mean, mean)
            values = torch.linalg.eigvalsh(covariance).flip(0).clamp(min=0)
            share = values.cumsum(0) / values.sum()
            dimensionality = int((share < _THRESHOLD).sum()) + 1
            found[name] = (float(values.sum()), dimensionality / len(values))
        self.states.clear()
        return found


class Rank:
    """One rank: trains a copy of the model, and closes windows both ways in turn."""

    def __init__(self, rank: int, workload: int, folder: str, here: str) -> None:
        if delve_ray.__file__ != here:
            raise RuntimeError(f"a worker imports {delve_ray.__file__}, the benchmark {here}")
        self.rank = rank
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS)
        torch.manual_seed(0)
        self.trainer = Trainer(WORKLOADS[workload].build(), WORKLOADS[workload])
        self.tracker = delve_ray.SaturationTracker(
            f"{folder}/run",
            modules=self.trainer.model,
            stats=["lsat", "trc"],
            nosave=True,
            publish_every=0,
            run=Path(folder).name,
            rank=rank,
            world_size=RANKS,
        )
        self.sums = Sums(self.trainer.model, self.tracker.layers)

    def measure(self, windows: int) -> tuple[list[float], list[float], dict[str, float]]:
        """Seconds of each window, ours and summed in place; and CPU seconds per window of our threads."""
        ours: list[float] = []
        theirs: list[float] = []
        spent: dict[str, float] = {}
        with no_garbage_collection():
            for number in range(1 + windows):
                if number == 1:  # the first warms up
                    spent = thread_seconds()
                    ours, theirs = [], []
                for step in range(_STEPS):
                    self.trainer.step(_STEPS * number + step + self.rank)
                dist.barrier()  # no rank waits for another one's steps in what is timed
                seconds, metrics = self._ours()
                ours.append(seconds)
                dist.barrier()
                start = time.perf_counter()
                summed = self.sums.compute()
                theirs.append(time.perf_counter() - start)
                check_same(metrics, summed)
        return ours, theirs, {name: (now - spent[name]) / windows for name, now in thread_seconds().items()}

    def _ours(self) -> tuple[float, dict[str, float]]:
        start = time.perf_counter()
        self.tracker.add_saturations()
        seconds = time.perf_counter() - start
        return seconds, self.tracker.metrics(wait=True, timeout=_TIMEOUT_S)

    def close(self) -> None:
        """Leave the run and the group."""
        self.tracker.close()
        dist.destroy_process_group()


def check_same(metrics: dict[str, float], summed: dict[str, tuple[float, float]]) -> None:
    """Raises RuntimeError where the two do not say the same: then the times are not of the same work.

    The trace to 1e-4; the saturation to 2 %, as the share of variance may meet the threshold up to rounding.
    """
    for name, (trace, saturation) in summed.items():
        ours = metrics[f"trace/train/{name}"], metrics[f"saturation/train/{name}"]
        if not (abs(ours[0] - trace) <= 1e-4 * trace and abs(ours[1] - saturation) <= 0.02):
            raise RuntimeError(
                f"{name}: trace and saturation are {ours} here and {(trace, saturation)} summed in place"
            )


@contextmanager
def local_ray() -> Iterator[Any]:
    """A Ray of this machine with a CPU for each rank; nothing of it is left afterwards."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    ray.init(
        address="local",
        num_cpus=RANKS,
        num_gpus=0,
        include_dashboard=False,
        object_store_memory=_OBJECT_STORE_BYTES,
        logging_level=logging.ERROR,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}},
    )
    try:
        yield ray
    finally:
        ray.shutdown()


def measure_closing(ray: Any, workload: Workload, windows: int) -> tuple[dict[str, Samples], dict[str, float]]:
    """Seconds of the training thread per window and rank, "ours" and "all_reduce"; CPU seconds of our threads."""
    with tempfile.TemporaryDirectory(prefix=f"bench-{uuid.uuid4().hex[:8]}-") as folder:
        actor = ray.remote(num_cpus=1)(Rank)
        index = WORKLOADS.index(workload)
        ranks = [actor.remote(rank, index, folder, delve_ray.__file__) for rank in range(RANKS)]
        try:
            found = ray.get([rank.measure.remote(windows) for rank in ranks])
            ray.get([rank.close.remote() for rank in ranks])
        finally:
            for rank in ranks:
                ray.kill(rank)
    samples = {"ours": np.concatenate([f[0] for f in found]), "all_reduce": np.concatenate([f[1] for f in found])}
    shares = {name: float(np.mean([f[2][name] for f in found])) for name in found[0][2]}
    return samples, shares
