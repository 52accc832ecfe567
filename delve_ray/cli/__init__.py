"""The `delve-ray` command: questions to the files of runs, and repairs. It needs neither torch nor Ray.

`commands` says what each command takes; a module of its own answers it, imported when it is asked for.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from delve_ray.cli.output import FAILED, INTERRUPTED, fail

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with `arguments`, by default those of the process, and return its exit code.

    2 with one sentence on stderr says that something cannot be read or used; what else there is to show is shown. 130
    is an interruption, 141 a reader of the output that has gone.
    """
    import typer

    from delve_ray.cli.commands import app

    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that knows no box drawing still gets a table
    given = None if arguments is None else list(arguments)
    try:
        code = typer.main.get_command(app).main(given, prog_name="delve-ray", standalone_mode=False)
    except typer.Abort:
        return INTERRUPTED
    except Exception as error:
        # Click's own for what was typed, wherever typer has it from: from click, or since 0.26 from a copy of its own.
        if not hasattr(error, "format_message"):
            raise
        context = getattr(error, "ctx", None)
        command = "delve-ray" if context is None else context.command_path
        fail(f"{error.format_message().rstrip('.')}; {command} --help says what there is.")
        return FAILED
    return int(code or 0)
