"""A run's store and its shards as other processes reach them: by name, each call with a deadline."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
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

from delve_ray.errors import DelveRayError, StoreError, StoreLost
from delve_ray.moments import F64
from delve_ray.schema import PublishedWindow
from delve_ray.store.parts import Key
from delve_ray.store.protocol import Ack, Bundle, Delta, Held, LayerInfo, Progress, Source, StoreConfig, Welcome
from delve_ray.store.sharded import ShardedStore

log = logging.getLogger(__name__)

NAMESPACE = "delve_ray"
"""Ray namespace of all stores; workers would otherwise look in their driver's, which is random."""
CALL_TIMEOUT_S = 60.0
"""Deadline of one call to the store; the sender repeats, a question fails."""
SOON_S = 5.0
"""Deadline of a question that is asked of a shard while somebody waits for the front."""
FIND_TIMEOUT_S = 60.0
"""How long a rank other than 0 waits for rank 0 to start the store."""
INLINE_BYTES = 64 << 10
"""Buffers below this travel with the call; Ray puts arguments of more than 100 KB into its object store anyway."""


def actor_name(run: str, shard: int | None = None) -> str:
    """Name of a run's store, or of one of its shards, in the namespace `NAMESPACE`."""
    return f"store/{run}" if shard is None else f"shard {shard}/{run}"


def exists(run: str, shard: int) -> bool:
    """Whether a shard's actor is there, alive or being restarted; as long as Ray does not say, it is."""
    try:
        ray.get_actor(actor_name(run, shard), namespace=NAMESPACE)
    except ValueError:
        return False
    except Exception as error:  # Ray's own: who asks on a thread of its own goes on, and asks again
        log.debug("shard %d of run %s: %s", shard, run, error)
    return True


def find(run: str, timeout: float = 0.0, shard: int | None = None) -> Any:
    """The handle of a run's store, or of one of its shards; waits up to `timeout` seconds for it. Raises StoreError."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            return ray.get_actor(actor_name(run, shard), namespace=NAMESPACE)
        except ValueError:
            if time.monotonic() >= deadline:
                raise StoreError(
                    f"run {run!r} has no store in this Ray cluster (waited {timeout:.0f} s); its first tracker starts "
                    f"one on rank 0, delve_ray.start_store() does so from a driver, and it ends with the run"
                ) from None
        except Exception as error:  # Ray's own, such as a control plane that is being restarted
            if time.monotonic() >= deadline:
                raise StoreError(
                    f"Ray does not say where the store of run {run!r} is: {type(error).__name__}: {error}"
                ) from error
        time.sleep(0.1)


def connect(handle: Any) -> RemoteStore | ShardedStore:
    """The store behind an actor's handle, with its shards if it has some.

    Waits for one that is being restarted. Raises StoreError.
    """
    front = RemoteStore(handle)
    deadline = time.monotonic() + FIND_TIMEOUT_S
    while True:
        try:
            settings = front.settings()
            break
        except StoreError as error:
            if error.final or time.monotonic() >= deadline:
                raise
        time.sleep(0.5)
    if settings.num_shards == 1:
        return front
    shards = [RemoteStore(find(settings.run, FIND_TIMEOUT_S, shard=shard)) for shard in range(settings.num_shards)]
    return ShardedStore(front, shards)


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

    def take_bundle(self, bundle: Bundle, buffer: F64) -> tuple[Ack | None, ...]:
        """See `protocol.Store.take_bundle`."""
        acks: tuple[Ack | None, ...] = self._call("take_bundle", bundle, buffer)
        return acks

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

    def abandon(self) -> bool:
        """End the actor if nobody has ever joined its run; whether it has ended."""
        if not self._call("abandon"):
            return False
        self.kill()
        return True

    def leave(self, source: Source, *, completed: bool, sent: int, timeout: float) -> Ack:
        """See `protocol.Store.leave`."""
        ack: Ack = self._call("leave", source, completed=completed, sent=sent, call_timeout=timeout)
        return ack

    def status(self, timeout: float = CALL_TIMEOUT_S) -> dict[str, Any]:
        """See `CovarianceStore.status`."""
        status: dict[str, Any] = self._call("status", call_timeout=timeout)
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

    def accept(self, shard: int, part: PublishedWindow, after: Key | None = None, problems: Sequence[str] = ()) -> bool:
        """See `FrontStore.accept`."""
        return bool(self._call("accept", shard, part, after, tuple(problems)))

    def part_state(self, shard: int, attempt: int, window: int, revision: int) -> str:
        """See `FrontStore.part_state`."""
        return str(self._call("part_state", shard, attempt, window, revision))

    def shard_done(self, shard: int, problems: Sequence[str] = ()) -> None:
        """See `FrontStore.shard_done`."""
        self._call("shard_done", shard, tuple(problems))

    def matrix(self, question: str, layer: str, phase: str) -> F64:
        """What the store's `covariance` or `spectrum` answers."""
        answer: F64 = self._call(question, layer, phase)
        return answer

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
            raise StoreLost(f"the store's process has ended: {error}", final=True) from error
        except GetTimeoutError:
            raise StoreError(f"the store did not answer {method} in time") from None
        except Exception as error:  # Ray's own, such as a failed submission while it shuts down, or a full object store
            raise StoreError(f"calling the store failed in {method}: {type(error).__name__}: {error}") from error
