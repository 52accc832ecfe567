"""Starting and finding stores from drivers and tools: the public functions."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from delve_ray.checks import check_flag, check_integer, check_seconds, check_shards
from delve_ray.errors import OptionError
from delve_ray.precision import PRODUCT_EPS
from delve_ray.sketch import usable_sketch_size
from delve_ray.stat_options import check_thresholds, resolve_stats
from delve_ray.storage import Storage, absolute, check_savefile
from delve_ray.store.protocol import EMBED_ROWS, MAX_FEATURES, SKETCH_SIZE, SNAPSHOT_EVERY_S, StoreConfig
from delve_ray.writers import SaveTo, check_save_to, check_writer_args, given_writers


def start_store(
    savefile: str | os.PathLike[str],
    *,
    run: str,
    world_size: int,
    save_to: SaveTo = ("parquet", "tensorboard"),
    writer_args: Mapping[str, Any] | None = None,
    num_shards: int | str = 1,
    spectra_gpus: int = 0,
    stats: Sequence[str] | str | None = None,
    sat_threshold: float | Sequence[float] = 0.99,
    embed_rows: int = EMBED_ROWS,
    max_features: int = MAX_FEATURES,
    sketch_size: int = SKETCH_SIZE,
    publish_every: float = 30.0,
    precision: str = "float32",
    resume: bool = False,
    late_after: float = 60.0,
    silent_after: float = 300.0,
    snapshot_every: float = SNAPSHOT_EVERY_S,
) -> Any:
    """Start a run's store from a driver, on the driver's node, and return the actor's handle.

    Trackers need this only where the store should lie elsewhere than with rank 0: they find it by `run`, or
    take it as `store=`. A relative savefile is meant from the driver's working directory. The handle answers
    `covariance.remote(layer, phase)`, `spectrum.remote(layer, phase)` and `status.remote()`. The store ends with
    its run. With `resume` a savefile that holds this run is gone on with. Ray must be initialised.

    A window is published without the ranks that have not closed it `late_after` seconds after the first one has. A
    rank that was not heard of for `silent_after` seconds is not waited for any more; if that holds for all, the run
    is published and ended. 0 is never. Every `snapshot_every` seconds the store saves what workers need not keep.

    Layers wider than `max_features` are sketched with `sketch_size` columns, or left out where that is 0.

    With `num_shards` above 1 so many more actors share the layers' moments, spread over the nodes; "auto" is one for
    each node, at most 8. The files and the answers are the same. Up to `spectra_gpus` GPUs that are free at that moment
    decompose layers of 4096 features and more, in float64; with 0, the default, no GPU is ever taken from a training.

    Raises OptionError for an option that cannot be used.
    """
    if precision not in PRODUCT_EPS:
        raise OptionError(f"precision={precision!r} is none of {', '.join(map(repr, PRODUCT_EPS))}")
    thresholds = check_thresholds(sat_threshold)
    names = check_save_to(save_to)
    config = StoreConfig(
        run=run,
        savefile=absolute(check_savefile(savefile)),
        world_size=check_integer("world_size", world_size, at_least=1),
        save_to=names,
        writers=given_writers(save_to),
        writer_args=check_writer_args(writer_args, names),
        stats=resolve_stats(stats),
        threshold=thresholds[0],
        thresholds=thresholds if len(thresholds) > 1 else (),
        num_shards=check_shards(num_shards),
        spectra_gpus=check_integer("spectra_gpus", spectra_gpus, at_least=0),
        embed_rows=embed_rows,
        max_features=check_integer("max_features", max_features, at_least=1),
        sketch_size=usable_sketch_size(sketch_size),
        publish_every=check_seconds("publish_every", publish_every),
        product_eps=PRODUCT_EPS[precision],
        snapshot_every=check_seconds("snapshot_every", snapshot_every),
        late_after=check_seconds("late_after", late_after),
        silent_after=check_seconds("silent_after", silent_after),
        resume=check_flag("resume", resume),
    )
    Storage(config.savefile)  # refuses a filesystem that pyarrow does not know
    from delve_ray.store import actor

    handle = actor.start(config)
    settings = actor.RemoteStore(handle).settings()
    # The first worker says how it records and what.
    shards = config.num_shards or settings.num_shards
    if replace(settings, recording={}, model={}, resume=config.resume) != replace(config, num_shards=shards):
        raise OptionError(f"run={run!r} has a store already, started with {settings}; choose another run name")
    return handle


def get_store(run: str) -> Any:
    """The actor's handle of a running run's store. Raises StoreError when the cluster has none of that name."""
    from delve_ray.store import actor

    return actor.find(run)
