"""Forward hooks: the only code of ours that runs inside the training step.

A hook turns the layer's output into rows and adds them to the accumulator of (layer, phase) on the device,
on the stream of the forward, before anybody can change the output in place. It keeps nothing of the batch,
waits for nothing but the accumulators' lock (held by others for a swap of references), and never raises into
the training.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import sys
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses import FakeTensor
from torch.utils.hooks import RemovableHandle

from delve_ray.accumulator import Accumulator
from delve_ray.errors import OptionError
from delve_ray.layers import RowOptions, TrackedLayer
from delve_ray.moments import triangle_size
from delve_ray.workspace import Workspace, block_plan

log = logging.getLogger(__name__)

TRAIN, EVAL = 0, 1
"""Index of a phase in `schema.PHASES`."""

Harvest = dict[tuple[int, int], Accumulator]
"""What was recorded since the last harvest, by (index of the layer, index of the phase)."""

_FAILURES = 10
"""Forwards of a layer in a row whose output could not be reduced, after which the layer is given up."""

_RECORDERS: weakref.WeakValueDictionary[int, Recorder] = weakref.WeakValueDictionary()
_TOKENS = itertools.count()


class _Hook:
    """The hook of one layer. It holds two integers, so that what a module references can always be copied.

    A copied model (deepcopy, EMA, torch.save of a whole model) is not recorded: a copy of a hook is a
    callable of the standard library that accepts anything and returns None, which also lets a pickled model
    load where delve_ray is not installed.
    """

    __slots__ = ("layer", "token")

    def __init__(self, token: int, layer: int) -> None:
        self.token = token
        self.layer = layer

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        recorder = _RECORDERS.get(self.token)
        if recorder is not None and recorder.recording:
            recorder.record(self.layer, module, output)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (contextlib.nullcontext(), "__exit__")


@dataclass(frozen=True, slots=True)
class RecorderOptions:
    """What the hooks need to know of the tracker's options."""

    rows: RowOptions = RowOptions()
    log_interval: int = 1
    precision: torch.dtype = torch.float32
    device: torch.device | None = None


class Recorder:
    """Owns the hooks of the tracked layers and the accumulators that they fill.

    `harvest` hands the accumulators over and starts new ones; it only moves references, so it may be called
    from the training thread and from the sender's thread while forwards run.
    """

    def __init__(self, layers: Sequence[TrackedLayer], options: RecorderOptions) -> None:
        self.layers = list(layers)
        self.options = options
        self.recording = False
        # torch.compile must not trace into the reduction. Shielding it imports torch._dynamo, a second that
        # every optimizer pays as well; here, and not at import, so that reading files stays light.
        self.record = torch.compiler.disable(self._record)
        self._accumulators: Harvest = {}
        self._workspaces: dict[torch.device, Workspace] = {}
        self._forwards: dict[tuple[int, int], int] = {}
        self._failures: dict[int, int] = {}
        self._warned: set[tuple[int, str]] = set()
        self._phases: set[int] = set()
        # Reentrant: a signal handler that closes the tracker may interrupt a hook of the same thread.
        self._lock = threading.RLock()
        self._token = next(_TOKENS)
        self._handles: list[RemovableHandle] = []
        _RECORDERS[self._token] = self
        try:
            for index, layer in enumerate(self.layers):
                self._handles.append(layer.module.register_forward_hook(_Hook(self._token, index)))
        except BaseException:
            self.close()
            raise

    def start(self) -> None:
        """Record from now on.

        What torch.compile compiled before the hooks were there would never call them, so it is compiled anew.
        """
        self.recording = True
        dynamo: Any = sys.modules.get("torch._dynamo.convert_frame")
        if getattr(dynamo, "FRAME_COUNTER", 0):
            log.info("torch.compile has run in this process: its caches are reset, so that the hooks are compiled in")
            torch._dynamo.reset()

    def _record(self, index: int, module: nn.Module, output: Any) -> None:
        """Add one forward's rows; called by the hooks."""
        # A forward inside a running backward pass is activation checkpointing recomputing what was counted; one
        # inside jit.trace or export sees an example.
        if torch._C._current_graph_task_id() != -1 or self._failures.get(index, 0) >= _FAILURES:
            return
        if torch._C._is_tracing() or torch.compiler.is_compiling():
            return
        key = (index, TRAIN if module.training else EVAL)
        try:
            with self._lock:
                forward = self._forwards.get(key, 0)
                self._forwards[key] = forward + 1
                if forward % self.options.log_interval == 0:
                    rows = self.layers[index].adapter.rows(module, output, self.options.rows)
                    if _has_values(rows):
                        self._accumulator(key, rows).add(rows)
                        self._phases.add(key[1])
                self._failures.pop(index, None)
        except Exception as error:  # our mistake or an output we do not know must not stop a training
            self._fail(index, error)

    def _fail(self, index: int, error: Exception) -> None:
        """Leave out one forward of a layer, with a word for each kind of error; after several in a row, give it up."""
        failures = self._failures[index] = self._failures.get(index, 0) + 1
        kind = type(error).__name__
        if failures < _FAILURES and (index, kind) in self._warned:
            return
        self._warned.add((index, kind))
        log.warning(
            "layer %s: %s; its output cannot be reduced to rows of %d features (%s: %s)",
            self.layers[index].name,
            "not recorded any more" if failures == _FAILURES else "a forward is left out",
            self.layers[index].features,
            kind,
            str(error).partition("\n")[0],
        )

    def _accumulator(self, key: tuple[int, int], rows: torch.Tensor) -> Accumulator:
        device = self.options.device or rows.device
        accumulator = self._accumulators.get(key)
        if accumulator is None:
            workspace = self._workspaces.get(device)
            if workspace is None:
                workspace = self._workspaces[device] = Workspace(device)
            accumulator = Accumulator(self.layers[key[0]].features, workspace, self.options.precision)
            self._accumulators[key] = accumulator
        return accumulator

    def harvest(self, *, end_of_window: bool) -> Harvest:
        """Everything recorded since the last harvest; later forwards fill new accumulators.

        The end of a window also restarts the counting of `log_interval`, so that each window has the first
        batch of each phase.
        """
        with self._lock:
            harvest, self._accumulators = self._accumulators, {}
            for key in [key for key, accumulator in harvest.items() if accumulator.adding]:
                del harvest[key]
                log.error(
                    "layer %s: an interrupted forward spoilt its sums; they are left out", self.layers[key[0]].name
                )
            if end_of_window:
                self._forwards.clear()
                self._phases.clear()
        return harvest

    def phases(self) -> frozenset[int]:
        """The phases that the open window has rows of, harvested or not."""
        with self._lock:
            return frozenset(self._phases)

    def close(self) -> None:
        """Remove the hooks; what was recorded can still be harvested."""
        self.recording = False
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        _RECORDERS.pop(self._token, None)


def _has_values(rows: torch.Tensor) -> bool:
    """Whether these are numbers: not those of a fake or meta tensor, nor of a function transform (vmap, grad, jvp)."""
    return not (
        rows.device.type == "meta"
        or isinstance(rows, FakeTensor)
        or torch._C._functorch.is_functorch_wrapped_tensor(rows)
    )


def fit_memory(layers: Sequence[TrackedLayer], *, max_features: int, max_memory: int) -> list[TrackedLayer]:
    """The layers that may be recorded: computes what they take before anything is allocated.

    Layers wider than `max_features` are left out, with a warning. Raises OptionError when none is left, or when
    the others take more than `max_memory` bytes.
    """
    tracked = [layer for layer in layers if layer.features <= max_features]
    for layer in layers:
        if layer.features > max_features:
            log.warning(
                "layer %s has %d features and is left out; raise max_features=%d to record it (%.1f GiB)",
                layer.name,
                layer.features,
                max_features,
                worker_bytes([layer]) / (1 << 30),
            )
    if not tracked:
        raise OptionError(f"max_features={max_features} leaves no layer out of {[layer.features for layer in layers]}")
    needed = worker_bytes(tracked)
    if needed > max_memory:
        widest = ", ".join(f"{w.name} ({w.features})" for w in sorted(tracked, key=lambda layer: -layer.features)[:3])
        raise OptionError(
            f"max_memory={max_memory} bytes, but recording {len(tracked)} layers takes up to {needed} in each worker; "
            f"leave some out, or raise it; the widest: {widest}"
        )
    log.info("recording %d layers takes up to %.1f MiB in this worker", len(tracked), needed / (1 << 20))
    return tracked


def worker_bytes(layers: Sequence[TrackedLayer]) -> int:
    """Bytes that recording takes at most, on the device and the host of one worker together.

    For every layer the accumulators of both phases, twice (those being filled and those handed to the
    sender), and its share of one packed delta of both phases; for all layers together one product and one
    chunk of rows of scratch, of the widest layer.
    """
    total = sum(4 * Accumulator.nbytes(layer.features) + 16 * triangle_size(layer.features) for layer in layers)
    widest = max((layer.features for layer in layers), default=0)
    # Scratch exists in float32 and, for rows that float32 cannot do, in float64.
    return total + 12 * (block_plan(widest).size + max(1 << 20, 1024 * widest)) if widest else total
