"""Completion of paths in a shell: typer has it for paths, and a run may be a URI as well."""

from __future__ import annotations

import os


def complete_path(incomplete: str) -> list[str]:
    """The directories that begin so, each with a slash to go on."""
    above, name = os.path.split(incomplete)
    try:
        found = sorted(entry.name for entry in os.scandir(os.path.expanduser(above) or os.curdir) if entry.is_dir())
    except OSError:
        return []
    hidden = name.startswith(".")
    return [
        os.path.join(above, entry, "")
        for entry in found
        if entry.startswith(name) and (hidden or not entry.startswith("."))
    ]
