"""run.json: versions, options, layers, the attempts, and how the run has ended."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

import numpy as np
import pyarrow as pa

from delve_ray.errors import OptionError, ReadError, RegistrationError
from delve_ray.schema import SCHEMA_VERSION
from delve_ray.storage import Storage
from delve_ray.store.description import layer_difference
from delve_ray.store.protocol import LayerInfo, StoreConfig

log = logging.getLogger(__name__)

NAME = "run.json"
END_RETRY_S = (0.2, 1.0, 5.0)
"""Pauses before the end of a run is written again, where it is all that could not be written."""


def read_run(storage: Storage) -> dict[str, Any]:
    """The content of a run's run.json. Raises ReadError, also where there is none."""
    try:
        content = json.loads(storage.read_bytes(NAME))
    except (OSError, ValueError) as error:
        raise ReadError(f"{storage.uri}/{NAME} cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise ReadError(f"{storage.uri}/{NAME} does not describe a run")
    return content


class RunFile:
    """Writes run.json when the run begins, and again with every attempt and at the end.

    Raises OptionError where the savefile holds a run already, unless the configuration says `resume`; then
    RegistrationError where that run is another one.
    """

    def __init__(self, storage: Storage, config: StoreConfig, layers: Sequence[LayerInfo]) -> None:
        self._storage = storage
        self._lock = threading.Lock()
        self._writing = threading.Lock()  # one at a time, so that no older content replaces a newer one
        self._content = _describe(storage, config, layers)
        self._dirty = False
        self._failing = False
        self._new = storage.write_new(NAME, self._bytes())
        if not self._new:
            if not config.resume:
                raise OptionError(
                    f"savefile={storage.uri!r} holds a run already; choose another savefile, remove that one, or go on "
                    f"with that run by resume=True"
                )
            self._go_on(config, layers)

    def _go_on(self, config: StoreConfig, layers: Sequence[LayerInfo]) -> None:
        before = read_run(self._storage)
        if before.get("run") != config.run:
            raise RegistrationError(
                f"savefile={self._storage.uri!r} holds run {before.get('run')!r}, not {config.run!r}; choose another "
                f"savefile, or run={before.get('run')!r} to go on with it"
            )
        try:
            known = [LayerInfo(**layer) for layer in before.get("layers", [])]
        except TypeError as error:
            raise ReadError(f"{self._storage.uri}/{NAME} lists layers that are none ({error})") from error
        if known != list(layers):
            raise RegistrationError(
                f"run {config.run!r} exists with other layers: {layer_difference(known, layers)}; choose another "
                f"savefile for this model"
            )
        self._content["created"] = before.get("created", self._content["created"])
        self._content["attempts"] = list(before.get("attempts", []))
        self._dirty = True

    def undo(self) -> None:
        """Remove the file again, if it was not there before: the run does not begin."""
        if self._new:
            with contextlib.suppress(OSError):
                self._storage.delete(NAME)

    @property
    def attempts(self) -> int:
        """Number of attempts that the run has had."""
        with self._lock:
            return max((int(attempt["attempt"]) + 1 for attempt in self._content["attempts"]), default=0)

    def begin_attempt(self, number: int, world_size: int) -> None:
        """Note that an attempt begins, or goes on; written by the next `write_if_changed`."""
        with self._lock:
            known = [attempt["attempt"] for attempt in self._content["attempts"]]
            if number not in known:
                began = datetime.now(UTC).isoformat()
                self._content["attempts"].append({"attempt": number, "world_size": world_size, "began": began})
            self._content["end"] = None
            self._dirty = True

    def end(self, why: str, problems: Sequence[str]) -> None:
        """Note and write how the run has ended."""
        with self._lock:
            self._content["end"] = {"time": datetime.now(UTC).isoformat(), "why": why, "problems": list(problems)}
            self._dirty = True
        self.write_if_changed()
        for pause in () if problems else END_RETRY_S:
            if self._dirty:
                time.sleep(pause)
                self.write_if_changed()

    def write_if_changed(self) -> None:
        """Write what has changed; what cannot be written now is said once and tried again with the next call."""
        with self._writing:
            with self._lock:
                if not self._dirty:
                    return
                data, self._dirty = self._bytes(), False
            try:
                self._storage.write_atomic(NAME, data)
                self._failing = False
            except (OSError, pa.ArrowException) as error:
                with self._lock:
                    self._dirty = True
                if not self._failing:
                    log.error("%s/%s cannot be written (%s); it is tried again", self._storage.uri, NAME, error)
                self._failing = True

    def _bytes(self) -> bytes:
        return json.dumps(self._content, indent=2).encode()


def _describe(storage: Storage, config: StoreConfig, layers: Sequence[LayerInfo]) -> dict[str, Any]:
    """Versions, options, model summary, world size, and where the store is."""
    versions = {"python": platform.python_version(), "numpy": np.__version__}
    for package in ("delve_ray", "torch", "ray", "pyarrow"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    options = config.on_disk() | {"savefile": storage.uri}  # which masks passwords
    return {
        "schema_version": SCHEMA_VERSION,
        "run": config.run,
        "world_size": config.world_size,
        "created": datetime.now(UTC).isoformat(),
        "store": {"host": socket.gethostname(), "pid": os.getpid()},
        "options": options,
        "model": options.pop("model"),
        "layers": [asdict(layer) for layer in layers],
        "versions": versions,
        "attempts": [],
        "end": None,
    }
