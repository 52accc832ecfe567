"""Each way to train: what is recorded is what the layers put out, and the training is the same to the bit."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from tests.helpers import TOLERANCE, Recorded, assert_exact, build, covariance_error, harvested, inputs, recording

TARGETS = torch.arange(16) % 3


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """No way to train is worth a warning."""
    yield
    records = caplog.get_records("call")
    assert [record.getMessage() for record in records if record.levelno >= logging.WARNING] == []


@dataclass
class Training:
    """A training and all that it shows."""

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    seen: list[Any] = field(default_factory=list)

    def batch(self, step: int, size: int = 16) -> Tensor:
        dtype = next(self.model.parameters()).dtype
        return inputs(self.name, size, step).to(dtype)

    def loss(self, step: int, model: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        loss = F.cross_entropy((model or self.model)(self.batch(step)).float(), TARGETS)
        self.seen.append(loss)
        return loss

    def step(self) -> None:
        self.seen += [parameter.grad for parameter in self.model.parameters()]
        self.optimizer.step()
        self.optimizer.zero_grad()


def plain(training: Training) -> None:
    for step in range(3):
        training.loss(step).backward()
        training.step()


def autocast(dtype: torch.dtype) -> Callable[[Training], None]:
    def run(training: Training) -> None:
        for step in range(3):
            with torch.autocast("cpu", dtype=dtype):
                loss = training.loss(step)
            loss.backward()
            training.step()

    return run


def scaled_with_overflow(training: Training) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120, growth_interval=1)
    scales = []
    for step in range(4):
        with torch.autocast("cpu", dtype=torch.float16):
            loss = training.loss(step)
        scaler.scale(loss).backward()
        scaler.step(training.optimizer)
        scaler.update()
        training.optimizer.zero_grad()
        scales.append(scaler.get_scale())
    training.seen += scales
    assert scales[0] < 2.0**120, "the first step overflows"


def of_type(dtype: torch.dtype) -> Callable[[Training], None]:
    def run(training: Training) -> None:
        training.model.to(dtype)
        plain(training)

    return run


def accumulating(training: Training) -> None:
    for step in range(6):
        (training.loss(step) / 3).backward()
        if step % 3 == 2:
            training.step()


def with_evaluation(training: Training) -> None:
    for step in range(3):
        training.loss(step).backward()
        training.step()
        training.model.eval()
        with torch.inference_mode():
            training.seen.append(training.model(training.batch(step, 5)).clone())
        training.model.train()


def with_moving_average(training: Training) -> None:
    average = AveragedModel(training.model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for step in range(3):
        training.loss(step).backward()
        training.step()
        average.update_parameters(training.model)
        training.seen.append(average(training.batch(step, 5)))
        training.seen.append(copy.deepcopy(training.model)(training.batch(step, 5)))


def with_closure(training: Training) -> None:
    training.optimizer = torch.optim.LBFGS(training.model.parameters(), max_iter=3)

    def closure() -> Tensor:
        training.optimizer.zero_grad()
        loss = training.loss(0)
        loss.backward()
        return loss

    training.optimizer.step(closure)  # type: ignore[arg-type]


def channels_last(training: Training) -> None:
    training.model.to(memory_format=torch.channels_last)
    plain(training)


def with_sample_gradients(training: Training) -> None:
    plain(training)
    weights = {name: value.detach() for name, value in training.model.named_parameters()}

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(training.model, weights, (x[None],)).square().sum()

    training.model.eval()
    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, training.batch(9))
    training.seen += list(gradients.values())


def deterministic(training: Training) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        plain(training)
    finally:
        torch.use_deterministic_algorithms(False)


WAYS: dict[str, Callable[[Training], None]] = {
    "plain": plain,
    "autocast bfloat16": autocast(torch.bfloat16),
    "autocast float16": autocast(torch.float16),
    "scaled, with overflow": scaled_with_overflow,
    "bfloat16": of_type(torch.bfloat16),
    "float16": of_type(torch.float16),
    "float64": of_type(torch.float64),
    "accumulating": accumulating,
    "inference mode": with_evaluation,
    "moving average": with_moving_average,
    "closure": with_closure,
    "channels last": channels_last,
    "gradients per sample": with_sample_gradients,
    "deterministic": deterministic,
}


class Witness:
    """Keeps every output of some modules, by wrapping their forward: no hook, and nothing of ours."""

    def __init__(self, model: nn.Module) -> None:
        self.rows: dict[tuple[str, str], list[Tensor]] = {}
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d | nn.LSTM):
                module.forward = _Watched(self, name, module, module.forward)

    def keep(self, name: str, module: nn.Module, output: Any) -> None:
        rows: Tensor = output[0] if isinstance(output, tuple) else output
        if torch._C._functorch.is_functorch_wrapped_tensor(rows):
            return
        rows = rows.permute(0, 2, 3, 1) if rows.dim() == 4 else rows
        phase = "train" if module.training else "eval"
        self.rows.setdefault((name, phase), []).append(rows.detach().clone().reshape(-1, rows.shape[-1]))


class _Watched:
    def __init__(self, witness: Witness, name: str, module: nn.Module, forward: Callable[..., Any]) -> None:
        self.witness, self.name, self.module, self.forward = witness, name, module, forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self.forward(*args, **kwargs)
        self.witness.keep(self.name, self.module, output)
        return output

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., Any]:
        module = memo[id(self.module)]  # a copied model is somebody else's
        return lambda *args, **kwargs: type(module).forward(module, *args, **kwargs)


def run(way: str, name: str, *, track: bool) -> tuple[list[Any], Recorded, Witness]:
    model = build(name)
    witness = Witness(model)
    training = Training(name, model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9))
    with recording(model) if track else nullcontext() as recorder:
        torch.manual_seed(7)
        WAYS[way](training)
        recorded = harvested(recorder) if recorder is not None else {}
    seen = [*training.seen, torch.get_rng_state(), *model.state_dict().values(), list(model.state_dict())]
    return [value.detach().clone() if isinstance(value, Tensor) else value for value in seen], recorded, witness


@pytest.mark.parametrize("name", ["mlp", "cnn", "lstm"])
@pytest.mark.parametrize("way", WAYS)
def test_what_the_layers_put_out_is_recorded_and_nothing_else_changes(
    way: str, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    if name == "lstm" and ("float16" in way.split() or way in ("gradients per sample", "scaled, with overflow")):
        pytest.skip("torch cannot do this with an LSTM on a CPU")
    untracked, _, _ = run(way, name, track=False)
    tracked, recorded, witness = run(way, name, track=True)
    assert len(untracked) == len(tracked) > 10
    for value, other in zip(untracked, tracked, strict=True):
        assert torch.equal(value, other) if isinstance(value, Tensor) else value == other
    assert set(recorded) == set(witness.rows)
    for key, rows in witness.rows.items():
        assert_exact(recorded[key], torch.cat(rows))
    if way == "gradients per sample":
        (said,) = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
        assert "torch.func transforms" in said
        caplog.clear()


# --- recomputation ---------------------------------------------------------------------------------------------


class Recomputed(nn.Module):
    """Blocks of which the backward pass recomputes some, or none, in one of torch's ways."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.mode = mode
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 12), nn.Dropout(0.3), nn.Tanh(), nn.Linear(12, 6)) for _ in range(4)
        )
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Logits; every second block is recomputed."""
        for index, block in enumerate(self.blocks):
            if self.mode == "none" or index % 2:
                x = block(x)
            elif self.mode == "nested":
                x = checkpoint(lambda y, b=block: checkpoint(b, y, use_reentrant=False), x, use_reentrant=False)
            else:
                x = checkpoint(block, x, use_reentrant=self.mode == "reentrant")  # type: ignore[assignment]
        return self.head(x)  # type: ignore[no-any-return]


def recompute(mode: str, *, track: bool) -> tuple[list[Tensor | None], Recorded]:
    torch.manual_seed(0)
    model = Recomputed(mode)
    gradients: list[Tensor | None] = []
    with recording(model) if track else nullcontext() as recorder:
        for step in range(3):
            for _ in range(2):  # gradients add up over two forwards and backwards
                F.cross_entropy(model(inputs("mlp", 16, step).requires_grad_()), TARGETS).backward()
            gradients += [parameter.grad for parameter in model.parameters()]
        model.eval()
        with torch.no_grad():
            model(inputs("mlp", 5))
        recorded = harvested(recorder) if recorder is not None else {}
    return gradients, recorded


@pytest.mark.parametrize("mode", ["reentrant", "not reentrant", "nested"])
def test_what_is_recomputed_counts_once(mode: str) -> None:
    _, expected = recompute("none", track=True)
    gradients, recorded = recompute(mode, track=True)
    untracked, _ = recompute(mode, track=False)
    for left, right in zip(gradients, untracked, strict=True):
        assert left is not None
        assert right is not None
        assert torch.equal(left, right)
    assert {key: moments.n for key, moments in recorded.items()} == {
        key: 6 * 16 if key[1] == "train" else 5 for key in expected
    }
    for key, moments in recorded.items():
        assert covariance_error(moments.covariance(), expected[key].covariance()) < TOLERANCE


# --- what is not an observation ----------------------------------------------------------------------------------


def test_overflowing_forwards_are_left_out_row_by_row() -> None:
    model = nn.Linear(4, 3).half()
    x = torch.randn(10, 4, dtype=torch.float16)
    x[2] = 6e4
    x[7, 1] = float("nan")
    witness = Witness(model)
    with recording(model) as recorder:
        output = model(x)
        ((_, accumulator),) = recorder.harvest(end_of_window=True).items()
    finite = output.isfinite().all(1)
    assert 0 < int((~finite).sum()) < 10
    buffer = torch.zeros(9, dtype=torch.float64).numpy()
    n = int(finite.sum())
    assert accumulator.drain_into(buffer) == (n, int((~finite).sum()), n)
    expected = witness.rows["", "train"][0][finite].double().mean(0)
    torch.testing.assert_close(torch.from_numpy(buffer[:3]), expected, rtol=1e-6, atol=1e-6)


# --- train and eval -----------------------------------------------------------------------------------------------


def test_frozen_submodules_are_of_their_own_phase() -> None:
    """As with a frozen backbone, or batch normalisation kept in eval."""
    model = build("cnn")
    witness = Witness(model)
    with recording(model, layers=["*"]) as recorder:
        model.train()
        for part in list(model.children())[:4]:
            part.eval()
        for step in range(2):
            model(inputs("cnn", 8, step))
        recorded = harvested(recorder)
        assert recorder.phases() == frozenset()
    assert {phase for _, phase in recorded} == {"train", "eval"}
    assert {name for name, phase in recorded if phase == "eval"} == {"0", "1", "2", "3"}
    assert {name for name, phase in recorded if phase == "train"} == {"4", "5", "6", "7"}
    for key, rows in witness.rows.items():
        assert_exact(recorded[key], torch.cat(rows))
