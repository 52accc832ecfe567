"""`python -m tests.benchmarks.cuda`: what recording costs on a GPU, as tables in Markdown.

Times on the device are taken while the host is ahead: the queue is filled behind a long pause, so that the host's own
speed does not show in them. Variants take turns; medians, with quartiles behind them.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from delve_ray.recorder import Recorder, RecorderOptions
from delve_ray.selection import select_layers
from tests.benchmarks.models import WORKLOADS, Workload

SHAPES = (
    (128, 256),
    (128, 512),
    (2560, 256),
    (8192, 1024),
    (8192, 4096),
    (64, 64, 32, 32),
    (256, 256, 14, 14),
    (256, 64, 56, 56),
)
_ROUNDS = 9
_PAUSE_CYCLES = 40_000_000
"""Some 20 ms, in which the host fills the queue."""
_QUEUE = 128
"""Forwards in the queue: several groups, also of layers whose rows are staged."""
_STEPS = 20


class Rows(nn.Linear):
    """A Linear layer whose output is its input: nothing but the hook is measured."""

    def forward(self, rows: Tensor) -> Tensor:
        return rows


class Maps(nn.Conv2d):
    """The same with a feature map."""

    def forward(self, maps_NCHW: Tensor) -> Tensor:
        return maps_NCHW


@contextmanager
def recorded(model: nn.Module, products: str = "float32") -> Iterator[Recorder]:
    """A recorder on every layer."""
    recorder = Recorder(select_layers(model), RecorderOptions(products=products))
    recorder.start()
    try:
        yield recorder
    finally:
        recorder.close()


def side_streams(recorder: Recorder | None) -> list[torch.cuda.Stream]:
    """Where staged rows are reduced."""
    spaces = [] if recorder is None else recorder._workspaces.values()
    return [space.lane.stream for space in spaces if space.lane is not None]


def device_seconds(call: Callable[[], object], recorder: Recorder | None = None) -> tuple[float, float]:
    """Per call: seconds that the current stream is busy, and seconds until the side streams are done as well."""
    begin, end, all_done = (torch.cuda.Event(enable_timing=True) for _ in range(3))
    stream = torch.cuda.current_stream()
    torch.cuda.synchronize()
    torch.cuda._sleep(_PAUSE_CYCLES)
    begin.record()
    for side in side_streams(recorder):
        side.wait_event(begin)
    for _ in range(_QUEUE):
        call()
    end.record()
    for side in side_streams(recorder):
        stream.wait_stream(side)
    all_done.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3 / _QUEUE, begin.elapsed_time(all_done) / 1e3 / _QUEUE


def host_seconds(call: Callable[[], object]) -> float:
    """Per call: seconds that the calling thread is busy."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(_QUEUE):
        call()
    seconds = (time.perf_counter() - start) / _QUEUE
    torch.cuda.synchronize()
    return seconds


def spread(values: list[float]) -> str:
    """Median and quartiles in microseconds."""
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle * 1e6:.1f} ({low * 1e6:.1f}–{high * 1e6:.1f})"


def recording_row(shape: tuple[int, ...], dtype: torch.dtype) -> str:
    """One line: the recorder against one bare float32 product of the same rows."""
    output = (torch.randn(shape, device="cuda") + 0.5).to(dtype)
    layer = (Rows(1, shape[1]) if len(shape) == 2 else Maps(1, shape[1], 1)).cuda()
    rows_ND = (output if output.dim() == 2 else output.movedim(1, -1).reshape(-1, shape[1])).float().contiguous()
    out = torch.empty(shape[1], shape[1], device="cuda")

    def product() -> Tensor:
        return torch.mm(rows_ND.t(), rows_ND, out=out)

    def forward() -> Tensor:
        result: Tensor = layer(output)
        return result

    bare, busy, total, hook, untracked = [], [], [], [], []
    for _ in range(_ROUNDS):
        untracked.append(host_seconds(forward))
        bare.append(device_seconds(product)[0])
        with recorded(layer) as recorder:
            for _ in range(3):
                forward()
            host_seconds(forward)  # to the middle of what is warm
            found = device_seconds(forward, recorder)
            busy.append(found[0])
            total.append(found[1])
            hook.append(host_seconds(forward) - untracked[-1])
    ratio = statistics.median(total) / statistics.median(bare)
    name = ("conv " if len(shape) == 4 else "") + "×".join(map(str, shape))
    return (
        f"| {name} | {str(dtype).removeprefix('torch.')} | {spread(bare)} | {spread(busy)} | {spread(total)} "
        f"| {ratio:.2f} | {spread(hook)} |"
    )


class _Trainer:
    """A copy of a model with its optimizer and batches."""

    def __init__(self, model: nn.Module, workload: Workload, autocast: bool) -> None:
        self.model = copy.deepcopy(model).cuda()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)
        self.batches = [(inputs.cuda(), labels.cuda()) for inputs, labels in workload.batches()]
        self.autocast = autocast

    def steps(self) -> float:
        """Mean seconds of `_STEPS` training steps."""
        torch.cuda.synchronize()
        start = time.perf_counter()
        for number in range(_STEPS):
            inputs, labels = self.batches[number % len(self.batches)]
            self.optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cuda", torch.bfloat16, enabled=self.autocast):
                loss = F.cross_entropy(self.model(inputs), labels)
            loss.backward()
            self.optimizer.step()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / _STEPS


def step_row(workload: Workload, scale: int, autocast: bool) -> str:
    """One line: training steps with and without the recorder; `scale` multiplies the batch."""
    shape = (workload.input_shape[0] * scale, *workload.input_shape[1:])
    larger = Workload(workload.name, workload.text, workload.build, shape, workload.block, workload.tokens)
    torch.manual_seed(0)
    model = workload.build()
    plain, tracked = (_Trainer(model, larger, autocast) for _ in range(2))
    without, with_recorder = [], []
    with recorded(tracked.model) as recorder:
        for trainer in (plain, tracked):
            trainer.steps()
        for _ in range(_ROUNDS):
            without.append(plain.steps())
            with_recorder.append(tracked.steps())
        layers = len(recorder.layers)
    ratio = statistics.median(with_recorder) / statistics.median(without)
    batch = "×".join(map(str, shape))
    return (
        f"| {workload.name}, {batch} | {'bfloat16 autocast' if autocast else 'float32'} | {layers} "
        f"| {spread(without)} | {spread(with_recorder)} | {ratio:.2f} |"
    )


def main() -> None:
    """Print the tables."""
    torch.backends.cuda.matmul.allow_tf32 = False
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}\n")
    print(
        "Recording alone, µs per forward. `stream`: the forward's stream; `all`: until the side stream is done too.\n"
    )
    print("| output | dtype | XᵀX, float32 | stream | all | all / XᵀX | host, per hook |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            print(recording_row(shape, dtype), flush=True)
    print("\nTraining steps, µs.\n")
    print("| model and batch | precision | layers | untracked | tracked | ratio |")
    print("| --- | --- | --- | --- | --- | --- |")
    for workload in WORKLOADS:
        for scale, autocast in ((1, False), (8, True)):
            print(step_row(workload, scale, autocast), flush=True)


if __name__ == "__main__":
    main()
