"""delve_ray.stat_options: what may be asked, and how a bad wish is refused."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

import numpy as np
import pytest

from delve_ray import spectrum
from delve_ray.errors import OptionError
from delve_ray.schema import EXTRA_STATS, SCALAR_STATS
from delve_ray.stat_options import check_threshold, check_thresholds, resolve_stats

# --- thresholds ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("good", [0.99, 1, 1.0, 1e-6, np.float32(0.5), np.float64(0.5), np.int64(1)])
def test_a_good_threshold_becomes_a_float(good: float) -> None:
    assert type(check_threshold(good)) is float
    assert check_threshold(good) == good


@pytest.mark.parametrize("bad", [0, 0.0, -0.1, 1.0001, 99, math.nan, math.inf, True, "0.9", None, [0.9], 10**400])
def test_a_bad_threshold_is_refused_in_words(bad: object) -> None:
    with pytest.raises(OptionError) as raised:
        check_threshold(bad)
    assert f"sat_threshold={bad!r} " in str(raised.value)
    assert "(0, 1]" in str(raised.value)


def test_a_threshold_in_percent_or_in_quotes_is_told_so() -> None:
    with pytest.raises(OptionError, match=r"for 99 percent write 0\.99"):
        check_threshold(99)
    with pytest.raises(OptionError, match="of type str"):
        check_threshold("0.9")


@pytest.mark.parametrize("good", [0.99, 1, np.float32(0.5), np.float64(0.5), np.array(0.75)])
def test_one_threshold_is_a_tuple_of_one(good: float) -> None:
    assert check_thresholds(good) == (float(good),)
    assert type(check_thresholds(good)[0]) is float


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([0.9, 0.95, 0.99, 0.999], (0.9, 0.95, 0.99, 0.999)),
        ((0.99, 0.5, 1), (0.99, 0.5, 1.0)),
        ([0.99], (0.99,)),
        (np.array([0.9, 0.99]), (0.9, 0.99)),
        ([np.float32(0.5), np.int64(1)], (0.5, 1.0)),
        (deque([0.75, 0.5]), (0.75, 0.5)),
    ],
)
def test_several_thresholds_keep_the_order_given(given: Sequence[float], expected: tuple[float, ...]) -> None:
    assert check_thresholds(given) == expected
    assert all(type(value) is float for value in check_thresholds(given))


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ([], ["sat_threshold=[]", "empty"]),
        (np.array([]), ["sat_threshold=array([]", "empty"]),
        ([0.9, 0.9], ["sat_threshold=[0.9, 0.9]", "0.9 twice"]),
        ((0.5, 1, 1.0), ["1.0 twice"]),
        ([0.9, 0.0], ["sat_threshold=[0.9, 0.0]: 0.0 is out of range"]),
        ([0.9, 99], ["99 is out of range", "for 99 percent write 0.99"]),
        ([0.9, math.nan], ["nan is out of range"]),
        ([0.9, "0.99"], ["'0.99' is of type str"]),
        ([0.9, True], ["True is of type bool"]),
        ([[0.9, 0.99]], ["[0.9, 0.99] is of type list"]),
        (np.array([[0.9, 0.99]]), ["[0.9, 0.99] is of type list"]),
        (np.array([True]), ["True is of type bool"]),
        ("0.9", ["sat_threshold='0.9' is of type str"]),
        (b"9", ["of type bytes"]),
        ({0.9, 0.99}, ["of type set"]),
        ({0.9: 1}, ["of type dict"]),
        (None, ["of type NoneType"]),
        (1.5, ["sat_threshold=1.5 is out of range"]),
        (np.array(1.5), ["sat_threshold=1.5 is out of range"]),
    ],
)
def test_bad_thresholds_are_refused_in_words(bad: object, words: list[str]) -> None:
    with pytest.raises(OptionError) as raised:
        check_thresholds(bad)
    assert [word for word in [*words, "(0, 1]", "0.99"] if word not in str(raised.value)] == []


def test_the_options_are_found_where_the_statistics_are() -> None:
    assert spectrum.check_threshold is check_threshold
    assert spectrum.check_thresholds is check_thresholds
    assert spectrum.resolve_stats is resolve_stats


# --- names ---------------------------------------------------------------------------------------------


def test_delves_names_and_the_long_ones_mean_the_same() -> None:
    assert resolve_stats(["lsat", "idim", "trc", "dtrc", "det"]) == SCALAR_STATS[:5]
    assert resolve_stats(["cov"]) == resolve_stats("covariance") == ("cov",)
    assert resolve_stats(list(SCALAR_STATS)) == SCALAR_STATS


def test_names_come_in_the_order_of_the_contract_and_once() -> None:
    asked = ["cov", "noise_rank", "det", "alpha", "determinant", "lsat", "covariance"]
    expected = ("saturation", "determinant", "alpha", "noise_rank", "cov")
    assert resolve_stats(asked) == resolve_stats(tuple(reversed(asked))) == expected
    assert resolve_stats("log_determinant") == ("log_determinant",)
    assert resolve_stats([]) == ()
    assert resolve_stats(None) == SCALAR_STATS


def test_an_unknown_name_is_refused_with_the_names_that_are_known() -> None:
    with pytest.raises(OptionError) as raised:
        resolve_stats(["lsat", "satration"])
    assert "'satration'" in str(raised.value)
    assert "did you mean 'saturation'?" in str(raised.value)
    for name in (*SCALAR_STATS, *EXTRA_STATS, "lsat", "idim", "cov", "det", "trc", "dtrc", "correlation"):
        assert name in str(raised.value)


@pytest.mark.parametrize("bad", [5, [3], [None], [["lsat"]], "LSAT", "", object()])
def test_stats_that_are_no_names_are_refused(bad: object) -> None:
    with pytest.raises(OptionError, match="stats"):
        resolve_stats(bad)  # type: ignore[arg-type]


def test_embed_comes_last() -> None:
    assert resolve_stats(["embed", "cov", "lsat"]) == ("saturation", "cov", "embed")
    assert "embed" not in resolve_stats(None)


def test_statistics_of_other_matrices_are_there_only_where_they_are_named() -> None:
    of_the_correlation = EXTRA_STATS[:3]
    assert resolve_stats("correlation") == resolve_stats(["correlation", "correlation"]) == of_the_correlation
    assert resolve_stats(["rankme", "cov", "correlation", "lsat"]) == ("saturation", *EXTRA_STATS, "cov")
    assert resolve_stats(["correlation_effective_rank"]) == ("correlation_effective_rank",)
    assert not set(EXTRA_STATS) & set(SCALAR_STATS)
    assert not set(EXTRA_STATS) & {*resolve_stats(None), *resolve_stats(list(SCALAR_STATS))}
    with pytest.raises(OptionError, match="did you mean 'rankme'"):
        resolve_stats(["rank_me"])


@pytest.mark.parametrize("phase", ["train", "eval"])
def test_delves_names_with_a_phase(phase):
    assert resolve_stats(["lsat", f"lsat_{phase}"]) == ("saturation",)
    assert resolve_stats([f"idim_{phase}"]) == ("intrinsic_dimensionality",)
    with pytest.raises(OptionError, match=f"unknown name 'trace_{phase}'"):
        resolve_stats([f"trace_{phase}"])
    with pytest.raises(OptionError, match="unknown name 'lsat_test'"):
        resolve_stats(["lsat_test"])
