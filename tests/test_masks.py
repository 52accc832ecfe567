"""delve_ray.masks, through the tracker: padding does not count, whoever says what is padding."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from delve_ray.layers import RowOptions
from delve_ray.masks import check_mask
from delve_ray.recorder import Recorder
from delve_ray.tracker import SaturationTracker
from tests.helpers import assert_exact, assert_refused, harvested, recording

LENGTHS = torch.tensor([5, 2, 1, 4])
STEPS = 5
VALID = torch.arange(STEPS)[None] < LENGTHS[:, None]


class Tagger(nn.Module):
    """Every kind of sequence layer, and what comes behind it; batch first, or steps first."""

    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.embed = nn.Embedding(20, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first)
        self.gru = nn.GRU(8, 6, batch_first=batch_first, bidirectional=True)
        self.flat = nn.Linear(12, 7)
        self.pooler = nn.Linear(12, 5)

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Tags of all steps are computed from flattened rows, a class from the first step."""
        x = self.embed(tokens)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        states, _ = self.gru(x)
        self.flat(states.reshape(-1, 12))
        return self.pooler(states[:, 0] if self.batch_first else states[0])  # type: ignore[no-any-return]


def tokens(seed: int = 0) -> Tensor:
    return torch.randint(0, 20, (4, STEPS), generator=torch.Generator().manual_seed(seed))


def outputs(model: nn.Module, x: Tensor, valid: Tensor, *, batch_first: bool = True) -> dict[str, Tensor]:
    """What each layer puts out, by a path of its own, without the padding: rows (n, D)."""
    found: dict[str, Tensor] = {}
    plain = nn.Module.__call__

    def spy(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        result = plain(module, *args, **kwargs)
        name = next(name for name, other in model.named_modules() if other is module)
        found[name] = (result[0] if isinstance(result, tuple) else result).detach()
        return result

    nn.Module.__call__ = spy  # type: ignore[method-assign]
    try:
        model(x if batch_first else x.t())
    finally:
        nn.Module.__call__ = plain  # type: ignore[method-assign]
    rows = {}
    for name, output in found.items():
        if output.dim() == 3:
            rows[name] = (output if batch_first else output.transpose(0, 1))[valid]
        elif len(output) == valid.numel():
            rows[name] = output[(valid if batch_first else valid.t()).flatten()]
        elif name:
            rows[name] = output[valid.any(1)]
    return rows


def check(recorder: Recorder, expected: dict[str, Tensor]) -> None:
    recorded = harvested(recorder)
    assert {name for name, _ in recorded} == set(expected)
    for (name, _), moments in recorded.items():
        assert_exact(moments, expected[name])


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.uint8])
def test_padding_does_not_count(batch_first: bool, kind: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    model = Tagger(batch_first)
    expected = outputs(model, tokens(), VALID, batch_first=batch_first)
    with recording(model) as recorder:
        given = VALID if batch_first else VALID.t()
        with recorder.masks.use(check_mask(given.to(kind), batch_first=batch_first)):
            model(tokens() if batch_first else tokens().t())
        check(recorder, expected)
    assert not caplog.records


def test_the_last_valid_step_of_each_sequence() -> None:
    model = Tagger()
    with recording(model, rows=RowOptions(timeseries_method="last_timestep")) as recorder:
        with recorder.masks.use(check_mask(VALID)):
            model(tokens())
        recorded = harvested(recorder)
    last = torch.zeros_like(VALID)
    last[torch.arange(4), LENGTHS - 1] = True
    expected = outputs(model, tokens(), last)
    for name in ("embed", "attention", "gru"):
        assert_exact(recorded[name, "train"], expected[name])


def test_holes_and_empty_sequences() -> None:
    holes = torch.tensor([[0, 1, 1, 0, 1], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 1]]).bool()
    model = Tagger()
    expected = outputs(model, tokens(), holes)
    with recording(model) as recorder:
        with recorder.masks.use(check_mask(holes)):
            model(tokens())
        check(recorder, expected)
        with recorder.masks.use(check_mask(torch.zeros_like(holes))):
            model(tokens())
        assert {moments.n for moments in harvested(recorder).values()} == {0}


def test_masks_nest_and_end() -> None:
    model = nn.Linear(3, 2)
    x = torch.randn(4, STEPS, 3)
    with recording(model) as recorder:
        masks = recorder.masks

        def count() -> int:
            model(x)
            (moments,) = harvested(recorder).values()
            return moments.n

        assert count() == 20
        with masks.use(check_mask(VALID)):
            assert count() == 12
            with masks.use(check_mask(torch.ones(4, STEPS, dtype=torch.bool))):
                assert count() == 20
            with masks.use(None):
                assert count() == 20
            assert count() == 12
            with pytest.raises(KeyError), masks.use(None):
                raise KeyError
            assert count() == 12
        assert count() == 20


def test_a_packed_sequence_has_no_padding_and_needs_no_mask(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.GRU(3, 2, batch_first=True)
    x = torch.randn(4, STEPS, 3)
    with recording(model) as recorder:
        with recorder.masks.use(check_mask(VALID)):
            packed, _ = model(pack_padded_sequence(x, LENGTHS, batch_first=True, enforce_sorted=False))
        assert_exact(harvested(recorder)["GRU", "train"], packed.data)
    assert not caplog.records


def test_a_mask_whose_steps_might_be_another_dimension_does_not_fit(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Identity()
    with recording(model, layers=["Identity"]) as recorder, recorder.masks.use(check_mask(VALID)):
        model(torch.randn(4, STEPS, STEPS, 3))  # B×heads×T×D with as many heads as steps
        (moments,) = harvested(recorder).values()
    assert moments.n == 4 * STEPS * STEPS
    assert "does not fit" in caplog.text


def test_a_mask_that_does_not_fit_is_said_once_and_all_rows_count(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    with recording(model) as recorder:
        with recorder.masks.use(check_mask(VALID)):
            for _ in range(3):
                model(torch.randn(4, STEPS + 1, 3))
        assert {moments.n for moments in harvested(recorder).values()} == {3 * 24}
    assert [record.message for record in caplog.records] == [
        f"layer {name}: a mask of shape (4, 5) does not fit its rows of shape (4, 6, 2); all of them count"
        for name in ("0", "1")
    ]


def test_non_finite_padding_is_not_counted_as_a_non_finite_row() -> None:
    model = nn.Identity()
    x = torch.randn(4, STEPS, 3)
    x[1, 3] = float("nan")  # padding
    x[0, 2] = float("inf")
    with recording(model, layers=["Identity"]) as recorder:
        with recorder.masks.use(check_mask(VALID)):
            model(x)
        ((_, accumulator),) = recorder.harvest(end_of_window=True).items()
    valid = VALID.clone()
    valid[0, 2] = False
    buffer = torch.zeros(9, dtype=torch.float64).numpy()
    assert accumulator.drain_into(buffer) == (11, 1, 11.0)
    assert_exact_mean = x[valid].double().mean(0).numpy()
    assert abs(buffer[:3] - assert_exact_mean).max() < 1e-6


# --- functions of the inputs -----------------------------------------------------------------------------------


def counts(tracker: SaturationTracker) -> dict[str, int]:
    return {name: moments.n for (name, _), moments in harvested(tracker._recorder).items()}


def by_keyword(tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor | None:
    return attention_mask


def test_a_function_of_the_inputs(savefile: str) -> None:
    model = Tagger()
    with SaturationTracker(savefile, nosave=True, modules=model, mask=by_keyword) as tracker:
        model(tokens(), attention_mask=VALID)
        assert counts(tracker) == {"embed": 12, "attention": 12, "gru": 12, "flat": 12, "pooler": 4}
        model(tokens(), VALID.long())
        assert counts(tracker)["gru"] == 12
        model(tokens())
        assert counts(tracker)["gru"] == 20
        model.gru(torch.randn(4, STEPS, 8))
        assert counts(tracker) == {"gru": 20}, "nobody asks for a part of the model"
        model(tokens(), attention_mask=VALID)
        assert counts(tracker)["embed"] == 12
        with tracker.mask(VALID), tracker.mask(None):
            model.embed(tokens())
            assert counts(tracker) == {"embed": 20}
        assert len(model._forward_pre_hooks) == len(model._forward_hooks) == 1
    assert not model._forward_pre_hooks
    assert not model._forward_hooks


def test_a_forward_that_fails_takes_its_mask_with_it(savefile: str) -> None:
    model = Tagger()
    with SaturationTracker(savefile, nosave=True, modules=model, mask=by_keyword) as tracker:
        with pytest.raises(IndexError):
            model(tokens() + 100, attention_mask=VALID)
        model.embed(tokens())
        assert counts(tracker)["embed"] == 20


@pytest.mark.parametrize("result", [3, torch.ones(4, STEPS), ZeroDivisionError])
def test_a_function_that_fails_costs_the_rows_and_not_the_training(
    result: Any, savefile: str, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(*args: Any, **kwargs: Any) -> Any:
        if result is ZeroDivisionError:
            raise ZeroDivisionError
        return result

    model = Tagger()
    expected = model(tokens())
    with SaturationTracker(savefile, nosave=True, modules=model, mask=failing) as tracker:
        for _ in range(2):
            assert torch.equal(model(tokens()), expected)
        assert counts(tracker) == {}
    (record,) = [record for record in caplog.records if "mask" in record.message]
    assert "the mask function failed, and such batches are left out" in record.message


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copied_model_asks_nobody(copier: Any, savefile: str) -> None:
    model = Tagger()
    calls = []

    def asked(*args: Any, **kwargs: Any) -> None:
        calls.append(args)

    with SaturationTracker(savefile, nosave=True, modules=model, mask=asked) as tracker:
        copied = copier(model)
        assert torch.equal(copied(tokens()), model(tokens()))
        assert len(calls) == 1
        assert counts(tracker)["embed"] == 20


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("fullgraph", [True, False])
def test_a_mask_around_a_compiled_model(backend: str, fullgraph: bool, savefile: str) -> None:
    model = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 3))
    with SaturationTracker(savefile, nosave=True, modules=model) as tracker:
        compiled = torch.compile(model, backend=backend, fullgraph=fullgraph)
        for seed in range(3):
            compiled(tokens(seed))
            with tracker.mask(VALID.roll(seed, 0)):
                compiled(tokens(seed))
        assert counts(tracker) == {"0": 3 * (12 + 20), "1": 3 * (12 + 20)}


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("before", [True, False])
def test_a_function_in_a_compiled_model(backend: str, before: bool, savefile: str) -> None:
    model = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 3))
    compiled: Any = torch.compile(model, backend=backend, fullgraph=True)
    if before:
        compiled(tokens())
    with SaturationTracker(savefile, nosave=True, modules=model, mask=lambda x: x > 3) as tracker:
        expected = 0
        for seed in range(3):
            compiled(tokens(seed))
            expected += int((tokens(seed) > 3).sum())
        model[0](tokens())  # a part of it, which nobody asks for
        assert counts(tracker) == {"0": expected + 20, "1": expected}
        strict = torch.export.export(model, (tokens(),), strict=True)
        assert not [node for node in strict.graph.nodes if "delve_ray" in str(node.target)]


@pytest.mark.usefixtures("fresh_compiler")
def test_a_function_that_fails_in_a_compiled_model(savefile: str, caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 3))
    for name, function in {"3": lambda x: 3, "raises": lambda x: 1 / 0}.items():
        torch.compiler.reset()
        with SaturationTracker(savefile + name, nosave=True, modules=model, mask=function) as tracker:
            compiled: Any = torch.compile(model, backend="eager")
            for seed in range(3):
                compiled(tokens(seed))
            assert counts(tracker) == {}
    said = [record.message for record in caplog.records if record.name.startswith("delve_ray")]
    assert ["the mask function failed" in message for message in said] == [True, True]


# --- forwards that end otherwise ---------------------------------------------------------------------------------


def test_a_forward_that_never_began_takes_no_mask_back(savefile: str) -> None:
    model = Tagger()

    def failing(*args: Any) -> None:
        raise ZeroDivisionError

    handle = model.register_forward_pre_hook(failing)
    with SaturationTracker(savefile, nosave=True, modules=model, mask=by_keyword) as tracker:
        with tracker.mask(VALID):
            with pytest.raises(ZeroDivisionError):
                model(tokens())
            model.embed(tokens())
            assert counts(tracker) == {"embed": 12}, "the block's mask still holds"
        handle.remove()
        model.embed(tokens())
        assert counts(tracker) == {"embed": 20}


def test_an_interrupted_forward_leaves_its_mask_for_no_other_forward(savefile: str) -> None:
    model = Tagger()

    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    with SaturationTracker(savefile, nosave=True, modules=model, mask=by_keyword) as tracker:
        handle = model.pooler.register_forward_pre_hook(interrupted)
        for _ in range(3):
            with pytest.raises(KeyboardInterrupt):
                model(tokens(), attention_mask=VALID)
        handle.remove()
        counts(tracker)
        model(tokens())
        assert counts(tracker)["gru"] == 20
        model.embed(tokens())
        assert counts(tracker)["embed"] == 20
        assert tracker._recorder.masks._stack() == []


# --- what is no mask ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        ([[1, 0]], ["mask is a list", "not a tensor", "attention_mask", "(batch, steps)"]),
        (lambda x: x > 0, ["mask is a function", "SaturationTracker(…, mask=…)"]),
        (torch.zeros(2, 2), ["mask has dtype torch.float32", "`mask == 0`"]),
        (torch.tensor(True), ["mask has no dimension"]),
    ],
)
def test_what_is_no_mask_is_refused(mask: Any, words: list[str], savefile: str) -> None:
    with SaturationTracker(savefile, nosave=True, modules=nn.Linear(2, 2)) as tracker:
        assert_refused(lambda: tracker.mask(mask), *words)
