"""What a diagnosis consists of: one finding, the kinds there are, their order, and where the facts come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from delve_ray.analysis.table import printable

KINDS = ("tail", "bottleneck", "over-wide", "dead", "collapse", "gap", "too-few-observations", "too-few-columns")
"""Every kind of finding."""

CONSEQUENCE = (
    *("dead", "collapse", "gap", "bottleneck", "tail", "over-wide"),
    *("too-few-observations", "too-few-columns"),
)
"""The kinds, most consequential first: a broken training, a broken evaluation, lost accuracy, lost parameters."""

SATURATION = "Shenk et al., Feature Space Saturation during Training, arXiv 2006.08679"
SIZE_MATTERS = "Richter et al., (Input) Size Matters for CNN Classifiers, ICANN 2021, arXiv 2102.01582"
GO_DEEPER = "Richter et al., Should You Go Deeper?, arXiv 2106.12307"
ROY_VETTERLI = "effective rank: Roy & Vetterli, EUSIPCO 2007"
OWN = "bounds: own measurements, docs/diagnosis.md"

NAMED = 4
"""Layers that a sentence names before it counts the rest."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that the spectra say about a network, with its numbers and what to try.

    Attributes:
        kind: One of `KINDS`.
        layers: The layers concerned, in network order.
        evidence: What was measured, in one or two sentences.
        advice: What to try.
        rule: The rule that found it, with its bounds.
        source: Where the rule's facts come from.
        run: The run.
        phase: "train" or "eval", whose rows were judged.
        step: The window that was judged.
    """

    kind: str
    layers: tuple[str, ...]
    evidence: str
    advice: str
    rule: str
    source: str
    run: str
    phase: str
    step: int

    def as_dict(self) -> dict[str, Any]:
        """The attributes under their names, `layers` as a list: what becomes JSON."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return values | {"layers": list(self.layers)}


@dataclass(frozen=True, slots=True)
class Ranked:
    """A finding and what it means for others.

    `weight` orders the findings of a kind; one that `breaks` leaves nothing to say about the network's shape; one that
    is `said_by` another kind is left out where a finding of that kind has all its layers.
    """

    finding: Finding
    weight: float
    breaks: bool = False
    said_by: str | None = None


def named(layers: Sequence[str]) -> str:
    """Layers for a sentence, the first few by name.

    >>> named(["a", "b"]), named(list("abcdef"))
    ('a, b', 'a, b, c, d and 2 more')
    """
    listed = ", ".join(map(printable, layers[:NAMED]))
    more = len(layers) - NAMED
    return f"{listed} and {more} more" if more > 0 else listed


def number(value: float) -> str:
    """A number to three digits.

    >>> number(1234.5), number(0.25), number(3e-7)
    ('1,230', '0.25', '3e-07')
    """
    short = float(f"{value:.3g}")
    return f"{short:,.0f}" if 1000 <= abs(short) < 1e7 else f"{short:g}"


def percent(share: float) -> str:
    """A share in per cent, to as many digits as tell it from all.

    >>> percent(0.99999), percent(0.359375), percent(0.0625)
    ('99.999 %', '35.9 %', '6.2 %')
    """
    digits = 2 if share < 0.1 else 3 if share < 0.99 else 7
    return f"{float(f'{100 * share:.{digits}g}'):g} %"
