"""A run's directory on any filesystem that pyarrow.fs opens: whole files in, whole files out."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable
from contextlib import suppress
from typing import TypeAlias
from urllib.parse import parse_qsl, unquote, urlsplit

import pyarrow as pa
import pyarrow.fs as pafs

from delve_ray.errors import OptionError
from delve_ray.savefiles import absolute as absolute
from delve_ray.savefiles import check_savefile as check_savefile
from delve_ray.savefiles import is_absolute as is_absolute
from delve_ray.savefiles import is_uri
from delve_ray.savefiles import masked as masked
from delve_ray.savefiles import uri_of as uri_of

Data: TypeAlias = "bytes | pa.Buffer | Iterable[bytes | pa.Buffer]"
"""What a file is written from: bytes, or pieces that are written one after the other."""

_FLAT = ("s3", "gcs")
"""Filesystems without directories: a file needs none, and a request for each part of its path would be for nothing."""
_HIDDEN = (".", "_")

S3_ATTEMPTS = 4
"""How often a request to S3 is made that fails by the network or because the server is busy, with growing pauses: some
five seconds in all. Writers try again after that for as long as it takes; readers do not."""
S3_CONNECT_S, S3_SILENT_S = 5.0, 5.0
"""How long a connection to S3 may take, and how long it may move no byte, before that attempt counts as failed."""
GCS_RETRY_S = 30
"""How long the client of Google Cloud Storage repeats a request that fails; by itself it does so for 15 minutes."""
_S3_TEXTS = frozenset({"region", "scheme", "endpoint_override", "tls_ca_file_path"})
_S3_FLAGS = frozenset({"allow_bucket_creation", "allow_bucket_deletion", "check_directory_existence_before_creation"})
_READS = 5
"""How often a file is read anew that was replaced while it was read."""


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
        self._text = text if filesystem is None else None
        if filesystem is not None:
            self._filesystem, self._root = filesystem, text.rstrip("/") or text
        elif is_uri(text):
            self._filesystem, self._root = self._open_uri(text)
        else:
            self._filesystem, self._root = pafs.LocalFileSystem(), text
        if self.is_local:
            self._root = self._uri = self._text = os.path.abspath(self._root)
        self._made: set[str] = set()

    def _open_uri(self, text: str) -> tuple[pafs.FileSystem, str]:
        try:
            filesystem, root = pafs.FileSystem.from_uri(_bounded(text))
            if isinstance(filesystem, getattr(pafs, "S3FileSystem", ())):  # not in every build of pyarrow
                filesystem = _persistent_s3(text, filesystem)
        except (OSError, ValueError, pa.ArrowException) as error:
            reason = str(error).replace(_bounded(text), self._uri)
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

    @property
    def savefile(self) -> str:
        """What opens this storage in any process: a path, or a URI with its password, so not for files or messages.

        Raises OptionError on a filesystem of the caller's own that no URI describes.
        """
        text = self._text or uri_of(self._filesystem, self._root)
        if text is None:
            kind = self._filesystem.type_name
            raise OptionError(f"{self._uri}: no URI describes this {kind!r} filesystem; give a path or a URI")
        return text

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
            below._uri = _below(self._uri, relative)
            below._text = _below(self._text, relative) if self._text else None
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
        grow (HDFS, NFS behind fsspec) may show a part for an instant. There the pieces are taken before anything
        is sent, for a stream cannot be given up: closed, it would leave a part as if it were the file.
        """
        path = self.path(relative)
        if self.is_local:
            _write_local(path, data)
            return
        pieces = list(_pieces(data))
        parent = path.rpartition("/")[0]
        if parent and parent not in self._made and self._filesystem.type_name not in _FLAT:
            self._filesystem.create_dir(parent, recursive=True)
            self._made.add(parent)
        # compression=None: pyarrow would otherwise compress by the name's extension.
        try:
            with self._filesystem.open_output_stream(path, compression=None) as stream:
                for piece in pieces:
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
        """The content of a file as an Arrow buffer; FileNotFoundError when it is not there.

        Where a file is replaced while it is read, the content is that of before or after.
        """
        for _ in range(_READS):
            with self.open_input(relative) as stream:
                found = stream.size()
                try:
                    buffer = stream.read_buffer()
                except OSError:
                    if not self.is_local and not self.exists(relative):  # it went in between
                        raise FileNotFoundError(f"{self._uri}/{relative} was removed") from None
                    raise
            # An object is asked for its size first, and then for so many bytes of what is there by then.
            if self.is_local or found == buffer.size == self._filesystem.get_file_info(self.path(relative)).size:
                return buffer
        raise OSError(f"{self._uri}/{relative} was replaced each of {_READS} times that it was read")

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


def _below(uri: str, relative: str) -> str:
    base, mark, query = uri.partition("?")
    return f"{base.rstrip('/')}/{relative}{mark}{query}"


def _bounded(uri: str) -> str:
    """A URI whose filesystem does not repeat a request for minutes; a user's own bound stays."""
    if urlsplit(uri).scheme not in ("gs", "gcs") or "retry_limit_seconds=" in uri:
        return uri
    return f"{uri}{'&' if '?' in uri else '?'}retry_limit_seconds={GCS_RETRY_S}"


def _persistent_s3(uri: str, found: pafs.S3FileSystem) -> pafs.S3FileSystem:
    """The filesystem of an S3 URI, which retries and waits as said above, and puts a small file by one request.

    No URI can say that. What pyarrow makes of one waits for a silent server for a minute and a half, and asks a busy
    one five times a second. With options that only a URI has (tls_verify_certificates, smart_defaults) it is left so.
    """
    parts = urlsplit(uri)
    given = dict(parse_qsl(parts.query))
    given.pop("allow_delayed_open", None)
    if not given.keys() <= _S3_TEXTS | _S3_FLAGS:
        return found
    options = {name: given[name] for name in _S3_TEXTS & given.keys()}
    flags = {name: given[name].lower() in ("true", "1") for name in _S3_FLAGS & given.keys()}
    keys = [None if part is None else unquote(part) for part in (parts.username, parts.password)]
    return pafs.S3FileSystem(
        **{"region": found.region} | options | flags,
        access_key=keys[0],
        secret_key=keys[1],
        allow_delayed_open=True,
        connect_timeout=S3_CONNECT_S,
        request_timeout=S3_SILENT_S,
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=S3_ATTEMPTS),
    )


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
