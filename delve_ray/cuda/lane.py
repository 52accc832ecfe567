"""The side stream of a device, on which staged rows are reduced, and what its reductions share.

The training goes on meanwhile: a forward's stream waits for the side stream only where it gets back a stage that is
still being reduced, and the side stream waits for the copies into a stage. On the CPU there is nothing to wait for.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
from collections import deque
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from delve_ray.moments import F64
from delve_ray.workspace import empty

log = logging.getLogger(__name__)

SPARE_BYTES = 64 << 20
"""Stages that wait for the next accumulator that needs one; beyond it only one of each size."""
_PINNED_VALUES = 1 << 19
"""Values that are copied to the host at a time."""


@functools.cache
def kernels(device: torch.device) -> Any:
    """The module that launches the Triton kernels; None where they cannot run, and torch's operators do."""
    if device.type != "cuda" or torch.version.hip is not None or torch.cuda.get_device_capability(device) < (8, 0):
        return None
    try:
        from delve_ray.cuda import launch

        launch.try_out(device)
    except Exception as error:  # no Triton, no compiler for its launchers, …
        reason = (str(error).splitlines() or [""])[0][:200]
        log.info(
            "rows on %s are reduced by torch's operators, without Triton (%s: %s)", device, type(error).__name__, reason
        )
        return None
    return launch


class Lane:
    """Orders the work of one device's accumulators; used under the recorder's lock, but for `give` and `download`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._spare: dict[int, deque[tuple[Tensor, Any]]] = {}
        self._pinned = threading.local()
        self._scratch: Any = None
        self._direct: Any = None
        self._direct_stream: Any = None
        self._currents: dict[int, Any] = {}

    def current(self) -> Any:
        """The stream that the caller's work is on, always the same object; None on the CPU."""
        if self.stream is None:
            return None
        number = torch._C._cuda_getCurrentRawStream(self.device.index)  # a tenth of the time that asking for it takes
        found = self._currents.get(number)
        if found is None:
            found = self._currents[number] = torch.cuda.current_stream(self.device)
        return found

    def work(self) -> AbstractContextManager[Any]:
        """In this context work goes onto the side stream."""
        return contextlib.nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def scratch(self) -> Any:
        """For kernels on the side stream."""
        if self._scratch is None:
            self._scratch = kernels(self.device).Scratch(self.device)
        return self._scratch

    def direct_scratch(self, stream: Any) -> Any:
        """For kernels on a forward's stream."""
        if self._direct is None:
            self._direct = kernels(self.device).Scratch(self.device)
        follow(stream, [self._direct_stream])
        self._direct_stream = stream
        return self._direct

    # --- stages --------------------------------------------------------------------------------------------

    def take(self, nbytes: int) -> tuple[Tensor, Any]:
        """A buffer of bytes and the event after which it may be written, None for at once."""
        spare = self._spare.get(nbytes)
        if spare and (self.stream is None or len(spare) > 1 or self._full(nbytes) or spare[0][1].query()):
            return spare.popleft()
        with self.work():  # so that it is free for later work of the side stream as soon as nobody holds it
            buffer = empty(nbytes, torch.uint8, self.device)
            return buffer, None if self.stream is None else self.stream.record_event()

    def give(self, buffer: Tensor) -> None:
        """Take back a buffer that work of the side stream has been asked to read."""
        spare = self._spare.setdefault(buffer.numel(), deque())
        if not spare or not self._full(buffer.numel()):
            spare.append((buffer, None if self.stream is None else self.stream.record_event()))

    def _full(self, nbytes: int) -> bool:
        return sum(size * len(spare) for size, spare in list(self._spare.items())) + nbytes > SPARE_BYTES

    # --- reading -------------------------------------------------------------------------------------------

    def download(self, values: Tensor) -> F64:
        """Float64 values on the host, when the side stream is done with them; blocks this thread alone.

        Through pinned memory: a copy into other memory would hold up all streams.
        """
        if self.stream is None:
            return np.asarray(values.numpy())
        flat = values.reshape(-1)
        out = np.empty(flat.numel())
        pinned: Tensor | None = getattr(self._pinned, "values", None)
        if pinned is None:
            pinned = torch.empty(_PINNED_VALUES, dtype=torch.float64, device="cpu", pin_memory=True)
            self._pinned.values = pinned
        done = torch.cuda.Event(blocking=True)
        for start in range(0, out.size, _PINNED_VALUES):
            part = pinned[: out.size - start]
            with self.work():
                part.copy_(flat[start : start + part.numel()], non_blocking=True)
                done.record(self.stream)
            done.synchronize()
            out[start : start + part.numel()] = part.numpy()
        return out


def follow(stream: Any, others: Iterable[Any]) -> None:
    """Let a stream wait, on the device, for what the others have been asked to do."""
    for other in others:
        if other is not None and other is not stream and other != stream:
            stream.wait_event(other.record_event())
