"""The kernels between which `delve_ray.products` chooses, on this machine: microseconds of each, for the shapes given.

`python -m tests.benchmarks.products` prints the table; its medians are those of calls that take turns.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from delve_ray.products import onednn, product_blocks
from tests.benchmarks.report import markdown_cells
from tests.benchmarks.timing import alternate, calls_lasting, median

SHAPES = ((8192, 32), (8192, 64), (2048, 128), (1024, 256), (1024, 512), (1024, 1024), (512, 4096))
"""(observations, features)."""
_SAMPLE_S = 0.005


def variants(x_ND: Tensor) -> dict[str, Callable[[], object]]:
    """Each way to the upper triangle of XᵀX: whole or in blocks, by torch.mm or by oneDNN, and turning the rows."""
    x_DN = x_ND.t().contiguous()
    features = x_ND.shape[1]
    out = torch.empty(features, features)
    linear = onednn()
    found: dict[str, Callable[[], object]] = {
        "torch.mm": lambda: torch.mm(x_ND.t(), x_ND, out=out),
        "torch.mm, blocks": lambda: [
            torch.mm(x_ND.t()[first : first + height], x_ND[:, first:])
            for first, height, _ in product_blocks(features, fast=False)
        ],
        "turn": lambda: x_DN.copy_(x_ND.t()),
    }
    if linear is not None:
        found["oneDNN"] = lambda: linear(x_DN, x_DN, None, "none", [], "")
        found["oneDNN, blocks"] = lambda: [
            linear(x_DN[first : first + height], x_DN[first:], None, "none", [], "")
            for first, height, _ in product_blocks(features, fast=True)
        ]
    return found


def measure(observations: int, features: int, samples: int) -> dict[str, float]:
    """Median seconds of one call of each variant."""
    x_ND = torch.randn(observations, features, generator=torch.Generator().manual_seed(0))
    calls = variants(x_ND)
    count = calls_lasting(_SAMPLE_S, calls["torch.mm"])

    def repeated(call: Callable[[], object]) -> Callable[[int], object]:
        return lambda _: [call() for _ in range(count)]

    found = alternate(
        {name: repeated(call) for name, call in calls.items()}, calls=samples, block=1, warmup=max(2, samples // 10)
    )
    return {name: median(seconds).value / count for name, seconds in found.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.products", description=__doc__)
    parser.add_argument("--samples", type=int, default=30, help="samples of each variant (30)")
    options = parser.parse_args()
    lines: list[list[str]] = []
    headings: list[str] = []
    for observations, features in SHAPES:
        found = measure(observations, features, options.samples)
        headings = ["N", "D", *found]
        lines.append([str(observations), str(features), *(f"{1e6 * seconds:.0f}" for seconds in found.values())])
    print(markdown_cells(headings, lines))


if __name__ == "__main__":
    main()
