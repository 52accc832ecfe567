"""Real models: every row of every layer is recorded, and their training is not changed."""

from __future__ import annotations

import functools
import logging
import random
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from delve_ray import SaturationTracker, read_covariances, read_spectra
from tests.helpers import F64, TOLERANCE, covariance_error, dimensionality, harvested, recording, two_pass_covariance
from tests.models.capture import Capture, Rows, layers_of, width_of
from tests.models.cases import BELL_COTE, CASES, DAISY, Case, photographs

SLOW = {"efficientnet"}


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """A model that is supported is recorded without a word."""
    yield
    records = caplog.get_records("call")
    found = [record for record in records if record.levelno >= logging.WARNING and record.name.startswith("delve_ray")]
    assert [record.getMessage() for record in found] == []


# --- training ------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """All that a training leaves behind."""

    losses: list[Tensor] = field(default_factory=list)
    gradients: list[dict[str, Tensor | None]] = field(default_factory=list)
    state: dict[str, Tensor] = field(default_factory=dict)
    randomness: tuple[Tensor, object, list[object]] | None = None


@functools.cache
def prepared(name: str) -> Case:
    """A case whose data and packages are loaded: some of these draw random numbers when they are imported."""
    case = CASES[name]
    case.build()
    case.training()
    return case


def build(name: str) -> nn.Module:
    """The model of a case, with the random numbers that follow always the same."""
    case = prepared(name)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    return case.build()


def train(
    name: str,
    model: nn.Module,
    *,
    observe: Callable[[Callable[[], Tensor]], Tensor] = lambda forward: forward(),
    end_of_window: Callable[[int], object] = lambda step: None,
) -> Outcome:
    """Train and evaluate a model that `build` has just made; each forward runs through `observe`."""
    case, outcome = prepared(name), Outcome()
    optimizer = torch.optim.AdamW([part for part in model.parameters() if part.requires_grad], lr=3e-3)
    for step in range(case.windows):
        case.train_mode(model)
        for batch in case.training():
            loss = observe(functools.partial(case.loss, model, batch))
            optimizer.zero_grad()
            loss.backward()
            outcome.losses.append(loss.detach())
            outcome.gradients.append(
                {key: None if part.grad is None else part.grad.clone() for key, part in model.named_parameters()}
            )
            optimizer.step()
        model.eval()
        with torch.set_grad_enabled(case.gradients_in_evaluation):
            for batch in case.held_out():
                outcome.losses.append(observe(functools.partial(case.loss, model, batch)).detach())
            if case.generate is not None:
                outcome.losses.append(observe(functools.partial(case.generate, model)))
        end_of_window(step)
    outcome.state = {key: value.clone() for key, value in model.state_dict().items()}
    outcome.randomness = torch.get_rng_state(), random.getstate(), list(np.random.get_state())
    return outcome


def same(left: object, right: object) -> bool:
    """Whether two outcomes, or parts of them, are equal to the bit."""
    if isinstance(left, Outcome) and isinstance(right, Outcome):
        return same(vars(left), vars(right))
    if isinstance(left, dict) and isinstance(right, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple) and isinstance(right, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, np.ndarray) and isinstance(right, np.ndarray):
        return np.array_equal(left, right)
    return left == right


@dataclass
class Reference:
    """A training of a case without a tracker: its outcome, and the rows of each of its windows."""

    name: str
    outcome: Outcome = field(repr=False)
    windows: list[Rows] = field(repr=False)


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in CASES]
)
def reference(request: pytest.FixtureRequest) -> Reference:
    """The reference of each case; one at a time is held."""
    name: str = request.param
    model, windows = build(name), []
    capture = Capture(model)
    outcome = train(name, model, observe=capture.observe, end_of_window=lambda step: windows.append(capture.window()))
    capture.close()
    assert (capture.elsewhere > 0) == CASES[name].recomputes
    assert same(train(name, build(name)), outcome), "nor does watching change it"
    return Reference(name, outcome, windows)


def spectrum_of(covariance: F64) -> F64:
    """Eigenvalues from the largest to the smallest, those that rounding made negative as 0."""
    return np.linalg.eigvalsh(covariance)[::-1].clip(0)


# --- what is recorded ----------------------------------------------------------------------------------


def test_every_row_of_every_layer_is_recorded(reference: Reference) -> None:
    name, recorded = reference.name, []
    model = build(name)
    layers = layers_of(model)
    with recording(model) as recorder:
        assert {layer.name: layer.features for layer in recorder.layers} == {
            layer: width_of(module) for layer, module in layers.items()
        }
        tracked = train(name, model, end_of_window=lambda step: recorded.append(harvested(recorder)))
    assert same(tracked, reference.outcome), "so both have seen the same rows"
    for moments, rows in zip(recorded, reference.windows, strict=True):
        assert moments.keys() == rows.keys()
        assert {layer for layer, _ in rows} == layers.keys() - set(CASES[name].idle)
        for key, part in moments.items():
            assert part.n == len(rows[key])
            assert part.features == rows[key].shape[1]
            covariance = two_pass_covariance(rows[key])
            assert covariance_error(part.covariance(), covariance) <= TOLERANCE, key
            spread = TOLERANCE * covariance.diagonal().max() ** 0.5
            np.testing.assert_allclose(part.mean, rows[key].mean(0), rtol=1e-14, atol=spread, err_msg=str(key))


# --- what is published, and what the tracker costs a training ------------------------------------------


def columns(table: Any, *keys: str) -> dict[tuple[Any, ...], dict[str, Any]]:
    """The rows of a table by these columns, which no two rows share."""
    rows = {tuple(row[key] for key in keys): row for row in table.to_pylist()}
    assert len(rows) == table.num_rows
    return rows


def attached(model: nn.Module) -> dict[str, tuple[list[str], list[object]]]:
    """The attributes of each module and its hooks of every kind; transformers has some of its own."""
    return {
        path: (sorted(vars(module)), [dict(value) for value in vars(module).values() if isinstance(value, OrderedDict)])
        for path, module in model.named_modules()
    }


def test_what_is_published_is_what_was_seen_and_the_training_is_the_same(reference: Reference, savefile: str) -> None:
    name, model = reference.name, build(reference.name)
    before = attached(model)
    with SaturationTracker(savefile, "parquet", model, stats=["lsat", "idim", "cov"], publish_every=0) as tracker:
        assert tracker.layers == tuple(layers_of(model))
        tracked = train(name, model, end_of_window=tracker.add_saturations)
    assert same(tracked, reference.outcome), "losses, gradients, state and random numbers, to the bit"
    assert attached(model) == before

    spectra = columns(read_spectra(savefile), "step", "layer", "phase")
    covariances = columns(read_covariances(savefile), "step", "layer", "phase")
    seen = {(step, *key): rows for step, window in enumerate(reference.windows) for key, rows in window.items()}
    assert spectra.keys() == covariances.keys() == seen.keys()
    for key, rows in seen.items():
        row, features = spectra[key], rows.shape[1]
        upper = np.zeros((features, features))
        upper[np.triu_indices(features)] = covariances[key]["covariance"]
        covariance = two_pass_covariance(rows)
        eigenvalues = spectrum_of(covariance)
        largest = eigenvalues[0]
        assert (row["samples"], row["features"], row["nonfinite_rows"]) == (*rows.shape, 0)
        assert row["layer_type"] == type(model.get_submodule(key[1])).__name__
        assert row["final"]
        assert np.abs(upper - np.triu(covariance)).max() <= TOLERANCE * largest, key
        np.testing.assert_allclose(
            covariances[key]["mean"], rows.mean(0), rtol=1e-14, atol=TOLERANCE * largest**0.5, err_msg=str(key)
        )
        assert np.abs(row["eigenvalues"] - eigenvalues).max() <= TOLERANCE * largest * features**0.5, key
        # The slack is for a share of variance that meets 0.99 up to rounding.
        k, slack = row["intrinsic_dimensionality"], 1e-5
        assert dimensionality(eigenvalues, 0.99 - slack) <= k <= dimensionality(eigenvalues, 0.99 + slack), key
        assert row["saturation"] == k / features


def test_the_pretrained_network_knows_what_the_photographs_show() -> None:
    model = build("efficientnet").eval()
    with torch.no_grad():
        classes = model(photographs(224)).argmax(-1)
    assert classes.tolist() == [BELL_COTE, DAISY] * 2
