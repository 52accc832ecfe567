"""delve_ray.workspace: the process's setting for float32 products, which several threads meet at."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from delve_ray import products
from delve_ray.accumulator import Accumulator
from delve_ray.host_accumulator import HostAccumulator
from delve_ray.moments import unpack_triangle
from delve_ray.sketch_accumulator import SketchAccumulator
from delve_ray.workspace import Workspace, ieee_products, rounds_products
from tests.helpers import covariance_error, random_rows, two_pass_covariance

CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="this torch has one setting")


@pytest.fixture
def matmul() -> Iterator[Any]:
    """The setting; it is put back."""
    setting: Any = torch.backends.mkldnn.matmul
    yield setting
    setting.fp32_precision = "none"


def test_the_last_of_several_threads_restores_the_precision_of_products(matmul: Any) -> None:
    x = random_rows(8, 8)
    matmul.fp32_precision = "bf16"
    first, second = ieee_products(x), ieee_products(x)
    first.__enter__()
    second.__enter__()
    assert matmul.fp32_precision == "ieee"
    assert rounds_products(CPU), "that is what the user has chosen"
    first.__exit__(None, None, None)
    assert matmul.fp32_precision == "ieee", "the other one's product still goes on"
    second.__exit__(None, None, None)
    assert matmul.fp32_precision == "bf16"
    matmul.fp32_precision = "none"
    assert not rounds_products(CPU)


def spied(product: Callable[..., Tensor], seen: set[tuple[torch.dtype, str]]) -> Callable[..., Tensor]:
    """A product that notes of what type it is, and what the setting is meanwhile."""

    def spy(left: Tensor, *others: Any, **options: Any) -> Tensor:
        matmul: Any = torch.backends.mkldnn.matmul
        seen.add((left.dtype, matmul.fp32_precision))
        return product(left, *others, **options)

    return spy


@pytest.mark.parametrize(
    "make",
    [
        lambda own: HostAccumulator(24, own),
        lambda own: HostAccumulator(200, own),
        lambda own: SketchAccumulator(200, 32, own),
    ],
    ids=["narrow", "wide", "sketched"],
)
def test_the_packers_thread_leaves_the_precision_of_the_trainings_products_alone(
    make: Callable[[Workspace], Accumulator], matmul: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is a setting of the whole process: otherwise losses would depend on when a window is packed."""
    total = make(Workspace(CPU))
    d = total.features
    batches = [random_rows(rows, d, seed=rows) for rows in (6000, 5000, 7)]
    matmul.fp32_precision = "bf16"
    for batch in batches:
        total.add(batch)
    seen: set[tuple[torch.dtype, str]] = set()
    monkeypatch.setattr(products, "onednn", lambda: None)
    for name in ("mm", "addmm"):
        monkeypatch.setattr(torch, name, spied(getattr(torch, name), seen))
    buffer = np.empty(total.moments_size)
    n = total.drain_into(buffer, Workspace(CPU)).n
    assert seen == {(torch.float64, "bf16")}
    rows = torch.cat(batches)
    expected = two_pass_covariance(rows)
    assert n == len(rows)
    if isinstance(total, SketchAccumulator):
        assert np.allclose(buffer[d : 2 * d] / n, np.diag(expected), rtol=1e-6)
    else:
        assert covariance_error(unpack_triangle(buffer[d:], d, divisor=n), expected) < 1e-6
