"""Whether a worker's process is still there, as far as the machine of its store can see."""

from __future__ import annotations

import socket
from pathlib import Path

from delve_ray.store.protocol import Source


def started(source: Source) -> str | None:
    """When the source's process was started, in clock ticks after boot; None where it is not to be seen from here.

    That is so on another machine, in another container, and on systems without /proc. Together with the pid it tells
    a process from a later one of the same pid.
    """
    if source.host != socket.gethostname():
        return None
    try:
        # The 22nd field; the second, the program's name in parentheses, may have spaces and parentheses of its own.
        fields = Path(f"/proc/{source.pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, UnicodeDecodeError):
        return None
    return None if fields[0] in "ZX" else fields[19]  # dead, and only not yet waited for
