"""The recorder alone: a hooked layer that passes given rows on, against a bare float32 product XᵀX of these rows."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from delve_ray import host_accumulator, staging
from tests.benchmarks.timing import Samples, alternate, calls_lasting
from tests.benchmarks.trackers import attach_ours

_SAMPLE_S = 0.01
"""Shortest sample, so that the clock and a single interrupt weigh little."""
_FEWEST_CALLS = 4


def whole_groups(calls: int, rows: int, features: int, device: str) -> int:
    """At least so many calls, and as many as make whole groups of the rows that are held back.

    Most calls only copy their rows, and one reduces them all: a sample with less than a group would miss it, and the
    median over such samples hide it.

    >>> whole_groups(10, 128, 256, "cpu"), whole_groups(10, 2560, 256, "cpu")
    (16, 10)
    """
    on_host = torch.device(device).type == "cpu"
    held_back = host_accumulator.stage_rows(features) if on_host else staging.stage_rows(features, 4)
    cycle = max(1, held_back // rows)
    return -(-max(_FEWEST_CALLS, calls) // cycle) * cycle


class Replay(nn.Linear):
    """A Linear layer whose output is its input: its forward hooks see prepared rows, and nothing is computed."""

    def forward(self, rows: Tensor) -> Tensor:
        return rows


class ReplayConv(nn.Conv2d):
    """The same with a feature map."""

    def forward(self, maps_NCHW: Tensor) -> Tensor:
        return maps_NCHW


@dataclass(frozen=True, slots=True)
class RecordingCase:
    """A layer's output: (N, D) of a Linear layer or (N, C, H, W) of a convolution."""

    shape: tuple[int, ...]

    @property
    def text(self) -> str:
        """Shape in words."""
        return ("conv " if len(self.shape) == 4 else "") + "×".join(map(str, self.shape))

    def output(self) -> Tensor:
        """Values with an offset, as in front of an activation."""
        return torch.randn(self.shape, generator=torch.Generator().manual_seed(2)) + 0.5

    def layer(self) -> nn.Module:
        """A layer that passes such an output on."""
        return Replay(1, self.shape[1]) if len(self.shape) == 2 else ReplayConv(1, self.shape[1], 1)

    def rows(self, output: Tensor) -> Tensor:
        """Its rows, contiguous: the bare product need not gather them."""
        return output if output.dim() == 2 else output.movedim(1, -1).reshape(-1, self.shape[1]).contiguous()


CASES = tuple(
    RecordingCase(shape)
    for shape in ((128, 256), (128, 512), (2560, 256), (256, 2048), (64, 64, 32, 32), (64, 256, 8, 8))
)


def measure_recording(case: RecordingCase, samples: int, device: str = "cpu") -> dict[str, Samples]:
    """Seconds of one hooked forward ("recorder") and of one bare product ("gemm")."""
    output = case.output().to(device)
    rows_ND = case.rows(output)
    out = torch.empty(rows_ND.shape[1], rows_ND.shape[1], device=device)
    layer = case.layer().to(device)

    def gemm() -> None:
        torch.mm(rows_ND.t(), rows_ND, out=out)

    with tempfile.TemporaryDirectory() as name, attach_ours(layer, Path(name), ("lsat",), nosave=True):
        count = whole_groups(calls_lasting(_SAMPLE_S, gemm, device), len(rows_ND), rows_ND.shape[1], device)

        def repeat_gemm(_: int) -> None:
            for _ in range(count):
                gemm()

        def repeat_recorder(_: int) -> None:
            for _ in range(count):
                layer(output)

        variants = {"recorder": repeat_recorder, "gemm": repeat_gemm}
        found = alternate(variants, calls=samples, block=1, warmup=max(2, samples // 10), device=device)
    return {name: seconds / count for name, seconds in found.items()}
