"""delve_ray.layers: which rows a layer's output has, which name a layer has, and which layers are chosen."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence
from torch.optim.swa_utils import AveragedModel

from delve_ray.errors import OptionError
from delve_ray.layers import RowOptions, adapter_for, check_uncompiled, named_layers, select_layers
from tests.helpers import LastStep, assert_refused, cnn, mlp

TIMESTEPWISE, LAST = RowOptions(), RowOptions(timeseries_method="last_timestep")


def rows_of(module: nn.Module, output: Any, options: RowOptions = TIMESTEPWISE) -> Tensor:
    """The rows of an output, flattened to (n, D) after a check of what an adapter promises."""
    adapter = adapter_for(module)
    assert adapter is not None
    rows = adapter.rows(module, output, options)
    assert rows.shape[-1] == adapter.features(module)
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
    expected = torch.cat(apart) if batch_first else torch.stack(apart, dim=1).reshape(18, -1)
    torch.testing.assert_close(every, expected)
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


@pytest.mark.parametrize(
    "layer", [nn.ReLU(), nn.Sequential(), nn.Embedding(3, 4), nn.BatchNorm2d(3), nn.Conv1d(1, 1, 1)]
)
def test_other_layers_have_none(layer: nn.Module) -> None:
    assert adapter_for(layer) is None


def test_a_tracked_layer_says_what_it_is() -> None:
    (conv, lstm_layer, linear) = select_layers(
        nn.ModuleDict({"a": nn.Conv2d(3, 6, 1), "b": nn.LSTM(2, 4, bidirectional=True), "c": NamedLinear(2, 9)})
    )
    assert (conv.name, conv.layer_type, conv.features) == ("a", "Conv2d", 6)
    assert (lstm_layer.name, lstm_layer.layer_type, lstm_layer.features) == ("b", "LSTM", 8)
    assert (linear.name, linear.layer_type, linear.features) == ("c", "NamedLinear", 9)


# --- names ---------------------------------------------------------------------------------------------


class Net(nn.Module):
    """A model with nesting, a container and a layer that has no adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(2)])
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Not called."""
        return x


NAMES = ["stem", "blocks.0.0", "blocks.1.0", "head"]


def test_names_are_those_of_named_modules() -> None:
    model = Net()
    found = named_layers(model)
    assert list(found) == NAMES
    everything = dict(model.named_modules())
    assert all(everything[name] is module for name, module in found.items())


def compiled_parts(model: Net) -> nn.Module:
    model.head = torch.compile(model.head, backend="eager")  # type: ignore[assignment]
    model.blocks[1] = torch.compile(model.blocks[1], backend="eager")  # type: ignore[assignment]
    return model


def checkpointed_parts(model: Net) -> nn.Module:
    model.blocks[0] = checkpoint_wrapper(model.blocks[0])
    model.stem = checkpoint_wrapper(model.stem)  # type: ignore[assignment]
    return model


class OwnDataParallel(nn.DataParallel[nn.Module]):
    """As users write to reach the model's own attributes."""


WRAPPERS: dict[str, Callable[[Net], nn.Module]] = {
    "DataParallel": nn.DataParallel,
    "a subclass": OwnDataParallel,
    "AveragedModel": AveragedModel,
    "torch.compile": lambda model: torch.compile(model, backend="eager"),  # type: ignore[return-value]
    "compiled parts": compiled_parts,
    "checkpointed parts": checkpointed_parts,
    "several": lambda model: torch.compile(nn.DataParallel(compiled_parts(checkpointed_parts(model)))),  # type: ignore
    "compiled inside": lambda model: nn.DataParallel(torch.compile(model, backend="eager")),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrappers_do_not_show_in_the_names(wrapper: str) -> None:
    model = Net()
    inside = list(named_layers(model).values())
    found = named_layers(WRAPPERS[wrapper](model))
    assert list(found) == NAMES
    if wrapper == "AveragedModel":  # wraps a copy
        inside = [module for module in inside if module not in found.values()]
        assert len(inside) == len(NAMES)
    else:
        assert all(module is original for module, original in zip(found.values(), inside, strict=True))


@pytest.fixture
def process_group() -> Iterator[None]:
    """A group of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_distributed_data_parallel_does_not_show_in_the_names() -> None:
    assert list(named_layers(nn.parallel.DistributedDataParallel(Net()))) == NAMES


def test_a_user_s_own_module_of_that_name_does_show() -> None:
    model = nn.Module()
    model.module = nn.Sequential(nn.Linear(2, 2))
    assert list(named_layers(model)) == ["module.0"]
    assert list(named_layers(nn.DataParallel(model))) == ["module.0"]


def test_a_bare_layer_is_named_by_its_class() -> None:
    assert list(named_layers(nn.Linear(2, 2))) == ["Linear"]
    assert list(named_layers(NamedLinear(2, 2))) == ["NamedLinear"]
    assert list(named_layers(torch.compile(nn.Linear(2, 2), backend="eager"))) == ["Linear"]


def test_sequences_and_mappings_put_the_index_or_the_key_first() -> None:
    generator, discriminator = mlp(), nn.Linear(3, 1)
    expected = ["0", "3", "5"]
    assert list(named_layers([generator, discriminator])) == [*(f"0.{name}" for name in expected), "1"]
    assert list(named_layers((discriminator, generator))) == ["0", *(f"1.{name}" for name in expected)]
    found = named_layers(OrderedDict(g=nn.DataParallel(generator), d=discriminator))
    assert list(found) == [*(f"g.{name}" for name in expected), "d"]
    assert found["d"] is discriminator


def test_a_shared_module_is_one_layer_under_its_first_name() -> None:
    shared = nn.Linear(3, 3)
    model = nn.Sequential(nn.Linear(3, 3), shared, nn.ReLU(), nn.Sequential(shared, nn.Linear(3, 3)), shared)
    assert list(named_layers(model)) == ["0", "1", "3.1"]
    assert list(named_layers([model, model, shared])) == ["0.0", "0.1", "0.3.1"]
    assert list(named_layers({"a": shared, "b": model})) == ["a", "b.0", "b.3.1"]


# --- choosing ------------------------------------------------------------------------------------------


def chosen(modules: Any, **options: Any) -> list[str]:
    return [layer.name for layer in select_layers(modules, **options)]


def test_without_options_every_layer_is_chosen_in_network_order() -> None:
    assert chosen(Net()) == NAMES
    assert chosen(cnn()) == ["0", "3", "7"]
    assert chosen(LastStep()) == ["lstm", "head"]


def test_layers_can_be_left_out() -> None:
    assert chosen(Net(), include_conv=False) == NAMES[1:]
    assert chosen(Net(), ignore_layer_names=["head", "blocks.0.0"]) == ["stem", "blocks.1.0"]
    assert chosen(Net(), ignore_layer_names="head") == NAMES[:-1]
    assert chosen(Net(), ignore_layer_names={"head"}) == NAMES[:-1]
    assert chosen(Net(), ignore_layer_names=()) == NAMES


def test_a_filter_gets_every_layer_and_its_order_does_not_matter() -> None:
    model = Net()
    seen: dict[str, nn.Module] = {}

    def reversed_without_head(layers: dict[str, nn.Module]) -> dict[str, nn.Module]:
        seen.update(layers)
        del layers["head"]  # ours are not changed by it
        return dict(reversed(layers.items()))

    assert chosen(model, layer_filter=reversed_without_head) == NAMES[:-1]
    assert seen == named_layers(model)
    everything = chosen(model, layer_filter=reversed_without_head, ignore_layer_names=["stem"], include_conv=False)
    assert everything == ["blocks.0.0", "blocks.1.0"]


@pytest.mark.parametrize(
    ("modules", "words"),
    [
        (None, ["modules=None", "NoneType", "torch.nn.Module"]),
        (3, ["modules=3", "int", "torch.nn.Module, a list or a dict"]),
        (iter([nn.Linear(1, 1)]), ["modules=", "iterator", "a list or a dict"]),
        ([nn.Linear(1, 1), "head"], ["modules", "'1'", "str", "torch.nn.Module"]),
        ({"a": nn.Linear(1, 1), "b": None}, ["modules", "'b'", "NoneType"]),
        (nn.ReLU(), ["modules", "no layer", "Linear", "Conv2d", "LSTM"]),
        ([], ["modules", "no layer", "Linear", "Conv2d", "LSTM"]),
        ({}, ["modules", "no layer"]),
    ],
)
def test_what_is_no_model_is_refused_in_words(modules: Any, words: list[str]) -> None:
    assert_refused(lambda: select_layers(modules), *words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ignore_layer_names": ["hed", "stem"]}, ["ignore_layer_names", "['hed']", *NAMES]),
        ({"ignore_layer_names": "blocks"}, ["ignore_layer_names", "['blocks']", *NAMES]),
        ({"ignore_layer_names": 5}, ["ignore_layer_names=5", *NAMES]),
        ({"ignore_layer_names": [3]}, ["ignore_layer_names=[3]", *NAMES]),
        ({"ignore_layer_names": None}, ["ignore_layer_names=None", *NAMES]),
        ({"ignore_layer_names": NAMES}, ["ignore_layer_names", "no layer", *NAMES]),
        ({"layer_filter": lambda layers: {}}, ["layer_filter", "no layer", *NAMES]),
        ({"layer_filter": "conv"}, ["layer_filter='conv'", "function", "{name: module}"]),
        ({"layer_filter": lambda layers: None}, ["layer_filter", "NoneType", "{name: module}"]),
        ({"layer_filter": list}, ["layer_filter", "list", "{name: module}"]),
        ({"layer_filter": lambda layers: {"tail": layers["head"]}}, ["layer_filter", "['tail']", *NAMES]),
        ({"layer_filter": lambda layers: {"head": nn.Linear(1, 1)}}, ["layer_filter", "['head']", *NAMES]),
    ],
)
def test_a_choice_that_cannot_be_made_is_refused_in_words(options: dict[str, Any], words: list[str]) -> None:
    assert_refused(lambda: select_layers(Net(), **options), *words)


def test_only_convolutions_and_none_wanted() -> None:
    with pytest.raises(OptionError, match=r"include_conv leave no layer to track out of: 0"):
        select_layers(nn.Sequential(nn.Conv2d(1, 1, 1)), include_conv=False)


# --- models that were compiled already -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("compiled", "where"),
    [
        (lambda model: torch.compile(model, backend="eager"), "OptimizedModule"),
        (lambda model: [nn.Linear(1, 1), torch.compile(model, backend="eager")], "OptimizedModule"),
        (lambda model: {"a": nn.Sequential(nn.DataParallel(compiled_parts(model)))}, "blocks.1"),
        (lambda model: compiled_in_place(model, "blocks.0"), "blocks.0"),
    ],
)
def test_a_compiled_module_is_refused_with_its_place_and_the_remedy(compiled: Callable[[Net], Any], where: str) -> None:
    modules = compiled(Net())
    assert_refused(
        lambda: check_uncompiled(modules), where, "tracker first, then torch.compile", error=NotImplementedError
    )


def compiled_in_place(model: Net, path: str) -> nn.Module:
    model.get_submodule(path).compile(backend="eager")
    return model


def test_other_models_are_passed_on() -> None:
    for modules in (Net(), [Net(), nn.Linear(1, 1)], {"a": nn.DataParallel(Net())}):
        assert check_uncompiled(modules) is modules
    assert_refused(lambda: check_uncompiled(None), "modules=None", "model")
    assert_refused(lambda: check_uncompiled(3), "modules=3", "int", "torch.nn.Module")  # type: ignore[arg-type]
