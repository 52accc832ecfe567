"""What all commands share: exit codes, sentences, JSON, text as wide as there is room for, bars, files."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec

from delve_ray.errors import DelveRayError, OptionError, ReadError

if TYPE_CHECKING:
    from delve_ray.storage import Storage

FAILED = 2
"""Exit code for what cannot be read or used."""
BROKEN_PIPE = 141
"""Exit code when the reader of our output has gone, as a shell reports SIGPIPE."""
INTERRUPTED = 130
WIDTH = 80
"""Columns of text where stdout is no terminal, so that what is piped stays the same."""
MAX_WIDTH = 120
_UNSAFE = re.compile(r"[\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]")
"""What JSON lets through and terminals act upon: C1 controls, and what turns the direction of text."""
_RUN_FOLDERS = ("spectra", "covariances", "scalars", "embeddings")

P = ParamSpec("P")


def answering(command: Callable[P, int]) -> Callable[P, int]:
    """Make exit codes and one sentence of what a command raises; its own code is passed on once all is written."""

    @wraps(command)
    def answer(*args: P.args, **kwargs: P.kwargs) -> int:
        try:
            code = command(*args, **kwargs)
            sys.stdout.flush()
            return code
        except BrokenPipeError:
            # Python flushes stdout once more when it exits; what is left goes nowhere.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return BROKEN_PIPE
        except (DelveRayError, NotImplementedError, ImportError, OSError) as error:
            return fail(str(error))
        except KeyboardInterrupt:
            return INTERRUPTED

    return answer


def fail(sentence: str) -> int:
    """Say on stderr, on one line, what is wrong; the exit code for it."""
    from delve_ray.analysis.table import printable

    print(f"delve-ray: {printable(' '.join(sentence.split()))}", file=sys.stderr)
    return FAILED


def fail_run(run: Storage, error: Exception) -> int:
    """`fail` for one run of several, which is named if the message does not."""
    return fail(str(error) if run.uri in str(error) else f"{run.uri}: {error}")


# --- results -------------------------------------------------------------------------------------------------


def show_json(rows: Iterable[Mapping[str, Any]]) -> None:
    """Print a list of objects."""
    print(json_text(rows))


def json_text(rows: Iterable[Mapping[str, Any]]) -> str:
    """A list of objects as JSON, in which no character steers a terminal."""
    return _harmless(json.dumps([json_row(row) for row in rows], indent=2, allow_nan=False, ensure_ascii=False))


def json_line(row: Mapping[str, Any]) -> str:
    """One object as JSON on one line, otherwise as `json_text`.

    >>> json_line({"lag": 0, "waits_s": float("inf")})
    '{"lag": 0, "waits_s": null}'
    """
    return _harmless(json.dumps(json_row(row), allow_nan=False, ensure_ascii=False))


def _harmless(text: str) -> str:
    return _UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def json_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row as JSON has it: NaN and infinities are null, since JSON has no such numbers; times are ISO 8601.

    >>> json_row({"condition_number": float("inf"), "eigenvalues": [1.0, float("nan")]})
    {'condition_number': None, 'eigenvalues': [1.0, None]}
    """
    return {str(name): _json_value(value) for name, value in row.items()}


def _json_value(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list | tuple):
        return [_json_value(item) for item in value]
    if isinstance(value, Mapping):
        return json_row(value)
    return value.isoformat() if isinstance(value, datetime) else value


def text_width() -> int:
    """Columns of text: those of the terminal, `WIDTH` to `MAX_WIDTH`, or `WIDTH` where stdout is none."""
    columns = shutil.get_terminal_size((WIDTH, 0)).columns if sys.stdout.isatty() else WIDTH
    return min(max(columns, WIDTH), MAX_WIDTH)


def show(text: str, styles: Mapping[str, str]) -> None:
    """Print lines; on a terminal those that match a pattern of `styles` in that style, unless NO_COLOR forbids it."""
    if not sys.stdout.isatty():
        print(text)
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(force_terminal=True, highlight=False, markup=False, emoji=False, soft_wrap=True)
    for line in text.split("\n"):
        styled = Text(line)
        for pattern, style in styles.items():
            styled.highlight_regex(pattern, style)
        console.print(styled, no_wrap=True, overflow="ignore", crop=False)


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None] | None]:
    """A bar on stderr while something goes on, moved by calls with what is done and the total; None off a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from delve_ray.analysis.table import printable

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(printable(what), total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


# --- files ---------------------------------------------------------------------------------------------------


def write_output(path: str, data: bytes) -> None:
    """Write what `-o` names, a local path or a URI; it appears whole. Raises OptionError among the files of a run."""
    from delve_ray.storage import Storage

    above, _, name = path.replace(os.sep, "/").rpartition("/")
    folder = Storage(above or (os.sep if path.startswith(os.sep) else os.curdir))
    if not name:
        raise OptionError(f"{path!r} names no file")
    refuse_run_folders(folder)
    try:
        folder.write_atomic(name, data)
    except OSError as error:
        raise OptionError(f"{path!r} cannot be written ({error})") from error


def refuse_run_folders(folder: Storage) -> None:
    """Raise OptionError where files of a run lie: readers would take what is written there for its own."""
    from delve_ray.storage import Storage

    if not folder.is_local:
        return
    above, name = os.path.split(folder.local_path)
    if name in _RUN_FOLDERS and Storage(above).exists("run.json"):
        raise OptionError(f"{folder.uri} holds the files of a run, which stay as they are; write elsewhere")


# --- runs ----------------------------------------------------------------------------------------------------


def found_runs(paths: Iterable[str], failures: list[int]) -> list[Storage]:
    """The run directories at or below `paths`, each once; a path without any is said, and its exit code noted."""
    from delve_ray.analysis.run_files import find_runs

    found: dict[str, Storage] = {}
    for path in paths:
        try:
            for run in find_runs(path):  # once, though links such as "latest" may lead to it, too
                found.setdefault(os.path.realpath(run.local_path) if run.is_local else run.uri, run)
        except ReadError as error:
            failures.append(fail(str(error)))
    return list(found.values())


def described(run: Storage) -> Mapping[str, Any]:
    """What run.json says; nothing where it is not there or damaged, since the rows say most of it."""
    try:
        content = json.loads(run.read_bytes("run.json"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
