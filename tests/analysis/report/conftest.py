"""One browser for all tests of the report, and the pages that several of them look at."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from delve_ray.analysis.report import write_report
from tests.analysis.report.browser import open_browser
from tests.analysis.report.pages import write_large_run


class Written(NamedTuple):
    """A run and its page."""

    run: Path
    page: Path


@pytest.fixture(scope="package")
def browser() -> Iterator[Any]:
    with open_browser() as driver:
        yield driver


@pytest.fixture(scope="package")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """A small network trained on digits, with a scalar, and its page."""
    import torch
    from sklearn.datasets import load_digits

    from delve_ray import SaturationTracker

    folder = tmp_path_factory.mktemp("digits")
    data = load_digits()
    images, labels = torch.tensor(data.data, dtype=torch.float32) / 8 - 1, torch.tensor(data.target)
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(a, b) for a, b in pairwise((64, 48, 96, 10))))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    with SaturationTracker(folder / "run", "parquet", model, run="digits") as tracker:
        for epoch in range(4):
            for training in (True, False):
                model.train(training)
                chosen = slice(None, 1200) if training else slice(1200, None)
                loss = torch.nn.functional.cross_entropy(model(images[chosen]), labels[chosen])
                if training:
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
            tracker.add_scalar("loss", loss.item(), step=epoch)
            tracker.add_saturations(step=epoch)
    assert write_report(folder / "run", folder / "page.html") == []
    return Written(folder / "run", folder / "page.html")


@pytest.fixture(scope="package")
def large(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """300 layers, 100 steps and both phases."""
    folder = tmp_path_factory.mktemp("large")
    write_large_run(folder / "run")
    write_report(folder / "run", folder / "page.html")
    return Written(folder / "run", folder / "page.html")
