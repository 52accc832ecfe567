"""`python -m tests.benchmarks.precision`: what each `precision` costs in accuracy on a GPU, as a table in Markdown."""

from __future__ import annotations

import torch
from torch import Tensor

from delve_ray.device_accumulator import DeviceAccumulator
from delve_ray.workspace import Workspace

_OBSERVATIONS = 100_000
_BATCH = 10_000
_FEATURES = 512
SPECTRA = {"white": 0.0, "i⁻¹": 1.0, "i⁻²": 2.0}
"""Eigenvalues i^-p by name."""
OFFSETS = (0.0, 100.0, 1e4)
"""Of the mean from zero, in spreads."""


def draw(power: float, offset: float) -> Tensor:
    """Normal rows with these eigenvalues along random directions."""
    generator = torch.Generator("cuda").manual_seed(3)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device="cuda", dtype=torch.float64)

    values = torch.arange(1, _FEATURES + 1, device="cuda", dtype=torch.float64) ** -power
    directions, _ = torch.linalg.qr(normal(_FEATURES, _FEATURES))
    rows = (normal(_OBSERVATIONS, _FEATURES) * values.sqrt()) @ directions.T
    return (rows + offset * rows.std(0).mean()).float()


def covariance(rows: Tensor, name: str) -> Tensor:
    """As it is recorded with this precision."""
    exact = torch.float64 if name == "float64" else torch.float32
    total = DeviceAccumulator(_FEATURES, Workspace(rows.device), exact, name)
    for batch in rows.split(_BATCH):
        total.add(batch)
    return torch.from_numpy(total.moments().covariance()).to(rows.device)


def two_pass(rows: Tensor) -> Tensor:
    """The same in float64."""
    wide = rows.double()
    wide -= wide[0].clone()
    wide -= wide.mean(0)
    return wide.T @ wide / len(wide)


def main() -> None:
    """Print the table: errors in multiples of λ1, and of the eigenvalue itself in the smaller half of the spectrum."""
    print("| eigenvalues | mean / spread | precision | covariance | eigenvalues | smaller half, relative |")
    print("| --- | --- | --- | --- | --- | --- |")
    for shape, power in SPECTRA.items():
        for offset in OFFSETS:
            rows = draw(power, offset)
            reference = two_pass(rows)
            expected = torch.linalg.eigvalsh(reference)
            for name in ("float64", "float32", "tf32", "bfloat16"):
                found = covariance(rows, name)
                values = torch.linalg.eigvalsh(found)
                largest = float(expected[-1])
                entry = float((found - reference).abs().max()) / largest
                value = float((values - expected).abs().max()) / largest
                half = slice(0, _FEATURES // 2)
                tail = float(((values - expected)[half] / expected[half]).abs().max())
                print(f"| {shape} | {offset:g} | {name} | {entry:.0e} | {value:.0e} | {tail:.0e} |", flush=True)


if __name__ == "__main__":
    main()
