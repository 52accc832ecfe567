"""From moments to a row: values against the rows that the moments are of."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest

from delve_ray import spectrum
from delve_ray.moments import Moments
from delve_ray.schema import ALWAYS, EXTRA_STATS, F64, SCALAR_STATS, LayerRow
from delve_ray.store import publisher
from delve_ray.store.core import CovarianceStore
from delve_ray.store.protocol import Delta, LayerInfo, Source, StoreConfig
from delve_ray.store.publishing import layer_row
from delve_ray.store.window import Collected
from tests.stores import Keeper, until

ROWS = np.random.default_rng(3).normal(size=(60, 8)) * np.array([1e3, 1, 1, 1, 1, 1, 1, 1]) + 2.0


def row_of(rows: F64, **options: Any) -> LayerRow:
    moments = Moments.from_rows(rows)
    threshold = options.get("thresholds", (0.99,))[0]
    config = StoreConfig(run="r", savefile="/nowhere", world_size=1, threshold=threshold, **options)
    layer = LayerInfo("fc", "Linear", moments.features)
    return layer_row(layer, "train", Collected(moments.n, 3, moments.mean, moments.packed(), float(moments.n)), config)


def test_every_threshold_has_its_dimension_from_the_one_spectrum(monkeypatch: pytest.MonkeyPatch) -> None:
    original, shapes = spectrum.eigenvalues, []
    monkeypatch.setattr(spectrum, "eigenvalues", lambda matrix: shapes.append(matrix.shape) or original(matrix))
    rows = np.random.default_rng(0).normal(size=(500, 10)) * 0.7 ** np.arange(10)
    row = row_of(rows, thresholds=(0.95, 0.5, 0.999, 1.0))
    assert shapes == [(10, 10)]
    expected = [spectrum.intrinsic_dimensionality(row.eigenvalues, delta) for delta in (0.95, 0.5, 0.999, 1.0)]
    assert list(row.intrinsic_dimensionalities) == expected
    assert expected == [5, 1, 9, 10]
    assert (row.threshold, tuple(row.thresholds)) == (0.95, (0.95, 0.5, 0.999, 1.0))
    assert row.stats["intrinsic_dimensionality"] == expected[0]
    assert row.stats["saturation"] == 0.5


def test_one_threshold_fills_no_list() -> None:
    row = row_of(ROWS, stats=SCALAR_STATS)
    assert (row.threshold, list(row.thresholds), list(row.intrinsic_dimensionalities)) == (0.99, [], [])
    assert not set(row.stats) & set(EXTRA_STATS)


def test_statistics_of_other_matrices_are_those_of_the_rows() -> None:
    row = row_of(ROWS, stats=EXTRA_STATS)
    assert set(row.stats) == {*ALWAYS, *EXTRA_STATS}
    lam = np.linalg.eigvalsh(np.corrcoef(ROWS.T))[::-1] / 8
    k = 1 + int(np.argmax(np.cumsum(lam) >= 0.99))
    singular = np.linalg.svd(ROWS, compute_uv=False)
    p = singular / singular.sum() + 1e-7
    assert row.stats["intrinsic_dimensionality"] == 1
    assert row.stats["correlation_intrinsic_dimensionality"] == k == 8
    assert row.stats["correlation_saturation"] == 1.0
    assert row.stats["correlation_effective_rank"] == pytest.approx(np.exp(-lam @ np.log(lam)))
    assert row.stats["rankme"] == pytest.approx(np.exp(-p @ np.log(p)))


@pytest.mark.parametrize(
    ("samples", "features", "ratio", "undersampled"),
    [(60, 8, 7.5, False), (8, 8, 1.0, False), (7, 8, 0.875, True), (1, 1, 1.0, False)],
)
def test_samples_per_feature(samples: int, features: int, ratio: float, undersampled: bool) -> None:
    row = row_of(np.random.default_rng(1).normal(size=(samples, features)))
    assert (row.samples_per_feature, row.undersampled) == (ratio, undersampled)


@pytest.mark.parametrize("features", [1, 5])
def test_a_window_of_non_finite_rows_alone_has_a_row(features: int) -> None:
    stats = (*SCALAR_STATS, *EXTRA_STATS)
    row = row_of(np.empty((0, features)), stats=stats, thresholds=(0.9, 0.99))
    assert (row.samples, row.nonfinite_rows, row.samples_per_feature, row.undersampled) == (0, 3, 0.0, True)
    assert list(row.intrinsic_dimensionalities) == [0, 0]
    assert all(row.stats[name] == 0 for name in (*ALWAYS, *EXTRA_STATS))


# --- a window's layers ---------------------------------------------------------------------------------

WIDTHS = (4, 9, 2, 9, 6)


class Decompositions:
    """Counts what is decomposed, by width, in the order in which it begins; fails for one width if asked to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fail: int | None = None) -> None:
        self.widths: list[int] = []
        self.running = self.most = 0
        self._lock, self._fail, self._original = threading.Lock(), fail, spectrum.eigenvalues
        monkeypatch.setattr(spectrum, "eigenvalues", self)

    def __call__(self, matrix: F64) -> F64:
        with self._lock:
            self.widths.append(len(matrix))
            self.running += 1
            self.most = max(self.most, self.running)
        time.sleep(0.01)
        with self._lock:
            self.running -= 1
        if len(matrix) == self._fail:
            raise MemoryError("no room for this one")
        return self._original(matrix)

    def since(self) -> list[int]:
        """What has been decomposed since the last call."""
        found, self.widths = self.widths, []
        return found


class Sending:
    """A store of one worker, and the rows that it has sent of each layer."""

    def __init__(self, **options: Any) -> None:
        self.keeper = Keeper()
        config = StoreConfig("r", "/nowhere", 1, stats=("trace", "cov"), publish_every=0.0, silent_after=0.0)
        self.store = CovarianceStore(config, writers=[self.keeper], **options)
        self.source, self.seq = Source("r", "", 0, "s", "host", 1), 0
        layers = [LayerInfo(f"layer{index}", "Linear", width) for index, width in enumerate(WIDTHS)]
        self.store.register(self.source, config, layers)
        self.rng = np.random.default_rng(0)
        self.sent: dict[int, list[F64]] = {index: [] for index in range(len(WIDTHS))}

    def send(self, *layers: int, closes: bool = False, nonfinite: int = 0) -> None:
        entries, parts = [], [np.empty(0)]
        for index in layers:
            rows = self.rng.normal(size=(0 if nonfinite else 20, WIDTHS[index])) + index
            moments = Moments.from_rows(rows)
            self.sent[index].append(rows)
            entries.append((index, 0, moments.n, nonfinite))
            parts += [moments.mean, moments.packed()]
        buffer = np.concatenate(parts)
        delta = Delta(self.source, 0, self.seq, 0, 0, closes, closes, tuple(entries))
        assert self.store.take(delta.sealed(buffer), buffer).merged
        self.seq += 1

    def rows(self) -> tuple[LayerRow, ...]:
        """What is published now, checked against all rows that were sent."""
        assert self.store.flush(60)
        rows = self.keeper.windows[-1].rows
        for row in rows:
            index = int(row.layer.removeprefix("layer"))
            covariance = np.cov(np.concatenate(self.sent[index]).T, bias=True)
            assert row.covariance is not None
            np.testing.assert_allclose(row.covariance, covariance[np.triu_indices(WIDTHS[index])], atol=1e-12)
            np.testing.assert_allclose(row.eigenvalues, np.linalg.eigvalsh(covariance)[::-1], atol=1e-12)
            assert row.samples == len(np.concatenate(self.sent[index]))
        return tuple(rows)


@pytest.mark.parametrize("cores", [1, 2, 3, 9])
def test_the_widest_are_decomposed_first_and_rows_come_in_the_order_of_the_layers(
    cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sending, seen = Sending(cores=cores), Decompositions(monkeypatch)
    sending.send(0, 1, 2, 3, 4)
    assert [row.layer for row in sending.rows()] == [f"layer{index}" for index in range(5)]
    begun = seen.since()
    assert sorted(begun) == sorted(WIDTHS)
    assert begun[0] == 9
    if cores <= 2:
        assert begun == [9, 9, 6, 4, 2], "one at a time: the other core is for what comes in"
        assert seen.most == 1
    assert seen.most <= max(1, cores - 1)


def test_what_has_room_for_one_runs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publisher, "DECOMPOSING_BYTES", 24 * 9 * 9)
    sending, seen = Sending(cores=9), Decompositions(monkeypatch)
    sending.send(0, 1, 2, 3, 4)
    assert len(sending.rows()) == 5
    assert seen.most == 1


@pytest.mark.parametrize(("wide", "most"), [(100, 1), (9, 3), (4, 4), (1, 4)])
def test_only_wide_layers_are_given_to_others_with_a_thread_each(
    wide: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publisher, "WIDE", wide)
    sending, seen = Sending(cores=2, elsewhere=3), Decompositions(monkeypatch)
    crew, threads = sending.store.running()._crew, []
    original = crew.run
    monkeypatch.setattr(crew, "run", lambda tasks, threads: asked(tasks, threads))

    def asked(tasks: Any, count: int) -> Any:
        threads.append(count)
        return original(tasks, count)

    sending.send(0, 1, 2, 3, 4)
    assert len(sending.rows()) == 5
    assert threads == [most]
    assert seen.most <= most


@pytest.mark.parametrize("cores", [1, 4])
def test_a_layer_that_has_got_nothing_is_not_decomposed_again(cores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sending, seen = Sending(cores=cores), Decompositions(monkeypatch)
    sending.send(0, 1, 2)
    before = sending.rows()
    assert sorted(seen.since()) == [2, 4, 9]
    sending.send(1, 4)
    live = sending.rows()
    assert sorted(seen.since()) == [6, 9]
    assert [row.eigenvalues.tolist() for row in (live[0], live[2])] == [
        row.eigenvalues.tolist() for row in (before[0], before[2])
    ]
    sending.send(closes=True)
    until(lambda: sending.store.progress().published == 1)
    final = sending.rows()
    assert sending.keeper.windows[-1].final
    assert seen.since() == [], "the last live rows are the final ones"
    assert [row.stats for row in final] == [row.stats for row in live]


def test_rows_left_out_are_counted_though_nothing_is_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    sending = Sending()
    sending.send(0)
    assert [(row.samples, row.nonfinite_rows) for row in sending.rows()] == [(20, 0)]
    sending.send(0, nonfinite=7)
    assert [(row.samples, row.nonfinite_rows) for row in sending.rows()] == [(20, 7)]


@pytest.mark.parametrize("cores", [1, 4])
def test_a_layer_that_cannot_be_decomposed_costs_no_other_its_row(cores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sending = Sending(cores=cores)
    seen = Decompositions(monkeypatch, fail=4)
    sending.send(0, 1, 2)
    assert [row.layer for row in sending.rows()] == ["layer1", "layer2"]
    (problem,) = sending.store.progress().problems
    assert problem == "layer layer0, step 0: MemoryError: no room for this one"
    sending.send(2)
    assert [row.layer for row in sending.rows()] == ["layer1", "layer2"]
    assert seen.widths.count(4) == 2, "it is tried again"


def test_a_publication_keeps_no_copy_of_the_covariance() -> None:
    sending = Sending()
    sending.send(1)
    sending.rows()
    (entry,) = sending.store.attempts[-1].windows[0].entries.values()
    assert entry.row is not None
    assert entry.row[1].covariance is None
    assert entry.row[0] is entry.freeze().collect().packed
