"""The metrics of the last published windows, as every rank of a run gets them with an answer that is due anyway."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

MOST_ALONG = 8_000
"""Metrics that an answer brings along. They take some 90 KB, and Ray puts answers of more than 100 KB into its object
store, each on its own. Where there are more, whoever is told that they are there asks for them."""
_LENGTH = struct.Struct("<I")


class Metrics(Mapping[str, float]):
    """Metric keys and float64 values, which do not change.

    They are pickled as bytes that are made once, however many ranks are told, and read where somebody looks: eight
    for each value, and two to four for its key, as keys compress well.

    Example:
        >>> import pickle
        >>> metrics = Metrics({"saturation/train/fc": 0.25, "alpha/train/fc": float("nan")})
        >>> copy = pickle.loads(pickle.dumps(metrics))
        >>> copy["saturation/train/fc"], list(copy) == list(metrics), len(copy)
        (0.25, True, 2)
    """

    __slots__ = ("_packed", "_values")

    def __init__(self, values: Mapping[str, float] | None = None) -> None:
        self._values: dict[str, float] | None = dict(values or {})
        self._packed: bytes | None = None

    @property
    def packed(self) -> bytes:
        """All as bytes: the length of the compressed JSON list of the keys, that list, and the values."""
        if self._packed is None:
            values = self._known()
            keys = zlib.compress(json.dumps(list(values)).encode())
            self._packed = _LENGTH.pack(len(keys)) + keys + np.array(list(values.values()), "<f8").tobytes()
        return self._packed

    def _known(self) -> dict[str, float]:
        if self._values is None:
            packed = self._packed or b""
            start, end = _LENGTH.size, _LENGTH.size + _LENGTH.unpack_from(packed)[0]
            keys = json.loads(zlib.decompress(packed[start:end]))
            self._values = dict(zip(keys, np.frombuffer(packed, "<f8", offset=end).tolist(), strict=True))
        return self._values

    def __getitem__(self, key: str) -> float:
        return self._known()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._known())

    def __len__(self) -> int:
        return len(self._known())

    def __repr__(self) -> str:
        return f"Metrics({self._known()})"

    def __reduce__(self) -> tuple[Any, ...]:
        return unpacked, (self.packed,)


def unpacked(packed: bytes) -> Metrics:
    """What `Metrics.packed` has made bytes of."""
    metrics = Metrics()
    metrics._values, metrics._packed = None, packed
    return metrics
