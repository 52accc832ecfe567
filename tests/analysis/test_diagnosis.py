"""The rules at their bounds, on spectra with closed forms, and what a diagnosis makes of odd tables."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from delve_ray.analysis.diagnosis import KINDS, Finding, diagnose
from delve_ray.analysis.diagnosis.finding import CONSEQUENCE
from delve_ray.errors import ReadError
from delve_ray.schema import SPECTRA_SCHEMA
from delve_ray.spectrum import effective_rank, intrinsic_dimensionality
from tests.spectra_tables import spectra_table

MANY = 100_000
HARDLY = 3e-7
"""Of λ1 = 1: above what float32 leaves of zero, 2·ε, and too little to count in k."""


def flat(k, features):
    """The spectrum of k equal directions: k(0.99) = k up to 99 of them, effective rank k; the rest hardly varies."""
    return [1.0] * k + [HARDLY] * (features - k)


def two_levels(k, reaching, features):
    """k equal directions with 99.5 % of the variance, and others, of which k(0.999) counts 80 % and k(0.9999) 98 %."""
    small = 0.005 / 0.995 * k / (reaching - k)
    return [1.0] * k + [small] * (reaching - k) + [HARDLY] * (features - reaching)


def row(layer, eigenvalues, **changes):
    eigenvalues = [float(value) for value in eigenvalues]
    known = {
        "features": len(eigenvalues),
        "samples": MANY,
        "phase": "eval",
        "intrinsic_dimensionality": intrinsic_dimensionality(np.array(eigenvalues)),
        "effective_rank": effective_rank(np.array(eigenvalues)),
        "trace": sum(eigenvalues),
    }
    dimension = known["intrinsic_dimensionality"] / len(eigenvalues)
    return {"layer": layer, "eigenvalues": eigenvalues, "saturation": dimension} | known | changes


def network(*shapes, **changes):
    """Layers "0", "1", … of (directions, features), or with a spectrum of their own, the last one the output."""
    return spectra_table(
        *(
            row(str(index), flat(*shape) if isinstance(shape, tuple) else shape, **changes)
            for index, shape in enumerate(shapes)
        )
    )


def found(spectra, kind=None, described=None):
    """{layers: finding} of one kind; all kinds, (kind, layers), without one."""
    findings = diagnose(spectra, described)
    if kind is None:
        return [(finding.kind, finding.layers) for finding in findings]
    return {finding.layers: finding for finding in findings if finding.kind == kind}


def only(spectra, kind, described=None):
    (finding,) = found(spectra, kind, described).values()
    return finding


# --- the interface -------------------------------------------------------------------------------------


def test_a_finding_is_what_becomes_json():
    finding = only(network((20, 64), (6, 64), (6, 64), (6, 64), (6, 10)), "tail")
    assert finding.as_dict() == {
        "kind": "tail",
        "layers": ["2", "3"],
        "evidence": "The last 2 layers before the output hold 6 of their directions (saturation 9.4 %), no more than "
        "the 10 features of 4; 0 before them has 31.2 %.",
        "advice": finding.advice,
        "rule": finding.rule,
        "source": finding.source,
        "run": "run",
        "phase": "eval",
        "step": 0,
    }
    assert json.loads(json.dumps(finding.as_dict())) == finding.as_dict()
    assert "arXiv 2006.08679" in finding.source
    assert "arXiv 2102.01582" in finding.source
    assert "arXiv 2106.12307" in finding.source
    with pytest.raises(AttributeError):
        finding.kind = "gap"
    assert not hasattr(finding, "__dict__")


def test_the_kinds_are_the_contracts():
    contract = ("tail", "bottleneck", "over-wide", "dead", "collapse", "gap", "too-few-observations")
    assert (*contract, "too-few-columns") == KINDS
    assert sorted(KINDS) == sorted(CONSEQUENCE)


def test_neither_torch_nor_ray_is_loaded():
    code = (
        "import sys; from delve_ray.analysis.diagnosis import diagnose; from delve_ray.schema import SPECTRA_SCHEMA; "
        "diagnose(SPECTRA_SCHEMA.empty_table()); sys.exit(any(name in sys.modules for name in ('torch', 'ray')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0


def test_a_sound_network_is_quiet():
    assert found(network((20, 64), (16, 64), (12, 32), (8, 10))) == []


# --- tail ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dimensions", "tail"),
    [
        ([20, 9, 9, 9], ("2", "3")),  # the first that is so low stays
        ([20, 9, 9], None),  # which leaves one
        ([20, 15, 12, 10, 9, 8], ("4", "5")),
        ([20, 9, 9, 11], None),  # more than the output's ten features
        ([20, 9, 9, 10], ("2", "3")),
        ([20, 11, 10, 10, 10], ("3", "4")),  # half of 20 is 10
        ([19, 11, 10, 10, 10], None),
        ([20, 11, 10, 10, 11, 9], None),
        ([9, 9, 9, 9], None),  # low everywhere
    ],
)
def test_a_tail_begins_after_the_layer_that_leaves_what_the_output_tells_apart(dimensions, tail):
    layers = found(network(*((k, 64) for k in dimensions), (9, 10)), "tail")
    assert list(layers) == ([] if tail is None else [tail])


@pytest.mark.parametrize(("highest", "is_tail"), [(60, True), (59, False)])
def test_half_the_highest_saturation_is_low(highest, is_tail):
    spectra = network((highest, 64), (31, 64), (30, 64), (30, 64), (30, 64), (30, 30))
    assert bool(found(spectra, "tail")) == is_tail


def test_a_network_for_one_or_two_classes_may_hold_two_directions():
    assert list(found(network((9, 32), (2, 32), (2, 32), (2, 32), (1, 1)), "tail")) == [("2", "3")]
    assert list(found(network((9, 32), (3, 32), (3, 32), (3, 32), (1, 1)), "tail")) == []


def test_blocks_are_compared_with_their_like():
    block = [(40, 64), (20, 256)]
    assert found(network(*block, *block, *block, (100, 500)), "tail") == {}
    narrow = [(19, 64), (9, 256)]
    assert list(found(network(*block, *block, *narrow, *narrow, (100, 500)), "tail")) == [("4", "5", "6", "7")]


def test_what_a_bottleneck_leaves_is_no_tail():
    spectra = network((20, 64), (3, 3), (3, 64), (3, 64), (3, 64), (3, 10))
    assert found(spectra) == [("bottleneck", ("1",))]


# --- bottleneck ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "k", "is_neck"), [(16, 6, True), (16, 5, False), (15, 6, False), (16, 8, True), (15, 8, False)]
)
def test_a_bottleneck_is_full_and_takes_half_of_what_comes(before, k, is_neck):
    layers = found(network((before, 64), (k, 8), (20, 64), (9, 10)), "bottleneck")
    assert list(layers) == ([("1",)] if is_neck else [])


@pytest.mark.parametrize(("before", "is_neck"), [(32, True), (31, False)])
def test_a_bottleneck_of_sixteen(before, is_neck):
    assert bool(found(network((before, 64), (16, 16), (20, 64), (9, 10)), "bottleneck")) == is_neck


def _share(effective):
    """The share p of the first of two directions whose effective rank exp(H(p)) is `effective`."""
    low, high = 0.5, 1.0
    for _ in range(60):
        p = (low + high) / 2
        entropy = -p * math.log(p) - (1 - p) * math.log(1 - p)
        low, high = (p, high) if math.exp(entropy) > effective else (low, p)
    return low


@pytest.mark.parametrize(("effective", "is_neck"), [(4 / 3 + 1e-6, True), (4 / 3 - 1e-6, False)])
def test_a_bottleneck_is_even(effective, is_neck):
    p = _share(effective)
    spectra = network((20, 64), [p, 1 - p], (20, 64), (9, 10))
    assert bool(found(spectra, "bottleneck")) == is_neck


@pytest.mark.parametrize(("after", "is_neck"), [(16, True), (15, False)])
def test_before_the_first_layer_nothing_is_known_so_the_next_one_tells(after, is_neck):
    assert bool(found(network((4, 4), (4, after), (3, 10)), "bottleneck")) == is_neck
    assert found(network((4, 4), (4, after)), "bottleneck") == {}, "before an output there is nothing to widen for"


def test_a_bottleneck_says_what_it_takes_and_what_comes():
    finding = only(network((20, 64), (3, 3), (3, 64), (3, 10)), "bottleneck")
    assert "1 uses 3 of its 3 features (saturation 100 %)" in finding.evidence
    assert "effective rank 3" in finding.evidence
    assert "0 before it carries 20" in finding.evidence
    assert "say to 20 features" in finding.advice


# --- over-wide -----------------------------------------------------------------------------------------


def is_wide(k, reaching, features):
    return bool(found(network((20, 64), two_levels(k, reaching, features), (9, 10)), "over-wide"))


def test_over_wide_from_a_tenth_of_the_features():
    assert is_wide(25, 60, 250)
    assert not is_wide(26, 60, 250)


def test_over_wide_needs_little_at_a_finer_threshold():
    # k(0.999) = 20 + 0.8·(reaching - 20), and half of 200 is 100
    assert is_wide(20, 119, 200)
    assert not is_wide(20, 122, 200)


def test_what_the_input_limits_is_not_over_wide():
    # k(0.9999) = 21 + ⌈0.98·(reaching - 21)⌉, and 0.7·30 is 21
    assert is_wide(21, 30, 300)
    assert not is_wide(21, 29, 300)
    assert found(network((20, 64), (2, 300), (9, 10)), "over-wide") == {}, (
        "two inputs, and a width for the non-linearity"
    )


def test_what_saves_little_is_not_named():
    assert is_wide(4, 20, 44)
    assert not is_wide(4, 20, 43)


def test_an_over_wide_layer_says_which_width_would_do_and_what_it_saves():
    spectra = network((20, 64), two_levels(10, 200, 512), (9, 10), layer_type="Linear")
    finding = only(spectra, "over-wide")
    assert "99 % of the variance of 1 lies in 10 of 512 directions (saturation 2 %)" in finding.evidence
    assert "99.9 % in 163" in finding.evidence
    assert finding.advice.startswith("Try 30 features")
    saved = (512 - 30) * (64 + 1 + 10)
    assert f"482 fewer, about {saved:,} parameters if each layer feeds the next." in finding.advice
    parameters = 30 * 64 + 64 + 64 * 512 + 512 + 512 * 10 + 10
    described = {"model": {"num_parameters": parameters}}
    exact = only(spectra, "over-wide", described).advice
    assert f"{saved:,} of the model's {parameters:,} parameters" in exact
    assert "about" in only(spectra, "over-wide", {"model": {"num_parameters": parameters + 1}}).advice
    assert "about" in only(spectra, "over-wide", {"run": "another", **described}).advice, "not this run's"


def test_the_inputs_of_the_first_layer_come_from_the_number_of_parameters():
    spectra = network(two_levels(10, 200, 512), (9, 10), layer_type="Linear")
    parameters = 64 * 512 + 512 + 512 * 10 + 10
    finding = only(spectra, "over-wide", {"model": {"num_parameters": parameters}})
    assert f"{482 * (64 + 1 + 10):,} of the model's {parameters:,} parameters" in finding.advice
    assert f"at least {482 * (1 + 10):,} parameters if it feeds 1" in only(spectra, "over-wide").advice


def test_of_convolutions_the_width_is_named_and_no_parameters():
    spectra = network((20, 64), two_levels(10, 200, 512), (9, 10), layer_type="Conv2d")
    assert "parameters" not in only(spectra, "over-wide").advice


def test_the_output_an_embedding_and_activations_are_never_over_wide():
    wide = two_levels(10, 200, 512)
    assert found(network((20, 64), wide), "over-wide") == {}
    for kind in ("Embedding", "EmbeddingBag", "ReLU", "LayerNorm", "Dropout", "MaxPool2d"):
        rows = [row("0", flat(20, 64)), row("1", wide, layer_type=kind), row("2", flat(9, 10))]
        assert found(spectra_table(*rows), "over-wide") == {}, kind
    around = [row("block", wide), row("block.0", flat(20, 64)), row("block.1", flat(18, 64)), row("head", flat(9, 10))]
    assert found(spectra_table(*around)) == []


def test_many_over_wide_layers_share_a_finding():
    wide = [two_levels(10, 200, 512 + index) for index in range(300)]
    layers = found(network(*wide, (9, 10)), "over-wide")
    assert len(layers) == 6
    assert sum(map(len, layers)) == 300
    assert next(iter(layers)) == ("299",), "what saves most comes first"
    saved = sum(512 + index - 30 for index in range(295))
    assert f"{saved} features in all" in list(layers.values())[-1].advice
    assert len(found(network(*wide[:6], (9, 10)), "over-wide")) == 6


# --- dead ----------------------------------------------------------------------------------------------


def test_a_layer_that_never_varies():
    spectra = network((20, 64), [0.0] * 64, [0.0] * 10)
    assert found(spectra) == [("dead", ("1", "2"))], "and nothing is said about the widths of such a network"
    assert "1, 2 is the same for every one of 100,000 observations" in only(spectra, "dead").evidence


def test_of_a_broken_network_the_shape_is_not_judged():
    wide = two_levels(10, 200, 512)
    assert found(network((20, 64), wide, (16, 64), (9, 10))) == [("over-wide", ("1",))]
    assert found(network((20, 64), wide, [0.0] * 64, (9, 10))) == [("dead", ("2",))]


@pytest.mark.parametrize(("trace", "is_dead"), [(0.99e-13 * 25, True), (1.01e-13 * 25, False)])
def test_what_rounding_leaves_of_a_constant_output(trace, is_dead):
    spectra = network((20, 64), [trace, 0.0, 0.0], mean_norm=5.0, phase="train")
    assert bool(found(spectra, "dead")) == is_dead


def test_one_observation_is_no_dead_layer():
    assert "dead" not in dict(found(network([0.0] * 8, [0.0] * 2, samples=1)))


def units(alive, features):
    """Units of which some never vary."""
    return [1.0] * alive + [0.0] * (features - alive)


@pytest.mark.parametrize(("alive", "is_dead"), [(48, True), (49, False)])
def test_units_of_an_activation_from_a_quarter_on(alive, is_dead):
    rows = [row("0", flat(20, 64)), row("1", units(alive, 64), layer_type="ReLU"), row("2", flat(9, 10))]
    layers = found(spectra_table(*rows), "dead")
    assert list(layers) == ([("1",)] if is_dead else [])
    if is_dead:
        assert "16 of the 64 eigenvalues of 1 are zero" in layers[("1",)].evidence
    few = [row("0", flat(20, 64)), row("1", units(alive, 64), layer_type="ReLU", samples=255), row("2", flat(9, 10))]
    assert found(spectra_table(*few), "dead") == {}, "n < 4·d"


def spread(rank, features):
    """Directions that fall off, so that a rank is one thing and k(0.99) another."""
    return [0.7**index for index in range(rank)] + [0.0] * (features - rank)


@pytest.mark.parametrize(("rank", "is_dead"), [(30, True), (31, False)])
def test_directions_that_the_layers_before_had(rank, is_dead):
    spectra = network(spread(40, 64), spread(rank, 48), (9, 10))
    layers = found(spectra, "dead")
    assert list(layers) == ([("1",)] if is_dead else [])
    if is_dead:
        assert (
            "1 varies in 30 directions, although its 48 features and the 40 directions of 0" in layers[("1",)].evidence
        )
    train = network(spread(40, 64), spread(rank, 48), (9, 10), phase="train")
    assert found(train, "dead") == {}, "weights move during a window of training"


def test_of_a_tail_only_the_tail_is_said():
    low = [1.0] * 6 + [HARDLY] * 20 + [0.0] * 38
    spectra = network((20, 64), (9, 64), low, low, (6, 10))
    assert found(spectra) == [("tail", ("2", "3"))]
    assert found(network((20, 64), (16, 64), low, (6, 10))) == [("dead", ("2",))]


def test_a_branch_is_not_dead_for_being_narrow():
    # a shortcut has the block's input, not the layer before it in the list
    spectra = network(spread(16, 16), spread(40, 40), spread(40, 40), spread(16, 40), (9, 10))
    assert found(spectra, "dead") == {}


def test_rows_that_are_not_finite():
    spectra = spectra_table(
        row("0", flat(20, 64)),
        row("1", flat(16, 64), nonfinite_rows=25, samples=75),
        row("2", flat(8, 10), nonfinite_rows=10, samples=0) | {"eigenvalues": None},
    )
    finding = only(spectra, "dead")
    assert finding.layers == ("1", "2")
    assert "NaN or infinity in 2 layers (1, 2): 10 of 10 rows of 2 (100 %)" in finding.evidence
    assert "1 is the first such layer" in finding.advice
    assert found(network((20, 64), (16, 64), (8, 10), nonfinite_rows=0)) == []


# --- collapse ------------------------------------------------------------------------------------------


def over_steps(ranks, traces, phase="train"):
    """A layer over the steps, beside one that stays as it is, and the output."""
    return spectra_table(
        *(
            one
            for step, (rank, trace) in enumerate(zip(ranks, traces, strict=True))
            for one in (
                row("a", flat(20, 64), phase=phase, step=step),
                row("b", flat(16, 64), phase=phase, step=step, effective_rank=rank, trace=trace),
                row("c", flat(8, 10), phase=phase, step=step),
            )
        )
    )


@pytest.mark.parametrize(
    ("ranks", "collapsed"),
    [
        ([30, 12, 12, 12, 6.0], True),
        ([30, 12, 12, 12, 6.1], False),
        ([30, 6, 6, 6, 6], False),  # the ordinary decline of the beginning
        ([30, 12, 12, 5, 12], False),  # it came back
        ([30, 1.9, 1.9, 1.9, 0.5], False),  # nothing to lose
        ([12, 6], False),  # too few windows
        ([30, 30, 12, 12, 12, 12, 12, 12, 12, 12], False),  # two of ten are the beginning
    ],
)
def test_the_effective_rank_collapses(ranks, collapsed):
    layers = found(over_steps(ranks, [1.0] * len(ranks)), "collapse")
    assert list(layers) == ([("b",)] if collapsed else [])
    if collapsed:
        assert "The effective rank of b went from 12 at step 1 to 6 at step 4" in layers[("b",)].evidence
        assert (layers[("b",)].phase, layers[("b",)].step) == ("train", 4)


@pytest.mark.parametrize(
    ("traces", "collapsed"),
    [
        ([900, 300, 100, 10, 0.9], True),  # a thousandth of the highest
        ([900, 300, 100, 11, 1.2], False),
        ([300, 300, 30, 20, 10], True),  # a thirtieth, a tenth of it at once
        ([300, 300, 30, 20, 10.1], False),
        ([300, 300, 31, 20, 10], False),
        ([1, 1, 999, 999, 999], False),
        ([1, 1, 1000, 1000, 1000], True),
        ([1, 1e5, 1e5, 1e5, 1e5], False),  # the first epoch
        ([0, 0, 10, 10, 10], False),  # a layer that wakes up
        ([1, 1, 1, 1, 0], True),
        ([1000, 0.5], False),  # too few windows
    ],
)
def test_the_trace_vanishes_or_explodes(traces, collapsed):
    layers = found(over_steps([12] * len(traces), traces), "collapse")
    assert list(layers) == ([("b",)] if collapsed else [])


def test_without_the_statistics_the_eigenvalues_tell():
    rows = [
        row("b", flat(k, 64), step=step, phase="train", trace=None, effective_rank=None)
        for step, k in enumerate((12, 12, 12, 12, 5))
    ]
    assert list(found(spectra_table(*rows), "collapse")) == [("b",)]
    rows[-1] |= {"eigenvalues": flat(7, 64)}
    assert found(spectra_table(*rows), "collapse") == {}


def test_a_covariance_that_overflowed():
    rows = [row("0", flat(20, 64)), row("1", flat(8, 8), trace=math.inf)]
    rows.append(row("2", flat(8, 8)) | {"eigenvalues": [math.nan] * 8})
    findings = diagnose(spectra_table(*rows))
    assert [(finding.kind, finding.layers) for finding in findings] == [("collapse", ("1", "2"))]


# --- gap -----------------------------------------------------------------------------------------------


def phases(train, evaluated, *, before=None, samples=10**9, step=1):
    """One hidden layer in train and eval, each a spectrum; `before` is that of train's window before."""
    return spectra_table(
        *([row("a", before, phase="train", step=0, samples=samples)] if before is not None else []),
        row("a", train, phase="train", step=1, samples=samples),
        row("b", flat(8, 10), phase="train", step=1, samples=samples),
        row("a", evaluated, phase="eval", step=step, samples=samples),
        row("b", flat(8, 10), phase="eval", step=step, samples=samples),
    )


def test_traces_that_differ_twofold():
    base = np.array(flat(16, 64))
    assert list(found(phases(base, base * 2.001, before=base), "gap")) == [("a",)]
    assert found(phases(base, base * 1.999, before=base), "gap") == {}
    assert list(found(phases(base * 2.001, base, before=base * 2.001), "gap")) == [("a",)]
    evidence = only(phases(base, base * 4, before=base), "gap").evidence
    assert "In a, the trace is 16 in train and 64 in eval." in evidence


def test_sampling_explains_four_standard_deviations():
    # var ln Σλ = 2/(n·16) in each phase: 4·√(2·2/(16·100)) = 0.2 with 100 observations
    base = np.array(flat(16, 64))
    assert found(phases(base, base * 2 * math.exp(0.199), before=base, samples=100), "gap") == {}
    assert found(phases(base, base * 2 * math.exp(0.201), before=base, samples=100), "gap") != {}


def test_the_trainings_own_drift_is_no_gap():
    base = np.array(flat(16, 64))
    assert found(phases(base, base * 2.99, before=base / 1.5), "gap") == {}
    assert found(phases(base, base * 3.01, before=base / 1.5), "gap") != {}


def test_a_first_window_of_train_saw_the_weights_move():
    base = np.array(flat(16, 64))
    assert found(phases(base, base * 9.99), "gap") == {}
    assert found(phases(base, base * 10.01), "gap") != {}


def test_effective_ranks_that_differ():
    def even(k):
        return np.array(flat(k, 64)) / k

    assert found(phases(even(20), even(31), before=even(20)), "gap") != {}
    assert found(phases(even(20), even(30), before=even(20)), "gap") == {}
    assert found(phases(even(20), even(29), before=even(20)), "gap") == {}
    assert found(phases(even(20), even(31)), "gap") == {}, "one window of train alone"
    assert found(phases(even(20), even(37), before=even(16)), "gap") == {}, "1.5 and a drift of 1.25"
    assert found(phases(even(20), even(38), before=even(16)), "gap") != {}
    assert found(phases(even(20), even(36), before=even(20), samples=361), "gap") != {}
    assert found(phases(even(20), even(36), before=even(20), samples=359), "gap") == {}, "n < 10 times the rank"


def test_windows_of_different_steps_are_not_compared():
    base = np.array(flat(16, 64))
    assert found(phases(base, base * 100, before=base, step=2), "gap") == {}


# --- too few observations ------------------------------------------------------------------------------


@pytest.mark.parametrize(("samples", "scarce"), [(63, True), (64, False)])
def test_fewer_observations_than_features(samples, scarce):
    layers = found(network((4, 64), (4, 16), (4, 10), samples=samples), "too-few-observations")
    assert list(layers) == ([("0",)] if scarce else [])
    if scarce:
        assert "0 has 63 for 64 features, 0.984 each, and k(δ) = 4" in layers[("0",)].evidence


@pytest.mark.parametrize(("samples", "scarce"), [(80, True), (81, False)])
def test_fewer_than_two_observations_for_each_direction(samples, scarce):
    layers = found(network((40, 64), (4, 16), (4, 10), samples=samples), "too-few-observations")
    assert bool(layers) == scarce


def test_of_white_noise_with_two_observations_a_direction_k_is_six_per_cent_low():
    # Eigenvalues of the Marchenko-Pastur law of ratio 1/2, largest first, and the share that holds 99 %
    ratio = 0.5
    angles = np.linspace(0, np.pi, 400_001)
    eigenvalues = 1 + ratio + 2 * math.sqrt(ratio) * np.cos(angles)
    density = np.sin(angles) ** 2 / eigenvalues
    held = np.cumsum(density * eigenvalues) / np.sum(density * eigenvalues)
    k = np.sum(density[: np.searchsorted(held, 0.99)]) / np.sum(density)
    assert k / 0.99 == pytest.approx(0.94, abs=0.005)
    rule = only(network((40, 64), (4, 10), samples=50), "too-few-observations").rule
    assert "6 % too small" in rule


def test_nothing_else_is_said_of_such_a_layer():
    wide = network((20, 64), two_levels(10, 200, 512), (9, 10), samples=511)
    assert found(wide) == [("too-few-observations", ("1",))]
    assert found(network((20, 64), (2, 2), (9, 10), samples=30), "bottleneck") == {}


def test_the_phase_with_enough_observations_is_judged():
    wide = two_levels(10, 200, 512)
    rows = [row("0", flat(20, 64)), row("1", wide), row("2", flat(9, 10))]
    spectra = spectra_table(*(one | {"samples": 400} for one in rows), *(one | {"phase": "train"} for one in rows))
    assert found(spectra) == [("over-wide", ("1",))]
    assert diagnose(spectra)[0].phase == "train"
    assert diagnose(spectra_table(*rows, *(one | {"phase": "train"} for one in rows)))[0].phase == "eval"
    later = [one | {"phase": "train", "step": 5} for one in rows]
    assert diagnose(spectra_table(*rows, *later))[0].phase == "train", "the later one"


# --- windows, runs, odd tables -------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [{"final": False}, {"workers": 1}])
def test_the_last_complete_window_counts(cut):
    tail = [(20, 64), (9, 64), (9, 64), (9, 64), (9, 10)]
    sound = [(20, 64), (16, 64), (16, 64), (16, 64), (9, 10)]
    rows = [
        *network(*tail, step=3).to_pylist(),
        *network(*sound, step=4, **cut).to_pylist(),
    ]
    finding = only(spectra_table(*rows), "tail")
    assert finding.step == 3
    assert found(spectra_table(*rows[5:])) == [], "without a complete one, the last"
    assert only(network(*tail, **cut), "tail").step == 0
    nobody = [one | {"workers": None, "world_size": None} for one in rows]
    assert found(spectra_table(*nobody[:5])) == [("tail", ("2", "3"))]


def test_each_run_has_its_own_findings():
    first = network((20, 64), (9, 64), (9, 64), (9, 64), (9, 10), run="first").to_pylist()
    second = network((20, 64), (3, 3), (3, 64), (3, 10), run="second").to_pylist()
    findings = diagnose(spectra_table(*first, *second))
    assert [(finding.run, finding.kind) for finding in findings] == [("first", "tail"), ("second", "bottleneck")]


def test_the_most_consequential_come_first():
    rows = [
        *network((20, 64), (2, 2), (20, 64), two_levels(10, 200, 512), (9, 10), nonfinite_rows=3).to_pylist(),
        row("aux", flat(3, 2_000), samples=1_000),
        row("head", flat(9, 10)),
    ]
    kinds = [finding.kind for finding in diagnose(spectra_table(*rows))]
    assert kinds == ["dead", "bottleneck", "over-wide", "too-few-observations"]


def test_layers_with_nothing_to_read_are_left_out():
    rows = [
        row("0", flat(20, 64)),
        row("none", flat(3, 64), trace=None) | {"eigenvalues": None},
        row("unseen", flat(3, 64), samples=0) | {"eigenvalues": []},
        row("1", flat(16, 64), threshold=None, intrinsic_dimensionality=None, effective_rank=None, trace=None),
        row("2", flat(8, 10), layer_type=None, mean_norm=None, nonfinite_rows=None),
    ]
    assert found(spectra_table(*rows)) == []
    assert diagnose(SPECTRA_SCHEMA.empty_table()) == []


@pytest.mark.parametrize("count", [1, 2, 3, 300])
def test_networks_of_any_depth(count):
    spectra = network(*[(40, 64)] * (count - 1), (8, 10))
    assert found(spectra) == []
    assert found(network(*[(40, 64)] * count, layer_type="ReLU"), "tail") == {}


def test_names_stand_in_sentences_and_stay_what_they_are():
    name = "a\n<b>$x$" + "é" * 200
    rows = [row("0", flat(20, 64)), row(name, flat(2, 2)), row("1", flat(20, 64)), row("2", flat(8, 10))]
    finding = only(spectra_table(*rows), "bottleneck")
    assert finding.layers == (name,)
    assert "\n" not in finding.evidence + finding.advice
    assert "a\\n<b>$x$" in finding.evidence


def test_a_column_that_is_missing_is_named():
    with pytest.raises(ReadError, match=r"spectra lack the columns eigenvalues; read them with read_spectra\(paths\)"):
        diagnose(network((8, 10)).drop_columns(["eigenvalues"]))


def test_other_thresholds_are_named():
    rows = [row("0", flat(20, 64)), row("1", two_levels(10, 200, 512)), row("2", flat(9, 10))]
    evidence = only(spectra_table(*(one | {"threshold": 0.98} for one in rows)), "over-wide").evidence
    assert evidence.startswith("98 % of the variance of 1 lies in 10 of 512 directions")
    assert ", 99.8 % in " in evidence


shapes = st.lists(
    st.tuples(
        st.integers(1, 40), st.integers(0, 40), st.integers(0, 200), st.sampled_from(["Linear", "Conv2d", "ReLU"])
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=60, deadline=None)
@given(shapes, st.integers(1, 3), st.floats(0.1, 10))
def test_whatever_the_spectra_the_findings_fit_them(layers, steps, decay):
    rows = [
        row(str(index), spread(min(k, d), d), step=step, phase=phase, samples=n, layer_type=kind)
        for phase in ("eval", "train")
        for step in range(steps)
        for index, (d, k, n, kind) in enumerate(layers)
    ]
    spectra = spectra_table(*rows)
    findings = diagnose(spectra)
    for finding in findings:
        assert isinstance(finding, Finding)
        assert finding.kind in KINDS
        assert finding.run == "run"
        assert (finding.phase in ("eval", "train"), finding.step) == (True, steps - 1)
        assert set(finding.layers) <= {str(index) for index in range(len(layers))}
        assert all(part.strip() for part in (finding.evidence, finding.advice, finding.rule, finding.source))
        assert not re.search(r"\b(nan|inf|None)\b", finding.evidence + finding.advice)
        assert finding.rule.startswith(finding.kind)
    order = [CONSEQUENCE.index(finding.kind) for finding in findings]
    assert order == sorted(order)
    scaled = spectra_table(
        *(
            one
            | {
                "eigenvalues": [decay * value for value in one["eigenvalues"]],
                "trace": one["trace"] * decay,
                "mean_norm": 1.5 * math.sqrt(decay),
            }
            for one in rows
        )
    )
    assert found(scaled) == found(spectra), "the units of the outputs do not matter"
