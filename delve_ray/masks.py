"""Masks in force: which steps of the batch that is running are padding and do not count."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

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
        self._said: set[str] = set()

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
