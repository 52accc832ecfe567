"""What the spectra say about the data they were taken from: too few observations, train and eval that differ."""

from __future__ import annotations

import math

from delve_ray.analysis.diagnosis.finding import OWN, ROY_VETTERLI, Finding, Ranked, named, number, percent
from delve_ray.analysis.diagnosis.windows import FEW, Layer, Run
from delve_ray.analysis.table import printable
from delve_ray.spectrum import participation_ratio

GAP_TRACE = 2.0
"""Ratio of the traces of train and eval, on top of what sampling and the training's own drift explain."""
GAP_RANK = 1.5
"""The same of effective ranks."""
GAP_DEVIATIONS = 4.0
"""Standard deviations of the logarithm of a ratio that sampling explains."""
GAP_ALONE = 10.0
"""Ratio of the traces where train has one window only, in which the weights moved from their initial values."""
GAP_OBSERVATIONS = 10
"""Observations for each unit of the effective rank, in both phases, for it to be compared."""

_NYSTROM = "Tropp et al., Fixed-rank approximation of a positive-semidefinite matrix from streaming data, NeurIPS 2017"
_MARCHENKO_PASTUR = "Marchenko & Pastur 1967, by the law of delve_ray.spectrum.marchenko_pastur_median"


def scarce_findings(run: Run) -> list[Ranked]:
    """One finding over all layers of too few observations, in the window that the shape is judged by."""
    window = run.judged
    layers = [layer for layer in window.layers if layer.scarce]
    if not layers:
        return []
    worst = min(layers, key=lambda layer: layer.samples / layer.features)
    least = worst.k if worst.reached else worst.k_low
    evidence = (
        f"{len(layers)} of {len(window.layers)} layers have too few observations "
        f"({named([one.name for one in layers])}): {worst.shown} has {worst.samples:,} for {worst.features:,} "
        f"features, {number(worst.samples / worst.features)} each, and k(δ) = {worst.dimensions}. Nothing more is said "
        f"of them."
    )
    advice = (
        f"See more in a window: at least {max(worst.features, FEW * least + 1):,} observations of {worst.shown}, "
        f"better ten for each feature; close windows less often, raise max_samples, or evaluate on more data."
    )
    rule = (
        f"too-few-observations: n < d, or n - 1 < {FEW}·k(δ); of white noise with k(δ) = n/{FEW} the spectrum's spread "
        f"makes k(0.99) 6 % too small, and ever more beyond"
    )
    names = tuple(layer.name for layer in layers)
    finding = Finding(
        "too-few-observations", names, evidence, advice, rule, _MARCHENKO_PASTUR, run.name, window.phase, window.step
    )
    return [Ranked(finding, len(layers) / len(window.layers))]


def sketch_findings(run: Run) -> list[Ranked]:
    """One finding over all sketched layers whose heads do not tell k(δ), in the window that the shape is judged by."""
    window = run.judged
    layers = [layer for layer in window.layers if not layer.reached and not layer.scarce]
    if not layers:
        return []
    shares = {layer.name: float(layer.eigenvalues.sum()) / layer.trace for layer in layers}
    worst = min(layers, key=lambda layer: shares[layer.name])
    seen = shares[worst.name]
    evidence = (
        f"{len(layers)} of {len(window.layers)} layers are sketched with too few columns "
        f"({named([one.name for one in layers])}): of {worst.shown} the sketch has seen {percent(seen)} of the "
        f"variance, less than the {percent(worst.threshold)} of the threshold, and k(δ) = {worst.dimensions} of "
        f"{worst.features:,}. Nothing more is said of what they use of their widths."
    )
    advice = (
        f"Raise sketch_size: the head of {worst.shown} has {worst.eigenvalues.size:,} eigenvalues. Where there is the "
        f"memory, max_features={worst.features} records it whole."
    )
    if seen >= 0.01:
        advice += f" Or take a threshold that its head reaches, up to {math.floor(100 * seen) / 100:g}."
    rule = (
        "too-few-columns: a sketched layer whose head has less than the share δ of the trace, Σλ̂ < δ·T, with enough "
        "observations; k(δ) as the bounds λ̂ ≤ λ ≤ λ̂ + (T - Σλ̂) leave it"
    )
    names = tuple(layer.name for layer in layers)
    finding = Finding("too-few-columns", names, evidence, advice, rule, _NYSTROM, run.name, window.phase, window.step)
    return [Ranked(finding, len(layers) / len(window.layers))]


def gap_findings(run: Run) -> list[Ranked]:
    """One finding over all layers that differ, headed by the one that differs most."""
    if not {"train", "eval"} <= run.windows.keys():
        return []
    train, evaluated = run.windows["train"], run.windows["eval"]
    if train.step != evaluated.step:  # weights of different moments
        return []
    drifts = _drifts(run)
    others = evaluated.by_name
    found: dict[str, tuple[float, str]] = {}
    for layer in train.layers:
        if (other := others.get(layer.name)) is not None and (gap := _gap(layer, other, drifts.get(layer.name))):
            found[layer.name] = gap
    if not found:
        return []
    worst = max(found, key=lambda name: found[name][0])
    evidence = f"In {printable(worst)}, {found[worst][1]}" + (
        f"; {len(found)} layers differ ({named(list(found))})." if len(found) > 1 else "."
    )
    first = next(iter(found))
    advice = (
        f"Look where it begins, at {printable(first)}: is eval's input scaled and augmented as that of train is, are "
        f"its data the same kind, has a BatchNorm before it seen enough batches for its running statistics (momentum, "
        f"batch size), and is there much dropout?"
    )
    rule = (
        f"gap: in the last window of both, traces differ by more than {GAP_TRACE:g}-fold or effective ranks by "
        f"more than {GAP_RANK:g}-fold, beyond {GAP_DEVIATIONS:g} standard deviations of sampling (Gaussian rows: "
        f"var ln Σλ ≈ 2·Σλ²/(n·(Σλ)²)) and the change from train's window before; with one window of train, "
        f"{GAP_ALONE:g}-fold"
    )
    finding = Finding(
        "gap",
        tuple(found),
        evidence,
        advice,
        rule,
        f"variance of a Gaussian trace: Anderson, Multivariate Statistical Analysis; {ROY_VETTERLI}; {OWN}",
        run.name,
        "eval",
        evaluated.step,
    )
    return [Ranked(finding, found[worst][0])]


def _drifts(run: Run) -> dict[str, tuple[float, float]]:
    """|ln| of how trace and effective rank changed from the last window but one of train to the last, by layer."""
    drifts = {}
    for history in run.histories["train"]:
        if len(history.steps) >= 2:
            drifts[history.layer] = (
                _log_ratio(history.traces[-1], history.traces[-2]),
                _log_ratio(history.effective_ranks[-1], history.effective_ranks[-2]),
            )
    return drifts


def _log_ratio(one: float, other: float) -> float:
    """|ln(one/other)|; zero and zero are alike."""
    if one <= 0.0 or other <= 0.0:
        return 0.0 if one == other else math.inf
    return abs(math.log(one) - math.log(other))


def _gap(train: Layer, evaluated: Layer, drift: tuple[float, float] | None) -> tuple[float, str] | None:
    """How far two phases of a layer are apart beyond what is explained, in units of the bound, and in words."""
    if train.scarce or evaluated.scarce or train.features != evaluated.features:
        return None
    sampling = GAP_DEVIATIONS * math.sqrt(_variance(train) + _variance(evaluated))
    bound = math.log(GAP_ALONE) if drift is None else math.log(GAP_TRACE) + drift[0]
    traces = _log_ratio(train.trace, evaluated.trace)
    gaps = []
    if traces > bound + sampling:
        said = f"the trace is {number(train.trace)} in train and {number(evaluated.trace)} in eval"
        gaps.append((min(traces / (bound + sampling), 100.0), said))
    enough = all(one.samples >= GAP_OBSERVATIONS * one.effective_rank for one in (train, evaluated))
    ranks = _log_ratio(train.effective_rank, evaluated.effective_rank)
    if enough and drift is not None and ranks > (bound := math.log(GAP_RANK) + drift[1] + sampling):
        here, there = number(train.effective_rank), number(evaluated.effective_rank)
        said = f"the effective rank is {here} in train and {there} in eval"
        gaps.append((min(ranks / bound, 100.0), said))
    return max(gaps) if gaps else None


def _variance(layer: Layer) -> float:
    """The variance of the logarithm of a trace of n Gaussian rows, 2·Σλ²/(n·(Σλ)²)."""
    spread = participation_ratio(layer.eigenvalues)
    return 2 / (layer.samples * spread) if spread else 0.0
