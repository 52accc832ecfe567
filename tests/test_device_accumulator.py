"""delve_ray.device_accumulator: rows that wait in a stage or are reduced where they are; on a GPU where there is one.

What rows of any kind give is in test_accumulator, which runs the same class on the CPU.
"""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from torch import Tensor

from delve_ray import staging
from delve_ray.cuda import lane
from delve_ray.device_accumulator import DeviceAccumulator
from delve_ray.moments import Moments
from delve_ray.workspace import Workspace
from tests.helpers import (
    TOLERANCE,
    assert_exact,
    covariance_error,
    drained,
    float64_rows,
    random_rows,
    two_pass_covariance,
)

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICES = ["cpu", pytest.param("cuda", marks=gpu)]
HALVES = (torch.float16, torch.bfloat16)
on_devices = pytest.mark.parametrize("device", DEVICES)
on_a_gpu = pytest.mark.parametrize("device", [pytest.param("cuda", marks=gpu)])


def accumulator(features: int, device: str, products: str = "float32") -> DeviceAccumulator:
    place = torch.device(device, torch.cuda.current_device()) if device == "cuda" else torch.device(device)
    return DeviceAccumulator(features, Workspace(place), products=products)


def reduced(batches: list[Tensor], device: str, **options: str) -> tuple[Moments, int]:
    total = accumulator(batches[0].shape[-1], device, **options)
    for batch in batches:
        total.add(batch.to(device))
    return drained(total)


@pytest.fixture(params=["kernels", "operators"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With the kernels, where they run, and as where Triton is missing."""
    if request.param == "operators":
        monkeypatch.setattr("delve_ray.device_accumulator.kernels", lambda device: None)
    return str(request.param)


# --- exact -----------------------------------------------------------------------------------------------------


@on_a_gpu
def test_the_kernels_run_here(device: str) -> None:
    assert lane.kernels(torch.device(device, torch.cuda.current_device())) is not None


@on_a_gpu
@pytest.mark.parametrize("features", [1, 15, 16, 17, 64, 65, 100, 128, 129, 200, 256, 257, 384, 385, 500, 1030])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES])
@pytest.mark.parametrize("offset", [0.0, 0.5, 3.0, 1e4])
def test_every_width(offset: float, dtype: torch.dtype, features: int, device: str) -> None:
    rows = random_rows(1500, features, dtype=dtype, offset=offset)
    result, left_out = reduced(list(rows.split([1, 700, 799])), device)
    assert left_out == 0
    assert_exact(result, rows)


@on_a_gpu
@pytest.mark.parametrize(
    "shape", [(9, 64, 56, 56), (300, 20, 10, 10), (11, 200, 28, 28), (40, 300, 14, 14), (50, 48, 7, 7)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_feature_maps(shape: tuple[int, int, int, int], dtype: torch.dtype, device: str) -> None:
    images = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) + 0.7).to(dtype)
    for layout in (torch.contiguous_format, torch.channels_last):
        rows = images.contiguous(memory_format=layout).to(device).movedim(1, -1)
        total = accumulator(shape[1], device)
        total.add(rows)
        total.add(rows)
        result = drained(total)[0]
        expected = two_pass_covariance(rows)
        assert result.n == 2 * rows[..., 0].numel()
        assert covariance_error(result.covariance(), expected) < TOLERANCE


@on_a_gpu
@pytest.mark.parametrize("features", [40, 300])
@pytest.mark.parametrize("scale", [1e-44, 1e-40, 1e-30, 1e-18, 1e18, 1e30, 5e37])
@pytest.mark.parametrize("observations", [100, 20_000])
def test_any_scale(observations: int, scale: float, features: int, device: str) -> None:
    rows = random_rows(observations, features, scale=scale, offset=0.5)
    result, left_out = reduced([rows, random_rows(10, features)], device)
    assert left_out == 0
    assert_exact(result, torch.cat([rows, random_rows(10, features)]))


@on_a_gpu
@pytest.mark.parametrize("features", [48, 100, 300])
@pytest.mark.parametrize("kind", ["rounded", "two-valued", "odd", "sparse", "outlier", "constant", "jump", "decay"])
def test_many_rows_of_any_kind(kind: str, features: int, device: str) -> None:
    rows = torch.randn(33_000, features, generator=torch.Generator().manual_seed(0))
    if kind == "rounded":
        rows = (rows + 100).bfloat16()
    elif kind == "two-valued":
        rows = (rows > 0).float()
    elif kind == "odd":
        rows = torch.where(rows > 0, 0.7123457, -1.3333331)
    elif kind == "sparse":
        rows = (rows > 1).float() * 0.7 - 0.3
    elif kind == "outlier":
        rows[700, 3] = 1e6
    elif kind == "constant":
        rows[:, ::3] = 0.1
    elif kind == "jump":
        rows[20_000:] += 1e5
    else:
        rows *= torch.logspace(0, -4, features)
    result, _ = reduced(list(rows.split(16_500)), device)
    assert covariance_error(result.covariance(), two_pass_covariance(rows)) < TOLERANCE
    assert (np.diag(result.scatter)[(rows == rows[0]).all(0).numpy()] == 0).all()


@on_a_gpu
@pytest.mark.parametrize("features", [40, 300])
@pytest.mark.parametrize("observations", [400, 40_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_are_not_finite_and_rows_that_do_not_count(
    dtype: torch.dtype, observations: int, features: int, device: str
) -> None:
    rows = random_rows(observations, features, dtype=dtype, offset=0.3)
    rows[::37, features // 2] = float("nan")
    rows[5, 0] = float("-inf")
    keep = torch.arange(observations) % 3 != 0
    total = accumulator(features, device)
    total.add(rows.to(device), keep.to(device))
    total.add(rows.to(device))
    result, left_out = drained(total)
    finite = rows.isfinite().all(1)
    assert left_out == int((keep & ~finite).sum()) + int((~finite).sum())
    assert_exact(result, torch.cat([rows[keep & finite], rows[finite]]))


# --- stages ----------------------------------------------------------------------------------------------------


@on_devices
@pytest.mark.parametrize("features", [20, 300])
def test_small_batches_wait_until_there_are_enough(features: int, device: str, way: str) -> None:
    capacity = staging.stage_rows(features, 4)
    total = accumulator(features, device)
    batches = [random_rows(capacity // 3 + 7, features, seed=seed, offset=1.0) for seed in range(7)]
    for number, batch in enumerate(batches):
        given = batch.clone().to(device)
        total.add(given)
        given.fill_(float("nan"))  # as an operation in place does right after the hook
        assert total._stage is None or total._stage.fill == (number + 1) * len(batch) % capacity
    assert_exact(drained(total)[0], torch.cat(batches))


@on_devices
def test_batches_of_several_types_and_layouts(device: str, way: str) -> None:
    rows = [
        random_rows(60, 20),
        random_rows(60, 20, seed=1, dtype=torch.bfloat16),
        random_rows(60, 20, seed=2, dtype=torch.float64),
        random_rows(20, 60, seed=3).t(),
        random_rows(60, 20, seed=4, dtype=torch.float16).view(3, 4, 5, 20).permute(2, 0, 1, 3),
        random_rows(20 * 60, 1, seed=5).view(5, 20, 12).movedim(1, -1),
        random_rows(60, 40, seed=6)[:, ::2],
        random_rows(1, 20, seed=7)[0],
    ]
    total = accumulator(20, device)
    for batch in rows:
        total.add(batch.to(device))
    reference = torch.cat([torch.from_numpy(float64_rows(batch)) for batch in rows])
    assert_exact(drained(total)[0], reference)


@on_devices
def test_masks_of_some_batches(device: str, way: str) -> None:
    total = accumulator(20, device)
    kept = []
    for seed in range(6):
        rows = random_rows(90, 20, seed=seed, offset=2.0).view(9, 10, 20)
        keep = torch.rand(9, 10, generator=torch.Generator().manual_seed(seed)) < 0.5 if seed % 3 else None
        total.add(rows.to(device), None if keep is None else keep.to(device))
        kept.append(rows.flatten(0, 1) if keep is None else rows[keep])
    assert_exact(drained(total)[0], torch.cat(kept))


@on_devices
@pytest.mark.parametrize(("observations", "features"), [(70, 20), (70, 300), (20_000, 20), (8000, 300)])
def test_weights(observations: int, features: int, device: str, way: str) -> None:
    total = accumulator(features, device)
    groups = [(random_rows(observations, features, seed=k, offset=k), (1.0, 3.0, 0.25, 3.0)[k]) for k in range(4)]
    for rows, weight in groups:
        total.add(rows.to(device), weight=weight)
    buffer = np.empty(features + features * (features + 1) // 2)
    found = total.drain_into(buffer)
    weights = np.repeat([weight for _, weight in groups], observations)
    rows = np.concatenate([float64_rows(rows) for rows, _ in groups])
    mean = weights @ rows / weights.sum()
    scatter = (rows - mean).T * weights @ (rows - mean)
    assert (found.n, found.weight) == (4 * observations, pytest.approx(7.25 * observations, rel=1e-12))
    result = Moments.from_packed(found.n, buffer[:features], buffer[features:])
    np.testing.assert_allclose(result.mean, mean, atol=1e-6)
    assert np.abs(result.scatter - scatter).max() <= TOLERANCE * np.linalg.eigvalsh(scatter)[-1]


@on_devices
def test_accumulators_take_turns_with_their_stages(device: str) -> None:
    place = torch.device(device, torch.cuda.current_device()) if device == "cuda" else torch.device(device)
    workspace = Workspace(place)
    totals = [DeviceAccumulator(width, workspace) for width in (300, 300, 300, 40)]
    batches: list[list[Tensor]] = [[] for _ in totals]
    for seed in range(40):
        for index, total in enumerate(totals):
            rows = random_rows(900, total.features, seed=100 * index + seed)
            batches[index].append(rows)
            total.add(rows.to(device))
    held = [total._stage.buffer.data_ptr() for total in totals if total._stage is not None]
    assert len(held) == len(set(held))
    for total, rows in zip(totals, batches, strict=True):
        assert_exact(drained(total)[0], torch.cat(rows))


@on_devices
def test_it_holds_no_more_bytes_than_stated(device: str) -> None:
    for features in (1, 40, 300, 3000):
        total = accumulator(features, device)
        total.add(torch.ones(3, features, device=device), torch.ones(3, dtype=torch.bool, device=device))
        assert total._stage is not None
        assert total._stage._keep is not None
        held = [value for value in vars(total).values() if isinstance(value, Tensor)]
        held += [*total._hints, total._stage.buffer, total._stage._keep]
        taken = sum(tensor.numel() * tensor.element_size() for tensor in held)
        assert 0 < taken - 24 <= DeviceAccumulator.nbytes(features)


# --- streams and threads ---------------------------------------------------------------------------------------


@on_a_gpu
@pytest.mark.parametrize("observations", [600, 30_000])
def test_several_streams_and_outputs_that_change_right_away(observations: int, device: str) -> None:
    total = accumulator(64, device)
    streams = [torch.cuda.Stream() for _ in range(3)]
    expected = []
    for seed in range(60):
        with torch.cuda.stream(streams[seed % 3]):
            rows = torch.randn(observations, 64, device=device) + seed
            expected.append(rows.clone())
            total.add(rows)
            rows.zero_()
            del rows  # its memory is used again at once
            torch.full((observations, 64), float("nan"), device=device)
    torch.cuda.synchronize()
    assert_exact(drained(total)[0], torch.cat(expected))


@on_a_gpu
def test_draining_in_a_thread_while_forwards_go_on(device: str) -> None:
    workspace = Workspace(torch.device(device, torch.cuda.current_device()))
    finished: list[Moments] = []
    rows = [random_rows(500, 300, seed=seed).to(device) for seed in range(20)]
    threads = []
    for _ in range(10):
        total = DeviceAccumulator(300, workspace)
        for batch in rows:
            total.add(batch)
        threads.append(threading.Thread(target=lambda total=total: finished.append(drained(total)[0])))
        threads[-1].start()
    for thread in threads:
        thread.join()
    assert len(finished) == 10
    for result in finished:
        assert_exact(result, torch.cat(rows))


@on_a_gpu
def test_the_same_bits_twice(device: str) -> None:
    for features in (64, 300):
        rows = [torch.randn(n, features).to(device) for n in (100, 40_000, 5000)]
        left, right = (reduced(rows, device)[0] for _ in range(2))
        assert np.array_equal(left.scatter, right.scatter)
        assert np.array_equal(left.mean, right.mean)


# --- lower precision -------------------------------------------------------------------------------------------


@on_a_gpu
@pytest.mark.parametrize(("products", "tolerance"), [("tf32", 1e-4), ("bfloat16", 1e-3)])
@pytest.mark.parametrize("features", [100, 400])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_lower_precision_rounds_values_and_nothing_else(
    offset: float, features: int, products: str, tolerance: float, device: str
) -> None:
    rows = random_rows(20_000, features, offset=offset)
    result, _ = reduced(list(rows.split(6000)), device, products=products)
    error = covariance_error(result.covariance(), two_pass_covariance(rows))
    assert TOLERANCE / 100 < error < tolerance
    np.testing.assert_allclose(result.mean, float64_rows(rows).mean(0), rtol=1e-6, atol=1e-5)
