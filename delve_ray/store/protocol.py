"""What workers and the store say to each other: plain data, and the one interface both kinds of store have."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from delve_ray.checks import AUTO_SHARDS, check_integer, check_name, check_seconds
from delve_ray.errors import OptionError
from delve_ray.moments import F64
from delve_ray.sketch import SketchRule, check_sketching, packed_size
from delve_ray.stat_options import EMBED_STAT, check_threshold, check_thresholds, resolve_stats
from delve_ray.store.scanning import word_sum
from delve_ray.writers import Writer
from delve_ray.writers.base import Scalar

EMBED_ROWS = 256
"""Rows of a layer and phase that a window's embedding shows, unless said otherwise."""
MAX_FEATURES = 8192
"""Features above which a layer is sketched, unless said otherwise."""
SKETCH_SIZE = 1024
"""Columns of such a sketch, unless said otherwise."""
SNAPSHOT_EVERY_S = 10.0
"""Seconds between snapshots of a store in a Ray cluster; they also bound what a worker has to keep."""


@dataclass(frozen=True, slots=True)
class LayerInfo:
    """What the store knows of a layer; `features` is None where only a forward tells, and a delta says it."""

    name: str
    layer_type: str
    features: int | None


@dataclass(frozen=True, slots=True)
class StoreConfig:
    """How one run is published; every worker of the run must bring the same.

    Attributes:
        savefile: absolute local path or URI.
        save_to: names of the writers.
        writer_args: their options, by name, and `writers`, those that were given as objects; no file has them.
        stats: canonical long names, "cov" for covariances, "embed" for embeddings.
        num_shards: stores that share the layers, behind one that has the files; 1 is one store alone, 0 as many as
            suit the cluster.
        spectra_gpus: GPUs that decompositions may take at a time where the cluster has free ones; 0 for none.
        embed_rows: rows of each layer and phase that a window's embedding has at most.
        threshold: δ of the intrinsic dimensionality.
        thresholds: all δ where there are several, `threshold` first; empty where there is only that one.
        recording: how workers make and choose rows, by option; the first worker's where it is empty.
        model: numbers about the model, such as `num_parameters`; the first worker's where it is empty.
        publish_every: seconds between live publications of an open window, 0 for none.
        product_eps: machine epsilon of the products, below which eigenvalues are rounding.
        silent_after: seconds without any sign of life from any source after which the run is ended, and from one
            rank after which nothing waits for it any more; 0 for never.
        late_after: seconds after the first rank has closed a window at which it is published without those that have
            not; 0 for never.
        snapshot_every: seconds between snapshots of what workers need not keep any longer, 0 for none.
        resume: whether a savefile that holds this run already is continued.
        gone_after: seconds after which the run is ended when all of its workers' processes have ended without leaving,
            as far as the store's machine can see them; 0 for not before `silent_after`.
        lingers: seconds for which the finished store answers after its last worker has gone, for a driver behind it.
        max_features, sketch_size: layers wider than the one are sketched with so many columns; 0 for none.
        trial, trial_config: id and config, as JSON, of the Ray Tune trial that this run is.

    Raises:
        OptionError: a value that cannot be used.
    """

    run: str
    savefile: str
    world_size: int
    save_to: tuple[str, ...] = ("parquet",)
    stats: tuple[str, ...] = ()
    threshold: float = 0.99
    thresholds: tuple[float, ...] = ()
    recording: Mapping[str, Any] = field(default_factory=dict)
    publish_every: float = 30.0
    product_eps: float = float(np.finfo(np.float32).eps)
    silent_after: float = 300.0
    late_after: float = 60.0
    snapshot_every: float = 0.0
    resume: bool = False
    trial: str | None = None
    trial_config: str | None = None
    num_shards: int = 1
    embed_rows: int = EMBED_ROWS
    spectra_gpus: int = 0
    max_features: int = MAX_FEATURES
    sketch_size: int = SKETCH_SIZE
    gone_after: float = 0.0
    lingers: float = 0.0
    model: Mapping[str, int] = field(default_factory=dict)
    writer_args: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, compare=False, repr=False)
    writers: tuple[Writer, ...] = field(default=(), compare=False, repr=False)

    def __post_init__(self) -> None:
        check_name("run", self.run)
        check_name("savefile", self.savefile)
        check_integer("world_size", self.world_size, at_least=1)
        resolve_stats(self.stats)
        check_threshold(self.threshold)
        if self.thresholds and check_thresholds(self.thresholds)[0] != self.threshold:
            raise OptionError(f"threshold={self.threshold} is not the first of thresholds={self.thresholds}")
        check_integer("num_shards", self.num_shards, at_least=AUTO_SHARDS)
        check_integer("embed_rows", self.embed_rows, at_least=1)
        check_integer("spectra_gpus", self.spectra_gpus, at_least=0)
        check_sketching(check_integer("max_features", self.max_features, at_least=1), self.sketch_size)
        check_seconds("publish_every", self.publish_every)
        check_seconds("silent_after", self.silent_after)
        check_seconds("late_after", self.late_after)
        check_seconds("snapshot_every", self.snapshot_every)
        check_seconds("gone_after", self.gone_after)
        check_seconds("lingers", self.lingers)

    @property
    def sketching(self) -> SketchRule:
        """Which layers are sketched, and how."""
        return SketchRule(self.max_features, self.sketch_size)

    @property
    def rows_to_embed(self) -> int:
        """Rows of each layer and phase that are kept for embeddings; 0 without them."""
        return self.embed_rows if EMBED_STAT in self.stats else 0

    def on_disk(self) -> dict[str, Any]:
        """The fields by name, without those of `NOT_ON_DISK`."""
        values = asdict(replace(self, writer_args={}, writers=()))
        return {name: value for name, value in values.items() if name not in NOT_ON_DISK}


NOT_ON_DISK = ("writer_args", "writers")
"""Fields of `StoreConfig` that no file has: passwords may be among them, and objects of other packages."""
SAME_FOR_ALL = (
    *("savefile", "save_to", "stats", "threshold", "thresholds", "embed_rows", "product_eps", "trial"),
    *("max_features", "sketch_size"),
)
"""Fields of `StoreConfig` in which a worker may not differ from the run that it joins."""


@dataclass(frozen=True, slots=True)
class Source:
    """One worker of one attempt.

    `token` is the same for all workers of an attempt and differs between attempts; `source` is this worker's
    own name.
    """

    run: str
    token: str
    rank: int
    source: str
    host: str
    pid: int


@dataclass(frozen=True, slots=True)
class Delta:
    """Header of the moments that a source gathered since its last delta; the moments are in a float64 buffer.

    For each entry (layer index, phase index, observations, non-finite rows) in order, the buffer holds the
    mean (d) and the packed scatter (d(d+1)/2). `window` is the ordinal of the window within the attempt;
    with `closes` the source says that this was its last delta for the window. `step` is the window's label where
    the user gave it (`labelled`), otherwise a guess. `widths` are the (layer index, features) of entries whose
    layer was registered without. `complete` is False where rows of this window were lost at the source. `weights`
    holds the total weight of each entry's observations, which its mean and scatter are weighted by; it is empty where
    every observation has the weight 1. Behind all moments the buffer has the packed reservoir of each of `samples`:
    (layer index, phase index, rows, bound). `checksum` is `fingerprint` of the header and the buffer.
    """

    source: Source
    attempt: int
    seq: int
    window: int
    step: int
    closes: bool
    labelled: bool
    entries: tuple[tuple[int, int, int, int], ...]
    widths: tuple[tuple[int, int], ...] = ()
    scalars: tuple[Scalar, ...] = ()
    complete: bool = True
    weights: tuple[float, ...] = field(default=(), repr=False)  # `checksum` says why
    samples: tuple[tuple[int, int, int, float], ...] = field(default=(), repr=False)
    checksum: int = 0

    def weight(self, index: int) -> float:
        """Total weight of an entry's observations."""
        return self.weights[index] if self.weights else float(self.entries[index][2])

    def sealed(self, buffer: F64) -> Delta:
        """The same header with its checksum."""
        return replace(self, checksum=fingerprint(self, buffer))


@dataclass(frozen=True, slots=True)
class Bundle:
    """Deltas of one attempt and window, each of another source, whose moments were merged before they came.

    `headers` are those of the deltas, without their checksums, which were those of other buffers. `total` is a delta's
    header for what they have together, in the buffer that comes with it: entries, widths, weights and samples; the rest
    of it says nothing. `checksum` is that of all headers.
    """

    headers: tuple[Delta, ...]
    total: Delta
    checksum: int = 0

    def sealed(self, buffer: F64) -> Bundle:
        """The same bundle with its checksums."""
        bundle = replace(self, total=self.total.sealed(buffer))
        return replace(bundle, checksum=bundle.fingerprint())

    def fingerprint(self) -> int:
        """A CRC-32 of all headers, the total's with its checksum among them."""
        headers = (*self.headers, self.total)
        return zlib.crc32("".join(repr((header, header.weights)) for header in headers).encode())


def fingerprint(delta: Delta, buffer: F64) -> int:
    """A checksum of a delta's header and moments, by which a changed bit is noticed.

    The sum of the moments' words modulo 2^64 and the CRC-32 of the header, see `checksum`.
    """
    return checksum(delta, word_sum(buffer))


def checksum(delta: Delta, words: int) -> int:
    """`fingerprint` where the sum of the words is known.

    Weights and samples are in it where there are some: without, it is that of files from before there were any, which
    are still to be merged.
    """
    header = repr(replace(delta, checksum=0)) + "".join(repr(more) for more in (delta.weights, delta.samples) if more)
    return words << 32 | zlib.crc32(header.encode())


@dataclass(frozen=True, slots=True)
class Held:
    """What a source that registers again still has: its first delta (`seq`) and the window that one belongs to.

    `whole` says that this is the window's first delta; if not, and the store does not know the source either, the
    source's share of the window is incomplete.
    """

    attempt: int
    seq: int
    window: int
    whole: bool


@dataclass(frozen=True, slots=True)
class Welcome:
    """The store's answer to a registration: the attempt's number, and the window that this rank is at."""

    attempt: int
    window: int = 0


@dataclass(frozen=True, slots=True)
class Ack:
    """The store's answer to a delta or a sign of life; it says what the store has of the source.

    Attributes:
        published: the attempt's final windows.
        merged: whether this delta was merged now; False for a repeated one.
        finished: whether the run has ended, or ends.
        refused: (layer index, features) of layers that have this width elsewhere in the run, and whose rows were
            left out.
        next_seq: the store has every delta of the source before this one.
        above: the ones that it has beyond that.
        durable: a restarted store will have every delta before this one.
        saved: a restarted store will have all that this store has of the source.
        left: the store has taken note that the source left.
        busy: not taken now; to be offered again later.
        late: left out, because nobody waits for its window any more.
    """

    published: int
    merged: bool = True
    finished: bool = False
    refused: tuple[tuple[int, int], ...] = ()
    next_seq: int = 0
    above: tuple[int, ...] = ()
    durable: int = 0
    saved: bool = True
    left: bool = False
    busy: bool = False
    late: bool = False


MOST_MISSING = 32
"""Ranks that are named where ranks are missing."""


def ranks_text(ranks: Sequence[int]) -> str:
    """Ranks in words, the first of many.

    >>> ranks_text([0, 5]), ranks_text(range(40)).endswith("30, 31] and others")
    ('[0, 5]', True)
    """
    return f"{list(ranks[:MOST_MISSING])}{' and others' if len(ranks) > MOST_MISSING else ''}"


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the current attempt is published, and who keeps the next window open.

    `missing` are the first `MOST_MISSING` of these ranks, and one more where there are more: every rank asks.
    """

    published: int
    finished: bool
    missing: tuple[int, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    problems: tuple[str, ...] = ()


def moments_size(features: int, columns: int = 0) -> int:
    """Length of the mean and packed scatter of a layer in a delta's buffer; `columns` are those of a sketch."""
    return features + packed_size(features, columns)


class Store(Protocol):
    """A store as a worker sees it, in the same process or behind a Ray actor.

    Every method may raise `StoreError`; a store behind an actor raises it after its deadline, too.
    """

    def settings(self) -> StoreConfig:
        """How the run is published."""

    def register(
        self, source: Source, config: StoreConfig, layers: Sequence[LayerInfo], held: Held | None = None
    ) -> Welcome:
        """Join the run, or, with `held`, join it again; raises RegistrationError when the worker does not fit it."""

    def take(self, delta: Delta, buffer: F64) -> Ack:
        """Merge a delta once, in whatever order; a repeated one is acknowledged and left out. Raises DeltaRefused."""

    def take_bundle(self, bundle: Bundle, buffer: F64) -> tuple[Ack | None, ...]:
        """Merge deltas that were merged with each other, all of them or none; an answer for each.

        None says that the delta is to be offered by itself: not all of them were new, or one does not fit. Raises
        DeltaRefused for what is no bundle.
        """

    def heartbeat(self, source: Source, outbox: Mapping[str, int] | None = None) -> Ack:
        """Say that the source is alive, and what waits in its outbox, for `status`.

        Raises UnknownSource where the store does not know it.
        """

    def progress(self, timeout: float = 60.0) -> Progress:
        """How far publication is, with the latest metrics; the answer comes within `timeout` seconds."""

    def leave(self, source: Source, *, completed: bool, sent: int, timeout: float) -> Ack:
        """Deregister, within `timeout` seconds, once the store has all `sent` deltas; may be repeated.

        After the last to complete the store publishes the rest and ends.
        """

    def flush(self, timeout: float) -> bool:
        """Publish what has arrived, open windows as live rows, and wait until it is written; False if not in time."""

    def wait_finished(self, timeout: float) -> bool:
        """Wait until everything is published and written after the last `leave`."""

    def end(self, source: Source) -> None:
        """Release the store, once nobody else waits for its last answer; called by every source once it has that."""

    def abandon(self) -> bool:
        """End the store if nobody has ever joined it, and say whether it has ended; called by who started it."""

    def status(self) -> dict[str, Any]:
        """Ranks, windows, memory and writers, for people."""
