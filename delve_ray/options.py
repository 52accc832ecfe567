"""The tracker's options: checked once, at construction, with an error that says what would be right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from delve_ray.errors import OptionError
from delve_ray.layers import CONV_METHODS, TIMESERIES_METHODS

PRECISIONS = {"float32": torch.float32, "float64": torch.float64}
"""Precision of the products, by the name of the option."""


def not_built(option: str, value: object, instead: str) -> NotImplementedError:
    """An option that is understood and does not exist yet."""
    return NotImplementedError(f"{option}={value!r} is not built yet; {instead}")


def check_choice(option: str, value: object, built: Sequence[str], known: Sequence[str] = ()) -> str:
    """One of `built`; one of `known` is understood and raises NotImplementedError."""
    if value in built:
        return str(value)
    if value in known:
        raise not_built(option, value, f"use {' or '.join(map(repr, built))}")
    raise OptionError(f"{option}={value!r} is none of {', '.join(map(repr, dict.fromkeys([*built, *known])))}")


def check_conv_method(value: object) -> str:
    """How positions of a feature map become rows."""
    return check_choice("conv_method", value, ("channelwise",), CONV_METHODS)


def check_timeseries_method(value: object) -> str:
    """How steps of a sequence become rows."""
    return check_choice("timeseries_method", value, TIMESERIES_METHODS)


def check_precision(value: object) -> torch.dtype:
    """The precision of the products."""
    return PRECISIONS[check_choice("precision", value, tuple(PRECISIONS), ("bfloat16", "tf32"))]


def check_device(value: Any) -> torch.device | None:
    """Where moments are accumulated; None for the device of each layer's output."""
    if value is None:
        return None
    try:
        device = torch.device(value)
        torch.zeros(1, dtype=torch.float64, device=device).item()  # "meta" has no values
    except (RuntimeError, TypeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise OptionError(
            f"device={value!r} cannot hold float64 sums here ({reason}); leave it out to stay on the layers' own "
            f"device, or use 'cpu'"
        ) from None
    # "cuda" and "cuda:0" name one device; tensors carry the second.
    return torch.empty(0, device=device).device


def check_unbuilt(options: Mapping[str, Any]) -> None:
    """Refuse by name what is understood and not built; nothing passes silently."""
    unbuilt: dict[str, tuple[object, str]] = {
        "writer_args": (None, "writers take no arguments"),
        "max_samples": (None, "use log_interval to record fewer batches"),
        "layerwise_sat": (True, "rows are always per layer, with the mean beside them"),
        "average_sat": (True, "the mean over layers is always published"),
        "reset_covariance": (True, "every window starts anew"),
        "interpolation_strategy": (None, "every position counts"),
        "interpolation_downsampling": (32, "every position counts"),
        "verbose": (False, "read tracker.metrics(), or the files"),
        "max_overhead": (None, "use log_interval to record fewer batches"),
        "layers": (None, "use layer_filter or ignore_layer_names"),
        "resume": (None, "choose another savefile for the next run"),
        "name": (None, "give a second tracker its own run="),
    }
    for option, (default, instead) in unbuilt.items():
        value = options[option]
        if value != default and not (option == "writer_args" and value == {}):
            raise not_built(option, value, instead)
