"""`delve-ray compare`: the layers of several runs beside each other."""

from __future__ import annotations

import pyarrow as pa

from delve_ray.analysis.comparing import compare, comparison_columns, comparison_table
from delve_ray.analysis.keys import matching
from delve_ray.analysis.reading import read_spectra
from delve_ray.analysis.recompute import recompute
from delve_ray.analysis.windows import distinct, select_windows
from delve_ray.cli.output import fail, fail_run, found_runs, progress_bar, show, show_json, text_width
from delve_ray.errors import ReadError
from delve_ray.storage import Storage

_STYLES = {r"^[A-Z]\d*  .*": "bold", r" \+[\d.e+]+( %)?": "green", r" -[\d.e+]+( %)?": "red"}


def compare_runs(
    paths: list[str], as_json: bool, stat: str, threshold: float | None, step: int | None, phase: str | None
) -> int:
    """Print the comparison of the runs that can be read; 2 where one cannot, or fewer than two have such rows."""
    columns = comparison_columns(stat)
    failures: list[int] = []
    tables: dict[tuple[str, str], pa.Table] = {}
    for run in found_runs(paths, failures):
        try:
            table = _read(run, columns, stat, threshold)
            for name in distinct(table.column("run")):
                own = matching(table, run=name)
                select_windows(own, step, phase)
                tables[name, run.uri] = own
            if not table.num_rows:
                raise ReadError("no window is published yet, so there is nothing to compare")
        except ReadError as error:
            failures.append(fail_run(run, error))
    if len(tables) < 2:
        code = fail(f"{len(tables)} of the runs given can be compared; it takes two.")
        if as_json:
            show_json([])
        return code
    comparison = compare({_label(place): table for place, table in tables.items()}, stat=stat, step=step, phase=phase)
    if as_json:
        show_json(comparison.to_pylist())
    else:
        show(comparison_table(comparison, width=text_width()), _STYLES)
    return max(failures, default=0)


def _read(run: Storage, columns: list[str], stat: str, threshold: float | None) -> pa.Table:
    if threshold is None:
        return read_spectra(run, columns)
    with progress_bar(run.uri) as progress:
        return recompute(run, threshold=threshold, stats=[stat], columns=columns, progress=progress)


def _label(place: tuple[str, str]) -> str:
    name, uri = place
    return f"{name}  {uri}"
