"""delve_ray.budget: within the share, without a bias, and the same for the same seed; on a clock of its own."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from delve_ray import SaturationTracker, read_covariances, read_spectra
from delve_ray.budget import Budget, Key
from delve_ray.moments import unpack_triangle
from tests.helpers import covariance_error, float64_rows, recording


class Training:
    """Steps of a model with some layers on a clock that only the steps and the hooks advance."""

    def __init__(self, share: float, seed: int = 0, layers: int = 4, cost: float = 1e-3, step: float = 10e-3) -> None:
        self.now = 0.0
        self.cost, self.step_s = cost, step
        self.skip = 2e-6
        self.layers = layers
        self.spent = 0.0
        self.budget = Budget(share, seed, clock=lambda: self.now)
        self.weights: dict[Key, list[int]] = {(layer, 0): [] for layer in range(layers)}

    def step(self, cost: float | None = None) -> None:
        for key, weights in self.weights.items():
            weight = self.budget.weight(key)
            seconds = (self.cost if cost is None else cost) if weight else self.skip
            self.now += seconds
            self.spent += seconds
            self.budget.spent(key, seconds, recorded=weight > 0)
            weights.append(weight)
            self.now += self.step_s / self.layers


@pytest.mark.parametrize("share", [0.005, 0.02, 0.1])
@pytest.mark.parametrize("cost", [1e-5, 1e-4, 1e-3, 1e-2])
def test_the_share_holds_and_is_used(share: float, cost: float) -> None:
    training = Training(share, cost=cost)
    for _ in range(300):
        training.step()
    spent, before = training.spent, training.now - training.spent
    for _ in range(6000):
        training.step()
    found = (training.spent - spent) / (training.now - training.spent - before)
    everything = training.layers * cost / training.step_s
    if everything <= share:
        assert set(training.budget.strides().values()) == {1}
    else:
        assert found <= 1.1 * share
        assert found >= 0.5 * share


def test_costs_that_change_are_followed() -> None:
    training = Training(0.02)
    for cost in (1e-3, 1e-2, 1e-4):
        for _ in range(1500):
            training.step(cost)
        before, spent = training.now - training.spent, training.spent
        for _ in range(2000):
            training.step(cost)
        assert 0.3 * 0.02 < (training.spent - spent) / (training.now - training.spent - before) < 1.15 * 0.02


def test_a_cost_that_comes_in_bursts_counts_in_the_mean() -> None:
    # Small batches are held back: most forwards cost a copy, now and then one costs a product.
    training = Training(0.02)
    for number in range(8000):
        training.step(5e-5 + 4e-3 * (number % 16 == 15))
    assert training.spent / (training.now - training.spent) < 1.15 * 0.02


def test_a_pause_is_not_a_step() -> None:
    training = Training(0.02)
    for number in range(3000):
        training.step()
        if number % 50 == 0:
            training.now += 60.0
    pauses = 60.0 * 60
    assert training.spent / (training.now - training.spent - pauses) < 1.2 * 0.02


@pytest.mark.parametrize("length", [3, 7, 40])
def test_every_window_has_each_layer_and_weights_have_its_length_as_expectation(length: int) -> None:
    sums: list[int] = []
    for seed in range(60):
        training = Training(0.002, seed=seed)
        for window in range(8):
            before = {key: len(weights) for key, weights in training.weights.items()}
            for _ in range(length):
                training.step()
            training.budget.end_window()
            if window >= 2:
                for key, weights in training.weights.items():
                    sums.append(sum(weights[before[key] :]))
    assert min(sums) > 0
    error = np.std(sums) / np.sqrt(len(sums))
    assert abs(np.mean(sums) - length) < 5 * error + 1e-12


def test_each_forward_has_the_same_chance() -> None:
    # The sum of w·z over what was chosen is on average that over everything, also while the stride changes.
    values = np.random.default_rng(0).normal(5.0, 2.0, 200)
    totals = []
    for seed in range(800):
        training = Training(0.05, seed=seed, layers=1)
        for number in range(200):
            training.step(1e-3 * (1 + number // 50))
        totals.append(np.dot(training.weights[0, 0], values))
    error = np.std(totals) / np.sqrt(len(totals))
    assert abs(np.mean(totals) - values.sum()) < 4 * error
    assert error < 0.02 * values.sum()


def test_layers_draw_apart_and_a_seed_gives_the_same_again() -> None:
    first, again, other = Training(0.02, seed=1), Training(0.02, seed=1), Training(0.02, seed=2)
    state = random.getstate()
    for _ in range(500):
        for training in (first, again, other):
            training.step()
    assert random.getstate() == state
    assert first.weights == again.weights
    assert first.weights != other.weights
    assert first.weights[0, 0] != first.weights[1, 0]
    together = Counter(sum(weight > 0 for weight in weights) for weights in zip(*first.weights.values(), strict=True))
    assert together[4] < 0.2 * sum(together.values()), "the layers are not recorded in the same steps"


def test_phases_have_budgets_of_their_own() -> None:
    budget = Budget(0.02, 0)
    assert budget.weight((0, 0)) == budget.weight((0, 1)) == 1
    assert set(budget.strides()) == {(0, 0), (0, 1)}


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The weights that budgets gave, 0 of what was not chosen."""
    weights: list[int] = []
    weight = Budget.weight

    def noting(self: Budget, key: Key) -> int:
        weights.append(weight(self, key))
        return weights[-1]

    monkeypatch.setattr(Budget, "weight", noting)
    return weights


@pytest.mark.parametrize("width", [20, 300])
def test_a_sampled_recording_is_the_weighted_covariance_of_what_was_chosen(width: int, chosen: list[int]) -> None:
    layer = nn.Linear(6, width)
    outputs = []
    with recording(layer, max_overhead=1e-4) as recorder:
        for seed in range(300):
            outputs.append(float64_rows(layer(torch.randn(8, 6) + 0.01 * seed)))
        (accumulator,) = recorder.harvest(end_of_window=True).values()
    buffer = np.empty(width + width * (width + 1) // 2)
    n, _, total = accumulator.drain_into(buffer)
    assert n == 8 * sum(w > 0 for w in chosen) < 8 * 300
    rows = np.concatenate([o for o, w in zip(outputs, chosen, strict=True) if w])
    weights = np.repeat([float(w) for w in chosen if w], 8)
    assert total == weights.sum()
    mean = weights @ rows / total
    reference = ((rows - mean) * weights[:, None]).T @ (rows - mean) / total
    scatter = np.zeros((width, width))
    scatter[np.triu_indices(width)] = buffer[width:] / total
    assert covariance_error(np.triu(scatter, 1).T + scatter, reference) < 1e-6


def test_the_files_have_the_weighted_covariance_and_the_number_of_rows_behind_it(
    tmp_path: Path, chosen: list[int]
) -> None:
    layer = nn.Linear(6, 5)
    outputs: list[np.ndarray] = []
    ends = [0]
    stats = ["lsat", "cov", "trace"]
    with SaturationTracker(tmp_path / "run", "parquet", layer, stats=stats, max_overhead=1e-4) as tracker:
        for window in range(2):
            for _ in range(150):
                outputs.append(float64_rows(layer(torch.randn(8, 6) + window)))
            tracker.add_saturations()
            ends.append(len(outputs))
    rows = read_spectra(tmp_path / "run").sort_by("step").to_pylist()
    covariances = read_covariances(tmp_path / "run").sort_by("step").to_pylist()
    for window in range(2):
        taken = range(ends[window], ends[window + 1])
        x = np.concatenate([outputs[i] for i in taken if chosen[i]])
        w = np.repeat([float(chosen[i]) for i in taken if chosen[i]], 8)
        assert rows[window]["samples"] == len(x) < 8 * len(taken)
        mean = w @ x / w.sum()
        reference = ((x - mean) * w[:, None]).T @ (x - mean) / w.sum()
        assert covariance_error(unpack_triangle(covariances[window]["covariance"], 5), reference) < 1e-6
        assert rows[window]["trace"] == pytest.approx(np.trace(reference), rel=1e-6)
