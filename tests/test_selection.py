"""delve_ray.selection: which name a layer has, and which modules are chosen."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel

from delve_ray.errors import OptionError
from delve_ray.layers import OutputAdapter, RowOptions
from delve_ray.selection import named_layers, select_layers
from tests.helpers import LastStep, assert_refused, cnn, mlp


class NamedLinear(nn.Linear):
    """A subclass, as low-rank layers are."""


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


# --- patterns --------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A block of a transformer, with what has an adapter and what has none."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm = nn.LayerNorm(4)
        self.mlp = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        """The usual."""
        x = x + self.attention(x, x, x)[0]
        return self.dropout(x + self.mlp(self.norm(x)))  # type: ignore[no-any-return]


class Encoder(nn.Module):
    """Twelve blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(12)])
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of each step."""
        for block in self.blocks:
            x = block(x)
        return self.head(x)  # type: ignore[no-any-return]


DEFAULT = ["attention", "mlp.0", "mlp.2"]
LEAVES = ["attention", "norm", "mlp.0", "mlp.1", "mlp.2", "dropout"]


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ("head", ["head"]),
        (["blocks.3.*"], [f"blocks.3.{name}" for name in LEAVES]),
        (["blocks.3.*", "!*.dropout", "!*.norm"], ["blocks.3.attention", *(f"blocks.3.mlp.{i}" for i in range(3))]),
        (["blocks.3.*", "!*.mlp.*", "*.3.mlp.1"], [f"blocks.3.{n}" for n in ("attention", "norm", "mlp.1", "dropout")]),
        (["blocks.3"], ["blocks.3"]),
        (["blocks.?"], [f"blocks.{i}" for i in range(10)]),
        (["blocks.1[01]", "*.1.mlp"], ["blocks.1.mlp", "blocks.10", "blocks.11"]),
        (["head", "blocks.0.mlp"], ["blocks.0.mlp", "head"]),
        (["!blocks.*"], ["head"]),
        (["!head", "!blocks.[1-9]*"], [f"blocks.0.{name}" for name in DEFAULT]),
        (
            ["!head", "!*.typo", "!blocks.[1-9]*", "*.0.norm"],
            [f"blocks.0.{n}" for n in ("attention", "norm", "mlp.0", "mlp.2")],
        ),
    ],
)
def test_patterns_choose_modules_one_after_the_other(patterns: Any, expected: list[str]) -> None:
    assert chosen(Encoder(), layers=patterns) == expected


def test_a_star_means_every_layer_and_no_container() -> None:
    everything = chosen(Encoder(), layers=["*"])
    assert everything == [*(f"blocks.{i}.{name}" for i in range(12) for name in LEAVES), "head"]
    assert chosen(Encoder()) == [*(f"blocks.{i}.{name}" for i in range(12) for name in DEFAULT), "head"]


def test_choices_combine() -> None:
    options: dict[str, Any] = {"layers": ["blocks.0.*", "head"], "ignore_layer_names": "blocks.0.mlp.0"}
    assert chosen(Encoder(), **options) == [*(f"blocks.0.{name}" for name in LEAVES if name != "mlp.0"), "head"]
    options["layer_filter"] = lambda layers: {name: layers[name] for name in layers if "mlp" in name}
    assert chosen(Encoder(), **options) == ["blocks.0.mlp.1", "blocks.0.mlp.2"]
    assert chosen(cnn(), layers=["*"], include_conv=False) == [str(i) for i in (1, 2, 4, 5, 6, 7)]


def test_a_filter_may_add_other_modules_of_the_model() -> None:
    model = Encoder()
    added = {"blocks.0": model.blocks[0], "blocks.0.norm": model.blocks[0].norm}
    assert chosen(model, layer_filter=lambda layers: added) == ["blocks.0", "blocks.0.norm"]
    plain = nn.Sequential(nn.ReLU())
    assert chosen(plain, layer_filter=lambda layers: {"0": plain[0]}) == ["0"]


@pytest.mark.parametrize(
    ("patterns", "words"),
    [
        (["haed"], ["layers has 'haed'", "did you mean 'head'?"]),
        (["blocks.12.*"], ["layers has 'blocks.12.*'", "fits no module", "did you mean"]),
        (["zzz"], ["layers has 'zzz'", "its modules:", "blocks.0.attention", "more"]),
        (["head", "!blocks.0.mpl"], ["layers has '!blocks.0.mpl'", "did you mean"]),
        (["blocks"], ["layers has 'blocks'", "never called"]),
        (["*.out_proj"], ["layers has '*.out_proj'"]),
        ([], ["layers=[]", "patterns"]),
        (["head", 3], ["layers=['head', 3]", "patterns"]),
        (7, ["layers=7", "patterns"]),
        (["head", "!head"], ["layers", "leave no layer"]),
    ],
)
def test_patterns_that_fit_nothing_are_refused_in_words(patterns: Any, words: list[str]) -> None:
    assert_refused(lambda: select_layers(Encoder(), layers=patterns), *words)


# --- what a layer is ---------------------------------------------------------------------------------------


def test_a_tracked_layer_says_what_it_is() -> None:
    model = {"a": nn.Conv2d(3, 6, 1), "b": nn.LSTM(2, 4, bidirectional=True), "c": NamedLinear(2, 9)}
    (conv, lstm_layer, linear) = select_layers(model)
    assert (conv.name, conv.layer_type, conv.features) == ("a", "Conv2d", 6)
    assert (lstm_layer.name, lstm_layer.layer_type, lstm_layer.features) == ("b", "LSTM", 8)
    assert (linear.name, linear.layer_type, linear.features) == ("c", "NamedLinear", 9)


@pytest.mark.filterwarnings("ignore")
def test_what_makes_a_layers_weights_is_no_layer_and_no_type() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Linear(3, 3)  # a layer inside a parametrization gives weights, not outputs

        def forward(self, weight: Tensor) -> Tensor:
            return self.scale(weight)  # type: ignore[no-any-return]

    own = nn.Linear(3, 3)
    torch.nn.utils.parametrize.register_parametrization(own, "weight", Scaled())
    layers = [
        torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 5)),
        torch.nn.utils.parametrizations.spectral_norm(nn.Conv1d(3, 5, 1)),
        torch.nn.utils.weight_norm(nn.Linear(5, 4)),
        torch.nn.utils.spectral_norm(nn.Linear(5, 3)),
        own,
    ]
    selected = select_layers(nn.ModuleList(layers))
    assert [(layer.name, layer.layer_type, layer.features) for layer in selected] == [
        ("0", "Linear", 5),
        ("1", "Conv1d", 5),
        ("2", "Linear", 4),
        ("3", "Linear", 3),
        ("4", "Linear", 3),
    ]
    assert chosen(nn.ModuleList(layers), layers=["*"]) == ["0", "1", "2", "3", "4"]


def test_a_lazy_layer_is_the_one_that_it_becomes() -> None:
    model = nn.Sequential(nn.LazyConv2d(5, 3), nn.LazyBatchNorm2d(), nn.LazyLinear(4))
    before = select_layers(model, layers=["*"])
    assert [(layer.layer_type, layer.features) for layer in before] == [
        ("Conv2d", 5),
        ("BatchNorm2d", None),
        ("Linear", 4),
    ]
    model(torch.randn(2, 3, 8, 6))
    after = select_layers(model, layers=["*"])
    assert [(layer.layer_type, layer.features) for layer in after] == [
        ("Conv2d", 5),
        ("BatchNorm2d", 5),
        ("Linear", 4),
    ]


def test_a_flattened_map_has_as_many_features_as_a_forward_shows() -> None:
    (layer,) = select_layers(nn.Conv2d(3, 4, 1), options=RowOptions(conv_method="flatten"))
    assert layer.features is None


def read_as(model: nn.Module, name: str) -> int:
    """Dimensions of the feature maps that a module of no known kind is taken to make, 0 for features last."""
    (layer,) = select_layers(model, layers=[name])
    assert isinstance(layer.adapter, OutputAdapter)
    return layer.adapter.dimensions


def test_a_module_of_no_known_kind_is_read_like_the_layers_inside_or_before_it() -> None:
    assert read_as(Encoder(), "blocks.0") == 0
    assert read_as(Encoder(), "blocks.0.mlp.1") == 0
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Sequential(nn.Linear(4, 3), nn.ReLU()),
        nn.Sequential(nn.ReLU(), nn.Conv1d(3, 3, 1)),
    )
    kinds = {name: read_as(model, name) for name in ("0", "0.2", "1", "3", "3.1", "4", "4.0")}
    assert kinds == {"0": 2, "0.2": 2, "1": 2, "3": 0, "3.1": 0, "4": 1, "4.0": 0}


# --- what is left out is said --------------------------------------------------------------------------------


def test_leaves_with_weights_that_nobody_knows_are_listed(caplog: pytest.LogCaptureFixture) -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

    caplog.set_level("INFO", "delve_ray")
    model = nn.ModuleList([nn.Linear(3, 3), Scale(), Scale(), nn.LayerNorm(3), nn.PReLU()])
    select_layers(model)
    assert [record.message for record in caplog.records] == [
        "not recorded, as no adapter knows them: Scale (2), PReLU (1); name them in layers=[…] to record them"
    ]
    caplog.clear()
    select_layers(model, layers=["*"])
    assert not caplog.records


@pytest.mark.filterwarnings("ignore")
def test_a_quantized_leaf_without_an_adapter_is_named(caplog: pytest.LogCaptureFixture) -> None:
    class Odd(nn.Module):
        _packed_params = None

    Odd.__module__ = "torch.ao.nn.quantized.modules.odd"
    select_layers(nn.ModuleDict({"odd": Odd(), "fc": torch.ao.nn.quantized.dynamic.Linear(3, 4)}))
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "layer odd is a Odd of torch.ao.nn.quantized.modules.odd, for which there is no adapter" in record.message


# --- models that are unusual -----------------------------------------------------------------------------------


def test_a_layer_as_the_model_itself() -> None:
    for layer in (nn.MultiheadAttention(8, 2), nn.LSTM(2, 2), nn.Linear(2, 2)):
        assert chosen(layer) == [type(layer).__name__]
        assert chosen([layer]) == ["0"]


def test_a_child_named_like_its_models_class() -> None:
    class LSTM(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.LSTM = nn.LSTM(3, 4)

    assert chosen(LSTM()) == ["LSTM"]
    assert chosen(LSTM(), layers=["LSTM*"]) == ["LSTM"]
    assert chosen(LSTM(), layers=["LSTM (root)"]) == ["LSTM (root)"]


def test_a_name_that_begins_with_an_exclamation_mark() -> None:
    model = nn.ModuleDict({"!z": nn.Linear(2, 2), "z": nn.Linear(2, 2)})
    assert chosen(model, layers=["!z"]) == ["!z"]
    assert chosen(model, layers=["*", "!!z"]) == ["z"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_parts_are_left_out_by_name(caplog: pytest.LogCaptureFixture) -> None:
    inside = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model = nn.Sequential(nn.Linear(3, 4), torch.jit.script(inside), torch.jit.trace(inside, torch.randn(2, 4)))
    for layers in (None, ["*"]):
        assert chosen(model, layers=layers) == ["0"]
        assert [record.message for record in caplog.records] == [
            f"{name} is a ScriptModule, which takes no hooks; it is not recorded" for name in ("1", "2")
        ]
        caplog.clear()
    assert_refused(lambda: select_layers(model, layers=["1"]), "layers has '1'", "fits no module")
    assert_refused(lambda: select_layers(torch.jit.script(inside)), "no layer that can be tracked")


@pytest.mark.filterwarnings("ignore")
def test_fused_quantized_convolutions_are_convolutions() -> None:
    fused = torch.ao.nn.intrinsic.quantized.ConvReLU2d(3, 4, 1)
    model = nn.Sequential(fused, nn.Linear(4, 2))
    assert chosen(model) == ["0", "1"]
    assert chosen(model, include_conv=False) == ["1"]
