"""What the spectra say about a training that has gone wrong: dead layers and units, collapse."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from delve_ray.analysis.diagnosis.finding import OWN, Finding, Ranked, named, number, percent
from delve_ray.analysis.diagnosis.windows import ACTIVATIONS, RESOLVED, History, Layer, Run, Window, chain
from delve_ray.analysis.table import printable
from delve_ray.schema import F64

DEAD_SHARE = 1 / 4
"""Share of dead units, or of missing directions, from which they are named."""
INPUTS_BEFORE = 4
"""Layers before one, the narrowest of which is taken as the width of its input: blocks branch."""
ENOUGH = 4
"""Observations for each feature from which a missing direction is none that the sample lacks."""

EARLY = 0.2
"""Share of the windows, and at least one, that belongs to the early epochs, in which the rank falls as it should."""
MIN_WINDOWS = 3
RANK_LEFT = 0.5
"""Effective rank, at most, of its highest after the early windows that a collapsed layer has in the end."""
RANK_FROM = 2.0
"""That highest, at least: below, there is nothing to lose."""
TRACE_GONE = 1 / 1000
"""Trace, at most, of its highest that a vanished layer has in the end. Before a normalisation, weight decay alone takes
it down by a hundred without harm, but slowly; so less is enough only where it fell at once."""
TRACE_LEFT = 1 / 30
TRACE_FALL = 1 / 10
"""Trace, at most, of the window before, which is a fall at once."""
TRACE_JUMP = 1000.0
"""Growth of the trace from one window to the next, after the early ones."""

_RELU = "dead units: Lu et al., Dying ReLU and Initialization, arXiv 1903.06733"
_COLLAPSE = "rank collapse: Jing et al., ICLR 2022, arXiv 2110.09348"


def broken_findings(run: Run) -> list[Ranked]:
    """Dead layers and units, non-finite rows, collapse."""
    findings: list[Ranked] = []
    for window in run.windows.values():
        findings += [*_nonfinite(run, window), *_overflowed(run, window)]
    if constant := [layer.name for layer in run.judged.layers if layer.constant]:
        findings.append(_constant_finding(run, constant))
    findings += [ranked for layer in run.judged.layers if (ranked := _dead_units(run, layer)) is not None]
    return [*findings, *_missing_directions(run), *_collapsed(run)]


def _finding(
    run: Run, window: Window, kind: str, layers: Sequence[str], evidence: str, advice: str, rule: str, source: str
) -> Finding:
    return Finding(kind, tuple(layers), evidence, advice, rule, source, run.name, window.phase, window.step)


# --- dead ----------------------------------------------------------------------------------------------


def _nonfinite(run: Run, window: Window) -> list[Ranked]:
    if not window.nonfinite:
        return []
    shares = {layer: bad / (bad + good) for layer, (bad, good) in window.nonfinite.items()}
    worst = max(shares, key=lambda layer: shares[layer])
    bad, good = window.nonfinite[worst]
    evidence = (
        f"NaN or infinity in {len(shares)} layer{'s' if len(shares) > 1 else ''} ({named(list(shares))}): {bad} of "
        f"{bad + good} rows of {printable(worst)} ({percent(shares[worst])}); they are left out of its spectrum."
    )
    advice = (
        f"Look where it begins: {printable(next(iter(shares)))} is the first such layer. A smaller learning rate, "
        f"clipped gradients, or float32 where half precision overflows are what usually helps; else the input has "
        f"such values."
    )
    rule = "dead: any non-finite row in the last complete window"
    finding = _finding(run, window, "dead", list(shares), evidence, advice, rule, "definition")
    return [Ranked(finding, 2 + shares[worst])]


def _overflowed(run: Run, window: Window) -> list[Ranked]:
    if not window.overflowed:
        return []
    evidence = (
        f"The covariance of {named(window.overflowed)} is not finite: the squares of its outputs overflow float64."
    )
    advice = "The activations explode: a smaller learning rate, clipped gradients, or a normalisation before the layer."
    rule = "collapse: an eigenvalue or a trace that is not finite in the last complete window"
    finding = _finding(run, window, "collapse", window.overflowed, evidence, advice, rule, "definition")
    return [Ranked(finding, 3.0, breaks=True)]


def _constant_finding(run: Run, names: Sequence[str]) -> Ranked:
    first = run.judged.by_name[names[0]]
    evidence = (
        f"The output of {named(names)} is the same for every one of {first.samples:,} observations "
        f"(trace {number(first.trace)})."
    )
    advice = (
        "Nothing of the input gets through: look at the layer before the first of them, whose units are "
        "dead, whose weights are zero, or which gets no gradient. Try another initialisation, a smaller learning rate."
    )
    rule = f"dead: trace ≤ {RESOLVED:g} of the squared norm of the mean, the rounding of float32, with n > 1"
    finding = _finding(run, run.judged, "dead", names, evidence, advice, rule, _RELU)
    return Ranked(finding, 4.0, breaks=True)


def _dead_units(run: Run, layer: Layer) -> Ranked | None:
    """Units of an activation that never vary: each gives one zero eigenvalue."""
    if layer.kind not in ACTIVATIONS or layer.scarce or layer.sketched or layer.constant:
        return None
    dead = layer.features - layer.rank
    if dead < DEAD_SHARE * layer.features or layer.samples < ENOUGH * layer.features:
        return None
    evidence = (
        f"{dead} of the {layer.features} eigenvalues of {layer.shown} are zero over {layer.samples:,} observations: so "
        f"many of its units are constant, or copies of others."
    )
    advice = (
        f"Leave out {dead} units, or revive them: a smaller learning rate, another initialisation of the bias, or "
        f"LeakyReLU, whose units do not die."
    )
    rule = (
        f"dead: an activation of whose eigenvalues at least {DEAD_SHARE:g} are zero (≤ 2·ε·λ1, ε of float32), with "
        f"n ≥ {ENOUGH}·d"
    )
    finding = _finding(run, run.judged, "dead", [layer.name], evidence, advice, rule, f"{_RELU}; {OWN}")
    return Ranked(finding, dead / layer.features)


def _missing_directions(run: Run) -> list[Ranked]:
    """Layers that lack directions which neither n nor the layers before explain.

    Of eval alone: during a window of training the weights move, and with them the directions.
    """
    window = run.windows.get("eval")
    if window is None:
        return []
    layers = chain(window.layers)
    findings = []
    for index, layer in enumerate(layers[1:], start=1):
        before = layers[max(0, index - INPUTS_BEFORE) : index]
        # A non-linearity rarely takes directions away: a layer has those of the one before, as far as there is room.
        possible = min(layer.features, *(other.rank for other in before))
        lacking = possible - layer.rank
        unsure = any(other.sketched or other.samples < ENOUGH * possible for other in (layer, *before))
        if unsure or layer.constant or lacking < max(DEAD_SHARE * possible, 2):
            continue
        evidence = (
            f"{layer.shown} varies in {layer.rank} directions, although its {layer.features} features and the "
            f"{before[-1].rank} directions of {before[-1].shown} before it allow {possible}: {lacking} units or more "
            f"in between are constant, or copies of others."
        )
        advice = (
            f"Record the activation between {before[-1].shown} and {layer.shown} (layers= names it): each zero "
            f"eigenvalue is a dead unit. Leave {lacking} out, or revive them: a smaller learning rate, LeakyReLU."
        )
        rule = (
            f"dead: in eval, a rank (eigenvalues > 2·ε·λ1, ε of float32) at least {DEAD_SHARE:g} below the layer's "
            f"features and the ranks of the {INPUTS_BEFORE} layers before, with n ≥ {ENOUGH} times that"
        )
        finding = _finding(run, window, "dead", [layer.name], evidence, advice, rule, f"{_RELU}; {OWN}")
        findings.append(Ranked(finding, lacking / possible, said_by="tail"))
    return findings


# --- collapse ------------------------------------------------------------------------------------------


def _collapsed(run: Run) -> list[Ranked]:
    """One finding for each way to collapse, over all layers that do, of the phase with more windows."""
    counts = {phase: max((len(one.steps) for one in of_phase), default=0) for phase, of_phase in run.histories.items()}
    phase = max(counts, key=lambda name: (counts[name], name))
    histories = [one for one in run.histories[phase] if len(one.steps) >= MIN_WINDOWS]
    window = run.windows[phase]
    ways = (
        (_rank_falls, "effective rank", _RANK_RULE),
        (_trace_vanishes, "trace", _VANISHING_RULE),
        (_trace_explodes, "trace", _EXPLODING_RULE),
    )
    findings = []
    for collapses, what, rule in ways:
        found = {one.layer: places for one in histories if (places := collapses(one)) is not None}
        if not found:
            continue
        worst = max(found, key=lambda layer: _fall(_values(histories, layer, what), found[layer]))
        values, (start, end) = _values(histories, worst, what), found[worst]
        steps = next(one.steps for one in histories if one.layer == worst)
        evidence = (
            f"The {what} of {printable(worst)} went from {number(values[start])} at step {steps[start]} to "
            f"{number(values[end])} at step {steps[end]}"
            + (f"; {len(found)} layers do so ({named(list(found))})." if len(found) > 1 else ".")
        )
        finding = _finding(
            run, window, "collapse", list(found), evidence, _COLLAPSE_ADVICE, rule, f"{_COLLAPSE}; {OWN}"
        )
        findings.append(Ranked(finding, min(_fall(values, found[worst]), 99) / 100, breaks=True))
    return findings


_COLLAPSE_ADVICE = (
    "Compare with the loss at these steps. A smaller learning rate, a warm-up, clipped gradients or less weight decay "
    "are what usually helps; go back to a checkpoint from before."
)
_RANK_RULE = (
    f"collapse: after the first {percent(EARLY)} of at least {MIN_WINDOWS} windows, the effective rank ends at most at "
    f"{RANK_LEFT:g} of its highest, which is {RANK_FROM:g} or more"
)
_VANISHING_RULE = (
    f"collapse: the trace ends at most at 1/{1 / TRACE_GONE:.0f} of its highest, or at 1/{1 / TRACE_LEFT:.0f} where it "
    f"fell to 1/{1 / TRACE_FALL:.0f} or less from one window to the next"
)
_EXPLODING_RULE = (
    f"collapse: after the first {percent(EARLY)} of the windows, the trace grows {TRACE_JUMP:,.0f}-fold or more from "
    f"one window to the next"
)


def _values(histories: Sequence[History], layer: str, what: str) -> F64:
    history = next(one for one in histories if one.layer == layer)
    return history.traces if what == "trace" else history.effective_ranks


def _fall(values: F64, places: tuple[int, int]) -> float:
    """How many octaves lie between two places."""
    start, end = (max(float(values[place]), 1e-300) for place in places)
    return abs(float(np.log2(start / end)))


def _early(history: History) -> int:
    return max(1, int(np.ceil(EARLY * len(history.steps))))


def _rank_falls(history: History) -> tuple[int, int] | None:
    """Where the effective rank was highest and where it ended, if that is a collapse."""
    first, last = _early(history), len(history.steps) - 1
    if history.scarce or last <= first:
        return None
    highest = first + int(np.argmax(history.effective_ranks[first:]))
    peak, left = history.effective_ranks[[highest, last]]
    return (highest, last) if peak >= RANK_FROM and left <= RANK_LEFT * peak else None


def _trace_vanishes(history: History) -> tuple[int, int] | None:
    """Where the trace was highest and where it ended, if that is a collapse."""
    traces, last = history.traces, len(history.steps) - 1
    highest = int(np.argmax(traces))
    left, falls = traces[last], traces[1:] <= TRACE_FALL * traces[:-1]
    vanished = left <= TRACE_GONE * traces[highest] or (left <= TRACE_LEFT * traces[highest] and falls.any())
    return (highest, last) if vanished and traces[highest] > 0 else None


def _trace_explodes(history: History) -> tuple[int, int] | None:
    """The two windows between which the trace grew most, if that is too much."""
    first, traces = _early(history), np.maximum(history.traces, 1e-300)
    growth = traces[first + 1 :] / traces[first:-1]
    # From nothing to something is a layer that wakes up.
    growth = np.where(history.traces[first:-1] > 0, growth, 0.0)
    if not growth.size or growth.max() < TRACE_JUMP:
        return None
    place = first + int(np.argmax(growth))
    return place, place + 1
