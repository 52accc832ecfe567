"""A run's directory on any filesystem that pyarrow.fs opens: whole files in, whole files out."""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Iterable
from contextlib import suppress
from typing import TypeAlias

import pyarrow as pa
import pyarrow.fs as pafs

from delve_ray.errors import OptionError

Data: TypeAlias = "bytes | pa.Buffer | Iterable[bytes | pa.Buffer]"
"""What a file is written from: bytes, or pieces that are written one after the other."""

_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_COLLAPSED = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
_PASSWORD = re.compile(r"(://[^/@:]*):[^/@]*@")
_SCHEMES = {"s3": ("s3",), "gcs": ("gs",), "hdfs": ("hdfs",), "abfs": ("abfs", "abfss")}
"""Of the filesystems that pyarrow opens by URI, by pyarrow's own name."""
_HIDDEN = (".", "_")


def check_savefile(savefile: object) -> str:
    """A savefile as text: a path, with `~` for the home directory, or a URI. Raises OptionError for anything else."""
    if not isinstance(savefile, str | os.PathLike) or not os.fspath(savefile):
        raise OptionError(f"savefile={savefile!r}: expected a local path or a URI such as s3://bucket/run")
    text = os.fsdecode(savefile)
    if _URI.match(text):
        return text
    if _COLLAPSED.match(text):
        raise OptionError(
            f"savefile={savefile!r} looks like a URI that lost a slash; give URIs as strings, not as paths"
        )
    return os.path.expanduser(text)


def absolute(savefile: str) -> str:
    """A checked savefile, made absolute where it is a path."""
    return savefile if _URI.match(savefile) else os.path.abspath(savefile)


def is_absolute(savefile: str) -> bool:
    """Whether a checked savefile means the same directory wherever it is read."""
    return bool(_URI.match(savefile)) or os.path.isabs(savefile)


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


class Storage:
    """A directory that a run writes into and readers read from.

    `savefile` is a local path (made absolute; relative ones start at the working directory) or a URI that
    `pyarrow.fs.FileSystem.from_uri` understands (`file://`, `s3://`, `gs://`, `hdfs://`, ...). With
    `filesystem`, `savefile` is a path on that filesystem, as Ray's `storage_filesystem` has it. Nothing is
    touched before the first call. Instances hold no open files and may be shared by threads.

    Names handed to the methods are relative to the directory, with "/" between their parts. A name that
    would leave the directory raises ValueError; what the filesystem refuses raises OSError.

    Raises OptionError for a savefile that is empty, no path, or on a filesystem that pyarrow cannot open.

    >>> import tempfile
    >>> storage = Storage(tempfile.mkdtemp())
    >>> storage.write_atomic("spectra/1.parquet", b"bytes")
    >>> storage.list_files("spectra", ".parquet")
    ['spectra/1.parquet']
    """

    def __init__(self, savefile: str | os.PathLike[str], filesystem: pafs.FileSystem | None = None) -> None:
        text = check_savefile(savefile)
        self._uri = masked(text)
        if filesystem is not None:
            self._filesystem, self._root = filesystem, text.rstrip("/") or text
        elif _URI.match(text):
            self._filesystem, self._root = self._open_uri(text)
        else:
            self._filesystem, self._root = pafs.LocalFileSystem(), text
        if self.is_local:
            self._root = self._uri = os.path.abspath(self._root)
        self._made: set[str] = set()

    def _open_uri(self, text: str) -> tuple[pafs.FileSystem, str]:
        try:
            filesystem, root = pafs.FileSystem.from_uri(text)
        except (OSError, ValueError, pa.ArrowException) as error:
            reason = str(error).replace(text, self._uri)
            raise OptionError(
                f"savefile={self._uri!r}: pyarrow cannot open this filesystem ({reason}); "
                "use a local path, or a URI with a scheme that pyarrow.fs knows"
            ) from error
        return filesystem, root.rstrip("/") or root

    @property
    def filesystem(self) -> pafs.FileSystem:
        """The filesystem that holds the directory."""
        return self._filesystem

    @property
    def is_local(self) -> bool:
        """Whether the directory lies on this machine's own filesystem."""
        return isinstance(self._filesystem, pafs.LocalFileSystem)

    @property
    def local_path(self) -> str:
        """The absolute local path; ValueError when the directory is not local."""
        if not self.is_local:
            raise ValueError(f"{self._uri} is not a local directory")
        return self._root

    @property
    def uri(self) -> str:
        """The path or URI for messages, with any password masked."""
        return self._uri

    def __repr__(self) -> str:
        return f"Storage({self._uri!r})"

    def path(self, relative: str = "") -> str:
        """The path of `relative` on `filesystem`; "" is the directory itself.

        >>> Storage("/runs/a").path("spectra/1.parquet")
        '/runs/a/spectra/1.parquet'
        """
        if not relative:
            return self._root
        if "\0" in relative or any(part in ("", ".", "..") for part in relative.split("/")):
            raise ValueError(f"{relative!r} is not a relative name inside {self._uri}")
        return f"{self._root.rstrip('/')}/{relative}" if self._root else relative

    def child(self, relative: str) -> Storage:
        """The storage of a directory below this one."""
        below = Storage(self.path(relative), filesystem=self._filesystem)
        if not self.is_local:
            base, mark, query = self._uri.partition("?")
            below._uri = f"{base.rstrip('/')}/{relative}{mark}{query}"
        return below

    def prepare(self) -> None:
        """Create the directory and prove that it is writable, by writing and removing a small file.

        Raises OptionError with the path, the reason the system gave and the remedy.
        """
        probe = f".probe-{uuid.uuid4().hex}"
        try:
            self._filesystem.create_dir(self._root, recursive=True)
            self.write_atomic(probe, b"delve_ray")
            self.delete(probe)
        except (OSError, pa.ArrowException) as error:
            raise OptionError(
                f"savefile={self._uri!r}: cannot write there ({error}); "
                "choose a directory that this process may create files in"
            ) from error

    def write_atomic(self, relative: str, data: Data) -> None:
        """Write a file that appears whole or not at all, and replaces one of the same name.

        Locally: a hidden temporary name in the same directory, fsync, rename, fsync of the directory; once
        this returns the file survives a power cut. Elsewhere: one object, put by one stream, which object
        stores (S3, GCS, Azure) show only when it is complete; a filesystem that shows files while they
        grow (HDFS, NFS behind fsspec) may show a part for an instant.
        """
        path = self.path(relative)
        if self.is_local:
            _write_local(path, data)
            return
        parent = path.rpartition("/")[0]
        if parent and parent not in self._made:  # asked for once: on an object store each time is a request
            self._filesystem.create_dir(parent, recursive=True)
            self._made.add(parent)
        # compression=None: pyarrow would otherwise compress by the name's extension.
        try:
            with self._filesystem.open_output_stream(path, compression=None) as stream:
                for piece in _pieces(data):
                    stream.write(piece)
        except Exception:
            self._made.discard(parent)  # somebody may have removed it: the next try makes it anew
            raise

    def write_new(self, relative: str, data: Data) -> bool:
        """Like `write_atomic`, but only where there is no file of that name; False when there is one.

        Of several processes that try it locally at the same time one succeeds. Object stores have no such
        operation: there the check comes before the write.
        """
        if self.is_local:
            return _write_local(self.path(relative), data, replace=False)
        if self.exists(relative):
            return False
        self.write_atomic(relative, data)
        return True

    def open_input(self, relative: str) -> pa.NativeFile:
        """A file open for random access; FileNotFoundError when it is not there."""
        return self._filesystem.open_input_file(self.path(relative))

    def read_bytes(self, relative: str) -> bytes:
        """The content of a file; FileNotFoundError when it is not there."""
        return bytes(self.read_buffer(relative).to_pybytes())

    def read_buffer(self, relative: str) -> pa.Buffer:
        """The content of a file as an Arrow buffer; FileNotFoundError when it is not there."""
        with self.open_input(relative) as stream:
            return stream.read_buffer()

    def move(self, relative: str, to: str) -> None:
        """Rename a file within the directory; FileNotFoundError when it is not there."""
        self._filesystem.move(self.path(relative), self.path(to))

    def exists(self, relative: str = "") -> bool:
        """Whether a file or directory is there; without a name, whether this directory is."""
        info = self._filesystem.get_file_info(self.path(relative))
        return bool(info.type != pafs.FileType.NotFound)

    def list_files(self, relative_dir: str, suffix: str) -> list[str]:
        """Sorted names, relative to the storage, of the files directly in `relative_dir` that end in `suffix`.

        Names starting with "." or "_" are left out; a directory that is not there is an empty one.
        """
        names = [info.base_name for info in self._entries(relative_dir) if info.type == pafs.FileType.File]
        prefix = f"{relative_dir}/" if relative_dir else ""
        return sorted(prefix + name for name in names if name.endswith(suffix) and not name.startswith(_HIDDEN))

    def list_directories(self, relative_dir: str = "") -> list[str]:
        """Sorted names, relative to the storage, of the directories directly in `relative_dir`, but hidden ones."""
        names = [info.base_name for info in self._entries(relative_dir) if info.type == pafs.FileType.Directory]
        prefix = f"{relative_dir}/" if relative_dir else ""
        return sorted(prefix + name for name in names if not name.startswith("."))

    def _entries(self, relative_dir: str) -> list[pafs.FileInfo]:
        selector = pafs.FileSelector(self.path(relative_dir), allow_not_found=True)
        return list(self._filesystem.get_file_info(selector))

    def delete_temporaries(self, relative_dir: str) -> None:
        """Delete what a process that was killed in the middle of `write_atomic` has left in a local directory.

        Only where no other process writes there.
        """
        for info in self._entries(relative_dir) if self.is_local else ():
            if info.base_name.startswith(".") and info.base_name.endswith(".tmp"):
                with suppress(OSError):
                    self._filesystem.delete_file(info.path)

    def delete(self, relative: str) -> None:
        """Delete a file; that it is gone already is fine."""
        with suppress(FileNotFoundError):
            self._filesystem.delete_file(self.path(relative))


def _pieces(data: Data) -> Iterable[bytes | pa.Buffer]:
    return [data] if isinstance(data, bytes | pa.Buffer) else data


def _write_local(path: str, data: Data, *, replace: bool = True) -> bool:
    """Write through a temporary name; whatever goes wrong, nothing of it stays. Whether the file is ours."""
    parent, name = os.path.split(path)
    os.makedirs(parent, exist_ok=True)
    # The name is cut because the temporary one must fit into 255 bytes, too.
    temporary = os.path.join(parent, f".{name[:32]}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as stream:
            for piece in _pieces(data):
                stream.write(piece)
            stream.flush()
            os.fsync(stream.fileno())
        if replace:
            os.replace(temporary, path)
        else:
            os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
    _sync_directory(parent)
    return True


def _sync_directory(path: str) -> None:
    """Make a rename durable. Where directories cannot be synced the file is still whole, so that is no error."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)
