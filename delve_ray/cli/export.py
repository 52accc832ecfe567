"""`delve-ray export`: spectra for programs that read no Parquet."""

from __future__ import annotations

import sys

import pyarrow as pa
import pyarrow.compute as pc

from delve_ray.analysis.exporting import delve_csv, export_npy, spectra_csv
from delve_ray.analysis.reading import read_scalars, read_spectra
from delve_ray.analysis.table import printable
from delve_ray.cli.output import fail_run, found_runs, json_text, progress_bar, refuse_run_folders, write_output
from delve_ray.errors import OptionError, ReadError
from delve_ray.storage import Storage


def export_runs(paths: list[str], format: str, output: str | None, phase: str | None) -> int:
    """Write the rows of the runs that can be read, in one format."""
    failures: list[int] = []
    runs = found_runs(paths, failures)
    if format == "npy":
        return _npy(runs, output, phase, failures)
    filters = None if phase is None else pc.field("phase") == str(phase)
    tables: list[pa.Table] = []
    scalars: list[pa.Table] = []
    with progress_bar("reading") as progress:
        for done, run in enumerate(runs, start=1):
            try:
                tables.append(read_spectra(run, filters=filters))
                if format == "delve":
                    scalars.append(read_scalars(run))
            except ReadError as error:
                failures.append(fail_run(run, error))
            if progress is not None:
                progress(done, len(runs))
    if not tables:
        return max(failures, default=0)
    table = pa.concat_tables(tables)
    if format == "delve":
        data = delve_csv(table, pa.concat_tables(scalars)).encode()
    elif format == "csv":
        data = spectra_csv(table)
    else:
        data = (json_text(table.to_pylist()) + "\n").encode()
    if output is not None:
        write_output(output, data)
    else:
        _to_stdout(data)
    return max(failures, default=0)


def _to_stdout(data: bytes) -> None:
    """As it is into a pipe or a file; on a terminal, without what would steer it."""
    text = data.decode()
    if sys.stdout.isatty():
        text = "\n".join(printable(line) for line in text.split("\n"))
    sys.stdout.write(text)


def _npy(runs: list[Storage], output: str | None, phase: str | None, failures: list[int]) -> int:
    if output is None:
        raise OptionError("--format npy writes several files: name a new folder with -o")
    refuse_run_folders(Storage(output))
    if runs:
        with progress_bar("writing") as progress:
            index = export_npy(
                runs,
                output,
                phase=None if phase is None else str(phase),
                progress=progress,
                failed=lambda run, error: failures.append(fail_run(run, error)),
            )
        print(f"{printable(output)}: {len(index)} arrays, and index.json, which says what is in which")
    return max(failures, default=0)
