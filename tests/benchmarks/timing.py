"""Paired measurements: variants take turns within one process, and only ratios between them are read.

A sample is the mean time of a block of consecutive calls, not of one call: work that a variant does only every
few calls then counts as it should, which the median over single calls would hide. Medians are taken over samples,
so a disturbance from outside spoils few of them.
"""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

Samples = npt.NDArray[np.float64]
"""Seconds per call, shape (samples,); the same index in two variants was measured side by side."""

_RESAMPLES = 4000
_CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with its bootstrap interval (95 %)."""

    value: float
    low: float
    high: float


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Keep Python's cyclic collector out of the measurement."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def stopwatch(device: str) -> Callable[[Callable[[], object]], float]:
    """What takes a call and returns its seconds: on the host by its clock, on a GPU by the device's events.

    The device is idle when a call begins: what another variant left to it does not count here.
    """
    if torch.device(device).type == "cpu":

        def on_host(call: Callable[[], object]) -> float:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start

        return on_host
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def on_device(call: Callable[[], object]) -> float:
        torch.cuda.synchronize(device)
        begin.record(torch.cuda.current_stream(device))
        call()
        end.record(torch.cuda.current_stream(device))
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3

    return on_device


def alternate(
    variants: Mapping[str, Callable[[int], object]],
    *,
    calls: int,
    block: int,
    warmup: int,
    before: Callable[[str, int], object] | None = None,
    device: str = "cpu",
) -> dict[str, Samples]:
    """Call all variants in turn, `calls` times each, and return the mean seconds per call of each block.

    The order changes from call to call through all permutations, so that each variant follows each other one
    equally often. A variant gets the number of the call; `before` gets its name as well and is not timed. The
    first `warmup` calls are not counted. `device` is where the work is done, see `stopwatch`.
    """
    watch = stopwatch(device)
    orders = itertools.cycle(itertools.permutations(variants))
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    with no_garbage_collection():
        for call in range(warmup + calls):
            for name in next(orders):
                if before is not None:
                    before(name, call)
                elapsed = watch(partial(variants[name], call))
                if call >= warmup:
                    seconds[name].append(elapsed)
    whole = calls - calls % block
    return {name: np.array(times[:whole]).reshape(-1, block).mean(axis=1) for name, times in seconds.items()}


def calls_lasting(seconds: float, call: Callable[[], object], device: str = "cpu") -> int:
    """About how many calls take this long; at least one."""
    watch = stopwatch(device)
    watch(call)
    return max(1, round(seconds / max(watch(call), 1e-9)))


def joined(rounds: Sequence[dict[str, Samples]]) -> dict[str, Samples]:
    """The samples of several rounds, one after the other."""
    return {name: np.concatenate([samples[name] for samples in rounds]) for name in rounds[0]}


def median(samples: Samples) -> Estimate:
    """Median of samples."""
    return _bootstrap(lambda pick: np.median(samples[pick], axis=-1), samples.shape[0])


def ratio(numerator: Samples, denominator: Samples) -> Estimate:
    """Ratio of two medians of paired samples."""
    return _bootstrap(
        lambda pick: np.median(numerator[pick], axis=-1) / np.median(denominator[pick], axis=-1), numerator.shape[0]
    )


def extra(tracked: Samples, untracked: Samples) -> Estimate:
    """median(tracked) − median(untracked)."""
    return _bootstrap(
        lambda pick: np.median(tracked[pick], axis=-1) - np.median(untracked[pick], axis=-1), tracked.shape[0]
    )


def ratio_of_extras(ours: Samples, theirs: Samples, untracked: Samples) -> Estimate:
    """extra(ours) / extra(theirs), resampled together."""

    def statistic(pick: npt.NDArray[np.intp]) -> Samples:
        base = np.median(untracked[pick], axis=-1)
        return np.asarray((np.median(ours[pick], axis=-1) - base) / (np.median(theirs[pick], axis=-1) - base))

    return _bootstrap(statistic, ours.shape[0])


def quartiles(differences: Samples) -> tuple[float, float, float]:
    """First quartile, median and third quartile."""
    low, middle, high = np.quantile(differences, [0.25, 0.5, 0.75])
    return float(low), float(middle), float(high)


def _bootstrap(statistic: Callable[[npt.NDArray[np.intp]], Samples], count: int) -> Estimate:
    """The statistic of all samples, and its percentile interval over resampled indices."""
    value = float(statistic(np.arange(count)[None])[0])
    picks = np.random.default_rng(0).integers(0, count, (_RESAMPLES, count))
    low, high = np.quantile(statistic(picks), [(1 - _CONFIDENCE) / 2, (1 + _CONFIDENCE) / 2])
    return Estimate(value, float(low), float(high))
