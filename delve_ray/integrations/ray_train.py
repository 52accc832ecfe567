"""Who this process is, when it is a Ray Train worker.

The only file that looks into Ray Train. `get_storage` is a developer API of Ray: a test notices when it changes.
"""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass
from typing import Any

from delve_ray.errors import OptionError
from delve_ray.storage import is_absolute, uri_of


@dataclass(frozen=True, slots=True)
class TrainWorker:
    """A worker of a Ray Train run. `token` is the same for all workers of one attempt and new in the next."""

    run: str
    rank: int
    world_size: int
    token: str
    storage_path: str
    storage_filesystem: Any


def current_worker() -> TrainWorker | None:
    """This process's place in a Ray Train run, None outside of one.

    Ray Train gives attempts no public number. Each attempt's worker group gets a placement group of its own,
    which all of its workers are in: its id tells attempts apart without a barrier.
    """
    if "ray.train" not in sys.modules:  # a worker has imported it; nobody else should pay for it
        return None
    import ray.train
    import ray.util

    try:
        with warnings.catch_warnings():
            # Inside a Tune function there is a context, too, with a deprecation warning: not a Train worker.
            warnings.simplefilter("error", DeprecationWarning)
            context: Any = ray.train.get_context()
            rank, world_size = int(context.get_world_rank()), int(context.get_world_size())
            storage = context.get_storage()
    except (RuntimeError, DeprecationWarning, NotImplementedError):  # the last in Ray Train's local mode: no cluster
        return None
    group = ray.util.get_current_placement_group()
    return TrainWorker(
        run=str(context.get_experiment_name()),
        rank=rank,
        world_size=world_size,
        token="" if group is None else str(group.id.hex()),
        storage_path=str(storage.experiment_fs_path),
        storage_filesystem=storage.storage_filesystem,
    )


def resolve_savefile(savefile: str, storage_path: str, storage_filesystem: Any) -> str:
    """A savefile as seen from a Train worker or a trial: a relative one lies under the storage_path of its results.

    A worker's working directory is inside Ray's session folder, which nobody finds again. Raises OptionError where a
    storage_filesystem was made by hand, as the store opens what it can name.
    """
    if is_absolute(savefile):
        return savefile
    uri = uri_of(storage_filesystem, f"{storage_path.rstrip('/')}/{savefile}")
    if uri is None:
        raise OptionError(
            f"savefile={savefile!r} is relative, and the storage_filesystem {storage_filesystem.type_name!r} of its "
            f"results is none that a URI opens; give an absolute path or a URI"
        )
    return uri
