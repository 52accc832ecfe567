"""Finding out who this worker is and where its store is."""

from __future__ import annotations

import logging
import os
import socket
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch.distributed

from delve_ray.checks import check_integer, check_name, check_shards
from delve_ray.errors import OptionError, ReadError, RunEnded, StoreError
from delve_ray.integrations.ray_train import TrainWorker, current_worker, resolve_savefile
from delve_ray.integrations.trial import Trial, current_trial
from delve_ray.precision import PRODUCT_EPS
from delve_ray.recorder import RecorderOptions
from delve_ray.sketch import usable_sketch_size
from delve_ray.stat_options import check_thresholds, resolve_stats
from delve_ray.storage import Storage, absolute, check_savefile, is_absolute
from delve_ray.store.core import CovarianceStore
from delve_ray.store.protocol import SNAPSHOT_EVERY_S, LayerInfo, Source, Store, StoreConfig, Welcome
from delve_ray.store.run_file import read_run
from delve_ray.writers import SaveTo, check_save_to, check_writer_args, given_writers

REGISTER_TIMEOUT_S = 60.0
"""How long a worker tries to register with a store that does not answer."""


SAVEFILE = "saturation"
"""Savefile of a Ray Train run or a trial that gives none, in the directory of its results."""
LINGERS_S = 10.0
"""For how long a driver of Ray Train may be behind its workers with their reports, and still hear of the metrics."""
GONE_AFTER_S = 5.0
"""A trial that is stopped is killed, and its name does not come back for long: soon after, its run is ended."""


ENDING_S = 15.0
"""How long a worker of a run that goes on looks past stores that have just ended."""


@dataclass(frozen=True, slots=True)
class Identity:
    """A worker's place: the run, its rank of world_size, the attempt's token, and where the files go."""

    run: str
    rank: int
    world_size: int
    token: str
    savefile: str
    on_ray: bool
    rejoinable: bool
    """Whether the run's store waits for another attempt: nobody guesses a name that was made up."""
    resume: bool = False
    """Whether a savefile that holds this run is gone on with."""
    trial: Trial | None = None
    in_train: bool = False
    """Whether Ray Train has started it, whose driver hears of things later than the workers."""
    in_thread: bool = False
    """Whether the training may run in a thread of a process that outlives it, as Ray Tune has it."""

    def source(self) -> Source:
        """This worker as the store knows it."""
        return Source(self.run, self.token, self.rank, uuid.uuid4().hex, socket.gethostname(), os.getpid())


def ray_is_running() -> bool:
    """Whether this process is connected to a Ray cluster; never imports Ray."""
    ray = sys.modules.get("ray")
    return ray is not None and bool(getattr(ray, "is_initialized", lambda: False)())


def identify(
    savefile: object,
    run: str | None,
    rank: int | None,
    world_size: int | None,
    settings: StoreConfig | None = None,
    resume: bool | str | None = None,
    trial: Trial | None = None,
    name: str | None = None,
) -> Identity:
    """Who this worker is: what the user says, else Ray Train, Ray Tune, torch.distributed, else the only one.

    `settings` are those of a store that was given; what the user leaves out is taken from there. `trial` is the one
    that this worker works for; `name` is that of one of several trackers in it, each of which has its own run.
    Raises OptionError for a savefile that is no path, a rank outside the world, and ranks that could not meet.
    """
    if settings is not None:
        savefile = settings.savefile if savefile is None else savefile
        run, world_size = run or settings.run, _or(world_size, settings.world_size)
    worker, trial = current_worker(), trial or current_trial()
    home = trial or worker
    suffix = "" if name is None else f"-{check_name('name', name)}"
    suffix = suffix if settings is None else ""  # a store that is given is the tracker's own
    path, at_home = _locate(SAVEFILE + suffix if savefile is None and home is not None else savefile, home)
    if resume is None and (at_home or trial is not None):
        resume = True  # the same experiment, started again
    run = home.run if run is None and home is not None else run
    rank, world_size = _rank(rank, world_size, worker, launched=home is None)
    on_ray = ray_is_running() or (world_size > 1 and _connect())
    # A trial of one process that goes on is a new one: nothing waits for it.
    rejoinable = trial is None or world_size > 1
    run = None if run is None else run + suffix
    if run is None:
        if world_size > 1:
            raise OptionError(
                f"run=None with world_size={world_size}: give all ranks the same run= so that they meet in one store"
            )
        run = _run_on_disk(path) if resume else None
    if run is None:
        # Alone, a run needs no name that others could guess; a second one must not join the first by accident.
        run = _name_of(path) + (f"-{uuid.uuid4().hex[:8]}" if on_ray else "")
        rejoinable = False
    token = _token(resume, world_size) if worker is None or isinstance(resume, str) else worker.token
    resumes = bool(resume) or int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0) > 0
    return Identity(
        run=check_name("run", run),
        rank=rank,
        world_size=world_size,
        token=token,
        savefile=path,
        on_ray=on_ray,
        rejoinable=rejoinable,
        resume=resumes,
        trial=trial,
        in_train=worker is not None,
        in_thread=worker is None and trial is not None,
    )


def _rank(rank: int | None, world_size: int | None, worker: TrainWorker | None, *, launched: bool) -> tuple[int, int]:
    """Rank and world size: what the user says, else Ray Train, else a launcher where one may have started this."""
    others = (worker.rank, worker.world_size) if worker is not None else (_launched() if launched else None) or (0, 1)
    world_size = check_integer("world_size", _or(world_size, others[1]), at_least=1)
    rank = check_integer("rank", _or(rank, others[0]))
    if rank >= world_size:
        raise OptionError(f"rank={rank} is not below world_size={world_size}; ranks count from 0")
    return rank, world_size


def _launched() -> tuple[int, int] | None:
    """Rank and world size by torch.distributed, or as torchrun and its like tell them; None where nobody does."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    told = os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "")
    return (int(told[0]), int(told[1])) if all(value.isdecimal() for value in told) else None


def _connect() -> bool:
    """Connect to the Ray cluster that RAY_ADDRESS names, as one of several processes that nobody else brings together.

    Raises StoreError where it cannot be reached.
    """
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        return False
    import ray

    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise StoreError(f"RAY_ADDRESS={address!r}: there is no Ray cluster to meet in ({error})") from error
    return True


def _locate(savefile: object, home: Trial | TrainWorker | None) -> tuple[str, bool]:
    """Where a savefile lies, absolute, and whether that is in the directory of the run's or the trial's results."""
    path = check_savefile(savefile)
    if home is None or is_absolute(path):
        return absolute(path), False
    return resolve_savefile(path, home.storage_path, home.storage_filesystem), True


def _token(resume: bool | str | None, world_size: int) -> str:
    """What the ranks of this attempt share and those of no other have; empty where nobody tells attempts apart."""
    if isinstance(resume, str):
        return resume
    if elastic := os.environ.get("TORCHELASTIC_RUN_ID"):  # torchrun counts its restarts
        return f"{elastic}:{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    if not resume:
        return ""
    if world_size > 1:
        raise OptionError(
            f"resume=True with world_size={world_size}, and neither Ray Train nor torchrun says which workers were "
            f"started together; give all ranks of this attempt the same name, such as resume='second'"
        )
    return uuid.uuid4().hex


def _run_on_disk(savefile: str) -> str | None:
    """The name of the run that a savefile holds; None where it holds none."""
    try:
        return str(read_run(Storage(savefile))["run"])
    except (ReadError, KeyError):
        return None


def _name_of(savefile: str) -> str:
    """What a run without a name is called: the last part of its savefile.

    >>> _name_of("/data/a@b/"), _name_of("s3://key:secret@bucket/cnn?region=eu-west-1"), _name_of("gs://key@bucket")
    ('a@b', 'cnn', 'bucket')
    """
    if "://" not in savefile:
        return os.path.basename(savefile.rstrip("/")) or "run"
    return savefile.partition("?")[0].rstrip("/").rpartition("/")[2].rpartition("@")[2] or "run"


def _or(value: int | None, default: int) -> int:
    return default if value is None else value


def join(identity: Identity, config: StoreConfig) -> tuple[Store, bool]:
    """The store of a run that none was given for, and whether it was started here.

    An actor in the Ray cluster, else one in this process. On Ray, rank 0 starts the actor unless a driver has, on
    its own node, where a local savefile lies; the others wait for it.
    """
    if not identity.on_ray:
        if identity.world_size > 1:
            raise OptionError(
                f"world_size={identity.world_size} without Ray: set RAY_ADDRESS, or call ray.init() before the "
                f"tracker, in every rank and with the address of one cluster, or give a tracker to rank 0 alone, with "
                f"world_size=1"
            )
        # It ends with this process.
        return CovarianceStore(replace(config, silent_after=0.0, snapshot_every=0.0, num_shards=1)), True
    from delve_ray.store import actor

    try:
        return actor.connect(actor.find(identity.run, 0.0 if identity.rank == 0 else actor.FIND_TIMEOUT_S)), False
    except StoreError:
        if identity.rank > 0:
            raise
    return actor.connect(actor.start(config)), True


def given_store(store: Any) -> Store:
    """What the option `store` names: a store in this process, or the handle of an actor."""
    if isinstance(store, CovarianceStore):
        return store
    if not hasattr(store, "take"):
        raise OptionError(f"store={store!r} is neither a CovarianceStore nor the handle that start_store() returns")
    from delve_ray.store import actor

    return actor.connect(store)


def publication(
    identity: Identity,
    settings: StoreConfig | None,
    options: RecorderOptions,
    *,
    publish_every: float,
    model: Mapping[str, int],
) -> StoreConfig:
    """How the run is published, before the user's own choices: like the given store, else by default."""
    config = settings or StoreConfig(run=identity.run, savefile=identity.savefile, world_size=identity.world_size)
    trial = identity.trial
    return replace(
        config,
        run=identity.run,
        savefile=identity.savefile,
        world_size=identity.world_size,
        resume=identity.resume,
        snapshot_every=SNAPSHOT_EVERY_S if settings is None else settings.snapshot_every,
        publish_every=publish_every,
        model=model,
        product_eps=PRODUCT_EPS[options.products],
        lingers=LINGERS_S if identity.in_train else config.lingers,
        gone_after=config.gone_after if trial is None else GONE_AFTER_S,
        trial=config.trial if trial is None else trial.id,
        trial_config=config.trial_config if trial is None else trial.config,
        recording={
            **asdict(options.rows),
            "log_interval": options.log_interval,
            "max_samples": options.max_samples,
            "sample_fraction": options.sample_fraction,
            "seed": options.seed,
            "max_overhead": options.max_overhead,
            "precision": options.products,
        },
    )


def choose(
    config: StoreConfig,
    settings: StoreConfig | None,
    save_to: SaveTo | None,
    writer_args: Mapping[str, Any] | None,
    stats: Sequence[str] | str | None,
    sat_threshold: float | Sequence[float] | None,
    embed_rows: int | None,
    *,
    nosave: bool,
    verbose: bool = False,
    num_shards: int | str | None = None,
    max_features: int | None = None,
    sketch_size: int | None = None,
) -> StoreConfig:
    """How the run is published, with the user's choices; what is left out is as in a given store, else the default.

    Raises OptionError for what cannot be used.
    """
    if nosave:
        config = replace(config, save_to=(), writers=())
    elif save_to is not None or settings is None:
        save_to = save_to if save_to is not None else ()
        config = replace(config, save_to=check_save_to(save_to), writers=given_writers(save_to))
    if verbose and "console" not in config.save_to:
        config = replace(config, save_to=(*config.save_to, "console"))
    if writer_args:
        config = replace(config, writer_args=check_writer_args(writer_args, config.save_to))
    if stats is not None or settings is None:
        config = replace(config, stats=resolve_stats(stats))
    if num_shards is not None:
        config = replace(config, num_shards=check_shards(num_shards))
    if max_features is not None:
        config = replace(config, max_features=check_integer("max_features", max_features, at_least=1))
    if sketch_size is not None:
        config = replace(config, sketch_size=usable_sketch_size(sketch_size))
    if embed_rows is not None:
        config = replace(config, embed_rows=embed_rows)
    if sat_threshold is not None:
        thresholds = check_thresholds(sat_threshold)
        config = replace(config, threshold=thresholds[0], thresholds=thresholds if len(thresholds) > 1 else ())
    return config


def enter(
    identity: Identity, source: Source, config: StoreConfig, layers: Sequence[LayerInfo], given: Store | None
) -> tuple[Store, Welcome]:
    """Find or start the run's store and register with it.

    Waits for a store that is being restarted, and, where the run is resumed, for one of the run's last life to go.
    Raises what `Store.register` raises; then a store that was started here is gone.
    """
    began = time.monotonic()
    deadline = began + REGISTER_TIMEOUT_S
    while True:
        store, ours = given, False
        try:
            if store is None:
                store, ours = join(identity, config)
            return store, store.register(source, config, layers)
        except RunEnded:
            if (
                store is None
                or given is not None
                or not identity.resume
                or not identity.on_ray
                or time.monotonic() >= deadline
            ):
                raise
            with suppress(StoreError):  # it may have ended meanwhile
                if identity.rank == 0 and store.progress().finished:
                    store.abandon()
        except StoreError as error:
            # One that has just ended may have been the last attempt's, in whose place there will be another.
            ending = error.final and given is None and identity.on_ray and identity.resume
            if time.monotonic() >= (began + ENDING_S if ending else deadline) or (error.final and not ending):
                if ours:
                    _abandon(store)
                raise
        except BaseException:
            if ours:
                _abandon(store)
            raise
        time.sleep(0.5)


def through_combiner(store: Store, run: str, layers: Sequence[LayerInfo]) -> Store:
    """The store with deltas that go through this node's combiner; as it is where it is in this process."""
    if isinstance(store, CovarianceStore):
        return store
    from delve_ray.store.combiner_actor import combined

    return combined(store, run, layers)


def _abandon(store: Store | None) -> None:
    if store is not None:
        with suppress(StoreError):
            store.abandon()
