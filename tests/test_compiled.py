"""delve_ray.compiled: under torch.compile the same rows are recorded, without a graph break."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from delve_ray.layers import RowOptions, register_adapter
from delve_ray.recorder import Recorder
from delve_ray.selection import select_layers
from tests.helpers import TOLERANCE, Recorded, build, covariance_error, harvested, inputs, recording

BACKENDS = ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
COMPILERS_OWN = {"eager": TOLERANCE, "aot_eager": TOLERANCE, "inductor": 1e-5}
"""Of λ1: a compiler may compute a layer's output in another order."""
backends = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def breaks() -> int:
    """How often a graph ended before its end, since the compiler was reset."""
    return sum(counters["graph_break"].values())


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


class Mixed(nn.Module):
    """Layers of many kinds, with train and eval parting ways at a dropout of 0."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.norm = nn.LayerNorm(16)
        self.wide = nn.Linear(16, 40)
        self.narrow = nn.Linear(40, 16)
        self.dropout = nn.Dropout(0.0)
        self.conv = nn.Conv1d(16, 17, 3, padding=1)

    def forward(self, tokens: Tensor) -> Tensor:
        """Features of each step, (B, 17, T)."""
        x = self.embed(tokens)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = x + self.dropout(self.narrow(torch.relu(self.wide(self.norm(x)))))
        return self.conv(x.transpose(1, 2))  # type: ignore[no-any-return]


def mixed() -> Mixed:
    torch.manual_seed(0)
    return Mixed()


def tokens(seed: int = 0, batch: int = 6) -> Tensor:
    return torch.randint(0, 20, (batch, 9), generator=torch.Generator().manual_seed(seed))


def run_phases(forward: Callable[[Tensor], Tensor], model: nn.Module, recorder: Recorder) -> Recorded:
    """Training and evaluation, with a pause in between."""
    for seed in range(3):
        forward(tokens(seed)).square().sum().backward()
    recorder.recording = False
    forward(tokens())
    recorder.recording = True
    model.eval()
    with torch.no_grad():
        forward(tokens(8))
    model.train()
    return harvested(recorder)


def assert_same(recorded: Recorded, expected: Recorded, tolerance: float) -> None:
    assert {key: moments.n for key, moments in recorded.items()} == {key: m.n for key, m in expected.items()}
    for key, moments in recorded.items():
        assert covariance_error(moments.covariance(), expected[key].covariance()) < tolerance


@backends
@pytest.mark.parametrize("order", ["tracked, then compiled", "compiled, then tracked", "in place"])
def test_the_same_rows_without_a_graph_break(backend: str, order: str) -> None:
    expected_model, model = mixed(), mixed()
    with recording(expected_model) as recorder:
        expected = run_phases(expected_model, expected_model, recorder)
    compiled: Any = model
    if order != "tracked, then compiled":
        if order == "in place":
            model.compile(backend=backend, fullgraph=True)
        else:
            compiled = torch.compile(model, backend=backend, fullgraph=True)
        compiled(tokens())  # of the same shape: nothing else asks for a new compilation
    model.zero_grad()
    with recording(compiled) as recorder:
        assert [layer.name for layer in recorder.layers] == [layer.name for layer in select_layers(model)]
        if order == "tracked, then compiled":
            compiled = torch.compile(model, backend=backend, fullgraph=True)
        assert_same(run_phases(compiled, model, recorder), expected, COMPILERS_OWN[backend])
    assert breaks() == 0
    for left, right in zip(model.parameters(), expected_model.parameters(), strict=True):
        torch.testing.assert_close(left.grad, right.grad)


@backends
def test_nothing_is_left_of_the_recording_after_its_end(backend: str) -> None:
    model = mixed()
    expected = model(tokens())
    with recording(model) as recorder:
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        compiled(tokens())
        recorder.harvest(end_of_window=True)
    torch.testing.assert_close(compiled(tokens()), expected)
    assert recorder.harvest(end_of_window=True) == {}
    with recording(model) as later:  # and a later one finds the same compiled model
        compiled(tokens())
        assert harvested(later)["wide", "train"].n == 54


@backends
@pytest.mark.parametrize("use_reentrant", [False])  # the other is no part of a full graph
def test_what_a_compiled_backward_recomputes_counts_once(backend: str, use_reentrant: bool) -> None:
    model = mixed()

    def forward(x: Tensor) -> Tensor:
        return checkpoint(model, x, use_reentrant=use_reentrant)  # type: ignore[return-value]

    with recording(model) as recorder:
        expected = run_phases(model, model, recorder)
        gradients = [parameter.grad for parameter in model.parameters()]
        model.zero_grad()
        recorded = run_phases(torch.compile(forward, backend=backend, fullgraph=True), model, recorder)
    assert breaks() == 0
    assert_same(recorded, expected, COMPILERS_OWN[backend])
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.parametrize("tracked", [False, True])
def test_blocks_compiled_one_by_one_share_one_graph(tracked: bool) -> None:
    """As in regional compilation: a graph per layer would soon be more than the compiler's limit."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8)
            self.outer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.outer(torch.relu(self.inner(x)))  # type: ignore[no-any-return]

    model = nn.Sequential(*(Block() for _ in range(12)))
    recorder = Recorder(select_layers(model), recorder_options()) if tracked else None
    if recorder is not None:
        recorder.start()
    for block in model:
        block.compile(backend="aot_eager", fullgraph=True)
    for _ in range(2):
        model(torch.randn(4, 8)).sum().backward()
    assert graphs() == 2, "the first block's input takes no gradient, the others' does"
    if recorder is not None:
        recorded = harvested(recorder)
        assert len(recorded) == 24
        assert {moments.n for moments in recorded.values()} == {8}
        recorder.close()


def recorder_options() -> Any:
    from delve_ray.recorder import RecorderOptions

    return RecorderOptions()


@backends
@pytest.mark.parametrize("method", ["mean", "max", "median", "flatten"])
def test_rows_are_made_inside_the_graph(backend: str, method: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 3))
    x = torch.randn(4, 3, 12, 12)
    rows = RowOptions(method, interpolation_strategy="area", interpolation_downsampling=4)
    with recording(model, rows=rows) as recorder:
        model(x)
        expected = harvested(recorder)
        torch.compile(model, backend=backend, fullgraph=True)(x)
        assert_same(harvested(recorder), expected, COMPILERS_OWN[backend])
    assert breaks() == 0


@pytest.mark.parametrize("name", ["mlp", "cnn", "lstm"])
def test_small_models(name: str) -> None:
    model = build(name).eval()
    with recording(model) as recorder:
        model(inputs(name, 16))
        expected = harvested(recorder)
        torch.compile(model, backend="eager")(inputs(name, 16))
        assert_same(harvested(recorder), expected, TOLERANCE)


def test_changing_shapes_and_options_that_take_effect_at_run_time() -> None:
    model = nn.Linear(4, 3)
    with recording(model, log_interval=2, max_samples=40) as recorder:
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        for batch in (10, 100, 20, 7, 50, 3):  # 10, 20 and the first ten of 50
            compiled(torch.randn(batch, 4))
        ((_, moments),) = harvested(recorder).items()
        assert moments.n == 40


class Untraceable(nn.Module):
    """Its rows are made by code that a compiler cannot follow."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """The input, in a dict."""
        return {"x": x * 2}


def test_rows_that_cannot_be_traced_cost_a_graph_break_and_no_rows() -> None:
    from delve_ray.layers import ADAPTERS

    def rows(module: nn.Module, output: dict[str, Tensor]) -> Tensor:
        if float(output["x"].sum().item()) > 1e9:
            raise AssertionError
        torch._dynamo.graph_break()
        return output["x"]

    register_adapter(Untraceable, rows)
    try:
        model = nn.Sequential(nn.Linear(4, 3), Untraceable())
        with recording(model) as recorder:
            compiled: Any = torch.compile(model, backend="eager")
            for _ in range(2):
                assert compiled(torch.ones(5, 4))["x"].shape == (5, 3)
            assert {name: moments.n for (name, _), moments in harvested(recorder).items()} == {"0": 10, "1": 10}
    finally:
        del ADAPTERS[Untraceable]


def test_an_output_without_rows_is_said_and_costs_no_full_graph(caplog: pytest.LogCaptureFixture) -> None:
    class Tokenizer(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.argmax(-1)

    model = nn.Sequential(nn.Linear(4, 3), Tokenizer())
    with recording(model, layers=["*"]) as recorder:
        compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
        for _ in range(3):
            assert compiled(torch.randn(5, 4)).shape == (5,)
        assert {name: moments.n for (name, _), moments in harvested(recorder).items()} == {"0": 15}
    (record,) = [record for record in caplog.records if record.name.startswith("delve_ray")]
    assert record.message.startswith("layer 1 is not recorded inside compiled code: a Tensor without a floating-point")


class Branches(nn.Module):
    """A layer in each branch of a condition, and one before."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(4, 4)
        self.left = nn.Linear(4, 4)
        self.right = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        """One of two layers."""
        x = self.before(x)
        branches = torch.cond(x.sum() > 0, lambda y: self.left(y), lambda y: self.right(y), (x,))
        return branches  # type: ignore[no-any-return]


@backends
@pytest.mark.parametrize("gradients", [True, False])
def test_layers_in_control_flow_are_left_out_with_a_word(
    backend: str, gradients: bool, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model = Branches()
    x = torch.randn(5, 4)
    with torch.set_grad_enabled(gradients):
        expected: Any = torch.compile(model, backend=backend, fullgraph=True)(x)
        with recording(model) as recorder:
            compiled: Any = torch.compile(model, backend=backend, fullgraph=True)
            for _ in range(2):
                output = compiled(x)
            torch.testing.assert_close(output, expected)
            if gradients:
                output.sum().backward()
            assert {name: moments.n for (name, _), moments in harvested(recorder).items()} == {"before": 10}
    assert sorted(record.message for record in caplog.records if record.name.startswith("delve_ray")) == [
        f"layer {name} is not recorded inside compiled code: it runs in a control-flow operator or a nested region, "
        f"which take no effects"
        for name in ("left", "right")
    ]


def test_compiled_function_transforms_work() -> None:
    model = build("mlp").eval()
    x = inputs("mlp", 10)
    with recording(model) as recorder:
        mapped = torch.compile(lambda y: torch.func.vmap(model)(y), backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(mapped(x), torch.func.vmap(model)(x))
        assert recorder.harvest(end_of_window=True) == {}
        gradient = torch.compile(
            lambda y: torch.func.grad(lambda z: model(z).sum())(y), backend="aot_eager", fullgraph=True
        )
        torch.testing.assert_close(gradient(x), torch.func.grad(lambda z: model(z).sum())(x))
        # Compiled, a gradient's forward is a forward like any other.
        assert {moments.n for moments in harvested(recorder).values()} == {10}


@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_model_knows_nothing_of_the_recording(strict: bool) -> None:
    model = build("mlp").eval()
    x = inputs("mlp", 10)
    with recording(model) as recorder:
        program = torch.export.export(model, (x,), strict=strict)
        assert recorder.harvest(end_of_window=True) == {}
    assert not [node for node in program.graph.nodes if "delve_ray" in str(node.target)]
    torch.testing.assert_close(program.module()(x), model(x))


def test_without_the_operator_a_graph_break_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a torch that cannot mark an operator's effect."""
    monkeypatch.setattr("delve_ray.hooks.define_operators", lambda actions, called_while_tracing: False)
    model = mixed()
    with recording(model) as recorder:
        expected = run_phases(model, model, recorder)
        recorded = run_phases(torch.compile(model, backend="eager"), model, recorder)
    assert_same(recorded, expected, TOLERANCE)
    assert breaks() > 0
