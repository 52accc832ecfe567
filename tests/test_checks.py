"""delve_ray.checks: every refusal names the option, the value and what would be right."""

from __future__ import annotations

import numpy as np
import pytest

from delve_ray.checks import check_flag, check_integer, check_name, check_seconds
from tests.helpers import assert_refused


@pytest.mark.parametrize("value", [1, 2, 2**63 - 1, np.int64(7), np.uint8(7)])
def test_integers(value: int) -> None:
    number = check_integer("log_interval", value, at_least=1)
    assert number == value
    assert type(number) is int


def test_a_lower_bound_is_zero_unless_said_otherwise() -> None:
    assert check_integer("initial_epoch", 0) == 0
    assert check_integer("offset", -3, at_least=-3) == -3
    assert_refused(lambda: check_integer("initial_epoch", -1), "initial_epoch=-1", "at least 0")


@pytest.mark.parametrize("value", [0, -1, 1.0, 2.5, "3", None, True, float("nan"), [1], 2**63, 10**400, np.float64(3)])
def test_what_is_no_such_integer_is_refused(value: object) -> None:
    assert_refused(
        lambda: check_integer("log_interval", value, at_least=1),
        f"log_interval={value!r}",
        "integer",
        "at least 1",
        "below 2**63",
    )


@pytest.mark.parametrize("value", [0, 0.0, 30, 0.5, 1e9, np.float64(0.5)])
def test_seconds(value: float) -> None:
    seconds = check_seconds("publish_every", value)
    assert seconds == value
    assert isinstance(seconds, float)


@pytest.mark.parametrize("value", [-1, -0.1, float("nan"), float("inf"), "30", None, True, [30]])
def test_what_is_no_number_of_seconds_is_refused(value: object) -> None:
    assert_refused(lambda: check_seconds("publish_every", value), f"publish_every={value!r}", "seconds", "at least 0")


def test_flags() -> None:
    assert check_flag("nosave", True) is True
    assert check_flag("nosave", False) is False


@pytest.mark.parametrize("value", ["False", "", 0, 1, None, []])
def test_what_is_no_flag_is_refused(value: object) -> None:
    assert_refused(lambda: check_flag("nosave", value), f"nosave={value!r}", "True or False")


def test_names() -> None:
    assert check_name("run", "resnet 50/ä") == "resnet 50/ä"


@pytest.mark.parametrize("value", ["", None, 3, b"run", ["run"]])
def test_what_is_no_name_is_refused(value: object) -> None:
    assert_refused(lambda: check_name("run", value), f"run={value!r}", "non-empty string")
