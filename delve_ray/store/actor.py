"""The store as a Ray actor, and how workers, drivers and tools reach it.

The actor is detached, takes no resources, and has a name made of the run's in a namespace of its own, so that
every process of the cluster that knows the run finds it. Intake, control and questions run in concurrency
groups of their own: a question is answered while a delta is merged, and publishing has its own thread.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from delve_ray.errors import DelveRayError, OptionError, StoreError
from delve_ray.moments import F64
from delve_ray.schema import PublishedWindow
from delve_ray.storage import Storage
from delve_ray.store.core import CovarianceStore
from delve_ray.store.front import FrontStore
from delve_ray.store.monitoring import Monitor
from delve_ray.store.parts import Key, PartWriter, ShardStore, detached, shard_config
from delve_ray.store.protocol import Ack, Bundle, Delta, Held, LayerInfo, Progress, Source, StoreConfig, Welcome
from delve_ray.store.remote import FIND_TIMEOUT_S as FIND_TIMEOUT_S
from delve_ray.store.remote import NAMESPACE as NAMESPACE
from delve_ray.store.remote import SOON_S, actor_name, exists
from delve_ray.store.remote import RemoteStore as RemoteStore
from delve_ray.store.remote import connect as connect
from delve_ray.store.remote import find as find
from delve_ray.store.remote_spectra import MOST_TASKS, RemoteSpectra
from delve_ray.store.room import check_room
from delve_ray.store.saving import Saver
from delve_ray.store.writing_items import may_pass

log = logging.getLogger(__name__)

UNUSED_AFTER_S = 3600.0
"""How long a store that a driver started waits for its first worker."""
PLACE_BYTES = 1 << 20
"""Memory that the actor asks Ray for. Ray puts an actor that asks for nothing on any node, whatever affinity it has;
one that asks for something goes to the node that it names as long as that lives."""
MOST_CORES = 9
"""Cores that a store uses at most, one of them for what comes in: workers that it serves may be on the same node."""
MOST_SHARDS = 8
"""Shards of a store that may choose; more are for those who have measured."""
READY_TIMEOUT_S = 10.0
"""How long a call waits for a store that is being restored, before the caller is told to ask again."""
FINISH_TIMEOUT_S = 3600.0
"""How long the store of a run that has ended tries to write what its writers could not."""
LINGER_S = 30.0
"""How long a finished store answers questions before it ends by itself, if nobody ends it."""


class StoreActor:
    """A `CovarianceStore` in a process of its own. Its methods are those of `protocol.Store` and of the store.

    Ray starts it anew when its process or its node is lost; it then goes on from its last snapshot.
    """

    def __init__(self, config: StoreConfig, shard: int | None = None) -> None:
        self._run, self._shard, num_shards = config.run, shard, config.num_shards
        if shard is not None:
            config = shard_config(config, shard)
        saver = Saver(Storage(config.savefile), config.snapshot_every) if has_snapshots(config) else None
        # Ray gives an actor that asks for no CPU a BLAS of one thread, so that threads of ours are not threads of its.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        cores = min(cores, MOST_CORES)
        kind = FrontStore if config.num_shards > 1 else CovarianceStore if shard is None else ShardStore
        writers = None if shard is None else [PartWriter(shard, self._front, num_shards)]
        self._core = kind(
            config,
            writers=writers,
            saver=saver,
            finish_timeout=FINISH_TIMEOUT_S,
            cores=cores,
            compute=RemoteSpectra(cores - 1),
            elsewhere=MOST_TASKS,
        )
        self._ended = threading.Event()
        part = "front" if config.num_shards > 1 else "all" if shard is None else str(shard)
        Monitor(self._core, shard=part).start(self._ended)
        self._released = False  # whether all workers have their last answer
        self._ready = threading.Event()
        self._problem = "the store is being restored"
        if saver is not None and _was_restarted():
            threading.Thread(target=self._restore, name="delve_ray-restore", daemon=True).start()
        else:
            self._ready.set()
        if config.num_shards > 1:
            start_shards(config)
        threading.Thread(target=self._end_when_finished, name="delve_ray-reaper", daemon=True).start()

    @property
    def _store(self) -> CovarianceStore:
        if not self._ready.wait(READY_TIMEOUT_S):
            raise StoreError(self._problem)
        return self._core

    def _restore(self) -> None:
        """Go on where the process before this one was, as soon as the storage lets us."""
        pause = 0.5
        while True:
            try:
                if not self._core.restore():
                    log.error("run %s: its store was started anew and found no snapshot", self._core.config.run)
                break
            except Exception as error:  # an actor whose constructor fails is gone for good
                self._problem = f"the store cannot be restored: {error}"
                where = None if may_pass(error) else error  # storage that is away needs no traceback
                log.error("run %s: %s; trying again in %g s", self._run, self._problem, pause, exc_info=where)
                time.sleep(pause)
                pause = min(2 * pause, 30.0)
        self._core.config = replace(self._core.config, resume=True)
        self._ready.set()

    def _front(self) -> RemoteStore:
        """The front of the run whose shard this is."""
        return RemoteStore(find(self._run))

    @property
    def _front_store(self) -> FrontStore:
        store = self._store
        if not isinstance(store, FrontStore):
            raise StoreError(f"the store of run {self._run!r} has no shards")
        return store

    def accept(self, shard: int, part: PublishedWindow, after: Key | None = None, problems: Sequence[str] = ()) -> bool:
        """See `FrontStore.accept`. The part's arrays are views of Ray's object store, and it may be kept for long."""
        return self._front_store.accept(shard, detached(part), after, problems)

    def part_state(self, shard: int, attempt: int, window: int, revision: int) -> str:
        """See `FrontStore.part_state`."""
        return self._front_store.part_state(shard, attempt, window, revision)

    def shard_done(self, shard: int, problems: Sequence[str] = ()) -> None:
        """See `FrontStore.shard_done`."""
        self._front_store.shard_done(shard, problems)

    def settings(self) -> StoreConfig:
        """See `protocol.Store.settings`."""
        return self._store.settings()

    def register(
        self, source: Source, config: StoreConfig, layers: Sequence[LayerInfo], held: Held | None = None
    ) -> Welcome:
        """See `protocol.Store.register`."""
        if self._shard is None and not self._store.joined:
            self._check_room(layers)
        return self._store.register(source, config, layers, held)

    def _check_room(self, layers: Sequence[LayerInfo]) -> None:
        """Raise RegistrationError where the moments of a run do not fit the nodes of its stores."""
        if not (isinstance(layers, list | tuple) and all(type(info) is LayerInfo for info in layers)):
            return  # the store says what is wrong with them
        nodes: list[str | None] = [ray.get_runtime_context().get_node_id()]
        if isinstance(self._store, FrontStore):
            nodes = [self._status_of(shard).get("node") for shard in range(self._store.config.num_shards)]
        alive = [node for node in ray.nodes() if node["Alive"]]
        memory = {node["NodeID"]: node["Resources"].get("memory", float("inf")) for node in alive}
        check_room(self._store.config, layers, nodes, memory)

    def take(self, delta: Delta, buffer: F64) -> Ack:
        """See `protocol.Store.take`. The buffer is a view of Ray's object store; it is read, never kept."""
        return self._store.take(delta, buffer)

    def take_bundle(self, bundle: Bundle, buffer: F64) -> tuple[Ack | None, ...]:
        """See `protocol.Store.take_bundle`."""
        return self._store.take_bundle(bundle, buffer)

    def heartbeat(self, source: Source, outbox: Mapping[str, int] | None = None) -> Ack:
        """See `protocol.Store.heartbeat`."""
        return self._store.heartbeat(source, outbox)

    def progress(self) -> Progress:
        """See `protocol.Store.progress`."""
        return self._store.progress()

    def abandon(self) -> bool:
        """See `CovarianceStore.abandon`."""
        return self._store.abandon()

    def leave(self, source: Source, *, completed: bool, sent: int) -> Ack:
        """See `protocol.Store.leave`."""
        return self._store.leave(source, completed=completed, sent=sent)

    def goodbye(self, source: Source) -> bool:
        """See `CovarianceStore.goodbye`; False as well where a driver may still ask."""
        released = self._store.goodbye(source)
        self._released = self._released or released  # two may say goodbye at once, and the last word be the first's
        return released and not self._core.config.lingers

    def covariance(self, layer: str, phase: str) -> F64:
        """See `CovarianceStore.covariance`."""
        return self._holder(layer, phase, "covariance")

    def spectrum(self, layer: str, phase: str) -> F64:
        """See `CovarianceStore.spectrum`."""
        return self._holder(layer, phase, "spectrum")

    def _holder(self, layer: str, phase: str, question: str) -> F64:
        """The answer of the store that has a layer: this one, or a shard."""
        store = self._store
        shard = store.assigned().get(layer) if isinstance(store, FrontStore) else None
        if shard is None:
            answer: F64 = getattr(store, question)(layer, phase)
            return answer
        remote = RemoteStore(find(self._run, shard=shard))
        found: F64 = remote.matrix(question, layer, phase)
        return found

    def status(self) -> dict[str, Any]:
        """See `CovarianceStore.status`."""
        status = self._store.status() | {"pid": os.getpid(), "node": ray.get_runtime_context().get_node_id()}
        if isinstance(self._store, FrontStore):
            status["shards"] = [self._status_of(shard) for shard in range(self._store.config.num_shards)]
        return status

    def _status_of(self, shard: int) -> dict[str, Any]:
        try:
            return RemoteStore(find(self._run, shard=shard)).status(SOON_S)
        except DelveRayError as error:
            return {"problems": [f"does not answer: {error}"]}

    def flush(self, timeout: float) -> bool:
        """See `CovarianceStore.flush`."""
        return self._store.flush(timeout)

    def _end_when_finished(self) -> None:
        """A detached actor lives until somebody ends it; when all workers were stopped, it must do so itself."""
        me = ray.get_runtime_context().current_actor
        unused_until = time.monotonic() + UNUSED_AFTER_S
        while not self._core.finished:
            time.sleep(1.0)
            if not self._core.joined and time.monotonic() > unused_until:
                self._core.abandon()
            if isinstance(self._core, FrontStore):
                for shard in self._core.undone:
                    if not exists(self._run, shard):
                        self._core.shard_done(shard)
        if self._core.joined and not self._core.abandoned:
            ended, trial = time.monotonic(), self._core.config.gone_after > 0
            while time.monotonic() < ended + LINGER_S and not (self._released or (trial and self._core.deserted)):
                time.sleep(0.5)
            time.sleep(self._core.config.lingers)
        self._ended.set()
        ray.kill(me, no_restart=True)


_GROUPS = {
    "intake": ("take", "take_bundle"),
    "control": ("register", "abandon", "leave", "goodbye"),
    "query": ("settings", "heartbeat", "progress", "covariance", "spectrum", "status"),
    "parts": ("accept", "part_state", "shard_done"),
    "wait": ("flush",),
}
_GROUP_THREADS = {"intake": 1, "control": 2, "query": 2, "parts": 2, "wait": 2}


@lru_cache(maxsize=1)
def _remote_class() -> Any:
    """The actor class, with each method in its concurrency group."""
    for group, methods in _GROUPS.items():
        for name in methods:
            setattr(StoreActor, name, ray.method(concurrency_group=group)(getattr(StoreActor, name)))
    remote: Any = ray.remote  # its type knows no concurrency groups
    return remote(num_cpus=0, max_restarts=-1, concurrency_groups=_GROUP_THREADS)(StoreActor)


def _was_restarted() -> bool:
    """Whether Ray has started this actor before, and it was lost."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's own, about what it calls inside
        return bool(ray.get_runtime_context().was_current_actor_reconstructed)


def has_snapshots(config: StoreConfig) -> bool:
    """Whether a run's store is saved: it writes files, and snapshots were not turned off."""
    return bool(config.save_to) and config.snapshot_every > 0


def start_shards(config: StoreConfig) -> None:
    """Start the shards of a run, or find those that are there; each on another node where there are several."""
    for shard in range(config.num_shards):
        _remote_class().options(
            name=actor_name(config.run, shard),
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            scheduling_strategy="SPREAD",
            memory=PLACE_BYTES,
        ).remote(replace(config, writers=()), shard)


def _auto_shards() -> int:
    """One for each node that is alive, at most `MOST_SHARDS`."""
    return max(1, min(MOST_SHARDS, sum(bool(node["Alive"]) for node in ray.nodes())))


def start(config: StoreConfig) -> Any:
    """Start the store of a run, or find it if it is there; on this node if it can, since the files lie here.

    Outside the placement group of the caller, so that it takes nothing from a trial or a worker group, and
    detached, so that it outlives the worker that happens to start it.
    """
    for writer in config.writers:
        try:
            ray.cloudpickle.dumps(writer)
        except Exception as error:  # whatever the object's own pickling raises
            raise OptionError(
                f"save_to: the writer {writer.name!r} cannot be sent to the store's process ({error}); let it open "
                f"files and connections in its open()"
            ) from error
    config = replace(config, num_shards=config.num_shards or _auto_shards())
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    return (
        _remote_class()
        .options(
            name=actor_name(config.run),
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            scheduling_strategy=here,
            memory=PLACE_BYTES,
        )
        .remote(config)
    )
