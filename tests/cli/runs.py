"""Runs as files, and the command as a process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from delve_ray.storage import Storage
from delve_ray.writers.parquet import ParquetWriter
from tests.windows import layer_row, scalar, window

ROOT = Path(__file__).parents[2]


def publish(
    path: Path,
    steps: int = 2,
    run: str = "run",
    phases: Sequence[str] = ("train", "eval"),
    layers: Sequence[str] = ("conv1", "fc"),
    *,
    accuracy: float | None = None,
    described: Any = None,
    trial: str | None = None,
    config: Any = None,
    **row: Any,
) -> Path:
    """Write a run of some steps, its last accuracy and its run.json, where they are given."""
    writer = ParquetWriter(Storage(path))
    text = None if config is None else json.dumps(config)
    for step in range(steps):
        rows = [layer_row(name, phase, **row) for phase in phases for name in layers]
        writer.write(window(rows, run=run, step=step, window=step, trial=trial, trial_config=text))
    if accuracy is not None:
        writer.write_scalars([scalar("accuracy", accuracy, run=run, step=steps - 1)])
    if described is not None:
        (Path(path) / "run.json").write_text(json.dumps(described))
    return path


def command(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    environment = options.pop("env", dict(os.environ))
    return subprocess.run(
        [sys.executable, "-m", "delve_ray.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment | {"PYTHONPATH": str(ROOT)},
        **options,
    )
