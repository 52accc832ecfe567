"""`delve-ray recompute`: other thresholds and statistics from what is on disk."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from delve_ray.analysis.keys import matching
from delve_ray.analysis.reading import read_spectra
from delve_ray.analysis.recompute import recompute
from delve_ray.analysis.table import layer_table, printable, shorten_layer
from delve_ray.analysis.windows import distinct, select_windows
from delve_ray.cli.output import (
    fail_run,
    found_runs,
    progress_bar,
    show,
    show_json,
    text_width,
    write_output,
)
from delve_ray.cli.summary import STYLES
from delve_ray.errors import ReadError
from delve_ray.nystrom import Head
from delve_ray.schema import ALWAYS, EXTRA_STATS, SCALAR_STATS, SPECTRA_SCHEMA
from delve_ray.storage import Storage

_CELL = 8
_MAX_NAME = 32


def recompute_runs(
    paths: list[str],
    as_json: bool,
    thresholds: list[float] | None,
    stats: list[str] | None,
    output: str | None,
    step: int | None,
    phase: str | None,
) -> int:
    """Print what recomputing gives for the last windows, or write it for all; the files of the runs stay."""
    failures: list[int] = []
    tables: list[pa.Table] = []
    rows: list[dict[str, Any]] = []
    separator = ""
    threshold = thresholds[0] if thresholds and len(thresholds) == 1 else thresholds or None
    for run in found_runs(paths, failures):
        try:
            filters = _everything(step, phase) if output is not None else _windows(run, step, phase)
            with progress_bar(run.uri) as progress:
                table = recompute(run, threshold=threshold, stats=stats or None, filters=filters, progress=progress)
        except ReadError as error:
            failures.append(fail_run(run, error))
            continue
        tables.append(table)
        if as_json:
            rows += table.to_pylist()
        elif output is None:
            show(separator + f"{printable(run.uri)}\n{_text(table, stats)}", STYLES)
            separator = "\n"
    if output is not None and tables:
        table = pa.concat_tables(tables)
        write_output(output, _parquet(table))
        if not as_json:
            print(f"{printable(output)}: {table.num_rows} rows")
    if as_json:
        show_json(rows)
    return max(failures, default=0)


def _everything(step: int | None, phase: str | None) -> list[tuple[str, str, Any]] | None:
    wanted = [(name, "==", value) for name, value in (("step", step), ("phase", phase)) if value is not None]
    return wanted or None


def _windows(run: Storage, step: int | None, phase: str | None) -> pc.Expression | None:
    """The filter for the windows to show: of each run in the directory, the step or else the last of each phase."""
    keys = read_spectra(run, ["run", "phase", "step"])
    shown: pc.Expression | None = None
    for name in distinct(keys.column("run")):
        for which, at in select_windows(matching(keys, run=name), step, phase).items():
            one = (pc.field("run") == name) & (pc.field("phase") == which) & (pc.field("step") == at)
            shown = one if shown is None else shown | one
    return shown


def _text(table: pa.Table, stats: list[str] | None) -> str:
    """The table of layers, and below it what was asked for by name and for further thresholds."""
    text = layer_table(table, width=text_width())
    several = max((len(values or ()) for values in table.column("thresholds").to_pylist()), default=0)
    asked = [] if stats is None else [name for name in (*SCALAR_STATS, *EXTRA_STATS) if _has(table, name)]
    asked = [name for name in asked if name not in ALWAYS]
    if not several and not asked:
        return text
    blocks = [text]
    for name in distinct(table.column("run")):
        for phase, step in select_windows(matching(table, run=name)).items():
            rows = matching(table, run=name, phase=phase, step=step).to_pylist()
            if several:
                heads = [f"{value:g}" for value in rows[0]["thresholds"]]
                cells = [_dimensions(row) for row in rows]
                at_most = " (≤: the most that a sketch leaves open)" if "≤" in str(cells) else ""
                blocks += _blocks(f"dimensions by threshold, {phase}, step {step}{at_most}", rows, heads, cells)
            if asked:
                cells = [[_number(row[stat]) for stat in asked] for row in rows]
                blocks += _blocks(f"{phase}, step {step}", rows, asked, cells)
    return "\n\n".join(blocks)


def _dimensions(row: dict[str, Any]) -> list[str]:
    """k(δ) at each threshold; of a sketched layer it is an upper end where the head does not explain the share δ."""
    values, thresholds = row["intrinsic_dimensionalities"], row["thresholds"]
    if not values:  # of a spectrum that is not finite, or not whole
        return ["–"] * len(thresholds)
    if not row["sketched"]:
        return list(map(str, values))
    seen, unseen = np.asarray(row["eigenvalues"], np.float64), row["unseen_variance"]
    head = Head(seen, float(seen.sum()) + unseen, unseen, row["features"])
    reached = [head.dimensionality(threshold)[2] for threshold in thresholds]
    return [str(k) if known else f"≤{k}" for k, known in zip(values, reached, strict=True)]


def _has(table: pa.Table, name: str) -> bool:
    return bool(table.column(name).null_count < table.num_rows)


def _blocks(title: str, rows: list[dict[str, Any]], heads: list[str], cells: list[list[str]]) -> list[str]:
    """A line per layer; where the columns are too many for one table, several."""
    names = [shorten_layer(row["layer"], _MAX_NAME) for row in rows]
    name_width = max(map(len, [*names, "layer"]))
    blocks, start = [], 0
    while start < len(heads):
        end, room = start, text_width() - name_width
        while end < len(heads) and (end == start or room >= _width(heads[end])):
            room -= _width(heads[end])
            end += 1
        widths = [_width(head) for head in heads[start:end]]
        lines = [title, _line("layer".ljust(name_width), heads[start:end], widths)]
        for name, values in zip(names, cells, strict=True):
            lines.append(_line(name.ljust(name_width), values[start:end], widths))
        blocks.append("\n".join(lines))
        start = end
    return blocks


def _width(head: str) -> int:
    return 2 + max(_CELL, len(head))


def _line(name: str, cells: list[str], widths: list[int]) -> str:
    return name + "".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    text = [field.name for field in SPECTRA_SCHEMA if pa.types.is_string(field.type)]
    pq.write_table(table, sink, compression="zstd", use_dictionary=text, write_page_checksum=True)
    return bytes(sink.getvalue().to_pybytes())
