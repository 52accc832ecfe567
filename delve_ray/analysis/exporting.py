"""Spectra for programs that read no Parquet: CSV, numpy's arrays, and the CSV layout of Delve 0.1.50."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from delve_ray.analysis.reading import read_covariances, read_spectra
from delve_ray.analysis.run_files import COVARIANCES, RunPath, find_runs, list_files
from delve_ray.analysis.windows import distinct, network_order, require_columns
from delve_ray.errors import OptionError, ReadError
from delve_ray.moments import triangle_size, unpack_triangle
from delve_ray.schema import PHASES
from delve_ray.storage import Storage

Progress: TypeAlias = Callable[[int, int], object]

DELVE_NAMES = {
    "saturation": "saturation",
    "intrinsic_dimensionality": "intrinsic-dimensionality",
    "determinant": "covariance-determinant",
    "trace": "covariance-trace",
    "diagonal_trace": "diagonal-trace",
}
"""What Delve 0.1.50 calls the statistics that it has, in the order of its columns."""
COVARIANCE_BYTES = 256 << 20
"""Packed covariances that are in memory at a time, as far as whole steps allow it."""
INDEX = "index.json"


def spectra_csv(spectra: pa.Table) -> bytes:
    r"""The rows as CSV in UTF-8: the columns of the table that are no lists, under their names.

    Null is empty; NaN and the infinities are `nan`, `inf` and `-inf`; floats have all digits that they need; times are
    UTC. Layer names are quoted as they are.

    >>> spectra_csv(pa.table({"layer": ["fc"], "saturation": [0.5], "eigenvalues": [[2.0, 1.0]]}))
    b'"layer","saturation"\n"fc",0.5\n'
    """
    import pyarrow.csv as arrow_csv

    lists = [field.name for field in spectra.schema if pa.types.is_list(field.type)]
    sink = pa.BufferOutputStream()
    arrow_csv.write_csv(spectra.drop_columns(lists), sink)
    return bytes(sink.getvalue().to_pybytes())


def delve_csv(spectra: pa.Table, scalars: pa.Table | None = None) -> str:
    r"""One run as Delve 0.1.50's CSV writer lays it out: a line per step, a column per layer, phase and statistic.

    The separator is `;`, the first column, without a name, is the step, and the others are named as Delve names them,
    such as `train-saturation_conv1`. Statistics are those that Delve has, where the run has them; what a step lacks is
    empty. The numbers are this package's: its covariances, and its intrinsic dimensionality. `scalars`, of
    `read_scalars`, come first, each under its name, the mean over ranks. Raises ReadError for several runs.

    >>> rows = {"run": ["r"], "phase": ["eval"], "step": [3], "layer": ["fc"], "saturation": [0.5]}
    >>> delve_csv(pa.table(rows | {"intrinsic_dimensionality": [4]}))
    ';eval-saturation_fc;eval-intrinsic-dimensionality_fc\n3;0.5;4\n'
    """
    require_columns(spectra, ("run", "phase", "step", "layer", "saturation", "intrinsic_dimensionality"))
    if len(runs := distinct(spectra.column("run"))) > 1:
        raise ReadError(f"spectra hold {len(runs)} runs ({', '.join(runs[:3])}, …); this layout has room for one")
    columns: dict[str, dict[int, Any]] = {}
    for row in () if scalars is None else scalars.to_pylist():
        columns.setdefault(row["name"], {}).setdefault(row["step"], []).append(row["value"])
    columns = {name: {step: sum(v) / len(v) for step, v in steps.items()} for name, steps in columns.items()}
    stats = [stat for stat in DELVE_NAMES if stat in spectra.column_names]
    stats = [stat for stat in stats if spectra.column(stat).null_count < spectra.num_rows]
    for phase in PHASES:
        for layer in network_order(spectra):
            columns |= {f"{phase}-{DELVE_NAMES[stat]}_{layer}": {} for stat in stats}
    for row in spectra.select(["phase", "step", "layer", *stats]).to_pylist():
        for stat in stats:
            columns[f"{row['phase']}-{DELVE_NAMES[stat]}_{row['layer']}"][row["step"]] = row[stat]
    columns = {name: values for name, values in columns.items() if values}
    steps = sorted({step for values in columns.values() for step in values})
    text = io.StringIO()
    writer = csv.writer(text, delimiter=";", lineterminator="\n")
    writer.writerow(["", *columns])
    writer.writerows([step, *(_delve_value(values.get(step)) for values in columns.values())] for step in steps)
    return text.getvalue()


def _delve_value(value: Any) -> str:
    """As pandas writes it: NaN is empty."""
    return "" if value is None or value != value else str(value)


def export_npy(
    paths: RunPath | Iterable[RunPath],
    folder: str | os.PathLike[str],
    *,
    phase: str | None = None,
    progress: Progress | None = None,
    failed: Callable[[Storage, ReadError], object] | None = None,
) -> list[dict[str, Any]]:
    """Write eigenvalues, and covariances where the runs have them, as numpy's arrays into a new local folder.

    Each run, phase and layer has a file `eigenvalues-<number>.npy` of shape (steps, d), descending, NaN from where
    the head of a sketched layer ends, and, where there
    are covariances, `covariances-<number>.npy` of shape (steps, d, d), both float64. `index.json` says which is which:
    a list of objects with `file`, `run`, `phase`, `layer`, `features` and `steps`, one step for each entry along the
    first axis; that list is returned. A layer that changes its width has several files. Layer names are never part of a
    path.

    `progress` is called with the number of rows done and in all, for each run in turn. `failed` is called for a run
    that cannot be read, of which nothing is written; without it, that raises ReadError. Raises OptionError where the
    folder is there and not empty, ReadError for a path without runs, OSError where a file cannot be written.
    """
    os.makedirs(folder, exist_ok=True)
    if os.listdir(folder):
        raise OptionError(f"{os.fspath(folder)!r} is not empty; give a folder that is new, or remove that one")
    filters = None if phase is None else pc.field("phase") == phase
    index: list[dict[str, Any]] = []
    for run in find_runs(paths):
        before = len(index)
        try:
            _export_run(run, folder, filters, progress, index)
        except ReadError as error:
            if failed is None:
                raise
            for entry in index[before:]:
                with suppress(FileNotFoundError):
                    os.remove(os.path.join(folder, entry["file"]))
            del index[before:]
            failed(run, error)
    with open(os.path.join(folder, INDEX), "w", encoding="utf-8") as file:
        json.dump(index, file, indent=2, ensure_ascii=False)
    return index


def _export_run(
    run: Storage,
    folder: str | os.PathLike[str],
    filters: pc.Expression | None,
    progress: Progress | None,
    index: list[dict[str, Any]],
) -> None:
    """The arrays of one run, each noted in `index` before its file is written."""
    places = ["run", "phase", "step", "layer", "features"]
    spectra = read_spectra(run, [*places, "eigenvalues"], filters)
    advance = partial(_advance, progress, spectra.num_rows * (2 if list_files(run, COVARIANCES) else 1))
    _write_eigenvalues(folder, _groups(spectra.select(places).to_pylist()), spectra.column("eigenvalues"), index)
    advance(spectra.num_rows)
    _write_covariances(folder, run, filters, index, advance)


def _advance(progress: Progress | None, total: int, done: int) -> None:
    if progress is not None:
        progress(done, total)


Group: TypeAlias = tuple[str, str, str, int]
"""Run, phase, layer, features."""


def _groups(rows: Sequence[Mapping[str, Any]]) -> dict[Group, list[tuple[int, int]]]:
    """The steps and row numbers of each group, by ascending steps."""
    groups: dict[Group, list[tuple[int, int]]] = {}
    for number, row in enumerate(rows):
        group = (row["run"], row["phase"], row["layer"], row["features"] or 0)
        groups.setdefault(group, []).append((row["step"], number))
    return {group: sorted(places) for group, places in groups.items()}


def _entry(kind: str, group: Group, steps: Sequence[int], number: int) -> dict[str, Any]:
    run, phase, layer, features = group
    name = f"{kind}-{number:05d}.npy"
    return {"file": name, "run": run, "phase": phase, "layer": layer, "features": features, "steps": list(steps)}


def _write_eigenvalues(
    folder: str | os.PathLike[str],
    groups: Mapping[Group, Sequence[tuple[int, int]]],
    eigenvalues: pa.ChunkedArray,
    index: list[dict[str, Any]],
) -> None:
    for group, places in groups.items():
        array = np.full((len(places), group[3]), np.nan)
        for at, (_, number) in enumerate(places):
            values = eigenvalues[number]
            if values.is_valid:
                array[at, : len(values)] = values.values.to_numpy(zero_copy_only=False)[: group[3]]
        entry = _entry("eigenvalues", group, [step for step, _ in places], len(index))
        index.append(entry)
        np.save(os.path.join(folder, entry["file"]), array)


def _write_covariances(
    folder: str | os.PathLike[str],
    run: Storage,
    filters: pc.Expression | None,
    index: list[dict[str, Any]],
    progress: Callable[[int], object],
) -> None:
    """Some steps at a time, into files that are mapped into memory: a long run's do not fit."""
    keys = read_covariances(run, ["run", "phase", "step", "layer", "features"], filters).to_pylist()
    entries: dict[Group, dict[str, Any]] = {}
    for group, places in _groups(keys).items():
        entries[group] = _entry("covariances", group, [step for step, _ in places], len(index))
        index.append(entries[group])
        shape = (len(places), group[3], group[3])
        np.lib.format.open_memmap(os.path.join(folder, entries[group]["file"]), "w+", np.float64, shape).flush()
    done = 0
    for steps in _step_batches(keys):
        wanted = pc.field("step").isin(pa.array(steps))
        wanted = wanted if filters is None else wanted & filters
        table = read_covariances(run, ["run", "phase", "step", "layer", "features", "covariance"], wanted)
        packed = table.column("covariance")
        for number, row in enumerate(table.drop_columns(["covariance"]).to_pylist()):
            entry = entries[row["run"], row["phase"], row["layer"], row["features"] or 0]
            array = np.lib.format.open_memmap(os.path.join(folder, entry["file"]), "r+")
            triangle = packed[number].values.to_numpy(zero_copy_only=False)
            array[entry["steps"].index(row["step"])] = unpack_triangle(triangle, entry["features"])
            done += 1
            progress(len(keys) + done)


def _step_batches(rows: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    """The steps, so many at a time as have room in `COVARIANCE_BYTES`."""
    sizes: dict[int, int] = {}
    for row in rows:
        sizes[row["step"]] = sizes.get(row["step"], 0) + 8 * triangle_size(row["features"] or 0)
    batches: list[list[int]] = []
    size = 0
    for step, more in sizes.items():
        if not batches or size + more > COVARIANCE_BYTES:
            batches.append([])
            size = 0
        batches[-1].append(step)
        size += more
    return batches
