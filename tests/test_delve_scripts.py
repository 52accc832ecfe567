"""The scripts in delve 0.1.50's documentation, with the import changed and digits for the images that they download.

Their README's demo, its gallery's extract-saturation, and example, example_deep, example_fc, example_lstm_class_ae and
example_lstm_generative_vae: the same calls and options, and the saturations in the files against rows gathered beside.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from delve_ray import SaturationTracker, read_scalars, read_spectra
from tests.watched import IMAGES, LABELS, Bounds, Rows, check_saturations, cnn


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, as scripts name their savefiles relative to it."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    return tmp_path


def read_csv(savefile: str, name: str = "spectra") -> pd.DataFrame:
    return pd.read_csv(f"{savefile}/csv/{name}.csv")


def scalars_of(savefile: str) -> dict[str, list[float]]:
    return {str(name): group["value"].tolist() for name, group in read_csv(savefile, "scalars").groupby("name")}


def loaders(size: int) -> tuple[DataLoader[Any], DataLoader[Any]]:
    train, test = TensorDataset(IMAGES[:1200], LABELS[:1200]), TensorDataset(IMAGES[1200:], LABELS[1200:])
    return DataLoader(train, batch_size=size, shuffle=True), DataLoader(test, batch_size=size)


def fit(
    tracker: Any, model: nn.Module, epochs: int, begin: Callable[[int], None], end: Callable[[], None]
) -> dict[str, list[float]]:
    """The training loop of delve's README and example_deep, with the two forwards that it has for each batch."""
    optimizer, criterion = torch.optim.Adam(model.parameters()), nn.CrossEntropyLoss()
    train_loader, test_loader = loaders(256)
    scalars: dict[str, list[float]] = {"accuracy": [], "loss": []}
    for epoch in range(epochs):
        begin(epoch)
        model.train()
        for images, labels in train_loader:
            model(images)
            optimizer.zero_grad(set_to_none=True)
            loss = criterion(model(images), labels)
            loss.backward()
            optimizer.step()
        correct, total, test_loss = 0, 0, 0.0
        model.eval()
        for images, labels in test_loader:
            outputs = model(images)
            total += labels.size(0)
            correct += int((outputs.max(1)[1] == labels).sum())
            test_loss += criterion(outputs, labels).item()
        tracker.add_scalar("accuracy", correct / total)
        tracker.add_scalar("loss", test_loss / total)
        scalars["accuracy"].append(correct / total)
        scalars["loss"].append(test_loss / total)
        tracker.add_saturations()
        end()
    tracker.close()
    return scalars


def test_the_demo_of_the_readme(here: Path) -> None:
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    model = cnn()
    watched, windows = Rows({"0": model[0], "3": model[3], "5": model[5]}), list[Bounds]()
    tracker = SaturationTracker("my_experiment", save_to="plotcsv", modules=model, device=device)
    scalars = fit(tracker, model, 3, lambda epoch: None, lambda: windows.append(watched.take()))
    check_saturations(read_csv("my_experiment"), dict(enumerate(windows)))
    assert scalars_of("my_experiment") == scalars
    names = [f"{phase}/000000000{step}.png" for phase in ("eval", "train") for step in range(3)]
    pictures = sorted(str(path.relative_to("my_experiment/plot")) for path in Path().glob("my_experiment/plot/*/*.png"))
    assert pictures == names


def test_example_deep_records_every_other_epoch(here: Path) -> None:
    model = cnn()
    watched, windows = Rows({"0": model[0], "3": model[3], "5": model[5]}), list[Bounds]()
    tracker: Any = SaturationTracker(
        "experiment", save_to="plotcsv", stats=["lsat"], modules=model, device=torch.device("cpu")
    )

    def end() -> None:
        tracker.save()
        assert len(read_csv("experiment", "scalars")) == 2 * len(windows) + 2, "it is on disk"
        windows.append(watched.take())

    scalars = fit(tracker, model, 4, lambda epoch: tracker.resume() if epoch % 2 else tracker.stop(), end)
    check_saturations(read_csv("experiment"), {step: windows[step] for step in (1, 3)})
    assert scalars_of("experiment") == scalars


class TwoLayers(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(64, width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear2(self.linear1(x).clamp(min=0))


def regress(tracker: Any, model: nn.Module, steps: int, watched: Rows, **options: Any) -> list[Bounds]:
    """The loop of delve's regressions: a window for every step."""
    x, y = IMAGES[:64].flatten(1), F.one_hot(LABELS[:64]).float()
    optimizer, windows = torch.optim.SGD(model.parameters(), **options), list[Bounds]()
    for _ in range(steps):
        loss = nn.MSELoss(reduction="sum")(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        tracker.add_saturations()
        windows.append(watched.take())
    tracker.close()
    return windows


def test_extract_saturation_and_example(here: Path) -> None:
    """A list of layers, Delve's "csvplot", and a directory of several runs."""
    for width in (3, 32):
        model = TwoLayers(width)
        layers = [model.linear1, model.linear2]
        watched = Rows({"0": layers[0], "1": layers[1]})
        stats = SaturationTracker(
            f"regression/h{width}",
            save_to="csvplot",
            modules=layers,
            device=torch.device("cpu"),
            stats=["lsat", "lsat_eval"],
        )
        windows = regress(stats, model, 3, watched, lr=1e-4, momentum=0.9)
        check_saturations(read_csv(f"regression/h{width}"), dict(enumerate(windows)))
        assert Path(f"regression/h{width}/plot/saturation.png").is_file()


def test_a_list_of_layers_without_what_changes_nothing(here: Path) -> None:
    """The same as the page says to write it."""
    model = TwoLayers(3)
    layers = [model.linear1, model.linear2]
    watched = Rows({"0": layers[0], "1": layers[1]})
    stats = SaturationTracker("regression/h3", save_to="plotcsv", modules=layers, device="cpu", stats=["lsat"])
    windows = regress(stats, model, 4, watched, lr=1e-4, momentum=0.9)
    check_saturations(read_csv("regression/h3"), dict(enumerate(windows)))
    assert len(list(Path("regression/h3/plot/train").iterdir())) == 4


def test_example_fc(here: Path) -> None:
    for width in (10, 100):
        sizes = [64, width, 50, 50, 50, 50, 10]
        linears = {f"linear{index + 1}": nn.Linear(*sizes[index : index + 2]) for index in range(6)}
        model = nn.Sequential()
        for name, linear in linears.items():
            model.add_module(name, linear)
            model.add_module(f"{name}_relu", nn.ReLU())
        watched = Rows(dict(linears))
        stats = SaturationTracker(
            f"regression/h{width}", "csv", model, device=torch.device("cpu"), reset_covariance=True
        )
        windows = regress(stats, model, 50, watched, lr=1e-3)
        check_saturations(read_csv(f"regression/h{width}"), dict(enumerate(windows)))


class Lstm(nn.Module):
    """The encoder and decoder of delve's LSTM examples: classifying, or generating from a sampled code."""

    def __init__(self, *, generative: bool, width: int = 32, code: int = 8) -> None:
        super().__init__()
        self.generative = generative
        self.encoder_lstm = nn.LSTM(64, width, 1, batch_first=True)
        self.encoder_output = nn.Linear(width, code * 2 if generative else code)
        self.decoder_lstm = nn.LSTM(code, width, 1, batch_first=True)
        self.decoder_output = nn.Linear(width, 64 if generative else 10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        code = self.encoder_output(self.encoder_lstm(x)[0].relu())
        mean, log_variance = code, torch.zeros_like(code)
        if self.generative:
            mean, log_variance = torch.chunk(code, 2, dim=2)
            code = mean + log_variance.mul(0.5).exp() * torch.randn_like(mean)
        decoded = self.decoder_output(self.decoder_lstm(code)[0].relu())
        return decoded.sigmoid() if self.generative else decoded, mean, log_variance


def train_lstm(tracker: Any, net: Lstm, watched: Rows, epochs: int = 2) -> tuple[list[Bounds], list[float]]:
    optimizer, windows, losses = torch.optim.Adam(net.parameters(), lr=0.001), list[Bounds](), list[float]()
    for epoch in range(epochs):
        running_loss = torch.zeros(())
        for inputs, labels in loaders(128)[0]:
            optimizer.zero_grad()
            inputs = inputs.flatten(1).unsqueeze(1)
            outputs, mean, log_variance = net(inputs)
            if net.generative:
                divergence = -0.5 * torch.sum(1 + log_variance - mean**2 - log_variance.exp())
                error = F.binary_cross_entropy(outputs, inputs, reduction="sum")
                loss = (error + divergence) / inputs.size(0)
            else:
                loss = nn.CrossEntropyLoss()(outputs.squeeze(), labels)
            loss.backward()
            optimizer.step()
            running_loss += loss.data
        tracker.add_scalar("epoch", epoch)
        tracker.add_scalar("loss", running_loss.cpu().numpy())
        losses.append(float(running_loss))
        tracker.add_saturations()
        windows.append(watched.take())
    tracker.close()
    return windows, losses


@pytest.mark.parametrize(
    ("generative", "beside"), [(False, []), (True, ["parquet"])], ids=["class_ae", "generative_vae"]
)
def test_the_lstm_examples(generative: bool, beside: list[str], here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With Delve's way of giving a writer's options; the second with "parquet" beside it, as the page says."""
    net = Lstm(generative=generative)
    watched = Rows(dict(net.named_children()), most=1024)
    stats = SaturationTracker(
        savefile="net/simpson_h2-2",
        save_to=[*beside, "plot"] if beside else "plot",
        modules=net,
        include_conv=False,
        stats=["lsat"],
        max_samples=1024,
        verbose=True,
        writer_args={"figsize": [30, 30], "fontsize": 32},
        conv_method="mean",
        device="cpu",
    )
    windows, losses = train_lstm(stats, net, watched)
    check_saturations(pq.read_table("net/simpson_h2-2/plot/saturation.parquet").to_pandas(), dict(enumerate(windows)))
    picture = Path("net/simpson_h2-2/plot/train/0000000001.png").read_bytes()
    assert int.from_bytes(picture[16:20]) == int.from_bytes(picture[20:24]) >= 3000, "30 by 30 inches"
    assert f"step 1  loss: {losses[1]:.6g}" in capsys.readouterr().out, "verbose=True prints"
    if beside:
        check_saturations(read_spectra("net/simpson_h2-2").to_pandas(), dict(enumerate(windows)))
        recorded = read_scalars("net/simpson_h2-2", columns=["name", "value"]).to_pylist()
        assert [row["value"] for row in recorded] == [0.0, 1.0, *losses]
