"""Frames: what was written is what is read, and whatever is not whole is refused by name."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from delve_ray.errors import ReadError
from delve_ray.frames import FORMAT, decode, encode

HEADER = {"run": "a/../b<script>", "list": [1, None, 2.5], "nested": {"é": True}}
FLOATS = hnp.arrays(np.float64, st.integers(0, 40), elements=st.floats(allow_nan=True, width=64))


def frame(header: dict[str, Any] | None = None, arrays: Any = (), kind: str = "test") -> bytes:
    return b"".join(bytes(piece) for piece in encode(kind, HEADER if header is None else header, arrays))


@given(arrays=st.lists(FLOATS, max_size=4))
def test_what_was_written_is_what_is_read(arrays: list[np.ndarray]) -> None:
    header, found = decode(pa.py_buffer(frame(arrays=arrays)), "test", "file")
    assert header == HEADER
    assert [array.tobytes() for array in found] == [array.tobytes() for array in arrays], "to the bit, NaN included"
    assert all(array.dtype == np.float64 for array in found)


def test_any_arrow_library_reads_it() -> None:
    with pa.ipc.open_stream(frame(arrays=[np.arange(3.0), np.arange(2.0)])) as stream:
        assert [batch.column("values").to_pylist() for batch in stream] == [[0, 1, 2], [0, 1]]
        assert json.loads(stream.schema.metadata[b"delve_ray.header"]) == HEADER


def test_every_changed_byte_and_every_cut_is_noticed() -> None:
    whole = frame({"a": 1}, [np.arange(4.0)])
    for position in range(len(whole)):
        changed = bytearray(whole)
        changed[position] ^= 1 << position % 8
        with pytest.raises(ReadError, match=r"the file is (damaged|cut)"):
            decode(bytes(changed), "test", "the file")
    for length in range(len(whole)):
        with pytest.raises(ReadError, match=r"the file is (damaged|cut)"):
            decode(whole[:length], "test", "the file")


def resealed(content: bytes) -> bytes:
    return content + hashlib.sha256(content).digest() + b"delveray"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (frame(kind="other"), "holds a other, not a test"),
        (resealed(b"not an arrow stream"), "is no test of delve_ray"),
        (resealed(b""), "is no test of delve_ray"),
        (frame(header=[]), "its header or its arrays are of another type"),  # type: ignore[arg-type]
    ],
)
def test_what_is_whole_and_something_else_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(ReadError, match=message):
        decode(data, "test", "the file")


def stream(metadata: dict[str, str], values: Any) -> bytes:
    batch = pa.record_batch([values], schema=pa.schema([pa.field("values", values.type)], metadata=metadata))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return resealed(sink.getvalue().to_pybytes())


def test_a_newer_format_is_refused_by_name() -> None:
    metadata = {"delve_ray.frame": str(FORMAT + 1), "delve_ray.kind": "test", "delve_ray.header": "{}"}
    with pytest.raises(ReadError, match=f"has format {FORMAT + 1}, newer than {FORMAT}; upgrade"):
        decode(stream(metadata, pa.array([1.0])), "test", "the file")


def test_arrays_of_another_type_are_refused() -> None:
    metadata = {"delve_ray.frame": str(FORMAT), "delve_ray.kind": "test", "delve_ray.header": "{}"}
    for values in (pa.array([1], pa.int64()), pa.array([1.0], pa.float32()), pa.array(["x"])):
        with pytest.raises(ReadError, match="the file"):
            decode(stream(metadata, values), "test", "the file")
