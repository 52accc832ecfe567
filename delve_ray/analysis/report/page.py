"""The page itself: template, style, scripts and data in one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from importlib import metadata, resources
from typing import Any

from delve_ray.analysis.report.content import Room, describe_run
from delve_ray.analysis.report.numbers import NumberPool, compressed
from delve_ray.analysis.report.reading import find_readable, read_tables
from delve_ray.analysis.report.words import STATISTICS
from delve_ray.analysis.run_files import RunPath
from delve_ray.errors import OptionError, ReadError
from delve_ray.storage import Storage, check_savefile, is_absolute

MAX_RUNS = 100
"""Runs of a page."""
MAX_ROWS = 65_536
"""Rows of statistics of a page, over all runs: of longer runs it holds some steps only, and says so."""
MAX_EIGENVALUES = 400_000
"""Eigenvalues of a page, over all runs."""

_SCRIPTS = (
    "data.js",
    "dom.js",
    "state.js",
    "overview.js",
    "table.js",
    "charts.js",
    "figures.js",
    "spectra.js",
    "main.js",
)
_STYLES = ("page.css", "table.css", "print.css")
_TOKEN = re.compile(r"\{\{(\w+)\}\}")


def write_report(paths: RunPath | Iterable[RunPath], output: str | os.PathLike[str]) -> list[str]:
    """Write one HTML page about one or several runs, which opens in a browser without any network.

    It has findings, what was run, a table of layers that sorts and filters, and interactive charts of the statistics
    over layers and steps, of the eigenspectra and of the user's scalars. Numbers are those of the Parquet files,
    rounded to float32; of long runs and wide spectra it holds what `MAX_ROWS` and `MAX_EIGENVALUES` leave, and says so.

    Args:
        paths: One savefile or several, or directories above runs, as `read_spectra` takes them.
        output: The local file to write; one of that name is replaced, directories above it are made.

    Returns:
        Sentences about the runs and files that could not be read, which the page shows, too.

    Raises:
        ImportError: plotly is not installed.
        OptionError: `output` is no local file that can be written.
        ReadError: nothing could be read.

    >>> import tempfile
    >>> import numpy as np
    >>> from delve_ray.schema import LayerRow, PublishedWindow
    >>> from delve_ray.writers.parquet import ParquetWriter
    >>> row = LayerRow("hidden", "Linear", "train", 2, 50, 0, 0.99, {"saturation": 0.5}, np.ones(2), np.zeros(2))
    >>> window = PublishedWindow("first", 0, 0, 0, 0, True, 1, 1, datetime.now(UTC), [row])
    >>> run = tempfile.mkdtemp()
    >>> ParquetWriter(Storage(run)).write(window)
    >>> write_report(run, f"{run}/report.html")
    ['... has no run.json: its options and versions are unknown']
    """
    plotly = _plotly()
    folder, name = _target(output)
    problems: list[str] = []
    runs = find_readable(paths, problems)
    if len(runs) > MAX_RUNS:
        problems.append(f"the page shows {MAX_RUNS} of {len(runs)} runs; give fewer paths to see the others")
        runs = runs[:MAX_RUNS]
    pool = NumberPool()
    room = Room(MAX_ROWS // len(runs), MAX_EIGENVALUES // len(runs))
    shown = [describe_run(tables, pool, room, problems) for run in runs for tables in read_tables(run, problems)]
    if not shown:
        raise ReadError("; ".join(problems))
    page = _assemble({"runs": _told_apart(shown), "problems": problems, **_about()}, pool.text(), plotly)
    try:
        folder.write_atomic(name, page.encode())
    except OSError as error:
        raise OptionError(f"output={output!r}: cannot write there ({error}); choose another file") from error
    return problems


@lru_cache(maxsize=1)
def _plotly() -> tuple[str, str]:
    """The library that draws the charts, as its package brings it: compressed, and its hash."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ImportError('a report needs plotly: pip install "delve_ray[report]"') from error
    library = str(get_plotlyjs())
    return compressed(library.encode()), _hash(library)


def _target(output: str | os.PathLike[str]) -> tuple[Storage, str]:
    """The directory of a local file, and its name. Raises OptionError for what is none."""
    if not isinstance(output, str | os.PathLike) or not os.fspath(output):
        raise OptionError(f"output={output!r}: expected the name of a local file, such as report.html")
    text = check_savefile(output)
    if "://" in text and is_absolute(text):
        raise OptionError(f"output={output!r} is a URI; a report is a local file, such as report.html")
    if os.path.isdir(text) or text.endswith(os.sep):
        raise OptionError(f"output={output!r} is a directory; name a file in it, such as report.html")
    folder, name = os.path.split(os.path.abspath(text))
    return Storage(folder), name


def _told_apart(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The runs with a label each: the name, and the directory where several have the same name."""
    names = [run["name"] for run in runs]
    return [
        {**run, "label": run["name"] if names.count(run["name"]) == 1 else f"{run['name']} ({run['where']})"}
        for run in runs
    ]


def _about() -> dict[str, Any]:
    """What the page says of itself, and of the statistics."""
    try:
        version = metadata.version("delve_ray")
    except metadata.PackageNotFoundError:
        version = ""
    return {
        "written": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "version": version,
        "statistics": [{"name": name, **words._asdict()} for name, words in STATISTICS.items()],
    }


def _assemble(data: dict[str, Any], numbers: str, plotly: tuple[str, str]) -> str:
    """The page: scripts run only if they are the two whose hashes its policy names, and nothing may be fetched."""
    script = "\n".join(["(() => {", '"use strict";', *map(_asset, _SCRIPTS), "})();\n"])
    parts = {
        "policy": f"{_hash(script)} {plotly[1]}",
        "style": "\n".join(map(_asset, _STYLES)),
        "script": script,
        "plotly": plotly[0],
        "numbers": numbers,
        "data": escaped_json(data),
    }
    return _TOKEN.sub(lambda token: parts[token[1]], _asset("page.html"))


def _asset(name: str) -> str:
    return resources.files("delve_ray.analysis.report").joinpath("assets", name).read_text(encoding="utf-8")


def _hash(script: str) -> str:
    """A script's hash as a Content-Security-Policy has it."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def escaped_json(value: Any) -> str:
    r"""JSON that may stand in a script element whatever its texts hold: ASCII, without <, > and &.

    >>> escaped_json({"name": "</script>"})
    '{"name": "\\u003c/script\\u003e"}'
    """
    text = json.dumps(value, allow_nan=False)
    return text.replace("<", r"\u003c").replace(">", r"\u003e").replace("&", r"\u0026")
