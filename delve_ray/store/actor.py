"""The store as a Ray actor, and how workers, drivers and tools reach it.

The actor is detached, takes no resources, and has a name made of the run's in a namespace of its own, so that
every process of the cluster that knows the run finds it. Intake, control and questions run in concurrency
groups of their own: a question is answered while a delta is merged, and publishing has its own thread.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import ray
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    GetTimeoutError,
    RayActorError,
    RayError,
    RayTaskError,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from delve_ray.errors import DelveRayError, OptionError, StoreError
from delve_ray.moments import F64
from delve_ray.storage import Storage
from delve_ray.store.core import CovarianceStore
from delve_ray.store.monitoring import Monitor
from delve_ray.store.protocol import Ack, Delta, Held, LayerInfo, Progress, Source, StoreConfig, Welcome
from delve_ray.store.saving import Saver

log = logging.getLogger(__name__)

NAMESPACE = "delve_ray"
"""Ray namespace of all stores; workers would otherwise look in their driver's, which is random."""
CALL_TIMEOUT_S = 60.0
"""Deadline of one call to the store; the sender repeats, a question fails."""
FIND_TIMEOUT_S = 60.0
"""How long a rank other than 0 waits for rank 0 to start the store."""
UNUSED_AFTER_S = 3600.0
"""How long a store that a driver started waits for its first worker."""
PLACE_BYTES = 1 << 20
"""Memory that the actor asks Ray for. Ray puts an actor that asks for nothing on any node, whatever affinity it has;
one that asks for something goes to the node that it names as long as that lives."""
INLINE_BYTES = 64 << 10
"""Buffers below this travel with the call; Ray puts arguments of more than 100 KB into its object store anyway."""
MOST_CORES = 9
"""Cores that a store uses at most, one of them for what comes in: workers that it serves may be on the same node."""
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

    def __init__(self, config: StoreConfig) -> None:
        saver = Saver(Storage(config.savefile), config.snapshot_every) if has_snapshots(config) else None
        # Ray gives an actor that asks for no CPU a BLAS of one thread, so that threads of ours are not threads of its.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        cores = min(cores, MOST_CORES)
        self._core = CovarianceStore(config, saver=saver, finish_timeout=FINISH_TIMEOUT_S, cores=cores)
        self._ended = threading.Event()
        Monitor(self._core).start(self._ended)
        self._released = False  # whether all workers have their last answer
        self._ready = threading.Event()
        self._problem = "the store is being restored"
        if saver is not None and _was_restarted():
            threading.Thread(target=self._restore, name="delve_ray-restore", daemon=True).start()
        else:
            self._ready.set()
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
                log.exception("run %s: %s; trying again", self._core.config.run, self._problem)
                time.sleep(pause)
                pause = min(2 * pause, 30.0)
        self._core.config = replace(self._core.config, resume=True)
        self._ready.set()

    def settings(self) -> StoreConfig:
        """See `protocol.Store.settings`."""
        return self._store.settings()

    def register(
        self, source: Source, config: StoreConfig, layers: Sequence[LayerInfo], held: Held | None = None
    ) -> Welcome:
        """See `protocol.Store.register`."""
        return self._store.register(source, config, layers, held)

    def take(self, delta: Delta, buffer: F64) -> Ack:
        """See `protocol.Store.take`. The buffer is a view of Ray's object store; it is read, never kept."""
        return self._store.take(delta, buffer)

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
        self._released = self._store.goodbye(source)
        return self._released and not self._core.config.lingers

    def covariance(self, layer: str, phase: str) -> F64:
        """See `CovarianceStore.covariance`."""
        return self._store.covariance(layer, phase)

    def spectrum(self, layer: str, phase: str) -> F64:
        """See `CovarianceStore.spectrum`."""
        return self._store.spectrum(layer, phase)

    def status(self) -> dict[str, Any]:
        """See `CovarianceStore.status`."""
        return self._store.status() | {"pid": os.getpid(), "node": ray.get_runtime_context().get_node_id()}

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
        if self._core.joined and not self._core.abandoned:
            ended, trial = time.monotonic(), self._core.config.gone_after > 0
            while time.monotonic() < ended + LINGER_S and not (self._released or (trial and self._core.deserted)):
                time.sleep(0.5)
            time.sleep(self._core.config.lingers)
        self._ended.set()
        ray.kill(me, no_restart=True)


_GROUPS = {
    "intake": ("take",),
    "control": ("register", "abandon", "leave", "goodbye"),
    "query": ("settings", "heartbeat", "progress", "covariance", "spectrum", "status"),
    "wait": ("flush",),
}
_GROUP_THREADS = {"intake": 1, "control": 2, "query": 2, "wait": 2}


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


def actor_name(run: str) -> str:
    """Name of a run's store in the namespace `NAMESPACE`."""
    return f"store/{run}"


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


def find(run: str, timeout: float = 0.0) -> Any:
    """The handle of a run's store; waits up to `timeout` seconds for it. Raises StoreError."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            return ray.get_actor(actor_name(run), namespace=NAMESPACE)
        except ValueError:
            if time.monotonic() >= deadline:
                raise StoreError(
                    f"run {run!r} has no store in this Ray cluster (waited {timeout:.0f} s); its first tracker starts "
                    f"one on rank 0, delve_ray.start_store() does so from a driver, and it ends with the run"
                ) from None
            time.sleep(0.1)


class RemoteStore:
    """A store behind its actor, as a worker's sender sees it: `protocol.Store`, every call with a deadline.

    `following` is asked for the delta after one that is on its way. Its buffer is brought into Ray's object store
    meanwhile, which takes about as long as the store takes for the other.
    """

    def __init__(self, handle: Any) -> None:
        self.handle = handle
        self.following: Callable[[int], tuple[Delta, F64] | None] = lambda seq: None
        self._put: tuple[tuple[str, int], Any] | None = None
        self._put_next: tuple[tuple[str, int], Any] | None = None

    def settings(self) -> StoreConfig:
        """See `protocol.Store.settings`."""
        settings: StoreConfig = self._call("settings")
        return settings

    def register(
        self, source: Source, config: StoreConfig, layers: Sequence[LayerInfo], held: Held | None = None
    ) -> Welcome:
        """See `protocol.Store.register`."""
        welcome: Welcome = self._call("register", source, config, layers, held)
        return welcome

    def take(self, delta: Delta, buffer: F64) -> Ack:
        """See `protocol.Store.take`.

        The buffer lies in Ray's object store once, however often the delta is offered: what a store that has stopped
        has not answered still refers to it.
        """
        if buffer.nbytes < INLINE_BYTES:
            small: Ack = self._call("take", delta, buffer)
            return small
        key = (delta.source.source, delta.seq)
        if self._put is None or self._put[0] != key:
            self._put, self._put_next = self._put_next, None  # frees the one before, before there is another
        if self._put is None or self._put[0] != key:
            self._put = None
            self._put = key, self._try("take", lambda: ray.put(buffer))
        reference = self._put[1]

        def call() -> Any:
            answer = self.handle.take.remote(delta, reference)
            self._prepare(delta.seq)
            return ray.get(answer, timeout=CALL_TIMEOUT_S)

        ack: Ack = self._try("take", call)
        self._put = None
        return ack

    def _prepare(self, seq: int) -> None:
        """Bring the buffer after this one into the object store, if it is not there and there is room."""
        found = self.following(seq)
        if found is None or found[1].nbytes < INLINE_BYTES:
            return
        key = (found[0].source.source, found[0].seq)
        if self._put_next is None or self._put_next[0] != key:
            self._put_next = None
            with contextlib.suppress(RayError):  # it will be tried again, and said, when it is its turn
                self._put_next = key, ray.put(found[1])

    def heartbeat(self, source: Source, outbox: Mapping[str, int] | None = None) -> Ack:
        """See `protocol.Store.heartbeat`."""
        ack: Ack = self._call("heartbeat", source, outbox)
        return ack

    def progress(self, timeout: float = CALL_TIMEOUT_S) -> Progress:
        """See `protocol.Store.progress`."""
        progress: Progress = self._call("progress", call_timeout=timeout)
        return progress

    def abandon(self) -> None:
        """End the actor if nobody has ever joined its run."""
        if self._call("abandon"):
            self.kill()

    def leave(self, source: Source, *, completed: bool, sent: int, timeout: float) -> Ack:
        """See `protocol.Store.leave`."""
        ack: Ack = self._call("leave", source, completed=completed, sent=sent, call_timeout=timeout)
        return ack

    def status(self) -> dict[str, Any]:
        """See `CovarianceStore.status`."""
        status: dict[str, Any] = self._call("status")
        return status

    def flush(self, timeout: float) -> bool:
        """See `CovarianceStore.flush`."""
        return bool(self._call("flush", timeout, call_timeout=timeout + CALL_TIMEOUT_S))

    def wait_finished(self, timeout: float) -> bool:
        """Wait until everything is published and written after the last `leave`."""
        deadline = time.monotonic() + timeout
        pause = 0.02
        while not self.progress(max(1.0, deadline - time.monotonic())).finished:
            if time.monotonic() >= deadline:
                return False
            time.sleep(pause)
            pause = min(0.5, 2 * pause)
        return True

    def end(self, source: Source) -> None:
        """End the actor if this was the last source to ask; its run has finished and its files are written."""
        if ray.is_initialized() and self._call("goodbye", source):
            self.kill()

    def kill(self) -> None:
        """End the actor."""
        if ray.is_initialized():
            ray.kill(self.handle, no_restart=True)

    def _call(self, method: str, *args: Any, call_timeout: float = CALL_TIMEOUT_S, **kwargs: Any) -> Any:
        """Call and wait for the answer."""

        def call() -> Any:
            return ray.get(getattr(self.handle, method).remote(*args, **kwargs), timeout=call_timeout)

        return self._try(method, call)

    def _try(self, method: str, call: Callable[[], Any]) -> Any:
        """Do what needs Ray; what the store raises comes out as itself, Ray's own troubles as StoreError."""
        if not ray.is_initialized():  # calling an actor would start a new cluster
            raise StoreError("Ray was shut down before the tracker was closed", final=True)
        try:
            return call()
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, DelveRayError | NotImplementedError | KeyError):
                raise cause from None
            raise StoreError(f"the store failed in {method}: {cause!r}", final=True) from error
        except ActorUnavailableError as error:
            raise StoreError(f"the store is unavailable: {error}") from error
        except (ActorDiedError, RayActorError) as error:
            raise StoreError(f"the store's process has ended: {error}", final=True) from error
        except GetTimeoutError:
            raise StoreError(f"the store did not answer {method} in time") from None
        except Exception as error:  # Ray's own, such as a failed submission while it shuts down, or a full object store
            raise StoreError(f"calling the store failed in {method}: {type(error).__name__}: {error}") from error
