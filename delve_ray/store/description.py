"""In words, what distinguishes a worker's layers and options from those of the run that it joins."""

from __future__ import annotations

from collections.abc import Sequence

from delve_ray.storage import masked
from delve_ray.store.protocol import SAME_FOR_ALL, LayerInfo, StoreConfig


def layer_difference(known: Sequence[LayerInfo], other: Sequence[LayerInfo]) -> str:
    """In words, what distinguishes two lists of layers; the first few of each."""
    ours, theirs = {info.name: info for info in known}, {info.name: info for info in other}
    missing = [name for name in ours if name not in theirs]
    extra = [name for name in theirs if name not in ours]
    changed = [
        f"{name} ({mine.layer_type} of {mine.features}, not {theirs[name].layer_type} of {theirs[name].features})"
        for name, mine in ours.items()
        if name in theirs and mine != theirs[name]
    ]
    parts = [
        f"{label} {', '.join(names[:5])}{' …' if len(names) > 5 else ''}"
        for label, names in (("missing", missing), ("unknown", extra), ("different", changed))
        if names
    ]
    return "; ".join(parts) or "the same layers in another order"


def config_difference(known: StoreConfig, other: StoreConfig, rank: int) -> str | None:
    """In words, why a worker's options do not fit the run's; None where they do."""
    for name in SAME_FOR_ALL:
        mine, theirs = getattr(known, name), getattr(other, name)
        if name == "trial" and None in (mine, theirs):  # the store was started by hand, or the worker elsewhere
            continue
        if mine != theirs:
            if name == "savefile":
                mine, theirs = masked(mine), masked(theirs)
            option = {"product_eps": "the epsilon of precision", "threshold": "sat_threshold"}.get(name, name)
            return (
                f"rank {rank} brings {option}={theirs!r}, but run {known.run!r} has {option}={mine!r}; "
                f"give every worker of a run the same options, or another run name"
            )
    differing = [key for key, value in other.recording.items() if known.recording.get(key) != value]
    if not known.recording or not differing:
        return None
    return (
        f"rank {rank} records with {', '.join(f'{key}={other.recording[key]!r}' for key in differing)}, but run "
        f"{known.run!r} with {', '.join(f'{key}={known.recording.get(key)!r}' for key in differing)}; rows that are "
        f"made differently do not belong together: give every worker the same options, or another run name"
    )
