"""Every exception that delve_ray raises on purpose; each message names the thing, the value and the remedy."""

from __future__ import annotations


class DelveRayError(Exception):
    """Base class of the exceptions below, for callers that want to catch them all."""


class OptionError(DelveRayError, ValueError):
    """An option, or a combination of options, that cannot be used; raised at construction."""


class StoreError(DelveRayError, RuntimeError):
    """The covariance store is unreachable, has ended, or did not answer in time.

    `final` says that asking again cannot help.
    """

    def __init__(self, message: str, *, final: bool = False) -> None:
        super().__init__(message)
        self.final = final


class StoreLost(StoreError):
    """The process of the store that was asked has ended, for good."""


class UnknownSource(StoreError):
    """The store was started anew and does not know this worker; it registers again and goes on."""


class RegistrationError(DelveRayError, ValueError):
    """A worker does not fit the run that it wants to join (layers, world size, rank, run in use)."""


class RunEnded(RegistrationError):
    """The run that a worker wants to join has ended, and its store is still there."""


class DeltaRefused(DelveRayError, ValueError):
    """A delta that the store turned away; the store is as it was before."""


class ReadError(DelveRayError, ValueError):
    """A run directory or file that cannot be read as delve_ray output."""


class Unrecordable(Exception):
    """A layer's outputs cannot be recorded, now or later; the message says why and what to do."""
