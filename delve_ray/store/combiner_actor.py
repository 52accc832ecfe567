"""The combiner as a Ray actor, one for each node and run, and how the workers of the node reach it.

It is detached, takes no resources, and stays on its node: the buffers that workers offer lie in that node's object
store, where it reads them. It has nothing to lose, so it is not restarted; the next worker that needs one starts it
anew. It ends by itself when its workers have left, when the run has ended, and when nobody calls for long.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from delve_ray.errors import DelveRayError, StoreError, StoreLost
from delve_ray.moments import F64
from delve_ray.store.combiner import CombinedStore, Combiner
from delve_ray.store.monitoring import CombinerMonitor
from delve_ray.store.protocol import Ack, Delta, LayerInfo, Source, Store
from delve_ray.store.remote import NAMESPACE, SOON_S, RemoteStore, connect
from delve_ray.store.sharded import ShardedStore

log = logging.getLogger(__name__)

CALLS = 64
"""Calls that wait in a combiner at a time: at least one for each worker of a node."""
PLACE_BYTES = 1 << 20
"""Memory that it asks Ray for, which would otherwise not care where it is."""
ASK_S = 10.0
"""How long nobody has to have called before the store is asked whether the run has ended."""
UNUSED_AFTER_S = 600.0
"""How long a combiner that nobody calls waits, whatever the store says; starting another takes a second."""


class CombinerActor:
    """A `Combiner` in a process of its own, in front of the store behind `handle`."""

    def __init__(self, run: str, handle: Any, layers: Sequence[LayerInfo]) -> None:
        self._run = run
        self._store = connect(handle)
        settings = self._store.settings()
        if isinstance(self._store, ShardedStore):
            self._store.know(layers, settings)
        self._combiner = Combiner(self._store, layers, settings.rows_to_embed, settings.sketching)
        self._over = threading.Event()
        CombinerMonitor(run, self._combiner).start(self._over)
        threading.Thread(target=self._end_when_unused, name="delve_ray-reaper", daemon=True).start()

    def take(self, delta: Delta, buffer: F64) -> Ack | DelveRayError:
        """The store's answer, or the error that it has raised: so that it is told from one of this actor."""
        try:
            return self._combiner.take(delta, buffer)
        except DelveRayError as error:
            if isinstance(error, StoreLost):
                self._over.set()  # another run of this name needs another combiner
            return error

    def forget(self, source: Source) -> None:
        """A worker has left; the last one's leaving ends the actor, unless none of them has had anything yet."""
        self._combiner.forget(source)
        if self._combiner.counts["deltas"] and not self._combiner.ranks:
            self._over.set()

    def _end_when_unused(self) -> None:
        me = ray.get_runtime_context().current_actor
        while not (self._over.wait(ASK_S) or self._is_unused()):
            pass
        deadline = time.monotonic() + ASK_S
        while not self._combiner.idle and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.1)  # for the answers that are on their way
        ray.kill(me, no_restart=True)

    def _is_unused(self) -> bool:
        silent = time.monotonic() - self._combiner.called
        if silent < ASK_S or not self._combiner.idle:
            return False
        try:
            return silent > UNUSED_AFTER_S or self._store.progress(SOON_S).finished
        except StoreError as error:
            return error.final


def combiner_name(run: str, node: str) -> str:
    """Name of the combiner of a run on a node, in the namespace of the stores."""
    return f"combiner {node}/{run}"


class RemoteCombiner:
    """A combiner's actor as a worker sees it: `combiner.Link`."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle
        self._calls = RemoteStore(handle)  # for its `take`: the buffer in the object store, and a deadline
        self.following = self._calls.following

    def take(self, delta: Delta, buffer: F64) -> Ack | Exception:
        """See `combiner.Link.take`."""
        self._calls.following = self.following
        answer: Ack | Exception = self._calls.take(delta, buffer)
        return answer

    def forget(self, source: Source) -> None:
        """See `combiner.Link.forget`."""
        if ray.is_initialized():
            self.handle.forget.remote(source)


def start_combiner(run: str, handle: Any, layers: Sequence[LayerInfo]) -> RemoteCombiner:
    """The combiner of this node for a run whose store is behind `handle`; starts it if it is not there."""
    if not ray.is_initialized():  # asking for the node would start a new cluster
        raise StoreError("Ray was shut down")
    node = ray.get_runtime_context().get_node_id()
    remote: Any = ray.remote(CombinerActor)
    actor = remote.options(
        name=combiner_name(run, node),
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        num_cpus=0,
        memory=PLACE_BYTES,
        max_concurrency=CALLS,
        max_restarts=0,
        scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
    ).remote(run, handle, layers)
    return RemoteCombiner(actor)


def combined(store: Store, run: str, layers: Sequence[LayerInfo]) -> Store:
    """The store with its deltas going through this node's combiner; as it is where it is in this process."""
    front = store.front if isinstance(store, ShardedStore) else store
    if not isinstance(front, RemoteStore):
        return store
    through = CombinedStore(store, lambda: start_combiner(run, front.handle, layers))
    through.begin()
    return through
