from __future__ import annotations

import copy
import io
import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute as pc
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from delve_ray import OptionError, ReadError, SaturationTracker, read_covariances, read_spectra, register_adapter
from delve_ray.layers import ADAPTERS, RowOptions
from delve_ray.moments import unpack_triangle
from delve_ray.pca import Conv2dPCALayer, LinearPCALayer, Projection, project, sweep_thresholds
from delve_ray.pca_layers import random_rotation
from delve_ray.selection import select_layers
from delve_ray.storage import Storage
from tests.helpers import F64, assert_refused, build, dimensionality, float64_rows, inputs

EPOCHS = 12
THRESHOLDS = (0.99, 0.5, 0.9, 0.999, 1.0)


def tracked(model: nn.Module, path: Path, forwards: Callable[[], Any], *, windows: int = 1, **options: Any) -> Path:
    """A run of so many windows of one forward each."""
    with SaturationTracker(path, "parquet", model, **{"stats": ["lsat", "cov"], **options}) as tracker:
        for step in range(windows):
            with torch.no_grad():
                forwards()
            tracker.add_saturations(step=step)
    return path


def eigenspace(run: Path, layer: str, phase: str = "train", step: int = 0) -> tuple[F64, F64, F64]:
    """Mean, descending eigenvalues and eigenvectors of a published covariance."""
    where = (pc.field("layer") == layer) & (pc.field("phase") == phase) & (pc.field("step") == step)
    (row,) = read_covariances(run, filters=where).to_pylist()
    eigenvalues, vectors = np.linalg.eigh(unpack_triangle(row["covariance"], row["features"]))
    return np.array(row["mean"]), np.maximum(eigenvalues[::-1], 0.0), vectors[:, ::-1]


def projected_rows(rows: Tensor, run: Path, layer: str, threshold: float) -> F64:
    """Rows projected in float64 onto the published eigenspace."""
    mean, eigenvalues, vectors = eigenspace(run, layer)
    kept = vectors[:, : dimensionality(eigenvalues, threshold)]
    return np.asarray(mean + (float64_rows(rows) - mean) @ kept @ kept.T)


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


@dataclass(frozen=True)
class Trained:
    model: nn.Module
    run: Path
    images: Tensor
    labels: Tensor

    def accuracy(self) -> float:
        with torch.no_grad():
            return (self.model(self.images).argmax(1) == self.labels).float().mean().item()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A small CNN on the digits, after some epochs, with its run; accuracies are those of images it has not seen."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(digits.target)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    run = tmp_path_factory.mktemp("digits") / "run"
    stats = ["lsat", "idim", "cov"]
    with SaturationTracker(run, "parquet", model, stats=stats, sat_threshold=THRESHOLDS) as tracker:
        for epoch in range(EPOCHS):
            model.train()
            for batch in torch.randperm(1300).split(64):
                optimizer.zero_grad()
                F.cross_entropy(model(images[batch]), labels[batch]).backward()
                optimizer.step()
            model.eval()
            with torch.no_grad():
                model(images[1300:])
            if epoch >= EPOCHS - 2:
                tracker.add_saturations(step=epoch)
    return Trained(model, run, images[1300:], labels[1300:])


# --- on a trained network --------------------------------------------------------------------------------


def test_k_is_the_published_one(trained):
    published = read_spectra(trained.run).to_pylist()
    assert len(published) == 2 * 2 * 4
    for phase in ("train", "eval"):
        for step in (EPOCHS - 2, EPOCHS - 1):
            rows = {row["layer"]: row for row in published if (row["phase"], row["step"]) == (phase, step)}
            with project(trained.model, trained.run, phase=phase, step=step) as projection:
                assert list(projection.layers) == list(rows) == ["0", "3", "6", "8"]
                for index, threshold in enumerate(THRESHOLDS):
                    projection.threshold = threshold
                    for name, layer in projection.layers.items():
                        expected = rows[name]["intrinsic_dimensionalities"][index]
                        assert (name, threshold, layer.intrinsic_dimensionality) == (name, threshold, expected)


def test_the_leading_directions_are_what_the_network_needs(trained):
    before = trained.accuracy()
    assert before > 0.85
    with project(trained.model, trained.run, 0.99) as projection:
        kept = {name: layer.intrinsic_dimensionality for name, layer in projection.layers.items()}
        assert kept["6"] < 64 / 2  # the hidden layer loses most of its directions
        assert trained.accuracy() >= before - 0.05
        random = []
        for seed in range(3):
            projection.randomize(seed)
            assert {name: layer.intrinsic_dimensionality for name, layer in projection.layers.items()} == kept
            random.append(trained.accuracy())
        assert max(random) < before - 0.4
        projection.randomize(None)
        assert trained.accuracy() >= before - 0.05
        projection.threshold = 0.05  # one direction a layer
        assert trained.accuracy() < before - 0.4
    assert trained.accuracy() == before


def test_accuracy_against_the_threshold(trained):
    before = trained.accuracy()
    with project(trained.model, trained.run, {"0": 0.7, "6": 0.8}) as projection:
        swept = sweep_thresholds(projection, trained.accuracy, [0.3, 0.9, 1])
        assert projection.threshold == {"0": 0.7, "3": 0.99, "6": 0.8, "8": 0.99}
        assert swept.column_names == ["threshold", "random", "intrinsic_dimensionality", "saturation", "value"]
        rows = swept.to_pylist()
        assert [(row["threshold"], row["random"]) for row in rows] == [(0.3, False), (0.9, False), (1.0, False)]
        for row in rows:
            projection.threshold = row["threshold"]
            kept = [layer.intrinsic_dimensionality for layer in projection.layers.values()]
            assert row["intrinsic_dimensionality"] == sum(kept)
            assert row["saturation"] == pytest.approx(np.mean(np.divide(kept, [16, 32, 64, 10])))
            assert row["value"] == trained.accuracy()
        assert rows[0]["value"] < rows[1]["value"] <= rows[2]["value"] + 0.02
        assert rows[2]["value"] == pytest.approx(before, abs=0.01)

        projection.randomize(1)
        assert sweep_thresholds(projection, trained.accuracy, [0.9]).column("random").to_pylist() == [True]
        projection.threshold = 0.9
        calls = []
        with pytest.raises(OptionError, match="threshold=90"):
            sweep_thresholds(projection, lambda: calls.append(1) or 0.0, [0.9, 90])
        with pytest.raises(ZeroDivisionError):
            sweep_thresholds(projection, lambda: 1 / 0, [0.5])
        assert set(projection.threshold.values()) == {0.9}
        assert calls == []


# --- in and out --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "cnn", "lstm"])
def test_in_and_out_leave_the_model_as_it_was(name, tmp_path):
    model = build(name)
    run = tracked(model, tmp_path / "run", lambda: model(inputs(name, 64)))
    model.eval()
    x = inputs(name, 16, seed=9)
    before, state, modules = model(x), copy.deepcopy(model.state_dict()), dict(model.named_modules())

    projection = project(model, run, 0.6)
    assert not torch.allclose(model(x), before)
    assert list(model.state_dict()) == list(state)
    assert dict(model.named_modules()) == modules
    assert hooks(model) == len(projection.layers) == len(select_layers(model))
    projection.remove()
    projection.remove()
    assert torch.equal(model(x), before)
    assert hooks(model) == 0
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())

    with pytest.raises(ZeroDivisionError), project(model, run, 0.6):
        raise ZeroDivisionError
    assert torch.equal(model(x), before)
    project(model, run, 0.6).remove()


def test_thresholds_change_in_place_for_all_layers_or_some(tmp_path):
    model = build("mlp")
    run = tracked(model, tmp_path / "run", lambda: model(inputs("mlp", 64)))
    with project(model, run, layers=["3", "5"]) as projection:
        assert projection.threshold == {"3": 0.99, "5": 0.99}
        projection.threshold = 0.8
        assert projection.threshold == {"3": 0.8, "5": 0.8}
        projection.threshold = {"5": 0.7}
        projection.layers["3"].threshold = 0.6
        assert projection.threshold == {"3": 0.6, "5": 0.7}
        for bad, words in [
            (1.5, ("threshold=1.5", "(0, 1]")),
            ({"3": 0.5, "5": 0}, ("threshold=0",)),
            ({"0": 0.5}, ("'0'", "no projection", "'3', '5'")),
        ]:
            assert_refused(lambda bad=bad: setattr(projection, "threshold", bad), *words)
            assert projection.threshold == {"3": 0.6, "5": 0.7}
        with pytest.raises(TypeError):
            projection.layers["3"] = projection.layers["5"]


def test_random_directions_differ_between_layers_and_seeds(tmp_path):
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8))
    run = tracked(model, tmp_path / "run", lambda: model(torch.randn(50, 6)))
    with project(model, run, 0.9, random=True, seed=4) as projection:
        first, second = (
            layer.eigenvectors.new_tensor(random_rotation(8, layer.seed)) for layer in layers_of(projection)
        )
        assert not torch.allclose(first, second)
        kept = projection.layers["0"].directions
        assert torch.equal(kept, first[:, : kept.shape[1]])
        projection.randomize(5)
        assert not torch.allclose(projection.layers["0"].directions, kept)
        projection.randomize(4)
        assert torch.equal(projection.layers["0"].directions, kept)


def layers_of(projection: Projection) -> list[LinearPCALayer]:
    return list(projection.layers.values())


def test_a_model_can_be_saved_moved_and_copied_with_its_projections(tmp_path):
    model = build("cnn")
    run = tracked(model, tmp_path / "run", lambda: model(inputs("cnn", 64)))
    model.eval()
    x = inputs("cnn", 8)
    plain = model(x)
    projection = project(model, run, 0.7)
    projected = model(x)
    model.projection = projection
    assert torch.equal(model(x), projected)  # in a Sequential, too

    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), projected)
        other.projection.threshold = 0.99
        assert not torch.allclose(other(x), projected)
        other.projection.remove()
        assert torch.equal(other(x), plain)
        assert torch.equal(model(x), projected)

    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert {"projection.inserted./0.eigenvectors", "projection.inserted./3.mean"} <= set(state)
    projection.threshold = 0.99
    projection.randomize(1)
    model.load_state_dict(state)
    assert set(projection.threshold.values()) == {0.7}
    assert torch.equal(model(x), projected)
    projection.remove()
    del model.projection
    assert torch.equal(model(x), plain)

    projection = project(model, run, 0.99)
    projection.load_state_dict({k.removeprefix("projection."): v for k, v in state.items() if "projection" in k})
    assert torch.equal(model(x), projected)
    assert torch.equal(copy.deepcopy(model)(x), projected)  # a copy has projections of its own
    projection.remove()


def test_it_follows_the_model_to_another_device(tmp_path):
    model = build("mlp")
    run = tracked(model, tmp_path / "run", lambda: model(inputs("mlp", 64)))
    with project(model, run, 0.7) as projection:
        model.to("meta")
        assert model(inputs("mlp", 4).to("meta")).shape == (4, 3)
        assert {layer.mean.device.type for layer in projection.layers.values()} == {"meta"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_it_is_the_same(tmp_path):
    model = build("cnn")
    run = tracked(model, tmp_path / "run", lambda: model(inputs("cnn", 64)))
    model.eval()
    x = inputs("cnn", 16)
    with project(model, run, 0.7):
        expected = model(x)
        model.cuda()
        torch.testing.assert_close(model(x.cuda()).cpu(), expected, rtol=0, atol=1e-5)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            torch.testing.assert_close(model(x.cuda()).cpu().float(), expected, rtol=0, atol=2e-2)


@pytest.mark.slow
def test_compiled_models_notice(tmp_path):
    model = build("mlp").eval()
    run = tracked(model, tmp_path / "run", lambda: model.train()(inputs("mlp", 64)))
    model.eval()
    x = inputs("mlp", 8)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    plain = compiled(x)
    projection = project(compiled, run, 0.6)
    projected = compiled(x)
    assert not torch.allclose(projected, plain)
    torch.testing.assert_close(projected, model(x))
    projection.threshold = 0.9
    torch.testing.assert_close(compiled(x), model(x))
    projection.remove()
    assert torch.equal(compiled(x), plain)


def test_it_trains_through(tmp_path):
    model = build("mlp").eval()
    run = tracked(model.train(), tmp_path / "run", lambda: model(inputs("mlp", 64)))
    model.eval()
    with project(model, run, 0.5, layers="5") as projection:
        model(inputs("mlp", 8)).square().sum().backward()
        directions = projection.layers["5"].directions.float()
        gradient = model[5].bias.grad
        torch.testing.assert_close(directions @ (directions.T @ gradient), gradient)  # nothing leaves the space
        assert all(parameter.grad is not None for parameter in model.parameters())


# --- what is projected of each kind of layer ---------------------------------------------------------------


class Pair(NamedTuple):
    loss: Tensor
    hidden: Tensor


@dataclass
class Output:
    """As transformers' outputs are."""

    ids: Tensor
    hidden: Tensor | None = None
    states: Any = ()


class Wrapped(nn.Module):
    """Returns what a function makes of a Linear's output."""

    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.linear, self.make = nn.Linear(3, 5), make

    def forward(self, x: Tensor) -> Any:
        return self.make(self.linear(x))


def packed() -> PackedSequence:
    return pack_padded_sequence(torch.randn(6, 7, 4), [3, 7, 2, 7, 1, 5], batch_first=True, enforce_sorted=False)


def steps_of(rows: Tensor) -> PackedSequence:
    """The rows as the steps of the sequences of `packed`."""
    return packed()._replace(data=rows)


def attention(**options: Any) -> tuple[nn.Module, Callable[[nn.Module], Any]]:
    x = torch.randn(6, 7, 8)
    return nn.MultiheadAttention(8, 2, **options), lambda layer: layer(x, x, x)


def nested() -> Tensor:
    return torch.nested.nested_tensor([torch.randn(n, 3) for n in (4, 2, 5)], layout=torch.jagged)


def on_input(layer: nn.Module, x: Any) -> tuple[nn.Module, Callable[[nn.Module], Any]]:
    return layer, lambda made: made(x)


def on(layer: nn.Module, *shape: int) -> tuple[nn.Module, Callable[[nn.Module], Any]]:
    return on_input(layer, torch.randn(shape))


KINDS: dict[str, Callable[[], tuple[nn.Module, Callable[[nn.Module], Any]]]] = {
    "linear": lambda: on(nn.Linear(3, 5), 40, 3),
    "tokens": lambda: on(nn.Linear(3, 5), 8, 6, 3),
    "nested": lambda: on_input(nn.Linear(3, 2), nested()),
    "conv1d": lambda: on(nn.Conv1d(3, 6, 2), 5, 3, 9),
    "conv2d": lambda: on(nn.Conv2d(3, 6, 2), 5, 3, 6, 7),
    "conv2d unbatched": lambda: on(nn.Conv2d(3, 6, 2), 3, 6, 7),
    "conv3d": lambda: on(nn.Conv3d(2, 5, 2), 3, 2, 4, 5, 3),
    "transposed": lambda: on(nn.ConvTranspose2d(3, 6, 2), 5, 3, 4, 4),
    "batch norm of maps": lambda: on(nn.BatchNorm2d(6), 5, 6, 4, 4),
    "batch norm of rows": lambda: on(nn.BatchNorm1d(6), 50, 6),
    "group norm": lambda: on(nn.GroupNorm(2, 6), 5, 6, 4, 4),
    "layer norm": lambda: on(nn.LayerNorm(6), 5, 4, 6),
    "embedding": lambda: (nn.Embedding(20, 6), lambda made: made(torch.arange(20).view(4, 5))),
    "attention": lambda: attention(batch_first=True),
    "attention, steps first": lambda: attention(),
    "lstm": lambda: on(nn.LSTM(4, 6, 2, batch_first=True), 5, 7, 4),
    "lstm, steps first": lambda: on(nn.LSTM(4, 6), 7, 5, 4),
    "lstm, both ways": lambda: on(nn.LSTM(4, 6, 2, bidirectional=True, batch_first=True), 5, 7, 4),
    "lstm with projections": lambda: on(nn.LSTM(4, 6, proj_size=3, bidirectional=True), 7, 5, 4),
    "lstm unbatched": lambda: on(nn.LSTM(4, 6, batch_first=True, bidirectional=True), 9, 4),
    "lstm packed": lambda: on_input(nn.LSTM(4, 6, 2, batch_first=True), packed()),
    "gru packed, both ways": lambda: on_input(nn.GRU(4, 5, bidirectional=True, batch_first=True), packed()),
    "rnn": lambda: on(nn.RNN(4, 6), 7, 5, 4),
    "lstm cell": lambda: on(nn.LSTMCell(4, 6), 30, 4),
    "gru cell": lambda: on(nn.GRUCell(4, 6), 30, 4),
    "a tuple": lambda: on(Wrapped(lambda x: (torch.tensor(1.0), x, [x])), 30, 3),
    "a named tuple": lambda: on(Wrapped(lambda x: Pair(torch.tensor(1.0), x)), 30, 3),
    "a mapping": lambda: on(Wrapped(lambda x: {"ids": torch.arange(3), "deep": [{"hidden": x}]}), 30, 3),
    "a dataclass": lambda: on(Wrapped(lambda x: Output(torch.arange(3), x)), 30, 3),
    "a packed sequence": lambda: on(Wrapped(steps_of), 25, 3),
    "a block of maps": lambda: on(nn.Sequential(nn.Conv2d(3, 6, 2), nn.ReLU()), 5, 3, 6, 7),
}  # fmt: skip


class Root(nn.Module):
    """A model whose only layer is called `layer`."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer


@pytest.mark.parametrize("kind", KINDS)
def test_the_rows_that_were_recorded_are_projected(kind, tmp_path):
    torch.manual_seed(1)
    layer, forward = KINDS[kind]()
    model = Root(layer)
    run = tracked(model, tmp_path / "run", lambda: forward(layer), layers=["layer"])
    (found,) = select_layers(model, layers=["layer"])
    before = forward(layer)
    with project(model, run, 0.8) as projection:
        after = forward(layer)
    assert forward(layer) is not after

    def rows(output: Any) -> Tensor:
        return found.adapter.rows(layer, output, RowOptions())

    assert 0 < projection.layers["layer"].intrinsic_dimensionality < projection.layers["layer"].in_features
    assert rows(after).shape == rows(before).shape
    expected = projected_rows(rows(before), run, "layer", 0.8)
    assert np.abs(expected - float64_rows(rows(before))).max() > 0.01
    np.testing.assert_allclose(float64_rows(rows(after)), expected, rtol=0, atol=2e-6)
    check_rest(kind, before, after)


def check_rest(kind: str, before: Any, after: Any) -> None:
    """What else an output holds stays; of a final hidden state, what is a row is one afterwards."""
    assert type(after) is type(before)
    if kind in ("attention", "lstm cell"):
        assert torch.equal(after[1], before[1])
    elif kind == "a tuple":
        assert torch.equal(after[2][0], after[1])  # the same tensor at two places
    elif kind == "a mapping":
        assert torch.equal(after["ids"], before["ids"])
    elif kind == "a dataclass":
        assert torch.equal(after.ids, before.ids)
    elif isinstance(before, tuple) and kind.startswith(("lstm", "gru", "rnn")):
        check_state(kind, before, after)


def check_state(kind: str, before: Any, after: Any) -> None:
    old, new = ((state[0] if isinstance(state, tuple) else state) for _, state in (before, after))
    both = 2 if any(word in kind for word in ("both ways", "projections", "unbatched")) else 1
    assert torch.equal(new[:-both], old[:-both])
    assert not torch.allclose(new[-both:], old[-both:], atol=1e-3)
    if isinstance(before[1], tuple):
        assert torch.equal(after[1][1], before[1][1])
    width = old.shape[-1]
    lengths = [3, 7, 2, 7, 1, 5]
    if isinstance(after[0], PackedSequence):
        sequences = nn.utils.rnn.unpack_sequence(after[0])
        assert [len(steps) for steps in sequences] == lengths
    elif after[0].dim() == 2:
        sequences, new = [after[0]], new.unsqueeze(1)
    else:
        first = kind in ("lstm", "lstm, both ways")
        sequences = list(after[0] if first else after[0].transpose(0, 1))
    for index, steps in enumerate(sequences):
        torch.testing.assert_close(new[-both, index], steps[-1, :width], rtol=0, atol=0)
        if both == 2:
            torch.testing.assert_close(new[-1, index], steps[0, width:], rtol=0, atol=0)


def test_layers_have_the_class_of_their_kind(tmp_path):
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4, 3))
    run = tracked(model, tmp_path / "run", lambda: model(torch.randn(20, 1, 3, 3)))
    with project(model, run) as projection:
        assert [type(layer) for layer in layers_of(projection)] == [Conv2dPCALayer, LinearPCALayer]
    # Taken out of the projection, they serve on their own.
    x = torch.randn(5, 1, 3, 3)
    alone = nn.Sequential(model[0], projection.layers["0"], model[1], model[2], projection.layers["2"])
    expected = alone(x)
    with project(model, run):
        assert torch.equal(model(x), expected)


def test_names_are_those_of_the_files(tmp_path):
    """Any name is one: dots in it, the names of a module's own attributes, slashes, patterns, wrappers before it."""
    torch.manual_seed(0)
    model = nn.Module()
    names = ["inserted", "layers", "a/b", "[x]", "<b>ü$", "keys"]
    for name in names:
        model.add_module(name, nn.Linear(3, 2))
    model.a = nn.Module()
    model.a.b = nn.Linear(3, 2)
    model.forward = lambda x: [layer(x) for layer in model.modules() if isinstance(layer, nn.Linear)]
    run = tracked(model, tmp_path / "run", lambda: model(torch.randn(20, 3)))
    with project(nn.DataParallel(model), run, 0.4) as projection:
        assert list(projection.layers) == [*names, "a.b"]
        assert len({id(layer) for layer in projection.layers.values()}) == 7
        assert len(projection.state_dict()) == 7 * 4
        for name, layer in projection.layers.items():
            np.testing.assert_allclose(layer.mean, eigenspace(run, name)[0])
    with project(model, run, layers=["[x]", "a*"]) as projection:
        assert list(projection.layers) == ["a/b", "[x]", "a.b"]


def test_a_model_that_is_a_layer(tmp_path):
    model = nn.Linear(4, 3)
    run = tracked(model, tmp_path / "run", lambda: model(torch.randn(40, 4)))
    with project(model, Storage(run), 0.5, centering=False) as projection:
        x = torch.randn(7, 4)
        directions = projection.layers["Linear"].directions.float()
        expected = F.linear(x, model.weight, model.bias) @ directions @ directions.T
        torch.testing.assert_close(model(x), expected)


def test_the_last_window_of_the_phase_is_meant(tmp_path):
    model = build("mlp")
    batches = iter([inputs("mlp", 64, seed=seed) for seed in range(6)])

    def forwards() -> None:
        model.train()(next(batches))
        model.eval()(next(batches))

    run = tracked(model, tmp_path / "run", forwards, windows=3)
    for options, where in [
        ({}, ("train", 2)),
        ({"step": 0}, ("train", 0)),
        ({"phase": "eval"}, ("eval", 2)),
        ({"phase": "eval", "step": 1}, ("eval", 1)),
    ]:
        with project(model, str(run), **options) as projection:
            mean, eigenvalues, _ = eigenspace(run, "3", *where)
            np.testing.assert_allclose(projection.layers["3"].mean, mean)
            np.testing.assert_allclose(projection.layers["3"].eigenvalues, eigenvalues, atol=1e-12 * eigenvalues[0])


def test_the_precision_of_the_run_counts(tmp_path):
    """At δ = 1, and with products in float64, directions count that float32 could not tell from rounding."""
    scales = torch.tensor([1.0, 1.0, 2e-5, 0.0])
    rows = torch.randn(300, 4, dtype=torch.float64) * scales
    model = nn.Linear(4, 4, bias=False, dtype=torch.float64)
    nn.init.eye_(model.weight)
    for precision, k in [("float32", 2), ("float64", 3)]:
        run = tracked(model, tmp_path / precision, lambda: model(rows), precision=precision)
        with project(model, run, 1.0) as projection:
            assert projection.layers["Linear"].intrinsic_dimensionality == k
        (published,) = read_spectra(run).to_pylist()
        with project(model, run, published["threshold"]) as projection:
            assert projection.layers["Linear"].intrinsic_dimensionality == published["intrinsic_dimensionality"]


# --- what is refused -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mlp_run(tmp_path_factory):
    model = build("mlp")
    return tracked(model, tmp_path_factory.mktemp("mlp") / "run", lambda: model(inputs("mlp", 64)))


def test_options_that_cannot_be_used_are_refused(mlp_run):
    model = build("mlp")
    read = {"error": ReadError}
    assert_refused(lambda: project(model, mlp_run, 1.5), "threshold=1.5", "(0, 1]")
    assert_refused(lambda: project(model, mlp_run, {"0": 99}), "threshold=99", "0.99")
    assert_refused(lambda: project(model, mlp_run, {"1": 0.9}), "'1'", "no projection")
    assert_refused(lambda: project(model, mlp_run, random=1, seed=-1), "seed=-1")
    assert_refused(lambda: project(model, mlp_run, centering=0), "centering=0")
    assert_refused(lambda: project(model, mlp_run, layers=[]), "layers=[]", "names")
    assert_refused(lambda: project(model, mlp_run, layers=["0", "nope"]), "'nope'", "'0', '3', '5'", **read)
    assert_refused(lambda: project(model, mlp_run, phase="test"), "phase='test'", "'train', 'eval'", **read)
    assert_refused(lambda: project(model, mlp_run, phase="eval"), str(mlp_run), "phase=eval", "train step 0", **read)
    assert_refused(lambda: project(model, mlp_run, step=7), str(mlp_run), "step=7", "train step 0", **read)
    assert hooks(model) == 0


def test_another_model_is_refused(mlp_run):
    read = {"error": ReadError}
    narrow = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Dropout(), nn.Linear(24, 15), nn.Tanh(), nn.Linear(15, 3))
    assert_refused(lambda: project(narrow, mlp_run), "3 has 16 features", "15 in the model", "layers=", **read)
    short = narrow[:4]
    assert_refused(lambda: project(short, mlp_run), "'5'", "the model does not", "'0', '1', '2', '3'", **read)
    assert hooks(narrow) == 0
    with project(short, mlp_run, layers=["0"]) as projection:
        assert list(projection.layers) == ["0"]


def test_a_second_projection_is_refused(mlp_run):
    model = build("mlp")
    with project(model, mlp_run, layers=["0"]):
        assert_refused(lambda: project(model, mlp_run), "'0'", "already", "remove()")
        assert hooks(model) == 1
        with project(model, mlp_run, layers=["3", "5"]):
            assert hooks(model) == 3
    assert hooks(model) == 0


def test_a_path_without_a_run_of_covariances_is_refused(mlp_run, tmp_path):
    model = build("mlp")
    read = {"error": ReadError}
    assert_refused(lambda: project(model, tmp_path / "nothing"), "nothing", "does not exist", **read)
    plain = tracked(model, tmp_path / "sweep" / "a", lambda: model(inputs("mlp", 64)), stats=["lsat"])
    assert_refused(lambda: project(model, plain), str(plain), "no covariances", '"cov"', **read)
    other = tracked(model, tmp_path / "sweep" / "b", lambda: model(inputs("mlp", 64)), run="other")
    assert_refused(lambda: project(model, tmp_path / "sweep"), "2 runs", str(plain), str(other), **read)
    for folder in ("covariances", "spectra"):
        (file,) = (mlp_run / folder).iterdir()
        (other / folder / "copied.parquet").write_bytes(file.read_bytes())
    assert_refused(lambda: project(model, other), str(other), "several runs", "'other'", **read)


def test_rows_that_positions_were_combined_into_are_refused(tmp_path):
    model = build("cnn")
    read = {"error": ReadError}
    for number, (options, word) in enumerate(
        [
            ({"conv_method": "mean"}, "conv_method='mean'"),
            ({"conv_method": "flatten"}, "conv_method='flatten'"),
            ({"interpolation_strategy": "area"}, "interpolation_strategy='area'"),
        ]
    ):
        run = tracked(model, tmp_path / str(number), lambda: model(inputs("cnn", 64)), **options)
        assert_refused(lambda run=run: project(model, run), "0 was recorded", word, "layers=", **read)
        with project(model, run, layers=["7"]) as projection:
            assert list(projection.layers) == ["7"]
    nearest = {"interpolation_strategy": "nearest", "interpolation_downsampling": 4}
    with project(model, tracked(model, tmp_path / "n", lambda: model(inputs("cnn", 64)), **nearest)) as projection:
        assert len(projection.layers) == 3


def test_steps_that_were_not_recorded_are_refused(tmp_path):
    model = build("lstm")
    last = {"timeseries_method": "last_timestep"}
    run = tracked(model, tmp_path / "run", lambda: model(inputs("lstm", 32)), **last)
    assert_refused(lambda: project(model, run), "lstm was recorded", "last_timestep", error=ReadError)
    with project(model, run, layers=["head"]):
        model(inputs("lstm", 4))  # rows of single steps are what was recorded
    tokens = nn.Linear(4, 3)
    run = tracked(tokens, tmp_path / "tokens", lambda: tokens(torch.randn(5, 6, 4)), **last)
    with project(tokens, run):
        assert tokens(torch.randn(5, 4)).shape == (5, 3)
        assert_refused(lambda: tokens(torch.randn(5, 6, 4)), "'Linear'", "last_timestep")


def test_rows_of_a_function_are_refused(tmp_path):
    class Gate(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x.sigmoid(), x.norm()

    register_adapter(Gate, lambda module, output: output[0] * 2)
    try:
        model = nn.Sequential(nn.Linear(3, 4), Gate())
        run = tracked(model, tmp_path / "run", lambda: model(torch.randn(30, 3)))
        assert_refused(lambda: project(model, run), "1 has rows", "register_adapter", error=ReadError)
    finally:
        del ADAPTERS[Gate]


def test_outputs_that_cannot_be_projected_are_refused(tmp_path):
    torch.manual_seed(0)
    model = Root(Wrapped(lambda x: x))
    run = tracked(model, tmp_path / "run", lambda: model.layer(torch.randn(30, 3)), layers=["layer"])
    with project(model, run):
        model.layer.make = lambda x: torch.arange(3)
        assert_refused(lambda: model.layer(torch.randn(2, 3)), "'layer'", "no floating-point tensor")
        model.layer.make = lambda x: x[:, :4]
        assert_refused(lambda: model.layer(torch.randn(2, 3)), "(2, 4)", "5 features")
        model.layer.make = lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)
        assert_refused(lambda: model.layer(torch.randn(2, 3)), "'layer'", "quantized")


def test_a_layer_without_finite_rows_is_refused(tmp_path):
    model = nn.Linear(4, 3)
    run = tracked(model, tmp_path / "run", lambda: model(torch.full((5, 4), torch.nan)))
    assert_refused(lambda: project(model, run), "'Linear'", "no finite row", error=ReadError)


def test_a_run_without_its_description_is_read_as_by_default(mlp_run, tmp_path):
    model = build("mlp")
    run = tracked(model, tmp_path / "run", lambda: model(inputs("mlp", 64)))
    with project(model, run, 0.8) as projection:
        expected = [layer.intrinsic_dimensionality for layer in layers_of(projection)]
    described = json.loads((run / "run.json").read_text())
    for content in (described | {"options": {}}, {}):
        (run / "run.json").write_text(json.dumps(content))
        with project(model, run, 0.8) as projection:
            assert [layer.intrinsic_dimensionality for layer in layers_of(projection)] == expected
    (run / "run.json").unlink()
    with project(model, run, 0.8) as projection:
        assert [layer.intrinsic_dimensionality for layer in layers_of(projection)] == expected


def test_sketched_layers_have_no_eigenspace_and_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 40), nn.ReLU(), nn.Linear(40, 6))
    x = torch.randn(60, 4)
    run = tracked(model, tmp_path / "run", lambda: model(x), max_features=32, sketch_size=8)
    for layers in (None, "*", ["2", "0*"][:1]):
        caplog.clear()
        with project(model, run, 0.9, layers=layers) as projection:
            assert list(projection.layers) == ["2"]
        said = "sketched layers have no covariance and are not projected: '0'"
        assert (said in caplog.text) == (layers in (None, "*"))
    refused = "of which .* has sketches alone, and no covariance: '0'; record them with max_features"
    with pytest.raises(ReadError, match=refused):
        project(model, run, layers=["2", "0"])
    alone = tracked(model[0], tmp_path / "alone", lambda: model[0](x), max_features=32, sketch_size=8)
    with pytest.raises(ReadError, match="covariances"):
        project(model[0], alone)
