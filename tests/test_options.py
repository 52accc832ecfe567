"""delve_ray.options: every refusal names the option, the value and what would be right."""

from __future__ import annotations

from inspect import signature
from typing import Any

import numpy as np
import pytest
import torch

from delve_ray.errors import DelveRayError, OptionError
from delve_ray.layers import RowOptions
from delve_ray.options import (
    check_choice,
    check_device,
    check_fraction,
    check_mask_function,
    check_max_samples,
    check_overhead,
    check_rows,
    check_unbuilt,
    not_built,
)
from delve_ray.tracker import SaturationTracker
from tests.helpers import assert_refused


def test_an_option_error_is_a_value_error_of_ours() -> None:
    assert issubclass(OptionError, ValueError)
    assert issubclass(OptionError, DelveRayError)


# --- choices -------------------------------------------------------------------------------------------


def test_a_choice_among_what_is_built() -> None:
    assert check_choice("colour", "red", ("red", "blue"), ("green",)) == "red"


def test_a_choice_that_is_known_says_that_it_is_not_built_and_what_is() -> None:
    assert_refused(
        lambda: check_choice("colour", "green", ("red", "blue"), ("green", "red")),
        "colour='green'",
        "not built yet",
        "'red' or 'blue'",
        error=NotImplementedError,
    )


@pytest.mark.parametrize("value", ["Red", "", None, 3, ["red"], float("nan")])
def test_another_choice_is_refused_with_all_there_are(value: object) -> None:
    with pytest.raises(OptionError) as refusal:
        check_choice("colour", value, ("red", "blue"), ("green", "red"))
    assert str(refusal.value) == f"colour={value!r} is none of 'red', 'blue', 'green'"


def rows(**options: Any) -> RowOptions:
    values = {
        "conv_method": "channelwise",
        "timeseries_method": "timestepwise",
        "interpolation_strategy": None,
        "interpolation_downsampling": 32,
    }
    return check_rows(**(values | options))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("conv_method", value) for value in ("channelwise", "mean", "max", "median", "flatten")),
        *(("timeseries_method", value) for value in ("timestepwise", "last_timestep")),
        *(("interpolation_strategy", value) for value in (None, "nearest", "area", "bilinear", "bicubic")),
        ("interpolation_downsampling", 1),
    ],
)
def test_each_way_to_make_rows(option: str, value: object) -> None:
    assert getattr(rows(**{option: value}), option) == value


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("conv_method", "channel", ["'channelwise'", "'mean'", "'max'", "'median'", "'flatten'"]),
        ("timeseries_method", "last", ["'timestepwise'", "'last_timestep'"]),
        ("interpolation_strategy", "lanczos", ["'nearest'", "'area'", "'bilinear'"]),
        ("interpolation_downsampling", 0, ["integer", "at least 1"]),
        ("interpolation_downsampling", 8.0, ["integer"]),
    ],
)
def test_other_ways_are_refused_with_those_there_are(option: str, value: object, words: list[str]) -> None:
    assert_refused(lambda: rows(**{option: value}), f"{option}={value!r}", *words)


def test_how_many_samples() -> None:
    assert check_max_samples(None) is None
    assert check_max_samples(7) == 7
    for value in (0, -1, 2.5, "all", True):
        assert_refused(lambda value=value: check_max_samples(value), f"max_samples={value!r}", "integer")


def test_shares() -> None:
    for share in (1, 1.0, 0.25, np.float32(0.5)):
        assert check_fraction("sample_fraction", share) == share
    for value in (0, -0.1, float("nan"), "all", True, None):
        assert_refused(
            lambda value=value: check_fraction("sample_fraction", value), f"sample_fraction={value!r}", "(0, 1]"
        )
    assert_refused(lambda: check_fraction("sample_fraction", 25), "sample_fraction=25", "write 0.25")


def test_a_mask_function_is_a_function() -> None:
    check_mask_function(None)
    check_mask_function(len)
    assert_refused(lambda: check_mask_function(torch.ones(2, 2)), "mask is", "Tensor", "with tracker.mask(mask)")


# --- device --------------------------------------------------------------------------------------------


def test_devices() -> None:
    assert check_device(None) is None
    assert check_device("cpu") == torch.device("cpu")
    assert check_device(torch.device("cpu")) == torch.device("cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_device_without_an_index_is_the_one_that_tensors_carry() -> None:
    assert check_device("cuda") == torch.zeros(1, device="cuda").device


@pytest.mark.parametrize(
    "value",
    [
        "gpu",
        "",
        "cpu:x",
        "meta",  # has no values
        "cuda:4096",
        [],
        1.5,
        torch.device("meta"),
        pytest.param("cuda", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="it is here")),
        pytest.param("mps", marks=pytest.mark.skipif(torch.backends.mps.is_available(), reason="it is here")),
    ],
)
def test_a_device_that_cannot_hold_the_sums_is_refused(value: object) -> None:
    assert_refused(lambda: check_device(value), f"device={value!r}", "float64", "'cpu'", "leave it out")


# --- options that are understood and not built ---------------------------------------------------------

DEFAULTS: dict[str, Any] = {name: value.default for name, value in signature(SaturationTracker).parameters.items()}


def test_defaults_pass() -> None:
    check_unbuilt(DEFAULTS)
    check_unbuilt(DEFAULTS | {"log_interval": 3, "stats": ["lsat"], "something": "else"})


@pytest.mark.parametrize(
    ("option", "value", "instead"),
    [
        ("layerwise_sat", False, "per layer"),
        ("average_sat", False, "mean"),
        ("reset_covariance", False, "window"),
    ],
)
def test_each_names_itself_and_the_way_that_exists(option: str, value: object, instead: str) -> None:
    assert option in DEFAULTS
    assert_refused(
        lambda: check_unbuilt(DEFAULTS | {option: value}),
        f"{option}={value!r}",
        "not built yet",
        instead,
        error=NotImplementedError,
    )


def test_the_first_that_is_not_built_is_named_alone() -> None:
    with pytest.raises(NotImplementedError, match=r"^average_sat=False is not built yet; [^=]*$"):
        check_unbuilt(DEFAULTS | {"average_sat": False, "reset_covariance": False})


@pytest.mark.parametrize(
    ("value", "expected"), [(None, None), (0.02, 0.02), (np.float32(0.5), 0.5), (1e-9, 1e-9), (0.999, 0.999)]
)
def test_a_share_of_the_training_s_time(value: object, expected: float | None) -> None:
    assert check_overhead(value) == expected


@pytest.mark.parametrize("value", [0, -0.1, 1, 2, float("nan"), float("inf"), True, "0.02", [0.02]])
def test_what_is_no_share_of_the_training_s_time(value: object) -> None:
    assert_refused(lambda: check_overhead(value), f"max_overhead={value!r}", "0.02 for two percent")


def test_not_built_is_an_error_to_raise() -> None:
    error = not_built("colour", "green", "use 'red'")
    assert isinstance(error, NotImplementedError)
    assert str(error) == "colour='green' is not built yet; use 'red'"
