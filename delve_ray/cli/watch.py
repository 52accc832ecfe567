"""`delve-ray status --watch`: how a store is, again and again, until its run ends."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from delve_ray.cli import status
from delve_ray.cli.board import board, state_line
from delve_ray.cli.output import fail, json_line
from delve_ray.errors import OptionError, StoreError
from delve_ray.storage import masked

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True, slots=True)
class Seen:
    """One look at a run.

    Attributes:
        name: the run.
        content: what run.json says; empty where it is not to be read from here.
        state: the store's status; None where it has not answered.
        trouble: why not.
        gone: whether the cluster has no such store.
    """

    name: str
    content: Mapping[str, Any]
    state: Mapping[str, Any] | None
    trouble: str | None = None
    gone: bool = False

    @property
    def ended(self) -> bool:
        """Whether the run has ended, and everything is written."""
        return bool(self.state.get("finished")) if self.state is not None else bool(self.content.get("end"))


Draw = Callable[[Seen, Seen | None], None]
"""Shows a look, beside the last one in which the store has answered."""


def watch_status(run: str, address: str | None, as_json: bool, every: float) -> int:
    """Show how a run's store is every `every` seconds; 0 once the run has ended, or on Ctrl-C."""
    if not (math.isfinite(every) and every > 0):
        raise OptionError(f"--interval {every}: expected seconds above 0")
    content = status.run_json(run)
    name = str(content.get("run", run)) if content else run
    if not address or content.get("end"):
        if not content:
            raise status.nothing_there(run, None)
        if not content.get("end"):
            raise OptionError(f"--watch asks the store of run {name!r} itself; give --address or set RAY_ADDRESS")
        return status.show_status(run, None, as_json)
    with status.cluster(address) as answer, _drawing(as_json) as draw:
        return follow(lambda: look(run, name, answer), draw, every)


def look(run: str, name: str, answer: Callable[[Any], Any]) -> Seen:
    """Ask the store of a run; where there is none any more, run.json."""
    shown = masked(name)
    try:
        return Seen(shown, {}, status.ask(name, answer))
    except status.NoStore as error:
        return Seen(shown, status.run_json(run), None, masked(str(error)), gone=True)
    except StoreError as error:
        return Seen(shown, {}, None, masked(str(error)))


def follow(ask: Callable[[], Seen], draw: Draw, every: float, wait: Callable[[float], None] = time.sleep) -> int:
    """Draw look after look until the run has ended; the exit code.

    A store that does not answer is asked again, for as long as the cluster has it: it may be being started anew. One
    that is gone has ended its run, unless a run.json that can be read says otherwise. On Ctrl-C what is shown stays.
    """
    last: Seen | None = None
    try:
        while True:
            seen = ask()
            draw(seen, last)
            if seen.ended:
                return 0
            if seen.gone:
                return _without_store(seen, last)
            last = seen if seen.state is not None else last
            wait(every)
    except KeyboardInterrupt:
        return 0


def _without_store(seen: Seen, last: Seen | None) -> int:
    if seen.content:  # which does not say that the run has ended
        return fail(f"{seen.trouble}, and run.json does not say that the run has ended: its store was lost or killed")
    if last is None:
        return fail(str(status.nothing_there(seen.name, seen.trouble)))
    return 0


@contextmanager
def _drawing(as_json: bool) -> Iterator[Draw]:
    """What shows looks on stdout: in place on a terminal, otherwise on one line each."""
    if as_json:
        yield lambda seen, _: print(looked_json(seen), flush=True)
    elif sys.stdout.isatty():
        from rich.console import Console

        with in_place(Console(highlight=False, markup=False, emoji=False)) as draw:
            yield draw
    else:
        yield lambda seen, _: print(f"{_now()} {looked_line(seen)}", flush=True)


def looked_json(seen: Seen) -> str:
    """A look as the object of `status --json`, with its time, and why the store has not answered."""
    return json_line({"time": _now(), "trouble": seen.trouble} | status.summary(seen.name, seen.content, seen.state))


def looked_line(seen: Seen) -> str:
    """A look on one line."""
    if seen.state is not None:
        return state_line(seen.state)
    return "; ".join(status.described_run(seen.name, seen.content, seen.trouble) if seen.content else _words(seen))


def _words(seen: Seen) -> list[str]:
    """What there is to say of a store that has not answered."""
    from delve_ray.analysis.table import printable

    return [f"run {printable(seen.name)}: {printable(' '.join(str(seen.trouble).split()))}"]


@contextmanager
def in_place(console: Console) -> Iterator[Draw]:
    """What shows looks one over the other; the last one stays."""
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    with Live(console=console, auto_refresh=False, redirect_stderr=False, redirect_stdout=False) as live:

        def draw(seen: Seen, last: Seen | None) -> None:
            state = seen.state if seen.state is not None or last is None else last.state
            parts: list[Any] = [] if state is None else [board(state)]
            if seen.state is None:
                words = status.described_run(seen.name, seen.content, seen.trouble) if seen.content else _words(seen)
                style = "bold" if seen.ended else "yellow"
                words += ["this is how it was when it last answered"] if state is not None and not seen.gone else []
                parts += [Text(word, style=style) for word in words]
            live.update(Group(*parts), refresh=True)

        yield draw


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
