"""`make profile`: where the time of our hooks goes, for each workload, on the CPU.

A hook that torch calls before all others starts the profiler, and one that was registered after the tracker's stops
it, so that only what the tracker does inside the training step is seen: no forward, no backward. Nothing here knows
the names of what is inside, but for the words by which calls are put into phases; what no word fits is shown as such.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

import delve_ray
from tests.benchmarks.models import WORKLOADS, Workload
from tests.benchmarks.report import aligned
from tests.benchmarks.steps import STATS, Trainer
from tests.benchmarks.timing import no_garbage_collection
from tests.benchmarks.trackers import attach_ours

PACKAGE = str(Path(delve_ray.__file__).parent)

# In this order: the first phase with a word that is a part of the name decides.
CALLS = {
    "product": ("mm", "matmul", "syrk", "outer", "linear", "mkldnn"),
    "float64 add": ("add", "axpy"),
    "copy and centre": (
        "sub",
        "copy",
        "mean",
        "sum",
        "div",
        "contiguous",
        "clone",
        "index_select",
        "cat",
        "transpose_",
    ),
    "looking at values": ("item", "amax", "max", "min", "any", "all", "isfinite", "abs", "equal", "square", "reduce"),
    "views": ("view", "reshape", "movedim", "permute", "expand", "detach", "unsqueeze", "flatten", "stride", "size"),
}
"""Phases of what torch and numpy do, by parts of a call's name."""
FILES = {
    "entry": ("hooks", "recorder", "tracker", "compiled"),
    "reading rows": ("layers", "rows", "feature_maps", "masks"),
}
"""Phases of our own code, by file; the rest is the accumulators'. numpy's ufuncs are no calls to a profiler: their
time is that of the function that uses them."""
FOLD = "fold"
"""What functions with this in their name do themselves, and what they call: once for many batches."""
OWN = "accumulating: own code and numpy"
OTHER = "other calls"
PHASES = (*FILES, *CALLS, FOLD, OWN, OTHER)

Key = tuple[str, int, str]
"""A function, as pstats names it: file, line, name."""


def phase_of(key: Key) -> str:
    """The phase of a function's own time.

    >>> phase_of(("~", 0, "<built-in method torch.mm>")), phase_of((PACKAGE + "/layers.py", 7, "rows"))
    ('product', 'reading rows')
    >>> phase_of(("~", 0, "<built-in method torch._ops.mkldnn.>"))
    'product'
    """
    file, _, name = key
    if file.startswith(PACKAGE):
        if FOLD in name:
            return FOLD
        stem = Path(file).stem
        return next((phase for phase, files in FILES.items() if stem in files), OWN)
    # "<method 'sub' of 'torch._C.TensorBase' objects>", "<built-in method torch.mm>", or a function of torch's
    call = name.split("'")[1] if "'" in name else name.strip("<>.").rpartition(".")[2]
    return next((phase for phase, words in CALLS.items() if any(word in call for word in words)), OTHER)


class Watch:
    """Times or profiles what the tracker's hooks do, by kind of layer."""

    def __init__(self, model: nn.Module, layers: tuple[str, ...]) -> None:
        self.profiles: dict[str, cProfile.Profile] = {}
        self.seconds: dict[str, float] = {}
        self.layers = layers
        self._modules = {id(module): name for name, module in model.named_modules() if name in layers}
        self._model = model
        self._profiling = False
        self._start = 0.0

    @contextmanager
    def watching(self, *, profiling: bool) -> Iterator[None]:
        """Within, forwards are measured: by the clock, or by the profiler, which costs time itself."""
        self._profiling = profiling
        handles = [register_module_forward_hook(self._begin)]
        handles += [module.register_forward_hook(self._end) for module in self._watched()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _watched(self) -> list[nn.Module]:
        return [module for module in self._model.modules() if id(module) in self._modules]

    def _begin(self, module: nn.Module, _: Any, __: Any) -> None:
        if id(module) not in self._modules:
            return
        if self._profiling:
            self.profiles.setdefault(kind(module), cProfile.Profile()).enable()
        self._start = time.perf_counter()

    def _end(self, module: nn.Module, _: Any, __: Any) -> None:
        seconds = time.perf_counter() - self._start
        if self._profiling:
            self.profiles[kind(module)].disable()
        else:
            self.seconds[kind(module)] = self.seconds.get(kind(module), 0.0) + seconds


def kind(module: nn.Module) -> str:
    """Name of a layer's kind."""
    return "LSTM" if isinstance(module, nn.LSTM) else type(module).__name__


@dataclass(frozen=True, slots=True)
class Spent:
    """Calls and own seconds of a function; `folding` are the seconds when a function that folds has called it."""

    calls: int = 0
    own: float = 0.0
    folding: float = 0.0

    def __add__(self, other: Spent) -> Spent:
        return Spent(self.calls + other.calls, self.own + other.own, self.folding + other.folding)


def own_times(profile: cProfile.Profile) -> dict[Key, Spent]:
    """What each function took, without the hooks that switch the profiler."""
    stats: Any = pstats.Stats(profile)
    here = Path(__file__).name
    found = {}
    for key, (_, calls, own, _, callers) in stats.stats.items():
        if Path(key[0]).name == here or "_lsprof.Profiler" in key[2] or "perf_counter" in key[2]:
            continue
        folding = sum(times[2] for caller, times in callers.items() if phase_of(caller) == FOLD)
        found[key] = Spent(calls, own, min(own, folding))
    return found


# --- the tables ----------------------------------------------------------------------------------------


def label(key: Key) -> str:
    """A function for people: ours by file, built-in ones by their name."""
    file, line, name = key
    if file.startswith(PACKAGE):
        return f"{Path(file).relative_to(PACKAGE)}:{line} {name}"
    return name if file == "~" else f"{Path(file).name}:{line} {name}"


def functions_table(profiles: dict[str, cProfile.Profile], steps: int, rows: int) -> str:
    """Functions by own time, over all kinds of layers."""
    total: dict[Key, Spent] = {}
    for profile in profiles.values():
        for key, spent in own_times(profile).items():
            total[key] = total.get(key, Spent()) + spent
    everything = sum(spent.own for spent in total.values())
    cells: list[tuple[str, ...]] = [("ms/step", "share", "calls/step", "function")]
    for key, spent in sorted(total.items(), key=lambda item: -item[1].own)[:rows]:
        share = f"{spent.own / everything:.0%}"
        cells.append((f"{spent.own / steps * 1e3:.3f}", share, f"{spent.calls / steps:.2f}", label(key)))
    return aligned(cells)


def phases_table(profiles: dict[str, cProfile.Profile], seconds: dict[str, float], steps: int) -> str:
    """Milliseconds per step by phase and kind of layer; the last line is what the clock says without a profiler."""
    kinds = list(profiles)
    spent = {name: dict.fromkeys(PHASES, 0.0) for name in kinds}
    for name, profile in profiles.items():
        for key, took in own_times(profile).items():
            spent[name][phase_of(key)] += took.own - took.folding
            spent[name][FOLD] += took.folding
    cells: list[tuple[str, ...]] = [("phase, ms/step", *kinds)]
    for phase in PHASES:
        if any(spent[name][phase] for name in kinds):
            cells.append((phase, *(f"{spent[name][phase] / steps * 1e3:.3f}" for name in kinds)))
    cells.append(("together", *(f"{sum(spent[name].values()) / steps * 1e3:.3f}" for name in kinds)))
    cells.append(("without the profiler", *(f"{seconds.get(name, 0.0) / steps * 1e3:.3f}" for name in kinds)))
    return aligned(cells)


def profile(workload: Workload, steps: int, rows: int) -> str:
    """The report on one workload."""
    torch.manual_seed(0)
    trainer = Trainer(workload.build(), workload)
    with (
        tempfile.TemporaryDirectory() as folder,
        attach_ours(trainer.model, Path(folder), STATS, nosave=True) as tracker,
        no_garbage_collection(),
    ):
        watch = Watch(trainer.model, tracker.layers)
        for number in range(3):
            trainer.step(number)
        start = time.perf_counter()
        with watch.watching(profiling=False):
            _train(trainer.step, steps)
        step_s = (time.perf_counter() - start) / steps
        with watch.watching(profiling=True):
            _train(trainer.step, steps)
    hooks_s = sum(watch.seconds.values()) / steps
    return (
        f"{workload.name}: {workload.text}\n"
        f"{len(watch.layers)} hooks take {hooks_s * 1e3:.3f} ms of a step of {step_s * 1e3:.3f} ms\n\n"
        f"{phases_table(watch.profiles, watch.seconds, steps)}\n\n{functions_table(watch.profiles, steps, rows)}\n"
    )


def _train(step: Callable[[int], None], steps: int) -> None:
    for number in range(steps):
        step(number)


def main() -> None:
    """Print the reports."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.profile", description=__doc__)
    parser.add_argument("--steps", type=int, default=24, help="steps that are measured, and profiled (24)")
    parser.add_argument("--rows", type=int, default=14, help="functions that are shown (14)")
    parser.add_argument("--only", default="", help="workloads with this in their name")
    options = parser.parse_args()
    for workload in WORKLOADS:
        if options.only.lower() in workload.name.lower():
            print(profile(workload, options.steps, options.rows), flush=True)


if __name__ == "__main__":
    main()
