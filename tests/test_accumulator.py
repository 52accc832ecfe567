"""delve_ray.accumulator: guarantee 1, exact moments of any rows; on the host's path and on the device's."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from delve_ray import chunks as module
from delve_ray import spectrum
from delve_ray.accumulator import Accumulator
from delve_ray.host_accumulator import HostAccumulator, stage_rows
from delve_ray.moments import Moments, PackedTotal
from delve_ray.products import upper_product
from delve_ray.workspace import BlockPlan, Workspace
from tests.helpers import (
    TOLERANCE,
    accumulate,
    accumulator,
    assert_exact,
    covariance_error,
    drained,
    float64_rows,
    merged,
    random_rows,
    two_pass_covariance,
)

CPU = torch.device("cpu")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
FLOAT64_TOLERANCE = 1e-11
"""Of λ1: what products in float64 leave at mean/spread 1e5."""
EDGES = (1, 2, 15, 16, 17, 95, 96, 97, 128, 130, 255, 256, 257)
"""Numbers of features about which the block plan, the precision or the packing change."""

both_paths = pytest.mark.parametrize("checked", [True, False], ids=["host", "device"])


def same_bits(left: Moments, right: Moments) -> bool:
    return left.n == right.n and np.array_equal(left.mean, right.mean) and np.array_equal(left.scatter, right.scatter)


# --- guarantee 1: any split, any offset, any type ------------------------------------------------------


@st.composite
def split_rows(draw: st.DrawFn) -> tuple[list[Tensor], dict[str, Any]]:
    """Batches of rows, and how to accumulate them.

    At most 40 rows a batch: where a type leaves only a few distinct values, more are summed less exactly; see
    `test_many_rows_of_few_distinct_values`.
    """
    features = draw(st.one_of(st.sampled_from(EDGES), st.integers(1, 300)))
    dtype = draw(st.sampled_from(DTYPES))
    offset = draw(st.sampled_from([0.0, 1.0, 1e2, 1e4, 1e5]))
    if dtype == torch.float16:
        offset = min(offset, 3e4)
    pattern = draw(st.sampled_from(["constant", "alternating", "per batch"]))
    decay = draw(st.sampled_from([1.0, 0.1, 1e-3]))
    seed = draw(st.integers(0, 2**31))
    sizes = draw(st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any))
    batches = []
    for index, size in enumerate(sizes):
        rows = random_rows(size, features, seed=seed + index, dtype=torch.float64, decay=decay)
        sign = torch.ones(features, dtype=torch.float64)
        if pattern == "alternating":
            sign *= (-1) ** index
        elif pattern == "per batch":
            sign = random_rows(1, features, seed=seed - 1 - index, dtype=torch.float64)[0].sign()
        batches.append((rows + offset * sign).to(dtype))
    precision = draw(st.sampled_from([torch.float32, torch.float32, torch.float64]))
    return batches, {"checked": draw(st.booleans()), "precision": precision}


@given(drawn=split_rows())
@settings(max_examples=120, deadline=None)
def test_any_split_of_any_rows_is_the_two_pass_covariance(drawn: tuple[list[Tensor], dict[str, Any]]) -> None:
    batches, options = drawn
    result, left_out = accumulate(batches, batches[0].shape[1], **options)
    assert left_out == 0
    assert_exact(result, torch.cat(batches))


@given(drawn=split_rows(), sources=st.integers(1, 5), data=st.data())
@settings(max_examples=50, deadline=None)
def test_any_accumulators_merged_in_any_tree_are_the_two_pass_covariance(
    drawn: tuple[list[Tensor], dict[str, Any]], sources: int, data: st.DataObject
) -> None:
    batches, options = drawn
    features = batches[0].shape[1]
    totals = [accumulator(features, **options) for _ in range(sources)]
    parts = []
    for batch in data.draw(st.permutations(batches)):
        index = data.draw(st.integers(0, sources - 1))
        totals[index].add(batch)
        if data.draw(st.booleans()):  # a flush: what there is leaves, and a new one goes on
            parts.append(drained(totals[index])[0])
            totals[index] = accumulator(features, **options)
    parts += [drained(total)[0] for total in totals]
    store = PackedTotal(features)
    for part in data.draw(st.permutations(parts)):
        store.add(part.n, part.mean, part.packed())
    assert_exact(Moments.from_packed(*store.result()), torch.cat(batches))
    while len(parts) > 1:
        left = parts.pop(data.draw(st.integers(0, len(parts) - 1)))
        parts.append(left.merge(parts.pop(data.draw(st.integers(0, len(parts) - 1)))))
    assert_exact(parts[0], torch.cat(batches))


@both_paths
@pytest.mark.parametrize("features", EDGES)
@pytest.mark.parametrize("offset", [0.0, 1e5])
def test_every_edge_of_the_block_plan(features: int, offset: float, checked: bool) -> None:
    rows = random_rows(500, features, dtype=torch.float64, offset=offset)
    result, _ = accumulate(rows.split([1, 300, 199]), features, checked=checked)
    assert_exact(result, rows)


@pytest.mark.slow
@both_paths
@pytest.mark.parametrize("features", [2051])
def test_a_wide_layer(features: int, checked: bool) -> None:
    rows = random_rows(1100, features, offset=1e3, decay=1e-2)
    result, _ = accumulate(rows.split(550), features, checked=checked)
    assert covariance_error(result.covariance(), two_pass_covariance(rows)) < TOLERANCE


@both_paths
@pytest.mark.parametrize("precision", [torch.float32, torch.float64])
@pytest.mark.parametrize("offset", [0.0, 1.0, 1e2, 1e3, 1e5])
def test_batches_that_jump_between_both_sides_of_zero(offset: float, precision: torch.dtype, checked: bool) -> None:
    # The first batch, by which one could be tempted to shift all others, is as far away as can be.
    batches = [
        random_rows(64, 48, seed=index, dtype=torch.float64) + offset * (1 if index % 2 else -1) for index in range(70)
    ]
    result, _ = accumulate(batches, 48, precision=precision, checked=checked)
    assert_exact(result, torch.cat(batches))


@both_paths
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("features", [3, 20, 130])
@pytest.mark.parametrize("offset", [0.0, 1e5])
def test_float64_products_are_right_to_float64(offset: float, features: int, dtype: torch.dtype, checked: bool) -> None:
    rows = random_rows(400, features, dtype=dtype, offset=min(offset, 3e4) if dtype == torch.float16 else offset)
    result, _ = accumulate(rows.split(150), features, precision=torch.float64, checked=checked)
    assert_exact(result, rows, tolerance=FLOAT64_TOLERANCE)


@both_paths
@pytest.mark.parametrize("kind", ["rounded", "two-valued", "sparse", "one outlier"])
def test_many_rows_of_few_distinct_values(kind: str, checked: bool) -> None:
    # Their products take few values, too, so that a float32 sum rounds the same way at every step.
    rows = torch.randn(8192, 48, generator=torch.Generator().manual_seed(0))
    if kind == "rounded":
        rows = (rows + 100).bfloat16()
    elif kind == "two-valued":
        rows = (rows > 0).float()
    elif kind == "sparse":
        rows = (rows > 1).float() * 0.7 - 0.3
    else:
        rows[700, 3] = 1e6
    result, _ = accumulate([rows], 48, checked=checked)
    # The host sees that float32 does not sum these well and goes on in float64. A device looks at no value; an
    # outlier of a million times the spread moves the mean, and then all other products are alike.
    tolerance = 2 * TOLERANCE if kind == "one outlier" and not checked else TOLERANCE
    assert covariance_error(result.covariance(), two_pass_covariance(rows)) < tolerance


@both_paths
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("offset", [0.0, 3.0, 30.0, 1000.0, 20000.0])
@pytest.mark.parametrize("observations", [200, 20_000])
def test_half_precision_far_from_zero(observations: int, offset: float, dtype: torch.dtype, checked: bool) -> None:
    rows = (torch.randn(observations, 64, generator=torch.Generator().manual_seed(1)) + offset).to(dtype)
    result, _ = accumulate(rows.split(7000), 64, checked=checked)
    reference = two_pass_covariance(rows)
    if reference.any():
        assert covariance_error(result.covariance(), reference) < TOLERANCE
    else:
        assert not result.scatter.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_with_fast_products(dtype: torch.dtype) -> None:
    rows = (torch.randn(8192, 64, generator=torch.Generator().manual_seed(1)) + 100).to(dtype)
    total = accumulator(64)
    total.add(rows)
    assert total.precision == torch.float32


def test_few_distinct_values_that_come_late() -> None:
    # An ordinary batch first, then many that float32 sums badly: these are noticed, even if not at once.
    first = torch.randn(8192, 24, generator=torch.Generator().manual_seed(0))
    later = (first > 0).float()
    result, _ = accumulate([first, *[later] * 160], 24)
    expected = merged([Moments.from_rows(first), *[Moments.from_rows(later)] * 160])
    assert result.n == expected.n
    assert covariance_error(result.covariance(), expected.covariance()) < TOLERANCE


@pytest.mark.parametrize("features", [256, 257, 300, 512, 1000, 1024, 2048, 4096])
def test_the_sums_of_both_phases_and_a_block_take_few_bytes_per_entry(features: int) -> None:
    blocks = [len(values) * values.shape[1] for _, values, _ in blocks_of(random_rows(features, 32))]
    assert 2 * Accumulator.nbytes(features) + 4 * max(blocks) <= (14 if features < 384 else 12) * features**2


def blocks_of(x_DN: Tensor) -> list[tuple[int, Tensor, tuple[int, ...]]]:
    return [(block.first, block.values, block.covered) for block in upper_product(x_DN, by_rows=False)]


# --- guarantee 1: any scale ----------------------------------------------------------------------------


@both_paths
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("features", [5, 40])
@pytest.mark.parametrize("exponent", [-30, -22, -21, -16, -15, 0, 15, 16, 20, 30])
@pytest.mark.parametrize("offset", [0.0, 10.0])
def test_any_scale(exponent: int, offset: float, features: int, dtype: torch.dtype, checked: bool) -> None:
    rows = random_rows(300, features, dtype=dtype, scale=10.0**exponent, offset=offset)
    result, left_out = accumulate(rows.split(100), features, checked=checked)
    assert left_out == 0
    assert_exact(result, rows)


@both_paths
@pytest.mark.parametrize("scale", [1e-30, 1e-21, 1e-18, 1e18, 1e21, 1e30])
def test_a_scale_that_comes_late(scale: float, checked: bool) -> None:
    batches = [torch.zeros(60, 24), *random_rows(200, 24, scale=scale).split(50)]
    result, _ = accumulate(batches, 24, checked=checked)
    assert_exact(result, torch.cat(batches))


@both_paths
@pytest.mark.parametrize("scale", [1e-44, 1e-40, 1e-38, 1e37, 5e37])
def test_the_ends_of_float32(scale: float, checked: bool) -> None:
    rows = random_rows(300, 24, scale=scale)
    assert rows.isfinite().all()
    ordinary = random_rows(300, 24, seed=1)
    result, left_out = accumulate([rows, rows.flip(0)], 24, checked=checked)
    assert left_out == 0
    assert_exact(result, torch.cat([rows, rows]))
    # What comes after is as exact as ever.
    result, _ = accumulate([rows, ordinary], 24, checked=checked)
    assert_exact(result, torch.cat([rows, ordinary]))


@both_paths
@pytest.mark.parametrize("scale", [1e-140, 1e-100, 1e-46, 1e50, 1e100])
def test_float64_rows_beyond_float32(scale: float, checked: bool) -> None:
    rows = random_rows(300, 24, dtype=torch.float64, scale=scale, offset=3.0)
    result, left_out = accumulate(rows.split(200), 24, checked=checked)
    assert left_out == 0
    assert_exact(result, rows)


@both_paths
def test_features_of_very_different_scales(checked: bool) -> None:
    rows = random_rows(500, 40, dtype=torch.float64) * torch.logspace(-30, 18, 40, dtype=torch.float64)
    result, _ = accumulate([rows.float()], 40, checked=checked)
    assert_exact(result, rows.float())


@both_paths
def test_an_outlier_spoils_no_other_feature_and_no_other_batch(checked: bool) -> None:
    rows = random_rows(120, 40, offset=2.0)
    rows[70, 3] = 1e30
    result, _ = accumulate(rows.split(40), 40, checked=checked)
    assert_exact(result, rows)
    others = [*range(3), *range(4, 40)]
    first, _ = accumulate(rows[:40].split(40), 40, checked=checked)
    assert_exact(first, rows[:40])
    quiet, _ = accumulate(rows[:, others].split(40), 39, checked=checked)
    reference = two_pass_covariance(rows[:, others])
    assert covariance_error(quiet.covariance(), reference) < TOLERANCE
    np.testing.assert_allclose(result.mean[others], float64_rows(rows[:, others]).mean(0), rtol=1e-5)


# --- guarantee 1: degenerate rows ----------------------------------------------------------------------


@both_paths
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("features", [1, 3, 16, 100])
def test_identical_rows_have_no_variance_at_all(features: int, dtype: torch.dtype, checked: bool) -> None:
    # As a Linear gives after dead units: its bias, over and over.
    row = (random_rows(1, features, dtype=torch.float64) * 3 + 10).to(dtype)
    result, _ = accumulate([row.expand(n, -1).clone() for n in (300, 1, 7, 8192, 699)], features, checked=checked)
    assert result.n == 9199
    np.testing.assert_allclose(result.mean, float64_rows(row)[0], rtol=1e-15)
    if dtype != torch.float64 or checked:  # a float64 mean of float64 values is rounded itself
        assert not result.scatter.any()
        assert spectrum.intrinsic_dimensionality(spectrum.eigenvalues(result.covariance())) == 0


@both_paths
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("features", [3, 100])
def test_rows_of_zeros(features: int, dtype: torch.dtype, checked: bool) -> None:
    result, left_out = accumulate([torch.zeros(n, features, dtype=dtype) for n in (1, 50)], features, checked=checked)
    assert (result.n, left_out) == (51, 0)
    assert not result.mean.any()
    assert not result.scatter.any()


@both_paths
@pytest.mark.parametrize("constant", [0.0, 0.1, 1e7])
def test_constant_features_beside_others(constant: float, checked: bool) -> None:
    rows = random_rows(600, 30)
    rows[:, ::2] = constant
    result, _ = accumulate(rows.split(200), 30, checked=checked)
    assert_exact(result, rows)


@both_paths
@pytest.mark.parametrize("seed", range(20))
def test_a_constant_feature_never_has_a_negative_variance(seed: int, checked: bool) -> None:
    # A pruned unit gives its bias: the variance is 0, and what is rounded about it must not fall below.
    rows = random_rows(600, 20, seed=seed)
    rows[:, :3] = torch.tensor([3.3333, -77.7, 0.1])
    result, _ = accumulate(rows.split([100, 150, 210, 140]), 20, checked=checked)
    assert (np.diag(result.scatter) >= 0).all()
    assert_exact(result, rows)


# --- rows that do not count ----------------------------------------------------------------------------


@both_paths
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_only_the_rows_to_keep_count(data: st.DataObject, checked: bool) -> None:
    shape = (*data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=3)), data.draw(st.sampled_from([1, 5, 30])))
    seed = data.draw(st.integers(0, 99))
    offset = data.draw(st.sampled_from([0.0, 1e5]))
    rows = random_rows(int(np.prod(shape[:-1])), shape[-1], seed=seed, offset=offset).view(shape)
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(shape[:-1], generator=generator) < data.draw(st.sampled_from([0.0, 0.1, 0.9, 1.0]))
    total = accumulator(shape[-1], checked=checked)
    rows[~keep] = data.draw(st.sampled_from([0.0, float("nan"), float("inf"), 1e30]))
    before = rows.clone()
    if rows.dim() == 3 and data.draw(st.booleans()):
        total.add(rows.transpose(0, 1), keep.transpose(0, 1))
    else:
        total.add(rows, keep)
    assert torch.equal(rows.nan_to_num(), before.nan_to_num())
    result, left_out = drained(total)
    assert left_out == 0
    if keep.any():
        assert_exact(result, rows[keep])
    else:
        assert result.n == 0
        assert not result.scatter.any()


@both_paths
def test_kept_rows_that_are_not_finite_are_counted(checked: bool) -> None:
    rows = random_rows(3000, 4)
    rows[::10] = float("nan")
    keep = torch.arange(3000) % 3 == 0
    total = accumulator(4, checked=checked)
    total.add(rows, keep)
    result, left_out = drained(total)
    finite = rows.isfinite().all(1)
    assert left_out == int((keep & ~finite).sum()) == 100
    assert_exact(result, rows[keep & finite])


@both_paths
@pytest.mark.parametrize("features", [1, 20, 97])
def test_a_single_row(features: int, checked: bool) -> None:
    row = random_rows(1, features, offset=1e5)
    result, _ = accumulate([row], features, checked=checked)
    assert result.n == 1
    np.testing.assert_array_equal(result.mean, float64_rows(row)[0])
    assert not result.scatter.any()


@both_paths
def test_rows_of_rank_one_have_one_dimension(checked: bool) -> None:
    rows = torch.linspace(-1, 1, 1001)[:, None] * torch.linspace(1, 2, 50)[None]
    result, _ = accumulate([rows], 50, checked=checked)
    assert spectrum.intrinsic_dimensionality(spectrum.eigenvalues(result.covariance())) == 1


@both_paths
def test_no_row_at_all(checked: bool) -> None:
    total = accumulator(4, checked=checked)
    for shape in ((0, 4), (3, 0, 4), (0, 5, 4)):
        total.add(torch.zeros(shape))
    result, left_out = drained(total)
    assert (result.n, left_out) == (0, 0)
    assert not result.mean.any()
    assert not result.scatter.any()


@both_paths
def test_a_literal(checked: bool) -> None:
    result, _ = accumulate([torch.tensor([[0.0, 0.0], [2.0, 0.0]]), torch.tensor([[1.0, 3.0]])], 2, checked=checked)
    assert result.n == 3
    np.testing.assert_allclose(result.mean, [1.0, 1.0], rtol=1e-15)
    np.testing.assert_allclose(result.covariance(), [[2 / 3, 0], [0, 2]], atol=1e-15)


# --- non-finite rows -----------------------------------------------------------------------------------


@both_paths
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("features", [4, 33])
@pytest.mark.parametrize("bad", [[np.nan], [np.inf], [-np.inf], [np.inf, -np.inf, np.nan]])
def test_non_finite_rows_are_left_out_and_counted(
    bad: list[float], features: int, dtype: torch.dtype, checked: bool
) -> None:
    rows = random_rows(400, features, dtype=dtype, offset=20.0)
    dirty = rows.clone()
    spoilt = torch.tensor([0, 7, 8, 150, 151, 399])
    for index, row in enumerate(spoilt):
        dirty[row, index % features] = bad[index % len(bad)]
    result, left_out = accumulate(dirty.split([140, 200, 60]), features, checked=checked)
    kept = torch.ones(400, dtype=torch.bool)
    kept[spoilt] = False
    assert left_out == 6
    assert_exact(result, rows[kept])


@both_paths
@pytest.mark.parametrize("features", [4, 33])
def test_a_batch_without_a_finite_row_spoils_nothing(features: int, checked: bool) -> None:
    batches = list(random_rows(300, features, offset=1e3).split(100))
    garbage = torch.full((50, features), float("nan"))
    result, left_out = accumulate([garbage, batches[0], garbage, *batches[1:], garbage], features, checked=checked)
    assert left_out == 150
    assert_exact(result, torch.cat(batches))
    result, left_out = accumulate([garbage], features, checked=checked)
    assert (result.n, left_out) == (0, 50)
    assert not result.mean.any()
    assert not result.scatter.any()


@both_paths
@pytest.mark.parametrize("features", [4, 33])
def test_float64_values_whose_squares_overflow_count_as_non_finite(features: int, checked: bool) -> None:
    rows = random_rows(100, features, dtype=torch.float64)
    dirty = rows.clone()
    dirty[3, 0], dirty[4, 0] = 1e200, -1e200  # their mean is an ordinary number
    dirty[5, 1] = 1e300
    result, left_out = accumulate([dirty], features, checked=checked)
    assert left_out == 3
    assert_exact(result, rows[[0, 1, 2, *range(6, 100)]])


# --- layouts and pieces --------------------------------------------------------------------------------


def image_rows(batch: int, channels: int, height: int, width: int) -> Tensor:
    """Rows of a contiguous B×C×H×W image: a view of shape (B, H, W, C)."""
    return random_rows(batch * channels * height, width, offset=5.0).view(batch, channels, height, width).movedim(1, -1)


@both_paths
@pytest.mark.parametrize(
    "layout",
    [
        lambda: image_rows(4, 20, 9, 11),
        lambda: image_rows(4, 20, 9, 11).contiguous(),
        lambda: random_rows(600, 20).view(10, 60, 20).transpose(0, 1),
        lambda: random_rows(20, 600).t(),
        lambda: random_rows(600, 40)[:, ::2],
        lambda: random_rows(600, 40)[:, 7:27],
        lambda: random_rows(600, 20)[::3],
        lambda: random_rows(600, 20)[100:],
        lambda: random_rows(600, 1).expand(600, 20),
        lambda: random_rows(1, 20).expand(600, 20),
        lambda: random_rows(120, 20).view(1, 2, 3, 4, 5, 20),
        lambda: random_rows(120, 20).view(1, 2, 3, 4, 5, 20).permute(3, 1, 0, 4, 2, 5),
        lambda: random_rows(1, 20)[0],
    ],
    ids=lambda layout: None,
)
def test_any_strides_and_any_number_of_dimensions(layout: Callable[[], Tensor], checked: bool) -> None:
    rows = layout()
    result, _ = accumulate([rows, rows], 20, checked=checked)
    flat = torch.from_numpy(float64_rows(rows))
    assert_exact(result, torch.cat([flat, flat]))


@both_paths
@pytest.mark.parametrize(
    ("features", "observations"), [(2, 40_000), (15, 20_000), (16, 20_000), (16, 8193), (130, 16_500), (300, 9000)]
)
def test_more_rows_than_one_product_takes(features: int, observations: int, checked: bool) -> None:
    rows = random_rows(observations, features, offset=100.0)
    result, _ = accumulate([rows], features, checked=checked)
    assert_exact(result, rows)


@both_paths
@pytest.mark.parametrize("shape", [(1, 4, 300, 120), (2, 130, 100, 90), (1, 16, 2, 9000), (3, 17, 9000, 1)])
def test_images_that_are_cut_along_inner_dimensions(shape: tuple[int, int, int, int], checked: bool) -> None:
    rows = image_rows(*shape)
    result, _ = accumulate([rows], shape[1], checked=checked)
    assert_exact(result, torch.from_numpy(float64_rows(rows)))


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_pieces_are_bounded_and_together_the_whole(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 9), min_size=2, max_size=5))
    features = shape[-1]
    x = torch.arange(torch.Size(shape).numel(), dtype=torch.float64).view(shape)
    x = x.permute(*data.draw(st.permutations(range(len(shape) - 1))), len(shape) - 1)
    if data.draw(st.booleans()):  # the features are not the innermost in memory
        x = x.movedim(-1, 0).contiguous().movedim(0, -1)
    limit = data.draw(st.integers(1, 12))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK_ROWS", (limit, limit))
        pieces = list(module.chunks(x))
    assert all(piece.numel() // features <= limit for piece in pieces)
    # Each row starts with a number of its own.
    firsts = torch.cat([piece.reshape(-1, features)[:, 0] for piece in pieces])
    assert sorted(firsts.tolist()) == sorted(x.reshape(-1, features)[:, 0].tolist())


@pytest.mark.parametrize("features", [*EDGES, 2047, 2048, 2049])
def test_the_blocks_of_a_plan_are_the_upper_triangle_once(features: int) -> None:
    plan = BlockPlan(features)
    covered = torch.zeros(features, features, dtype=torch.int16)
    for (first, height, _), view in zip(plan.blocks, plan.views(torch.ones(plan.size)), strict=True):
        covered[first : first + height, first:] += view.to(torch.int16)
    assert (covered.triu() == torch.ones_like(covered).triu()).all()
    assert plan.size == int(covered.sum())
    flat = torch.zeros(plan.size)
    flat[torch.from_numpy(plan.diagonal)] = 1
    for (first, height, _), view in zip(plan.blocks, plan.views(flat), strict=True):
        assert torch.equal(view[:, :height], torch.eye(height))
        assert not view[:, height:].any(), (first, height)


# --- what is refused -----------------------------------------------------------------------------------


@both_paths
@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        (torch.zeros(5, 3), ValueError, r"\(5, 3\) do not have 4 features"),
        (torch.zeros(()), ValueError, r"\(\) do not have 4 features"),
        (torch.zeros(4, 5, 4, 1), ValueError, r"\(4, 5, 4, 1\) do not have 4 features"),
        (torch.zeros(5, 4, dtype=torch.int64), TypeError, "int64"),
        (torch.zeros(5, 4, dtype=torch.bool), TypeError, "bool"),
        (torch.zeros(5, 4, dtype=torch.complex64), TypeError, "complex64"),
    ],
)
def test_rows_that_are_none_are_refused_and_change_nothing(
    rows: Tensor, error: type[Exception], message: str, checked: bool
) -> None:
    total = accumulator(4, checked=checked)
    good = random_rows(30, 4)
    total.add(good)
    with pytest.raises(error, match=message):
        total.add(rows)
    expected, _ = accumulate([good], 4, checked=checked)
    assert same_bits(drained(total)[0], expected)


@pytest.mark.parametrize("length", [0, 13, 15])
def test_a_buffer_of_another_length_is_refused(length: int) -> None:
    total = accumulator(4)
    with pytest.raises(ValueError, match=rf"\({length},\), moments of 4 features need \(14,\)"):
        total.drain_into(np.empty(length))


def test_moments_and_the_drained_buffer_agree() -> None:
    rows = random_rows(100, 7)
    left, right = accumulator(7), accumulator(7)
    left.add(rows)
    right.add(rows)
    assert same_bits(left.moments(), drained(right)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("features", [1, 16, 96, 300, 600])
def test_an_accumulator_takes_the_bytes_that_are_stated(features: int, dtype: torch.dtype) -> None:
    total = HostAccumulator(features, Workspace(CPU))
    total.add(torch.ones(3, features, dtype=dtype))
    held = [value for value in vars(total).values() if isinstance(value, Tensor) and value.dim()]
    taken = sum(tensor.numel() * tensor.element_size() for tensor in held)
    assert HostAccumulator.nbytes(features) - 8 * features < taken <= HostAccumulator.nbytes(features)


# --- small batches are held back -----------------------------------------------------------------------


def groups(total: HostAccumulator) -> int:
    """Groups that were made of what was added, not counting what is held back."""
    return total._waiting


@pytest.mark.parametrize("features", [20, 600])
def test_small_batches_make_one_group(features: int) -> None:
    total = HostAccumulator(features, Workspace(CPU))
    batches = [random_rows(stage_rows(features) // 8, features, seed=seed, offset=10.0 * seed) for seed in range(17)]
    for number, batch in enumerate(batches):
        total.add(batch)
        assert groups(total) == (number + 1) // 8
    assert_exact(drained(total)[0], torch.cat(batches))


@pytest.mark.parametrize("features", [7, 20, 100, 600])
@pytest.mark.parametrize("precision", [torch.float32, torch.float64])
def test_batches_of_any_type_and_layout_wait_together(features: int, precision: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(features)
    total = accumulator(features, precision=precision)
    added = []
    for number in range(60):
        size = int(torch.randint(1, 30, (), generator=generator))
        dtype = DTYPES[int(torch.randint(0, 4, (), generator=generator))]
        rows = random_rows(6 * size, features, seed=number, dtype=dtype, offset=3.0)
        if number % 3 == 1:
            rows = rows.view(size, 2, 3, features)
        elif number % 3 == 2:  # as a convolution gives it
            rows = rows.t().contiguous().view(features, size, 2, 3).movedim(0, -1)
        total.add(rows)
        added.append(torch.from_numpy(float64_rows(rows)))
    assert_exact(drained(total)[0], torch.cat(added))


def test_a_bad_row_among_batches_that_wait() -> None:
    batches = list(random_rows(300, 20).split(30))
    batches[4] = batches[4].clone()
    batches[4][7, 3] = float("inf")
    result, left_out = accumulate(batches, 20)
    assert left_out == 1
    assert_exact(result, torch.cat(batches)[[index for index in range(300) if index != 127]])


@pytest.mark.parametrize("done", [False, True])
def test_an_interrupt_about_the_reduction_of_a_stage_counts_no_row_twice(
    done: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    total = HostAccumulator(20, Workspace(CPU))
    reduce = HostAccumulator._reduce

    def interrupted(self: HostAccumulator, *given: Any) -> None:
        if done:
            reduce(self, *given)
        raise KeyboardInterrupt

    batches = random_rows(stage_rows(20), 20).chunk(2)
    total.add(batches[0])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(HostAccumulator, "_reduce", interrupted)
        total.add(batches[1])
    assert total.adding == (not done), "whoever harvests what lost rows leaves it out and says so"
    if done:
        assert_exact(drained(total)[0], torch.cat(batches))


def test_stages_of_bad_rows_alone_go_on() -> None:
    total = HostAccumulator(20, Workspace(CPU))
    bad = torch.full((stage_rows(20) // 2, 20), float("nan"))
    good = random_rows(100, 20)
    for batch in (bad, bad, good):
        total.add(batch)
    result, left_out = drained(total)
    assert left_out == 2 * len(bad)
    assert_exact(result, good)


def test_what_waits_is_reduced_in_memory_of_the_thread_that_drains() -> None:
    workspace, own = Workspace(CPU), Workspace(CPU)
    total = accumulator(20, workspace=workspace)
    rows = random_rows(50, 20)
    total.add(rows)
    buffer = np.empty(20 + 210)
    assert total.drain_into(buffer, own) == (50, 0, 50.0)
    assert not workspace._flat
    assert own._flat
    assert_exact(Moments.from_packed(50, buffer[:20], buffer[20:]), rows)


# --- rows that count more than once --------------------------------------------------------------------


@both_paths
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_weights_are_those_of_a_weighted_two_pass_covariance(data: st.DataObject, checked: bool) -> None:
    features = data.draw(st.sampled_from([3, 20, 130]))
    weights = data.draw(st.lists(st.sampled_from([1.0, 2.0, 7.5, 64.0]), min_size=1, max_size=6))
    total = accumulator(features, checked=checked)
    rows, repeated = [], []
    for seed, weight in enumerate(weights):
        batch = random_rows(data.draw(st.integers(1, 60)), features, seed=seed, offset=100.0 * seed)
        total.add(batch, weight=weight)
        rows.append(float64_rows(batch))
        repeated.append(np.full(len(batch), weight))
    buffer = np.empty(features + features * (features + 1) // 2)
    n, left_out, weight = total.drain_into(buffer)
    x, w = np.concatenate(rows), np.concatenate(repeated)
    assert (n, left_out, weight) == (len(x), 0, w.sum())
    centred = x - x[0]
    mean = w @ centred / w.sum()
    centred -= mean
    reference = (centred * w[:, None]).T @ centred / w.sum()
    result = Moments.from_packed(1, buffer[:features], buffer[features:] / weight)
    assert covariance_error(result.scatter, reference) < TOLERANCE
    np.testing.assert_allclose(result.mean, x[0] + mean, atol=1e-6 * max(1.0, np.abs(reference).max() ** 0.5))


# --- nothing of a batch is kept, nothing of it is changed ----------------------------------------------


@both_paths
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("features", [4, 33])
def test_rows_are_read_only_and_free_afterwards(features: int, dtype: torch.dtype, checked: bool) -> None:
    rows = random_rows(50, features, dtype=dtype)
    rows[3, 1], rows[5, 2] = float("nan"), float("inf")
    before = rows.clone()
    total = accumulator(features, checked=checked)
    expected, _ = accumulate([rows], features, checked=checked)
    total.add(rows)
    assert torch.equal(rows.nan_to_num(nan=1e4, posinf=2e4), before.nan_to_num(nan=1e4, posinf=2e4))
    rows.fill_(7.0)  # as an in-place activation does right after the hook
    assert same_bits(drained(total)[0], expected)
    alive = weakref.ref(rows)
    del rows
    assert alive() is None


@both_paths
def test_no_graph_is_kept(checked: bool) -> None:
    leaf = random_rows(50, 20).requires_grad_()
    total = accumulator(20, checked=checked)
    output = leaf * 2
    total.add(output)
    output.sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.eq(2).all()
    tensors = [value for value in vars(total).values() if isinstance(value, Tensor)]
    assert not any(tensor.requires_grad for tensor in tensors)


@both_paths
def test_accumulators_share_their_scratch_memory(checked: bool) -> None:
    workspace = Workspace(CPU)
    widths = (130, 20, 300, 7, 20)
    totals = [accumulator(width, checked=checked, workspace=workspace) for width in widths]
    batches = [[random_rows(60, width, seed=seed) for seed in range(40)] for width in widths]
    for step in range(40):
        for total, rows in zip(totals, batches, strict=True):
            total.add(rows[step].double() if step % 3 == 0 else rows[step])
    for total, rows in zip(totals, batches, strict=True):
        assert_exact(drained(total)[0], torch.cat(rows))


@pytest.mark.parametrize("precision", [torch.float32, torch.float64])
@pytest.mark.parametrize("features", [7, 16, 64, 1500])
def test_scratch_memory_is_bounded_whatever_a_batch_has(features: int, precision: torch.dtype) -> None:
    workspace = Workspace(CPU)
    total = accumulator(features, workspace=workspace, precision=precision)
    rows, steps = (70_000, 300) if features < 100 else (4000, 50)  # several chunks
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        total.add(torch.ones(1, features, dtype=dtype).expand(rows, -1))
        total.add(torch.ones(features, steps, 70, dtype=dtype).movedim(0, -1))
    held = sum(buffer.numel() * buffer.element_size() for buffer in workspace._flat.values())
    blocks = 12 * features**2  # these are not kept
    assert 0 < held <= HostAccumulator.scratch_bytes(features, module.chunk_rows(features)) - blocks


# --- the user's numerics do not leak in, ours do not leak out -------------------------------------------


def work(checked: bool) -> Moments:
    """Products of several blocks, the float64 path and a fold."""
    batches = [random_rows(700, 200, seed=seed, offset=10.0) for seed in range(3)]
    batches[1] = batches[1] * 1e30
    total = accumulator(200, checked=checked)
    for batch in batches:
        total.add(batch)
    return drained(total)[0]


@pytest.fixture
def precision_settings() -> Iterator[None]:
    """Puts back the process's settings for float32 products."""
    yield
    torch.set_float32_matmul_precision("highest")
    if hasattr(torch.backends, "fp32_precision"):
        backends: Any = torch.backends
        for owner in (backends.mkldnn.matmul, backends.mkldnn, backends.cuda.matmul, backends):
            owner.fp32_precision = "none"


@both_paths
@pytest.mark.usefixtures("precision_settings")
@pytest.mark.parametrize("precision", ["high", "medium"])
def test_a_lower_matmul_precision_stays_outside_and_as_it_was(precision: str, checked: bool) -> None:
    expected = work(checked)
    torch.set_float32_matmul_precision(precision)
    x = random_rows(256, 256)
    product = x.t() @ x
    assert same_bits(work(checked), expected)
    assert torch.get_float32_matmul_precision() == precision
    assert torch.equal(x.t() @ x, product)


@both_paths
@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="this torch has one setting for all")
@pytest.mark.usefixtures("precision_settings")
@pytest.mark.parametrize("precision", ["tf32", "bf16", "ieee"])
@pytest.mark.parametrize("owner", ["", "mkldnn", "mkldnn.matmul"])
def test_a_lower_backend_precision_stays_outside_and_as_it_was(owner: str, precision: str, checked: bool) -> None:
    def at(path: str) -> Any:
        found: Any = torch.backends
        for part in path.split(".") if path else []:
            found = getattr(found, part)
        return found

    def read() -> list[str]:
        return [at(path).fp32_precision for path in ("", "mkldnn", "mkldnn.matmul", "cuda.matmul")]

    expected = work(checked)
    at(owner).fp32_precision = precision
    chosen = read()
    x = random_rows(256, 256)
    product = x.t() @ x
    assert same_bits(work(checked), expected)
    assert read() == chosen
    assert torch.equal(x.t() @ x, product)
    # A wider setting is still followed by the narrower ones.
    at(owner).fp32_precision = "ieee"
    assert at("mkldnn.matmul").fp32_precision == "ieee"


MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
}


@both_paths
@pytest.mark.parametrize("mode", ["autocast", "inference_mode", "no_grad"])
def test_the_same_bits_in_every_mode(mode: str, checked: bool) -> None:
    expected = work(checked)
    with MODES[mode]():
        result = work(checked)
    assert same_bits(result, expected)


@both_paths
def test_made_in_one_mode_and_used_in_another(checked: bool) -> None:
    batches = [random_rows(64, 40, seed=seed) for seed in range(70)]
    expected, _ = accumulate(batches, 40, checked=checked)
    modes = [torch.inference_mode, torch.enable_grad, torch.no_grad, MODES["autocast"]]
    workspace = Workspace(CPU)
    for start in range(len(modes)):
        with modes[start]():
            total = accumulator(40, checked=checked, workspace=workspace)
        for index, batch in enumerate(batches):
            with modes[(start + index) % len(modes)]():
                total.add(batch.clone())  # an inference tensor, where the mode makes one
        assert same_bits(drained(total)[0], expected)


@both_paths
def test_inference_tensors_are_taken_outside_of_inference_mode(checked: bool) -> None:
    with torch.inference_mode():
        rows = random_rows(64, 40)
    result, _ = accumulate([rows], 40, checked=checked)
    expected, _ = accumulate([random_rows(64, 40)], 40, checked=checked)
    assert same_bits(result, expected)


@both_paths
@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_the_default_dtype_does_not_matter(default: torch.dtype, checked: bool) -> None:
    expected = work(checked)
    torch.set_default_dtype(default)
    try:
        result = work(checked)
    finally:
        torch.set_default_dtype(torch.float32)
    assert same_bits(result, expected)


@both_paths
def test_the_default_device_does_not_matter(checked: bool) -> None:
    rows = random_rows(100, 20)
    expected, _ = accumulate([rows], 20, checked=checked)
    with torch.device("meta"):
        total = accumulator(20, checked=checked)
        total.add(rows)
    assert same_bits(drained(total)[0], expected)


@both_paths
def test_deterministic_algorithms_do_not_matter(checked: bool) -> None:
    expected = work(checked)
    torch.use_deterministic_algorithms(True)  # which also fills fresh memory with NaN
    try:
        result = work(checked)
    finally:
        torch.use_deterministic_algorithms(False)
    assert same_bits(result, expected)


@both_paths
def test_the_random_state_is_left_alone(checked: bool) -> None:
    state = torch.get_rng_state()
    batch = torch.ones(100, 20)
    accumulate([batch], 20, checked=checked)
    assert torch.equal(torch.get_rng_state(), state)


def test_both_paths_agree() -> None:
    batches = [random_rows(200, 50, seed=seed, offset=30.0) for seed in range(40)]
    host, device = (accumulate(batches, 50, checked=checked)[0] for checked in (True, False))
    assert covariance_error(host.covariance(), device.covariance()) < TOLERANCE


def test_a_total_merged_from_many_short_lived_accumulators() -> None:
    batches = [random_rows(1, 30, seed=seed, offset=1e5, dtype=torch.float64) for seed in range(150)]
    parts = [accumulate([batch], 30)[0] for batch in batches]
    assert_exact(merged(parts), torch.cat(batches))


# --- groups of narrow layers that share a centre -------------------------------------------------------


@pytest.mark.parametrize("features", [20, 64, 130])
@pytest.mark.parametrize("drift", [0.0, 0.05, 0.4, 3.0, 1e4])
@pytest.mark.parametrize("offset", [0.0, 10.0, 1e4])
def test_groups_about_a_centre_of_before(features: int, drift: float, offset: float) -> None:
    # The mean moves by `drift` spreads from group to group: near the shared centre, or too far from it.
    batches = [random_rows(8192, features, seed=seed, offset=offset + drift * seed) for seed in range(8)]
    total = HostAccumulator(features, Workspace(CPU))
    for batch in batches:
        total.add(batch)
    if offset <= 10.0 and drift != 0.4:
        assert (total._shifted_count > 0) == (drift < 0.4)
    assert_exact(drained(total)[0], torch.cat(batches))


@pytest.mark.parametrize("spoilt", ["non-finite", "huge", "cancelling", "two-valued"])
def test_what_does_not_fit_a_shared_centre_is_seen(spoilt: str) -> None:
    batches = [random_rows(8192, 40, seed=seed) for seed in range(6)]
    if spoilt == "non-finite":
        batches[3][5, 7] = float("nan")
    elif spoilt == "huge":
        batches[3][5, 7] = 1e25
    elif spoilt == "cancelling":
        batches[3][5, 7], batches[3][6, 7] = 1e25, -1e25
    else:
        batches[3:] = [(batch > 0).float() for batch in batches[3:]]
    result, left_out = accumulate(batches, 40)
    rows = torch.cat(batches)
    assert left_out == (spoilt == "non-finite")
    assert_exact(result, rows[rows.isfinite().all(1)])
