"""Destinations of published windows, one small file each, behind one interface (`writers.base.Writer`).

A writer is named, or given as an object. Names beside those of `BUILT_IN` come from packages: an entry point in the
group `delve_ray.writers` names a class, or a function, that makes a writer from the options in `writer_args`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, TypeAlias

from delve_ray.errors import DelveRayError, OptionError
from delve_ray.schema import PublishedWindow
from delve_ray.writers.base import Scalar, Writer, WriterRun

__all__ = [
    "SaveTo",
    "Scalar",
    "Writer",
    "WriterRun",
    "check_save_to",
    "check_writer_args",
    "given_writers",
    "make_writers",
    "open_writers",
]

log = logging.getLogger(__name__)

BUILT_IN = {
    "parquet": "delve_ray.writers.parquet:ParquetWriter",
    "tensorboard": "delve_ray.writers.tensorboard:TensorBoardWriter",
    "csv": "delve_ray.writers.csv:CsvWriter",
    "npy": "delve_ray.writers.npy:NpyWriter",
    "plot": "delve_ray.writers.plot:PlotWriter",
    "console": "delve_ray.writers.console:ConsoleWriter",
    "wandb": "delve_ray.writers.wandb:WandbWriter",
    "mlflow": "delve_ray.writers.mlflow:MlflowWriter",
}
"""Where each writer is; a package that only one needs is imported when that one is opened."""
FILES = ("parquet", "tensorboard", "csv", "npy")
"""Writers of a record whose files lie in the run's directory, and nowhere else."""
_OF_A_STORAGE = ("parquet", "tensorboard")
"""Writers that are made for a directory: others use them without a store."""
ALIASES = {
    "print": ("console",),
    "tb": ("tensorboard",),
    **dict.fromkeys(("plotcsv", "csvplot", "csvplotting"), ("csv", "plot")),
}
"""Delve's names: the writers that each means, of which the last takes its options."""
DELVE_OPTIONS = {"figsize": "plot", "fontsize": "plot", "zip": "npy"}
"""Delve's writer_args have no writer's name before them: whose each is."""
DELVE_REFUSED = {
    "primary_metric": "add_scalar records a metric beside the spectra, and read_scalars reads it",
    "plot_manipulation_func": "delve_ray.analysis.plots makes the same pictures as figures to change",
    "savepath": "the files lie in the savefile's directory",
}
"""Those that are not there, and what is there for them."""
GROUP = "delve_ray.writers"
"""Entry points of other packages' writers."""
SaveTo: TypeAlias = str | Writer | Iterable[str | Writer]
_METHODS = ("open", "write", "write_scalars", "close")


def check_save_to(save_to: SaveTo) -> tuple[str, ...]:
    """The names in `save_to`, those of writer objects included, each once, in their order.

    Delve's other names are taken for the writers that they mean. Raises OptionError for an empty list, an unknown name,
    an object that is no writer, or two of one name.

    >>> check_save_to(["parquet", "tensorboard", "parquet"]), check_save_to("plotcsv")
    (('parquet', 'tensorboard'), ('csv', 'plot'))
    """
    if save_to is None:
        raise OptionError(f"save_to=None: name at least one of {_quoted(available())}")
    items = _items(save_to)
    if not items:
        raise OptionError(f"save_to={save_to!r} is empty: name at least one of {_quoted(available())}")
    names = [name for item in items for name in _checked(item)]
    for name in [writer.name for writer in given_writers(save_to)]:
        if names.count(name) > 1 or name in BUILT_IN:
            raise OptionError(f"save_to={save_to!r}: two writers are called {name!r}; give each a name of its own")
    return tuple(dict.fromkeys(names))


def given_writers(save_to: Any) -> tuple[Writer, ...]:
    """The writer objects in a `save_to` that was checked."""
    return tuple(item for item in _items(save_to) if not isinstance(item, str))


def check_writer_args(writer_args: Any, save_to: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Options of the writers in `save_to`, by name.

    Delve gives them without the writer's name, which is found. Raises OptionError for a name that is not there, and
    options that are none.

    >>> check_writer_args({"figsize": (9, 5), "print": {"table": True}}, ["plot", "console"])
    {'plot': {'figsize': (9, 5)}, 'console': {'table': True}}
    """
    if writer_args is None:
        return {}
    if not isinstance(writer_args, Mapping):
        raise OptionError(f"writer_args is a {type(writer_args).__name__}, not a dict of options by writer")
    args: dict[str, dict[str, Any]] = {}
    for key, value in writer_args.items():
        name, options = _owned(str(key), value, save_to)
        if name not in save_to or not isinstance(options, Mapping):
            raise OptionError(
                f"writer_args has {key!r}; give options by the writer's name, such as "
                f"{{{save_to[0] if save_to else 'csv'!r}: {{…}}}}; save_to has {_quoted(save_to)}"
            )
        args.setdefault(name, {}).update(options)
    return args


def _owned(key: str, value: Any, save_to: Sequence[str]) -> tuple[str, Any]:
    """A writer's name and its options, out of an entry of `writer_args`."""
    if key in save_to or key in ALIASES:
        return ALIASES.get(key, (key,))[-1], value
    if key in DELVE_REFUSED:
        raise OptionError(f"writer_args has {key!r}, which no writer takes: {DELVE_REFUSED[key]}")
    if key in DELVE_OPTIONS and DELVE_OPTIONS[key] not in save_to:
        raise OptionError(
            f"writer_args has {key!r}, an option of {DELVE_OPTIONS[key]!r}, and save_to has {_quoted(save_to)}; "
            f"leave it out, or name {DELVE_OPTIONS[key]!r} in save_to"
        )
    return (DELVE_OPTIONS[key], {key: value}) if key in DELVE_OPTIONS else (key, value)


def make_writers(
    save_to: Sequence[str],
    run: WriterRun,
    args: Mapping[str, Mapping[str, Any]] | None = None,
    given: Sequence[Writer] = (),
) -> list[Writer]:
    """One writer for each name in `save_to`: of that name among `given`, or made from its options in `args`.

    `open_writers` opens them. Raises what `check_save_to` raises, and OptionError for options that a writer does not
    take.
    """
    objects = {writer.name: writer for writer in given}
    names = dict.fromkeys(name for item in save_to for name in ((item,) if item in objects else _checked(item)))
    return [objects[name] if name in objects else _make(name, (args or {}).get(name, {}), run) for name in names]


def open_writers(writers: Sequence[Writer], run: WriterRun, *, later: bool = False) -> list[Writer]:
    """Open writers; where one refuses, those before it are closed.

    With `later`, as for a store that goes on with a run, one that cannot be opened is opened with its first write, and
    until then it is like one whose destination is away. Raises what they raise; OptionError for errors of their own.
    """
    opened: list[Writer] = []
    try:
        for writer in writers:
            try:
                writer.open(run)
            except Exception as error:
                if not later:
                    raise _refused(writer, error) from error
                log.error("writer %s cannot be opened, which is tried again: %s", writer.name, error)
                writer = Unopened(writer, run)
            opened.append(writer)
    except BaseException:
        for writer in opened:
            writer.close()
        raise
    return opened


def _refused(writer: Writer, error: Exception) -> Exception:
    if isinstance(error, DelveRayError | NotImplementedError):
        return error
    return OptionError(f"save_to={writer.name!r} cannot begin: {type(error).__name__}: {error}")


class Unopened:
    """A writer that could not be opened: each call tries again, and fails as a destination does that is away."""

    def __init__(self, writer: Writer, run: WriterRun) -> None:
        self.name = writer.name
        self._writer, self._run, self._open = writer, run, False

    def open(self, run: WriterRun) -> None:
        """Open the writer, if it is not open."""
        if not self._open:
            try:
                self._writer.open(run)
            except Exception as error:
                raise OSError(f"it cannot be opened: {error}") from error
            self._open = True

    def write(self, window: PublishedWindow) -> None:
        """See `Writer`."""
        self.open(self._run)
        self._writer.write(window)

    def write_scalars(self, scalars: list[Scalar]) -> None:
        """See `Writer`."""
        self.open(self._run)
        self._writer.write_scalars(scalars)

    def close(self) -> None:
        """See `Writer`."""
        if self._open:
            self._writer.close()


def available() -> tuple[str, ...]:
    """Names that `save_to` takes here."""
    return tuple(dict.fromkeys([*BUILT_IN, *(point.name for point in entry_points(group=GROUP))]))


def _items(save_to: Any) -> tuple[Any, ...]:
    single = isinstance(save_to, str) or not isinstance(save_to, Iterable)
    return (save_to,) if single else tuple(save_to)


def _make(name: str, options: Mapping[str, Any], run: WriterRun) -> Writer:
    if name in BUILT_IN:
        module, _, attribute = BUILT_IN[name].partition(":")
        make: Any = getattr(import_module(module), attribute)
    else:
        (point, *_) = entry_points(group=GROUP, name=name)
        try:
            make = point.load()
        except (ImportError, AttributeError) as error:
            raise OptionError(f"save_to={name!r}: the package that has it cannot be imported ({error})") from error
    try:
        writer = make(*[run.storage] * (name in _OF_A_STORAGE), **options)
    except TypeError as error:
        raise OptionError(f"writer_args={{{name!r}: {dict(options)}}} does not fit: {error}") from error
    return _check_writer(writer, name)


def _checked(item: object) -> tuple[str, ...]:
    """The names that an item of `save_to` means."""
    if not isinstance(item, str):
        return (_check_writer(item, None).name,)
    if item in ALIASES:
        return ALIASES[item]
    if item not in BUILT_IN and item not in available():
        close = get_close_matches(item.lower(), available(), n=1)
        meant = f" Did you mean {close[0]!r}?" if close else ""
        raise OptionError(f"save_to={item!r} is unknown; valid: {_quoted(available())}.{meant}")
    return (item,)


def _check_writer(writer: Any, name: str | None) -> Writer:
    lacking = [method for method in _METHODS if not callable(getattr(writer, method, None))]
    own = getattr(writer, "name", None)
    if isinstance(writer, type) or lacking or not isinstance(own, str) or not own:
        what = f"the class {writer.__name__}" if isinstance(writer, type) else repr(writer)
        lacks = ", ".join([*(["name"] if not isinstance(own, str) or not own else []), *lacking]) or "an instance"
        raise OptionError(
            f"save_to={what} is no writer, it lacks {lacks}: give one of {_quoted(available())}, or an object with "
            f"what delve_ray.writers.Writer has"
        )
    if name is not None and own != name:
        writer.name = name
    checked: Writer = writer
    return checked


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names)
