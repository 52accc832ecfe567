"""Recording from inside compiled code: operators that torch.compile keeps as they are, without a graph break.

A hook that torch.compile traces puts an operator into the graph. It returns nothing and is marked as having an
effect, so that it is neither dropped, nor reordered against its like, nor recomputed.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

log = logging.getLogger(__name__)

_LIBRARIES: list[Any] = []
"""Keeps the library alive: its registrations end with it."""
_DEFINING = threading.Lock()

SIGNATURES = {
    # Rows (…, D), the hook's key, `module.training`, and whether a mask can concern the rows.
    "record": "(Tensor rows, Tensor key, bool training, bool padded) -> ()",
    # The mask of the forward that begins, and whether it is known; the masks' key.
    "begin_mask": "(Tensor? mask, bool known, Tensor key) -> ()",
    "end_mask": "(Tensor key) -> ()",
}
"""Operators `delve_ray::<name>`. Keys are tensors, so that one compiled graph serves all layers of a kind."""


def define_operators(
    actions: Mapping[str, Callable[..., None]], *, called_while_tracing: Sequence[Callable[..., bool]] = ()
) -> bool:
    """Define the operators, once in the process; False where this torch cannot mark an operator's effect.

    `actions` are what they do when compiled code runs, by their names in `SIGNATURES`. Functions that are
    `called_while_tracing` are called by torch.compile, which takes their results for good.
    """
    with _DEFINING:
        return bool(_LIBRARIES) or _define_all(actions, called_while_tracing)


def _define_all(
    actions: Mapping[str, Callable[..., None]], called_while_tracing: Sequence[Callable[..., bool]]
) -> bool:
    if not has_effects(torch.__version__):
        log.info("recording under torch.compile takes a graph break per layer with torch %s", torch.__version__)
        return False
    try:
        from torch._higher_order_ops import effects
    except ImportError:
        return False
    library: Any = torch.library.Library("delve_ray", "DEF")
    try:
        _define(library, effects, actions)
    except (AttributeError, TypeError, RuntimeError) as error:  # an older torch
        log.info("recording under torch.compile takes a graph break per layer, as this torch lacks: %s", error)
        library._destroy()
        return False
    for function in called_while_tracing:
        torch._dynamo.assume_constant_result(function)
    _LIBRARIES.append(library)
    return True


def has_effects(version: str) -> bool:
    """Whether this torch's compiler calls operators for their effect; 2.11 drops them without a word.

    >>> has_effects("2.11.0+cu130"), has_effects("2.13.0+cpu"), has_effects("3.0.0a0")
    (False, True, True)
    """
    return tuple(map(int, version.split(".")[:2])) >= (2, 13)


def _define(library: Any, effects: Any, actions: Mapping[str, Callable[..., None]]) -> None:
    # What a CUDA graph replays would not reach us: the operators stay outside of it.
    tag = getattr(torch.Tag, "cudagraph_unsafe", None)
    for name, signature in SIGNATURES.items():
        library.define(name + signature, tags=() if tag is None else (tag,))
        library.impl(name, actions[name], "CompositeExplicitAutograd")
        torch.library.register_fake(f"delve_ray::{name}", _nothing, lib=library)
        torch.library.register_vmap(f"delve_ray::{name}", _nothing_mapped, lib=library)
        effects._register_effectful_op(getattr(torch.ops.delve_ray, name).default, effects._EffectType.ORDERED)


def _nothing(*_: Any) -> None:
    return None


def _nothing_mapped(info: Any, dims: Any, *_: Any) -> tuple[None, None]:
    return None, None


def exporting() -> bool:
    """Whether torch.export is tracing; what it exports must run without delve_ray."""
    known = getattr(torch.compiler, "is_exporting", None)
    return bool(known()) if known is not None else not torch.compiler.is_dynamo_compiling()


def in_subgraph() -> bool:
    """Whether torch.compile traces a body that takes no effects: of cond, while_loop, a nested region and their like.

    The bodies of checkpoints and of autograd functions do. Called while tracing.
    """
    try:
        from torch._dynamo.symbolic_convert import InstructionTranslator

        tracer: Any = InstructionTranslator.current_tx().output.current_tracer
        while tracer is not None and tracer.parent is not None:
            name = str(tracer.description or tracer.source_target)
            if "checkpoint" not in name and "autograd" not in name:
                return True
            tracer = tracer.parent
    except (ImportError, AttributeError) as error:  # another version of torch's inside
        log.debug("cannot tell where torch.compile traces: %r", error)
    return False


def tracing() -> bool:
    """Whether what runs is an example, for torch.jit.trace, torch.fx or a compiler, and no observation."""
    fx: Any = torch.fx._symbolic_trace
    symbolic = fx.is_fx_symbolic_tracing if hasattr(fx, "is_fx_symbolic_tracing") else fx.is_fx_tracing
    return bool(
        torch._C._is_tracing()
        or torch.compiler.is_compiling()
        or symbolic()
        or (modes_are_on() and torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None)
    )


def modes_are_on() -> bool:
    """Whether somebody watches torch's operations, as a counter of FLOPs does; ours are not for them."""
    return torch._C._len_torch_dispatch_stack() > 0
