"""Destinations of published windows, one small file each, behind one interface (`writers.base.Writer`)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches

from delve_ray.errors import OptionError
from delve_ray.storage import Storage
from delve_ray.writers.base import Scalar, Writer

__all__ = ["Scalar", "Writer", "check_save_to", "make_writers"]

AVAILABLE = ("parquet", "tensorboard")
NOT_YET = ("csv", "npy", "console", "print", "plot")
"""Delve's names for writers that do not exist here so far."""


def check_save_to(save_to: str | Iterable[str]) -> tuple[str, ...]:
    """The names in `save_to`, each once, in their order.

    Raises OptionError for an empty list or an unknown name, and NotImplementedError for a writer that does
    not exist yet or for a writer instance in place of a name.

    >>> check_save_to(["parquet", "tensorboard", "parquet"])
    ('parquet', 'tensorboard')
    """
    if save_to is None:
        raise OptionError(f"save_to=None: name at least one of {_quoted(AVAILABLE)}")
    names = (save_to,) if isinstance(save_to, str) or not isinstance(save_to, Iterable) else tuple(save_to)
    if not names:
        raise OptionError(f"save_to={save_to!r} is empty: name at least one of {_quoted(AVAILABLE)}")
    for name in names:
        _check_name(name)
    return tuple(dict.fromkeys(names))


def make_writers(save_to: str | Iterable[str], storage: Storage) -> list[Writer]:
    """One writer for each name in `save_to`, writing under `storage`.

    Packages that only one writer needs are imported when that writer is made. Raises what `check_save_to`
    raises, and what a writer's construction raises.
    """
    return [_make(name, storage) for name in check_save_to(save_to)]


def _make(name: str, storage: Storage) -> Writer:
    if name == "parquet":
        from delve_ray.writers.parquet import ParquetWriter

        return ParquetWriter(storage)
    from delve_ray.writers.tensorboard import TensorBoardWriter

    return TensorBoardWriter(storage)


def _check_name(name: object) -> None:
    if not isinstance(name, str):
        raise NotImplementedError(
            f"save_to={name!r}: writer instances cannot be given yet; name one of {_quoted(AVAILABLE)}"
        )
    if name in NOT_YET:
        raise NotImplementedError(f"save_to={name!r} is not available yet; available: {_quoted(AVAILABLE)}")
    if name not in AVAILABLE:
        close = get_close_matches(name.lower(), AVAILABLE, n=1)
        meant = f" Did you mean {close[0]!r}?" if close else ""
        raise OptionError(f"save_to={name!r} is unknown; valid: {_quoted(AVAILABLE)}.{meant}")


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names)
