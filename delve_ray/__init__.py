"""Live layer saturation and eigenspectra of networks that train on many machines.

The public names are imported when they are first used, so that reading files needs no torch and tracking
without Ray needs no Ray.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from delve_ray.analysis.reading import read_covariances, read_scalars, read_spectra
    from delve_ray.errors import (
        DeltaRefused,
        DelveRayError,
        OptionError,
        ReadError,
        RegistrationError,
        StoreError,
    )
    from delve_ray.layers import register_adapter
    from delve_ray.store.launch import get_store, start_store
    from delve_ray.tracker import SaturationTracker

_HOMES = {
    "SaturationTracker": "tracker",
    "register_adapter": "layers",
    "start_store": "store.launch",
    "get_store": "store.launch",
    "read_spectra": "analysis.reading",
    "read_covariances": "analysis.reading",
    "read_scalars": "analysis.reading",
    **dict.fromkeys(
        ("DelveRayError", "OptionError", "StoreError", "RegistrationError", "DeltaRefused", "ReadError"), "errors"
    ),
}

__all__ = [
    "DeltaRefused",
    "DelveRayError",
    "OptionError",
    "ReadError",
    "RegistrationError",
    "SaturationTracker",
    "StoreError",
    "get_store",
    "read_covariances",
    "read_scalars",
    "read_spectra",
    "register_adapter",
    "start_store",
]


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("delve_ray")
        except PackageNotFoundError as error:
            raise AttributeError("delve_ray is imported from a directory and not installed: no version") from error
    if name not in _HOMES:
        raise AttributeError(f"module 'delve_ray' has no attribute {name!r}")
    return getattr(import_module(f"delve_ray.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
