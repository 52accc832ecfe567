"""A run as the rules see it: the layers of its last complete windows, and what came before."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from delve_ray.analysis.table import printable
from delve_ray.analysis.windows import distinct, steps_of
from delve_ray.schema import F64, PHASES
from delve_ray.spectrum import effective_rank, intrinsic_dimensionality, rounding_reach

COLUMNS = (
    *("run", "phase", "step", "layer", "layer_type", "features", "samples", "nonfinite_rows", "workers", "world_size"),
    *("final", "threshold", "intrinsic_dimensionality", "trace", "effective_rank", "eigenvalues", "sketched"),
    *("mean_norm", "saturation_low", "saturation_high", "unseen_variance"),
)
"""What the rules read."""

ACTIVATIONS = frozenset(
    {
        *(
            "CELU",
            "ELU",
            "GELU",
            "GLU",
            "Hardshrink",
            "Hardsigmoid",
            "Hardswish",
            "Hardtanh",
            "LeakyReLU",
            "LogSigmoid",
        ),
        *("Mish", "PReLU", "ReLU", "ReLU6", "RReLU", "SELU", "Sigmoid", "SiLU", "Softplus", "Softshrink", "Softsign"),
        *("Tanh", "Tanhshrink", "Threshold"),
    }
)
"""Classes of torch.nn whose units can die."""
_PASSING = ("Dropout", "Norm", "Pool", "Pad", "Softmax")
_PASSING_NAMES = frozenset({"Identity", "Flatten", "Unflatten", "Upsample", "PixelShuffle", "Softmin", "Sequential"})

FEW = 2
"""Observations that there must be for each dimension k(δ), besides one for each feature."""

RESOLVED = 1e-13
"""Trace, as a share of the mean's squared norm, up to which float32 outputs are constant: its rounding, squared."""

Row: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer in the window that is judged; `eigenvalues` float64 (d,), descending, `k` the row's k(δ).

    Of a sketched layer they are the head of the spectrum, `k_low` and `k` are the ends of its interval, and the
    effective rank is NaN, which no rule finds anything in. Where the head does not explain the share δ, it is not
    `reached`: the ends may be far apart. Of other layers `k_low` is `k`.
    """

    name: str
    kind: str
    features: int
    samples: int
    nonfinite_rows: int
    threshold: float
    k_low: int
    k: int
    reached: bool
    trace: float
    effective_rank: float
    eigenvalues: F64
    sketched: bool
    mean_norm: float

    @property
    def shown(self) -> str:
        """The name as a sentence can have it."""
        return printable(self.name)

    @property
    def constant(self) -> bool:
        """Whether the output is the same for every observation, up to the rounding of float32."""
        return self.samples > 1 and self.trace <= RESOLVED * self.mean_norm**2

    @property
    def saturation(self) -> float:
        """k(δ)/d."""
        return self.k / max(self.features, 1)

    @property
    def saturation_low(self) -> float:
        """The least that k(δ)/d can be."""
        return self.k_low / max(self.features, 1)

    @property
    def dimensions(self) -> str:
        """k(δ) as a sentence can have it."""
        return f"{self.k:,}" if self.reached else f"{self.k_low:,} to {self.k:,}"

    @property
    def scarce(self) -> bool:
        """Whether there are too few observations to say anything: n < d or n - 1 < `FEW`·k(δ)."""
        return self.samples < self.features or self.samples - 1 < FEW * (self.k if self.reached else self.k_low)

    @property
    def untold(self) -> bool:
        """Whether the spectrum does not tell how much of the width is used."""
        return self.scarce or not self.reached

    def at(self, threshold: float) -> int:
        """Return k at another threshold δ."""
        return intrinsic_dimensionality(self.eigenvalues, threshold)

    @property
    def rank(self) -> int:
        """Eigenvalues above what rounding leaves."""
        return int(np.count_nonzero(self.eigenvalues > rounding_reach(self.eigenvalues)))


@dataclass(frozen=True, slots=True)
class Window:
    """The last complete window of one phase.

    `layers` are in network order, those without a finite spectrum left out; `overflowed` names the layers that had
    observations and a spectrum, or a trace, that is not finite; `nonfinite` has (non-finite rows, samples) of the
    layers that had such rows.
    """

    phase: str
    step: int
    layers: tuple[Layer, ...]
    overflowed: tuple[str, ...]
    nonfinite: Mapping[str, tuple[int, int]]

    @property
    def by_name(self) -> dict[str, Layer]:
        """Layers by their names."""
        return {layer.name: layer for layer in self.layers}


@dataclass(frozen=True, slots=True)
class History:
    """One layer over the complete windows of one phase: arrays of equal length, steps ascending, values finite."""

    layer: str
    steps: tuple[int, ...]
    traces: F64
    effective_ranks: F64
    scarce: bool
    """Whether one of the windows had fewer observations than features."""


@dataclass(frozen=True, slots=True)
class Run:
    """One run: its last complete window of each phase, and the history of each phase's layers."""

    name: str
    windows: Mapping[str, Window]
    histories: Mapping[str, tuple[History, ...]]
    described: Mapping[str, Any]

    @property
    def judged(self) -> Window:
        """The window that the network's shape is judged by.

        The one with fewer layers that it does not tell the use of; of two alike the later, then that of eval, which
        sees the weights of one moment and no dropout.
        """
        order = {"eval": 0, "train": 1}
        return min(
            self.windows.values(),
            key=lambda window: (
                not window.layers,
                sum(layer.untold for layer in window.layers),
                -window.step,
                order[window.phase],
            ),
        )


def is_passing(kind: str) -> bool:
    """Whether a class of modules has no width of its own to choose: activations, norms, pooling and the like."""
    return kind in ACTIVATIONS or kind in _PASSING_NAMES or any(part in kind for part in _PASSING)


def chain(layers: Iterable[Layer]) -> list[Layer]:
    """The layers with a width to choose, in network order: no activations, no norms, no blocks around other layers."""
    layers = list(layers)
    around = {""} | {name[:index] for name in (layer.name for layer in layers) for index in _dots(name)}
    return [layer for layer in layers if layer.name not in around and not is_passing(layer.kind)]


def _dots(name: str) -> list[int]:
    return [index for index, char in enumerate(name) if char == "."]


def read_run(spectra: pa.Table, described: Mapping[str, Any]) -> Run:
    """The spectra of one run as the rules see them; `described` is its run.json, or empty."""
    name = distinct(spectra.column("run"))[0]
    narrow = spectra.drop_columns(["eigenvalues"])  # which are most of a long run, and needed of one window
    windows: dict[str, Window] = {}
    histories: dict[str, tuple[History, ...]] = {}
    for phase in PHASES:
        of_phase = pc.field("phase") == phase
        steps = _complete_steps(narrow.filter(of_phase), phase)
        if steps:
            rows = spectra.filter(of_phase & (pc.field("step") == steps[-1])).to_pylist()
            windows[phase] = _window(rows, phase, steps[-1])
            histories[phase] = _histories(spectra, narrow, of_phase & pc.field("step").isin(steps))
    return Run(name, windows, histories, described)


def _complete_steps(of_phase: pa.Table, phase: str) -> list[int]:
    """The steps whose windows are closed by all workers, ascending; without any, the last step alone."""
    live = ~pc.field("final")
    lacking = pc.field("workers") < pc.field("world_size")
    cut = set(pc.unique(of_phase.filter(live | lacking).column("step")).to_pylist())
    steps = steps_of(of_phase, phase)
    return [step for step in steps if step not in cut] or steps[-1:]


def _window(rows: Sequence[Row], phase: str, step: int) -> Window:
    layers: list[Layer] = []
    overflowed: list[str] = []
    for row in rows:
        if not (row["samples"] and row["features"]):
            continue
        eigenvalues = np.asarray(row["eigenvalues"] or (), np.float64)  # a null in it becomes NaN
        trace = _trace(row, eigenvalues)
        if not (np.isfinite(eigenvalues).all() and math.isfinite(trace)):
            overflowed.append(row["layer"])
        elif eigenvalues.size or row["sketched"]:
            layers.append(_layer(row, eigenvalues, trace))
    nonfinite = {row["layer"]: (row["nonfinite_rows"], row["samples"] or 0) for row in rows if row["nonfinite_rows"]}
    return Window(phase, step, tuple(layers), tuple(overflowed), nonfinite)


def _layer(row: Row, eigenvalues: F64, trace: float) -> Layer:
    """One row, with what it lacks computed from its eigenvalues."""
    threshold, rank = row["threshold"] or 0.99, row["effective_rank"]
    low, k = _dimensions(row, eigenvalues, threshold)
    return Layer(
        row["layer"],
        row["layer_type"] or "",
        row["features"],
        row["samples"],
        row["nonfinite_rows"] or 0,
        threshold,
        low,
        k,
        not row["sketched"] or row["intrinsic_dimensionality"] is not None,
        trace,
        _effective_rank(row, eigenvalues) if rank is None or not math.isfinite(rank) else rank,
        eigenvalues,
        bool(row["sketched"]),
        row["mean_norm"] if row["mean_norm"] is not None and math.isfinite(row["mean_norm"]) else 0.0,
    )


def _dimensions(row: Row, eigenvalues: F64, threshold: float) -> tuple[int, int]:
    """The least and the most that k(δ) can be."""
    k, low, high = row["intrinsic_dimensionality"], row["saturation_low"], row["saturation_high"]
    if not row["sketched"]:
        k = intrinsic_dimensionality(eigenvalues, threshold) if k is None else k
        return k, k
    most = k if k is not None else row["features"] if high is None else round(high * row["features"])
    return (min(1, most) if low is None else round(low * row["features"])), most


def _trace(row: Row, eigenvalues: F64) -> float:
    """The trace; of a sketched layer, the head and what it lacks."""
    if row["trace"] is not None:
        return float(row["trace"])
    return float(eigenvalues.sum()) + (row["unseen_variance"] or 0.0)


def _effective_rank(row: Row, eigenvalues: F64) -> float:
    """That of the eigenvalues, NaN where they are the head of a sketched layer's."""
    return math.nan if row["sketched"] else effective_rank(eigenvalues)


def _histories(spectra: pa.Table, narrow: pa.Table, wanted: pc.Expression) -> tuple[History, ...]:
    """Each layer's traces and effective ranks; computed from the eigenvalues where the run did not ask for them.

    The effective ranks of a sketched layer are NaN.
    """
    columns = ["layer", "step", "samples", "features", "trace", "effective_rank", "sketched", "unseen_variance"]
    table = narrow.select([*columns, "phase"])
    if table.column("trace").null_count or table.column("effective_rank").null_count:
        table = spectra.select([*columns, "phase", "eigenvalues"])
    found: dict[str, list[tuple[int, float, float, bool]]] = {}
    for row in table.filter(wanted).to_pylist():
        trace, rank = row["trace"], row["effective_rank"]
        if (trace is None or rank is None) and (row["eigenvalues"] or row["sketched"]):
            eigenvalues = np.asarray(row["eigenvalues"] or (), np.float64)
            trace = _trace(row, eigenvalues)
            rank = _effective_rank(row, eigenvalues) if rank is None and np.isfinite(eigenvalues).all() else rank
        unbroken = rank is not None and (math.isfinite(rank) or row["sketched"])
        if row["samples"] and trace is not None and unbroken and math.isfinite(trace):
            scarce = row["samples"] < (row["features"] or 0)
            found.setdefault(row["layer"], []).append((row["step"], trace, rank, scarce))
    histories = []
    for layer, windows in found.items():
        windows.sort()
        steps, traces, ranks, scarce = zip(*windows, strict=True)
        histories.append(History(layer, steps, np.asarray(traces), np.asarray(ranks), any(scarce)))
    return tuple(histories)
