"""What a table's rows agree in, by numpy, and without pandas.

Arrow imports pandas, where it is installed, when it makes an array or a scalar of a Python or numpy object, converts
one to numpy, filters by an expression or groups. That takes longer than a small run takes to read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

I64 = npt.NDArray[np.int64]

_SPARE = 16
"""A table may have so many places per row, used or not: that is faster than sorting the rows."""


class Keys:
    """A table's columns as integers that compare as their values do; null comes first."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table
        self._columns: dict[str, tuple[I64, int]] = {}

    def codes(self, names: Sequence[str]) -> I64:
        """One integer per row, from 0, that compares as the tuple of the row's values in `names` does."""
        codes = np.zeros(self._table.num_rows, np.int64)
        for name in names:
            if name not in self._columns:
                self._columns[name] = _encode(self._table.column(name))
            column, count = self._columns[name]
            codes = column if name == names[0] else codes * count + column
        return codes


def _encode(column: pa.ChunkedArray) -> tuple[I64, int]:
    """A column's codes, and the number that is above all of them."""
    if pa.types.is_integer(column.type) and not column.null_count and len(column):
        values = numbers(column)
        low, high = int(values.min()), int(values.max())
        if high - low <= _SPARE * len(column):  # steps and attempts: no table of them is needed
            return values.astype(np.int64) - low, high - low + 1
    encoded = column.combine_chunks().dictionary_encode(null_encoding="encode")
    rank = np.zeros(len(encoded.dictionary), np.int64)
    rank[numbers(pc.array_sort_indices(encoded.dictionary, null_placement="at_start"))] = np.arange(rank.size)
    return rank[numbers(encoded.indices)], max(rank.size, 1)


def dense(codes: I64) -> I64:
    """The codes, or where they leave too many numbers out others in the same order."""
    if not codes.size or codes.max() <= _SPARE * codes.size:
        return codes
    dense: I64 = np.unique(codes, return_inverse=True)[1]
    return dense


def int64_array(values: I64) -> pa.Array:
    """The values as Arrow has them."""
    return pa.Array.from_buffers(pa.int64(), values.size, [None, pa.py_buffer(np.ascontiguousarray(values, np.int64))])


def matching(table: pa.Table, **values: str | int) -> pa.Table:
    """The rows that have these values in these columns.

    >>> matching(pa.table({"phase": ["train", "eval"], "step": [1, 1]}), phase="eval", step=1).to_pylist()
    [{'phase': 'eval', 'step': 1}]
    """
    for name, value in values.items():
        if isinstance(value, str):
            text = value.encode()
            ends = pa.py_buffer(np.array([0, len(text)], np.int32))
            array = pa.Array.from_buffers(pa.string(), 1, [None, ends, pa.py_buffer(text)])
        else:
            array = int64_array(np.array([value]))
        table = table.filter(pc.equal(table.column(name), array[0]))
    return table


def numbers(column: pa.Array | pa.ChunkedArray) -> npt.NDArray[Any]:
    """A column of numbers without nulls as a numpy array."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return np.from_dlpack(array)
