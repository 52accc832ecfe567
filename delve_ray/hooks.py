"""The hook of a layer, in eager code and in code that torch.compile traces."""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from delve_ray.compiled import define_operators, exporting, in_subgraph
from delve_ray.masks import begin_compiled, end_compiled
from delve_ray.rows import Reader
from delve_ray.schema import PHASES


class Recording(Protocol):
    """What a hook asks of the recorder that it belongs to."""

    recording: bool

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
    token = next(_TOKENS)
    _RECORDERS[token] = recorder
    actions: dict[str, Callable[..., None]] = {
        "record": _record_compiled,
        "begin_mask": begin_compiled,
        "end_mask": end_compiled,
    }
    return token, define_operators(actions, called_while_tracing=(in_subgraph, _say_unreadable))


def forget(token: int) -> None:
    """Let hooks that are still somewhere find no recorder."""
    _RECORDERS.pop(token, None)


class LayerHook:
    """The hook of one layer. It holds nothing of the tracker, so that what a module references can always be copied.

    A copied model (deepcopy, EMA, torch.save of a whole model) is not recorded: a copy of a hook is a
    callable of the standard library that accepts anything and returns None, which also lets a pickled model
    load where delve_ray is not installed.
    """

    __slots__ = ("key", "layer", "operators", "reader", "token")

    def __init__(self, token: int, layer: int, reader: Reader, operators: bool) -> None:
        self.token = token
        self.layer = layer
        self.reader = reader
        self.operators = operators
        with torch.inference_mode(False):
            self.key = torch.tensor([token, layer], device="cpu")

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        """What torch calls after the layer's forward."""
        if self.operators and torch.compiler.is_compiling():
            self._trace(module, output)
            return
        recorder = _RECORDERS.get(self.token)
        if recorder is not None and recorder.recording:
            recorder.record(self.layer, module, output)

    def _trace(self, module: nn.Module, output: Any) -> None:
        """Put the operator into the graph; torch.compile runs this, with tensors that have no values."""
        if exporting():
            return
        if in_subgraph():
            _say_unreadable(
                self.token, self.layer, "it runs in a control-flow operator or a nested region, which take no effects"
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
            _say_unreadable(self.token, self.layer, problem)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (contextlib.nullcontext(), "__exit__")


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
