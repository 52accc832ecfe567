"""Who may join a run, and as what."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from delve_ray.errors import RegistrationError, RunEnded
from delve_ray.storage import Storage
from delve_ray.store.attempt import Attempt, Member
from delve_ray.store.description import config_difference, layer_difference
from delve_ray.store.processes import started
from delve_ray.store.protocol import Held, LayerInfo, Source, StoreConfig
from delve_ray.store.run_file import RunFile
from delve_ray.writers import Writer, WriterRun, make_writers, open_writers

if TYPE_CHECKING:
    from delve_ray.store.core import CovarianceStore


def check(
    store: CovarianceStore, source: Source, config: StoreConfig, layers: Sequence[LayerInfo], held: Held | None
) -> None:
    """Turn away a worker that does not fit the run. Raises RegistrationError."""
    run = store.config.run
    current = store.attempts[-1] if store.attempts else None
    if store.ending is not None:
        raise RunEnded(f"run {run!r} has ended ({store.ending}); choose another run name to start a new one")
    if difference := config_difference(store.config, config, source.rank):
        raise RegistrationError(difference)
    world_size = current.world_size if current is not None and current.token == source.token else config.world_size
    if config.world_size != world_size:
        raise RegistrationError(
            f"rank {source.rank} brings world_size={config.world_size}, but run {run!r} has world_size={world_size}; "
            f"give every worker of a run the same options, or another run name"
        )
    if not 0 <= source.rank < world_size:
        raise RegistrationError(f"rank={source.rank} is not in 0 … {world_size - 1} of run {run!r}")
    if store.layers and list(layers) != store.layers:
        raise RegistrationError(
            f"run {run!r} exists with other layers: {layer_difference(store.layers, layers)}; "
            f"give this run another name, or track the same model in every worker"
        )
    if current is None:
        return
    if current.token != source.token:
        _check_new_attempt(store, current, source, held)
    elif (member := current.members.get(source.rank)) is not None and not _replaces(source, member.source):
        held_by = "has already left" if member.left else "is tracked already"
        raise RegistrationError(
            f"rank {source.rank} of run {run!r} {held_by} (by pid {member.source.pid} on {member.source.host}); "
            f"give each worker its own rank=, and each training its own run=; resume= goes on with this one"
        )


def _check_new_attempt(store: CovarianceStore, current: Attempt, source: Source, held: Held | None) -> None:
    earlier = source.token in store.tokens or (held is not None and held.attempt <= current.number)
    if earlier:
        raise RegistrationError(
            f"rank {source.rank} (pid {source.pid} on {source.host}) belongs to an earlier attempt of run "
            f"{store.config.run!r}; attempt {current.number} has begun"
        )


def _replaces(source: Source, other: Source) -> bool:
    """Whether one worker takes over from another: the same attempt has started its rank anew, in another process.

    Only where the attempt's token was given by who starts the workers, and so knows that the other is gone.
    """
    return bool(source.token) and (source.host, source.pid) != (other.host, other.pid)


def admit(attempt: Attempt, source: Source, held: Held | None) -> Member:
    """Make a worker a member of an attempt: at its beginning, where it was, or where the others are."""
    member = Member(source, started=started(source))
    before = attempt.members.get(source.rank)
    if held is not None:
        member.next_seq, member.next_window = held.seq, held.window
        member.gap = None if held.whole else held.window
        attempt.published = min(attempt.published, held.window)
    elif before is not None:
        member.next_window = max(other.next_window for other in attempt.members.values())
        member.gap = member.next_window
        for ordinal, window in attempt.windows.items():  # what it will never close
            if before.next_window <= ordinal < member.next_window:
                window.closed.add(source.rank)
                window.broken.add(source.rank)
                window.touch()
    attempt.admit(member)
    return member


def prepare(
    config: StoreConfig, layers: Sequence[LayerInfo], given: Sequence[Writer] | None, *, later: bool = False
) -> tuple[RunFile | None, Sequence[Writer]]:
    """The run's file and its writers; `later`, see `open_writers`. On an error nothing has been started, nor written.

    Raises OptionError, RegistrationError.
    """
    if given is not None or not config.save_to:
        return None, given or ()
    storage = Storage(config.savefile)
    storage.prepare()
    run = WriterRun(
        config.run,
        storage,
        config.trial,
        None if config.trial_config is None else json.loads(config.trial_config),
        config.model,
    )
    writers = make_writers(config.save_to, run, config.writer_args, config.writers)
    run_file = RunFile(storage, config, layers)
    try:
        return run_file, open_writers(writers, run, later=later)
    except BaseException:
        run_file.undo()
        raise
