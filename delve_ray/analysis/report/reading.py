"""The runs of a report, each with all of it that can be read; what cannot is said in sentences."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from delve_ray.analysis.reading import read_scalars, read_spectra
from delve_ray.analysis.run_files import SCALARS, SPECTRA, Kind, RunPath, find_runs, list_files, read_files
from delve_ray.analysis.windows import distinct
from delve_ray.errors import ReadError
from delve_ray.storage import Storage
from delve_ray.store.run_file import read_run

Read = Callable[[Storage], pa.Table]


@dataclass(frozen=True, slots=True)
class RunTables:
    """One run: its name, where its files are, its rows, its scalars, and the content of run.json or None."""

    name: str
    where: str
    spectra: pa.Table
    scalars: pa.Table
    described: dict[str, Any] | None


def find_readable(paths: RunPath | Iterable[RunPath], problems: list[str]) -> list[Storage]:
    """The run directories in or below `paths`, each once; a path without any is a sentence in `problems`."""
    given = [paths] if isinstance(paths, (str, os.PathLike, Storage)) else list(paths)
    found: list[Storage] = []
    for path in given:
        try:
            found += find_runs(path)
        except ReadError as error:
            problems.append(str(error))
    if not found:
        raise ReadError("; ".join(problems) or f"paths={paths!r}: name at least one run directory")
    return find_runs(found)


def read_tables(run: Storage, problems: list[str]) -> list[RunTables]:
    """The runs of one directory, which is one run unless files were copied together; none where nothing can be read."""
    try:
        spectra = _read(read_spectra, run, SPECTRA, problems)
    except ReadError as error:
        problems.append(str(error))
        return []
    if not spectra.num_rows:
        problems.append(f"{run.uri}: no window is published yet, so the page does not show this run")
        return []
    scalars = SCALARS.schema.empty_table()
    try:
        scalars = _read(read_scalars, run, SCALARS, problems)
    except ReadError as error:
        problems.append(str(error))
    described = None
    try:
        described = read_run(run)
    except ReadError as error:
        none = f"{run.uri} has no run.json: its options and versions are unknown"
        problems.append(str(error) if run.exists("run.json") else none)
    names = distinct(spectra.column("run"))
    if len(names) == 1:
        return [RunTables(names[0], run.uri, spectra, scalars.filter(pc.field("run") == names[0]), described)]
    return [
        RunTables(
            name,
            run.uri,
            spectra.filter(pc.field("run") == name),
            scalars.filter(pc.field("run") == name),
            described if described is not None and described.get("run") == name else None,
        )
        for name in names
    ]


def _read(read: Read, run: Storage, kind: Kind, problems: list[str]) -> pa.Table:
    """What `read` gives of a run, without those files that cannot be read."""
    try:
        return read(run)
    except ReadError:
        damaged = _damaged(run, kind)
        if not damaged:
            raise
    problems += [f"left out: {sentence}" for sentence in damaged.values()]
    return read(_Without(run, damaged))


def _damaged(run: Storage, kind: Kind) -> dict[str, str]:
    """Of the files of a kind those that cannot be read whole, and why."""
    damaged: dict[str, str] = {}
    for name in list_files(run, kind):
        try:
            read_files(run, kind, [name], kind.schema.names)
        except ReadError as error:
            damaged[name] = str(error)
        except FileNotFoundError:  # a newer revision replaced it meanwhile
            continue
    return damaged


class _Without(Storage):
    """A run's directory in which some files are not listed."""

    def __init__(self, run: Storage, names: Collection[str]) -> None:
        super().__init__(run.path(), run.filesystem)
        self._uri = run.uri
        self._names = frozenset(names)

    def list_files(self, relative_dir: str, suffix: str) -> list[str]:
        """As `Storage.list_files`, but for those files."""
        return [name for name in super().list_files(relative_dir, suffix) if name not in self._names]
