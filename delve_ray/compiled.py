"""Recording from inside compiled code: an operator that torch.compile keeps as it is, without a graph break.

A hook that torch.compile traces puts the operator `delve_ray::record` into the graph. It returns nothing and is
marked as having an effect, so that it is neither dropped, nor reordered against its like, nor recomputed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)

NAME = "delve_ray::record"


@cache
def define_operator(record: Callable[[Tensor, Tensor, bool, bool], None]) -> bool:
    """Define the operator once in the process; False where this torch cannot mark an operator's effect.

    `record` gets the rows (…, D), the hook's key (two integers), `module.training`, and whether a mask can
    concern the rows. The key is a tensor, so that one compiled graph serves all layers of a kind.
    """
    try:
        from torch._higher_order_ops import effects
    except ImportError:
        return False
    library: Any = torch.library.Library("delve_ray", "DEF")
    # What a CUDA graph replays would not reach us: the operator stays outside of it.
    tag = getattr(torch.Tag, "cudagraph_unsafe", None)
    signature = "record(Tensor rows, Tensor key, bool training, bool padded) -> ()"
    library.define(signature, tags=() if tag is None else (tag,))
    library.impl("record", record, "CompositeExplicitAutograd")
    torch.library.register_fake(NAME, lambda rows, key, training, padded: None, lib=library)
    torch.library.register_vmap(NAME, lambda info, dims, rows, key, training, padded: (None, None), lib=library)
    effects._register_effectful_op(torch.ops.delve_ray.record.default, effects._EffectType.ORDERED)
    _LIBRARIES.append(library)
    return True


_LIBRARIES: list[Any] = []
"""Keeps the library alive: its registrations end with it."""


def exporting() -> bool:
    """Whether torch.export is tracing; what it exports must run without delve_ray."""
    known = getattr(torch.compiler, "is_exporting", None)
    return bool(known()) if known is not None else not torch.compiler.is_dynamo_compiling()
