"""What the spectra say about the network's shape: layers too many, too narrow, or too wide."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from delve_ray.analysis.diagnosis.finding import (
    GO_DEEPER,
    OWN,
    ROY_VETTERLI,
    SATURATION,
    SIZE_MATTERS,
    Finding,
    Ranked,
    named,
    number,
    percent,
)
from delve_ray.analysis.diagnosis.windows import Layer, Run, chain

MIN_TAIL = 2
"""Layers that make a tail."""
TAIL_SHARE = 0.5
"""A tail layer's saturation, at most, of the highest before it."""

NECK_SATURATION = 0.75
NECK_FLATNESS = 2 / 3
"""Effective rank / features of a bottleneck, at least: its directions carry about alike."""
NECK_LACK = 2
"""A bottleneck has at most 1/2 of the directions that the layer before carries."""
NECK_FIRST = 4
"""A bottleneck before which nothing was recorded is followed by a layer at least this many times as wide."""

WIDE_SATURATION = 0.1
WIDE_FINER = 1 / 2
"""k at a tenth of the variance that δ leaves out, at most, of the features of an over-wide layer."""
WIDE_OF_RANK = 0.7
"""k(δ), at most, of the directions that reach an over-wide layer."""
REACHING = 0.9999
"""Share of the variance whose directions count as those that reach a layer."""
WIDE_ROOM = 3
"""The advised width is this many times k(δ): a non-linearity lets only a part of each direction pass."""
WIDE_LEAST = 32
"""Features that narrowing must save."""
WIDE_SINGLY = 5
"""Over-wide layers with a finding of their own; the others share one."""

_NOT_TO_NARROW = ("Embedding",)  # its width is that of the whole network


def shape_findings(run: Run) -> list[Ranked]:
    """Bottlenecks, the tail, over-wide layers, of the window that the shape is judged by."""
    layers = chain(run.judged.layers)
    hidden = layers[:-1]  # the last one is as wide as there are classes
    if not hidden:
        return []
    necks = [index for index, layer in enumerate(hidden) if _is_neck(layers, index)]
    tail = _tail(layers, necks)
    wide = [
        index
        for index, layer in enumerate(hidden)
        if index not in tail and not _left_by_neck(layers, index, necks) and _is_wide(layer)
    ]
    findings = [_neck_finding(run, layers, index) for index in necks]
    if tail:
        findings.append(_tail_finding(run, layers, tail))
    return findings + _wide_findings(run, layers, wide)


def _left_by_neck(layers: Sequence[Layer], index: int, necks: Sequence[int]) -> bool:
    """Whether a layer holds no more than what a bottleneck before it lets pass, which says nothing about its width."""
    return any(neck < index and layers[index].k <= NECK_LACK * layers[neck].features for neck in necks)


def _finding(
    run: Run, kind: str, layers: Sequence[Layer], evidence: str, advice: str, rule: str, source: str
) -> Finding:
    window = run.judged
    names = tuple(layer.name for layer in layers)
    return Finding(kind, names, evidence, advice, rule, source, run.name, window.phase, window.step)


# --- tail ----------------------------------------------------------------------------------------------


def _tail(layers: Sequence[Layer], necks: Sequence[int]) -> range:
    """The places of the tail's layers, empty where there is none.

    They come after the first of those layers, counted from the end, that hold no more directions than the output can
    tell apart: it makes them so few, and stays. What a bottleneck leaves is not a tail.
    """
    end = reached = len(layers) - 1
    while reached > 0 and not layers[reached - 1].untold and layers[reached - 1].k <= max(layers[-1].features, 2):
        reached -= 1
    for first in range(reached + 1, end - MIN_TAIL + 1):
        before = [layer for index, layer in enumerate(layers[:first]) if index not in necks and not layer.scarce]
        if all(_left_by_neck(layers, index, necks) for index in range(first, end)):
            continue
        if all(layer.saturation <= TAIL_SHARE * _highest(layer, before) for layer in layers[first:end]):
            return range(first, end)
    return range(0)


def _highest(layer: Layer, before: Sequence[Layer]) -> float:
    """The highest saturation before a tail, of layers like this one where there are such: blocks repeat themselves."""
    alike = [other for other in before if (other.kind, other.features) == (layer.kind, layer.features)]
    return max((other.saturation_low for other in alike or before), default=0.0)


def _tail_finding(run: Run, layers: Sequence[Layer], tail: range) -> Ranked:
    inside, before, output = layers[tail.start : tail.stop], layers[: tail.start], layers[-1]
    ks, saturations = [layer.k for layer in inside], [layer.saturation for layer in inside]
    peak = max(before, key=lambda layer: (not layer.scarce, layer.saturation_low))
    evidence = (
        f"The last {len(inside)} layers before the output hold {_span(ks)} of their directions "
        f"(saturation {_share_span(saturations)}), no more than the {output.features} features of {output.shown}; "
        f"{peak.shown} before them has {_at_least(peak)}{percent(peak.saturation_low)}."
    )
    advice = (
        f"Train without them ({named([layer.name for layer in inside])}), so that {before[-1].shown} comes before "
        f"{output.shown}: if the accuracy stays, they did nothing for it. In a convolutional network, a larger "
        f"input or less downsampling gives such layers work instead."
    )
    rule = (
        f"tail: at least {MIN_TAIL} layers at the end of the hidden ones, each with k(δ) at most the output's features "
        f"and a saturation of at most {TAIL_SHARE:g} of the highest before (among layers of its type and width, if "
        f"any); the first layer whose k(δ) is that low stays"
    )
    source = f"{SATURATION}; {SIZE_MATTERS}; {GO_DEEPER}; {OWN}"
    return Ranked(_finding(run, "tail", inside, evidence, advice, rule, source), len(inside))


def _at_least(layer: Layer) -> str:
    """What stands before the lower end of an interval."""
    return "at least " if layer.k_low < layer.k else ""


def _span(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return f"{low}" if low == high else f"{low} to {high}"


def _share_span(values: Sequence[float]) -> str:
    low, high = percent(min(values)), percent(max(values))
    return low if low == high else f"{low} to {high}"


# --- bottleneck ----------------------------------------------------------------------------------------


def _is_neck(layers: Sequence[Layer], index: int) -> bool:
    """Whether the hidden layer at a place is full, evenly, and narrower than what comes to it."""
    layer = layers[index]
    if layer.untold or layer.kind.startswith(_NOT_TO_NARROW):
        return False
    flat = layer.effective_rank >= NECK_FLATNESS * layer.features
    if layer.saturation < NECK_SATURATION or not flat:
        return False
    if index:
        return not layers[index - 1].scarce and layers[index - 1].k_low >= NECK_LACK * layer.features
    return layers[1].features >= NECK_FIRST * layer.features and len(layers) > 2


def _neck_finding(run: Run, layers: Sequence[Layer], index: int) -> Ranked:
    layer, before = layers[index], layers[index - 1] if index else None
    carried = f"; {before.shown} before it carries {_at_least(before)}{before.k_low}" if before else ""
    evidence = (
        f"{layer.shown} uses {layer.k} of its {layer.features} features (saturation {percent(layer.saturation)}), "
        f"about evenly (effective rank {number(layer.effective_rank)}){carried}."
    )
    width = min(max(2 * layer.features, before.k_low), before.features) if before else NECK_FIRST * layer.features
    advice = (
        f"Widen {layer.shown}, say to {width} features, and compare the accuracy; leave it where a narrow code is the "
        f"purpose, as in an autoencoder or a gate."
    )
    rule = (
        f"bottleneck: a hidden layer with saturation ≥ {NECK_SATURATION:g} and effective rank ≥ {NECK_FLATNESS:.2f} of "
        f"its features, and k(δ) of the layer before ≥ {NECK_LACK} times its features (of the first layer: the next "
        f"one ≥ {NECK_FIRST} times as wide)"
    )
    weight = (before.k_low if before else layers[1].features) / layer.features
    return Ranked(
        _finding(run, "bottleneck", [layer], evidence, advice, rule, f"{SATURATION}; {ROY_VETTERLI}; {OWN}"), weight
    )


# --- over-wide -----------------------------------------------------------------------------------------


def _is_wide(layer: Layer) -> bool:
    if layer.scarce or layer.sketched or not layer.k or layer.kind.startswith(_NOT_TO_NARROW):
        return False
    return (
        layer.k <= WIDE_SATURATION * layer.features
        and _finer(layer) <= WIDE_FINER * layer.features
        and layer.k <= WIDE_OF_RANK * layer.at(max(REACHING, layer.threshold))
        and layer.features - _narrower(layer) >= WIDE_LEAST
    )


def _finer(layer: Layer) -> int:
    return layer.at(1 - (1 - layer.threshold) / 10)


def _narrower(layer: Layer) -> int:
    """The width that would do."""
    return WIDE_ROOM * layer.k


def _wide_findings(run: Run, layers: Sequence[Layer], wide: Sequence[int]) -> list[Ranked]:
    by_saving = sorted(wide, key=lambda index: _narrower(layers[index]) - layers[index].features)
    # One too many is no group.
    singly = by_saving if len(by_saving) <= WIDE_SINGLY + 1 else by_saving[:WIDE_SINGLY]
    findings = [_wide_finding(run, layers, index) for index in singly]
    if len(singly) < len(wide):
        findings.append(_wide_group(run, [layers[index] for index in wide if index not in singly]))
    return findings


_WIDE_RULE = (
    f"over-wide: a hidden layer with k(δ) ≤ {WIDE_SATURATION:g} of its features, at a tenth of the variance left out "
    f"≤ {WIDE_FINER:g}, with k(δ) ≤ {WIDE_OF_RANK:g} of the directions that hold {percent(REACHING)} (else its input, "
    f"not its width, is the limit), where {WIDE_ROOM}·k(δ) saves at least {WIDE_LEAST} features"
)


def _wide_finding(run: Run, layers: Sequence[Layer], index: int) -> Ranked:
    layer = layers[index]
    width, reaching = _narrower(layer), layer.at(max(REACHING, layer.threshold))
    capped = reaching < layer.features // 2
    evidence = (
        f"{percent(layer.threshold)} of the variance of {layer.shown} lies in {layer.k} of {layer.features} directions "
        f"(saturation {percent(layer.saturation)}), {percent(1 - (1 - layer.threshold) / 10)} in {_finer(layer)}."
        + (f" No more than about {reaching} reach it, so its width was never to be filled." if capped else "")
    )
    saved = _saved(layers, index, width, run.described)
    advice = (
        f"Try {width} features, {WIDE_ROOM} times what the threshold needs: {layer.features - width} fewer{saved}. "
        f"Where the width is tied to other layers (residual streams, attention heads), factor the layer through "
        f"{layer.k} features instead."
    )
    finding = _finding(run, "over-wide", [layer], evidence, advice, _WIDE_RULE, f"{SATURATION}; {OWN}")
    return Ranked(finding, layer.features - width)


def _wide_group(run: Run, layers: Sequence[Layer]) -> Ranked:
    saved = sum(layer.features - _narrower(layer) for layer in layers)
    saturations = [layer.saturation for layer in layers]
    evidence = (
        f"{len(layers)} more layers use {_share_span(saturations)} of their widths at their threshold: "
        + ", ".join(f"{layer.shown} {layer.k} of {layer.features}" for layer in layers[:3])
        + (" and so on." if len(layers) > 3 else ".")
    )
    advice = f"{WIDE_ROOM} times what the threshold needs would save {saved} features in all; begin with the widest."
    return Ranked(_finding(run, "over-wide", layers, evidence, advice, _WIDE_RULE, f"{SATURATION}; {OWN}"), 0.0)


def _saved(layers: Sequence[Layer], index: int, width: int, described: Mapping[str, Any]) -> str:
    """The parameters that narrowing a fully connected layer saves, with what the number rests on; empty if unknown."""
    layer, after = layers[index], layers[index + 1]
    if layer.kind != "Linear" or after.kind != "Linear":
        return ""
    fewer = layer.features - width
    inputs = _first_inputs(layers, described)
    if inputs is not None:
        before = layers[index - 1].features if index else inputs
        return f", {fewer * (before + 1 + after.features):,} of the model's {_parameters(described):,} parameters"
    if index and layers[index - 1].kind == "Linear":
        saves = fewer * (layers[index - 1].features + 1 + after.features)
        return f", about {saves:,} parameters if each layer feeds the next"
    return f", at least {fewer * (1 + after.features):,} parameters if it feeds {after.shown}"


def _parameters(described: Mapping[str, Any]) -> int:
    model = described.get("model")
    count = model.get("num_parameters") if isinstance(model, Mapping) else None
    return count if isinstance(count, int) else 0


def _first_inputs(layers: Sequence[Layer], described: Mapping[str, Any]) -> int | None:
    """The input features of a plain chain of Linear layers, from the model's number of parameters; None for others.

    In such a chain, all other parameters are known from the widths; what remains must be d·(inputs + 1) of the first.
    """
    if any(layer.kind != "Linear" for layer in layers):
        return None
    known = sum((one.features + 1) * two.features for one, two in pairwise(layers))
    inputs, rest = divmod(_parameters(described) - known, layers[0].features)
    return inputs - 1 if not rest and inputs > 1 else None
