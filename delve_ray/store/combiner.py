"""Merging before the wire: the workers of a node meet in a combiner, which sends the store one bundle for all of them.

The combiner is stateless but for the calls that wait in it. A worker's call returns when the store has answered, and
the worker keeps its delta as it does without, so nothing is lost with a combiner. A bundle is taken whole or not at
all; if not, each of its deltas is offered by itself, which is also how whatever is wrong with one comes out at its
worker. So a delta counts once, whichever ways it comes and however often.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from delve_ray.errors import DeltaRefused, StoreError, StoreLost, UnknownSource
from delve_ray.moments import F64
from delve_ray.sketch import WHOLE, SketchRule
from delve_ray.store.door import check_delta
from delve_ray.store.merging import combine
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
)

log = logging.getLogger(__name__)

COMBINE_S = 0.2
"""How long the first delta of a bundle waits for those of the node's other workers."""
COMBINE_BYTES = 512 << 20
"""Buffers of the deltas of one bundle; they lie in the node's object store meanwhile."""
MISSES = 3
"""Bundles in a row that went without a rank after which none waits for it, until it calls again."""
AGAIN_S = 5.0
"""How long a worker whose combiner did not answer sends straight to the store."""


@dataclass(slots=True, eq=False)
class _Call:
    """A worker's call: its delta, the width of each entry (None where it is to go by itself), and the answer."""

    delta: Delta
    buffer: F64
    widths: list[int] | None
    since: float
    answer: Ack | Exception | None = None

    @property
    def window(self) -> tuple[str, int, int]:
        """What deltas of one bundle share."""
        return self.delta.source.token, self.delta.attempt, self.delta.window

    @property
    def rank(self) -> tuple[str, int]:
        """Who called; a worker that replaces another has its rank."""
        return self.delta.source.token, self.delta.source.rank


class Combiner:
    """Collects the deltas of a node's workers into bundles; `take` is called by all of them at once.

    A bundle goes when every rank that is known from its calls waits here, when its first delta has waited `patience`
    seconds, or when one more would exceed `most_bytes`. While one is on its way the next gathers. The calling threads
    do the work, one at a time. `embed_rows` is the store's bound of a layer's sample of rows,
    `rule` its rule for sketches.
    """

    def __init__(
        self,
        store: Store,
        layers: Sequence[LayerInfo],
        embed_rows: int,
        rule: SketchRule = WHOLE,
        *,
        patience: float = COMBINE_S,
        most_bytes: int = COMBINE_BYTES,
    ) -> None:
        self.store = store
        self.layers = list(layers)
        self.embed_rows = embed_rows
        self.rule = rule
        self.patience = patience
        self.most_bytes = most_bytes
        self.called = time.monotonic()
        """When a worker called last."""
        self.counts = {"deltas": 0, "bundles": 0, "alone": 0, "saved_bytes": 0}
        """What came in, and what went out: bundles, deltas by themselves, and the bytes that bundles have spared."""
        self._waiting: list[_Call] = []
        self._on_the_way = 0
        self._missed: dict[tuple[str, int], int] = {}  # bundles that went without it, by rank
        self._changed = threading.Condition()

    @property
    def ranks(self) -> int:
        """Ranks that bundles wait for."""
        with self._changed:
            return len(self._missed)

    @property
    def idle(self) -> bool:
        """Whether no call waits for its answer."""
        return not self.waiting

    @property
    def waiting(self) -> int:
        """Calls that wait for their answers."""
        with self._changed:
            return len(self._waiting) + self._on_the_way

    def forget(self, source: Source) -> None:
        """A worker has left; nothing waits for it any more."""
        with self._changed:
            self._missed.pop((source.token, source.rank), None)
            self._changed.notify_all()

    def take(self, delta: Delta, buffer: F64) -> Ack:
        """The store's answer to a delta, see `protocol.Store.take`, whose errors are raised here."""
        try:
            widths = check_delta(delta, buffer, delta.source.run, self.layers, self.rule)
        except DeltaRefused:  # the store says what is wrong
            widths = None
        call = _Call(delta, buffer, widths, time.monotonic())
        with self._changed:
            self.called = call.since
            self.counts["deltas"] += 1
            self._missed[call.rank] = 0
            self._waiting.append(call)
            self._changed.notify_all()
        while True:
            with self._changed:
                if call.answer is not None:
                    break
                group = None if self._on_the_way else self._ripe(time.monotonic())
                if group is None:
                    self._changed.wait(self._pause(time.monotonic()))
                    continue
                self._take_out(group)
            try:
                self._send(group)
            finally:
                with self._changed:
                    for other in group:
                        other.answer = other.answer or StoreError("the combiner was interrupted")
                    self._on_the_way = 0
                    self._changed.notify_all()
        if isinstance(call.answer, Exception):
            raise call.answer
        return call.answer

    # --- which deltas go together, called with the lock ----------------------------------------------------------

    def _pause(self, now: float) -> float | None:
        """Seconds until something may be ripe by its age."""
        if self._on_the_way or not self._waiting:
            return None
        return max(0.001, self._waiting[0].since + self.patience - now)

    def _ripe(self, now: float) -> list[_Call] | None:
        """The calls of the next bundle, if it may go."""
        if not self._waiting:
            return None
        first = self._waiting[0]
        if first.widths is None:
            return [first]
        group, full = self._group(first)
        all_here = self._missed.keys() <= {call.rank for call in self._waiting}
        return group if full or all_here or now >= first.since + self.patience else None

    def _group(self, first: _Call) -> tuple[list[_Call], bool]:
        """The calls that go with one, of each rank the first, and whether there is no room for more."""
        group, nbytes, widths = [first], first.buffer.nbytes, dict(first.delta.widths)
        for call in self._waiting:
            if call.widths is None or call.window != first.window or call.rank in {other.rank for other in group}:
                continue
            if any(widths.get(layer, width) != width for layer, width in call.delta.widths):
                continue  # the store decides which of them it takes
            nbytes += call.buffer.nbytes
            if nbytes > self.most_bytes:
                return group, True
            group.append(call)
            widths |= dict(call.delta.widths)
        return group, False

    def _take_out(self, group: list[_Call]) -> None:
        there = {call.rank for call in self._waiting}
        for rank in [rank for rank in self._missed if rank not in there]:
            self._missed[rank] += 1
            if self._missed[rank] >= MISSES:
                del self._missed[rank]
        self._waiting = [call for call in self._waiting if call not in group]
        self._on_the_way = len(group)

    # --- on the way ------------------------------------------------------------------------------------------------

    def _send(self, group: Sequence[_Call]) -> None:
        """Get every call of a group its answer."""
        acks: Sequence[Ack | None] = [None] * len(group)
        try:
            if len(group) > 1:
                acks = self._send_bundle(group)
            for call, ack in zip(group, acks, strict=True):
                call.answer = ack or self._send_one(call)
        except Exception as error:  # the store is away: each of them tries again
            for call in group:
                call.answer = call.answer or error

    def _send_bundle(self, group: Sequence[_Call]) -> Sequence[Ack | None]:
        """The store's answers to a bundle, None for a delta that is to go by itself.

        Raises StoreError where the store does not answer, or fails: it is not known then what it has.
        """
        try:
            deltas = [(call.delta, call.buffer, call.widths or []) for call in group]
            bundle, buffer = combine(deltas, self.embed_rows, self.rule)
            acks = self.store.take_bundle(bundle, buffer)
            if any(ack is not None and ack.merged for ack in acks):
                with self._changed:
                    self.counts["bundles"] += 1
                    self.counts["saved_bytes"] += sum(call.buffer.nbytes for call in group) - buffer.nbytes
            return acks
        except DeltaRefused as error:
            log.warning("a bundle of %d deltas was not taken (%s); they are sent one by one", len(group), error)
            return [None] * len(group)

    def _send_one(self, call: _Call) -> Ack | Exception:
        with self._changed:
            self.counts["alone"] += 1
        try:
            return self.store.take(call.delta, call.buffer)
        except (DeltaRefused, UnknownSource) as error:  # of this one alone
            return error


class Link(Protocol):
    """A combiner as a worker reaches it, which may be gone at any time.

    `take` returns what the store has answered or raised; what it raises is the combiner's own trouble.
    """

    def take(self, delta: Delta, buffer: F64) -> Ack | Exception:
        """Offer a delta through the combiner."""

    def forget(self, source: Source) -> None:
        """Say that a worker has left; does not wait."""


class CombinedStore:
    """A store whose deltas go through the node's combiner: `protocol.Store`, all else goes to the store itself.

    `find` gives a link to the combiner, and starts one if need be. While there is none that answers, deltas go straight
    to the store, and after `AGAIN_S` the combiner is tried again.
    """

    def __init__(self, direct: Store, find: Callable[[], Link], *, again: float = AGAIN_S) -> None:
        self.direct = direct
        self._find = find
        self._again = again
        self._link: Link | None = None
        self._not_before = float("-inf")
        self._following: Callable[[int], tuple[Delta, F64] | None] = lambda seq: None

    @property
    def following(self) -> Callable[[int], tuple[Delta, F64] | None]:
        """See `remote.RemoteStore`: what is asked for the delta after one that is on its way."""
        return self._following

    @following.setter
    def following(self, following: Callable[[int], tuple[Delta, F64] | None]) -> None:
        self._following = following
        for store in (self.direct, self._link):
            if store is not None and hasattr(store, "following"):
                store.following = following

    def begin(self) -> None:
        """Find the combiner before there is something to deliver: those who watch then see it from its beginning."""
        try:
            self._link = self._find()
        except Exception as error:  # the first delta will look for it again
            log.debug("the combiner: %s", error)

    def take(self, delta: Delta, buffer: F64) -> Ack:
        """Merge a delta once, with those of the node's other workers where they are there at the same time."""
        answer = self._take_combined(delta, buffer)
        if answer is None or isinstance(answer, StoreLost):
            return self.direct.take(delta, buffer)  # an older store of this name may be the one that is lost
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _take_combined(self, delta: Delta, buffer: F64) -> Ack | Exception | None:
        """The answer that came through the combiner; None where none did."""
        if time.monotonic() < self._not_before:
            return None
        try:
            link = self._link  # `end` may take it away meanwhile
            if link is None:
                link = self._link = self._find()
                self.following = self._following
            answer = link.take(delta, buffer)
        except Exception as error:
            log.warning("the combiner of this node does not answer (%s); deltas go straight to the store", error)
            self._link, self._not_before = None, time.monotonic() + self._again
            return None
        if isinstance(answer, StoreLost):
            self._link, self._not_before = None, time.monotonic() + self._again
        return answer

    def take_bundle(self, bundle: Bundle, buffer: F64) -> tuple[Ack | None, ...]:
        """See `protocol.Store.take_bundle`."""
        return self.direct.take_bundle(bundle, buffer)

    def end(self, source: Source) -> None:
        """Release the combiner and the store."""
        link, self._link = self._link, None
        if link is not None:
            try:
                link.forget(source)
            except Exception as error:  # it ends by itself, too
                log.debug("the combiner: %s", error)
        self.direct.end(source)

    # --- straight to the store -------------------------------------------------------------------------------------

    def settings(self) -> StoreConfig:
        """See `protocol.Store.settings`."""
        return self.direct.settings()

    def register(
        self, source: Source, config: StoreConfig, layers: Sequence[LayerInfo], held: Held | None = None
    ) -> Welcome:
        """See `protocol.Store.register`."""
        return self.direct.register(source, config, layers, held)

    def heartbeat(self, source: Source, outbox: Mapping[str, int] | None = None) -> Ack:
        """See `protocol.Store.heartbeat`."""
        return self.direct.heartbeat(source, outbox)

    def progress(self, timeout: float = 60.0) -> Progress:
        """See `protocol.Store.progress`."""
        return self.direct.progress(timeout)

    def leave(self, source: Source, *, completed: bool, sent: int, timeout: float = 0.0) -> Ack:
        """See `protocol.Store.leave`."""
        return self.direct.leave(source, completed=completed, sent=sent, timeout=timeout)

    def flush(self, timeout: float) -> bool:
        """See `protocol.Store.flush`."""
        return self.direct.flush(timeout)

    def wait_finished(self, timeout: float) -> bool:
        """See `protocol.Store.wait_finished`."""
        return self.direct.wait_finished(timeout)

    def abandon(self) -> bool:
        """See `protocol.Store.abandon`."""
        return self.direct.abandon()

    def status(self) -> dict[str, Any]:
        """See `protocol.Store.status`."""
        return self.direct.status()
