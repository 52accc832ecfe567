"""`delve-ray summary`: where each run is, what it has published, its layers."""

from __future__ import annotations

from functools import reduce
from operator import or_
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from delve_ray.analysis.keys import matching
from delve_ray.analysis.reading import read_spectra
from delve_ray.analysis.table import COLUMNS, OPTIONAL_COLUMNS, layer_table, printable
from delve_ray.analysis.windows import distinct, select_windows, steps_of
from delve_ray.cli.output import described, fail_run, found_runs, show, show_json, text_width
from delve_ray.errors import ReadError
from delve_ray.schema import PHASES
from delve_ray.storage import Storage

STYLES = {
    r"^run .*": "bold",
    r"[━╸]+": "cyan",
    r"[▁▂▃▄▅▆▇█]{2,}": "green",
    r"^(train|eval): (undersampled|non-finite|\d+ of|live).*": "yellow",
    r"^(dim|n/d|was): .*": "dim",
}


def summarize(paths: list[str], as_json: bool, step: int | None, phase: str | None) -> int:
    """Print a table of layers per run, or the rows of all; what cannot be read does not hide the rest."""
    failures: list[int] = []
    rows: list[dict[str, Any]] = []
    separator = ""
    for run in found_runs(paths, failures):
        try:
            tables = _each_run(run)
            if as_json:
                rows += [row for table in tables for row in _window_rows(run, table, step, phase)]
                continue
            texts = [f"{_describe(run, table)}\n{_layers(table, step, phase)}" for table in tables]
        except ReadError as error:
            failures.append(fail_run(run, error))
        else:
            show(separator + "\n\n".join(texts), STYLES)
            separator = "\n"
    if as_json:
        show_json(rows)
    return max(failures, default=0)


def _each_run(run: Storage) -> list[pa.Table]:
    """What the table of layers needs of a directory; one table per run name, an empty one where there is no row."""
    table = read_spectra(run, columns=[*COLUMNS, *OPTIONAL_COLUMNS])
    return [matching(table, run=name) for name in distinct(table.column("run"))] or [table]


def _describe(run: Storage, table: pa.Table) -> str:
    """Where a run is, its name, its world size and what it has published."""
    content = described(run)
    last = table.select(["run", "world_size"]).slice(max(table.num_rows - 1, 0)).to_pylist()
    name = last[0]["run"] if last else content.get("run", "?")
    world_size = last[0]["world_size"] if last else content.get("world_size", "?")
    windows = [f"{len(steps)} {phase}" for phase in PHASES if (steps := steps_of(table, phase))]
    steps = pc.max(table.column("step")).as_py()
    facts = [
        f"world size {world_size}",
        f"windows: {', '.join(windows) or 'none'}",
        *([] if steps is None else [f"last step {steps}"]),
    ]
    return f"{printable(run.uri)}\nrun {printable(str(name))}: {'; '.join(facts)}"


def _layers(table: pa.Table, step: int | None, phase: str | None) -> str:
    return layer_table(table, step=step, phase=phase, width=text_width(), trend=True)


def _window_rows(run: Storage, table: pa.Table, step: int | None, phase: str | None) -> list[dict[str, Any]]:
    """All columns of the rows that the table of layers shows."""
    windows = select_windows(table, step, phase)
    if not windows:
        return []
    shown = reduce(or_, ((pc.field("phase") == name) & (pc.field("step") == at) for name, at in windows.items()))
    name = table.column("run")[0].as_py()
    rows: list[dict[str, Any]] = read_spectra(run, filters=shown & (pc.field("run") == name)).to_pylist()
    return sorted(rows, key=lambda row: PHASES.index(row["phase"]))
