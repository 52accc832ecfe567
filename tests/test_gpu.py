"""What only a CUDA device shows: no synchronisation in a hook, and what CUDA graphs record.

Each has a twin on the CPU, where the same code runs: the accumulator's branch-free path in test_accumulator, masks
and choices in test_rows, the ways to train in test_ways_to_train, the compiler in test_compiled.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from delve_ray.compiled import has_effects
from delve_ray.layers import RowOptions
from delve_ray.masks import check_mask
from tests.helpers import assert_exact, build, harvested, inputs, recording

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@contextmanager
def never_synchronising() -> Iterator[None]:
    """Any operation inside that waits for the device is an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["mlp", "cnn", "lstm"])
@pytest.mark.parametrize("method", ["channelwise", "mean", "max", "median"])
def test_a_hook_does_not_wait_for_the_device(name: str, method: str, caplog: pytest.LogCaptureFixture) -> None:
    model = build(name).cuda().eval()
    batches = [inputs(name, 32, seed).cuda() for seed in range(3)]
    with recording(model, rows=RowOptions(method), sample_fraction=0.5, max_samples=200) as recorder:
        with never_synchronising():
            for batch in batches:
                model(batch)
        assert all(moments.n > 0 for moments in harvested(recorder).values())
    assert [record.message for record in caplog.records if record.levelno >= logging.WARNING] == []


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_mask_does_not_wait_for_the_device(device: str) -> None:
    model = nn.Linear(8, 6).cuda()
    x = torch.randn(4, 5, 8).cuda()
    valid = torch.arange(5)[None] < torch.tensor([5, 2, 1, 4])[:, None]
    mask = check_mask(valid.to(device))
    rows = RowOptions(timeseries_method="last_timestep")
    with recording(model) as every, recording(model, rows=rows) as last:
        with every.masks.use(mask), last.masks.use(mask), never_synchronising():
            output = model(x)
        (steps,), (lasts,) = harvested(every).values(), harvested(last).values()
    assert_exact(steps, output.cpu()[valid])
    assert_exact(lasts, output.cpu()[torch.arange(4), torch.tensor([4, 1, 0, 3])])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_and_a_gradient_scaler(dtype: torch.dtype) -> None:
    model = build("cnn").cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**100)
    kept: list[Tensor] = []
    handle = model[0].register_forward_hook(lambda m, a, output: kept.append(output.detach().clone()))  # type: ignore[index]
    with recording(model) as recorder:
        for step in range(3):
            with torch.autocast("cuda", dtype=dtype):
                loss = model(inputs("cnn", 16, step).cuda()).float().square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        recorded = harvested(recorder)
    handle.remove()
    assert kept[0].dtype == dtype
    assert_exact(recorded["0", "train"], torch.cat(kept).movedim(1, -1).reshape(-1, 8))


def test_work_on_several_streams() -> None:
    models = nn.ModuleList([nn.Linear(512, 512), nn.Linear(512, 512)]).cuda()
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    outputs: list[list[Tensor]] = [[], []]
    with recording(models) as recorder:
        for seed in range(20):
            for index, model in enumerate(models):
                with torch.cuda.stream(streams[(index + seed) % 2]):
                    x = torch.randn(4096, 512, device="cuda", generator=torch.Generator("cuda").manual_seed(seed))
                    outputs[index].append(model(x))
        recorded = harvested(recorder)
    torch.cuda.synchronize()
    for index in range(2):
        assert_exact(recorded[str(index), "train"], torch.cat(outputs[index]))


def test_a_mask_on_the_device_of_rows_on_the_host() -> None:
    model = nn.Linear(8, 6)
    x = torch.randn(4, 5, 8)
    valid = torch.arange(5)[None] < torch.tensor([5, 2, 1, 4])[:, None]
    with recording(model) as recorder, recorder.masks.use(check_mask(valid.cuda())):
        output = model(x)
        (moments,) = harvested(recorder).values()
    assert_exact(moments, output[valid])


def test_a_captured_forward_is_not_recorded_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4)).cuda()
    x = torch.randn(16, 8, device="cuda")
    with recording(model) as recorder:
        model(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = model(x)
        for _ in range(3):
            graph.replay()
        assert {moments.n for moments in harvested(recorder).values()} == {16}
    assert torch.equal(captured, model(x))
    assert ["captured into a CUDA graph" in record.message for record in caplog.records] == [True]


@pytest.mark.slow
@pytest.mark.skipif(not has_effects(torch.__version__), reason="this torch's compiler calls no operators for an effect")
def test_graphs_of_the_compiler_leave_the_recording_outside() -> None:
    torch.compiler.reset()
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4)).cuda()
    with recording(model) as recorder, torch.no_grad():
        compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
        for _ in range(6):
            torch.compiler.cudagraph_mark_step_begin()
            compiled(torch.randn(16, 8, device="cuda"))
        assert {moments.n for moments in harvested(recorder).values()} == {6 * 16}
    torch.compiler.reset()
