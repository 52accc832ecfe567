"""From closing a window to its metrics: delve's add_saturations() against ours, on the same layers and statistics."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from tests.benchmarks.models import Workload
from tests.benchmarks.steps import Trainer
from tests.benchmarks.timing import Samples, alternate
from tests.benchmarks.trackers import attach_delve, attach_ours

_TIMEOUT_S = 600.0


def measure_publishing(workload: Workload, stats: Sequence[str], windows: int) -> dict[str, Samples]:
    """Seconds per window.

    "delve": add_saturations(), which computes, writes its CSV files and returns. "ours": add_saturations() and
    metrics(wait=True), until the metrics are there. "ours, on disk": add_saturations() and flush(), until the
    Parquet file is written as well.
    """
    torch.manual_seed(0)
    model = workload.build()
    trainers = {name: Trainer(model, workload) for name in ("delve", "ours", "ours, on disk")}
    with tempfile.TemporaryDirectory() as name:
        theirs = attach_delve(trainers["delve"].model, Path(name), stats)
        with (
            attach_ours(trainers["ours"].model, Path(name) / "a", stats) as ours,
            attach_ours(trainers["ours, on disk"].model, Path(name) / "b", stats) as flushed,
        ):

            def publish(_: int) -> None:
                ours.add_saturations()
                ours.metrics(wait=True, timeout=_TIMEOUT_S)

            def publish_and_write(_: int) -> None:
                flushed.add_saturations()
                flushed.flush(_TIMEOUT_S)

            variants: dict[str, Callable[[int], object]] = {
                "delve": lambda _: theirs.add_saturations(),
                "ours": publish,
                "ours, on disk": publish_and_write,
            }
            return alternate(
                variants, calls=windows, block=1, warmup=1, before=lambda name, call: trainers[name].step(call)
            )
