"""Small networks with a known flaw, and sound ones of the same families, trained for real and tracked.

The cases of `CHOSEN_ON` are those by which the rules' bounds were chosen, with the seeds `CHOSEN_SEEDS`; those of
`HELD_OUT` were written down before, and looked at only after the bounds stood.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
import torch.nn.functional as F
from sklearn.datasets import load_breast_cancer, load_digits, load_wine, make_circles, make_moons
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from delve_ray import SaturationTracker, read_spectra

CHOSEN_SEEDS = (0, 1, 2)
HELD_OUT_SEEDS = (10, 11, 12)

Data = tuple[Tensor, Tensor, Tensor, Tensor]


def load(name: str, seed: int) -> Data:
    """Training inputs and labels, test inputs and labels; standardised by the training part."""
    if name in ("moons", "circles"):
        make = make_moons if name == "moons" else make_circles
        inputs, labels = make(1000, noise=0.1, random_state=seed, **({"factor": 0.5} if name == "circles" else {}))
    else:
        loaded = {"digits": load_digits, "images": load_digits, "wine": load_wine, "cancer": load_breast_cancer}[name]()
        inputs, labels = loaded.data, loaded.target
    split = train_test_split(inputs, labels, test_size=0.25, random_state=seed, stratify=labels)
    train, test = (torch.tensor(part, dtype=torch.float32) for part in split[:2])
    whole = name in ("digits", "images")  # pixels share one scale
    mean, std = (train.mean(), train.std()) if whole else (train.mean(0), train.std(0))
    train, test = (train - mean) / std, (test - mean) / std
    if name == "images":
        train, test = train.view(-1, 1, 8, 8), test.view(-1, 1, 8, 8)
    return train, torch.tensor(split[2]), test, torch.tensor(split[3])


# --- families: a network of the hidden layers' widths --------------------------------------------------

CLASSES = {"digits": 10, "images": 10, "wine": 3, "cancer": 2, "moons": 2, "circles": 2}
INPUTS = {"digits": 64, "images": 1, "wine": 13, "cancer": 30, "moons": 2, "circles": 2}
Family = Callable[[str, Sequence[int]], nn.Module]


def mlp(data: str, widths: Sequence[int], act: type[nn.Module] = nn.ReLU, between: Any = None) -> nn.Module:
    """Linear layers with an activation, and what `between` makes of a width, after each hidden one."""
    layers: list[nn.Module] = []
    inputs = INPUTS[data]
    for width in widths:
        layers += [nn.Linear(inputs, width), *([between(width)] if between else []), act()]
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, CLASSES[data]))


def cnn(data: str, widths: Sequence[int], pools: Sequence[int] = (), norm: bool = False, hidden: int = 0) -> nn.Module:
    """3×3 convolutions, pooled by two after those in `pools`; the last `hidden` of the widths are Linear layers."""
    layers: list[nn.Module] = []
    inputs, side = INPUTS[data], 8
    for index, width in enumerate(widths[: len(widths) - hidden]):
        layers += [nn.Conv2d(inputs, width, 3, padding=1), *([nn.BatchNorm2d(width)] if norm else []), nn.ReLU()]
        if index in pools:
            layers.append(nn.MaxPool2d(2))
            side //= 2
        inputs = width
    layers += [nn.Flatten()] if hidden else [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    inputs *= side * side if hidden else 1
    for width in widths[len(widths) - hidden :]:
        layers += [nn.Linear(inputs, width), nn.ReLU()]
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, CLASSES[data]))


class Transformer(nn.Module):
    """An encoder over the eight rows of a digit."""

    def __init__(self, data: str, widths: Sequence[int]) -> None:
        super().__init__()
        self.embed = nn.Linear(8, widths[0])
        self.position = nn.Parameter(torch.randn(8, widths[0]) * 0.1)
        blocks = (nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, batch_first=True) for width in widths)
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(widths[0], CLASSES[data])

    def forward(self, digits: Tensor) -> Tensor:
        x_BTD = self.embed(digits.view(-1, 8, 8)) + self.position
        for block in self.blocks:
            x_BTD = block(x_BTD)
        return self.head(x_BTD.mean(1))


class Residual(nn.Module):
    """Residual blocks of two convolutions, the first of each narrowing the map where its width is a new one."""

    def __init__(self, data: str, widths: Sequence[int]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, widths[0], 3, padding=1, bias=False)
        pairs = list(zip((widths[0], *widths), widths, strict=False))
        self.first = nn.ModuleList(nn.Conv2d(a, b, 3, 1 + (a != b), 1, bias=False) for a, b in pairs)
        self.second = nn.ModuleList(nn.Conv2d(b, b, 3, padding=1, bias=False) for _, b in pairs)
        self.shortcut = nn.ModuleList(nn.Conv2d(a, b, 1, 2) if a != b else nn.Identity() for a, b in pairs)
        self.norms = nn.ModuleList(nn.BatchNorm2d(b) for _, b in pairs for _ in range(2))
        self.head = nn.Linear(widths[-1], CLASSES[data])

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        for index, shortcut in enumerate(self.shortcut):
            y = F.relu(self.norms[2 * index](self.first[index](x)))
            x = F.relu(shortcut(x) + self.norms[2 * index + 1](self.second[index](y)))
        return self.head(x.mean((2, 3)))


class Recurrent(nn.Module):
    """An LSTM over the rows of a digit."""

    def __init__(self, data: str, widths: Sequence[int]) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, widths[0], len(widths), batch_first=True)
        self.head = nn.Linear(widths[0], CLASSES[data])

    def forward(self, digits: Tensor) -> Tensor:
        return self.head(self.lstm(digits.view(-1, 8, 8))[0][:, -1])


# --- cases ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One network and its training.

    `flaw` is the kind of finding that fits it, None for a sound one. `mended` says what else the case would be without
    its flaw: its accuracy tells whether the flaw costs any, or, of a tail and an over-wide layer, whether it gains any.
    """

    name: str
    flaw: str | None
    data: str
    widths: tuple[int, ...]
    family: Family = mlp
    epochs: int = 25
    lr: float = 2e-3
    optimizer: type[torch.optim.Optimizer] = torch.optim.Adam
    weight_decay: float = 0.0
    after: Callable[[nn.Module], None] | None = None
    """What is done to the network before it is trained."""
    late: Mapping[str, float] = field(default_factory=dict)
    """Options of the optimizer from the middle of the training on."""
    eval_inputs: Callable[[Tensor], Tensor] | None = None
    tracker: Mapping[str, Any] = field(default_factory=dict)
    mended: Mapping[str, Any] | None = None

    def repaired(self) -> Case | None:
        """The case without its flaw."""
        return None if self.mended is None else replace(self, flaw=None, **{"mended": None, **self.mended})


@dataclass(frozen=True)
class Trained:
    """What a training left: spectra and run.json where it was tracked, the accuracy on the test part, the network."""

    spectra: pa.Table | None
    described: Mapping[str, Any]
    accuracy: float
    model: nn.Module


def train(case: Case, seed: int, *, tracked: bool = True) -> Trained:
    """Train a case on one thread, and track it; the accuracy is that of the last epoch, on the inputs of eval."""
    train_x, train_y, test_x, test_y = load(case.data, seed)
    test_x = test_x if case.eval_inputs is None else case.eval_inputs(test_x)
    torch.manual_seed(seed)
    model = case.family(case.data, case.widths)
    if case.after is not None:
        case.after(model)
    optimizer = case.optimizer(model.parameters(), lr=case.lr, weight_decay=case.weight_decay)
    with tempfile.TemporaryDirectory() as folder:
        savefile = Path(folder, "run")
        tracker = SaturationTracker(str(savefile), "parquet", model, run=case.name, **case.tracker) if tracked else None
        for epoch in range(case.epochs):
            if case.late and epoch == case.epochs // 2:
                optimizer.param_groups[0].update(case.late)
            accuracy = _epoch(model, optimizer, (train_x, train_y, test_x, test_y))
            if tracker is not None:
                tracker.add_saturations(step=epoch)
        if tracker is None:
            return Trained(None, {}, accuracy, model)
        tracker.close()
        return Trained(read_spectra(savefile), json.loads((savefile / "run.json").read_bytes()), accuracy, model)


def _epoch(model: nn.Module, optimizer: torch.optim.Optimizer, data: Data) -> float:
    train_x, train_y, test_x, test_y = data
    model.train()
    for batch in torch.randperm(len(train_y)).split(32):
        if len(batch) > 1:  # BatchNorm needs two
            optimizer.zero_grad()
            F.cross_entropy(model(train_x[batch]), train_y[batch]).backward()
            optimizer.step()
    model.eval()
    with torch.no_grad():
        return (model(test_x).argmax(1) == test_y).float().mean().item()


def silence(index: int, share: float = 1.0) -> Callable[[nn.Module], None]:
    """Biases of the layer at a place of a Sequential so low that a ReLU behind lets nothing through."""

    def silenced(model: nn.Module) -> None:
        with torch.no_grad():
            bias = model[index].bias  # type: ignore[index]
            bias[: int(share * len(bias))] = -30.0

    return silenced


def with_(family: Family, **options: Any) -> Family:
    """A family with options."""
    return lambda data, widths: family(data, widths, **options)  # type: ignore[call-arg]


def freeze_norms(model: nn.Module) -> None:
    """Keep the running statistics of every BatchNorm at their initial values."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.momentum = 0.0


def noisy(inputs: Tensor) -> Tensor:
    """Inputs under noise of twice their spread, always the same."""
    return inputs + 2 * torch.randn(inputs.shape, generator=torch.Generator().manual_seed(0))


SMALL_CNN = with_(cnn, pools=(1, 2), hidden=1)
PLAIN_CNN = with_(cnn)
NORM_CNN = with_(cnn, norm=True)
SGD = torch.optim.SGD
