"""The hooks: of a layer, and around a model's forward; in eager code and in code that torch.compile traces."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from delve_ray.compiled import define_operators, exporting, in_subgraph
from delve_ray.masks import MaskFunction, Masks
from delve_ray.rows import Reader
from delve_ray.schema import PHASES


class Recording(Protocol):
    """What a hook asks of the recorder that it belongs to."""

    recording: bool
    masks: Masks

    def record(self, index: int, module: nn.Module, output: Any) -> None:
        """Add one forward's output."""

    def record_rows(self, index: int, phase: int, rows: Tensor, padded: bool) -> None:
        """Add one forward's rows."""

    def say_unreadable(self, index: int, why: str) -> None:
        """Say that a layer cannot be recorded inside compiled code."""


_RECORDERS: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_TOKENS = itertools.count()


def register(recorder: Recording) -> tuple[int, bool]:
    """A number by which hooks find a recorder as long as it lives, and whether compiled code reaches it.

    The operators are defined here, and not at import: that loads torch._dynamo, which takes a second.
    """
    _leave_forks_alone()
    token = next(_TOKENS)
    _RECORDERS[token] = recorder
    actions: dict[str, Callable[..., None]] = {
        "record": _record_compiled,
        "begin_mask": _begin_compiled,
        "end_mask": _end_compiled,
    }
    return token, define_operators(actions, called_while_tracing=(in_subgraph, _say_unreadable))


@functools.cache
def _leave_forks_alone() -> None:
    """Let nothing be recorded in forked children: no thread there takes it to a store, and a lock that one of this
    process's had at that moment is never released.
    """
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_forget_all)


def _forget_all() -> None:
    for recorder in list(_RECORDERS.values()):
        recorder.recording = False
    _RECORDERS.clear()


def forget(token: int) -> None:
    """Let hooks that are still somewhere find no recorder."""
    _RECORDERS.pop(token, None)


class _Hook:
    """A hook. It holds nothing of the tracker, so that what a module references can always be copied.

    A copied model (deepcopy, EMA, torch.save of a whole model) is not recorded: a copy of a hook is a
    callable of the standard library that accepts anything and returns None, which also lets a pickled model
    load where delve_ray is not installed.
    """

    __slots__ = ("index", "key", "operators", "token")

    def __init__(self, token: int, index: int, operators: bool) -> None:
        self.token = token
        self.index = index
        self.operators = operators
        with torch.inference_mode(False):
            self.key = torch.tensor([token, index], device="cpu")

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (contextlib.nullcontext(), "__exit__")


class LayerHook(_Hook):
    """The hook of one layer; `index` is the layer's."""

    __slots__ = ("reader",)

    def __init__(self, token: int, index: int, operators: bool, reader: Reader) -> None:
        super().__init__(token, index, operators)
        self.reader = reader

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        """What torch calls after the layer's forward."""
        if self.operators and torch.compiler.is_compiling():
            self._trace(module, output)
            return
        recorder = _RECORDERS.get(self.token)
        if recorder is not None and recorder.recording:
            recorder.record(self.index, module, output)

    def _trace(self, module: nn.Module, output: Any) -> None:
        """Put the operator into the graph; torch.compile runs this, with tensors that have no values."""
        if exporting():
            return
        if in_subgraph():
            _say_unreadable(
                self.token, self.index, "it runs in a control-flow operator or a nested region, which take no effects"
            )
            return
        found, problem = None, None
        try:
            found = self.reader.read(module, output)
        except Exception as error:
            problem = str(error)
        if found is not None:
            torch.ops.delve_ray.record(found[0], self.key, module.training, found[1])
        elif problem is not None:
            _say_unreadable(self.token, self.index, problem)


class MaskHook(_Hook):
    """The hook before a model's forward, which asks for the batch's mask; `index` is the model's."""

    __slots__ = ("function", "run")

    def __init__(self, token: int, index: int, operators: bool, function: MaskFunction) -> None:
        super().__init__(token, index, operators)
        self.function = function
        self.run = torch.compiler.disable(self._run)  # without operators

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """What torch calls before the model's forward."""
        if not torch.compiler.is_compiling():
            self._run(args, kwargs)
        elif not self.operators:
            self.run(args, kwargs)
        elif not (exporting() or in_subgraph()):
            self._trace(args, kwargs)

    def _run(self, args: Any, kwargs: Any) -> None:
        recorder = _RECORDERS.get(self.token)
        if recorder is None:
            return
        mask, problem = None, None
        try:
            mask = self.function(*args, **kwargs)
        except Exception as error:
            problem = error
        recorder.masks.begin(self.index, mask, problem)

    def _trace(self, args: Any, kwargs: Any) -> None:
        mask: Any = None
        known = True
        try:
            mask = self.function(*args, **kwargs)
        except Exception:
            known = False
        if mask is not None and not isinstance(mask, Tensor):
            mask, known = None, False
        torch.ops.delve_ray.begin_mask(mask, known, self.key)


class MaskEndHook(_Hook):
    """The hook after a model's forward, which takes its mask back."""

    __slots__ = ("run",)

    def __init__(self, token: int, index: int, operators: bool) -> None:
        super().__init__(token, index, operators)
        self.run = torch.compiler.disable(_end_compiled)

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        """What torch calls after the model's forward, also after one that failed."""
        if not torch.compiler.is_compiling():
            _end_compiled(self.key)
        elif not self.operators:
            self.run(self.key)
        elif not (exporting() or in_subgraph()):
            torch.ops.delve_ray.end_mask(self.key)


def _say_unreadable(token: int, layer: int, why: str) -> bool:
    """Called while torch.compile traces."""
    recorder = _RECORDERS.get(token)
    if recorder is not None:
        recorder.say_unreadable(layer, why)
    return True


def _record_compiled(rows: Tensor, key: Tensor, training: bool, padded: bool) -> None:
    """What `delve_ray::record` does when compiled code runs."""
    token, layer = key.tolist()
    recorder = _RECORDERS.get(token)
    if recorder is not None and recorder.recording:
        recorder.record_rows(layer, PHASES.index("train" if training else "eval"), rows, padded)


def _begin_compiled(mask: Tensor | None, known: bool, key: Tensor) -> None:
    """What `delve_ray::begin_mask` does when compiled code runs."""
    token, model = key.tolist()
    recorder = _RECORDERS.get(token)
    if recorder is not None:
        problem = None if known else RuntimeError("it raises, or returns no tensor, when torch.compile traces it")
        recorder.masks.begin(model, mask, problem)


def _end_compiled(key: Tensor) -> None:
    """What `delve_ray::end_mask` does when compiled code runs."""
    token, model = key.tolist()
    recorder = _RECORDERS.get(token)
    if recorder is not None:
        recorder.masks.end(model)
