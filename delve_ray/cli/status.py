"""`delve-ray status`: how a running store is, or how its run has ended."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from delve_ray.analysis.table import printable, shorten
from delve_ray.cli.output import described, fail, show, show_json, text_width
from delve_ray.errors import DelveRayError, OptionError, ReadError, StoreError
from delve_ray.storage import Storage, masked

ANSWER_S = 30.0
"""How long a store may take to answer."""
_STYLES = {r"^run .*": "bold", r"^problem: .*": "yellow"}


def show_status(run: str, address: str | None, as_json: bool) -> int:
    """Print what the store says, or else what run.json says; 2 where neither says anything."""
    content = run_json(run)
    name = str(content.get("run", run)) if content else run
    state: dict[str, Any] | None = None
    trouble: str | None = None
    if address:
        try:
            with cluster(address) as answer:
                state = ask(name, answer)
        except DelveRayError as error:
            trouble = str(error)
    if state is None and not content:
        raise nothing_there(run, trouble)
    if as_json:
        show_json([summary(name, content, state)])
    else:
        show("\n".join(_running(state) if state is not None else described_run(name, content, trouble)), _STYLES)
    # A run that has ended has no store any more, and that is no trouble.
    return fail(trouble) if trouble is not None and not content.get("end") else 0


class NoStore(StoreError):
    """A run has no store in the cluster: it has ended, or it is not of this cluster."""


def nothing_there(run: str, trouble: str | None) -> ReadError:
    """Neither run.json nor a store says anything."""
    why = trouble or "give --address or set RAY_ADDRESS to ask for the store of a run by its name"
    return ReadError(masked(f"{run}: no run.json there; {why}"))


def run_json(run: str) -> Mapping[str, Any]:
    """What run.json says; empty where there is none, or `run` is a name."""
    try:
        return described(Storage(run))
    except OptionError:
        return {}


def ask(name: str, answer: Callable[[Any], Any]) -> dict[str, Any]:
    """What the store of a run says. Raises StoreError: `NoStore` where there is none, others where none answers."""
    import delve_ray

    try:
        handle = delve_ray.get_store(name)
    except StoreError as error:
        raise NoStore(masked(str(error))) from error
    state: dict[str, Any] = answer(handle.status.remote())
    return state


@contextmanager
def cluster(address: str) -> Iterator[Callable[[Any], Any]]:
    """A connection to a Ray cluster, and what waits for an answer from it. Raises StoreError."""
    if address == "local":
        raise OptionError("--address local would start a new cluster, in which there is no store; give the run's")
    try:
        import ray
    except ImportError as error:
        raise StoreError(f"Ray is not installed ({error})") from error
    here = ray.is_initialized()
    try:
        if not here:
            ray.init(address, logging_level=logging.ERROR, log_to_driver=False, configure_logging=False)
    except Exception as error:  # ConnectionError, ValueError, RuntimeError, by Ray's version and by what is wrong
        raise StoreError(f"no Ray cluster answers at {address} ({' '.join(str(error).split())})") from error

    def answer(reference: Any) -> Any:
        try:
            return ray.get(reference, timeout=ANSWER_S)
        except Exception as error:
            cause = getattr(error, "cause", None)  # what the store itself has raised
            why = cause if isinstance(cause, DelveRayError) else type(error).__name__
            raise StoreError(f"the store does not answer ({why})") from error

    try:
        yield answer
    finally:
        if not here:
            ray.shutdown()


def summary(name: str, content: Mapping[str, Any], state: Mapping[str, Any] | None) -> dict[str, Any]:
    """One object of --json."""
    name = masked(name)
    options = content.get("options") or {}
    return {
        "run": name,
        "savefile": options.get("savefile") if state is None else state.get("savefile"),
        "running": state is not None and not state.get("finished", False),
        "created": content.get("created"),
        "world_size": content.get("world_size") if state is None else state.get("world_size"),
        "attempts": content.get("attempts", []),
        "end": content.get("end"),
        "store": state,
    }


def described_run(name: str, content: Mapping[str, Any], trouble: str | None) -> list[str]:
    """What run.json says."""
    attempts, end = content.get("attempts") or [], content.get("end")
    many = "1 attempt" if len(attempts) == 1 else f"{len(attempts)} attempts"
    lines = [
        f"run {printable(name)}: {'has ended' if end else 'has not ended, as far as run.json says'}",
        f"began {content.get('created', 'at an unknown time')}, world size {content.get('world_size', '?')}, {many}",
    ]
    if end:
        lines.append(f"ended {end.get('time')}: {printable(str(end.get('why')))}")
        lines += [f"problem: {printable(str(problem))}" for problem in end.get("problems") or []]
    elif trouble is None:
        lines.append("--address or RAY_ADDRESS of its Ray cluster asks the store itself")
    return lines


def _running(state: Mapping[str, Any]) -> list[str]:
    """What a store says of itself."""
    ranks, windows = state.get("ranks", {}), state.get("open_windows", [])
    left = sum(bool(rank.get("left")) for rank in ranks.values())
    joined = f"{len(ranks)} of {state.get('world_size')} ranks have joined, {left} have left"
    word = "has finished" if state.get("finished") else f"ends ({state['ending']})" if state.get("ending") else "runs"
    lines = [
        f"run {printable(str(state.get('run')))}: {word}",
        f"savefile {printable(str(state.get('savefile')))}",
        f"attempt {state.get('attempt')}; {joined}",
        f"windows: {state.get('published', 0)} published, {len(windows)} open; {mib(total(state, 'bytes'))} in memory",
    ]
    if ranks:
        lines += ["", f"{'rank':>4} {'window':>7} {'deltas':>7} {'silent':>8}  process"]
    for number, rank in ranks.items():
        process = f"{rank.get('host')}:{rank.get('pid')}{'  has left' if rank.get('left') else ''}"
        silent = f"{float(rank.get('silent_s', 0.0)):.1f} s"
        line = f"{number:>4} {rank.get('window', 0):>7} {rank.get('deltas', 0):>7} {silent:>8}  {printable(process)}"
        lines.append(shorten(line, text_width()))
    writers = state.get("writers", [])
    lines += [""] if writers else []
    for writer in writers:
        error = "" if writer.get("last_error") is None else f"; last error: {printable(str(writer['last_error']))}"
        counts = ", ".join(f"{writer.get(key, 0)} {key}" for key in ("written", "queued", "failed", "dropped"))
        lines.append(f"writer {printable(str(writer.get('name')))}: {counts}{error}")
    lines += [f"problem: {printable(problem)}" for problem in problems(state)]
    return lines


def total(state: Mapping[str, Any], name: str) -> int:
    """A number of a store and its shards together, such as their bytes."""
    return sum(int(part.get(name, 0)) for part in (state, *state.get("shards", [])))


def problems(state: Mapping[str, Any]) -> list[str]:
    """Those of a store and its shards, each once."""
    shards = enumerate(state.get("shards", []))
    of_shards = [f"shard {number}: {problem}" for number, shard in shards for problem in shard.get("problems", [])]
    return list(dict.fromkeys([*map(str, state.get("problems", [])), *of_shards]))


def mib(size: float) -> str:
    """Bytes for people.

    >>> mib(3 << 19)
    '1.5 MiB'
    """
    return f"{size / 2**20:.1f} MiB"
