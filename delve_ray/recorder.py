"""Forward hooks: the only code of ours that runs inside the training step.

A hook turns the layer's output into rows and adds them to the accumulator of (layer, phase) on the device,
on the stream of the forward, before anybody can change the output in place. It keeps nothing of the batch,
waits for nothing but the accumulators' lock (held by others for a swap of references), and never raises into
the training.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.hooks import RemovableHandle

from delve_ray import hooks
from delve_ray.accumulator import Accumulator
from delve_ray.budget import Budget
from delve_ray.compiled import modes_are_on, tracing
from delve_ray.device_accumulator import DeviceAccumulator
from delve_ray.device_reservoir import DeviceReservoir
from delve_ray.errors import Unrecordable
from delve_ray.host_accumulator import HostAccumulator
from delve_ray.layers import RowOptions
from delve_ray.masks import UNKNOWN, MaskFunction, Masks
from delve_ray.memory import outbox_bytes, too_wide, worker_bytes
from delve_ray.rows import Reader, Sampler, first_rows, last_steps
from delve_ray.schema import PHASES
from delve_ray.selection import TrackedLayer
from delve_ray.sketch import SketchRule
from delve_ray.sketch_accumulator import SketchAccumulator
from delve_ray.workspace import Workspace

log = logging.getLogger(__name__)

TRAIN, EVAL = 0, 1
"""Index of a phase in `schema.PHASES`."""

Harvest = dict[tuple[int, int], Accumulator]
"""What was recorded since the last harvest, by (index of the layer, index of the phase)."""

_FAILURES = 10
"""Forwards of a layer in a row whose output could not be reduced, after which the layer is given up."""


@dataclass(frozen=True, slots=True)
class RecorderOptions:
    """What the hooks need to know of the tracker's options."""

    rows: RowOptions = RowOptions()
    log_interval: int = 1
    precision: torch.dtype = torch.float32
    products: str = "float32"
    device: torch.device | None = None
    max_samples: int | None = None
    sample_fraction: float = 1.0
    seed: int = 0
    max_overhead: float | None = None
    max_features: int = 8192
    sketch_size: int = 0
    max_memory: int = 16 << 30
    embed_rows: int = 0

    @property
    def sketching(self) -> SketchRule:
        """Which layers are sketched."""
        return SketchRule(self.max_features, self.sketch_size)


class Recorder:
    """Owns the hooks of the tracked layers and the accumulators that they fill.

    `harvest` hands the accumulators over and starts new ones; it only moves references, so it may be called
    from the training thread and from the sender's thread while forwards run.
    """

    def __init__(self, layers: Sequence[TrackedLayer], options: RecorderOptions) -> None:
        self.layers = list(layers)
        self.options = options
        self.recording = False
        self.masks = Masks()
        # torch.compile must not trace into the reduction. Shielding it imports torch._dynamo, a second that
        # every optimizer pays as well; here, and not at import, so that reading files stays light.
        self.record = torch.compiler.disable(self._record)
        self.record_rows = torch.compiler.disable(self._record_rows)
        readers = {layer.adapter: Reader(layer.adapter, options.rows) for layer in self.layers}
        self._readers = [readers[layer.adapter] for layer in self.layers]
        self._widths: dict[int, int] = {}
        self._sampler = None if options.sample_fraction == 1 else Sampler(options.sample_fraction, options.seed)
        self._budget = None if options.max_overhead is None else Budget(options.max_overhead, options.seed)
        self._accumulators: Harvest = {}
        self._randoms: dict[tuple[int, int], np.random.Generator] = {}
        self._workspaces: dict[torch.device, Workspace] = {}
        self._forwards: dict[tuple[int, int], int] = {}
        self._offered: dict[tuple[int, int], int] = {}
        self._failures: dict[tuple[int, int], int] = {}
        self._given_up: set[int] = set()  # only ever added to, by the sender's thread, too, which waits for no hook
        self._warned: set[tuple[int, str]] = set()
        self._phases: set[int] = set()
        # Reentrant: a signal handler that closes the tracker may interrupt a hook of the same thread. Who takes
        # this lock and the sender's takes this one first.
        self.lock = threading.RLock()
        self._handles: list[RemovableHandle] = []
        self._token, self._operators = hooks.register(self)
        try:
            for index, layer in enumerate(self.layers):
                hook = hooks.LayerHook(self._token, index, self._operators, self._readers[index])
                self._handles.append(layer.module.register_forward_hook(hook))
        except BaseException:
            self.close()
            raise

    def ask_for_masks(self, models: Sequence[nn.Module], function: MaskFunction) -> None:
        """Ask `function` for the mask at the start of every forward of these models."""
        for index, model in enumerate(models):
            begin = hooks.MaskHook(self._token, index, self._operators, function)
            end = hooks.MaskEndHook(self._token, index, self._operators)
            self._handles.append(model.register_forward_pre_hook(begin, with_kwargs=True))
            self._handles.append(model.register_forward_hook(end, always_call=True))

    def start(self) -> None:
        """Record from now on.

        What torch.compile compiled before the hooks were there would never call them, so it is compiled anew.
        """
        self.recording = True
        dynamo: Any = sys.modules.get("torch._dynamo.convert_frame")
        if getattr(dynamo, "FRAME_COUNTER", 0):
            log.info("torch.compile has run in this process: its caches are reset, so that the hooks are compiled in")
            torch._dynamo.reset()

    # --- in the forward ------------------------------------------------------------------------------------

    def _record(self, index: int, module: nn.Module, output: Any) -> None:
        """Add one forward's output; called by the hooks."""
        self._observe((index, TRAIN if module.training else EVAL), lambda: self._readers[index].read(module, output))

    def _record_rows(self, index: int, phase: int, rows: Tensor, padded: bool) -> None:
        """Add one forward's rows; called by the operator in compiled code."""
        self._observe((index, phase), lambda: (rows, padded))

    def _observe(self, key: tuple[int, int], read: Callable[[], tuple[Tensor, bool] | None]) -> None:
        try:
            # A forward inside a running backward pass is activation checkpointing recomputing what was counted.
            if torch._C._current_graph_task_id() != -1 or self._is_given_up(key) or tracing():
                return
            with self.lock, _disable_current_modes() if modes_are_on() else contextlib.nullcontext():
                if self._due(key):
                    if self._budget is None:
                        self._read(key, read, 1.0)
                    else:
                        self._read_within(self._budget, key, read)
        except Exception as error:  # our mistake or an output we do not know must not stop a training
            self._fail(key, error)

    def _is_given_up(self, key: tuple[int, int]) -> bool:
        return key[0] in self._given_up or self._failures.get(key, 0) >= _FAILURES

    def _read(self, key: tuple[int, int], read: Callable[[], tuple[Tensor, bool] | None], weight: float) -> None:
        found = read()
        if found is not None:
            self._add(key, *found, weight)
        self._failures.pop(key, None)

    def _read_within(
        self, budget: Budget, key: tuple[int, int], read: Callable[[], tuple[Tensor, bool] | None]
    ) -> None:
        """Record a forward if the budget chooses it, and tell it the time."""
        began = budget.clock()
        weight = budget.weight(key)
        try:
            if weight:
                self._read(key, read, float(weight))
        finally:
            budget.spent(key, budget.clock() - began, recorded=weight > 0)

    def _due(self, key: tuple[int, int]) -> bool:
        """Count a forward, and say whether `log_interval` and `max_samples` let it be recorded."""
        forward = self._forwards.get(key, 0)
        self._forwards[key] = forward + 1
        limit = self.options.max_samples
        return forward % self.options.log_interval == 0 and (limit is None or self._offered.get(key, 0) < limit)

    def _add(self, key: tuple[int, int], rows: Tensor, padded: bool, weight: float) -> None:
        """Leave out what does not count, and add the rest."""
        if not self._has_values(key[0], rows):
            return
        adapter = self.layers[key[0]].adapter
        keep = None
        mask = self.masks.current() if padded else None
        if mask is UNKNOWN or rows.numel() == 0:
            return
        if rows.dim() == 1:
            rows = rows.unsqueeze(0)
        if mask is not None:
            steps_first = not (adapter.batch_first or mask.batch_first)
            if steps_first and rows.dim() > 2:
                rows = rows.transpose(0, 1)
            keep = mask.on(rows.device).keep(rows.shape[:-1], steps_first=steps_first)
            if keep is None:
                self._warn_unfit(key[0], mask.valid.shape, rows.shape)
        sequence = adapter.has_steps(rows)
        if sequence and rows.dim() == 3 and self.options.rows.timeseries_method == "last_timestep":
            rows, keep = last_steps(rows, keep)
        if self._sampler is not None:
            rows, keep = self._sampler.choose(rows, keep, feature_map=not sequence)
        limit = self.options.max_samples
        if rows.numel() == 0:
            return
        offered = self._offered.get(key, 0)
        if limit is not None:
            rows, keep = first_rows(rows, keep, limit - offered)
        accumulator = self._accumulator(key, rows)
        accumulator.add(rows, keep, weight)
        if accumulator.reservoir is not None:
            accumulator.reservoir.offer(rows, keep, weight)
        self._offered[key] = offered + rows.numel() // rows.shape[-1]
        self._phases.add(key[1])

    def _has_values(self, index: int, rows: Tensor) -> bool:
        """Whether these are numbers: not those of a fake or meta tensor, nor of a transform (vmap, grad, jvp)."""
        if rows.device.type == "meta" or isinstance(rows, FakeTensor):
            return False
        if torch._C._functorch.is_functorch_wrapped_tensor(rows):
            self.say_once("torch.func transforms (vmap, grad, jvp) are not recorded: their tensors have no rows")
            return False
        if rows.is_cuda and torch.cuda.is_current_stream_capturing():
            self.say_once("a forward that is captured into a CUDA graph is not recorded, nor are its replays")
            return False
        return True

    def say_once(self, what: str) -> None:
        """Say something that holds for the whole run."""
        if (-1, what) not in self._warned:
            self._warned.add((-1, what))
            log.warning("%s", what)

    def _warn_unfit(self, index: int, mask: torch.Size, rows: torch.Size) -> None:
        if (index, "mask") not in self._warned:
            self._warned.add((index, "mask"))
            log.warning(
                "layer %s: a mask of shape %s does not fit its rows of shape %s; all of them count",
                self.layers[index].name,
                tuple(mask),
                tuple(rows),
            )

    def give_up(self, index: int, why: str) -> None:
        """Record no more of a layer, and say so once."""
        self._given_up.add(index)
        self.say_once(f"layer {self.layers[index].name} is not recorded: {why}")

    def say_unreadable(self, index: int, why: str) -> None:
        """Say, once, which layer cannot be recorded inside compiled code."""
        self.say_once(f"layer {self.layers[index].name} is not recorded inside compiled code: {why}")

    def _fail(self, key: tuple[int, int], error: Exception) -> None:
        """Leave out one forward of a layer, with a word for each kind of error; after several in a row, give it up."""
        index, phase = key
        name = self.layers[index].name
        if isinstance(error, Unrecordable):
            self.give_up(index, str(error))
            return
        with self.lock:
            failures = self._failures[key] = self._failures.get(key, 0) + 1
        kind = type(error).__name__
        if failures < _FAILURES and (index, kind) in self._warned:
            return
        self._warned.add((index, kind))
        width = self.width(index)
        log.warning(
            "layer %s: %s; its output cannot be reduced to rows of %s (%s: %s)",
            name,
            f"not recorded any more in {PHASES[phase]}" if failures == _FAILURES else "a forward is left out",
            "features" if width is None else f"{width} features",
            kind,
            str(error).partition("\n")[0][:200],
        )

    # --- accumulators --------------------------------------------------------------------------------------

    def width(self, index: int) -> int | None:
        """Features of a layer; None as long as no forward has told."""
        return self.layers[index].features or self._widths.get(index)

    @property
    def widths(self) -> list[int]:
        """Features of the layers that are recorded, as far as they are known."""
        return [width for index in range(len(self.layers)) if (width := self.width(index))]

    @property
    def outbox_bytes(self) -> int:
        """Bytes of packed deltas that `worker_bytes` counts."""
        return outbox_bytes(self.widths, self.options.embed_rows, self.options.sketching)

    @property
    def spare_bytes(self) -> int:
        """Bytes that `max_memory` leaves above the ones that `worker_bytes` counts."""
        needed = worker_bytes(self.widths, self.options.embed_rows, self.options.sketching)
        return max(0, self.options.max_memory - needed)

    def _accumulator(self, key: tuple[int, int], rows: Tensor) -> Accumulator:
        accumulator = self._accumulators.get(key)
        width = self.width(key[0])
        if width not in (None, rows.shape[-1]) and any(
            hasattr(weight, "placements") for weight in self.layers[key[0]].module.parameters(recurse=False)
        ):
            raise Unrecordable(
                f"its output has a width of {rows.shape[-1]}, the layer one of {width}: with tensor parallelism each "
                f"rank has a slice of the features; track a module whose output is whole, or give this one an output "
                f"layout that gathers them"
            )
        if accumulator is None:
            device = self.options.device or rows.device
            width = width or self._admit(key[0], rows.shape[-1])
            workspace = self._workspaces.get(device)
            if workspace is None:
                workspace = self._workspaces[device] = Workspace(device)
            if columns := self.options.sketching.columns(width):
                accumulator = SketchAccumulator(width, columns, workspace, self.options.precision)
            elif device.type == "cpu":
                accumulator = HostAccumulator(width, workspace, self.options.precision)
            else:
                accumulator = DeviceAccumulator(width, workspace, self.options.precision, self.options.products)
            if self.options.embed_rows:
                random = self._randoms.setdefault(key, np.random.default_rng([self.options.seed, *key]))
                accumulator.reservoir = DeviceReservoir(self.options.embed_rows, random)
            self._accumulators[key] = accumulator
        return accumulator

    def _admit(self, index: int, width: int) -> int:
        """Take in a layer whose width its first forward tells, if it fits. Raises Unrecordable."""
        rule = self.options.sketching
        if width > self.options.max_features:
            if not rule.size:
                raise Unrecordable(f"it {too_wide(width, rule)}")
            say = log.info if rule.columns(width) else log.warning
            say("layer %s %s", self.layers[index].name, too_wide(width, rule))
        needed = worker_bytes([*self.widths, width], self.options.embed_rows, rule)
        if needed > self.options.max_memory:
            raise Unrecordable(
                f"with its {width} features recording would take up to {needed} bytes in this worker, more than "
                f"max_memory={self.options.max_memory}; leave out other layers, or raise it"
            )
        self._widths[index] = width
        return width

    def harvest(self, *, end_of_window: bool) -> Harvest:
        """Everything recorded since the last harvest; later forwards fill new accumulators.

        The end of a window also restarts the counting of `log_interval` and `max_samples`, so that each window
        has the first batch of each phase.
        """
        with self.lock:
            harvest, self._accumulators = self._accumulators, {}
            for key in [key for key, accumulator in harvest.items() if accumulator.adding]:
                del harvest[key]
                log.error(
                    "layer %s: an interrupted forward spoilt its sums; they are left out", self.layers[key[0]].name
                )
            if end_of_window:
                self._forwards.clear()
                self._offered.clear()
                self._phases.clear()
                if self._budget is not None:
                    self._budget.end_window()
        return harvest

    def phases(self) -> frozenset[int]:
        """The phases that the open window has rows of, harvested or not."""
        with self.lock:
            return frozenset(self._phases)

    def close(self) -> None:
        """Remove the hooks; what was recorded can still be harvested."""
        self.recording = False
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        hooks.forget(self._token)
