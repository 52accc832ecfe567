"""Guarantee 1 from rows to what is published: any split over workers, batches, flushes and orders of arrival."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from delve_ray import spectrum
from delve_ray.store.core import CovarianceStore
from delve_ray.store.protocol import Delta, LayerInfo, Source, StoreConfig, moments_size
from tests.helpers import (
    TOLERANCE,
    accumulator,
    covariance_error,
    random_rows,
    same_dimensionality,
    two_pass_covariance,
)


@dataclass
class Rank:
    """A worker: what it has accumulated since its last delta."""

    store: CovarianceStore
    source: Source
    features: int
    checked: bool
    seq: int = 0
    batches: list[Tensor] = field(default_factory=list)

    def flush(self, *, closes: bool) -> None:
        total = accumulator(self.features, checked=self.checked)
        for batch in self.batches:
            total.add(batch)
        self.batches = []
        buffer = np.empty(moments_size(self.features))
        n, nonfinite, _ = total.drain_into(buffer)
        entries = ((0, 0, n, nonfinite),) if n else ()
        delta = Delta(self.source, 0, self.seq, 0, 0, closes, closes, entries)
        moments = buffer if n else buffer[:0]
        for _ in range(2):  # an acknowledgement may get lost, and then it comes again
            self.store.take(delta.sealed(moments), moments)
        self.seq += 1


def publish(features: int, ranks: int, checked: bool) -> tuple[CovarianceStore, list[Rank]]:
    config = StoreConfig(
        "r", "/nowhere", ranks, save_to=(), stats=("trace",), publish_every=0.0, silent_after=0, late_after=0
    )
    store = CovarianceStore(config, writers=[])
    sources = [Source("r", "", rank, str(rank), "host", rank) for rank in range(ranks)]
    for source in sources:
        store.register(source, config, [LayerInfo("layer", "Linear", features)])
    return store, [Rank(store, source, features, checked) for source in sources]


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
@pytest.mark.parametrize("checked", [True, False])
def test_any_split_over_workers_batches_flushes_and_orders(data: st.DataObject, checked: bool) -> None:
    features = data.draw(st.sampled_from([1, 2, 7, 20, 65, 100]), "features")
    observations = data.draw(st.integers(1, 600), "observations")
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]), "dtype")
    # What half precision can hold at all: beyond, the rounded values are few and far from normal.
    largest = {torch.bfloat16: 1e2, torch.float16: 1e3}.get(dtype, 1e5)
    offset = data.draw(st.floats(0, largest), "offset")
    rows = random_rows(
        observations,
        features,
        seed=data.draw(st.integers(0, 999), "seed"),
        dtype=dtype,
        offset=offset,
        decay=data.draw(st.sampled_from([1.0, 1e-2]), "decay"),
    )
    store, ranks = publish(features, data.draw(st.integers(1, 4), "ranks"), checked)
    cuts = sorted(data.draw(st.lists(st.integers(0, observations), max_size=12), "cuts"))
    batches = torch.tensor_split(rows, cuts)
    for index in data.draw(st.permutations(range(len(batches))), "order"):
        rank = data.draw(st.sampled_from(ranks), "rank")
        rank.batches.append(batches[index])
        if data.draw(st.booleans(), "flush"):
            rank.flush(closes=False)
    for rank in data.draw(st.permutations(ranks), "closing"):
        rank.flush(closes=True)
    assert store.flush(60)
    covariance, reference = store.covariance("layer", "train"), two_pass_covariance(rows)
    assert covariance_error(covariance, reference) <= TOLERANCE
    result, expected = store.spectrum("layer", "train"), spectrum.eigenvalues(reference)
    for threshold in (0.5, 0.9, 0.99):
        assert same_dimensionality(result, expected, threshold)


# --- closed forms --------------------------------------------------------------------------------------------


def published_spectrum(rows: Tensor, ranks: int = 3) -> np.ndarray:
    store, workers = publish(rows.shape[1], ranks, checked=True)
    for worker, part in zip(workers, rows.tensor_split(ranks), strict=True):
        worker.batches = list(part.split(100)) if len(part) else []
        worker.flush(closes=True)
    assert store.flush(60)
    return store.spectrum("layer", "train")


def rotation(features: int) -> np.ndarray:
    """A fixed rotation: the Q of a QR decomposition of fixed normal numbers."""
    return np.linalg.qr(np.random.default_rng(0).normal(size=(features, features)))[0]


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_a_known_spectrum_through_a_fixed_rotation(offset: float) -> None:
    """Rows ±√(d·λi) along the i-th direction, both signs: their covariance has exactly the eigenvalues λ."""
    expected = np.array([8.0, 4.0, 2.0, 1.0, 0.5, 0.25, 0.0, 0.0])
    directions = np.diag(np.sqrt(8 * expected)) @ rotation(8)
    rows = torch.from_numpy(np.concatenate([directions, -directions] * 40) + offset)
    result = published_spectrum(rows)
    np.testing.assert_allclose(result, expected, atol=TOLERANCE * 8)
    assert spectrum.intrinsic_dimensionality(result, 0.99) == 6
    assert spectrum.intrinsic_dimensionality(result, 14 / 15.75) == 3


def test_isotropic_noise_has_equal_eigenvalues_up_to_its_own_edge() -> None:
    features, observations = 32, 20_000
    rows = torch.randn(observations, features, generator=torch.Generator().manual_seed(0))
    result = published_spectrum(rows)
    edge = (features / observations) ** 0.5
    assert (1 - edge) ** 2 - 0.01 < result[-1] <= result[0] < (1 + edge) ** 2 + 0.01
    assert spectrum.intrinsic_dimensionality(result, 0.99) == features
    assert spectrum.intrinsic_dimensionality(result, 0.5) in (15, 16)


def test_rank_one() -> None:
    direction = rotation(20)[0]
    strength = torch.randn(500, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    result = published_spectrum((strength * torch.from_numpy(direction) + 7).float())
    assert result[0] == pytest.approx(float(strength.var(correction=0)), rel=1e-5)
    assert result[1:].max() < TOLERANCE * result[0]
    assert spectrum.intrinsic_dimensionality(result) == 1
    assert spectrum.saturation(result) == 1 / 20


@pytest.mark.parametrize("value", [0.0, 3.3333, -1e5])
@pytest.mark.parametrize("observations", [1, 2, 700])
def test_rows_that_do_not_vary(value: float, observations: int) -> None:
    result = published_spectrum(torch.full((observations, 20), value))
    assert not result.any()
    assert spectrum.intrinsic_dimensionality(result) == 0
    assert spectrum.saturation(result) == 0.0


def test_two_observations_span_one_direction() -> None:
    result = published_spectrum(torch.tensor([[1.0, 2.0, 3.0], [2.0, 4.0, 7.0]]), ranks=2)
    np.testing.assert_allclose(result, [(1 + 4 + 16) / 4, 0, 0], atol=1e-6)
