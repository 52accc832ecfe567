"""Which shard holds which layer."""

from __future__ import annotations

from collections.abc import Sequence

from delve_ray.sketch import SketchRule
from delve_ray.store.protocol import LayerInfo, StoreConfig


def assign(layers: Sequence[LayerInfo], num_shards: int, rule: SketchRule) -> list[int]:
    """The shard of each layer: the costliest first, each to the shard that has the least so far.

    A layer costs what its moments take, about d²/2, or what its sketch does by `rule`. Nobody is more than a third
    above the best assignment there is (Graham, Bounds on multiprocessing timing anomalies, SIAM J. Appl. Math. 17,
    1969). Layers of unknown width come last, and are spread evenly. The same layers have the same shards in every
    process.

    >>> from delve_ray.sketch import WHOLE
    >>> assign([LayerInfo(name, "Linear", width) for name, width in zip("abcd", (8, 64, 32, 48))], 2, WHOLE)
    [1, 0, 1, 1]
    """
    load = [(0, 0, shard) for shard in range(num_shards)]  # what it has, of how many layers
    shards = [0] * len(layers)
    cost = [0 if layer.features is None else rule.moments_size(layer.features) for layer in layers]
    for index in sorted(range(len(layers)), key=lambda index: (-cost[index], index)):
        held, count, shard = min(load)
        load[shard] = held + cost[index], count + 1, shard
        shards[index] = shard
    return shards


def shards_of(layers: Sequence[LayerInfo], config: StoreConfig) -> dict[str, int]:
    """The shard of each layer of a run, by name.

    >>> config = StoreConfig("r", "/nowhere", world_size=1, num_shards=2, max_features=100, sketch_size=8)
    >>> layers = [LayerInfo(name, "Linear", width) for name, width in (("head", 500), ("a", 100), ("b", 90))]
    >>> shards_of(layers, config)
    {'head': 1, 'a': 0, 'b': 1}
    """
    assigned = assign(layers, config.num_shards, config.sketching)
    return {info.name: shard for info, shard in zip(layers, assigned, strict=True)}
