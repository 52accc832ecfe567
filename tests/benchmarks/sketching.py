"""How exact sketches of wide layers are, and what they cost: `python -m tests.benchmarks.sketching accuracy|real|cost`.

accuracy: sketches against the full float64 computation on the same float32 rows, twice as many as there are features.
real: the same of layers of networks on real data: the digits and the photographs of scikit-learn.
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
from typing import Any

import numpy as np
import torch
from torch import nn

from delve_ray import spectrum
from delve_ray.moments import F64
from delve_ray.nystrom import head
from delve_ray.sketch import SketchTotal, sketch_size
from delve_ray.sketch_accumulator import SketchAccumulator
from delve_ray.workspace import Workspace
from tests.models import known

_ROWS = 1024
_MIB = 1 << 20
_THRESHOLDS = (0.99, 0.9)


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
    _print_heads("spectrum", _THRESHOLDS[:1])
    for features in widths:
        generator = torch.Generator().manual_seed(features)
        rotation = torch.linalg.qr(torch.randn(features, features, generator=generator))[0]
        for name, eigenvalues in spectra(features):
            _compare(name, rows_of(eigenvalues, rotation, seed=1), sizes, _THRESHOLDS[:1])


def real(sizes: Sequence[int]) -> None:
    """Print a table of errors, of layers on real data."""
    _print_heads("layer", _THRESHOLDS)
    for name, rows in layers():
        _compare(name, rows, [size for size in sizes if 2 * (size + 1) < rows.shape[1]], _THRESHOLDS)


def _print_heads(what: str, thresholds: Sequence[float]) -> None:
    heads = ["d", what, "k", "λ1", "λ10", "λ100", "unseen"]
    heads += [head for threshold in thresholds for head in (f"k({threshold:g})/d", "interval")]
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}", flush=True)


def _compare(name: str, rows: torch.Tensor, sizes: Sequence[int], thresholds: Sequence[float]) -> None:
    """Print a row for each size, against the full computation."""
    features = rows.shape[1]
    own = spectrum.eigenvalues(torch.cov(rows.double().T, correction=0).numpy())
    for size in sizes:
        buffer = _sketched(rows, size)
        found = head(buffer[features:], features, float(len(rows)), samples=len(rows))
        cells = [
            f"{features}",
            name,
            f"{size}",
            *(_relative_error(found.eigenvalues, own, rank) for rank in (1, 10, 100)),
        ]
        cells.append(f"{found.unseen / found.trace:.2%}")
        for threshold in thresholds:
            low, high, reached = found.dimensionality(threshold)
            cells.append(f"{spectrum.saturation(own, threshold):.4f}")
            cells.append(f"{low / features:.4f} … {high / features:.4f}{'' if reached else ' (not reached)'}")
        print(f"| {' | '.join(cells)} |", flush=True)


# --- layers on real data ---------------------------------------------------------------------------------------


def layers() -> Iterator[tuple[str, torch.Tensor]]:
    """Names and rows of layers: of a perceptron before and after training, and of a pretrained network."""
    images, labels = digits()
    for width in (2048, 4096):
        torch.manual_seed(width)
        model = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))
        yield "digits, ReLU, untrained", hidden(model, images)
        train(model, images, labels)
        yield "digits, ReLU, trained", hidden(model, images)
    yield "photographs, EfficientNet-Lite0, `_conv_head`", head_of_efficientnet()


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """The digits and their labels, each also moved by a pixel in all eight directions: 16,173 of them."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32) / 8 - 1
    moved = [images.roll((down, right), (1, 2)) for down in (-1, 0, 1) for right in (-1, 0, 1)]
    return torch.cat(moved).flatten(1), torch.tensor(found.target).repeat(len(moved))


def train(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> None:
    """Five epochs of Adam."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(5):
        for batch in torch.randperm(len(images)).split(128):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()


@torch.no_grad()
def hidden(model: nn.Sequential, images: torch.Tensor) -> torch.Tensor:
    """The activations of the hidden layer."""
    return torch.cat([model[:2](batch) for batch in images.split(1024)])


@torch.no_grad()
def head_of_efficientnet() -> torch.Tensor:
    """Each position of the last feature map, of 224×224 pieces of two photographs."""
    from sklearn.datasets import load_sample_images

    model: Any = known.efficientnet().eval()
    kept: list[torch.Tensor] = []
    handle = model._conv_head.register_forward_hook(
        lambda module, inputs, output: kept.append(output.permute(0, 2, 3, 1).flatten(0, 2))
    )
    mean, deviation = (torch.tensor(each).view(3, 1, 1) for each in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    for photograph in load_sample_images().images:
        whole = (torch.tensor(photograph).permute(2, 0, 1) / 255 - mean) / deviation
        pieces = whole.unfold(1, 224, 29).unfold(2, 224, 32).permute(1, 2, 0, 3, 4).flatten(0, 1)
        for batch in pieces.split(16):
            model(batch)
    handle.remove()
    return torch.cat(kept)


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
    parser.add_argument("part", choices=("accuracy", "real", "cost", "one"))
    parser.add_argument("--widths", type=int, nargs="+")
    parser.add_argument("--sizes", type=int, nargs="+")
    parser.add_argument("--batches", type=int, default=5)
    options = parser.parse_args()
    if options.part == "accuracy":
        accuracy(options.widths or (2048, 4096), options.sizes or (128, 256, 512, 1024))
        return
    if options.part == "real":
        real(options.sizes or (128, 256, 512, 1024))
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
