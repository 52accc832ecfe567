"""A store with shards as a worker sees it: one store.

A delta is cut into one for each shard, with the moments of its layers, and one for the front, without moments. All have
the delta's sequence number, so that each store counts it once by itself; the front gets its own last, so that what it
hears of is in the shards. What the stores answer becomes one answer: a delta is in the store when it is in all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, TypeVar

import numpy as np

from delve_ray.errors import UnknownSource
from delve_ray.moments import F64
from delve_ray.reservoir import packed_size
from delve_ray.sketch import WHOLE
from delve_ray.store.assignment import assign
from delve_ray.store.door import check_bundle_form, check_content, check_form
from delve_ray.store.front import FrontStore
from delve_ray.store.parts import PartWriter, ShardStore, shard_config
from delve_ray.store.protocol import (
    Ack,
    Bundle,
    Delta,
    Held,
    LayerInfo,
    Progress,
    Source,
    Store,
    StoreConfig,
    Welcome,
    checksum,
)
from delve_ray.store.saving import Saver
from delve_ray.store.scanning import copy_scanned
from delve_ray.store.state import State

T = TypeVar("T")


class ShardedStore:
    """`protocol.Store` made of a front and its shards; see there for what the methods do."""

    def __init__(self, front: Store, shards: Sequence[Store]) -> None:
        self.front = front
        self.shards = list(shards)
        self._run = ""
        self._layers: list[LayerInfo] = []
        self._assigned: list[int] = []
        self._rule = WHOLE

    def _each(self, call: Callable[[int, Store], T]) -> list[T]:
        """Call all shards side by side; the first error is raised once all have answered."""
        # Threads of this call alone: a rank that leaves has nothing to end, and they cost less than an answer.
        pool = ThreadPoolExecutor(len(self.shards), thread_name_prefix="delve_ray-shards")
        try:
            running = [_begun(pool, partial(call, index, shard)) for index, shard in enumerate(self.shards)]
            errors = [error for future in running if (error := future.exception()) is not None]
        finally:
            pool.shutdown(wait=False)
        if errors:
            raise errors[0]
        return [future.result() for future in running]

    @property
    def handle(self) -> Any:
        """What answers drivers and tools: the front's actor, or the front itself where it is in this process."""
        return getattr(self.front, "handle", self.front)

    def settings(self) -> StoreConfig:
        """How the run is published."""
        return self.front.settings()

    def register(
        self, source: Source, config: StoreConfig, layers: Sequence[LayerInfo], held: Held | None = None
    ) -> Welcome:
        """Join the run, or join it again: at the front, and then in every shard."""
        self.know(layers, config)
        welcome = self.front.register(source, config, layers, held)
        # Which attempt it is, and where this rank is in it, the front alone decides.
        there = held or Held(welcome.attempt, 0, welcome.window, whole=True)
        self._each(lambda index, shard: shard.register(source, shard_config(config, index), layers, there))
        return welcome

    def know(self, layers: Sequence[LayerInfo], config: StoreConfig) -> None:
        """The run's layers, for one who does not register."""
        self._run, self._layers = config.run, list(layers)
        self._rule = config.sketching
        self._assigned = assign(layers, len(self.shards), self._rule)

    def take(self, delta: Delta, buffer: F64) -> Ack:
        """Merge a delta once, each shard its part; what is wrong anywhere in it reaches none of them."""
        if not self._layers:
            raise UnknownSource(f"rank {delta.source.rank} has not registered yet, which says what the shards have")
        widths = check_form(delta, buffer, self._run, self._layers, self._rule)
        pieces = self._cut(delta, buffer, widths)
        acks = self._each(lambda index, shard: shard.take(*pieces[index]))
        if any(ack.busy for ack in acks):  # the front does not hear of what is not in all shards
            return _both(self.front.heartbeat(delta.source), acks)
        nothing = np.empty(0)
        return _both(self.front.take(_without_moments(delta).sealed(nothing), nothing), acks)

    def take_bundle(self, bundle: Bundle, buffer: F64) -> tuple[Ack | None, ...]:
        """Merge deltas that were merged with each other, each shard its part.

        Where any store does not have them all now, each of them is to be offered by itself, to all stores again.
        """
        widths = check_bundle_form(bundle, buffer, self._run, self._layers, self._rule)
        pieces = self._cut(bundle.total, buffer, widths)
        parts = [
            Bundle(tuple(self._share(header, shard) for header in bundle.headers), piece).sealed(part)
            for shard, (piece, part) in enumerate(pieces)
        ]
        answers = self._each(lambda index, shard: shard.take_bundle(parts[index], pieces[index][1]))
        acks = [[ack for ack in column if ack is not None and not ack.busy] for column in zip(*answers, strict=True)]
        if any(len(column) < len(self.shards) for column in acks):
            return (None,) * len(bundle.headers)
        nothing = np.empty(0)
        headers = tuple(map(_without_moments, bundle.headers))
        fronts = self.front.take_bundle(Bundle(headers, _without_moments(bundle.total)).sealed(nothing), nothing)
        return tuple(front and _both(front, column) for front, column in zip(fronts, acks, strict=True))

    def _share(self, delta: Delta, shard: int) -> Delta:
        """What of a delta's header is about a shard's layers."""
        own = [index for index, entry in enumerate(delta.entries) if self._assigned[entry[0]] == shard]
        return replace(
            delta,
            entries=tuple(delta.entries[index] for index in own),
            widths=tuple(width for width in delta.widths if self._assigned[width[0]] == shard),
            weights=tuple(delta.weights[index] for index in own) if delta.weights else (),
            samples=tuple(sample for sample in delta.samples if self._assigned[sample[0]] == shard),
            scalars=(),
        )

    def _cut(self, delta: Delta, buffer: F64, widths: Sequence[int]) -> list[tuple[Delta, F64]]:
        """What each shard gets of a delta. Raises DeltaRefused for one whose content is wrong anywhere.

        Each value is read once, to be copied, checked and summed up: every one is in one piece, so that the sums of
        the pieces add up to that of the whole.
        """
        width_of = {entry[:2]: width for entry, width in zip(delta.entries, widths, strict=True)}
        moments = _slices([self._rule.moments_size(width) for width in widths], 0)
        sizes = [packed_size(rows, width_of[layer, phase]) for layer, phase, rows, _ in delta.samples]
        samples = _slices(sizes, moments[-1].stop if moments else 0)
        copies = []
        for shard in range(len(self.shards)):
            own = [index for index, entry in enumerate(delta.entries) if self._assigned[entry[0]] == shard]
            sampled = [index for index, sample in enumerate(delta.samples) if self._assigned[sample[0]] == shard]
            places = [*(moments[index] for index in own), *(samples[index] for index in sampled)]
            copies.append(copy_scanned(buffer, places))
        words = sum(words for _, words, _ in copies) % (1 << 64)
        finite = all(finite for *_, finite in copies)
        check_content(delta, buffer, widths, self._layers, self._rule, words, finite)
        shares = [self._share(delta, shard) for shard in range(len(self.shards))]
        return [
            (replace(share, checksum=checksum(share, words)), part)
            for share, (part, words, _) in zip(shares, copies, strict=True)
        ]

    def heartbeat(self, source: Source, outbox: Mapping[str, int] | None = None) -> Ack:
        """Say that the source is alive."""
        acks = self._each(lambda index, shard: shard.heartbeat(source))
        return _both(self.front.heartbeat(source, outbox), acks)

    def progress(self, timeout: float = 60.0) -> Progress:
        """How far publication is, with the latest metrics."""
        return self.front.progress(timeout)

    def leave(self, source: Source, *, completed: bool, sent: int, timeout: float = 0.0) -> Ack:
        """Deregister, in the shards first: the front then knows that there is no more to come."""
        acks = self._each(lambda _, shard: shard.leave(source, completed=completed, sent=sent, timeout=timeout))
        return _both(self.front.leave(source, completed=completed, sent=sent, timeout=timeout), acks)

    def flush(self, timeout: float) -> bool:
        """Publish what has arrived, and wait until it is written."""
        return all(self._each(lambda _, shard: shard.flush(timeout))) and self.front.flush(timeout)

    def wait_finished(self, timeout: float) -> bool:
        """Wait until everything is published and written after the last `leave`."""
        return self.front.wait_finished(timeout)

    def end(self, source: Source) -> None:
        """Release the stores."""
        self._each(lambda _, shard: shard.end(source))
        self.front.end(source)

    def abandon(self) -> bool:
        """End the stores if nobody has ever joined the run, which the front knows first."""
        abandoned = self.front.abandon()
        if abandoned:
            self._each(lambda _, shard: shard.abandon())
        return abandoned

    def status(self) -> dict[str, Any]:
        """That of the front, and under `shards` theirs."""
        return self.front.status() | {"shards": self._each(lambda _, shard: shard.status())}


class LocalShards(ShardedStore):
    """A front and shards in one process: what a recovery, or a test, works with."""

    def __init__(self, config: StoreConfig, savers: Callable[[StoreConfig], Saver | None]) -> None:
        self.local_front = FrontStore(config, saver=savers(config))
        self.local_shards = []
        for shard in range(config.num_shards):
            options = shard_config(config, shard)
            writer = PartWriter(shard, lambda: self.local_front, config.num_shards)
            self.local_shards.append(ShardStore(options, writers=[writer], saver=savers(options)))
        super().__init__(self.local_front, self.local_shards)

    @property
    def config(self) -> StoreConfig:
        """How the run is published."""
        return self.local_front.config

    @property
    def joined(self) -> bool:
        """Whether a worker has ever registered."""
        return self.local_front.joined

    def go_on(self, state: State, rescued: Mapping[int, State] | None = None) -> None:
        """Go on from the front's state, and from the snapshots that the shards have; one without any begins anew.

        `rescued` has, by number, the state of shards that have kept it elsewhere.
        """
        for index, shard in enumerate(self.local_shards):
            saved = (rescued or {}).get(index)
            if saved is None and shard.saver is not None:
                saved = shard.saver.load()
            if saved is not None:
                shard.go_on(replace(saved, config=shard.config, ending=None))
        self.local_front.go_on(state)
        self.know(state.layers, state.config)

    def finish(self, why: str) -> None:
        """Publish what is open and end the run."""
        for index, shard in enumerate(self.local_shards):
            if shard.joined:
                shard.finish(why)
            else:  # it has nothing, and nobody has come with something
                self.local_front.shard_done(index)
        self.local_front.finish(why)


def _begun(pool: ThreadPoolExecutor, call: Callable[[], T]) -> Future[T]:
    """A call in one of a pool's threads; in this one where the interpreter ends and starts no more of them."""
    try:
        return pool.submit(call)
    except RuntimeError:
        done: Future[T] = Future()
    try:
        done.set_result(call())
    except Exception as error:
        done.set_exception(error)
    return done


def _without_moments(delta: Delta) -> Delta:
    """What the front gets of a delta's header."""
    return replace(delta, entries=(), widths=(), weights=(), samples=())


def _slices(sizes: Sequence[int], start: int) -> list[slice]:
    ends = list(accumulate(sizes, initial=start))
    return [slice(first, last) for first, last in pairwise(ends)]


def _both(front: Ack, shards: Sequence[Ack]) -> Ack:
    """What all stores together have: a delta is there if all have it, and safe if all of their snapshots do."""
    acks = [front, *shards]
    busy = any(ack.busy for ack in acks)
    first = min(ack.next_seq for ack in acks)
    some = {seq for ack in acks for seq in (*ack.above, *range(first, ack.next_seq))}
    above = sorted(seq for seq in some if all(seq < ack.next_seq or seq in ack.above for ack in acks))
    return replace(
        front,
        merged=any(ack.merged for ack in acks) and not busy,
        refused=tuple(refused for ack in acks for refused in ack.refused),
        next_seq=first,
        above=tuple(above),
        durable=min(ack.durable for ack in acks),
        saved=all(ack.saved for ack in acks),
        left=all(ack.left for ack in acks),
        busy=busy,
        late=any(ack.late for ack in acks),
    )
