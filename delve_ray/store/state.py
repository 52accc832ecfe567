"""The store's state as data: what a snapshot holds, and how a store is made of it again."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime
from typing import Any

import numpy as np

from delve_ray.errors import ReadError
from delve_ray.moments import F64
from delve_ray.reservoir import Reservoir
from delve_ray.sketch import columns_of
from delve_ray.storage import masked
from delve_ray.store.attempt import Attempt, Member
from delve_ray.store.processes import started
from delve_ray.store.protocol import LayerInfo, Source, StoreConfig
from delve_ray.store.window import Collected, Cut, Entry, Window
from delve_ray.writers.base import Scalar

_SOURCE = tuple(item.name for item in fields(Source))
Scalars = Mapping[tuple[str, int], tuple[Scalar, ...]]


@dataclass(frozen=True, slots=True)
class State:
    """Everything that a store has to know to go on; `scalars` are those that are not written yet, by source and delta.

    `ending` says why the run ends, None while it goes on.
    """

    config: StoreConfig
    layers: list[LayerInfo]
    tokens: list[str | None]
    attempts: list[Attempt]
    ending: str | None
    scalars: dict[tuple[str, int], tuple[Scalar, ...]]
    metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def unfinished(self) -> bool:
        """Whether something of it is not in the files."""
        windows = [window for attempt in self.attempts for window in attempt.windows.values()]
        return self.ending is None or bool(self.scalars) or any(w.changed or not w.published for w in windows)

    def closed(self) -> State:
        """The state for a run that is resumed: nobody belongs to its attempts any more, whatever they call theirs."""
        for attempt in self.attempts:
            attempt.token = uuid.uuid4().hex
        return replace(self, ending=None, tokens=[None] * len(self.tokens))


@dataclass(frozen=True, slots=True)
class Frozen:
    """A consistent cut through a store: exactly the deltas that `marks` count are in the cuts.

    `marks` are the first sequence number that is missing, by source; `parked` the files that the state refers to.
    """

    version: int
    header: dict[str, Any]
    cuts: list[Cut]
    marks: dict[str, int]
    parked: frozenset[str]


def cut_arrays(cuts: Iterable[Cut]) -> Iterator[F64]:
    """Mean and packed scatter of each cut, and keys and rows of its sample if it has one, one after the other."""
    for cut in cuts:
        collected = cut.collect()
        yield collected.mean
        yield collected.packed
        if cut.reservoir is not None:
            yield cut.reservoir.keys
            yield cut.reservoir.rows.reshape(-1)


def freeze_window(window: Window) -> tuple[list[list[float]], list[Cut]]:
    """What is said of a window's entries in a header, and a cut of each.

    Layer, phase, features, observations and non-finite rows; their weight where it is another number than that of the
    observations, or where there is a sample, of which then rows and bound follow.
    """
    index: list[list[float]] = []
    cuts = []
    for (layer, phase), entry in sorted(window.entries.items(), key=lambda item: item[0]):
        cut = entry.freeze()
        more = [] if cut.weight == cut.n and cut.reservoir is None else [cut.weight]
        if cut.reservoir is not None:
            more += [cut.reservoir.keys.size, cut.reservoir.bound]
        index.append([layer, phase, entry.features, cut.n, cut.nonfinite, *more])
        cuts.append(cut)
    return index, cuts


def window_entries(index: Iterable[Sequence[Any]], arrays: Iterator[F64], where: str) -> dict[tuple[int, int], Entry]:
    """The entries of a window out of a frame. Raises ReadError where header and arrays do not fit."""
    entries = {}
    for layer, phase, features, n, nonfinite, *rest in index:
        weight, *sample = rest or (float(n),)
        mean, packed = _next_arrays(arrays, (features, None), where)
        if columns_of(packed.size, features) is None:
            raise _damaged(where)
        collected = Collected(n, nonfinite, mean, packed, weight)
        entries[layer, phase] = Entry(features, collected, _reservoir(features, sample, arrays, where))
    return entries


def _reservoir(features: int, sample: Sequence[Any], arrays: Iterator[F64], where: str) -> Reservoir | None:
    if not sample:
        return None
    count, bound = sample
    keys, rows = _next_arrays(arrays, (count, count * features), where)
    return Reservoir(keys, rows.reshape(count, features), bound)


def _next_arrays(arrays: Iterator[F64], sizes: Iterable[int | None], where: str) -> list[F64]:
    """Copies of the next arrays. Raises ReadError where they have other sizes, where these are known."""
    found = [(np.array(next(arrays, ())), size) for size in sizes]
    if any(size is not None and array.size != size for array, size in found):
        raise _damaged(where)
    return [array for array, _ in found]


def _damaged(where: str) -> ReadError:
    return ReadError(f"{where} is damaged: its arrays are not those that its header lists")


def freeze(state: State, version: int) -> Frozen:
    """Cut through a state; nothing may be merged meanwhile."""
    cuts: list[Cut] = []
    attempts = []
    for attempt in state.attempts:
        windows = []
        for _, window in sorted(attempt.windows.items()):
            index, more = freeze_window(window)
            cuts += more
            windows.append(_window_header(window) | {"entries": index})
        attempts.append(_attempt_header(attempt) | {"windows": windows})
    header = {
        "config": config_header(state.config),
        "layers": [asdict(layer) for layer in state.layers],
        "tokens": list(state.tokens),
        "ending": state.ending,
        "attempts": attempts,
        "scalars": [[*key, [scalar_header(s) for s in scalars]] for key, scalars in state.scalars.items()],
        "metrics": dict(state.metrics),
    }
    marks = {m.source.source: m.next_seq for attempt in state.attempts for m in attempt.members.values()}
    parked = frozenset(w.parked for a in state.attempts for w in a.windows.values() if w.parked)
    return Frozen(version, header, cuts, marks, parked)


def thaw(header: dict[str, Any], arrays: Sequence[F64], where: str) -> State:
    """The state of a snapshot; the reverse of `freeze`. Raises ReadError where it is none."""
    try:
        rest = iter(arrays)
        return State(
            config=config_of(header["config"]),
            layers=[LayerInfo(**layer) for layer in header["layers"]],
            tokens=list(header["tokens"]),
            attempts=[_attempt(attempt, rest, where) for attempt in header["attempts"]],
            ending=header["ending"],
            scalars={(source, seq): tuple(map(scalar_of, scalars)) for source, seq, scalars in header["scalars"]},
            metrics=dict(header["metrics"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, ReadError):
            raise
        raise ReadError(f"{where} does not describe a store ({type(error).__name__}: {error})") from error


def config_header(config: StoreConfig) -> dict[str, Any]:
    """A configuration for JSON; the savefile, which is where this lies, without its password."""
    return config.on_disk() | {"savefile": masked(config.savefile)}


def config_of(values: Mapping[str, Any]) -> StoreConfig:
    """A configuration out of JSON, which has lists where there were tuples."""
    known: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    # Of before there were sketches; scatters of any width were whole.
    return StoreConfig(**({"sketch_size": 0} | known))


def scalar_header(scalar: Scalar) -> dict[str, Any]:
    """A scalar for JSON."""
    return asdict(scalar) | {"wall_time": scalar.wall_time.isoformat()}


def scalar_of(values: Mapping[str, Any]) -> Scalar:
    """A scalar out of JSON."""
    return Scalar(**{**values, "wall_time": datetime.fromisoformat(values["wall_time"])})


def _window_header(window: Window) -> dict[str, Any]:
    return {
        "ordinal": window.ordinal,
        "step": window.step,
        "labelled": window.labelled,
        "closed": sorted(window.closed),
        "broken": sorted(window.broken),
        "revision": window.revision,
        "published": window.published,
        "current": window.published and not window.changed and not window.unwritten,
        "parked": window.parked,
    }


def _attempt_header(attempt: Attempt) -> dict[str, Any]:
    return {
        "number": attempt.number,
        "token": attempt.token,
        "world_size": attempt.world_size,
        "first_step": attempt.first_step,
        "published": attempt.published,
        "widths": list(attempt.widths.items()),
        "members": [
            {
                # Not asdict, which copies deeply: this is done for every rank while nothing is merged.
                "source": {name: getattr(member.source, name) for name in _SOURCE},
                "next_seq": member.next_seq,
                "above": sorted(member.above),
                "closing": list(member.closing.items()),
                "next_window": member.next_window,
                "gap": member.gap,
                "left": member.left,
            }
            for member in attempt.members.values()
        ],
    }


def _attempt(header: Mapping[str, Any], arrays: Iterator[F64], where: str) -> Attempt:
    attempt = Attempt(
        header["number"],
        header["token"],
        header["world_size"],
        first_step=header["first_step"],
        published=header["published"],
        widths=dict(header["widths"]),
    )
    for values in header["members"]:
        source = Source(**values["source"])
        member = Member(
            source,
            next_seq=values["next_seq"],
            above=set(values["above"]),
            closing=dict(values["closing"]),
            next_window=values["next_window"],
            gap=values["gap"],
            left=values["left"],
            started=started(source),
        )
        attempt.admit(member)
    for values in header["windows"]:
        window = Window(
            values["ordinal"],
            values["step"],
            labelled=values["labelled"],
            entries=window_entries(values["entries"], arrays, where),
            closed=set(values["closed"]),
            broken=set(values["broken"]),
            revision=values["revision"],
            published=values["published"],
            changed=not values["current"],
            parked=values["parked"],
        )
        window.first_closed = attempt.began if window.closed else None
        attempt.windows[window.ordinal] = window
    return attempt
