"""Deltas as files: what a worker cannot deliver, or holds on disk until it can.

One file is one delta under all that a store needs to take it: the run's configuration and layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from delve_ray.errors import ReadError
from delve_ray.frames import decode, encode
from delve_ray.moments import F64
from delve_ray.store.protocol import Delta, LayerInfo, Source, StoreConfig
from delve_ray.store.state import config_header, config_of, scalar_header, scalar_of


@dataclass(frozen=True, slots=True)
class Parcel:
    """A delta out of a file, with what belongs to it.

    `buffer` is a view of the file's content; `first` says that the delta is the first of its window.
    """

    delta: Delta
    buffer: F64
    first: bool
    config: StoreConfig
    layers: tuple[LayerInfo, ...]


def parcel_name(delta: Delta) -> str:
    """A file name for a delta, made of numbers alone; those of one source sort by sequence number.

    Names that a user gave have no part in it. The source's own is a hexadecimal number.
    """
    return f"delta-{delta.attempt:06d}-{delta.source.rank:06d}-{delta.source.source[:12]}-{delta.seq:010d}.arrow"


def encode_parcel(
    delta: Delta, buffer: F64, config: StoreConfig, layers: Sequence[LayerInfo], *, first: bool
) -> Iterator[bytes | pa.Buffer]:
    """The pieces of a file."""
    values = asdict(delta) | {"scalars": [scalar_header(scalar) for scalar in delta.scalars]}
    for name in ("weights", "samples"):
        if not values[name]:  # as files were before there were any, which others may still read
            del values[name]
    header = {
        "delta": values,
        "config": config_header(config),
        "layers": [asdict(layer) for layer in layers],
        "first": first,
    }
    return encode("delta", header, [buffer])


def decode_parcel(data: bytes | pa.Buffer, where: str) -> Parcel:
    """The delta of a file. Raises ReadError, naming `where`, for what is none."""
    header, arrays = decode(data, "delta", where)
    try:
        (buffer,) = arrays
        return Parcel(
            delta_of(header["delta"]),
            buffer,
            bool(header["first"]),
            config_of(header["config"]),
            tuple(LayerInfo(**layer) for layer in header["layers"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ReadError(f"{where} does not describe a delta ({type(error).__name__}: {error})") from error


def delta_of(values: Mapping[str, Any]) -> Delta:
    """A delta's header out of JSON, which has lists where there were tuples."""
    return Delta(
        **{
            **values,
            "source": Source(**values["source"]),
            "entries": _tuples(values["entries"]),
            "widths": _tuples(values["widths"]),
            "scalars": tuple(map(scalar_of, values["scalars"])),
            "weights": tuple(map(float, values.get("weights", ()))),
            "samples": _tuples(values.get("samples", ())),
        }
    )


def _tuples(items: Iterable[Iterable[int]]) -> tuple[Any, ...]:
    return tuple(map(tuple, items))
