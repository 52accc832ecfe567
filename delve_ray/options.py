"""The tracker's options: checked once, at construction, with an error that says what would be right."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from delve_ray.checks import check_integer
from delve_ray.errors import OptionError
from delve_ray.integrations.trial import Trial
from delve_ray.layers import CONV_METHODS, INTERPOLATIONS, TIMESERIES_METHODS, RowOptions

PRECISIONS = {"float32": torch.float32, "float64": torch.float64, "tf32": torch.float32, "bfloat16": torch.float32}
"""What products are summed in, by the name of the option; the last two name what is multiplied."""


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


def check_rows(
    conv_method: object, timeseries_method: object, interpolation_strategy: object, interpolation_downsampling: object
) -> RowOptions:
    """How positions of a feature map and steps of a sequence become rows."""
    strategy = interpolation_strategy
    return RowOptions(
        check_choice("conv_method", conv_method, CONV_METHODS),
        check_choice("timeseries_method", timeseries_method, TIMESERIES_METHODS),
        None if strategy is None else check_choice("interpolation_strategy", strategy, INTERPOLATIONS),
        check_integer("interpolation_downsampling", interpolation_downsampling, at_least=1),
    )


def check_max_samples(value: object) -> int | None:
    """Most rows of a layer, phase and window; None for all."""
    return None if value is None else check_integer("max_samples", value, at_least=1)


def check_fraction(option: str, value: object) -> float:
    """A share in (0, 1]."""
    rule = f"{option}={value!r} is not a share in (0, 1], such as 0.1"
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        raise OptionError(rule)
    if not 0 < value <= 1:
        raise OptionError(f"{rule}; for {value} percent write {value / 100:g}" if 1 < value <= 100 else rule)
    return float(value)


def check_overhead(value: object) -> float | None:
    """Share of the training's time that recording may take; None for all that it takes."""
    if value is None:
        return None
    if isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool) and 0 < value < 1:
        return float(value)
    raise OptionError(
        f"max_overhead={value!r} is no share of the training's time in (0, 1), such as 0.02 for two percent; leave it "
        f"out to record every forward"
    )


def check_resume(value: object) -> bool | str | None:
    """None, True or False, or a name that all ranks of this attempt share."""
    if value is None or isinstance(value, bool) or (isinstance(value, str) and value):
        return value
    raise OptionError(
        f"resume={value!r} must be True, False, or a name that the ranks of this attempt share and no earlier one had"
    )


def check_spill_dir(value: object) -> str | None:
    """An absolute local folder, None for the system's temporary one."""
    if value is None:
        return None
    if not isinstance(value, str | os.PathLike) or not os.fspath(value) or "://" in os.fsdecode(value):
        raise OptionError(f"spill_dir={value!r} must be a local folder")
    return os.path.abspath(os.path.expanduser(os.fsdecode(value)))


def check_trial(value: object) -> Trial | None:
    """A trial of a sweep, or None."""
    if value is None or isinstance(value, Trial):
        return value
    raise OptionError(
        f"trial={value!r} is no trial; in the function that Ray Tune runs, take "
        f"delve_ray.integrations.tune.current_trial() and hand it to the trainer's workers"
    )


def check_state(state: object) -> int:
    """The step that a state of `state_dict` says is next."""
    if not isinstance(state, Mapping) or "next_step" not in state:
        raise OptionError(f"state={state!r} is none that state_dict() made: it lacks 'next_step'")
    return check_integer("next_step", state["next_step"])


def check_mask_function(value: object) -> None:
    """A function of the model's inputs, or None."""
    if value is not None and not callable(value):
        raise OptionError(
            f"mask is a {type(value).__name__}, not a function; it gets what the model's forward gets and "
            f"returns the batch's mask. For a mask that you have, use `with tracker.mask(mask):` around the forward"
        )


def check_precision(value: object, device: object = None) -> torch.dtype:
    """What products are summed in. A GPU alone has them in TF32 and bfloat16; `device` is as the user gave it."""
    name = check_choice("precision", value, tuple(PRECISIONS))
    if name in ("tf32", "bfloat16"):
        here = "device='cpu'" if str(device).startswith("cpu") else "" if torch.cuda.is_available() else "no GPU here"
        if here:
            raise OptionError(
                f"precision={value!r} is for products on a GPU, and there is {here}; on the CPU use 'float32', which "
                f"is as fast there"
            )
    return PRECISIONS[name]


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
        "layerwise_sat": (True, "rows are always per layer, with the mean beside them"),
        "average_sat": (True, "the mean over layers is always published"),
        "reset_covariance": (True, "every window starts anew"),
    }
    for option, (default, instead) in unbuilt.items():
        value = options[option]
        if value != default:
            raise not_built(option, value, instead)
