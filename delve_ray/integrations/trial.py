"""Who this process is, when it is the trial of a Ray Tune sweep.

The only file that looks into Ray Tune's trials. Tune's context tells a function's trial its name and directory, but
neither its config nor anything to a class's trial; the trainable, which is the actor's instance, knows all of it. That
is no public interface of Ray: a test notices when it changes.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import Any

from delve_ray.configs import plain


@dataclass(frozen=True, slots=True)
class Trial:
    """A trial of a Ray Tune sweep: its id and name, its config as JSON, and the directory of its results.

    A trainer that a trial starts has its workers elsewhere: hand it to them, and they to `SaturationTracker(trial=…)`.
    """

    id: str
    name: str
    config: str
    storage_path: str
    storage_filesystem: Any

    @property
    def run(self) -> str:
        """Name of the trial's run: its own name, in which Tune puts the id unless somebody else makes the names."""
        return self.name if self.id in self.name else f"{self.name}-{self.id}"


def current_trial() -> Trial | None:
    """The trial of a Ray Tune sweep that this process is, None where it is none.

    In functions and in classes that Tune runs; not in the workers of a trainer that a trial starts, see `Trial`.
    """
    if "ray.tune" not in sys.modules:  # a trial has imported it; nobody else should pay for it
        return None
    import ray
    from ray.tune import Trainable

    worker = ray._private.worker.global_worker
    trainable = getattr(worker, "actors", {}).get(getattr(worker, "actor_id", None))
    storage = getattr(trainable, "_storage", None)
    if not isinstance(trainable, Trainable) or storage is None:
        return None
    return Trial(
        id=str(trainable.trial_id),
        name=str(trainable.trial_name),
        config=json.dumps(plain(trainable.config), sort_keys=True, allow_nan=False),
        storage_path=str(storage.trial_fs_path),
        storage_filesystem=storage.storage_filesystem,
    )
