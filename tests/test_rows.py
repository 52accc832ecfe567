"""delve_ray.rows: masks, last steps, the first rows, and a choice that is unbiased and seeded."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from delve_ray.rows import Mask, Sampler, first_rows, last_steps

# --- masks -------------------------------------------------------------------------------------------------


def valid(*lengths: int, steps: int) -> Tensor:
    """A mask B×T of sequences of these lengths, padded at their ends."""
    return torch.arange(steps)[None] < torch.tensor(lengths)[:, None]


VALID = valid(3, 1, 0, 4, steps=4)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((4, 4), VALID),
        ((4, 4, 2), VALID[:, :, None].expand(4, 4, 2)),
        ((16,), VALID.flatten()),
        ((4,), torch.tensor([True, True, False, True])),
    ],
)
def test_rows_that_a_mask_fits(shape: tuple[int, ...], expected: Tensor) -> None:
    keep = Mask(VALID).keep(torch.Size(shape))
    assert keep is not None
    assert torch.equal(keep, expected)


@pytest.mark.parametrize("shape", [(), (3,), (5,), (15,), (4, 3), (3, 4), (2, 4, 4)])
def test_rows_that_a_mask_does_not_fit(shape: tuple[int, ...]) -> None:
    assert Mask(VALID).keep(torch.Size(shape)) is None


def test_flattened_steps_of_a_model_that_runs_steps_first() -> None:
    keep = Mask(VALID, batch_first=False).keep(torch.Size([16]), steps_first=True)
    assert keep is not None
    assert torch.equal(keep, VALID.t().flatten())


def test_a_mask_of_samples_holds_for_all_that_they_have() -> None:
    keep = Mask(torch.tensor([True, False])).keep(torch.Size([2, 3, 4]))
    assert keep is not None
    assert keep.tolist() == [[[True] * 4] * 3, [[False] * 4] * 3]


def test_a_mask_is_copied_once_to_another_device() -> None:
    mask = Mask(VALID)
    assert mask.on(torch.device("cpu")) is mask
    elsewhere = mask.on(torch.device("meta"))
    assert elsewhere.valid.device.type == "meta"
    assert mask.on(torch.device("meta")) is elsewhere


# --- last steps ----------------------------------------------------------------------------------------------


def test_the_last_step() -> None:
    rows = torch.randn(3, 5, 2)
    last, keep = last_steps(rows, None)
    assert torch.equal(last, rows[:, 4])
    assert keep is None


def test_the_last_step_that_counts() -> None:
    rows = torch.randn(5, 4, 2)
    keep_BT = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 0, 0]]).bool()
    last, keep = last_steps(rows, keep_BT)
    assert keep is not None
    assert keep.tolist() == [True, True, False, True, True]
    assert torch.equal(last[keep], torch.stack([rows[0, 2], rows[1, 0], rows[3, 3], rows[4, 1]]))


# --- the first rows --------------------------------------------------------------------------------------------


@given(st.data())
@settings(deadline=None)
def test_the_first_rows_in_the_order_of_the_leading_dimensions(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    count = data.draw(st.integers(1, 70))
    rows = torch.randn(*shape, 2)
    if len(shape) > 1 and data.draw(st.booleans()):
        rows = torch.randn(*shape[:-1], 2, shape[-1]).transpose(-1, -2)
    keep = torch.rand(shape) < 0.5
    found, kept = first_rows(rows, keep, count)
    assert torch.equal(found, rows.reshape(-1, 2)[:count])
    assert kept is not None
    assert torch.equal(kept, keep.reshape(-1)[:count])
    assert first_rows(rows, None, count)[1] is None


# --- a random choice -------------------------------------------------------------------------------------------


def choose(fraction: float, rows: Tensor, *, seed: int = 0, feature_map: bool = False, calls: int = 1) -> list[Tensor]:
    sampler = Sampler(fraction, seed)
    return [sampler.choose(rows, None, feature_map=feature_map)[0] for _ in range(calls)]


def numbered(*shape: int) -> Tensor:
    """Rows of one feature: their own number."""
    return torch.arange(float(np.prod(shape))).view(*shape, 1)


@pytest.mark.parametrize(("fraction", "size"), [(0.25, 8), (0.3, 7), (0.03, 10), (0.5, 1), (0.9, 5)])
def test_every_row_is_chosen_equally_often(fraction: float, size: int) -> None:
    calls = 20_000
    chosen = choose(fraction, numbered(size), calls=calls)
    for rows in chosen:
        assert len(rows) - int(fraction * size) in (0, 1)
        assert len(rows.unique()) == len(rows), "a row is chosen once"
    often = torch.cat(chosen).flatten().long().bincount(minlength=size) / calls
    deviation = (fraction * (1 - fraction) / calls) ** 0.5
    assert (often - fraction).abs().max() < 5 * deviation


def test_pairs_of_rows_are_chosen_equally_often() -> None:
    """So that products are unbiased, too: no two rows belong together."""
    calls, size = 20_000, 6
    together = torch.zeros(size, size)
    for rows in choose(0.5, numbered(size), calls=calls):
        index = rows.flatten().long()
        together[index[:, None], index[None]] += 1
    pairs = together[~torch.eye(size, dtype=torch.bool)] / calls
    expected = 3 * 2 / (size * (size - 1))
    assert (pairs - expected).abs().max() < 5 * (expected * (1 - expected) / calls) ** 0.5


def test_of_feature_maps_positions_are_chosen_for_the_whole_batch() -> None:
    rows = numbered(3, 4, 5)  # 3 samples of 20 positions
    (chosen,) = choose(0.25, rows, feature_map=True)
    assert chosen.shape == (3, 5, 1)
    positions = chosen[0].flatten()
    assert torch.equal(chosen[..., 0], positions + torch.tensor([[0.0], [20.0], [40.0]]))
    assert len(choose(0.25, numbered(8), feature_map=True)[0]) == 2, "an unbatched row is one of many"


def test_a_choice_of_a_view_is_that_of_its_values() -> None:
    x_BCHW = torch.randn(3, 2, 4, 5)
    rows = x_BCHW.movedim(1, -1)
    assert torch.equal(choose(0.3, rows, feature_map=True)[0], choose(0.3, rows.contiguous(), feature_map=True)[0])
    steps = torch.randn(5, 3, 2).transpose(0, 1)
    assert torch.equal(choose(0.3, steps)[0], choose(0.3, steps.contiguous())[0])


@pytest.mark.parametrize("feature_map", [True, False])
def test_the_mask_is_chosen_with_the_rows(feature_map: bool) -> None:
    rows = numbered(3, 4, 5)
    keep = rows[..., 0] % 3 == 0
    chosen, kept = Sampler(0.4, 3).choose(rows, keep, feature_map=feature_map)
    assert kept is not None
    assert torch.equal(kept, chosen[..., 0] % 3 == 0)


def test_a_seed_is_a_choice_and_the_global_generators_are_left_alone() -> None:
    rows = numbered(1000)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again = choose(0.1, rows, calls=5), choose(0.1, rows, calls=5)
    other = choose(0.1, rows, seed=1, calls=5)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(map(torch.equal, first, again))
    assert not any(map(torch.equal, first, other))
    assert not torch.equal(first[0], first[1])


def test_a_choice_of_nothing() -> None:
    for shape, feature_map in (((0,), False), ((0, 4, 5), True), ((3, 0, 5), True)):
        chosen, _ = Sampler(0.5, 0).choose(torch.zeros(*shape, 2), None, feature_map=feature_map)
        assert chosen.shape[-1] == 2
        assert chosen.numel() == 0


def test_the_expected_moments_are_those_of_all_rows() -> None:
    generator = np.random.default_rng(0)
    rows = torch.tensor(generator.normal(size=(60, 2)) @ np.array([[2.0, 1.0], [0.0, 0.3]]))
    sums: Any = 0
    calls = 4000
    for chosen in choose(0.2, rows, calls=calls):
        sums = sums + chosen.T @ chosen
    expected = rows.T @ rows
    torch.testing.assert_close(sums / (0.2 * calls), expected, rtol=0.02, atol=0.02 * float(expected.max()))
