"""delve_ray.options: every refusal names the option, the value and what would be right."""

from __future__ import annotations

from inspect import signature
from typing import Any

import pytest
import torch

from delve_ray.errors import DelveRayError, OptionError
from delve_ray.options import (
    PRECISIONS,
    check_choice,
    check_conv_method,
    check_device,
    check_precision,
    check_timeseries_method,
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


def test_methods_that_are_built() -> None:
    assert check_conv_method("channelwise") == "channelwise"
    assert check_timeseries_method("timestepwise") == "timestepwise"
    assert check_timeseries_method("last_timestep") == "last_timestep"


@pytest.mark.parametrize("value", ["mean", "max", "median", "flatten"])
def test_delves_other_convolution_methods_are_known(value: str) -> None:
    assert_refused(
        lambda: check_conv_method(value), f"conv_method='{value}'", "'channelwise'", error=NotImplementedError
    )


def test_unknown_methods_are_refused() -> None:
    assert_refused(
        lambda: check_conv_method("channel"), "conv_method='channel'", "channelwise", "mean", "max", "median", "flatten"
    )
    assert_refused(
        lambda: check_timeseries_method("last"), "timeseries_method='last'", "'timestepwise'", "'last_timestep'"
    )


def test_precisions() -> None:
    assert check_precision("float32") is torch.float32
    assert check_precision("float64") is torch.float64
    for known in ("bfloat16", "tf32"):
        assert_refused(lambda: check_precision(known), f"precision='{known}'", *PRECISIONS, error=NotImplementedError)  # noqa: B023
    assert_refused(lambda: check_precision(torch.float32), "precision=torch.float32", "'float32'", "'float64'")


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
    check_unbuilt(DEFAULTS | {"writer_args": {}})
    check_unbuilt(DEFAULTS | {"log_interval": 3, "stats": ["lsat"], "something": "else"})


@pytest.mark.parametrize(
    ("option", "value", "instead"),
    [
        ("writer_args", {"x": 1}, "writers"),
        ("max_samples", 500, "log_interval"),
        ("layerwise_sat", False, "per layer"),
        ("average_sat", False, "mean"),
        ("reset_covariance", False, "window"),
        ("interpolation_strategy", "bilinear", "position"),
        ("interpolation_downsampling", 16, "position"),
        ("verbose", True, "tracker.metrics()"),
        ("max_overhead", 0.02, "log_interval"),
        ("layers", ["conv1"], "layer_filter"),
        ("resume", "must", "savefile"),
        ("name", "teacher", "run="),
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
    with pytest.raises(NotImplementedError, match=r"^max_samples=5 is not built yet; [^=]*$"):
        check_unbuilt(DEFAULTS | {"max_samples": 5, "name": "x"})


def test_not_built_is_an_error_to_raise() -> None:
    error = not_built("colour", "green", "use 'red'")
    assert isinstance(error, NotImplementedError)
    assert str(error) == "colour='green' is not built yet; use 'red'"
