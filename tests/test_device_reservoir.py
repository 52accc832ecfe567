"""Which rows a reservoir takes from batches, on the host's random numbers alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from delve_ray.device_reservoir import DeviceReservoir, nbytes
from delve_ray.reservoir import UNBOUNDED, merge
from delve_ray.schema import F64

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICES = ["cpu", pytest.param("cuda", marks=gpu)]


def numbered(first: int, count: int, d: int = 3) -> torch.Tensor:
    """Rows that say which they are."""
    return torch.arange(first, first + count, dtype=torch.float32)[:, None] * torch.ones(d)


def filled(seed: int, sizes: list[int], size: int = 10, weights: list[float] | None = None) -> DeviceReservoir:
    reservoir = DeviceReservoir(size, np.random.default_rng(seed))
    first = 0
    for count, weight in zip(sizes, weights or [1.0] * len(sizes), strict=True):
        reservoir.offer(numbered(first, count), weight=weight)
        first += count
    return reservoir


def shares(draws: list[F64], count: int) -> F64:
    """How often each of `count` rows was kept."""
    found: F64 = np.bincount(np.concatenate(draws).astype(int), minlength=count) / len(draws)
    return found


def kept(reservoir: DeviceReservoir) -> F64:
    drained = reservoir.drain()
    assert drained is not None
    return drained.rows[:, 0]


def test_all_rows_are_kept_while_there_is_room() -> None:
    reservoir = filled(0, [3, 4, 3])
    drained = reservoir.drain()
    assert drained is not None
    assert sorted(drained.rows[:, 0]) == list(range(10))
    assert drained.bound == UNBOUNDED
    assert (np.diff(drained.keys) >= 0).all()
    assert DeviceReservoir(3, np.random.default_rng(0)).drain() is None


@pytest.mark.parametrize("sizes", [[100], [7, 30, 63], [1] * 40, [12, 3, 3, 3, 40], [300, 5, 95]])
def test_every_row_is_as_likely_as_any_other(sizes: list[int]) -> None:
    count, draws = sum(sizes), []
    for seed in range(1500):
        rows = kept(filled(seed, sizes))
        assert len(set(rows)) == 10
        draws.append(rows)
    p = 10 / count
    # Five standard deviations of a share over 1500 draws, for each of at most 400 rows.
    assert shares(draws, count) == pytest.approx(np.full(count, p), abs=5 * np.sqrt(p * (1 - p) / 1500))


def test_rows_of_a_forward_that_stands_for_three_are_three_times_as_likely() -> None:
    draws = [kept(filled(seed, [200, 200], weights=[3.0, 1.0])) for seed in range(1500)]
    first = shares(draws, 400)[:200].sum() / 10
    assert first == pytest.approx(0.75, abs=5 * np.sqrt(0.75 * 0.25 / 15000))


def test_what_does_not_count_takes_no_ones_place_unfairly() -> None:
    """Masked and non-finite rows are known late: what is left is a fair sample of the others, also once merged."""
    draws = []
    for seed in range(1500):
        ranks = []
        for rank in range(2):
            reservoir = DeviceReservoir(10, np.random.default_rng([seed, rank]))
            for first in (0, 30):
                rows = numbered(60 * rank + first, 30)
                keep = torch.arange(30) % 3 != 0 if rank == 0 else None
                rows[1, 2] = float("nan")
                reservoir.offer(rows, keep)
            drained = reservoir.drain()
            assert drained is not None
            ranks.append(drained)
        draws.append(merge(ranks, 10).rows[:, 0])
    found = shares(draws, 120)
    counts = np.array([number % 30 != 1 and (number >= 60 or number % 3 != 0) for number in range(120)])
    assert (found[~counts] == 0).all()
    p = found[counts].mean()
    assert 0.05 < p <= 10 / counts.sum()
    assert found[counts] == pytest.approx(np.full(counts.sum(), p), abs=5 * np.sqrt(p / 1500))


def test_the_same_seed_takes_the_same_rows_and_torch_draws_nothing() -> None:
    before = torch.get_rng_state()
    first, second = filled(7, [50, 200]), filled(7, [50, 200])
    assert kept(first).tolist() == kept(second).tolist()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("device", DEVICES)
def test_feature_maps_are_read_where_they_lie(device: str) -> None:
    images = torch.randn(4, 5, 6, 7, device=device)
    reservoir = DeviceReservoir(500, np.random.default_rng(0))
    reservoir.offer(images.permute(0, 2, 3, 1))
    drained = reservoir.drain()
    assert drained is not None
    expected = images.permute(0, 2, 3, 1).reshape(-1, 5).double().cpu().numpy()
    assert np.array_equal(np.sort(drained.rows, axis=0), np.sort(expected, axis=0))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_rows_of_any_float_dtype(dtype: torch.dtype, device: str) -> None:
    rows = torch.randn(20, 3, dtype=dtype, device=device)
    reservoir = DeviceReservoir(20, np.random.default_rng(0))
    reservoir.offer(rows)
    rows_before = rows.double().cpu().numpy().copy()
    rows.zero_()  # as a training may, right after the forward
    drained = reservoir.drain()
    assert drained is not None
    assert np.array_equal(np.sort(drained.rows, axis=0), np.sort(rows_before, axis=0))


def test_what_is_held_stays_within_the_bound() -> None:
    reservoir = DeviceReservoir(10, np.random.default_rng(0))
    for first in range(0, 3000, 3):
        reservoir.offer(numbered(first, 3))
        assert reservoir.held_bytes <= nbytes(10, 3)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=gpu)])
def test_the_host_never_waits_for_the_device(device: str) -> None:
    rows = torch.randn(5000, 64, device=device)
    reservoir = DeviceReservoir(100, np.random.default_rng(0))
    reservoir.offer(rows)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(20):
            reservoir.offer(rows, torch.ones(5000, dtype=torch.bool, device=device))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(kept(reservoir)) == 100
