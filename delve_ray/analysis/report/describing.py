"""What was run, in words for the page: from run.json, and from the rows where that is missing or silent."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from delve_ray.analysis.report.reading import RunTables
from delve_ray.analysis.windows import steps_of
from delve_ray.configs import flatten, plain
from delve_ray.schema import PHASES

Pairs = list[tuple[str, str]]
"""Labels and what stands beside them."""

_MOST_NAMED = 5
_SHOWN_ELSEWHERE = ("run", "savefile", "world_size", "trial_config")


def facts(tables: RunTables) -> Pairs:
    """The few lines about a run that everybody reads."""
    described = tables.described or {}
    world_size = described.get("world_size") or pc.max(tables.spectra.column("world_size")).as_py()
    lines: list[tuple[str, str | None]] = [
        ("files", tables.where),
        ("trial", _first_text(tables.spectra.column("trial"))),
        ("world size", None if world_size is None else _workers(world_size)),
        *((f"{phase} windows", _windows(tables.spectra, phase)) for phase in PHASES),
        ("threshold δ", _thresholds(tables.spectra)),
        ("parameters of the model", _number(_mapping(described.get("model")).get("num_parameters"))),
        ("began", _time(described["created"]) if "created" in described else None),
        ("ended", _end(described) if described else None),
        ("missing workers", _missing(tables.spectra)),
        ("windows still open", _open_windows(tables.spectra)),
    ]
    return [(label, text) for label, text in lines if text]


def options(described: Mapping[str, Any] | None) -> Pairs:
    """The options of run.json, and the trial's config, by their paths."""
    own = _mapping((described or {}).get("options"))
    pairs = _texts(flatten({name: value for name, value in own.items() if name not in _SHOWN_ELSEWHERE}))
    config = own.get("trial_config")
    if isinstance(config, str):
        try:
            config = json.loads(config)
        except ValueError:
            return [*pairs, ("trial_config", str(config))]
    return pairs + _texts(flatten({"config": config}) if isinstance(config, Mapping) else {})


def versions(described: Mapping[str, Any] | None) -> Pairs:
    """The versions of what took part."""
    return _texts(_mapping((described or {}).get("versions")))


def attempts(described: Mapping[str, Any] | None) -> Pairs:
    """When each attempt began, with how many workers."""
    listed = (described or {}).get("attempts")
    known = [attempt for attempt in listed if isinstance(attempt, Mapping)] if isinstance(listed, list) else []
    return [
        (f"attempt {attempt.get('attempt')}", f"{_time(attempt.get('began'))}, {_workers(attempt.get('world_size'))}")
        for attempt in known
    ]


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _texts(values: Mapping[str, Any]) -> Pairs:
    """Values as JSON writes them, exactly, and texts as they are."""
    return [
        (str(name), value if isinstance(value, str) else json.dumps(plain(value), ensure_ascii=False))
        for name, value in values.items()
    ]


def _first_text(column: pa.ChunkedArray) -> str | None:
    return next((str(value) for value in pc.unique(column).to_pylist() if value), None)


def _number(value: Any) -> str | None:
    return f"{value:,}" if isinstance(value, int) else None


def _workers(count: Any) -> str:
    return f"{count} worker" if count == 1 else f"{count} workers"


def _time(value: Any) -> str:
    """An ISO time to the second, as people write it; other values as they are.

    >>> _time("2026-01-02T03:04:05.678901+00:00")
    '2026-01-02 03:04:05 UTC'
    """
    text = str(value)
    if len(text) > 19 and text[10] == "T" and text.endswith("+00:00"):
        return f"{text[:10]} {text[11:19]} UTC"
    return text


def _windows(spectra: pa.Table, phase: str) -> str | None:
    """How many windows a phase has, and how many samples its layers saw in one."""
    steps = steps_of(spectra, phase)
    if not steps:
        return None
    samples = pc.min_max(spectra.filter(pc.field("phase") == phase).column("samples")).as_py()
    where = f"step {steps[0]}" if len(steps) == 1 else f"{len(steps):,}, from step {steps[0]} to {steps[-1]}"
    if samples["min"] is None:
        return where
    many = f"{samples['min']:,}"
    if samples["max"] != samples["min"]:
        many += f" to {samples['max']:,}"
    return f"{where}; {many} samples per layer and window"


def _thresholds(spectra: pa.Table) -> str | None:
    shares = sorted(value for value in pc.unique(spectra.column("threshold")).to_pylist() if value is not None)
    return " or ".join(f"{100 * share:g} % of the variance" for share in shares) or None


def _end(described: Mapping[str, Any]) -> str:
    end = described.get("end")
    if not isinstance(end, Mapping):
        return "not yet, or without saying so"
    problems = end.get("problems")
    said = [str(problem) for problem in problems] if isinstance(problems, list) else []
    return "; ".join([f"{_time(end.get('time'))}, {end.get('why')}", *said])


def _missing(spectra: pa.Table) -> str | None:
    """The windows for which fewer workers have closed than there are; a window still open is no such one."""
    short = spectra.filter((pc.field("workers") < pc.field("world_size")) & pc.field("final"))
    return _named(short, lambda row: f"{row['workers']} of {row['world_size']}")


def _open_windows(spectra: pa.Table) -> str | None:
    return _named(spectra.filter(~pc.field("final")), lambda row: "live")


def _named(rows: pa.Table, say: Callable[[dict[str, Any]], str]) -> str | None:
    """The first few windows of some rows with what is said of each, and how many more there are."""
    said: dict[tuple[str, int], str] = {}
    for row in _windows_of(rows):
        said.setdefault((row["phase"], row["step"]), say(row))
    named = [f"{phase} step {step} ({text})" for (phase, step), text in list(said.items())[:_MOST_NAMED]]
    more = len(said) - len(named)
    return ", ".join(named) + (f" and {more} more" if more else "") if named else None


def _windows_of(rows: pa.Table) -> Iterable[dict[str, Any]]:
    keys = ["phase", "step", "workers", "world_size"]
    grouped: list[dict[str, Any]] = rows.select(keys).group_by(keys, use_threads=False).aggregate([]).to_pylist()
    return grouped
