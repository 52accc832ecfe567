"""delve_ray.recorder: what is recorded, guarantee 5 (training is not changed), and that hooks never raise."""

from __future__ import annotations

import copy
import gc
import io
import logging
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, checkpoint_sequential
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.hooks import RemovableHandle

from delve_ray import hooks
from delve_ray.accumulator import Accumulator
from delve_ray.layers import RowOptions, TokenAdapter
from delve_ray.recorder import EVAL, TRAIN, Recorder, RecorderOptions
from delve_ray.rows import Reader
from delve_ray.schema import PHASES
from delve_ray.selection import select_layers
from tests.helpers import (
    MODELS,
    TOLERANCE,
    Recorded,
    assert_exact,
    build,
    cnn,
    covariance_error,
    harvested,
    inputs,
    merged,
    named,
    recording,
)

models = pytest.mark.parametrize("name", MODELS)


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """No test may warn about a layer unless it expects to, and then it clears the log."""
    yield
    records = caplog.get_records("call")
    assert [record.getMessage() for record in records if record.levelno >= logging.WARNING] == []


def counts(recorded: Recorded) -> dict[tuple[str, str], int]:
    return {key: moments.n for key, moments in recorded.items()}


def assert_same_moments(left: Recorded, right: Recorded) -> None:
    """The same layers, phases and numbers of rows, and the same covariances up to the order of summation."""
    assert counts(left) == counts(right)
    for key, moments in left.items():
        assert covariance_error(moments.covariance(), right[key].covariance()) < TOLERANCE


class Outputs:
    """Independent hooks that keep every output: what the recorder must have seen."""

    def __init__(self, model: nn.Module) -> None:
        self.rows: dict[str, list[Tensor]] = {}
        for layer in select_layers(model):
            layer.module.register_forward_hook(self._keep(layer.name))

    def _keep(self, name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: Any, output: Any) -> None:
            rows = output[0] if isinstance(output, tuple) else output
            rows = rows.permute(0, 2, 3, 1) if rows.dim() == 4 else rows
            self.rows.setdefault(name, []).append(rows.detach().clone().reshape(-1, rows.shape[-1]))

        return hook


# --- what is recorded ----------------------------------------------------------------------------------


def test_the_phases_are_those_of_the_files() -> None:
    assert PHASES[TRAIN] == "train"
    assert PHASES[EVAL] == "eval"


@models
def test_every_row_of_every_layer_is_recorded(name: str) -> None:
    model = build(name)
    outputs = Outputs(model)
    with recording(model) as recorder:
        for seed, batch in enumerate((1, 16, 40, 7)):
            model(inputs(name, batch, seed))
        recorded = harvested(recorder)
    assert [layer for layer, _ in recorded] == list(outputs.rows)
    for layer, rows in outputs.rows.items():
        assert_exact(recorded[layer, "train"], torch.cat(rows))


def test_the_last_step_of_each_sequence_is_recorded_on_request() -> None:
    model = build("lstm")
    outputs = Outputs(model)
    with recording(model, rows=RowOptions(timeseries_method="last_timestep")) as recorder:
        model(inputs("lstm", 30))
        recorded = harvested(recorder)
    assert_exact(recorded["lstm", "train"], outputs.rows["lstm"][0].view(30, 5, 20)[:, -1])
    assert recorded["head", "train"].n == 30


def test_float64_products_are_recorded_on_request() -> None:
    model = build("mlp")
    outputs = Outputs(model)
    with recording(model, precision=torch.float64) as recorder:
        model(inputs("mlp", 500))
        recorded = harvested(recorder)
    assert_exact(recorded["0", "train"], outputs.rows["0"][0], tolerance=1e-13)


def test_an_output_changed_in_place_afterwards_is_recorded_as_it_was() -> None:
    layer = nn.Linear(4, 6)
    with recording(layer) as recorder:
        output = layer(torch.randn(50, 4))
        before = output.detach().clone()
        with torch.no_grad():
            output.fill_(float("nan"))
        assert_exact(harvested(recorder)["Linear", "train"], before)


def test_the_output_itself_is_passed_on() -> None:
    layer = nn.Linear(4, 20)
    x = torch.randn(50, 4)
    expected = layer(x)
    with recording(layer) as recorder:
        output = layer(x)
        assert torch.equal(output, expected)
        assert output.grad_fn is not None
        assert type(output.grad_fn) is type(expected.grad_fn)
        assert output._version == expected._version == 0
        assert counts(harvested(recorder)) == {("Linear", "train"): 50}


def test_phases_follow_each_modules_own_mode() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    model[1].eval()  # frozen, as pretrained parts are while the rest trains
    with recording(model) as recorder:
        model(torch.randn(10, 4))
        assert recorder.phases() == {TRAIN, EVAL}
        model.eval()
        model(torch.randn(3, 4))
        model.train()
        model(torch.randn(5, 4))
        recorded = harvested(recorder)
    assert counts(recorded) == {
        ("0", "train"): 15,
        ("1.0", "eval"): 13,
        ("1.1", "eval"): 13,
        ("0", "eval"): 3,
        ("1.0", "train"): 5,
        ("1.1", "train"): 5,
    }


def test_train_and_eval_rows_do_not_mix() -> None:
    model = cnn()
    outputs = Outputs(model)
    with recording(model) as recorder:
        model(inputs("cnn", 16, seed=1))
        model.eval()
        with torch.no_grad():
            model(inputs("cnn", 24, seed=2) * 100)
        recorded = harvested(recorder)
    for layer, (train, evaluation) in outputs.rows.items():
        assert_exact(recorded[layer, "train"], train)
        assert_exact(recorded[layer, "eval"], evaluation)


def test_a_module_used_twice_in_a_forward_gives_both_its_outputs() -> None:
    shared = nn.Linear(5, 5)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    outputs = Outputs(model)
    with recording(model) as recorder:
        model(torch.randn(20, 5))
        recorded = harvested(recorder)
    assert_exact(recorded["0", "train"], torch.cat(outputs.rows["0"]))
    assert recorded["0", "train"].n == 40


def test_non_finite_rows_are_counted_by_layer_and_phase() -> None:
    model = nn.Sequential(nn.Linear(3, 20), nn.Linear(20, 2))
    x = torch.randn(30, 3)
    x[4, 0], x[9, 2] = float("nan"), float("inf")
    with recording(model) as recorder:
        model(x)
        harvest = recorder.harvest(end_of_window=True)
        left_out = {
            key: accumulator.drain_into(np.empty(d + d * (d + 1) // 2))[1]
            for (key, accumulator), d in zip(harvest.items(), (20, 2), strict=True)
        }
    assert left_out == {(0, TRAIN): 2, (1, TRAIN): 2}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_models_of_other_types(dtype: torch.dtype) -> None:
    model = build("mlp").to(dtype)
    outputs = Outputs(model)
    with recording(model) as recorder:
        model(inputs("mlp", 60).to(dtype))
        recorded = harvested(recorder)
    for layer, rows in outputs.rows.items():
        assert_exact(recorded[layer, "train"], torch.cat(rows))


def test_mixed_precision() -> None:
    model = build("cnn")
    outputs = Outputs(model)
    with recording(model) as recorder:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(inputs("cnn", 8))
        recorded = harvested(recorder)
    assert outputs.rows["0"][0].dtype == torch.bfloat16
    for layer, rows in outputs.rows.items():
        assert_exact(recorded[layer, "train"], torch.cat(rows))


# --- sampling and windows ------------------------------------------------------------------------------


def test_every_nth_forward_of_each_layer_and_phase_is_recorded() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with recording(model, log_interval=3) as recorder:
        for forward in range(8):  # 0, 3 and 6 are recorded; the batch says which
            model(torch.randn(10**forward if forward < 4 else forward, 2))
        model[0](torch.randn(1000, 2))  # the first layer's ninth forward: not recorded
        model[0](torch.randn(500, 2))  # its tenth: recorded
        model.eval()
        model(torch.randn(7, 2))  # the first of its phase: recorded
        model(torch.randn(70, 2))
        assert counts(harvested(recorder)) == {
            ("0", "train"): 1 + 1000 + 6 + 500,
            ("1", "train"): 1 + 1000 + 6,
            ("0", "eval"): 7,
            ("1", "eval"): 7,
        }


def test_counting_goes_on_through_a_flush_and_starts_anew_with_a_window() -> None:
    layer = nn.Linear(2, 2)

    def forwards(*batches: int) -> None:
        for batch in batches:
            layer(torch.randn(batch, 2))

    key = ("Linear", "train")
    with recording(layer, log_interval=4) as recorder:
        forwards(1, 20, 30)
        assert counts(harvested(recorder, end_of_window=False)) == {key: 1}
        forwards(40)
        assert harvested(recorder, end_of_window=False) == {}
        forwards(5, 60)
        assert counts(harvested(recorder, end_of_window=True)) == {key: 5}
        forwards(7, 80)  # the window's first, whatever came before
        assert counts(harvested(recorder, end_of_window=True)) == {key: 7}


def test_a_harvest_takes_everything_and_leaves_nothing() -> None:
    model = build("mlp")
    with recording(model) as recorder:
        assert recorder.harvest(end_of_window=False) == {}
        parts = []
        for seed in range(6):
            model(inputs("mlp", 10, seed))
            parts.append(recorder.harvest(end_of_window=False))
        assert recorder.harvest(end_of_window=False) == {}
        # What was handed over earlier is not touched by what came later.
        read = [named(recorder, part) for part in parts]
    whole = build("mlp")
    with recording(whole) as recorder:
        for seed in range(6):
            whole(inputs("mlp", 10, seed))
        expected = harvested(recorder)
    assert all(counts(part) == {(layer, "train"): 10 for layer in ("0", "3", "5")} for part in read)
    first = merged([part["0", "train"] for part in read])
    assert covariance_error(first.covariance(), expected["0", "train"].covariance()) < TOLERANCE


def test_phases_are_those_of_the_open_window() -> None:
    layer = nn.Linear(2, 2)
    with recording(layer) as recorder:
        assert recorder.phases() == frozenset()
        layer(torch.randn(3, 2))
        recorder.harvest(end_of_window=False)
        assert recorder.phases() == {TRAIN}
        layer.eval()(torch.randn(3, 2))
        assert recorder.phases() == {TRAIN, EVAL}
        recorder.harvest(end_of_window=True)
        assert recorder.phases() == frozenset()


def test_nothing_is_recorded_while_stopped() -> None:
    model = build("mlp")
    with recording(model, log_interval=2) as recorder:
        recorder.recording = False
        model(inputs("mlp", 10))
        assert recorder.harvest(end_of_window=True) == {}
        assert recorder.phases() == frozenset()
        recorder.recording = True
        model(inputs("mlp", 20))
        assert counts(harvested(recorder)) == {(layer, "train"): 20 for layer in ("0", "3", "5")}


def test_two_recorders_do_not_disturb_each_other() -> None:
    model = build("mlp")
    with recording(model) as left, recording(model, log_interval=2) as right:
        model(inputs("mlp", 10))
        model(inputs("mlp", 10))
        assert harvested(left)["0", "train"].n == 20
        left.close()
        model(inputs("mlp", 10))
        assert left.harvest(end_of_window=True) == {}
        assert harvested(right)["0", "train"].n == 20


# --- guarantee 5: training is not changed --------------------------------------------------------------


def train(name: str, *, track: bool, steps: int = 4) -> list[Any]:
    """Everything that a training can show, to the bit: of each step, and of the model afterwards."""
    model = build(name)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    seen: list[Any] = []
    with recording(model) if track else nullcontext() as recorder:
        torch.manual_seed(7)
        for step in range(steps):
            loss = F.cross_entropy(model(inputs(name, 16, step)), torch.arange(16) % 3)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            model.eval()
            with torch.no_grad():
                logits = model(inputs(name, 5, step))
            model.train()
            seen += [loss, logits, *(parameter.grad for parameter in model.parameters()), torch.get_rng_state()]
            seen += [torch.rand(1), *model.buffers()]
        state = model.state_dict()
        seen += [list(state), *state.values()]
        if recorder is not None:
            recorded = harvested(recorder)
            assert all(moments.n > 0 for moments in recorded.values())
            assert {phase for _, phase in recorded} == {"train", "eval"}
    return [value.detach().clone() if isinstance(value, Tensor) else value for value in seen]


@models
def test_training_is_the_same_to_the_bit(name: str) -> None:
    plain, again, tracked = train(name, track=False), train(name, track=False), train(name, track=True)
    assert len(plain) == len(tracked) > 20
    for value, same, other in zip(plain, again, tracked, strict=True):
        if isinstance(value, Tensor):
            assert torch.equal(value, same), "two untracked trainings differ on this machine"
            assert torch.equal(value, other)
        else:
            assert value == other


def attributes(model: nn.Module) -> list[tuple[str, str, Any]]:
    """Every attribute of every module; hooks by their number, parameters and buffers by their bits."""
    found = []
    for path, part in model.named_modules():
        for key, value in vars(part).items():
            if key in ("_parameters", "_buffers"):
                shown: Any = {name: None if t is None else t.tolist() for name, t in value.items()}
            elif key == "_modules":
                shown = list(value)
            elif "hook" in key and isinstance(value, dict):
                shown = len(value)
            else:
                shown = repr(value)
            found.append((path, key, shown))
    return found


@models
def test_only_the_hooks_are_there_and_after_close_nothing(name: str) -> None:
    model = build(name)
    before = attributes(model)
    with recording(model) as recorder:
        tracked = {layer.name for layer in recorder.layers}
        during = attributes(model)
        assert [key for key, now in zip(before, during, strict=True) if key != now] == [
            (path, key, 0) for path, key, _ in before if key == "_forward_hooks" and path in tracked
        ]
        model.eval()(inputs(name, 4))
        assert attributes(model.train()) == during
    assert attributes(model) == before


def test_after_close_nothing_is_recorded_and_what_was_can_be_harvested() -> None:
    model = build("mlp")
    with recording(model) as recorder:
        model(inputs("mlp", 10))
        recorder.close()
        recorder.close()  # a second time does nothing
        model(inputs("mlp", 20))
        assert set(counts(harvested(recorder)).values()) == {10}
    assert recorder._token not in hooks._RECORDERS


def test_a_recorder_that_is_gone_leaves_hooks_that_do_nothing() -> None:
    model = build("mlp").eval()
    x = inputs("mlp", 10)
    expected = model(x)
    recorder = Recorder(select_layers(model), RecorderOptions())
    recorder.start()
    token = recorder._token
    del recorder
    gc.collect()
    assert token not in hooks._RECORDERS
    assert torch.equal(model(x), expected)


def deep_copied(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def pickled(model: nn.Module) -> nn.Module:
    copied = pickle.loads(pickle.dumps(model))
    assert isinstance(copied, nn.Module)
    return copied


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copied = torch.load(file, weights_only=False)
    assert isinstance(copied, nn.Module)
    return copied


copiers = pytest.mark.parametrize("copier", [deep_copied, pickled, saved])


@models
@copiers
def test_a_copy_computes_the_same_and_is_not_recorded(copier: Callable[[nn.Module], nn.Module], name: str) -> None:
    model = build(name).eval()
    x = inputs(name, 10)
    with recording(model) as recorder:
        expected = model(x)
        recorder.harvest(end_of_window=True)
        twin = copier(model)
        assert torch.equal(twin(x), expected)
        assert torch.equal(copier(twin)(x), expected)
        assert recorder.harvest(end_of_window=True) == {}
        model(x)
        assert len(recorder.harvest(end_of_window=True)) == len(recorder.layers)
    assert torch.equal(twin(x), expected)


@copiers
def test_a_copy_can_be_tracked_by_itself(copier: Callable[[nn.Module], nn.Module]) -> None:
    model = build("mlp")
    with recording(model) as recorder:
        twin = copier(model)
        with recording(twin) as other:
            twin(inputs("mlp", 10))
            model(inputs("mlp", 3))
            assert set(counts(harvested(other)).values()) == {10}
        assert set(counts(harvested(recorder)).values()) == {3}


@models
def test_a_pickled_model_needs_no_delve_ray(name: str) -> None:
    model = build(name)
    file = io.BytesIO()
    with recording(model) as recorder:
        model(inputs(name, 10))
        pickles = [pickle.dumps(model, protocol) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
        torch.save(model, file)
        assert len(recorder.harvest(end_of_window=True)) == len(recorder.layers)
    for data in [*pickles, file.getvalue()]:
        assert b"delve_ray" not in data


def test_a_state_dict_loads_into_and_out_of_a_tracked_model() -> None:
    plain, tracked = build("cnn", seed=1), build("cnn", seed=2)
    with recording(tracked):
        tracked.load_state_dict(plain.state_dict(), strict=True)
        plain.load_state_dict(tracked.state_dict(), strict=True)
        assert list(tracked.state_dict()) == list(plain.state_dict())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode: Callable[[], Any]) -> None:
    model = build("mlp").eval()
    x = inputs("mlp", 20)
    with recording(model) as recorder:
        with mode():
            model(x)
        inside = harvested(recorder)
        model(x)
        outside = harvested(recorder)
        with mode():  # begun in one mode and continued in the other
            model(x)
        model(x)
        mixed = harvested(recorder)
    assert_same_moments(inside, outside)
    assert set(counts(mixed).values()) == {40}


# --- recomputation -------------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    """Two blocks, recomputed in the backward pass where asked."""

    def __init__(self, use_reentrant: bool | None) -> None:
        super().__init__()
        self.use_reentrant = use_reentrant
        self.first = nn.Sequential(nn.Linear(6, 20), nn.Dropout(0.3), nn.Tanh())
        self.second = nn.Sequential(nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        for block in (self.first, self.second):
            if self.use_reentrant is None:
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.use_reentrant)  # type: ignore[assignment]
        return x


def train_checkpointed(use_reentrant: bool | None) -> tuple[Recorded, list[Tensor | None]]:
    torch.manual_seed(0)
    model = Checkpointed(use_reentrant)
    with recording(model) as recorder:
        for seed in range(3):
            x = inputs("mlp", 16, seed).requires_grad_()
            F.cross_entropy(model(x), torch.arange(16) % 3).backward()
        model.eval()
        F.cross_entropy(model(inputs("mlp", 4).requires_grad_()), torch.arange(4) % 3).backward()
        return harvested(recorder), [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_is_not_counted_twice(use_reentrant: bool) -> None:
    expected, gradients = train_checkpointed(None)
    recorded, same = train_checkpointed(use_reentrant)
    assert counts(recorded) == {
        (layer, phase): n for layer in ("first.0", "second.0", "second.2") for phase, n in (("train", 48), ("eval", 4))
    }
    assert_same_moments(recorded, expected)
    for left, right in zip(gradients, same, strict=True):
        assert left is not None
        assert right is not None
        assert torch.equal(left, right)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_segments_are_not_counted_twice(use_reentrant: bool) -> None:
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(6)))
    with recording(model) as recorder:
        x = torch.randn(10, 6, requires_grad=True)
        checkpoint_sequential(model, 3, x, use_reentrant=use_reentrant).sum().backward()
        assert counts(harvested(recorder)) == {(str(index), "train"): 10 for index in range(6)}


def test_a_forward_between_two_backwards_is_counted() -> None:
    model = build("mlp")
    with recording(model) as recorder:
        x = inputs("mlp", 10).requires_grad_()
        (gradient,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        gradient.square().sum().backward()  # a gradient penalty
        model(x).sum().backward()
        assert set(counts(harvested(recorder)).values()) == {20}


# --- threads -------------------------------------------------------------------------------------------


def test_harvests_while_other_threads_run_forwards_lose_nothing() -> None:
    model = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 5)).eval()
    kept: list[list[Tensor]] = [[] for _ in range(4)]
    enough = threading.Event()

    def work(outputs: list[Tensor], seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            while len(outputs) < 100 or not enough.is_set():
                outputs.append(model(torch.randn(9, 6, generator=generator)))

    workers = [threading.Thread(target=work, args=(outputs, seed)) for seed, outputs in enumerate(kept)]
    deadline = time.monotonic() + 60
    with recording(model) as recorder:
        for worker in workers:
            worker.start()
        parts: list[Recorded] = []
        while any(worker.is_alive() for worker in workers):
            parts.append(harvested(recorder, end_of_window=len(parts) % 3 == 0))
            if sum(1 for part in parts if part) >= 20 or time.monotonic() > deadline:
                enough.set()
        parts.append(harvested(recorder))
    assert sum(1 for part in parts if part) >= 20
    total = 9 * sum(len(outputs) for outputs in kept)
    for layer in ("0", "2"):
        assert merged([part[layer, "eval"] for part in parts if (layer, "eval") in part]).n == total
    last = merged([part["2", "eval"] for part in parts if ("2", "eval") in part])
    assert_exact(last, torch.cat([rows for outputs in kept for rows in outputs]))


def test_data_parallel_on_the_host() -> None:
    model = build("mlp")
    with recording(nn.DataParallel(model)) as recorder:
        nn.DataParallel(model)(inputs("mlp", 12))
        assert counts(harvested(recorder)) == {(layer, "train"): 12 for layer in ("0", "3", "5")}


# --- a layer that cannot be recorded -------------------------------------------------------------------


class Odd(nn.Linear):
    """A Linear whose forward returns something else from its third call on."""

    def __init__(self, change: Callable[[Tensor], Any]) -> None:
        super().__init__(4, 4)
        self.change = change
        self.calls = 0

    def forward(self, input: Tensor) -> Any:
        """The usual output twice, then `change` of it."""
        self.calls += 1
        output = super().forward(input)
        return output if self.calls < 3 else self.change(output)


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The warnings and errors so far, which are expected then."""
    messages = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    caplog.clear()
    return messages


UNKNOWN: dict[str, Callable[[Tensor], Any]] = {
    "empty": lambda output: (),
    "loss": lambda output: {"loss": output.sum()},
    "nothing": lambda output: None,
    "integers": lambda output: output.long(),
    "narrow": lambda output: output[:, :3],
    "sparse": lambda output: output.to_sparse(),
    "complex": lambda output: torch.complex(output, output),
}
unknown = pytest.mark.parametrize("kind", UNKNOWN)


@unknown
def test_an_unknown_output_is_left_out_with_a_word(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    change = UNKNOWN[kind]
    model = nn.ModuleDict({"odd": Odd(change), "fine": nn.Linear(4, 4)})
    with recording(model) as recorder:
        for call in range(5):
            x = torch.randn(10, 4)
            output = model["odd"](x)
            assert type(output) is type(change(x) if call >= 2 else x)
            model["fine"](x)
        recorded = harvested(recorder)
    # What was recorded before is still right, and there is one warning that names the layer.
    assert counts(recorded) == {("odd", "train"): 20, ("fine", "train"): 50}
    (warning,) = warnings_of(caplog)
    assert warning.startswith("layer odd: a forward is left out")
    assert "4 features" in warning
    assert "\n" not in warning


@unknown
def test_a_layer_whose_outputs_stay_unknown_is_given_up(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    model = nn.ModuleDict({"odd": Odd(UNKNOWN[kind]), "fine": nn.Linear(4, 4)})
    with recording(model) as recorder:
        for _ in range(30):
            model["odd"](torch.randn(10, 4))
            model["fine"](torch.randn(10, 4))
        model["odd"].calls = -100  # outputs are ordinary again; the layer stays given up
        model["odd"](torch.randn(10, 4))
        assert counts(harvested(recorder)) == {("odd", "train"): 20, ("fine", "train"): 300}
    first, last = warnings_of(caplog)
    assert first.startswith("layer odd: a forward is left out")
    assert last.startswith("layer odd: not recorded any more in train")


def test_a_phase_whose_outputs_stay_unknown_costs_only_itself(caplog: pytest.LogCaptureFixture) -> None:
    # As an auxiliary head that gives nothing in evaluation, which a validation before the training calls first.
    class Auxiliary(nn.Linear):
        def forward(self, input: Tensor) -> Any:
            return super().forward(input) if self.training else None

    model = Auxiliary(4, 3).eval()
    with recording(model) as recorder:
        for _ in range(20):
            model(torch.randn(5, 4))
        model.train()
        model(torch.randn(5, 4))
        assert counts(harvested(recorder)) == {("Auxiliary", "train"): 5}
    first, last = warnings_of(caplog)
    assert "a forward is left out" in first
    assert "not recorded any more in eval" in last


@pytest.mark.parametrize(
    "wrap",
    [
        lambda output: (output, None),
        lambda output: {"loss": output.sum(), "x": output},
        lambda output: [torch.arange(3), output],
    ],
)
def test_the_rows_in_a_structure_are_found(wrap: Callable[[Tensor], Any]) -> None:
    model = Odd(wrap)
    with recording(model) as recorder:
        for _ in range(5):
            model(torch.randn(10, 4))
        assert counts(harvested(recorder)) == {("Odd", "train"): 50}


def test_a_layer_is_given_up_also_where_few_of_its_forwards_are_due(caplog: pytest.LogCaptureFixture) -> None:
    model = Odd(lambda output: None)
    with recording(model, log_interval=3) as recorder:
        for _ in range(60):
            model(torch.randn(10, 4))
        assert counts(harvested(recorder)) == {("Odd", "train"): 10}
    first, last = warnings_of(caplog)
    assert "a forward is left out" in first
    assert "not recorded any more" in last


def test_an_unknown_output_now_and_then_costs_only_itself(caplog: pytest.LogCaptureFixture) -> None:
    layer = Odd(lambda output: output[:, :2])
    with recording(layer) as recorder:
        for call in range(40):
            layer.calls = 0 if call % 4 == 0 else 9  # three in a row fail, and the fourth does not
            layer(torch.randn(10, 4))
        assert counts(harvested(recorder)) == {("Odd", "train"): 100}
    assert len(warnings_of(caplog)) == 1


@pytest.mark.parametrize("dimension", [nn.Linear(4, 3), nn.Conv2d(1, 3, 1), nn.LSTM(4, 3)])
def test_no_output_of_any_layer_kind_makes_the_hook_raise(
    dimension: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    for garbage in (None, 3, "x", (), [], {}, (None,), torch.zeros(()), torch.zeros(2), object()):
        with recording(dimension) as recorder:
            for hook in dimension._forward_hooks.values():
                assert hook(dimension, (), garbage) is None
            assert all(moments.n == 0 for moments in harvested(recorder).values())
    assert warnings_of(caplog)


@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp"])
def test_function_transforms_work_and_are_no_observation(transform: str, caplog: pytest.LogCaptureFixture) -> None:
    model = build("mlp").eval()
    parameters = dict(model.named_parameters())
    x = inputs("mlp", 10)

    def loss(weights: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, weights, (x,)).square().sum()

    def run() -> Any:
        if transform == "vmap":
            return torch.func.vmap(model)(x)
        if transform == "grad":
            return torch.func.grad(loss)(parameters)["0.weight"]
        return torch.func.jvp(loss, (parameters,), (parameters,))[1]

    expected = run()
    with recording(model) as recorder:
        assert torch.equal(run(), expected)
        assert torch.equal(run(), expected)
        assert recorder.harvest(end_of_window=True) == {}
        model(x)
        assert set(counts(harvested(recorder)).values()) == {10}
    (said,) = warnings_of(caplog)
    assert "torch.func transforms" in said


def test_tensors_without_values_are_no_observation() -> None:
    model = build("mlp").eval()
    with recording(model) as recorder:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            model(mode.from_tensor(inputs("mlp", 10)))
        model.to("meta")(inputs("mlp", 10).to("meta"))
        assert recorder.harvest(end_of_window=True) == {}
        model.to_empty(device="cpu").load_state_dict(build("mlp").state_dict())
        model(inputs("mlp", 10))
        assert set(counts(harvested(recorder)).values()) == {10}


def test_an_interrupted_forward_costs_its_layer_and_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    fold = Accumulator._slot

    def interrupt(self: Accumulator) -> int:
        raise KeyboardInterrupt

    with recording(model) as recorder:
        model(torch.randn(10, 4))
        with monkeypatch.context() as patch:
            patch.setattr(Accumulator, "_slot", interrupt)
            with pytest.raises(KeyboardInterrupt):  # between the sum and its count
                model(torch.randn(5000, 4))
        assert Accumulator._slot is fold
        model(torch.randn(40, 4))  # an interrupt may be caught, as in a notebook; that mends nothing
        recorded = harvested(recorder)
        assert counts(recorded) == {("1", "train"): 50}
        assert ["layer 0: an interrupted forward" in message for message in warnings_of(caplog)] == [True]
        model(torch.randn(30, 4))  # and goes on
        assert set(counts(harvested(recorder)).values()) == {30}


def test_a_harvest_from_inside_a_hook_does_not_lock_up(monkeypatch: pytest.MonkeyPatch) -> None:
    # As a signal handler that closes the tracker may do.
    layer = nn.Linear(4, 4)
    with recording(layer) as recorder:
        harvests = []

        plain = TokenAdapter.rows

        def interrupted(self: TokenAdapter, *given: Any) -> Tensor:
            harvests.append(recorder.harvest(end_of_window=True))
            return plain(self, *given)

        monkeypatch.setattr(TokenAdapter, "rows", interrupted)
        for batch in (10, 20, 30):
            layer(torch.randn(batch, 4))
        harvests.append(recorder.harvest(end_of_window=True))
        assert [counts(named(recorder, harvest)) for harvest in harvests] == [
            {},
            *({("Linear", "train"): batch} for batch in (10, 20, 30)),
        ]


def test_hooks_that_cannot_all_be_added_are_all_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    before = attributes(model)
    layers = select_layers(model)
    monkeypatch.setattr(nn.Module, "register_forward_hook", failing_on_second())
    with pytest.raises(RuntimeError, match="no more hooks"):
        Recorder(layers, RecorderOptions())
    monkeypatch.undo()
    assert attributes(model) == before


def failing_on_second() -> Callable[[nn.Module, Any], RemovableHandle]:
    original, calls = nn.Module.register_forward_hook, []

    def register(self: nn.Module, hook: Any) -> RemovableHandle:
        calls.append(hook)
        if len(calls) > 1:
            raise RuntimeError("no more hooks")
        return original(self, hook)

    return register


# --- other watchers ------------------------------------------------------------------------------------


def test_a_counter_of_operations_sees_those_of_the_model_alone() -> None:
    model = build("cnn")
    x = inputs("cnn", 4)

    def operations() -> tuple[int, int]:
        class Counter(TorchDispatchMode):
            count = 0

            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                self.count += 1
                return func(*args, **(kwargs or {}))

        with Counter() as counter, FlopCounterMode(display=False) as flops:
            model(x)
        return counter.count, flops.get_total_flops()

    untracked = operations()
    with recording(model) as recorder:
        assert operations()[1] == untracked[1]
        assert counts(harvested(recorder))["0", "train"] == 4 * 64


def test_graphs_of_others_hold_nothing_of_ours(caplog: pytest.LogCaptureFixture) -> None:
    model = build("mlp").eval()
    x = inputs("mlp", 10)
    untracked = [node.target for node in make_fx(model)(x).graph.nodes]
    with recording(model, layers=["*"]) as recorder:
        assert [node.target for node in make_fx(model)(x).graph.nodes] == untracked
        for _ in range(12):
            torch.fx.symbolic_trace(nn.Sequential(model, Untypical()))
        assert recorder.harvest(end_of_window=True) == {}
        model(x)
        assert set(counts(harvested(recorder)).values()) == {10}
    assert not caplog.records


class Untypical(nn.Linear):
    """A subclass, into which symbolic tracing goes."""

    def __init__(self) -> None:
        super().__init__(3, 3)


# --- tracing ------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_traced_model_is_no_observation() -> None:
    model = build("mlp").eval()
    x = inputs("mlp", 10)
    with recording(model) as recorder:
        traced = torch.jit.trace(model, x, check_trace=False)
        assert recorder.harvest(end_of_window=True) == {}
        assert torch.equal(traced(x), model(x))
        assert set(counts(harvested(recorder)).values()) == {10}


def test_giving_a_layer_up_waits_for_no_forward_and_is_not_undone_by_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The sender hears from the store that a layer is refused while a hook records it."""
    model = nn.Linear(3, 2)
    reading, go_on = threading.Event(), threading.Event()
    read = Reader.read

    def slow(self: Reader, *args: Any) -> Any:
        reading.set()
        assert go_on.wait(30)
        return read(self, *args)

    with recording(model) as recorder:
        monkeypatch.setattr(Reader, "read", slow)
        forward = threading.Thread(target=model, args=(torch.randn(4, 3),), daemon=True)
        forward.start()
        assert reading.wait(30)
        refusing = threading.Thread(target=recorder.give_up, args=(0, "others have another width"), daemon=True)
        refusing.start()
        refusing.join(30)
        assert not refusing.is_alive()
        go_on.set()
        forward.join(30)
        model(torch.randn(5, 3))
        (moments,) = harvested(recorder).values()
        assert moments.n == 4
    assert "layer Linear is not recorded: others have another width" in caplog.text
    caplog.clear()
