"""How exact sketches of wide layers are, and what they cost: `python -m tests.benchmarks.sketching accuracy|cost`.

accuracy: sketches against the full float64 computation on the same float32 rows, twice as many as there are features.
cost: each width in a fresh process, whose peak of memory is its own. The full form is given by its formula, as it does
not fit.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from delve_ray import spectrum
from delve_ray.moments import F64
from delve_ray.nystrom import head
from delve_ray.sketch import SketchTotal, sketch_size
from delve_ray.sketch_accumulator import SketchAccumulator
from delve_ray.workspace import Workspace

_ROWS = 1024
_MIB = 1 << 20
_THRESHOLD = 0.99


def spectra(features: int) -> Iterator[tuple[str, F64]]:
    """Names and eigenvalues of the covariances that rows are drawn from."""
    ranks = np.arange(1, features + 1, dtype=np.float64)
    yield "i^-1", 1 / ranks
    yield "i^-1.5", ranks**-1.5
    yield "i^-2", ranks**-2.0
    yield "rank 50 + noise", np.where(ranks <= 50, 1 / ranks, 1e-5)


def rows_of(eigenvalues: F64, rotation: torch.Tensor, seed: int) -> torch.Tensor:
    """Gaussian rows of a covariance with these eigenvalues and rotated axes, 2d of them, float32."""
    generator = torch.Generator().manual_seed(seed)
    white = torch.randn(2 * len(eigenvalues), len(eigenvalues), generator=generator)
    return (white * torch.from_numpy(eigenvalues).sqrt().float()) @ rotation


def accuracy(widths: Sequence[int], sizes: Sequence[int]) -> None:
    """Print a table of errors."""
    print("| d | spectrum | k | λ1 | λ10 | λ100 | unseen | k(0.99)/d | interval |")
    print("|---|---|---|---|---|---|---|---|---|")
    for features in widths:
        generator = torch.Generator().manual_seed(features)
        rotation = torch.linalg.qr(torch.randn(features, features, generator=generator))[0]
        for name, eigenvalues in spectra(features):
            rows = rows_of(eigenvalues, rotation, seed=1)
            exact = torch.cov(rows.double().T, correction=0).numpy()
            own = spectrum.eigenvalues(exact)
            true = spectrum.saturation(own, _THRESHOLD)
            for size in sizes:
                buffer = _sketched(rows, size)
                found = head(buffer[features:], features, float(len(rows)), samples=len(rows))
                low, high, reached = found.dimensionality(_THRESHOLD)
                errors = [_relative_error(found.eigenvalues, own, rank) for rank in (1, 10, 100)]
                print(
                    f"| {features} | {name} | {size} | {' | '.join(errors)} | {found.unseen / found.trace:.2%} | "
                    f"{true:.4f} | {low / features:.4f} … {high / features:.4f}{'' if reached else ' (not reached)'} |",
                    flush=True,
                )


def _relative_error(found: F64, own: F64, rank: int) -> str:
    if rank > found.size:
        return "–"
    return f"{1 - found[rank - 1] / own[rank - 1]:.1e}"


def _sketched(rows: torch.Tensor, size: int) -> F64:
    accumulator = SketchAccumulator(rows.shape[1], size, Workspace(torch.device("cpu")))
    for batch in rows.split(_ROWS):
        accumulator.add(batch)
    buffer = np.empty(accumulator.moments_size)
    accumulator.drain_into(buffer)
    return buffer


def cost(features: int, size: int, batches: int) -> None:
    """Print what one width takes: run in a process of its own."""
    before = _peak()
    buffer, of_worker = _worker(features, size, batches)
    worker = _peak() - before
    total, n = SketchTotal(features, size), _ROWS * (batches + 1)
    mean, packed = buffer[:features], buffer[features:]
    total.add(n, mean, packed)
    merged = _seconds(lambda: total.add(n, mean, packed))
    folded = _seconds(total.result)
    published = _seconds(lambda: head(total.result()[2], features, 2.0 * n, samples=2 * n))
    sizes = [8 * sketch_size(features, size), worker, _peak() - before, 4 * features * (features + 1)]
    times = [*of_worker, merged, folded, published]
    cells = [f"{features:,}", f"{size}", *(f"{each:.2f}" for each in times), *(f"{each / _MIB:,.0f}" for each in sizes)]
    print(f"| {' | '.join(cells)} |", flush=True)


def _worker(features: int, size: int, batches: int) -> tuple[F64, tuple[float, float]]:
    """What a worker sends, and the seconds of a batch and of packing."""
    rows = torch.randn(_ROWS, features)
    accumulator = SketchAccumulator(features, size, Workspace(torch.device("cpu")))
    accumulator.add(rows)  # the first one makes Ω and takes the memory
    times = [_seconds(lambda: accumulator.add(rows)) for _ in range(batches)]
    buffer = np.empty(accumulator.moments_size)
    drained = _seconds(lambda: accumulator.drain_into(buffer))
    return buffer, (float(np.median(times)), drained)


def _seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _peak() -> int:
    """The most memory that this process has had, bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=("accuracy", "cost", "one"))
    parser.add_argument("--widths", type=int, nargs="+")
    parser.add_argument("--sizes", type=int, nargs="+")
    parser.add_argument("--batches", type=int, default=5)
    options = parser.parse_args()
    if options.part == "accuracy":
        accuracy(options.widths or (2048, 4096), options.sizes or (128, 256, 512, 1024))
        return
    widths, sizes = options.widths or (16384, 65536), options.sizes or (1024,)
    if options.part == "one":
        cost(widths[0], sizes[0], options.batches)
        return
    print("| d | k | batch, s | pack, s | merge, s | fold, s | publish, s | sketch, MiB | ", end="")
    print("peak of a worker, MiB | peak of all, MiB | triangle, MiB |")
    print("|---|---|---|---|---|---|---|---|---|---|---|", flush=True)
    for width in widths:
        for size in sizes:
            command = [sys.executable, "-m", "tests.benchmarks.sketching", "one", "--batches", str(options.batches)]
            subprocess.run([*command, "--widths", str(width), "--sizes", str(size)], check=True)


if __name__ == "__main__":
    main()
