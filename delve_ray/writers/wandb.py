"""Weights & Biases: every metric under its key, with the trial's config."""

from __future__ import annotations

import os
import tempfile
import uuid
from typing import Any

from delve_ray.errors import OptionError
from delve_ray.schema import PublishedWindow, window_metrics
from delve_ray.writers.base import Scalar, WriterRun, remember, remembered

STEP = "delve_ray/step"
"""The metric that all others are drawn against: windows and scalars need not come in the order of their steps."""


INIT_S = 30.0
"""How long W&B may take to begin a run, while the workers wait for their store."""


class WandbWriter:
    """Logs final windows and user scalars to a Weights & Biases run of its own, named as the run.

    `writer_args={"wandb": {...}}` are options of `wandb.init`, such as project, group, or mode="offline"; its config
    has the trial's config and the model's numbers. Offline files lie in `<savefile>/wandb` where that is local. A
    corrected window adds a newer point on its step. Raises OptionError without the package wandb.
    """

    name = "wandb"

    def __init__(self, **options: Any) -> None:
        self._options = options
        self._run: Any = None

    def open(self, run: WriterRun) -> None:
        """Begin the run, or go on with that of a store before this one."""
        try:
            import wandb
        except ImportError as error:
            raise OptionError(f"save_to='wandb' needs wandb ({error}): pip install 'delve_ray[wandb]'") from error
        if run.storage.is_local:
            folder = run.storage.local_path
            os.makedirs(folder, exist_ok=True)
        else:
            folder = tempfile.mkdtemp(prefix="delve_ray-wandb-")
        options = {"dir": folder, "name": run.run, "reinit": "create_new", "resume": "allow", **self._options}
        options.setdefault("settings", wandb.Settings(init_timeout=INIT_S))
        options.setdefault("id", remembered(run, self.name) or uuid.uuid4().hex)
        remember(run, self.name, options["id"])
        config = {**dict(run.trial_config or {}), "model": dict(run.model), **dict(options.pop("config", None) or {})}
        self._run = wandb.init(config=config, **options)
        self._run.define_metric(STEP, hidden=True)
        self._run.define_metric("*", step_metric=STEP)

    def write(self, window: PublishedWindow) -> None:
        """Log a final window."""
        if window.final and window.rows:
            self._run.log({**window_metrics(window.rows), STEP: window.step})

    def write_scalars(self, scalars: list[Scalar]) -> None:
        """Log user scalars under their own names."""
        for scalar in scalars:
            self._run.log({scalar.name: scalar.value, STEP: scalar.step})

    def close(self) -> None:
        """Finish the run."""
        if self._run is not None:
            self._run.finish()
