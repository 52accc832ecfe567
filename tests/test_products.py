"""delve_ray.products: every kernel and every cut gives the upper triangle of the same product."""

from __future__ import annotations

import pytest
import torch

from delve_ray import products
from delve_ray.products import onednn, product_blocks, upper_product, wants_rows
from delve_ray.workspace import block_plan
from tests.helpers import random_rows

WIDTHS = (1, 17, 32, 63, 64, 95, 96, 130, 255, 256, 300, 512, 1030)


@pytest.fixture(params=["oneDNN", "torch.mm"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With what this processor has, and as on one that lacks it."""
    if request.param == "torch.mm":
        monkeypatch.setattr(products, "onednn", lambda: None)
    elif onednn() is None:
        pytest.skip("needs AVX-512 and oneDNN")
    return str(request.param)


@pytest.mark.parametrize("features", WIDTHS)
@pytest.mark.parametrize("by_rows", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_blocks_are_the_rows_of_the_product(features: int, by_rows: bool, dtype: torch.dtype, kernel: str) -> None:
    rows = random_rows(40, features, dtype=dtype)
    expected = rows.double().t() @ rows.double()
    covered: list[int] = []
    for block in upper_product(rows if by_rows else rows.t().contiguous(), by_rows=by_rows):
        height = len(block.values)
        assert block.values.dtype == dtype
        torch.testing.assert_close(
            block.values.double(), expected[block.first : block.first + height, block.first :], rtol=1e-4, atol=1e-4
        )
        covered += block.covered
        plan = [block_plan(features).blocks[index] for index in block.covered]
        assert (plan[0][0], sum(size for _, size, _ in plan)) == (block.first, height)
    assert covered == [*range(len(block_plan(features).blocks))]


@pytest.mark.parametrize("features", WIDTHS)
@pytest.mark.parametrize("fast", [True, False])
def test_blocks_cover_the_plan_once_and_in_order(features: int, fast: bool) -> None:
    blocks = product_blocks(features, fast=fast)
    assert [index for _, _, covered in blocks for index in covered] == [*range(len(block_plan(features).blocks))]
    assert sum(height for _, height, _ in blocks) == features
    assert [first for first, _, _ in blocks] == [sum(h for _, h, _ in blocks[:i]) for i in range(len(blocks))]


def test_rows_are_turned_only_for_a_kernel_that_wants_it(kernel: str) -> None:
    assert [wants_rows(features) for features in (10, 127, 128, 2000)] == [True, True, *[kernel == "torch.mm"] * 2]


def test_an_operator_that_is_wrong_or_missing_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    onednn.cache_clear()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert onednn() is None
    onednn.cache_clear()
    monkeypatch.undo()
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert onednn() is None
    onednn.cache_clear()


@pytest.mark.parametrize("features", [1, 31, 32, 96, 127, 128, 130, 255, 256, 383, 384])
def test_a_layer_that_counts_as_narrow_has_one_block_in_every_layout(features: int, kernel: str) -> None:
    narrow = len(product_blocks(features, fast=products.onednn() is not None)) == 1
    layouts = [False] if not wants_rows(features) else [False, True]
    rows = random_rows(8, features)
    for by_rows in layouts:
        x = rows if by_rows else rows.t().contiguous()
        assert (len(list(upper_product(x, by_rows=by_rows))) == 1) == narrow
