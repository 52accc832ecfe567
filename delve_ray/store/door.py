"""What a delta has to be before the store looks at it: the checks at the door, each with an error that names all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from delve_ray.errors import DeltaRefused
from delve_ray.moments import F64, diagonal_places
from delve_ray.reservoir import UNBOUNDED, packed_size
from delve_ray.schema import PHASES
from delve_ray.sketch import WHOLE, SketchRule
from delve_ray.store.protocol import Bundle, Delta, Held, LayerInfo, Source, checksum
from delve_ray.store.scanning import scan
from delve_ray.writers.base import Scalar

_INT32, _INT64 = 1 << 31, 1 << 63
MAX_COUNT = 1 << 62
"""Observations of one layer in one window stay below this, so that their sum over two deltas is an int64."""
MAX_ROWS = 1 << 48
"""Observations of one layer that a delta may bring: days of them, at a billion a second. So no single delta takes a
count beyond `MAX_COUNT`, which with shards one of them alone would see, when others have merged their part."""
MAX_WEIGHT = 2.0**100
"""Weights stay below this and not under its inverse, so that neither their sums nor quotients leave float64."""
MAX_SAMPLE = 1 << 24
"""Rows of one layer that a delta may bring."""
_ROUNDING = 1e-9
"""By what share of it a sum of weights may differ from one that was added up in another order."""
MAX_NAME = 4096
"""Characters of a scalar's name."""


def refusal(delta: Delta, what: str) -> DeltaRefused:
    """The error that names a delta and what is wrong with it."""
    source = delta.source
    return DeltaRefused(
        f"delta {delta.seq} of rank {source.rank} (run {source.run!r}, attempt {delta.attempt}, pid {source.pid} "
        f"on {source.host}) is refused: {what}"
    )


def check_delta(delta: Any, buffer: Any, run: str, layers: Sequence[LayerInfo], rule: SketchRule = WHOLE) -> list[int]:
    """Turn away whatever cannot be moments of this run's layers. Returns the width of each entry.

    What comes out of another process may be of any type, and unfinished: nothing of it is called or compared before
    its type is known, and whatever fails all the same is a refusal.

    Checks the types and ranges of the header, the run, the entries (layer, phase, counts, weights, repetitions), the
    scalars, the buffer (dtype, shape, finite), what makes a scatter one (no negative diagonal; nothing at all without
    observations), and last the checksum, which notices a changed bit that all of this lets pass. `rule` says which
    layers' scatters are sketches. Raises DeltaRefused.
    """
    widths = check_form(delta, buffer, run, layers, rule)
    check_content(delta, buffer, widths, layers, rule, *_scanned(buffer))
    return widths


def check_form(delta: Any, buffer: Any, run: str, layers: Sequence[LayerInfo], rule: SketchRule = WHOLE) -> list[int]:
    """What of `check_delta` does not look at the buffer's values. Returns the width of each entry."""
    with _refusing():
        return _check_form(delta, buffer, run, layers, rule, MAX_ROWS)


def check_content(
    delta: Delta,
    buffer: F64,
    widths: Sequence[int],
    layers: Sequence[LayerInfo],
    rule: SketchRule,
    words: int,
    finite: bool,
) -> None:
    """The rest of `check_delta`, where `check_form` has passed; `words` and `finite` are what `scan` says."""
    with _refusing():
        sizes = _sample_sizes(delta, widths)
        without = any(n == 0 for _, _, n, _ in delta.entries)
        if not finite or without or (buffer[_diagonals(tuple(widths), rule)] < 0).any():
            _check_moments(delta, buffer, widths, layers, rule)
        if sizes:
            _check_samples(delta, buffer[buffer.size - sum(sizes) :], sizes, layers)
        if delta.checksum != checksum(delta, words):
            raise refusal(delta, "its checksum is not that of its content, which was changed on the way")


def _scanned(buffer: F64) -> tuple[int, bool]:
    with _refusing():
        return scan(buffer)


def _check_form(
    delta: Delta, buffer: F64, run: str, layers: Sequence[LayerInfo], rule: SketchRule, most: int
) -> list[int]:
    _check_header(delta, run)
    _check_scalars(delta)
    widths = _entry_widths(delta, layers, most)
    sampled = _sample_sizes(delta, widths)
    expected = sum(map(rule.moments_size, widths)) + sum(sampled)
    if type(buffer) is not np.ndarray or buffer.dtype != np.float64 or buffer.shape != (expected,):
        found = f"{buffer.dtype} of shape {buffer.shape}" if type(buffer) is np.ndarray else type(buffer).__name__
        raise refusal(delta, f"its buffer is {found}, its entries need float64 of shape ({expected},)")
    return widths


def check_bundle(
    bundle: Any, buffer: Any, run: str, layers: Sequence[LayerInfo], rule: SketchRule = WHOLE
) -> list[int]:
    """Turn away what cannot be deltas of this run that were merged with each other. Returns the width of each entry.

    The total and the buffer are checked as a delta and its buffer are. Each header is checked as a delta's, has the
    total's attempt, token and window, and is of a source of its own; entries, counts, widths, weights and samples
    have to add up to the total's. The checksum is that of all headers. Raises DeltaRefused.
    """
    widths = check_bundle_form(bundle, buffer, run, layers, rule)
    check_content(bundle.total, buffer, widths, layers, rule, *_scanned(buffer))
    return widths


def check_bundle_form(
    bundle: Any, buffer: Any, run: str, layers: Sequence[LayerInfo], rule: SketchRule = WHOLE
) -> list[int]:
    """What of `check_bundle` does not look at the buffer's values. Returns the width of each entry."""
    with _refusing():
        if type(bundle) is not Bundle or type(bundle.headers) is not tuple or not bundle.headers:
            raise DeltaRefused(f"{type(bundle).__name__} is no bundle of deltas, and is refused")
        for header in bundle.headers:
            _check_header(header, run)
            _check_scalars(header)
            _sample_sizes(header, _entry_widths(header, layers, MAX_ROWS))
        widths = _check_form(bundle.total, buffer, run, layers, rule, MAX_COUNT)
        _check_sum(bundle.headers, bundle.total, layers)
        if not _is_integer(bundle.checksum, 1 << 32) or bundle.checksum != bundle.fingerprint():
            raise refusal(bundle.total, "the checksum of its bundle is not that of its headers, which were changed")
        return widths


def _check_sum(headers: Sequence[Delta], total: Delta, layers: Sequence[LayerInfo]) -> None:
    """Refuse headers that do not belong together, or do not add up to their total."""
    of_all = (total.attempt, total.window, total.source.token)
    for header in headers:
        if (header.attempt, header.window, header.source.token) != of_all:
            raise refusal(header, f"its bundle is of attempt {total.attempt}, window {total.window}")
    if len({header.source.source for header in headers}) < len(headers):
        raise refusal(total, "its bundle has a source twice")
    counts: dict[tuple[int, int], tuple[int, int, float]] = {}
    samples: dict[tuple[int, int], tuple[int, float]] = {}
    for header in headers:
        for index, (layer, phase, n, nonfinite) in enumerate(header.entries):
            before = counts.get((layer, phase), (0, 0, 0.0))
            counts[layer, phase] = before[0] + n, before[1] + nonfinite, before[2] + header.weight(index)
        for layer, phase, rows, bound in header.samples:
            offered, lowest = samples.get((layer, phase), (0, UNBOUNDED))
            samples[layer, phase] = offered + rows, min(lowest, bound)
    found = {entry[:2]: (*entry[2:], total.weight(index)) for index, entry in enumerate(total.entries)}
    if found.keys() != counts.keys() or set(total.widths) != {width for header in headers for width in header.widths}:
        raise refusal(total, "its bundle has other layers than its headers")
    if bool(total.weights) != any(header.weights for header in headers):
        raise refusal(total, "its bundle has weights, or its headers have, and the other has not")
    for key, (n, nonfinite, weight) in found.items():
        expected = counts[key]
        if (n, nonfinite) != expected[:2] or abs(weight - expected[2]) > _ROUNDING * expected[2]:
            raise refusal(
                total,
                f"layer {layers[key[0]].name} counts {n} observations, {nonfinite} non-finite rows and a weight of "
                f"{weight} in its bundle, and {expected} in its headers",
            )
    for layer, phase, rows, bound in total.samples:
        offered, lowest = samples.pop((layer, phase), (-1, 0.0))
        if rows > offered or bound > lowest:
            raise refusal(total, f"layer {layers[layer].name} has a sample of rows that its headers do not have")
    if samples:
        raise refusal(total, "its bundle lacks samples of rows that its headers have")


def _check_moments(
    delta: Delta, buffer: F64, widths: Sequence[int], layers: Sequence[LayerInfo], rule: SketchRule
) -> None:
    """Name the layer whose moments cannot be, if there is one."""
    start = 0
    for (layer, phase, n, _), features in zip(delta.entries, widths, strict=True):
        moments = buffer[start : start + rule.moments_size(features)]
        start += moments.shape[0]
        where = f"layer {layers[layer].name}, phase {PHASES[phase]}"
        if not np.isfinite(moments).all():
            raise refusal(delta, f"{where} has non-finite moments")
        if n == 0 and moments.any():
            raise refusal(delta, f"{where} has moments without observations")
        if (moments[_diagonals((features,), rule)] < 0).any():
            raise refusal(delta, f"{where} has a scatter with a negative diagonal")


def _sample_sizes(delta: Delta, widths: Sequence[int]) -> list[int]:
    """Values of each reservoir; each belongs to an entry, once."""
    width_of = {entry[:2]: width for entry, width in zip(delta.entries, widths, strict=True)}
    sizes = []
    for layer, phase, rows, _ in delta.samples:
        features = width_of.pop((layer, phase), None)
        if features is None:
            raise refusal(
                delta, f"it has rows of layer index {layer}, phase index {phase}, which is no entry, or twice"
            )
        if not 0 <= rows < MAX_SAMPLE:
            raise refusal(delta, f"it has {rows} rows of layer index {layer}")
        sizes.append(packed_size(rows, features))
    return sizes


def _check_samples(delta: Delta, packed: F64, sizes: Sequence[int], layers: Sequence[LayerInfo]) -> None:
    """Refuse keys that cannot be; the moments before them are finite."""
    start = 0
    for (layer, phase, rows, bound), size in zip(delta.samples, sizes, strict=True):
        keys = packed[start : start + rows]
        where = f"layer {layers[layer].name}, phase {PHASES[phase]}"
        if not np.isfinite(packed[start : start + size]).all():
            raise refusal(delta, f"{where} has non-finite rows in its sample")
        if not 0.0 < bound <= UNBOUNDED or (rows and (keys[0] < 0 or keys[-1] >= bound or (np.diff(keys) < 0).any())):
            raise refusal(delta, f"{where} has a sample whose keys do not ascend from 0 to its bound")
        start += size


@lru_cache(maxsize=8)
def _diagonals(widths: tuple[int, ...], rule: SketchRule) -> npt.NDArray[np.intp]:
    """Where the diagonals of all scatters lie in a delta's buffer; a run has few combinations of layers."""
    places, start = [np.empty(0, np.intp)], 0
    for features in widths:
        diagonal = np.arange(features, dtype=np.intp) if rule.columns(features) else diagonal_places(features)
        places.append(start + features + diagonal)
        start += rule.moments_size(features)
    return np.concatenate(places)


def _is_integer(value: Any, below: int, at_least: int = 0) -> bool:
    return type(value) is int and at_least <= value < below


@contextmanager
def _refusing() -> Iterator[None]:
    """Whatever goes wrong within is a refusal."""
    try:
        yield
    except DeltaRefused:
        raise
    except Exception as error:
        raise DeltaRefused(f"a delta is refused: it is malformed ({type(error).__name__})") from None


def source_of(delta: Any, run: str) -> Source:
    """The source of a delta of this run, or of what claims to be one. Raises DeltaRefused."""
    with _refusing():
        source = delta.source if type(delta) is Delta else None
        _check_source(source, run)
        assert source is not None
        return source


def check_source(source: Any, run: str) -> None:
    """Turn away what is no source of this run. Raises DeltaRefused."""
    with _refusing():
        _check_source(source, run)


def _check_source(source: Any, run: str) -> None:
    if type(source) is not Source:
        raise DeltaRefused(f"a delta from {type(source).__name__}, which is no source, is refused")
    texts = (source.run, source.token, source.source, source.host)
    if not all(type(text) is str and len(text) <= MAX_NAME and _is_text(text) for text in texts):
        raise DeltaRefused("a delta is refused: its source's run, token, source and host are not all names")
    if not (_is_integer(source.rank, _INT32) and _is_integer(source.pid, _INT64)):
        raise DeltaRefused(f"a delta of run {source.run!r} is refused: its rank or pid is no number")
    if source.run != run:
        raise DeltaRefused(
            f"a delta of rank {source.rank} (pid {source.pid} on {source.host}) is refused: it belongs to run "
            f"{source.run!r}, this is the store of run {run!r}"
        )


def _check_header(delta: Delta, run: str) -> None:
    if type(delta) is not Delta:
        raise DeltaRefused(f"{type(delta).__name__} is no delta, and is refused")
    _check_source(delta.source, run)
    for name in ("seq", "window", "attempt"):
        if not _is_integer(getattr(delta, name), _INT32 if name == "attempt" else MAX_COUNT):
            raise DeltaRefused(f"a delta of rank {delta.source.rank} is refused: its {name} is no such number")
    if not _is_integer(delta.step, _INT64, -_INT64):
        raise refusal(delta, "its step is no 64-bit integer")
    if not all(type(getattr(delta, name)) is bool for name in ("closes", "labelled", "complete")):
        raise refusal(delta, "closes, labelled and complete are not all True or False")
    for name, length in (("entries", 4), ("widths", 2)):
        items = getattr(delta, name)
        if type(items) is not tuple or not all(
            type(item) is tuple and len(item) == length and all(_is_integer(value, _INT64, -_INT64) for value in item)
            for item in items
        ):
            raise refusal(delta, f"its {name} are no tuples of {length} 64-bit integers")
    if type(delta.weights) is not tuple or not all(type(weight) is float for weight in delta.weights):
        raise refusal(delta, "its weights are no tuple of floats")
    if type(delta.samples) is not tuple or not all(
        type(item) is tuple
        and [type(value) for value in item] == [int, int, int, float]
        and all(_is_integer(value, _INT64, -_INT64) for value in item[:3])
        for item in delta.samples
    ):
        raise refusal(delta, "its samples are no tuples of a layer, a phase, a number of rows and a bound")
    if not _is_integer(delta.checksum, 1 << 96):
        raise refusal(delta, "its checksum is no such number")


def _check_scalars(delta: Delta) -> None:
    if type(delta.scalars) is not tuple:
        raise refusal(delta, "its scalars are no tuple")
    for scalar in delta.scalars:
        if type(scalar) is not Scalar:
            raise refusal(delta, f"a {type(scalar).__name__} among its scalars")
        name_fits = type(scalar.name) is str and 0 < len(scalar.name) <= MAX_NAME and _is_text(scalar.name)
        if not name_fits or type(scalar.value) is not float or type(scalar.wall_time) is not datetime:
            raise refusal(delta, "a scalar whose name, value or time is none")
        rank_fits = type(scalar.rank) is int and scalar.rank == delta.source.rank
        if not _is_integer(scalar.step, _INT64, -_INT64) or not rank_fits:
            raise refusal(delta, f"scalar {scalar.name!r} has a step or a rank that cannot be")
        if (
            type(scalar.run) is not str
            or type(scalar.attempt) is not int
            or type(scalar.trial) not in (str, type(None))
        ):
            raise refusal(delta, f"scalar {scalar.name!r} has a run, a trial or an attempt that is none")


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return True


def _entry_widths(delta: Delta, layers: Sequence[LayerInfo], most: int) -> list[int]:
    """The width of each entry; refuses entries and widths that contradict the layers or each other.

    Counts stay below `most`.
    """
    said: dict[int, int] = {}
    for layer, features in delta.widths:
        _check_layer(delta, layer, layers)
        known = layers[layer].features
        if features < 1 or features != (known or features):
            raise refusal(delta, f"layer {layers[layer].name} has {features} features, and was registered with {known}")
        if said.setdefault(layer, features) != features:
            raise refusal(delta, f"layer {layers[layer].name} has {said[layer]} and {features} features")
    seen: set[tuple[int, int]] = set()
    widths = []
    for layer, phase, n, nonfinite in delta.entries:
        _check_layer(delta, layer, layers)
        name = layers[layer].name
        if not 0 <= phase < len(PHASES):
            raise refusal(delta, f"phase index {phase} of layer {name}, but the phases are {PHASES}")
        if not 0 <= n < most or not 0 <= nonfinite < most:
            raise refusal(delta, f"layer {name} counts {n} observations and {nonfinite} non-finite rows")
        if (layer, phase) in seen:
            raise refusal(delta, f"layer {name} stands twice in phase {PHASES[phase]}")
        seen.add((layer, phase))
        width = layers[layer].features or said.get(layer)
        if width is None:
            raise refusal(delta, f"it does not say how many features layer {name} has")
        widths.append(width)
    _check_weights(delta, layers)
    return widths


def _check_weights(delta: Delta, layers: Sequence[LayerInfo]) -> None:
    """Refuse weights that are not one for each entry, or that cannot be the sum of its observations' weights."""
    if delta.weights and len(delta.weights) != len(delta.entries):
        raise refusal(delta, f"it has {len(delta.weights)} weights for {len(delta.entries)} entries")
    for (layer, _, n, _), weight in zip(delta.entries, delta.weights, strict=False):
        fits = 1 / MAX_WEIGHT <= weight < MAX_WEIGHT if n else weight == 0.0
        if not fits:  # nor does NaN
            raise refusal(delta, f"layer {layers[layer].name} has a weight of {weight} for {n} observations")


def _check_layer(delta: Delta, layer: int, layers: Sequence[LayerInfo]) -> None:
    if not 0 <= layer < len(layers):
        raise refusal(delta, f"layer index {layer}, but the run has {len(layers)} layers")


def check_total(delta: Delta, layer: str, before: int, n: int) -> None:
    """Turn away what would make a layer's count one that a file cannot hold. Raises DeltaRefused."""
    if before + n >= MAX_COUNT:
        raise refusal(delta, f"layer {layer} would count {before + n} observations in one window")


def check_held(held: Any) -> None:
    """Turn away a source that says nonsense about what it still has. Raises DeltaRefused."""
    with _refusing():
        numbers = type(held) is Held and (held.attempt, held.seq, held.window)
        if not numbers or not all(_is_integer(number, _INT32) for number in numbers) or type(held.whole) is not bool:
            raise DeltaRefused("a registration is refused: what its source still has is not told in numbers")
