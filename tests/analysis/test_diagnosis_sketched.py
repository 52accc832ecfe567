"""What a diagnosis makes of sketched layers: what their heads do not tell is said, and nothing is made up from it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from delve_ray.analysis.diagnosis import Finding, diagnose
from delve_ray.nystrom import Head, head_statistics
from tests.analysis.test_diagnosis import MANY, flat, found, only, row, two_levels
from tests.spectra_tables import spectra_table


def sketched(layer: str, eigenvalues: list[float], unseen: float, features: int, **changes: Any) -> dict[str, Any]:
    """A row as the store publishes one, of which the statistics are those that its head supports."""
    values = np.array(eigenvalues)
    head = Head(values, float(values.sum()) + unseen, unseen, features)
    known = head_statistics(head, features, 0.99)
    return {
        "layer": layer,
        "phase": "eval",
        "features": features,
        "samples": MANY,
        "eigenvalues": eigenvalues,
        "saturation": known.values.get("saturation"),
        "intrinsic_dimensionality": known.values.get("intrinsic_dimensionality"),
        "trace": head.trace,
        "effective_rank": None,
        "sketched": True,
        "saturation_low": known.saturation_low,
        "saturation_high": known.saturation_high,
        "unseen_variance": unseen,
    } | changes


def spectra(*rows: dict[str, Any]) -> pa.Table:
    return spectra_table(*rows)


def unreached(layer: str, features: int = 2000, **changes: Any) -> dict[str, Any]:
    """20 equal eigenvalues and a fifth of the variance unseen: k(0.99) from 20 to 1,901 of 2,000."""
    return sketched(layer, [1.0] * 20, 5.0, features, **changes)


# --- the finding -------------------------------------------------------------------------------------------------


def test_a_layer_whose_head_does_not_tell_is_named_with_what_is_known() -> None:
    table = spectra(row("0", flat(20, 64)), unreached("1"), row("2", flat(8, 10)))
    (finding,) = diagnose(table)
    assert finding == Finding(
        kind="too-few-columns",
        layers=("1",),
        evidence="1 of 3 layers are sketched with too few columns (1): of 1 the sketch has seen 80 % of the variance, "
        "less than the 99 % of the threshold, and k(δ) = 20 to 1,901 of 2,000. Nothing more is said of what they use "
        "of their widths.",
        advice="Raise sketch_size: the head of 1 has 20 eigenvalues. Where there is the memory, max_features=2000 "
        "records it whole. Or take a threshold that its head reaches, up to 0.8.",
        rule=finding.rule,
        source=finding.source,
        run="run",
        phase="eval",
        step=0,
    )
    assert finding.rule.startswith("too-few-columns: ")
    assert "NeurIPS 2017" in finding.source


def test_the_worst_is_described_and_all_are_named() -> None:
    worse = sketched("worse", [1.0] * 20, 20.0, 500)
    finding = only(spectra(unreached("a"), worse, row("2", flat(8, 10))), "too-few-columns")
    assert finding.layers == ("a", "worse")
    assert (
        "2 of 3 layers are sketched with too few columns (a, worse): of worse the sketch has seen 50 %"
        in finding.evidence
    )


def test_a_head_that_tells_is_no_finding_and_one_of_too_few_observations_is_said_once() -> None:
    reached = sketched("1", [1.0] * 20, 0.1, 2000)
    assert found(spectra(row("0", flat(20, 64)), reached, row("2", flat(8, 10)))) == []
    scarce = unreached("1", samples=1500)
    table = spectra(row("0", flat(20, 64)), scarce, row("2", flat(8, 10)))
    assert found(table) == [("too-few-observations", ("1",))]
    evidence = only(table, "too-few-observations").evidence
    assert "1 has 1,500 for 2,000 features, 0.75 each, and k(δ) = 20 to 1,901" in evidence


def test_it_comes_last_and_its_layers_are_judged_in_the_phase_that_tells_more() -> None:
    table = spectra(row("0", flat(20, 64), nonfinite_rows=2), unreached("1"), row("2", flat(8, 10)))
    assert [finding.kind for finding in diagnose(table)] == ["dead", "too-few-columns"]
    told = [row("0", flat(20, 64)), sketched("1", [1.0] * 20, 0.1, 2000), row("2", flat(8, 10))]
    rows = [row("0", flat(20, 64)), unreached("1"), row("2", flat(8, 10))]
    both = spectra(*rows, *(one | {"phase": "train"} for one in told))
    assert "too-few-columns" not in [finding.kind for finding in diagnose(both)]


# --- what it must not do to the other rules -----------------------------------------------------------------------


def test_a_wide_output_that_is_not_told_is_still_the_output() -> None:
    """Without it the last hidden layer would be taken for the output, which is as wide as it has to be."""
    hidden = [row("0", flat(20, 64)), row("1", two_levels(10, 200, 512))]
    assert found(spectra(*hidden, unreached("2"))) == [("over-wide", ("1",)), ("too-few-columns", ("2",))]
    assert found(spectra(*hidden)) == [], "which is what was said"


def test_a_bottleneck_behind_a_sketched_layer_is_judged_by_the_least_that_it_carries() -> None:
    neck, rest = row("neck", flat(8, 8)), [row("2", flat(20, 64)), row("3", flat(8, 10))]
    carries = only(spectra(row("0", flat(20, 64)), unreached("1"), neck, *rest), "bottleneck")
    assert "1 before it carries at least 20" in carries.evidence
    little = sketched("1", [8.0] + [1.0] * 4, 3.0, 2000)
    assert little["intrinsic_dimensionality"] is None
    assert found(spectra(row("0", flat(20, 64)), little, neck, *rest), "bottleneck") == {}


def test_a_tail_is_compared_with_the_least_that_a_sketched_layer_uses() -> None:
    low, rest = [row("1", flat(9, 96)), row("2", flat(9, 64)), row("3", flat(9, 64))], row("4", flat(9, 10))
    assert found(spectra(unreached("0"), *low, rest), "tail") == {}, "20 of 2,000 is less than 9 of 64"
    finding = only(spectra(sketched("0", [1.0] * 30, 10.0, 70), *low, rest), "tail")
    assert "0 before them has at least 42.9 %" in finding.evidence


def test_directions_do_not_go_missing_behind_a_head() -> None:
    """How many there are before is not known, so it is not said how many are lost."""
    rest = [row("1", [1.0] * 10 + [0.0] * 54), row("2", flat(8, 10))]
    assert "dead" in [kind for kind, _ in found(spectra(row("0", flat(60, 64)), *rest))]
    assert found(spectra(unreached("0"), *rest), "dead") == {}
    assert found(spectra(sketched("0", [1.0] * 40, 0.0, 2000), *rest), "dead") == {}


# --- what is exact of a sketch is used ------------------------------------------------------------------------------


def test_a_constant_sketched_layer_is_dead() -> None:
    constant = sketched("1", [], 0.0, 2000, mean_norm=3.0)
    assert (constant["trace"], constant["intrinsic_dimensionality"]) == (0.0, 0)
    table = spectra(row("0", flat(20, 64)), constant, row("2", flat(8, 10)))
    assert found(table) == [("dead", ("1",))]


@pytest.mark.parametrize("with_trace", [True, False])
def test_the_trace_of_a_sketch_is_compared_and_followed(with_trace: bool) -> None:
    """Also where `stats` left it out: it is that of the head and of what the head lacks."""

    def of(scale: float, **changes: Any) -> dict[str, Any]:
        trace = {} if with_trace else {"trace": None}
        return sketched("1", [scale] * 20, 5.0 * scale, 2000, **trace, **changes)

    gap = [of(1.0, phase="train", step=0), of(1.0, phase="train", step=1), of(9.0, step=1)]
    finding = only(spectra(*gap), "gap")
    assert "the trace is 25 in train and 225 in eval" in finding.evidence
    collapse = [of(scale, step=step) for step, scale in enumerate((1.0, 1.0, 1.0, 1e-4))]
    finding = only(spectra(*collapse), "collapse")
    assert "The trace of 1 went from 25 at step 0 to 0.0025 at step 3" in finding.evidence
    vanished = [*(of(1.0, step=step) for step in range(3)), sketched("1", [], 0.0, 2000, step=3, trace=None)]
    assert next(kind for kind, _ in found(spectra(*vanished))) in ("dead", "collapse")
