"""Merging into a run, once it has ended, what its workers could not deliver and its writers could not write."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from delve_ray.errors import DelveRayError, ReadError, UnknownSource
from delve_ray.parcels import Parcel, decode_parcel
from delve_ray.storage import Storage
from delve_ray.store.core import CovarianceStore
from delve_ray.store.parts import FOLDER as SHARDS
from delve_ray.store.parts import shard_of
from delve_ray.store.protocol import Held, StoreConfig
from delve_ray.store.run_file import NAME, read_run
from delve_ray.store.saving import FOLDER, Saver
from delve_ray.store.sharded import LocalShards
from delve_ray.store.state import State
from delve_ray.writers import FILES

log = logging.getLogger(__name__)

UNDELIVERED = "undelivered"
"""Folder beside a run's files where workers leave what they could not deliver."""
ALIVE_S = 60.0
"""A run that has not ended, and whose store has saved its state so many seconds ago or less, is taken to go on."""
TIMEOUT_S = 600.0
"""How long the recovered rows may take to be written."""


@dataclass(frozen=True, slots=True)
class Recovered:
    """What became of one file: `merged`, or why it was not; a delta that the run had already is merged."""

    file: str
    run: str
    attempt: int
    rank: int
    step: int
    samples: int
    merged: bool
    problem: str | None = None

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)


def recover(
    savefile: str | os.PathLike[str] | Storage, paths: Iterable[str | os.PathLike[str]] = (), *, force: bool = False
) -> list[Recovered]:
    """Merge what was not delivered into a run that has ended, and publish the corrected rows as a new revision.

    `paths` are further files, or folders with files, beside `<savefile>/undelivered`: what `close()` named, or a
    worker's spill folder. Everything counts once, also what the run had already. Files that are merged are deleted.
    The run's own snapshot is finished as well: windows that its store had and did not publish.

    Returns what became of each file, in the order in which they were taken. Raises ReadError where there is no run,
    nothing to recover it from, or where the run seems to go on (not with `force`), and for a file that is damaged.
    """
    storage = savefile if isinstance(savefile, Storage) else Storage(savefile)
    paths = list(paths)
    files = _find(storage, paths)
    kept = [state for place in _rescued(paths) if (state := Saver(place, 10.0).load()) is not None]
    if not (files or kept or storage.exists(NAME)):
        raise ReadError(f"{storage.uri}: no run there; give the savefile of a run")
    if not force:
        _check_ended(storage)
    parcels = sorted(((name, _read(name)) for name in files), key=lambda item: _order(item[1]))
    saver = Saver(storage, 10.0)
    shards = {shard: state for state in kept if (shard := shard_of(state.config)) is not None}
    state = next((state for state in kept if shard_of(state.config) is None), None) or saver.load()
    if state is None and shards:
        raise ReadError(
            f"{storage.uri}: no snapshot of the run whose shards {sorted(shards)} were kept; give its savefile"
        )
    if not parcels and (state is None or not _is_unfinished(state, storage, shards)):
        return []
    store = _reopen(storage, parcels, state, saver, shards)
    if store is None:
        return []
    outcomes = [_take(store, name, parcel) for name, parcel in parcels]
    if not store.joined:
        store.abandon()
        return outcomes
    store.finish("recovered")
    if not store.wait_finished(TIMEOUT_S):
        raise ReadError(f"{storage.uri}: the rows are not written after {TIMEOUT_S:.0f} s; the files are kept")
    if problems := store.progress().problems:
        raise ReadError(f"{storage.uri}: {'; '.join(problems)}; the files are kept")
    for outcome in outcomes:
        if outcome.merged:
            os.unlink(outcome.file)
    return outcomes


def _find(storage: Storage, paths: Iterable[str | os.PathLike[str]]) -> list[str]:
    """The files of deltas in the given places and in the run's own folder, each once."""
    places = [os.path.join(storage.local_path, UNDELIVERED)] if storage.is_local else []
    found: list[str] = []
    for place in [*places, *(os.fspath(path) for path in paths)]:
        if os.path.isdir(place):
            names = sorted(name for name in os.listdir(place) if name.startswith("delta-") and name.endswith(".arrow"))
            found += [os.path.join(place, name) for name in names]
        elif os.path.exists(place):
            found.append(place)
        elif place not in places:
            raise ReadError(f"{place}: no such file or folder")
    return list(dict.fromkeys(map(os.path.realpath, found)))


def _rescued(paths: Iterable[str | os.PathLike[str]]) -> list[Storage]:
    """Of the given folders, and of those of shards in them, the ones that hold a snapshot."""
    places = [Path(place) for path in paths for place in (path, *sorted(Path(path, SHARDS).glob("*")))]
    return [Storage(place) for place in places if (place / FOLDER).is_dir()]


def _read(name: str) -> Parcel:
    folder, base = os.path.split(name)
    try:
        return decode_parcel(Storage(folder).read_buffer(base), name)
    except OSError as error:
        raise ReadError(f"{name} cannot be read ({error})") from error


def _order(parcel: Parcel) -> tuple[int, int, str, int]:
    delta = parcel.delta
    return delta.attempt, delta.source.rank, delta.source.source, delta.seq


def _check_ended(storage: Storage) -> None:
    """Raise ReadError for a run that seems to go on."""
    try:
        if read_run(storage).get("end") is not None:
            return
    except ReadError:
        return
    infos = [storage.filesystem.get_file_info(storage.path(name)) for name in storage.list_files(FOLDER, ".arrow")]
    age = time.time() - max((info.mtime_ns / 1e9 for info in infos if info.mtime_ns), default=0.0)
    if age < ALIVE_S:
        raise ReadError(
            f"{storage.uri}: the run has not ended, and its store saved its state {age:.0f} s ago; wait for its end, "
            f"or, if you know that its store is gone, pass --force"
        )


def _is_unfinished(state: State, storage: Storage, rescued: Mapping[int, State]) -> bool:
    """Whether the files lack something that a snapshot has, be it that of a shard."""
    if state.unfinished or state.config.num_shards == 1:
        return state.unfinished
    if any(shard.unfinished for shard in rescued.values()):
        return True
    shards = [Saver(storage.child(f"{SHARDS}/{shard}"), 10.0).load() for shard in range(state.config.num_shards)]
    return any(shard is not None and shard.unfinished for shard in shards)


def _reopen(
    storage: Storage,
    parcels: Sequence[tuple[str, Parcel]],
    state: State | None,
    saver: Saver,
    shards: Mapping[int, State],
) -> CovarianceStore | LocalShards | None:
    """A store in this process that goes on with the run; None where there is nothing to go on with."""
    known: StoreConfig | None = state.config if state is not None else None
    known = known or (parcels[0][1].config if parcels else None)
    if known is None:
        return None
    quiet = {"publish_every": 0.0, "silent_after": 0.0, "late_after": 0.0, "resume": True}
    files = tuple(name for name in known.save_to if name in FILES) or ("parquet",)
    config = replace(known, savefile=storage.savefile, save_to=files, **quiet)  # type: ignore[arg-type]
    if config.num_shards > 1:
        sharded = LocalShards(config, lambda each: saver if each is config else Saver(Storage(each.savefile), 10.0))
        if state is not None:
            sharded.go_on(replace(state, config=config, ending=None), shards)
        return sharded
    store = CovarianceStore(config, saver=saver)
    if state is not None:
        store.go_on(replace(state, config=config, ending=None))
    return store


def _take(store: CovarianceStore | LocalShards, name: str, parcel: Parcel) -> Recovered:
    """Offer one delta, registering its source if the run has lost it."""
    delta = parcel.delta
    samples = sum(n for _, _, n, _ in delta.entries)

    def outcome(problem: str | None) -> Recovered:
        source = delta.source
        return Recovered(name, source.run, delta.attempt, source.rank, delta.step, samples, problem is None, problem)

    try:
        try:
            ack = store.take(delta, parcel.buffer)
        except UnknownSource:
            held = Held(delta.attempt, delta.seq, delta.window, whole=parcel.first)
            config = replace(store.config, world_size=parcel.config.world_size, recording=parcel.config.recording)
            store.register(delta.source, config, parcel.layers, held)
            ack = store.take(delta, parcel.buffer)
    except DelveRayError as error:
        return outcome(str(error))
    if ack.busy:
        return outcome("it belongs to an attempt that a later one has replaced")
    return outcome("nobody waits for its window any more" if ack.late else None)
