"""Recording within a share of the training's time: which forwards are recorded, and how much each then counts.

Forwards of a layer are taken in strata of `stride` consecutive ones; one of each stratum, drawn at random, is recorded
and counts `stride` times. Each forward has the same chance whatever it holds, and what it counts is the inverse of that
chance, so sums of weighted rows have the sums of all rows as their expectation (Horvitz and Thompson, 1952), however
the stride changes: it depends on what was measured before a stratum begins, never on what is in it. Layers draw apart
from each other, which spreads the work over the steps.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field

Key = tuple[int, int]
"""Index of a layer, index of a phase."""

_STRIDES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
"""Few, so that forwards that count alike come one after the other and can be reduced together."""
_FORGET = 0.05
_FASTEST = 0.25
"""Weight of a new step or cost in the running means, and the most that a cost may have."""
_REPAY_STEPS = 20
"""Steps over which what was spent beyond the share, or less, is made up for."""
_SLACK = (0.25, 1.5)
"""Least and most of its share that a step may spend to make up."""
_PAUSE = 4.0
"""A step this many times as long as usual is one with a pause in it: evaluation, a checkpoint, a debugger."""
_WARM_UP = 2
"""Forwards of each layer that are recorded in any case; the first is not representative, as it makes buffers."""


@dataclass(slots=True)
class _Layer:
    """One layer in one phase: its stratum, and what recording a forward of it costs."""

    random: random.Random
    forwards: int = 0
    stride: int = 1
    position: int = 0
    pick: int = 0
    cost: float = 0.0
    costs: int = 0
    in_window: int = 0
    in_last_window: int | None = None


@dataclass(slots=True)
class _Phase:
    """The steps of one phase: a step is what lies between two forwards of the layer that came first."""

    first: Key
    began: float | None = None
    step: float = 0.0
    steps: int = 0
    spent: float = 0.0
    skipping: float = 0.0
    would_spend: float = 0.0
    full: float = 0.0
    fulls: int = 0
    idle: float = 0.0
    debt: float = 0.0
    stride: int = 1
    layers: dict[Key, _Layer] = field(default_factory=dict)


class Budget:
    """Chooses forwards so that recording takes at most `share` of the time that training takes without it.

    A window has about one forward of each layer at least, whatever it costs, as soon as one window is over: windows
    shorter than the stride would be empty. Not thread-safe; draws nothing from global generators.
    """

    def __init__(self, share: float, seed: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self.share = share
        self.clock = clock
        self._seed = seed
        self._phases: dict[int, _Phase] = {}

    def weight(self, key: Key) -> int:
        """How often this forward counts: 0 for one that is not to be recorded."""
        phase = self._phases.get(key[1])
        if phase is None:
            phase = self._phases[key[1]] = _Phase(key)
        if key == phase.first:
            self._begin_step(phase)
        layer = phase.layers.get(key)
        if layer is None:
            layer = phase.layers[key] = _Layer(random.Random(f"{self._seed}/{key[0]}/{key[1]}"))
        if layer.position >= layer.stride:
            self._begin_stratum(phase, layer)
        chosen = layer.position == layer.pick
        layer.position += 1
        layer.forwards += 1
        layer.in_window += 1
        phase.would_spend += layer.cost
        return layer.stride if chosen else 0

    def spent(self, key: Key, seconds: float, *, recorded: bool) -> None:
        """Note what the hook took for this forward."""
        phase = self._phases[key[1]]
        layer = phase.layers[key]
        phase.spent += seconds
        if not recorded:
            phase.skipping += seconds
        elif layer.forwards > 1:
            # A mean of the first ones, later one that forgets: a group of many forwards is reduced with the last.
            layer.costs += 1
            # With a long stride there are few of them, so that each counts more.
            rate = min(_FORGET * math.sqrt(layer.stride), _FASTEST)
            layer.cost += (seconds - layer.cost) * max(1.0 / layer.costs, rate)

    def end_window(self) -> None:
        """Note how many forwards the window had, and begin new strata."""
        for phase in self._phases.values():
            for layer in phase.layers.values():
                if layer.in_window:
                    layer.in_last_window = layer.in_window
                layer.in_window = 0
                layer.position = layer.stride

    def strides(self) -> dict[Key, int]:
        """The present stride of each layer and phase."""
        return {key: layer.stride for phase in self._phases.values() for key, layer in phase.layers.items()}

    def _begin_stratum(self, phase: _Phase, layer: _Layer) -> None:
        stride = 1 if layer.forwards < _WARM_UP else phase.stride
        if layer.in_last_window is not None:
            stride = min(stride, layer.in_last_window)
        layer.stride = stride
        layer.position = 0
        layer.pick = layer.random.randrange(stride)

    def _begin_step(self, phase: _Phase) -> None:
        """Measure the step that ends, and choose the stride of the strata that begin from now on."""
        now = self.clock()
        began, phase.began = phase.began, now
        if began is None:
            phase.spent = phase.skipping = phase.would_spend = 0.0
            return
        step = max(now - began - phase.spent, 1e-9)
        if phase.steps and step > _PAUSE * phase.step:
            step = phase.step
        elif phase.step > _PAUSE * step:  # then it was the steps before that had a pause in them
            phase.step, phase.steps = step, min(phase.steps, 1)
        phase.steps += 1
        if phase.steps > 1:  # the first step is not representative, either
            rate = max(1.0 / phase.steps, _FORGET)
            phase.step += (step - phase.step) * rate
            if phase.would_spend:
                phase.fulls += 1
                phase.full += (phase.would_spend - phase.full) * max(1.0 / phase.fulls, _FORGET)
            phase.idle += (phase.skipping - phase.idle) * rate
            phase.debt += phase.spent - self.share * step
            self._choose_stride(phase)
        else:
            phase.step = step
        phase.spent = phase.skipping = phase.would_spend = 0.0

    def _choose_stride(self, phase: _Phase) -> None:
        share = self.share * phase.step
        low, high = _SLACK
        # What warming up has cost is not made up for in one go, nor is a pause's allowance spent in one.
        phase.debt = min(max(phase.debt, -_REPAY_STEPS * share), _REPAY_STEPS * share)
        allowed = min(max(share - phase.debt / _REPAY_STEPS, low * share), high * share)
        wanted = phase.full / max(allowed - phase.idle, low * share)
        # Up at once, down only when it is clearly too high.
        if wanted > phase.stride or wanted < 0.6 * phase.stride:
            phase.stride = next((stride for stride in _STRIDES if stride >= wanted), _STRIDES[-1])
