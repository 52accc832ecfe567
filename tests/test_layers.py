"""delve_ray.layers: which rows a layer's output has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence

from delve_ray.errors import Unrecordable
from delve_ray.layers import (
    ADAPTERS,
    OutputAdapter,
    RowOptions,
    adapter_for,
    first_tensor,
    register_adapter,
)
from delve_ray.rows import last_steps
from tests.helpers import assert_refused

TIMESTEPWISE, LAST = RowOptions(), RowOptions(timeseries_method="last_timestep")


def rows_of(module: nn.Module, output: Any, options: RowOptions = TIMESTEPWISE) -> Tensor:
    """The rows of an output, flattened to (n, D) after a check of what an adapter promises."""
    adapter = adapter_for(module, on_request=True)
    assert adapter is not None
    rows = adapter.rows(module, output, options)
    assert adapter.features(module, options) in (None, rows.shape[-1])
    if adapter.has_steps(rows) and rows.dim() == 3 and options.timeseries_method == "last_timestep":
        rows, _ = last_steps(rows, None)
    return rows.reshape(-1, rows.shape[-1])


# --- Linear and Conv2d ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5,), (7, 5), (3, 4, 5), (2, 3, 4, 5)])
def test_every_leading_dimension_of_a_linear_counts(shape: tuple[int, ...]) -> None:
    layer = nn.Linear(5, 3)
    output = layer(torch.randn(shape))
    rows = rows_of(layer, output)
    assert torch.equal(rows, output.reshape(-1, 3))
    assert rows.data_ptr() == output.data_ptr()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
def test_each_position_of_a_feature_map_is_a_row(memory_format: torch.memory_format, padding_mode: str) -> None:
    layer = nn.Conv2d(3, 6, (3, 2), stride=2, padding=1, padding_mode=padding_mode).to(memory_format=memory_format)
    output_NCHW = layer(torch.randn(4, 3, 9, 8).to(memory_format=memory_format))
    rows = rows_of(layer, output_NCHW)
    expected = [output_NCHW[n, :, h, w] for n in range(4) for h in range(5) for w in range(5)]
    assert torch.equal(rows, torch.stack(expected))


def test_an_unbatched_feature_map() -> None:
    layer = nn.Conv2d(3, 6, 3)
    output_CHW = layer(torch.randn(3, 8, 7))
    expected = [output_CHW[:, h, w] for h in range(6) for w in range(5)]
    assert torch.equal(rows_of(layer, output_CHW), torch.stack(expected))


def test_the_rows_of_a_feature_map_are_a_view() -> None:
    layer = nn.Conv2d(3, 6, 3)
    output = layer(torch.randn(2, 3, 8, 7))
    adapter = adapter_for(layer)
    assert adapter is not None
    rows = adapter.rows(layer, output, TIMESTEPWISE)
    assert rows.shape == (2, 6, 5, 6)
    assert rows.data_ptr() == output.data_ptr()


# --- LSTM ----------------------------------------------------------------------------------------------

LSTMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "stacked": {"num_layers": 3},
    "bidirectional": {"bidirectional": True},
    "projected": {"proj_size": 3},
    "all": {"num_layers": 2, "bidirectional": True, "proj_size": 3, "bias": False},
}
WIDTHS = {"plain": 5, "stacked": 5, "bidirectional": 10, "projected": 3, "all": 6}
kinds = pytest.mark.parametrize("kind", LSTMS)
batch_firsts = pytest.mark.parametrize("batch_first", [True, False])


def lstm(kind: str, **options: Any) -> nn.LSTM:
    torch.manual_seed(0)
    return nn.LSTM(4, 5, **LSTMS[kind], **options)


def sequences(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(length, 4, generator=generator) for length in lengths]


def outputs_one_by_one(layer: nn.LSTM, inputs: list[Tensor]) -> list[Tensor]:
    """The output of each sequence by itself, shape (T, D): no batch, no padding, no order of dimensions."""
    return [layer(sequence)[0] for sequence in inputs]


@kinds
@batch_firsts
def test_the_steps_of_equally_long_sequences(kind: str, batch_first: bool) -> None:
    layer = lstm(kind, batch_first=batch_first)
    inputs = sequences(6, 6, 6)
    output = layer(torch.stack(inputs, dim=0 if batch_first else 1))
    apart = outputs_one_by_one(layer, inputs)
    every, last = rows_of(layer, output), rows_of(layer, output, LAST)
    assert every.shape == (18, WIDTHS[kind])
    torch.testing.assert_close(every, torch.cat(apart))
    torch.testing.assert_close(last, torch.stack([steps[-1] for steps in apart]))


@kinds
@batch_firsts
def test_an_unbatched_sequence(kind: str, batch_first: bool) -> None:
    layer = lstm(kind, batch_first=batch_first)
    (sequence,) = sequences(6)
    output = layer(sequence)
    assert torch.equal(rows_of(layer, output), output[0])
    assert torch.equal(rows_of(layer, output, LAST), output[0][-1:])


@kinds
@batch_firsts
@pytest.mark.parametrize("lengths", [(7, 5, 2, 1), (2, 7, 1, 5), (4,), (3, 6, 3)])
def test_packed_sequences_have_no_padding(lengths: tuple[int, ...], kind: str, batch_first: bool) -> None:
    layer = lstm(kind, batch_first=batch_first)
    inputs = sequences(*lengths)
    packed = pack_sequence(inputs, enforce_sorted=False)
    output = layer(packed)
    assert isinstance(output[0], PackedSequence)
    apart = outputs_one_by_one(layer, inputs)
    every, last = rows_of(layer, output), rows_of(layer, output, LAST)
    assert every.shape == (sum(lengths), WIDTHS[kind])
    # Packed data go step by step, and within a step from the longest sequence to the shortest.
    longest_first = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    order = [(step, index) for step in range(max(lengths)) for index in longest_first if step < lengths[index]]
    by_step = torch.stack([apart[index][step] for step, index in order])
    if len(set(lengths)) == len(lengths):
        torch.testing.assert_close(every, by_step)
    else:  # which of two equally long sequences comes first is not said
        torch.testing.assert_close(every.T @ every, by_step.T @ by_step)
    # One row a sequence, in the caller's order.
    torch.testing.assert_close(last, torch.stack([steps[-1] for steps in apart]))


def test_packed_and_padded_sequences_differ_by_the_padding() -> None:
    layer = lstm("plain", batch_first=True)
    inputs = sequences(5, 3)
    padded = nn.utils.rnn.pad_sequence(inputs, batch_first=True)
    packed = pack_padded_sequence(padded, torch.tensor([5, 3]), batch_first=True)
    assert len(rows_of(layer, layer(padded))) == 10
    assert len(rows_of(layer, layer(packed))) == 8


# --- adapters ------------------------------------------------------------------------------------------


class NamedLinear(nn.Linear):
    """A subclass, as parametrised and low-rank layers are."""


class FurtherLinear(NamedLinear):
    """Further down still."""


@pytest.mark.parametrize("layer", [NamedLinear(2, 3), FurtherLinear(2, 3), nn.LazyLinear(3)])
def test_a_subclass_has_its_base_classs_adapter(layer: nn.Module) -> None:
    assert adapter_for(layer) is adapter_for(nn.Linear(1, 1))


NORMS = [nn.BatchNorm1d(3), nn.BatchNorm2d(3), nn.LayerNorm(3), nn.GroupNorm(1, 3), nn.InstanceNorm2d(3), nn.RMSNorm(3)]


@pytest.mark.parametrize("layer", [nn.ReLU(), nn.Sequential(), nn.MaxPool2d(3), *NORMS])
def test_other_layers_have_none(layer: nn.Module) -> None:
    assert adapter_for(layer) is None


@pytest.mark.parametrize("layer", NORMS)
def test_normalisations_have_one_on_request(layer: nn.Module) -> None:
    adapter = adapter_for(layer, on_request=True)
    assert adapter is not None
    assert adapter.features(layer, TIMESTEPWISE) == 3


# --- convolutions and other feature maps -----------------------------------------------------------------

CONVOLUTIONS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "1d": (nn.Conv1d(3, 5, 3, padding=1), (3, 11)),
    "2d": (nn.Conv2d(3, 5, 3, groups=1), (3, 9, 8)),
    "3d": (nn.Conv3d(3, 5, 2), (3, 5, 6, 4)),
    "transposed 1d": (nn.ConvTranspose1d(3, 5, 3), (3, 7)),
    "transposed 2d": (nn.ConvTranspose2d(3, 5, 2, stride=2), (3, 4, 5)),
    "transposed 3d": (nn.ConvTranspose3d(3, 5, 2), (3, 2, 3, 4)),
    "lazy": (nn.LazyConv2d(5, 3), (3, 6, 7)),
}
convolutions = pytest.mark.parametrize("kind", CONVOLUTIONS)
REDUCTIONS: dict[str, Any] = {
    "mean": lambda positions: positions.astype(np.float64).mean(0),
    "max": lambda positions: positions.max(0),
    "median": lambda positions: np.sort(positions, axis=0)[(len(positions) - 1) // 2],
}


def positions_of(sample: Tensor) -> Any:
    """A sample's feature vectors, one by one: shape (positions, C)."""
    array = sample.detach().numpy()
    return np.stack([array[:, *index] for index in np.ndindex(*array.shape[1:])])


@convolutions
@pytest.mark.parametrize("batched", [True, False])
def test_each_position_of_any_convolution_is_a_row(kind: str, batched: bool) -> None:
    layer, shape = CONVOLUTIONS[kind]
    output = layer(torch.randn(4, *shape) if batched else torch.randn(*shape))
    samples = output if batched else output[None]
    expected = np.concatenate([positions_of(sample) for sample in samples])
    np.testing.assert_array_equal(rows_of(layer, output).detach(), expected)


@convolutions
@pytest.mark.parametrize("method", REDUCTIONS)
@pytest.mark.parametrize("batched", [True, False])
def test_one_row_per_sample_over_all_positions(kind: str, method: str, batched: bool) -> None:
    layer, shape = CONVOLUTIONS[kind]
    output = layer(torch.randn(4, *shape) if batched else torch.randn(*shape))
    expected = np.stack([REDUCTIONS[method](positions_of(sample)) for sample in (output if batched else output[None])])
    rows = rows_of(layer, output, RowOptions(conv_method=method))
    np.testing.assert_allclose(rows.detach(), expected, rtol=0, atol=1e-12)


@convolutions
@pytest.mark.parametrize("batched", [True, False])
def test_a_flattened_map_is_one_row_of_channels_then_positions(kind: str, batched: bool) -> None:
    layer, shape = CONVOLUTIONS[kind]
    output = layer(torch.randn(4, *shape) if batched else torch.randn(*shape))
    rows = rows_of(layer, output, RowOptions(conv_method="flatten"))
    assert torch.equal(rows, output.reshape(4 if batched else 1, -1))


@pytest.mark.parametrize("method", ["mean", "max", "median", "flatten"])
def test_methods_do_not_depend_on_the_memory_format(method: str) -> None:
    layer, options = nn.Conv2d(3, 6, 3), RowOptions(conv_method=method)
    output = layer(torch.randn(4, 3, 9, 8))
    turned = output.contiguous(memory_format=torch.channels_last)
    assert torch.equal(rows_of(layer, turned, options), rows_of(layer, output, options))


def test_the_mean_over_positions_keeps_what_float32_would_lose() -> None:
    layer = nn.Conv2d(1, 2, 1)
    generator = torch.Generator().manual_seed(0)
    output = (torch.randn(64, 2, 32, 32, generator=generator, dtype=torch.float64) + 1e5).float()
    rows = rows_of(layer, output, RowOptions(conv_method="mean"))
    expected = output.double().mean((2, 3))
    spread = expected.std()
    assert (rows - expected).abs().max() < 1e-9 * spread
    assert (output.mean((2, 3)) - expected).abs().max() > 1e-3 * spread  # what the test is about


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", ["mean", "max", "median"])
def test_methods_in_half_precision_are_those_of_the_values(method: str, dtype: torch.dtype) -> None:
    layer = nn.Conv2d(1, 4, 1)
    output = torch.randn(3, 4, 5, 6).to(dtype)
    options = RowOptions(conv_method=method)
    assert torch.equal(rows_of(layer, output, options).double(), rows_of(layer, output.double(), options))


# --- interpolation ---------------------------------------------------------------------------------------


def test_area_interpolation_takes_means_of_patches() -> None:
    layer = nn.Conv2d(1, 3, 1)
    output = torch.randn(2, 3, 8, 12)
    rows = rows_of(layer, output, RowOptions(interpolation_strategy="area", interpolation_downsampling=4))
    patches = output.reshape(2, 3, 4, 2, 4, 3).mean((3, 5))
    torch.testing.assert_close(rows, patches.permute(0, 2, 3, 1).reshape(-1, 3))


@pytest.mark.parametrize("strategy", ["nearest", "nearest-exact", "area", "linear", "bilinear", "trilinear"])
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_every_strategy_resizes_every_kind_of_map(kind: str, strategy: str) -> None:
    layer, shape = CONVOLUTIONS[kind]
    output = layer(torch.randn(2, *shape))
    dimensions = output.dim() - 2
    for method, expected in (("channelwise", 2 * 2**dimensions), ("max", 2)):
        options = RowOptions(method, interpolation_strategy=strategy, interpolation_downsampling=2)
        assert rows_of(layer, output, options).shape == (expected, 5)
    rows = rows_of(layer, torch.full_like(output, 7.0), RowOptions(interpolation_strategy=strategy))
    assert (rows == 7).all()


def test_small_maps_stay_as_they_are() -> None:
    layer = nn.Conv2d(1, 3, 1)
    output = torch.randn(2, 3, 8, 12)
    for size, resized in ((12, False), (13, False), (11, True), (8, True)):
        options = RowOptions(interpolation_strategy="nearest", interpolation_downsampling=size)
        assert len(rows_of(layer, output, options)) == 2 * (size * size if resized else 96)


def test_a_strategy_for_two_dimensions_is_refused_for_others() -> None:
    options = RowOptions(interpolation_strategy="bicubic", interpolation_downsampling=2)
    assert rows_of(nn.Conv2d(1, 3, 1), torch.randn(2, 3, 8, 8), options).shape == (8, 3)
    with pytest.raises(Unrecordable, match=r"'bicubic' resizes maps of 2 dimensions, its output has 1; use 'area'"):
        rows_of(nn.Conv1d(1, 3, 1), torch.randn(2, 3, 8), options)


# --- other kinds -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_gives_its_own_output_batch_first(batch_first: bool) -> None:
    layer = nn.MultiheadAttention(8, 2, batch_first=batch_first)
    x_BTD = torch.randn(3, 5, 8)
    x = x_BTD if batch_first else x_BTD.transpose(0, 1)
    output = layer(x, x, x)
    apart = torch.cat([layer(sequence, sequence, sequence)[0] for sequence in x_BTD])
    torch.testing.assert_close(rows_of(layer, output), apart)
    torch.testing.assert_close(rows_of(layer, output, LAST), apart.view(3, 5, 8)[:, -1])
    torch.testing.assert_close(rows_of(layer, layer(x_BTD[0], x_BTD[0], x_BTD[0])), apart[:5])


def test_other_layers_whose_features_come_last() -> None:
    bilinear = nn.Bilinear(3, 4, 5)
    output = bilinear(torch.randn(6, 2, 3), torch.randn(6, 2, 4))
    assert torch.equal(rows_of(bilinear, output), output.view(12, 5))
    embedding = nn.Embedding(9, 5)
    tokens = torch.randint(0, 9, (4, 7))
    assert torch.equal(rows_of(embedding, embedding(tokens)), embedding.weight[tokens].view(28, 5))
    assert torch.equal(rows_of(embedding, embedding(tokens), LAST), embedding.weight[tokens[:, -1]])
    bag = nn.EmbeddingBag(9, 5)
    assert rows_of(bag, bag(tokens)).shape == (4, 5)


@pytest.mark.parametrize("kind", [nn.RNNCell, nn.GRUCell, nn.LSTMCell])
def test_a_cell_gives_its_hidden_state(kind: Any) -> None:
    layer = kind(4, 5)
    output = layer(torch.randn(6, 4))
    hidden = output[0] if isinstance(output, tuple) else output
    assert torch.equal(rows_of(layer, output), hidden)
    assert torch.equal(rows_of(layer, output, LAST), hidden)
    assert rows_of(layer, layer(torch.randn(4))).shape == (1, 5)


@pytest.mark.parametrize("kind", [nn.GRU, nn.RNN])
@batch_firsts
def test_other_recurrent_layers(kind: Any, batch_first: bool) -> None:
    layer = kind(4, 5, num_layers=2, bidirectional=True, batch_first=batch_first)
    inputs = sequences(6, 6, 6)
    output = layer(torch.stack(inputs, dim=0 if batch_first else 1))
    apart = outputs_one_by_one(layer, inputs)
    torch.testing.assert_close(rows_of(layer, output), torch.cat(apart))
    torch.testing.assert_close(rows_of(layer, output, LAST), torch.stack([steps[-1] for steps in apart]))
    packed = layer(pack_sequence(inputs[:1] + sequences(2), enforce_sorted=False))
    assert rows_of(layer, packed).shape == (8, 10)


@pytest.mark.parametrize(
    ("layer", "shape", "rows"),
    [
        (nn.LayerNorm(5), (3, 4, 5), 12),
        (nn.LayerNorm((4, 5)), (3, 4, 5), 12),
        (nn.RMSNorm(5), (3, 5), 3),
        (nn.BatchNorm1d(5), (3, 5), 3),
        (nn.BatchNorm1d(5), (3, 5, 4), 12),
        (nn.BatchNorm2d(5), (3, 5, 2, 4), 24),
        (nn.BatchNorm3d(5), (3, 5, 2, 4, 2), 48),
        (nn.GroupNorm(5, 5), (3, 5, 7), 21),
        (nn.InstanceNorm2d(5), (3, 5, 2, 4), 24),
        (nn.InstanceNorm2d(5), (5, 2, 4), 8),
    ],
)
def test_normalisations(layer: nn.Module, shape: tuple[int, ...], rows: int) -> None:
    output = layer(torch.randn(shape))
    found = rows_of(layer, output)
    assert found.shape == (rows, 5)
    channel = shape.index(5)
    assert torch.equal(found, output.movedim(channel, -1).reshape(-1, 5))


def test_normalisations_of_maps_follow_the_method() -> None:
    layer = nn.BatchNorm2d(5)
    output = layer(torch.randn(3, 5, 2, 4))
    torch.testing.assert_close(rows_of(layer, output, RowOptions("max")), output.amax((2, 3)))


# --- quantized layers ----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_dynamically_quantized_layers() -> None:
    model = nn.ModuleDict({"fc": nn.Linear(4, 6), "lstm": nn.LSTM(4, 5, bidirectional=True), "cell": nn.GRUCell(4, 3)})
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear, nn.LSTM, nn.GRUCell}, dtype=torch.qint8)
    x = torch.randn(7, 4)
    for name, width in (("fc", 6), ("lstm", 10), ("cell", 3)):
        layer = quantized[name]
        assert type(layer) is not type(model[name])
        assert rows_of(layer, layer(x if name != "lstm" else x[:, None])).shape == (7, width)


# --- any other module ------------------------------------------------------------------------------------------


class Output(NamedTuple):
    """What some libraries return."""

    length: Tensor
    hidden: Tensor


@dataclass
class Result:
    """What others return."""

    loss: Tensor
    hidden: Tensor


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: x,
        lambda x: (x, None),
        lambda x: [torch.arange(3), x],
        lambda x: {"ids": torch.arange(3), "hidden": (x, x + 1)},
        lambda x: Output(torch.arange(3), x),
        lambda x: PackedSequence(x, torch.tensor([3])),
        lambda x: (x.sum(), x),
        lambda x: Result(x.sum(), x),
    ],
)
def test_the_first_floating_point_tensor_of_an_output(wrap: Any) -> None:
    x = torch.randn(3, 4)
    assert first_tensor(wrap(x)) is x


@pytest.mark.parametrize("output", [None, 3, "x", (), {}, torch.arange(3), (torch.arange(3), None), object()])
def test_an_output_without_any_is_named(output: object) -> None:
    with pytest.raises(TypeError, match=rf"a {type(output).__name__} without a floating-point .*register_adapter"):
        first_tensor(output)


def test_the_place_of_a_module_says_where_its_features_are() -> None:
    x_BCHW = torch.randn(2, 3, 4, 5)
    assert torch.equal(OutputAdapter().rows(nn.ReLU(), x_BCHW, TIMESTEPWISE), x_BCHW)
    maps = OutputAdapter(dimensions=2)
    assert torch.equal(maps.rows(nn.ReLU(), x_BCHW, TIMESTEPWISE), x_BCHW.movedim(1, -1))
    assert torch.equal(maps.rows(nn.ReLU(), x_BCHW, RowOptions("max")), x_BCHW.amax((2, 3)))
    assert torch.equal(maps.rows(nn.ReLU(), x_BCHW[0], TIMESTEPWISE), x_BCHW[0])


class Gate(nn.Module):
    """A layer of a user's own, with two outputs, of which the second is the one that matters."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 4

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The norm, and the gate."""
        return x.norm(), x.sigmoid()


class FurtherGate(Gate):
    """A subclass."""


@pytest.fixture
def registration() -> Iterator[None]:
    before = dict(ADAPTERS)
    yield
    ADAPTERS.clear()
    ADAPTERS.update(before)


@pytest.mark.usefixtures("registration")
@pytest.mark.parametrize("features", [None, 4, "width", lambda module: module.width])
def test_a_class_is_registered_in_one_line(features: Any) -> None:
    assert adapter_for(Gate()) is None
    register_adapter(Gate, lambda module, output: output[1], features=features)
    x = torch.randn(2, 3, 4)
    for layer in (Gate(), FurtherGate()):
        adapter = adapter_for(layer)
        assert adapter is not None
        assert adapter.features(layer, TIMESTEPWISE) == (None if features is None else 4)
        assert torch.equal(rows_of(layer, layer(x)), x.sigmoid().view(6, 4))
    register_adapter(FurtherGate)  # the nearest base class counts
    assert rows_of(FurtherGate(), (x, x.sigmoid())) is not None
    assert torch.equal(rows_of(FurtherGate(), (x, x.sigmoid())), x.view(6, 4))


@pytest.mark.usefixtures("registration")
@pytest.mark.parametrize("features", [0, -3, True, 2.5, ["width"]])
def test_a_width_that_is_none_is_refused_at_once(features: Any) -> None:
    assert_refused(lambda: register_adapter(Gate, features=features), f"features={features!r}")
    assert adapter_for(Gate()) is None


@pytest.mark.usefixtures("registration")
@pytest.mark.parametrize("features", ["widht", lambda module: -1, lambda module: "wide"])
def test_a_width_that_the_module_does_not_have_is_refused_by_name(features: Any) -> None:
    register_adapter(Gate, features=features)
    adapter = adapter_for(Gate())
    assert adapter is not None
    assert_refused(lambda: adapter.features(Gate(), TIMESTEPWISE), "features", "adapter for Gate")


@pytest.mark.parametrize("kind", [nn.Linear(2, 2), int, "Linear", None])
def test_only_classes_of_modules_are_registered(kind: Any) -> None:
    assert_refused(lambda: register_adapter(kind), "kind=", "torch.nn.Module")
    assert_refused(lambda: register_adapter(Gate, "output"), "rows='output'", "function")  # type: ignore[arg-type]
    assert adapter_for(Gate()) is None
