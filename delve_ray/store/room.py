"""Whether the nodes of a run's stores have the memory for their layers, asked before the first rows come."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from delve_ray.errors import RegistrationError
from delve_ray.store.assignment import assign
from delve_ray.store.memory import StoreBytes, store_bytes
from delve_ray.store.protocol import LayerInfo, StoreConfig

log = logging.getLogger(__name__)


def shares(config: StoreConfig, layers: Sequence[LayerInfo], phases: int) -> list[StoreBytes]:
    """What each shard of a run takes, or its one store, for the layers whose width is known."""
    assigned = assign(layers, config.num_shards, config.sketching)
    return [
        store_bytes(
            [info.features for info, shard in zip(layers, assigned, strict=True) if shard == own and info.features],
            phases=phases,
            sources=config.world_size,
            embed_rows=config.rows_to_embed,
            rule=config.sketching,
        )
        for own in range(config.num_shards)
    ]


def check_room(
    config: StoreConfig, layers: Sequence[LayerInfo], nodes: Sequence[str | None], memory: Mapping[str, float]
) -> None:
    """Refuse a run whose moments do not fit the nodes where its stores are; warn where they fit barely.

    `nodes` has the node of each shard, or of the one store, None where it is not known; `memory` the bytes of each
    node. What is refused would not fit with one phase, one open window and nothing going on; the warning counts both
    phases and all that goes on at a time. Raises RegistrationError.
    """
    training, everything = (shares(config, layers, phases) for phases in (1, 2))
    for node in sorted({node for node in nodes if node in memory and node is not None}):
        shards = [shard for shard, where in enumerate(nodes) if where == node]
        least = sum(training[shard].resting for shard in shards)
        most = sum(everything[shard].peak for shard in shards)
        who = f"shards {shards}" if config.num_shards > 1 else "the store"
        where = f"run {config.run!r}: {who} on node {node[:12]}"
        remedy = (
            "leave layers out, lower max_features so that more of them are sketched, raise num_shards on more nodes, "
            "or start the store where there is more memory"
        )
        if least > memory[node]:
            raise RegistrationError(
                f"{where} would take at least {_gib(least)} for moments, and the node has {_gib(memory[node])}; "
                f"{remedy}"
            )
        if most > memory[node]:
            log.warning(
                "%s may take up to %s while windows are published, and the node has %s; if it is killed, %s",
                *(where, _gib(most), _gib(memory[node]), remedy),
            )


def _gib(nbytes: float) -> str:
    return f"{nbytes / (1 << 30):.3g} GiB"
