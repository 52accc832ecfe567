"""The `delve-ray` command: questions to the files of runs, and repairs. It needs neither torch nor Ray."""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import reduce
from operator import or_
from typing import Any, NoReturn

import pyarrow as pa
import pyarrow.compute as pc

from delve_ray.analysis.reading import read_spectra
from delve_ray.analysis.run_files import find_runs
from delve_ray.analysis.table import WIDTH, layer_table, printable
from delve_ray.analysis.windows import distinct, select_windows, steps_of
from delve_ray.errors import DelveRayError, ReadError
from delve_ray.schema import PHASES, SPECTRA_SCHEMA
from delve_ray.storage import Storage

FAILED = 2
"""Exit code for what cannot be read, and for what is not built."""
BROKEN_PIPE = 141
"""Exit code when the reader of our output has gone, as a shell reports SIGPIPE."""
INTERRUPTED = 130
UNBUILT = {
    "report": "an HTML page of a run",
    "diagnose": "findings such as bottlenecks and dead layers",
    "recompute": "other thresholds from the eigenvalues on disk",
    "compare": "two runs beside each other",
    "rank": "the trials of a sweep, best first",
    "export": "spectra as CSV or JSON",
    "status": "a running store",
}
"""Commands that are known words and do nothing yet."""
_MAX_TEXT_WIDTH = 120
_LIST_COLUMNS = [field.name for field in SPECTRA_SCHEMA if pa.types.is_list(field.type)]
_SHORT_COLUMNS = [name for name in SPECTRA_SCHEMA.names if name not in _LIST_COLUMNS]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with `arguments`, by default those of the process, and return its exit code.

    2 with one sentence on stderr says that something cannot be read or is not built; what else there is to show
    is shown. argparse exits with 2 for arguments that it does not know.
    """
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    try:
        if options.command in UNBUILT:
            return _fail(f"{options.command} ({UNBUILT[options.command]}) is not built yet; summary is.")
        if rest:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")  # a terminal that knows no box drawing still gets a table
        code = _recover(options) if options.command == "recover" else _summary(options)
        sys.stdout.flush()
        return code
    except DelveRayError as error:
        return _fail(str(error))
    except BrokenPipeError:
        # Python flushes stdout once more when it exits; what is left goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except KeyboardInterrupt:
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="delve-ray",
        description="How much of each layer's width a network uses: questions to the files of runs.",
        epilog="The exit code is 2 for what cannot be read.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    summary = commands.add_parser("summary", help="a table of layers", description=_SUMMARY)
    summary.add_argument("runs", nargs="+", metavar="RUN", help="savefile of a run, or a directory or URI above runs")
    summary.add_argument("--json", action="store_true", help="a list of objects, one per layer and phase")
    summary.add_argument("--step", type=int, metavar="N", help="this step; by default the last one of each phase")
    summary.add_argument("--phase", choices=PHASES, help="one phase; by default both")
    recover = commands.add_parser("recover", help="merge what was not delivered", description=_RECOVER)
    recover.add_argument("run", metavar="RUN", help="savefile of a run that has ended")
    recover.add_argument("paths", nargs="*", metavar="PATH", help="further files, or folders of files, to merge")
    recover.add_argument("--json", action="store_true", help="a list of objects, one per file")
    recover.add_argument("--force", action="store_true", help="also where the run does not seem to have ended")
    for name, what in UNBUILT.items():
        commands.add_parser(name, help=f"{what} (not built yet)", add_help=False)
    return parser


_SUMMARY = (
    "Shows where each run is, what it has published, and its layers: samples, samples per feature (n/d) where there is "
    "room, intrinsic dimensionality, saturation; layers with fewer samples than features are named below. "
    "With --json, prints the rows of these windows as a list of objects under the names of the Parquet columns; "
    "values that are null, NaN or infinite are null there, and times are ISO 8601."
)


_RECOVER = (
    "Merges into a run what its workers could not deliver and its writers could not write: the files in "
    "RUN/undelivered, and those that are named. What the run has already counts once; the corrected rows are published "
    "as a new revision, and the merged files are deleted. The exit code is 2 if a file could not be merged."
)


class _Version(argparse.Action):
    """Looks the version up only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object, **__: object) -> NoReturn:
        from importlib.metadata import PackageNotFoundError, version

        try:
            print(f"delve-ray {version('delve_ray')}")
            parser.exit()
        except PackageNotFoundError:
            parser.exit(FAILED, "delve-ray: the package is not installed, so it has no version.\n")


def _summary(options: argparse.Namespace) -> int:
    code, rows, separator = 0, list[dict[str, Any]](), ""
    for run in find_runs(options.runs):
        try:
            tables = _each_run(run)
            if options.json:
                rows += [row for table in tables for row in _window_rows(run, table, options)]
                continue
            texts = [f"{_describe(run, table)}\n{_text_table(table, options)}" for table in tables]
        except ReadError as error:
            # One run of a sweep must not hide the others. Its name is in the message, or else before it.
            code = _fail(str(error) if run.uri in str(error) else f"{run.uri}: {error}")
        else:
            print(separator + "\n\n".join(texts))
            separator = "\n"
    if options.json:
        print(json.dumps([json_row(row) for row in rows], indent=2, allow_nan=False, ensure_ascii=False))
    return code


def _recover(options: argparse.Namespace) -> int:
    from delve_ray.recovery import recover

    outcomes = recover(options.run, options.paths, force=options.force)
    if options.json:
        print(json.dumps([outcome.as_dict() for outcome in outcomes], indent=2, ensure_ascii=False))
    else:
        merged = [outcome for outcome in outcomes if outcome.merged]
        steps = sorted({outcome.step for outcome in merged})
        ranks = sorted({outcome.rank for outcome in merged})
        what = f"merged {len(merged)} deltas of ranks {ranks}, steps {steps}" if merged else "nothing to merge"
        print(f"{printable(options.run)}: {what}")
    for outcome in outcomes:
        if not outcome.merged:
            _fail(f"{outcome.file} is not merged: {outcome.problem}")
    return FAILED if any(not outcome.merged for outcome in outcomes) else 0


def _each_run(run: Storage) -> list[pa.Table]:
    """The rows of a directory, without their lists; one table per run name, an empty one where there is no row."""
    table = read_spectra(run, columns=_SHORT_COLUMNS)
    return [table.filter(pc.field("run") == name) for name in distinct(table.column("run"))] or [table]


def _describe(run: Storage, table: pa.Table) -> str:
    """Where a run is, its name, its world size and what it has published."""
    described = _run_json(run)
    last = table.slice(max(table.num_rows - 1, 0)).to_pylist()
    name = last[0]["run"] if last else described.get("run", "?")
    world_size = last[0]["world_size"] if last else described.get("world_size", "?")
    windows = [f"{len(steps)} {phase}" for phase in PHASES if (steps := steps_of(table, phase))]
    steps = pc.max(table.column("step")).as_py()
    facts = [
        f"world size {world_size}",
        f"windows: {', '.join(windows) or 'none'}",
        *([] if steps is None else [f"last step {steps}"]),
    ]
    return f"{printable(run.uri)}\nrun {printable(str(name))}: {'; '.join(facts)}"


def _run_json(run: Storage) -> Mapping[str, Any]:
    """What run.json says; nothing where it is not there or damaged, since the rows say most of it."""
    try:
        described = json.loads(run.read_bytes("run.json"))
    except (OSError, ValueError):
        return {}
    return described if isinstance(described, dict) else {}


def _text_table(table: pa.Table, options: argparse.Namespace) -> str:
    width = min(shutil.get_terminal_size((WIDTH, 0)).columns, _MAX_TEXT_WIDTH) if sys.stdout.isatty() else WIDTH
    return layer_table(table, step=options.step, phase=options.phase, width=max(width, WIDTH))


def _window_rows(run: Storage, table: pa.Table, options: argparse.Namespace) -> list[dict[str, Any]]:
    """All columns of the rows that the table of layers shows."""
    windows = select_windows(table, options.step, options.phase)
    if not windows:
        return []
    shown = reduce(or_, ((pc.field("phase") == phase) & (pc.field("step") == step) for phase, step in windows.items()))
    name = table.column("run")[0].as_py()
    rows: list[dict[str, Any]] = read_spectra(run, filters=shown & (pc.field("run") == name)).to_pylist()
    return sorted(rows, key=lambda row: PHASES.index(row["phase"]))


def json_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row as JSON has it: NaN and infinities are null, since JSON has no such numbers; times are ISO 8601.

    >>> json_row({"condition_number": float("inf"), "eigenvalues": [1.0, float("nan")]})
    {'condition_number': None, 'eigenvalues': [1.0, None]}
    """
    return {name: _json_value(value) for name, value in row.items()}


def _json_value(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list):
        return [_json_value(item) for item in value]
    return value.isoformat() if isinstance(value, datetime) else value


def _fail(sentence: str) -> int:
    print(f"delve-ray: {' '.join(sentence.split())}", file=sys.stderr)
    return FAILED


if __name__ == "__main__":
    sys.exit(main())
