"""What several tests share: references in float64, rows with a known shape of spectrum, small models."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

from delve_ray import spectrum
from delve_ray.accumulator import Accumulator
from delve_ray.device_accumulator import DeviceAccumulator
from delve_ray.errors import OptionError
from delve_ray.host_accumulator import HostAccumulator
from delve_ray.layers import RowOptions
from delve_ray.moments import Moments
from delve_ray.recorder import Harvest, Recorder, RecorderOptions
from delve_ray.selection import select_layers
from delve_ray.workspace import Workspace

F64 = npt.NDArray[np.float64]
Recorded = dict[tuple[str, str], Moments]
"""Moments by (name of the layer, name of the phase)."""

TOLERANCE = 1e-6
"""Of λ1: what the covariance may differ by from a two-pass one in float64."""


# --- rows and references -------------------------------------------------------------------------------


def float64_rows(rows: Tensor | npt.ArrayLike) -> F64:
    """Rows as float64 of shape (n, d), with every leading dimension an observation; exact for every float dtype."""
    array = rows.detach().double().cpu().numpy() if isinstance(rows, Tensor) else np.asarray(rows, dtype=np.float64)
    return array.reshape(-1, array.shape[-1])


def two_pass_covariance(rows: Tensor | npt.ArrayLike) -> F64:
    """Population covariance in float64: the mean in a first pass, the products about it in a second.

    The first row is subtracted before, so that neither pass rounds at the size of the offset, and identical
    rows have a covariance of exactly 0.
    """
    values = float64_rows(rows)
    values = values - values[0]
    centred = values - values.mean(0)
    return np.asarray(centred.T @ centred / len(values))


def random_rows(
    observations: int,
    features: int,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    offset: float = 0.0,
    scale: float = 1.0,
    decay: float = 1.0,
) -> Tensor:
    """Normal rows whose features have standard deviations from `scale` down to `scale`·`decay`, correlated.

    `offset` is the distance of the mean from zero in multiples of `scale`, the same for every seed and of
    random sign per feature. What does not fit `dtype` is rounded once, so the rows are their own reference.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(observations, features, generator=generator, dtype=torch.float64)
    rows *= torch.logspace(0.0, float(np.log10(decay)), features, dtype=torch.float64)
    rows[:, 1:] += 0.5 * rows[:, :-1]
    signs = torch.randn(features, generator=torch.Generator().manual_seed(features), dtype=torch.float64).sign()
    return ((rows + offset * signs) * scale).to(dtype)


def covariance_error(result: F64, reference: F64) -> float:
    """Largest absolute difference of two covariances, in multiples of the reference's largest eigenvalue.

    Where that eigenvalue is 0, only 0 is right: any difference is infinite.
    """
    difference = float(np.abs(result - reference).max())
    largest = float(np.linalg.eigvalsh(reference)[-1])
    if largest > 0:
        return difference / largest
    return 0.0 if difference == 0 else float("inf")


def eigenvalue_error(result: F64, reference: F64) -> float:
    """Largest difference of two spectra, each of shape (d,), in multiples of the reference's largest eigenvalue."""
    return covariance_error(np.diag(result), np.diag(reference))


def dimensionality(eigenvalues: F64, share: float) -> int:
    """The smallest k whose largest k eigenvalues have this share of their sum, 0 where the sum is 0."""
    reached = np.cumsum(eigenvalues) >= share * eigenvalues.sum() - 1e-12 * eigenvalues.sum()
    return int(np.argmax(reached)) + 1 if eigenvalues.sum() > 0 else 0


def same_dimensionality(result: F64, reference: F64, threshold: float = 0.99, slack: float = 1e-5) -> bool:
    """Whether two spectra have the same k(δ), or the reference has the result's k for a δ within `slack`.

    The slack is for shares of variance that meet δ up to rounding, as those of equal eigenvalues do.
    """
    k = spectrum.intrinsic_dimensionality(result, threshold)
    return dimensionality(reference, threshold - slack) <= k <= dimensionality(reference, min(1.0, threshold + slack))


def assert_exact(result: Moments, rows: Tensor, *, tolerance: float = TOLERANCE) -> None:
    """The moments of these rows, all of them finite: number, mean, covariance, eigenvalues and k(δ)."""
    reference, covariance = two_pass_covariance(rows), result.covariance()
    assert result.n == rows.numel() // rows.shape[-1]
    expected, eigenvalues = spectrum.eigenvalues(reference), spectrum.eigenvalues(covariance)
    largest = expected[0]
    assert np.abs(covariance - reference).max() <= tolerance * largest
    # The largest entry bounds the eigenvalues only up to d; rounding is spread out, so that d**0.5 is generous.
    assert np.abs(eigenvalues - expected).max() <= tolerance * largest * result.features**0.5
    for threshold in (0.9, 0.99):
        assert same_dimensionality(eigenvalues, expected, threshold)
    np.testing.assert_allclose(result.mean, float64_rows(rows).mean(0), rtol=1e-14, atol=1e-6 * largest**0.5)


def assert_refused(check: Callable[[], object], *words: str, error: type[Exception] = OptionError) -> None:
    """Refused with an error whose message has all of these words."""
    with pytest.raises(error) as refusal:
        check()
    assert [word for word in words if word not in str(refusal.value)] == []


# --- accumulating and recording ------------------------------------------------------------------------


def accumulator(
    features: int, *, checked: bool = True, precision: torch.dtype = torch.float32, workspace: Workspace | None = None
) -> Accumulator:
    """An accumulator on the CPU; `checked=False` takes the branch-free path that other devices take."""
    kind = HostAccumulator if checked else DeviceAccumulator
    return kind(features, workspace or Workspace(torch.device("cpu")), precision)


def accumulate(batches: Iterable[Tensor], features: int, **options: Any) -> tuple[Moments, int]:
    """Moments of batches of rows, and the number of rows that were left out."""
    total = accumulator(features, **options)
    for batch in batches:
        total.add(batch)
    return drained(total)


def drained(total: Accumulator) -> tuple[Moments, int]:
    """What an accumulator holds, through the buffer that the sender reads: moments, and rows left out."""
    features = total.features
    buffer = np.full(features + features * (features + 1) // 2, np.nan)
    n, left_out, weight = total.drain_into(buffer)
    assert weight == n
    return Moments.from_packed(n, buffer[:features], buffer[features:]), left_out


def merged(parts: Sequence[Moments]) -> Moments:
    """All parts merged from left to right."""
    total = parts[0]
    for part in parts[1:]:
        total = total.merge(part)
    return total


@contextmanager
def recording(
    modules: Any, *, rows: RowOptions | None = None, layers: Sequence[str] | None = None, **options: Any
) -> Iterator[Recorder]:
    """A recorder on every layer of a model, or on those that `layers` names; its hooks are gone at the end."""
    row_options = rows or RowOptions()
    selected = select_layers(modules, layers=layers, options=row_options)
    recorder = Recorder(selected, RecorderOptions(row_options, **options))
    try:
        recorder.start()
        yield recorder
    finally:
        recorder.close()


def named(recorder: Recorder, harvest: Harvest) -> dict[tuple[str, str], Moments]:
    """A harvest by (name of the layer, name of the phase)."""
    phases = ("train", "eval")
    return {(recorder.layers[i].name, phases[phase]): drained(part)[0] for (i, phase), part in harvest.items()}


def harvested(recorder: Recorder, *, end_of_window: bool = True) -> dict[tuple[str, str], Moments]:
    """Everything recorded since the last harvest, by (name of the layer, name of the phase)."""
    return named(recorder, recorder.harvest(end_of_window=end_of_window))


# --- models --------------------------------------------------------------------------------------------


def mlp() -> nn.Module:
    """Rows of 6 features to 3 classes, with dropout."""
    return nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Dropout(0.3), nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 3))


def cnn() -> nn.Module:
    """Images of 3×8×8 to 3 classes, with batch normalisation, an in-place activation and dropout."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 17, 3, stride=2),
        nn.ReLU(inplace=True),
        nn.Dropout2d(0.3),
        nn.Flatten(),
        nn.Linear(17 * 9, 3),
    )


class LastStep(nn.Module):
    """Sequences of 6 features to 3 classes: a stacked LSTM with dropout, and a Linear on its last step."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 20, num_layers=2, batch_first=True, dropout=0.3)
        self.head = nn.Linear(20, 3)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Logits of shape (B, 3)."""
        steps, _ = self.lstm(x_BTD)
        logits: Tensor = self.head(steps[:, -1])
        return logits


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, (6,)),
    "cnn": (cnn, (3, 8, 8)),
    "lstm": (LastStep, (5, 6)),
}
"""Small models by name: how to build one, and the shape of one sample."""


def build(name: str, seed: int = 0) -> nn.Module:
    """One of `MODELS`, with the same parameters for the same seed."""
    torch.manual_seed(seed)
    return MODELS[name][0]()


def inputs(name: str, batch: int, seed: int = 1) -> Tensor:
    """A batch for one of `MODELS`."""
    return torch.randn(batch, *MODELS[name][1], generator=torch.Generator().manual_seed(seed))
