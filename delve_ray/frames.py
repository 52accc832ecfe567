"""Files of float64 arrays under a header: the store's snapshots, and deltas that wait on disk.

A frame is an Arrow IPC stream, which any Arrow library reads: the header is JSON in the schema's metadata, each array
a record batch with the one column `values`. Behind the stream, where its readers have stopped, stand the SHA-256 of
all bytes before it and a mark: a file that was cut, or in which a bit has changed, is told from a whole one. Nothing
in it is ever executed or unpickled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from delve_ray.errors import ReadError
from delve_ray.moments import F64

FORMAT = 1
"""Raised when a frame changes its meaning; a newer one is refused by name."""
_MARK = b"delveray"
_END = b"\xff\xff\xff\xff\x00\x00\x00\x00"  # ends an Arrow IPC stream
_TAIL = hashlib.sha256().digest_size + len(_MARK)


def encode(kind: str, header: dict[str, Any], arrays: Iterable[F64]) -> Iterator[bytes | pa.Buffer]:
    """The pieces of a frame, to be written one after the other.

    `header` is what JSON can hold; `arrays` are one-dimensional, float64, and taken one at a time, so that no more
    than one of them is copied at once.
    """
    digest = hashlib.sha256()
    metadata = {"delve_ray.frame": str(FORMAT), "delve_ray.kind": kind, "delve_ray.header": json.dumps(header)}
    schema = pa.schema([pa.field("values", pa.float64(), nullable=False)], metadata=metadata)
    for piece in _messages(schema, arrays):
        digest.update(piece)
        yield piece
    yield digest.digest() + _MARK


def _messages(schema: pa.Schema, arrays: Iterable[F64]) -> Iterator[bytes | pa.Buffer]:
    yield schema.serialize()
    for array in arrays:
        values = np.ascontiguousarray(array, np.float64)
        # As pa.array does, but that imports pandas, if it is there.
        column = pa.Array.from_buffers(pa.float64(), values.size, [None, pa.py_buffer(values)])
        yield pa.record_batch([column], schema=schema).serialize()
    yield _END


def decode(data: bytes | pa.Buffer, kind: str, where: str) -> tuple[dict[str, Any], Sequence[F64]]:
    """The header and the arrays of a frame; the arrays are views of `data`.

    Raises ReadError, naming `where`, for a frame that is cut, changed, of another kind, or of a newer format.
    """
    view = memoryview(data).cast("B")  # Arrow's buffers count signed bytes
    if len(view) < _TAIL or view[-len(_MARK) :] != _MARK:
        raise ReadError(f"{where} is cut: it does not end as a whole file does")
    if hashlib.sha256(view[:-_TAIL]).digest() != view[-_TAIL : -len(_MARK)]:
        raise ReadError(f"{where} is damaged: its content does not have its checksum")
    try:
        with pa.ipc.open_stream(pa.py_buffer(view[:-_TAIL])) as stream:
            metadata = {key.decode(): value for key, value in (stream.schema.metadata or {}).items()}
            version = int(metadata["delve_ray.frame"])
            if version > FORMAT:
                raise ReadError(f"{where} has format {version}, newer than {FORMAT}; upgrade delve_ray to read it")
            found = metadata["delve_ray.kind"].decode()
            if found != kind:
                raise ReadError(f"{where} holds a {found}, not a {kind}")
            header = json.loads(metadata["delve_ray.header"])
            arrays = [batch.column(0).to_numpy() for batch in stream]
    except (KeyError, ValueError, OSError, pa.ArrowException) as error:
        if isinstance(error, ReadError):
            raise
        raise ReadError(f"{where} is no {kind} of delve_ray ({type(error).__name__}: {error})") from error
    if not isinstance(header, dict) or any(array.dtype != np.float64 for array in arrays):
        raise ReadError(f"{where} is no {kind} of delve_ray: its header or its arrays are of another type")
    return header, arrays
