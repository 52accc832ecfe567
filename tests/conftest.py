"""Fixtures for all tests: one small Ray for the session, and nothing left behind."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.leftovers import left_of, running

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads its groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests that start Ray come last, and with `-n 2` into a process of their own.

    For a tracker that finds Ray running puts its store there.
    """

    def starts_ray(item: pytest.Item) -> bool:
        return item.get_closest_marker("ray") is not None

    items.sort(key=starts_ray)
    if config.pluginmanager.hasplugin("xdist"):  # which knows the marker; not with `-p no:xdist`
        for item in items:
            item.add_marker(pytest.mark.xdist_group("ray" if starts_ray(item) else "plain"))


@pytest.fixture(autouse=True)
def nothing_left_running() -> Iterator[None]:
    """Fails a test that leaves threads of the package behind, but for those of stores: these it ends."""
    before = running()
    yield
    assert left_of(before) == [], "threads that the test has left; close what has started them"


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """A local Ray with fixed small resources, whatever the machine has."""
    import ray

    here = str(Path(__file__).resolve().parent.parent)
    ray.init(
        address="local",
        num_cpus=8,
        num_gpus=0,
        include_dashboard=False,
        object_store_memory=300 << 20,
        logging_level=logging.ERROR,
        runtime_env={"env_vars": {"PYTHONPATH": here, "OMP_NUM_THREADS": "1"}},
    )
    yield
    ray.shutdown()


@pytest.fixture
def savefile(tmp_path: Path) -> str:
    """A path for a run's files that does not exist yet."""
    return str(tmp_path / "run")
