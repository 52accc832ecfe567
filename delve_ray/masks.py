"""Masks in force: which steps of the batch that is running are padding and do not count."""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from delve_ray.compiled import exporting, in_subgraph
from delve_ray.errors import OptionError
from delve_ray.rows import Mask

log = logging.getLogger(__name__)

MaskFunction = Callable[..., Tensor | None]
"""Gets what the model's forward gets, positional and by keyword, and returns the batch's mask, or None."""

UNKNOWN = Mask(torch.zeros(0, dtype=torch.bool, device="cpu"))
"""In force where a mask function failed: nobody knows which rows count, so none does."""

_MASKS: weakref.WeakValueDictionary[int, Masks] = weakref.WeakValueDictionary()
_TOKENS = itertools.count()


class Masks:
    """The masks in force, innermost last; each thread has its own, as each runs a forward of its own."""

    def __init__(self) -> None:
        self._local = threading.local()
        self._handles: list[RemovableHandle] = []
        self._said: set[str] = set()
        self._token = next(_TOKENS)
        _MASKS[self._token] = self

    def current(self) -> Mask | None:
        """The mask in force in this thread."""
        stack = self._stack()
        return stack[-1][1] if stack else None

    def _stack(self) -> list[tuple[int, Mask | None]]:
        """Masks with the number of the model whose forward asked for them, -1 for a block's."""
        stack: list[tuple[int, Mask | None]] | None = getattr(self._local, "stack", None)
        if stack is None:
            stack = self._local.stack = []
        return stack

    @contextlib.contextmanager
    def use(self, mask: Mask | None) -> Iterator[None]:
        """Put a mask in force for a block."""
        stack = self._stack()
        entry = (-1, mask)
        stack.append(entry)
        try:
            yield
        finally:  # with what a forward that did not end has left above it
            del stack[next(i for i, other in enumerate(stack) if other is entry) :]

    def attach(self, roots: Sequence[nn.Module], function: MaskFunction, *, operators: bool) -> None:
        """Ask `function` for the mask at the start of every forward of these modules.

        With `operators`, compiled code asks and answers through them.
        """
        for owner, root in enumerate(roots):
            begin, end = (kind(self._token, owner, function, operators) for kind in (_Begin, _End))
            self._handles.append(root.register_forward_pre_hook(begin, with_kwargs=True))
            self._handles.append(root.register_forward_hook(end, always_call=True))

    def begin(self, owner: int, mask: Tensor | None, error: Exception | None = None) -> None:
        """Put the mask in force that a model's forward begins with; None lets all rows count."""
        stack = self._stack()
        # A forward that Ctrl-C ended has left its own behind.
        stack[:] = [entry for entry in stack if entry[0] != owner]
        try:
            if error is not None:
                raise error
            stack.append((owner, None if mask is None else check_mask(mask, "what the mask function returned")))
        except Exception as problem:  # a mistake in it must not stop a training
            stack.append((owner, UNKNOWN))
            if type(problem).__name__ not in self._said:
                self._said.add(type(problem).__name__)
                log.warning("the mask function failed, and such batches are left out: %r", problem)

    def end(self, owner: int) -> None:
        """Take back the mask of a model's forward; there is none where the forward never began."""
        stack = self._stack()
        if stack and stack[-1][0] == owner:
            stack.pop()

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


class _RootHook:
    """A hook around a model's forward; its copy in a copied or pickled model accepts anything and does nothing."""

    def __init__(self, token: int, owner: int, function: MaskFunction, operators: bool) -> None:
        self.function = function
        self.operators = operators
        with torch.inference_mode(False):
            self.key = torch.tensor([token, owner], device="cpu")
        self.run = torch.compiler.disable(self._run)

    def __call__(self, module: nn.Module, *given: Any) -> None:
        if not torch.compiler.is_compiling():
            self._run(*given)
        elif not exporting():
            if self.operators:
                self._trace(*given)
            else:
                self.run(*given)

    def _run(self, *given: Any) -> None:
        raise NotImplementedError

    def _trace(self, *given: Any) -> None:
        raise NotImplementedError

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (contextlib.nullcontext(), "__exit__")


class _Begin(_RootHook):
    def _run(self, args: Any, kwargs: Any) -> None:
        token, owner = self.key.tolist()
        masks = _MASKS.get(token)
        if masks is None:
            return
        mask, problem = None, None
        try:
            mask = self.function(*args, **kwargs)
        except Exception as error:
            problem = error
        masks.begin(owner, mask, problem)

    def _trace(self, args: Any, kwargs: Any) -> None:
        if in_subgraph():
            return
        mask: Any = None
        known = True
        try:
            mask = self.function(*args, **kwargs)
        except Exception:
            known = False
        if mask is not None and not isinstance(mask, Tensor):
            mask, known = None, False
        torch.ops.delve_ray.begin_mask(mask, known, self.key)


class _End(_RootHook):
    def _run(self, args: Any, output: Any) -> None:
        end_compiled(self.key)

    def _trace(self, args: Any, output: Any) -> None:
        if not in_subgraph():
            torch.ops.delve_ray.end_mask(self.key)


def begin_compiled(mask: Tensor | None, known: bool, key: Tensor) -> None:
    """What `delve_ray::begin_mask` does when compiled code runs."""
    token, owner = key.tolist()
    masks = _MASKS.get(token)
    if masks is not None:
        error = None if known else RuntimeError("it raises, or returns no tensor, when torch.compile traces it")
        masks.begin(owner, mask, error)


def end_compiled(key: Tensor) -> None:
    """What `delve_ray::end_mask` does when compiled code runs."""
    token, owner = key.tolist()
    masks = _MASKS.get(token)
    if masks is not None:
        masks.end(owner)


def check_mask(mask: Any, name: str = "mask", *, batch_first: bool = True) -> Mask:
    """A mask from what a user gives: boolean, or integers of which 0 is padding; B×T, or T×B without `batch_first`.

    Raises OptionError for anything else; the values of integers are not looked at.
    """
    rule = "it is True, or 1, where a step counts, like an attention_mask, of shape (batch, steps)"
    if not isinstance(mask, Tensor):
        hint = ". A function of the model's inputs goes into SaturationTracker(…, mask=…)" if callable(mask) else ""
        raise OptionError(f"{name} is a {type(mask).__name__}, not a tensor; {rule}{hint}")
    if mask.is_floating_point() or mask.is_complex():
        raise OptionError(
            f"{name} has dtype {mask.dtype}; {rule}. An additive mask of 0 and -inf becomes one by `mask == 0`"
        )
    if mask.dim() == 0:
        raise OptionError(f"{name} has no dimension; {rule}")
    valid = mask.detach() if mask.dtype == torch.bool else mask.detach() != 0
    return Mask(valid if batch_first or valid.dim() == 1 else valid.transpose(0, 1), batch_first)
