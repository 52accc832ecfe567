"""max_samples, sample_fraction and layers whose width their first forward tells, through the recorder."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from delve_ray.layers import ADAPTERS, RowOptions, register_adapter
from delve_ray.masks import check_mask
from delve_ray.memory import worker_bytes
from tests.helpers import assert_exact, build, harvested, inputs, recording

# --- max_samples -----------------------------------------------------------------------------------------


def test_the_first_rows_of_each_layer_phase_and_window_count() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    batches = [torch.randn(size, 4) for size in (30, 50, 40)]
    outputs = torch.cat([model[0](batch).detach() for batch in batches])
    with recording(model, max_samples=100) as recorder:
        for _ in range(2):
            for batch in batches:
                model(batch)
            model.eval()
            model(batches[0])
            model.train()
            recorded = harvested(recorder)
            assert {key: moments.n for key, moments in recorded.items()} == {
                ("0", "train"): 100,
                ("1", "train"): 100,
                ("0", "eval"): 30,
                ("1", "eval"): 30,
            }
            assert_exact(recorded["0", "train"], outputs[:100])


def test_a_flush_does_not_start_the_counting_anew() -> None:
    model = nn.Linear(4, 3)
    with recording(model, max_samples=50) as recorder:
        parts = []
        for _ in range(3):
            model(torch.randn(20, 4))
            parts.append([moments.n for moments in harvested(recorder, end_of_window=False).values()])
        model(torch.randn(20, 4))
        assert parts == [[20], [20], [10]]
        assert recorder.harvest(end_of_window=True) == {}
        model(torch.randn(60, 4))
        assert [moments.n for moments in harvested(recorder).values()] == [50]


def test_rows_of_images_count_one_by_one_and_in_their_order() -> None:
    model = nn.Conv2d(1, 3, 1)
    x = torch.randn(5, 1, 4, 4)
    with recording(model, max_samples=37) as recorder:
        model(x)
        (moments,) = harvested(recorder).values()
    assert_exact(moments, model(x).permute(0, 2, 3, 1).reshape(-1, 3)[:37])


def test_rows_that_do_not_count_are_among_the_first() -> None:
    model = nn.Linear(3, 3)
    x = torch.randn(4, 5, 3)
    x[0, 1] = float("nan")
    keep = torch.ones(4, 5, dtype=torch.bool)
    keep[1] = False
    with recording(model, max_samples=12) as recorder:
        with recorder.masks.use(check_mask(keep)):
            model(x)
        (moments,) = harvested(recorder).values()
    assert moments.n == 12 - 5 - 1


# --- sample_fraction ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "cnn", "lstm"])
def test_a_fraction_estimates_the_whole(name: str) -> None:
    model = build(name).eval()
    with recording(model) as everything, recording(model, sample_fraction=0.25, seed=1) as fraction:
        for seed in range(150):
            model(inputs(name, 16, seed))
        whole, part = harvested(everything), harvested(fraction)
    for key, moments in whole.items():
        assert abs(part[key].n / moments.n - 0.25) < 0.02
        scale = np.trace(moments.covariance())
        assert np.abs(part[key].covariance() - moments.covariance()).max() < 0.1 * scale
        assert np.abs(part[key].mean - moments.mean).max() < 0.1 * scale**0.5


def test_two_recorders_of_one_seed_choose_alike_and_the_training_is_unchanged() -> None:
    def run(seed: int | None) -> tuple[Tensor, Tensor, Any]:
        model = build("cnn")
        torch.manual_seed(3)
        if seed is None:
            return model(inputs("cnn", 16)), torch.get_rng_state(), {}
        with recording(model, sample_fraction=0.3, seed=seed) as recorder:
            return model(inputs("cnn", 16)), torch.get_rng_state(), harvested(recorder)

    plain, first, again, other = (run(seed) for seed in (None, 1, 1, 2))
    for result in (first, again, other):
        assert torch.equal(result[0], plain[0])
        assert torch.equal(result[1], plain[1])
    key = ("0", "train")
    assert np.array_equal(first[2][key].scatter, again[2][key].scatter)
    assert not np.array_equal(first[2][key].scatter, other[2][key].scatter)


def test_a_choice_counts_towards_the_first_rows() -> None:
    model = nn.Linear(4, 3)
    with recording(model, sample_fraction=0.5, max_samples=30) as recorder:
        for _ in range(4):
            model(torch.randn(20, 4))
        (moments,) = harvested(recorder).values()
    assert moments.n == 30


# --- widths that a forward tells -----------------------------------------------------------------------------


def test_a_layers_width_is_that_of_its_first_forward() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.LazyBatchNorm2d())
    x = torch.randn(9, 3, 6, 5)
    with recording(model, rows=RowOptions("flatten"), layers=["*"]) as recorder:
        assert [recorder.width(index) for index in range(3)] == [None, None, None]
        model(x)
        recorded = harvested(recorder)
        assert [recorder.width(index) for index in range(3)] == [48, 48, 48]
    assert_exact(recorded["0", "train"], model[0](x).flatten(1))
    assert_exact(recorded["1", "train"], model[1](model[0](x)).flatten(1))


def test_a_layer_that_turns_out_too_wide_is_left_out_by_name(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(48, 2))
    with recording(model, rows=RowOptions("flatten"), max_features=47) as recorder:
        for _ in range(3):
            model(torch.randn(9, 3, 6, 5))
        assert {name: moments.n for (name, _), moments in harvested(recorder).items()} == {"2": 27}
    assert [record.message for record in caplog.records] == [
        "layer 0 is not recorded: it has 48 features and is left out; raise max_features=47 to record it "
        f"({worker_bytes([48]) / 2**30:.1f} GiB), or give a sketch_size"
    ]


def test_layers_that_turn_out_to_take_too_much_memory_are_left_out_by_name(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1))
    enough = worker_bytes([120])
    with recording(model, rows=RowOptions("flatten"), max_memory=enough) as recorder:
        model(torch.randn(9, 3, 6, 5))
        assert {name for name, _ in harvested(recorder)} == {"0"}
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert f"max_memory={enough}; leave out other layers" in record.message
    assert record.message.startswith("layer 1 is not recorded: with its 120 features")


def test_images_of_another_size_are_left_out_with_a_word(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Conv2d(3, 4, 1)
    with recording(model, rows=RowOptions("flatten")) as recorder:
        model(torch.randn(9, 3, 6, 5))
        model(torch.randn(9, 3, 6, 6))
        model(torch.randn(8, 3, 5, 6))
        assert [moments.n for moments in harvested(recorder).values()] == [17]
    (record,) = caplog.records
    assert "a forward is left out; its output cannot be reduced to rows of 120 features" in record.message


# --- outputs without rows --------------------------------------------------------------------------------------


def test_a_module_without_rows_is_given_up_with_one_word(caplog: pytest.LogCaptureFixture) -> None:
    class Tokenizer(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.long()

    model = nn.Sequential(nn.Linear(4, 3), Tokenizer())
    with recording(model, layers=["*"]) as recorder:
        for _ in range(3):
            model(torch.randn(5, 4))
        assert {name: moments.n for (name, _), moments in harvested(recorder).items()} == {"0": 15}
    assert [record.message for record in caplog.records] == [
        "layer 1: a forward is left out; its output cannot be reduced to rows of features (TypeError: a Tensor without "
        "a floating-point tensor; leave the layer out, or say with delve_ray.register_adapter what its rows are)"
    ]


def test_rows_that_are_no_tensor_are_named(caplog: pytest.LogCaptureFixture) -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    register_adapter(Odd, lambda module, output: output.numpy())
    try:
        with recording(Odd()) as recorder:
            recorder.layers[0].module(torch.randn(5, 4))
            assert recorder.harvest(end_of_window=True) == {}
    finally:
        del ADAPTERS[Odd]
    assert "the adapter's rows are a ndarray, not a tensor" in caplog.text


@pytest.mark.parametrize("options", [{"max_samples": 3}, {"sample_fraction": 0.5}, {}])
@pytest.mark.parametrize("method", ["timestepwise", "last_timestep"])
@pytest.mark.parametrize("shape", [(0, 4), (4,), (2, 0, 4), (0, 5, 4), (2, 5, 4)])
def test_outputs_of_unusual_shapes(shape: tuple[int, ...], method: str, options: Any) -> None:
    model = nn.Linear(4, 3)
    with recording(model, rows=RowOptions(timeseries_method=method), **options) as recorder:
        for _ in range(4):
            model(torch.randn(shape))
        found = {moments.n for moments in harvested(recorder).values()}
    rows = int(np.prod(shape[:-1])) // (5 if shape == (2, 5, 4) and method == "last_timestep" else 1)
    if options.get("sample_fraction"):
        assert all(n <= 4 * rows for n in found)
    else:
        assert found == ({min(3, 4 * rows) if options else 4 * rows} if rows else set())


def test_a_reader_of_maps_by_their_place_takes_no_positions_for_steps() -> None:
    model = nn.Sequential(nn.Conv1d(2, 3, 1), nn.ReLU())
    with recording(model, layers=["*"], rows=RowOptions(timeseries_method="last_timestep")) as recorder:
        model(torch.randn(2, 2, 10))
        assert {moments.n for moments in harvested(recorder).values()} == {20}


def test_quantized_outputs_are_their_values() -> None:
    model = nn.Identity()
    x = torch.randn(40, 3)
    quantized = torch.quantize_per_tensor(x, 0.1, 3, torch.quint8)
    with recording(model, layers=["Identity"]) as recorder:
        model(quantized)
        (moments,) = harvested(recorder).values()
    assert_exact(moments, quantized.dequantize())
