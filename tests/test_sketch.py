"""Sketches of scatters: the same Ω everywhere, exact under any split of the rows, told by their lengths."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from delve_ray.errors import OptionError
from delve_ray.moments import F64, triangle_size
from delve_ray.sketch import (
    SketchRule,
    SketchTotal,
    columns_of,
    omega,
    packed_size,
    sketch_size,
    split,
    usable_sketch_size,
)
from delve_ray.sketch_accumulator import SketchAccumulator, sketch_bytes, stage_rows
from delve_ray.store.protocol import StoreConfig
from delve_ray.workspace import Workspace

CPU = torch.device("cpu")
FEATURES, SIZE = 60, 16


def sketch_of(rows: F64, size: int = SIZE, weights: F64 | None = None) -> tuple[F64, F64, F64]:
    """Mean, diagonal and Y of rows, by definition: two passes in float64 and a dense Ω."""
    weights = np.ones(len(rows)) if weights is None else weights
    mean = rows[0] + weights @ (rows - rows[0]) / weights.sum()
    scatter = ((rows - mean) * weights[:, None]).T @ (rows - mean)
    return mean, np.diag(scatter).copy(), scatter @ omega(rows.shape[1], size).dense(0, rows.shape[1])


def assert_sketch(buffer: F64, rows: F64, tolerance: float, weights: F64 | None = None) -> None:
    """Mean, diagonal and Y are those of the rows, up to a share of the largest of each."""
    features = rows.shape[1]
    diagonal, sketch = split(buffer[features:], features)
    expected = sketch_of(rows, sketch.shape[1], weights)
    scale = max(1e-300, float(np.abs(expected[1]).max()))
    assert np.abs(buffer[:features] - expected[0]).max() <= tolerance * max(1.0, float(np.abs(rows).max()))
    assert np.abs(diagonal - expected[1]).max() <= tolerance * scale
    assert np.abs(sketch - expected[2]).max() <= tolerance * scale


def drained(accumulator: SketchAccumulator) -> tuple[F64, Any]:
    buffer = np.empty(accumulator.moments_size)
    return buffer, accumulator.drain_into(buffer)


# --- Ω -------------------------------------------------------------------------------------------------------


def test_omega_is_the_same_everywhere() -> None:
    """Literal, as a process with another numpy, or on another machine, must make the same."""
    found = omega(1000, 64)
    content = found.columns.astype("<i4").tobytes() + np.sign(found.values).astype("<i4").tobytes()
    assert hashlib.sha256(content).hexdigest()[:16] == "7e45201729cfc932"
    assert omega(1000, 64) is found
    assert not np.array_equal(omega(1001, 64).columns[:1000], found.columns)


def test_a_row_of_omega_has_one_sign_in_each_block_and_length_one() -> None:
    found = omega(5000, 64)
    assert (found.columns // 8 == np.arange(8)).all()
    assert np.allclose(np.abs(found.values), 8**-0.5)
    assert np.allclose((found.dense(0, 5000) ** 2).sum(1), 1.0)
    counts = np.bincount(found.columns.ravel(), minlength=64)
    assert np.abs(counts - 625).max() < 5 * np.sqrt(625), "each column is as likely as any other"
    assert abs(np.sign(found.values).sum()) < 5 * np.sqrt(40_000)
    assert abs(float((found.values[:, 0] * found.values[:, 1]).sum()) * 8) < 5 * np.sqrt(5000)


def test_products_with_omega_are_those_with_the_dense_matrix() -> None:
    found, rows = omega(70, 24), np.random.default_rng(0).normal(size=(5, 70))
    dense = found.dense(0, 70)
    np.testing.assert_allclose(found.after(rows), rows @ dense, atol=1e-14)
    np.testing.assert_allclose(found.gram(), dense.T @ dense, atol=1e-14)
    np.testing.assert_array_equal(found.dense(10, 33), dense[10:33])


# --- lengths -------------------------------------------------------------------------------------------------


@given(st.integers(1, 3000), st.integers(0, 200))
def test_a_length_tells_what_a_packed_scatter_is(features: int, eighths: int) -> None:
    rule = SketchRule(1, 8 * eighths)
    columns = rule.columns(features)
    assert rule.packed_size(features) == packed_size(features, columns) <= triangle_size(features)
    assert columns_of(rule.packed_size(features), features) == columns
    assert rule.moments_size(features) == features + rule.packed_size(features)


def test_a_rule_sketches_what_is_wider_and_where_that_is_shorter() -> None:
    rule = SketchRule(64, 16)
    assert [rule.columns(width) for width in (33, 64, 65, 10_000)] == [0, 0, 16, 16]
    assert SketchRule(8, 16).columns(33) == 0, "33·17 values are as many as the triangle has"
    assert SketchRule(8, 16).columns(34) == 16
    assert SketchRule(8, 0).columns(10_000) == 0
    for length in (0, 1, sketch_size(100, 12), sketch_size(100, 16) + 1, triangle_size(100) - 1):
        assert columns_of(length, 100) is None


def test_sizes_of_sketches_are_multiples_of_eight(caplog: pytest.LogCaptureFixture) -> None:
    assert usable_sketch_size(1001) == 1008
    assert "sketch_size=1001 is rounded up to 1008" in caplog.text
    for wrong in (-8, 1.5, "16", None):
        with pytest.raises(OptionError, match="sketch_size="):
            usable_sketch_size(wrong)  # type: ignore[arg-type]
    for size in (12, -8):
        with pytest.raises(OptionError, match=f"sketch_size={size} is not a multiple of 8"):
            StoreConfig("r", "/nowhere", 1, sketch_size=size)


# --- totals --------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_totals_are_the_sketch_of_all_rows_however_they_are_split(data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    groups = data.draw(st.integers(1, 80))
    offset = data.draw(st.sampled_from([0.0, 1e5]))
    sizes = rng.integers(1, 6, groups)
    weights = rng.integers(1, 4, groups).astype(float)
    rows = rng.normal(size=(sizes.sum(), FEATURES)) * np.geomspace(1, 1e-3, FEATURES) + offset
    total, other = SketchTotal(FEATURES, SIZE), SketchTotal(FEATURES, SIZE)
    start = 0
    for size, weight in zip(sizes, weights, strict=True):
        mean, diagonal, sketch = sketch_of(rows[start : start + size], weights=np.full(size, weight))
        target = total if rng.random() < 0.7 else other
        target.add(int(size), mean, np.concatenate([diagonal, sketch.ravel()]), weight * size)
        start += size
    twin = total.copy()
    total.add(*other.result(), other.weight)
    n, mean, packed = total.result()
    assert (n, total.weight) == (sizes.sum(), (sizes * weights).sum())
    assert twin.n + other.n == n, "a copy is independent"
    assert_sketch(np.concatenate([mean, packed]), rows, 1e-10 if offset == 0 else 1e-9, np.repeat(weights, sizes))


# --- accumulators --------------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_an_accumulator_has_the_sketch_of_its_rows_however_they_come(data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    offset = data.draw(st.sampled_from([0.0, 1e5]))
    masked = data.draw(st.booleans())
    rows = rng.normal(size=(data.draw(st.integers(1, 300)), FEATURES)) * np.geomspace(1, 1e-2, FEATURES) + offset
    accumulator = SketchAccumulator(FEATURES, SIZE, Workspace(CPU), torch.float64)
    accumulator._capacity = data.draw(st.integers(1, 40))
    keep = rng.random(len(rows)) < 0.7 if masked else np.ones(len(rows), bool)
    weights = np.ones(len(rows))
    start = 0
    while start < len(rows):
        stop = min(len(rows), start + int(rng.integers(1, 90)))
        weights[start:stop] = weight = float(rng.integers(1, 4))
        part = torch.from_numpy(rows[start:stop])
        mask = torch.from_numpy(keep[start:stop]) if masked else None
        if rng.random() < 0.3:  # features first in memory
            part = part.t().contiguous().t()
        if rng.random() < 0.3:
            part, mask = part.unsqueeze(1), None if mask is None else mask.unsqueeze(1)
        accumulator.add(part, mask, weight)
        start = stop
    buffer, found = drained(accumulator)
    assert (found.n, found.nonfinite, found.weight) == (keep.sum(), 0, weights[keep].sum())
    if keep.any():
        assert_sketch(buffer, rows[keep], 1e-10 if offset == 0 else 1e-9, weights[keep])
    else:
        assert not buffer.any()


@pytest.mark.parametrize("offset", [0.0, 1e5])
def test_float32_rows(offset: float) -> None:
    rows = torch.randn(3000, FEATURES, generator=torch.Generator().manual_seed(0)) + offset
    accumulator = SketchAccumulator(FEATURES, SIZE, Workspace(CPU))
    for batch in rows.split(700):
        accumulator.add(batch)
    buffer, found = drained(accumulator)
    assert found.n == 3000
    assert_sketch(buffer, rows.double().numpy(), 2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_of_half_precision(dtype: torch.dtype) -> None:
    rows = (torch.randn(1000, FEATURES, generator=torch.Generator().manual_seed(0)) + 3).to(dtype)
    accumulator = SketchAccumulator(FEATURES, SIZE, Workspace(CPU))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        accumulator.add(rows.view(10, 100, FEATURES))
    buffer, _ = drained(accumulator)
    assert_sketch(buffer, rows.double().numpy(), 2e-6)


def test_feature_maps() -> None:
    maps = torch.randn(6, FEATURES, 5, 7, generator=torch.Generator().manual_seed(0))
    accumulator = SketchAccumulator(FEATURES, SIZE, Workspace(CPU))
    accumulator._capacity = 50
    accumulator.add(maps.permute(0, 2, 3, 1))
    buffer, found = drained(accumulator)
    assert found.n == 6 * 35
    assert_sketch(buffer, maps.permute(0, 2, 3, 1).reshape(-1, FEATURES).double().numpy(), 2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 1e30, 1e-30])
def test_rows_that_are_not_finite_are_left_out_and_counted(dtype: torch.dtype, scale: float) -> None:
    rows = torch.randn(200, FEATURES, dtype=dtype, generator=torch.Generator().manual_seed(1)) * scale
    bad = rows.clone()
    bad[3, 5], bad[77, 0], bad[120] = torch.nan, torch.inf, -torch.inf
    if dtype == torch.float64:
        bad[150, 1] = 1e200
    accumulator = SketchAccumulator(FEATURES, SIZE, Workspace(CPU))
    accumulator.add(bad)
    buffer, found = drained(accumulator)
    left_out = [3, 77, 120] + ([150] if dtype == torch.float64 else [])
    assert (found.n, found.nonfinite) == (200 - len(left_out), len(left_out))
    good = np.delete(rows.double().numpy(), left_out, axis=0) / scale
    diagonal, sketch = split(buffer[FEATURES:], FEATURES)
    diagonal /= scale**2
    sketch /= scale**2
    buffer[:FEATURES] /= scale
    assert_sketch(buffer, good, 2e-6)


def test_a_constant_layer_has_no_variance_at_all() -> None:
    accumulator = SketchAccumulator(FEATURES, SIZE, Workspace(CPU))
    accumulator.add(torch.full((500, FEATURES), 0.1))
    buffer, _ = drained(accumulator)
    assert not buffer[FEATURES:].any()


def test_what_is_no_row_is_refused_as_elsewhere() -> None:
    accumulator = SketchAccumulator(FEATURES, SIZE, Workspace(CPU))
    with pytest.raises(ValueError, match="do not have 60 features"):
        accumulator.add(torch.zeros(3, 4))
    with pytest.raises(TypeError, match="floating point"):
        accumulator.add(torch.zeros(3, FEATURES, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"need \(1080,\)"):
        accumulator.drain_into(np.empty(7))


def test_an_accumulator_holds_what_it_says() -> None:
    accumulator = SketchAccumulator(2000, 64, Workspace(CPU))
    empty = accumulator.held_bytes
    accumulator.add(torch.zeros(3, 2000, dtype=torch.float64))
    tensors = [value for value in vars(accumulator).values() if isinstance(value, torch.Tensor)]
    own = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in tensors}
    assert abs(sum(own.values()) - accumulator.held_bytes) <= 64
    assert accumulator.held_bytes == sketch_bytes(2000, 64) == empty + 8 * 2000 * stage_rows(2000, 64)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_has_the_same_sketch_and_is_not_waited_for() -> None:
    rows = torch.randn(5000, 300, generator=torch.Generator().manual_seed(0)) * 3 + 100
    bad = rows.clone()
    bad[7, 7] = torch.nan
    on_device, device = bad.cuda(), torch.device("cuda", torch.cuda.current_device())
    accumulator = SketchAccumulator(300, 64, Workspace(device))
    accumulator.add(on_device[:10])  # Ω is copied there once
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in on_device[10:].split(700):
            accumulator.add(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    buffer, found = drained(accumulator)
    assert (found.n, found.nonfinite) == (4999, 1)
    assert_sketch(buffer, np.delete(rows.double().numpy(), 7, axis=0), 2e-6)
