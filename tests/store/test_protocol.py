"""What a run's configuration takes and refuses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from delve_ray.errors import OptionError
from delve_ray.store.protocol import SAME_FOR_ALL, StoreConfig

CONFIG = StoreConfig(run="r", savefile="/nowhere", world_size=1)


def test_one_threshold_needs_no_list() -> None:
    assert (CONFIG.threshold, CONFIG.thresholds) == (0.99, ())


def test_of_several_thresholds_the_first_is_the_runs_own() -> None:
    several = (0.9, 0.99, 0.999)
    assert replace(CONFIG, threshold=0.9, thresholds=several).thresholds == several
    with pytest.raises(OptionError, match=r"threshold=0\.99 is not the first of thresholds=\(0\.9, 0\.99, 0\.999\)"):
        replace(CONFIG, thresholds=several)
    assert "thresholds" in SAME_FOR_ALL


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"threshold": 1.5}, "sat_threshold=1.5 is out of range"),
        ({"threshold": 0.9, "thresholds": (0.9, 1.5)}, "1.5 is out of range"),
        ({"threshold": 0.9, "thresholds": (0.9, 0.9)}, "0.9 twice"),
        ({"threshold": 0.9, "thresholds": "0.9"}, "of type str"),
        ({"stats": ("rank_me",)}, "did you mean 'rankme'"),
    ],
)
def test_what_cannot_be_used_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        replace(CONFIG, **changes)
