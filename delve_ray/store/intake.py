"""How a store takes deltas in: each once, whole or not at all, by itself or merged with others.

Moments are merged under a lock per layer, deltas of one source one after the other; the bookkeeping is under the
store's one lock, see `saved`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from delve_ray.errors import DeltaRefused, StoreError, UnknownSource
from delve_ray.moments import F64
from delve_ray.store.attempt import AHEAD, Attempt, Member, check_late
from delve_ray.store.door import check_bundle, check_delta, check_total, refusal, source_of
from delve_ray.store.merging import merge_into
from delve_ray.store.metrics import MOST_ALONG, Metrics
from delve_ray.store.protocol import Ack, Bundle, Delta, Source
from delve_ray.store.window import Entry, Window
from delve_ray.store.windows import WindowStore

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Place:
    """Where admitted moments go: an entry for each of theirs, None for those of layers that are refused."""

    entries: list[Entry | None]
    refused: dict[int, int]


@contextmanager
def _holding(members: Sequence[Member]) -> Iterator[None]:
    """With the locks of members, taken in one order everywhere."""
    with ExitStack() as locks:
        for member in sorted(members, key=lambda member: member.source.rank):
            locks.enter_context(member.lock)
        yield


class IntakeStore(WindowStore):
    """The windows of a run, and the deltas of its workers; `CovarianceStore` adds who takes part, and the answers."""

    def _find(self, source: Source) -> tuple[Attempt, Member]:
        for attempt in reversed(self.attempts):
            member = attempt.members.get(source.rank)
            if member is not None and member.source == source:
                return attempt, member
        number = self.tokens.index(source.token) if source.token in self.tokens else None
        who = f"rank {source.rank} (pid {source.pid} on {source.host}) of run {self.config.run!r}"
        if number is not None and number < len(self.tokens) - 1:
            raise DeltaRefused(f"{who} belongs to attempt {number}, and attempt {len(self.tokens) - 1} has begun")
        if number is not None and (member := self.attempts[-1].members.get(source.rank)) is not None:
            raise DeltaRefused(f"{who} has been replaced by pid {member.source.pid} on {member.source.host}")
        raise UnknownSource(f"{who} is not registered; the store was started anew")

    def _ack(self, attempt: Attempt, member: Member, **more: Any) -> Ack:
        durable, saved = member.next_seq, True
        if self.saver is not None:
            durable, saved = self.saver.durable(member.source.source), self.saver.saved_version >= member.changed
        return Ack(
            attempt.published,
            finished=self.ending is not None,
            next_seq=member.next_seq,
            above=tuple(sorted(member.above)),
            durable=durable,
            saved=saved,
            left=member.left,
            metrics=self._news(attempt, member),
            **more,
        )

    def _news(self, attempt: Attempt, member: Member) -> Metrics | None:
        """The metrics, in the first answer to a member after a window was published.

        A call of its own, of every rank for every window, would cost the store as much as the rank's delta does.
        """
        if member.told == attempt.published:
            return None
        member.told = attempt.published
        metrics = self.running().metrics()
        return metrics if len(metrics) <= MOST_ALONG else None

    # --- deltas ----------------------------------------------------------------------------------------------

    def take(self, delta: Delta, buffer: F64) -> Ack:
        """Merge a delta once. See `protocol.Store.take`."""
        with self._counting_refusals():
            members = self._hear([source_of(delta, self.config.run)])
            widths = check_delta(delta, buffer, self.config.run, self.layers, self.config.sketching)
            with _holding(members):
                place = self._loaded(lambda: self._admit(delta, widths))
                if isinstance(place, Ack):
                    return place
                (ack,) = self._merge((delta,), delta, buffer, widths, place)
                return ack or self._ack(*self._find(delta.source))

    def take_bundle(self, bundle: Bundle, buffer: F64) -> tuple[Ack | None, ...]:
        """Merge deltas that were merged with each other, all or none. See `protocol.Store.take_bundle`."""
        with self._counting_refusals():
            widths = check_bundle(bundle, buffer, self.config.run, self.layers, self.config.sketching)
        try:
            members = self._hear([header.source for header in bundle.headers])
        except (DeltaRefused, UnknownSource):  # whose it is, each hears by itself
            return (None,) * len(bundle.headers)
        with _holding(members):
            place = self._loaded(lambda: self._admit_bundle(bundle, widths))
            if isinstance(place, tuple):
                return place
            acks = self._merge(bundle.headers, bundle.total, buffer, widths, place)
            with self._lock:
                self.counts["bundles"] += 1
                self.counts["bundled"] += len(bundle.headers)
            return acks

    @contextmanager
    def _counting_refusals(self) -> Iterator[None]:
        try:
            yield
        except DeltaRefused:
            with self._lock:
                self.counts["refused"] += 1
            raise

    def _hear(self, sources: Sequence[Source]) -> list[Member]:
        """The members that sources are, all of which have just been heard of."""
        with self._lock:
            members = [self._find(source)[1] for source in sources]
            for member in members:
                member.heard = time.monotonic()
            return members

    def _loaded(self, admit: Callable[[], T | Window | _Place]) -> T | _Place:
        """What `admit` says, once the window that it may ask for is loaded."""
        while True:
            with self._lock:
                admitted = admit()
            if not isinstance(admitted, Window):
                return admitted
            self.unpark(admitted)  # outside of the lock: it reads a file

    def _merge(
        self, headers: Sequence[Delta], total: Delta, buffer: F64, widths: Sequence[int], place: _Place
    ) -> tuple[Ack | None, ...]:
        """Merge what was admitted, and note the deltas that it is made of."""
        began = time.perf_counter()
        try:
            merge_into(place.entries, total, buffer, widths, self.config.rows_to_embed, self.config.sketching)
        except BaseException:  # nothing that is foreseen; but nobody shall wait for it
            with self._lock:
                self._merging -= 1
                self._changed.notify_all()
            raise
        self.timings.note("merge", time.perf_counter() - began)
        with self._lock:
            self.counts["deltas"] += len(headers)
            self.counts["bytes"] += buffer.nbytes
            return self._merged(headers, place.refused)

    def _admit(self, delta: Delta, widths: Sequence[int]) -> Ack | Window | _Place:
        """Whether a delta may be merged now: an answer, a window that has to be loaded first, or where it goes."""
        self._wait_for_cut()
        found = self._locate(delta)
        if isinstance(found, Ack):
            return found
        attempt, member, window = found
        return self._leave_out(delta, attempt, member) if window is None else self._reserve(delta, widths, *found)

    def _admit_bundle(self, bundle: Bundle, widths: Sequence[int]) -> tuple[Ack | None, ...] | Window | _Place:
        """The same for a bundle, which is admitted if each of its deltas would be merged, whole."""
        self._wait_for_cut()
        answers: list[Ack | None] = []
        places = []
        for header in bundle.headers:
            found: Ack | tuple[Attempt, Member, Window | None] | None = None
            with suppress(DeltaRefused, StoreError):  # by itself it hears why
                found = self._locate(header)
            answers.append(found if isinstance(found, Ack) else None)
            if isinstance(found, tuple) and found[2] is not None:
                places.append(found)
        steps = {header.step for header in bundle.headers if header.labelled}
        if len(places) == len(answers) and len(steps) <= 1:
            attempt = places[0][0]
            if all(attempt.widths.get(layer, d) == d for layer, d in bundle.total.widths):
                with suppress(DeltaRefused):
                    return self._reserve(bundle.total, widths, *places[0])
        return tuple(answers)

    def _wait_for_cut(self) -> None:
        while self._freezing:
            self._changed.wait()

    def _locate(self, delta: Delta) -> Ack | tuple[Attempt, Member, Window | None]:
        """The answer to a delta that is not to be merged now, or its window, None if that is settled.

        Changes nothing.
        """
        attempt, member = self._find(delta.source)
        if member.has(delta.seq):
            self.counts["repeated"] += 1
            return self._ack(attempt, member, merged=False)
        if delta.attempt != attempt.number:
            raise refusal(delta, f"the run is at attempt {attempt.number}")
        if self.ending is not None:
            raise StoreError(f"run {self.config.run!r} has ended and takes no more rows", final=True)
        member.check_window(delta)
        late = attempt is not self.attempts[-1]
        if delta.seq >= member.next_seq + AHEAD or (late and not check_late(delta, attempt, self.attempts[-1])):
            return self._ack(attempt, member, merged=False, busy=True)
        return attempt, member, attempt.window(delta)

    def _reserve(
        self, delta: Delta, widths: Sequence[int], attempt: Attempt, member: Member, window: Window | None
    ) -> Window | _Place:
        """Take the room that a delta's moments need in its window."""
        assert window is not None
        if window.parked is not None:
            return window
        # Rows of another width than elsewhere cost their layer, not all that came with it.
        refused = {i: attempt.widths[i] for i, d in delta.widths if attempt.widths.get(i, d) != d}
        entries: list[Entry | None] = []
        for (layer, phase, n, nonfinite), d in zip(delta.entries, widths, strict=True):
            entry = None if layer in refused else window.entries.get((layer, phase))
            if entry is None and layer not in refused:
                entry = Entry(d, columns=self.config.sketching.columns(d))
            if entry is not None:
                check_total(delta, self.layers[layer].name, entry.n, n)
                check_total(delta, self.layers[layer].name, entry.nonfinite, nonfinite)
                entry.reserve()
            entries.append(entry)
        # Nothing below fails: what is refused above has changed nothing.
        if attempt.windows.setdefault(delta.window, window).version == 0:  # it is new
            window.revision = max(window.revision, self.next_revision(attempt.number, window.ordinal))
        attempt.widths = dict(delta.widths) | attempt.widths
        for (layer, phase, *_), entry in zip(delta.entries, entries, strict=True):
            if entry is not None:
                window.entries[layer, phase] = entry
        window.version += 1  # so that it is not parked while this delta is merged
        self._merging += 1
        return _Place(entries, refused)

    def _leave_out(self, delta: Delta, attempt: Attempt, member: Member) -> Ack:
        """Nobody waits for the window any more: the delta counts as taken, and its rows are lost, with a word."""
        attempt.note(delta, member, None, time.monotonic())
        self._touch(member)
        self.counts["late"] += 1
        self._take_scalars(delta)
        return self._ack(attempt, member, merged=False, late=bool(delta.entries))

    def _merged(self, headers: Sequence[Delta], refused: Mapping[int, int]) -> tuple[Ack | None, ...]:
        """Note that deltas of one attempt are merged, all of them; None for a source that was replaced meanwhile."""
        self._merging -= 1
        self._changed.notify_all()
        noted: list[tuple[Attempt, Member] | None] = []
        for header in headers:
            try:
                attempt, member = self._find(header.source)
            except (DeltaRefused, UnknownSource):
                noted.append(None)
                continue
            attempt.note(header, member, attempt.windows.get(header.window), time.monotonic())
            self._touch(member)
            self._take_scalars(header)
            noted.append((attempt, member))
        self.counts["refused"] += bool(refused)
        for attempt in {found[0].number: found[0] for found in noted if found}.values():
            self._advance(attempt)
        if any(header.closes for header in headers) and self.saver is not None:
            self.saver.soon()
        return tuple(found and self._ack(*found, refused=tuple(refused.items())) for found in noted)

    def _take_scalars(self, delta: Delta) -> None:
        if delta.scalars:
            key = (delta.source.source, delta.seq)
            self._scalars[key] = tuple(
                replace(s, run=self.config.run, trial=self.config.trial, attempt=delta.attempt) for s in delta.scalars
            )
            self._write_scalars(key)
