"""A store's status as tables for a terminal, and as one line for what is none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from delve_ray.analysis.table import printable
from delve_ray.cli.status import mib, problems, total

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

MOST_RANKS = 16
"""Ranks that are shown: those that are furthest behind, then those that have been silent longest."""
MOST_MISSING = 8
"""Ranks that are named where a window waits for more."""


def board(state: Mapping[str, Any]) -> RenderableType:
    """Everything that a store says of itself: ranks, windows, memory, writers, shards, snapshots, problems."""
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = [Text(line, style="bold" if not at else "") for at, line in enumerate(_head(state))]
    tables = (_windows(state), _ranks(state), _writers(state), _shards(state))
    for table in tables:
        if table is not None:
            parts += ["", table]
    if "snapshots" in state:
        parts += ["", Text(_snapshots(state["snapshots"]))]
    parts += [Text(f"problem: {printable(str(problem))}", style="yellow") for problem in state.get("problems", [])]
    return Group(*parts)


def state_line(state: Mapping[str, Any]) -> str:
    """The same on one line: of the ranks the one that is furthest behind, of the windows the oldest open one."""
    parts = [f"run {printable(str(state.get('run')))}: {_word(state)}", f"{state.get('published', 0)} published"]
    parts.append(f"{len(state.get('open_windows', []))} open")
    if windows := state.get("windows", []):
        oldest, waits = windows[0], _seconds(windows[0]["waits_s"])
        parts.append(f"window {oldest['window']} waits {waits} for {_named(oldest['missing'])}")
    ranks = state.get("ranks", {})
    parts.append(f"{len(ranks)} of {state.get('world_size')} ranks")
    if ranks:
        number, rank = _furthest_behind(ranks)[0]
        parts.append(f"rank {number} is {rank.get('lag', 0)} behind, heard {_seconds(rank.get('silent_s', 0.0))} ago")
    outboxes = [rank.get("outbox") or {} for rank in ranks.values()]
    waiting = [sum(box.get(key, 0) for box in outboxes) for key in ("memory_bytes", "disk_bytes")]
    parts.append(f"outboxes {mib(waiting[0])} in memory, {mib(waiting[1])} on disk")
    parts.append(f"store {mib(total(state, 'bytes'))}")
    for writer in state.get("writers", []):
        error = f" ({_clean(writer['last_error'])})" if writer.get("last_error") else ""
        behind = f"is {writer.get('queued', 0)} behind, gave up {_given_up(writer)}"
        parts.append(f"{printable(str(writer.get('name')))} {behind}{error}")
    parts += [f"problem: {_clean(problem)}" for problem in problems(state)]
    return "; ".join(parts)


def _word(state: Mapping[str, Any]) -> str:
    if state.get("finished"):
        return "has finished"
    return f"ends ({printable(str(state['ending']))})" if state.get("ending") else "runs"


def _head(state: Mapping[str, Any]) -> list[str]:
    ranks = state.get("ranks", {})
    left = sum(bool(rank.get("left")) for rank in ranks.values())
    counts = f"{state.get('published', 0)} published, {len(state.get('open_windows', []))} open"
    arrived = f"{state.get('deltas', 0)} deltas merged, {mib(total(state, 'bytes_in'))}"
    out = ", ".join(f"{state.get(name, 0)} {name}" for name in ("refused", "repeated", "late"))
    return [
        f"run {printable(str(state.get('run')))}: {_word(state)}",
        f"savefile {printable(str(state.get('savefile')))}",
        f"attempt {state.get('attempt')}; {len(ranks)} of {state.get('world_size')} ranks have joined, {left} left",
        f"windows: {counts}, {state.get('waiting_windows', 0)} wait for writers or late ranks, "
        f"{state.get('parked_windows', 0)} in files",
        f"memory: {mib(total(state, 'bytes'))} of moments; {arrived}; {out}",
    ]


def _windows(state: Mapping[str, Any]) -> Table | None:
    windows = state.get("windows", [])
    if not windows:
        return None
    table = _table("window", "step", "open for", "without ranks")
    for window in windows:
        waits = _seconds(window["waits_s"]) if window["waits_s"] else "-"
        table.add_row(str(window["window"]), str(window["step"]), waits, _named(window["missing"]))
    if (more := len(state.get("open_windows", [])) - len(windows)) > 0:
        table.add_row("", "", "", f"and {more} more windows")
    return table


def _ranks(state: Mapping[str, Any]) -> Table | None:
    ranks = _furthest_behind(state.get("ranks", {}))
    if not ranks:
        return None
    table = _table("rank", "behind", "window", "deltas", "heard", "in memory", "on disk", "lost", "process")
    for number, rank in sorted(ranks[:MOST_RANKS], key=lambda item: int(item[0])):
        box = rank.get("outbox") or {}
        process = f"{rank.get('host')}:{rank.get('pid')}"
        table.add_row(
            *(str(number), str(rank.get("lag", 0)), str(rank.get("window", 0)), str(rank.get("deltas", 0))),
            "has left" if rank.get("left") else f"{_seconds(rank.get('silent_s', 0.0))} ago",
            *(mib(box.get("memory_bytes", 0)), mib(box.get("disk_bytes", 0)), str(box.get("lost", 0))),
            printable(process),
            style="yellow" if rank.get("lag", 0) > 1 else "",
        )
    if (more := len(ranks) - MOST_RANKS) > 0:
        table.add_row("", "", "", "", "", "", "", "", f"and {more} more, none further behind")
    return table


def _writers(state: Mapping[str, Any]) -> Table | None:
    writers = state.get("writers", [])
    if not writers:
        return None
    table = _table("writer", "written", "behind by", "", "fails for", "given up", "last error")
    for writer in writers:
        error = writer.get("last_error")
        table.add_row(
            *(printable(str(writer.get("name"))), str(writer.get("written", 0)), str(writer.get("queued", 0))),
            mib(writer.get("queued_bytes", 0)),
            _seconds(writer["waiting_s"]) if writer.get("waiting_s") else "-",
            str(_given_up(writer)),
            "-" if error is None else _clean(error),
            style="" if error is None else "yellow",
        )
    return table


def _shards(state: Mapping[str, Any]) -> Table | None:
    shards = state.get("shards", [])
    if not shards:
        return None
    table = _table("shard", "published", "open", "deltas", "memory", "problems")
    for number, shard in enumerate(shards):
        wrong = "; ".join(_clean(problem) for problem in shard.get("problems", [])) or "-"
        known = "run" in shard  # not of one that does not answer
        counts = [shard.get("published", 0), len(shard.get("open_windows", [])), shard.get("deltas", 0)]
        told = [*map(str, counts), mib(shard.get("bytes", 0))] if known else ["?"] * 4
        table.add_row(str(number), *told, wrong, style="" if wrong == "-" else "yellow")
    return table


def _snapshots(snapshots: Mapping[str, Any]) -> str:
    words = f"snapshots: {snapshots.get('written', 0)} written, {snapshots.get('failed', 0)} failed"
    words += f", the last one in {snapshots.get('seconds') or 0.0:.2f} s"
    words += ", one is due" if snapshots.get("pending") else ""
    error = snapshots.get("last_error")
    return words if error is None else f"{words}; last error: {_clean(error)}"


def _table(*columns: str) -> Table:
    from rich.table import Table

    table = Table(box=None, padding=(0, 1), pad_edge=False, header_style="bold")
    texts = ("without ranks", "process", "last error", "problems", "writer")
    for name in columns:
        is_text = name in texts
        table.add_column(name, justify="left" if is_text else "right", no_wrap=not is_text, overflow="fold")
    return table


def _furthest_behind(ranks: Mapping[Any, Mapping[str, Any]]) -> list[tuple[Any, Mapping[str, Any]]]:
    def key(item: tuple[Any, Mapping[str, Any]]) -> tuple[int, bool, float]:
        return -int(item[1].get("lag", 0)), bool(item[1].get("left")), -float(item[1].get("silent_s", 0.0))

    return sorted(ranks.items(), key=key)


def _given_up(writer: Mapping[str, Any]) -> int:
    return int(writer.get("failed", 0)) + int(writer.get("dropped", 0))


def _named(ranks: Sequence[int]) -> str:
    """Ranks by number, the first few of many.

    >>> _named([1, 3]), _named(range(20)), _named([])
    ('rank 1, 3', 'rank 0, 1, 2, 3, 4, 5, 6, 7 and 12 more', 'nobody')
    """
    if not ranks:
        return "nobody"
    more = f" and {len(ranks) - MOST_MISSING} more" if len(ranks) > MOST_MISSING else ""
    return f"rank {', '.join(map(str, ranks[:MOST_MISSING]))}{more}"


def _clean(text: object) -> str:
    return printable(" ".join(str(text).split()))


def _seconds(seconds: float) -> str:
    """A duration.

    >>> _seconds(3.21), _seconds(75), _seconds(7380)
    ('3.2 s', '1 min 15 s', '2 h 3 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
