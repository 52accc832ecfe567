"""Peak memory of a forward hook: how far the process's resident memory rises while one output is recorded.

`python -m tests.benchmarks.memory` prints the table; each line is measured in a process of its own, which starts
with the output in memory, records it once, and asks the kernel for the highest resident size in between.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.benchmarks.report import Section, markdown_cells

TEXT = """\
How far the process's peak resident memory rises, in MiB, while one output is recorded: by the first hook, which also
makes the accumulator and scratch memory, and by later ones. At most one copy of the output and d² floats are meant to
be needed; what is below comes from reducing the output piece by piece.
"""

ROOT = Path(__file__).resolve().parent.parent.parent
FEATURE_MAP = (64, 256, 56, 56)


@dataclass(frozen=True, slots=True)
class MemoryCase:
    """An output of a layer, and the options under which it is recorded."""

    text: str
    shape: tuple[int, ...] = FEATURE_MAP
    dtype: str = "float32"
    channels_last: bool = False
    mask: bool = False
    non_finite: bool = False
    rows: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def features(self) -> int:
        """Width of a row."""
        return self.shape[1] if len(self.shape) == 4 else self.shape[-1]

    @property
    def output_bytes(self) -> int:
        """Size of the output."""
        size = {"float32": 4, "float64": 8, "bfloat16": 2}[self.dtype]
        for length in self.shape:
            size *= length
        return size

    @property
    def allowed_bytes(self) -> int:
        """One copy of the output in the products' precision, and d² floats."""
        return self.output_bytes * (4 // min(4, self.output_bytes // self.elements)) + 4 * self.features**2

    @property
    def elements(self) -> int:
        """Number of values."""
        product = 1
        for length in self.shape:
            product *= length
        return product


CASES = (
    MemoryCase("conv, channelwise"),
    MemoryCase("conv, channelwise, channels last", channels_last=True),
    MemoryCase("conv, channelwise, bfloat16", dtype="bfloat16"),
    MemoryCase("conv, channelwise, a few non-finite rows", non_finite=True),
    MemoryCase("conv, channelwise, half of the samples masked", mask=True),
    MemoryCase("conv, channelwise, sample_fraction=0.1", options={"sample_fraction": 0.1}),
    MemoryCase("conv, channelwise, max_samples=10000", options={"max_samples": 10000}),
    MemoryCase("conv, mean", rows={"conv_method": "mean"}),
    MemoryCase("conv, max", rows={"conv_method": "max"}),
    MemoryCase("conv, median", rows={"conv_method": "median"}),
    MemoryCase(
        "conv, area interpolation to 28", rows={"interpolation_strategy": "area", "interpolation_downsampling": 28}
    ),
    MemoryCase("tokens", shape=(64, 512, 1024)),
    MemoryCase("tokens, a mask", shape=(64, 512, 1024), mask=True),
    MemoryCase("tokens, last_timestep", shape=(64, 512, 1024), rows={"timeseries_method": "last_timestep"}),
    MemoryCase("wide rows", shape=(1024, 4096)),
)


def peak_bytes() -> list[dict[str, int]]:
    """Bytes of each case by which the first hook raises the peak over what was there before, and a later one does.

    The first also makes the accumulator and scratch memory, which stay.
    """
    command = [sys.executable, "-m", "tests.benchmarks.memory", "--measure"]
    result = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True, timeout=300)
    return [json.loads(line) for line in result.stdout.splitlines()]


def measure_all() -> None:
    """Print what each case takes, as JSON, from a process of its own: a fork of this one, which has torch loaded."""
    import tests.helpers  # noqa: F401

    for case in CASES:
        child = os.fork()
        if not child:
            try:
                print(json.dumps(measure(case)), flush=True)
                os._exit(0)
            finally:
                os._exit(1)
        if os.waitpid(child, 0)[1]:
            raise RuntimeError(f"{case.text} could not be measured")


def measure(case: MemoryCase) -> dict[str, int]:
    """What `measure_all` starts a process for."""
    import torch
    from torch import nn

    from delve_ray.layers import RowOptions
    from delve_ray.masks import check_mask
    from tests.helpers import recording

    output = torch.randn(case.shape, generator=torch.Generator().manual_seed(0)).to(getattr(torch, case.dtype))
    if case.channels_last:
        output = output.contiguous(memory_format=torch.channels_last)
    if case.non_finite:
        output[3, 5, 7, 1:4] = float("nan")
    layer: nn.Module = nn.Conv2d(1, case.features, 1) if len(case.shape) == 4 else nn.Linear(1, case.features)
    layer.forward = lambda given: given  # type: ignore[assignment, method-assign]
    mask = torch.arange(case.shape[0]) % 2 == 0
    if len(case.shape) == 3:
        mask = mask[:, None] | (torch.arange(case.shape[1]) % 2 == 0)
    peaks = []
    with recording(layer, rows=RowOptions(**case.rows), **case.options) as recorder:
        small = output[:1] if len(case.shape) > 2 else output[:2]
        with recording(layer):  # loads and starts what torch loads and starts lazily
            layer(small.clone())
        for _ in range(3):
            before = reset_peak()
            with recorder.masks.use(check_mask(mask) if case.mask else None):
                layer(output)
            peaks.append(status("VmHWM") - before)
    return {"first": peaks[0], "later": max(peaks[1:])}


def status(key: str) -> int:
    """A size in /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


def reset_peak() -> int:
    """Forget the highest resident size so far; returns the present one."""
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def memory_section() -> Section:
    """The table of all cases."""
    lines = []
    for case, found in zip(CASES, peak_bytes(), strict=True):
        shape = "×".join(map(str, case.shape))
        rises = (f"+{mib(found['first'])}", f"+{mib(found['later'])}")
        lines.append((f"{case.text}, {shape}", mib(case.output_bytes), *rises, mib(case.allowed_bytes)))
    headings = ("output", "MiB", "first hook", "later hooks", "one copy and d² floats")
    return Section("Memory of a hook", TEXT, markdown_cells(headings, lines))


def mib(size: float) -> str:
    """Mebibytes with one decimal.

    >>> mib(3 << 19)
    '1.5'
    """
    return f"{size / (1 << 20):.1f}"


def main() -> None:
    """Print the table, or the measurements alone."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.memory", description=__doc__)
    parser.add_argument("--measure", action="store_true", help="print the measurements alone, as JSON")
    if parser.parse_args().measure:
        measure_all()
    else:
        print(memory_section())


if __name__ == "__main__":
    main()
