"""Masks in force: which steps of the batch that is running are padding and do not count."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from delve_ray.errors import OptionError
from delve_ray.rows import Mask

log = logging.getLogger(__name__)

MaskFunction = Callable[..., Tensor | None]
"""Gets what the model's forward gets, positional and by keyword, and returns the batch's mask, or None."""

UNKNOWN = Mask(torch.zeros(0, dtype=torch.bool, device="cpu"))
"""In force where a mask function failed: nobody knows which rows count, so none does."""


class Masks:
    """The masks in force, innermost last; each thread has its own, as each runs a forward of its own."""

    def __init__(self) -> None:
        self._local = threading.local()
        self._handles: list[RemovableHandle] = []
        self._said: set[str] = set()

    def current(self) -> Mask | None:
        """The mask in force in this thread."""
        stack = self._stack()
        return stack[-1] if stack else None

    def _stack(self) -> list[Mask | None]:
        stack: list[Mask | None] | None = getattr(self._local, "stack", None)
        if stack is None:
            stack = self._local.stack = []
        return stack

    @contextlib.contextmanager
    def use(self, mask: Mask | None) -> Iterator[None]:
        """Put a mask in force for a block."""
        self._stack().append(mask)
        try:
            yield
        finally:
            self._stack().pop()

    @contextlib.contextmanager
    def asking(self, roots: Sequence[nn.Module], function: MaskFunction) -> Iterator[None]:
        """Ask `function` for the mask at the start of every forward of these modules, for a block."""
        handles = self.attach(roots, function)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def attach(self, roots: Sequence[nn.Module], function: MaskFunction) -> list[RemovableHandle]:
        """Ask `function` for the mask at the start of every forward of these modules, until they are removed."""

        def begin(args: Any, kwargs: Any) -> None:
            self._stack().append(self._ask(function, args, kwargs))

        def end(*_: Any) -> None:
            if self._stack():
                self._stack().pop()

        handles = []
        for root in roots:
            before, after = _RootHook(begin), _RootHook(end)
            handles.append(root.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(root.register_forward_hook(after, always_call=True))
        self._handles += handles
        return handles

    def _ask(self, function: MaskFunction, args: Any, kwargs: Any) -> Mask | None:
        try:
            mask = function(*args, **kwargs)
            return None if mask is None else check_mask(mask, "what the mask function returned")
        except Exception as error:  # a mistake in it must not stop a training
            if type(error).__name__ not in self._said:
                self._said.add(type(error).__name__)
                log.warning("the mask function failed, and such batches are left out: %r", error)
            return UNKNOWN

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


class _RootHook:
    """A hook around a model's forward; its copy in a copied or pickled model accepts anything and does nothing."""

    def __init__(self, action: Callable[..., None]) -> None:
        # torch.compile must not trace what changes from batch to batch.
        self.action = torch.compiler.disable(action)

    def __call__(self, module: nn.Module, *given: Any) -> None:
        self.action(*given)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (contextlib.nullcontext(), "__exit__")


def check_mask(mask: Any, name: str = "mask", *, batch_first: bool = True) -> Mask:
    """A mask from what a user gives: boolean, or integers of which 0 is padding; B×T, or T×B without `batch_first`.

    Raises OptionError for anything else; the values of integers are not looked at.
    """
    rule = "it is True, or 1, where a step counts, like an attention_mask, of shape (batch, steps)"
    if not isinstance(mask, Tensor):
        raise OptionError(f"{name} is a {type(mask).__name__}, not a tensor; {rule}")
    if mask.is_floating_point() or mask.is_complex():
        raise OptionError(
            f"{name} has dtype {mask.dtype}; {rule}. An additive mask of 0 and -inf becomes one by `mask == 0`"
        )
    if mask.dim() == 0:
        raise OptionError(f"{name} has no dimension; {rule}")
    valid = mask.detach() if mask.dtype == torch.bool else mask.detach() != 0
    return Mask(valid if batch_first or valid.dim() == 1 else valid.transpose(0, 1), batch_first)
