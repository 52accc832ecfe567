"""The last embeddings of a run, for TensorBoard's projector."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping

from delve_ray.schema import F64, LayerRow
from delve_ray.storage import Storage

CONFIG = "projector_config.pbtxt"
"""What TensorBoard looks for beside the event files."""
_ENTRY = re.compile(
    r'^embeddings \{ tensor_name: "(.*)" tensor_path: "(projector/[0-9a-f]{16}\.tsv)" \}$', re.MULTILINE
)


def write_embeddings(storage: Storage, folder: str, rows: Mapping[str, F64]) -> None:
    """Put points (k, 2), by name, where TensorBoard's projector finds them, below `folder` of the storage.

    Points of the same name replace those of before, others stay. Raises OSError when the storage does.
    """
    known = _known(storage, folder)
    for name, points in rows.items():
        path = f"projector/{hashlib.sha256(name.encode()).hexdigest()[:16]}.tsv"
        lines = "".join(f"{x!r}\t{y!r}\n" for x, y in points.tolist())
        storage.write_atomic(f"{folder}/{path}", lines.encode())
        known[_escaped(name)] = path
    entries = (f'embeddings {{ tensor_name: "{name}" tensor_path: "{path}" }}' for name, path in known.items())
    storage.write_atomic(f"{folder}/{CONFIG}", ("\n".join(entries) + "\n").encode())


def embedding_names(rows: list[LayerRow]) -> dict[str, F64]:
    """The embeddings of a window's rows, by the names that the projector lists."""
    return {f"{row.phase}/{row.layer}": row.embedding for row in rows if row.embedding is not None}


def _known(storage: Storage, folder: str) -> dict[str, str]:
    """What is listed there already, by escaped name."""
    try:
        return dict(_ENTRY.findall(storage.read_bytes(f"{folder}/{CONFIG}").decode()))
    except FileNotFoundError:
        return {}


def _escaped(name: str) -> str:
    r"""A text as protobuf's text format has it between double quotes: its bytes, all but the plain ones in octal.

    >>> _escaped('a"b.é')
    'a\\042b.\\303\\251'
    """
    plain = re.compile(rb"[A-Za-z0-9_./ -]")
    return "".join(
        chr(byte) if plain.fullmatch(bytes([byte])) else f"\\{byte:03o}" for byte in name.encode(errors="replace")
    )
