"""What a store has of a source, in whatever order its deltas come."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from delve_ray.errors import DeltaRefused
from delve_ray.store.attempt import Attempt, Member, check_late
from delve_ray.store.protocol import Delta
from delve_ray.store.window import Window
from tests.stores import source


def sequence(closes: list[bool]) -> list[Delta]:
    """The deltas of a source of which these close a window."""
    deltas, window = [], 0
    for seq, closing in enumerate(closes):
        deltas.append(Delta(source(0), 0, seq, window, window, closing, closing, ()))
        window += closing
    return deltas


@given(closes=st.lists(st.booleans(), min_size=1, max_size=12), data=st.data())
def test_any_order_closes_the_same_windows_in_order(closes: list[bool], data: st.DataObject) -> None:
    deltas = sequence(closes)
    member, closed = Member(source(0)), []
    taken: set[int] = set()
    for delta in data.draw(st.permutations(deltas)):
        assert not member.has(delta.seq)
        member.check_window(delta)
        newly = member.merged(delta)
        closed += newly
        taken.add(delta.seq)
        assert member.has(delta.seq)
        missing = [seq for seq in range(len(deltas) + 1) if seq not in taken]
        assert member.next_seq == missing[0]
        assert member.above == {seq for seq in taken if seq > missing[0]}
        assert closed == [d.window for d in deltas[: missing[0]] if d.closes], "only what has all before it is closed"
    assert (member.next_window, member.closing, member.above) == (sum(closes), {}, set())


@given(closes=st.lists(st.booleans(), min_size=2, max_size=10), data=st.data())
def test_a_window_that_contradicts_what_is_known_is_refused(closes: list[bool], data: st.DataObject) -> None:
    """A delta of another window is only taken where some sequence of deltas would have it there."""
    deltas = sequence(closes)
    known = data.draw(st.sets(st.sampled_from(range(len(deltas))), max_size=len(deltas) - 1))
    member = Member(source(0))
    for seq in sorted(known):
        member.merged(deltas[seq])
    seq = data.draw(st.sampled_from([s for s in range(len(deltas)) if s not in known]))
    window = data.draw(st.integers(-1, len(deltas) + 1))
    before = [deltas[s] for s in sorted(known) if s < seq]
    after = [deltas[s] for s in sorted(known) if s > seq]
    # Each unknown delta in between may have closed a window.
    first = max((d.window + d.closes for d in before if d.closes), default=0)
    first = max(first, member.next_window)
    last = member.next_window + seq - member.next_seq
    last = min([last, *(d.window for d in after if d.closes)])
    changed = Delta(source(0), 0, seq, window, 0, False, False, ())
    if first <= window <= last:
        member.check_window(changed)
    else:
        with pytest.raises(DeltaRefused, match=f"it is of window {window} while"):
            member.check_window(changed)


def attempts(first_step: int | None) -> tuple[Attempt, Attempt]:
    """The attempt before, with steps 3 (closed by a rank) and 4 (open), and the current one."""
    windows = {3: Window(3, 3, labelled=True, closed={0}), 4: Window(4, 4)}
    return Attempt(0, "a", 2, windows=windows), Attempt(1, "b", 2, first_step=first_step)


@pytest.mark.parametrize(
    ("first_step", "window", "taken"),
    [(4, 3, True), (3, 3, None), (2, 3, None), (9, 4, None), (9, 7, None), (None, 3, False), (None, 4, False)],
)
def test_a_late_delta_counts_only_before_the_step_that_is_replayed(
    first_step: int | None, window: int, taken: bool | None
) -> None:
    before, current = attempts(first_step)
    delta = Delta(source(1), 0, 5, window, window, True, True, ())
    if taken is None:
        with pytest.raises(DeltaRefused, match=f"attempt 0, and attempt 1 replays from step {first_step}"):
            check_late(delta, before, current)
    else:
        assert check_late(delta, before, current) is taken


def registered(world_size: int) -> Attempt:
    attempt = Attempt(0, "", world_size)
    for rank in range(world_size):
        attempt.admit(Member(source(rank)))
    return attempt


@settings(deadline=None)
@given(data=st.data(), world_size=st.integers(1, 8))
def test_whether_a_window_is_awaited_is_whether_anybody_is(data: st.DataObject, world_size: int) -> None:
    """Whatever happened to the rank that was last seen to be awaited."""
    attempt, window = registered(world_size), Window(0, 0)
    ranks = st.integers(0, world_size - 1)
    for _ in range(data.draw(st.integers(1, 20))):
        what, rank = (
            data.draw(st.sampled_from(["closes", "leaves", "is silent", "is heard", "is replaced"])),
            data.draw(ranks),
        )
        if what == "closes":
            window.closed.add(rank)
        elif what == "leaves":
            attempt.leave(attempt.members[rank])
        elif what == "is replaced":
            attempt.admit(Member(source(rank, name="another")))
        else:
            attempt.members[rank].heard = -10.0 if what == "is silent" else 10.0
        for silent_before in (float("-inf"), 0.0):
            assert attempt.is_awaited(window, silent_before) == bool(attempt.awaited(window, silent_before))
        assert attempt.left == {rank for rank, member in attempt.members.items() if member.left}
        for most in (0, 1, 3):
            assert attempt.first_missing(0, most) == attempt.missing(0)[:most]


@pytest.mark.parametrize("order", ["ascending", "descending", "shuffled"])
def test_all_closes_of_a_window_look_at_all_ranks_a_few_times(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In expectation 1 + 1/2 + … + 1/n times, 7.5 for 1,024 ranks; not once for each close."""
    ranks = list(range(1024))
    if order == "shuffled":
        random.Random(1).shuffle(ranks)
    attempt, window = registered(1024), Window(0, 0)
    looks = 0
    awaited = Attempt.awaited

    def counted(*args: Any) -> set[int]:
        nonlocal looks
        looks += 1
        return awaited(*args)

    monkeypatch.setattr(Attempt, "awaited", counted)
    for rank in ranks if order != "descending" else reversed(ranks):
        assert attempt.is_awaited(window, float("-inf"))
        window.closed.add(rank)
    assert not attempt.is_awaited(window, float("-inf"))
    assert looks < 64
