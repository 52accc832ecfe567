"""What a run's directory is called: local paths and URIs, as text."""

from __future__ import annotations

import os
import re
from contextlib import suppress

import pyarrow as pa
import pyarrow.fs as pafs

from delve_ray.errors import OptionError

_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_COLLAPSED = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
_PASSWORD = re.compile(r"(://[^/@:]*):(?:[^/@]*|(?![0-9]+/)[^@?]*)@")
"""Also one with a slash in it, which no URI may have, but not what follows a port."""
_SCHEMES = {"s3": ("s3",), "gcs": ("gs",), "hdfs": ("hdfs",), "abfs": ("abfs", "abfss")}
"""Of the filesystems that pyarrow opens by URI, by pyarrow's own name."""


def is_uri(text: str) -> bool:
    """Whether a savefile is a URI, and no path.

    >>> is_uri("s3://bucket/run"), is_uri("runs/a")
    (True, False)
    """
    return bool(_URI.match(text))


def check_savefile(savefile: object) -> str:
    """A savefile as text: a path, with `~` for the home directory, or a URI. Raises OptionError for anything else."""
    if not isinstance(savefile, str | os.PathLike) or not os.fspath(savefile):
        raise OptionError(f"savefile={savefile!r}: expected a local path or a URI such as s3://bucket/run")
    text = os.fsdecode(savefile)
    if is_uri(text):
        return text
    if _COLLAPSED.match(text):
        raise OptionError(
            f"savefile={savefile!r} looks like a URI that lost a slash; give URIs as strings, not as paths"
        )
    return os.path.expanduser(text)


def absolute(savefile: str) -> str:
    """A checked savefile, made absolute where it is a path."""
    return savefile if is_uri(savefile) else os.path.abspath(savefile)


def is_absolute(savefile: str) -> bool:
    """Whether a checked savefile means the same directory wherever it is read."""
    return is_uri(savefile) or os.path.isabs(savefile)


def uri_of(filesystem: pafs.FileSystem, path: str) -> str | None:
    """What opens `path` on `filesystem` in any process: a local path, or a URI; None where no URI says it all.

    >>> uri_of(pafs.LocalFileSystem(), "/runs/a")
    '/runs/a'
    """
    if isinstance(filesystem, pafs.LocalFileSystem):
        return os.path.abspath(path)
    for scheme in _SCHEMES.get(filesystem.type_name, ()):
        uri = f"{scheme}://{path}"
        with suppress(OSError, ValueError, pa.ArrowException):
            if pafs.FileSystem.from_uri(uri)[0].equals(filesystem):  # region, endpoint and keys, too
                return uri
    return None


def masked(savefile: str) -> str:
    """A savefile for files and messages: without the password that a URI may hold.

    >>> masked("s3://key:secret@bucket/run")
    's3://key:***@bucket/run'
    """
    return _PASSWORD.sub(r"\1:***@", savefile)
