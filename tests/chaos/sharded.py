"""A store with shards, any process of which can be killed."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from delve_ray.store.core import CovarianceStore
from delve_ray.store.front import FrontStore
from delve_ray.store.parts import PartWriter, ShardStore, shard_config
from delve_ray.store.protocol import StoreConfig
from delve_ray.store.saving import Saver
from delve_ray.store.sharded import ShardedStore
from delve_ray.writers.parquet import ParquetWriter
from tests.chaos.harness import Incarnations, MortalStorage, Reached


@dataclass
class _Alive:
    alive: bool = True


@dataclass
class _Together:
    """What is between two kills, whichever process they hit."""

    store: ShardedStore
    storage: _Alive = field(default_factory=_Alive)


class ShardedIncarnations:
    """`Incarnations` of a front and its shards; a kill hits one of them.

    `reached` is the store as a worker reaches it, through all its lives.
    """

    def __init__(
        self, config: StoreConfig, rng: random.Random, num_shards: int, failing: float = 0.0, every: float = 0.01
    ) -> None:
        self.config = replace(config, num_shards=num_shards)
        self.random, self.failing = rng, failing
        self.front = Incarnations(self.config, rng, failing, every, make=_make_front)
        self.shards = [
            Incarnations(shard_config(self.config, shard), rng, failing, every, make=partial(self._make_shard, shard))
            for shard in range(num_shards)
        ]
        front: Any = Reached(self.front)
        shards: list[Any] = [Reached(shard) for shard in self.shards]
        self.reached = ShardedStore(front, shards)
        self.life: Any = _Together(self.reached)

    def _make_shard(self, shard: int, config: StoreConfig, storage: MortalStorage, saver: Saver) -> CovarianceStore:
        front: Any = Reached(self.front, storage)
        writer = PartWriter(shard, lambda: front, self.config.num_shards)
        return ShardStore(config, writers=[writer], saver=saver, finish_timeout=20.0)

    def start(self) -> None:
        """Begin the first lives."""
        for each in (self.front, *self.shards):
            each.start()

    @property
    def finished(self) -> bool:
        """Whether the run has ended and everything is written; a front is told of shards that are gone by then."""
        life = self.front.life
        if life is not None and isinstance(life.store, FrontStore) and life.store.joined:
            for shard in life.store.undone:
                if self.shards[shard].finished:
                    life.store.shard_done(shard)
        return self.front.finished

    @property
    def lives(self) -> int:
        """Processes that there were."""
        return sum(each.lives for each in (self.front, *self.shards))

    def kill(self, *, damage: str | None = None, process: Incarnations | None = None) -> None:
        """Kill one of the processes, any unless it is said which, and start it anew."""
        self.life.storage.alive = False
        (process or self.random.choice((self.front, *self.shards))).kill(damage=damage)
        self.life = _Together(self.reached)


def _make_front(config: StoreConfig, storage: MortalStorage, saver: Saver) -> FrontStore:
    return FrontStore(config, writers=[ParquetWriter(storage)], saver=saver, finish_timeout=20.0)


Lives = Incarnations | ShardedIncarnations


def lives_of(
    config: StoreConfig, rng: random.Random, num_shards: int, failing: float = 0.0, every: float = 0.01
) -> Lives:
    """A store that can be killed, with shards or without, in its first life."""
    store: Lives = (
        Incarnations(config, rng, failing, every)
        if num_shards == 1
        else ShardedIncarnations(config, rng, num_shards, failing, every)
    )
    store.start()
    return store
