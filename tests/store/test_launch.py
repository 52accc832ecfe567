"""The options of `start_store`, with an actor in name only."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace

import pytest

from delve_ray.errors import OptionError, StoreError
from delve_ray.store import actor, remote
from delve_ray.store.core import CovarianceStore
from delve_ray.store.launch import start_store
from delve_ray.store.parts import PartWriter
from delve_ray.store.protocol import Source, StoreConfig
from delve_ray.store.writing_items import may_pass
from tests import stores
from tests.windows import layer_row, window


@pytest.mark.parametrize(
    ("given", "threshold", "thresholds"),
    [(0.9, 0.9, ()), ([0.9], 0.9, ()), ([0.95, 0.5, 1.0], 0.95, (0.95, 0.5, 1.0))],
)
def test_the_first_threshold_is_the_runs_own_and_several_make_the_list(
    monkeypatch: pytest.MonkeyPatch,
    savefile: str,
    given: float | Sequence[float],
    threshold: float,
    thresholds: tuple[float, ...],
) -> None:
    started = []
    monkeypatch.setattr(actor, "start", started.append)
    monkeypatch.setattr(actor, "RemoteStore", lambda handle: SimpleNamespace(settings=lambda: started[0]))
    start_store(savefile, run="r", world_size=1, save_to="parquet", sat_threshold=given)
    (config,) = started
    assert (config.threshold, config.thresholds) == (threshold, thresholds)


def test_a_store_that_a_worker_has_joined_is_the_same_store(monkeypatch: pytest.MonkeyPatch, savefile: str) -> None:
    """The worker has said how it records, which a driver does not know."""
    started: list[StoreConfig] = []
    monkeypatch.setattr(actor, "start", started.append)
    monkeypatch.setattr(
        actor,
        "RemoteStore",
        lambda handle: SimpleNamespace(settings=lambda: replace(started[0], recording={"conv_method": "mean"})),
    )
    for _ in range(2):
        start_store(savefile, run="r", world_size=1, save_to="parquet")
    with pytest.raises(OptionError, match="has a store already"):
        start_store(savefile, run="r", world_size=2, save_to="parquet")


@pytest.mark.parametrize("bad", [[], [0.9, 0.9], [0.9, 99], "0.9"])
def test_bad_thresholds_are_refused_before_anything_is_started(savefile: str, bad: Sequence[float]) -> None:
    with pytest.raises(OptionError, match="sat_threshold="):
        start_store(savefile, run="r", world_size=1, sat_threshold=bad)


def test_gpus_for_spectra_are_lent_by_who_starts_the_store(monkeypatch: pytest.MonkeyPatch, savefile: str) -> None:
    started: list[StoreConfig] = []
    monkeypatch.setattr(actor, "start", started.append)
    monkeypatch.setattr(actor, "RemoteStore", lambda handle: SimpleNamespace(settings=lambda: started[-1]))
    start_store(savefile, run="r", world_size=1, save_to="parquet")
    start_store(savefile, run="r", world_size=1, save_to="parquet", spectra_gpus=2)
    assert [made.spectra_gpus for made in started] == [0, 2], "none by default"
    with pytest.raises(OptionError, match="spectra_gpus=-1"):
        start_store(savefile, run="r", world_size=1, spectra_gpus=-1)
    lending = stores.config(savefile=savefile, spectra_gpus=2)
    store = CovarianceStore(lending, writers=[])
    stores.Worker(store, 0, stores.config(savefile=savefile))
    assert store.settings().spectra_gpus == 2, "its workers need not know"
    store.finish("test")


@pytest.mark.parametrize(("error", "traced"), [(OSError("no route to the bucket"), False), (KeyError("config"), True)])
def test_a_store_whose_storage_is_away_is_restored_when_it_is_back(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception, traced: bool
) -> None:
    """It says so in words; a traceback has what nobody foresaw."""
    tries = [error, error]

    def restore() -> bool:
        if tries:
            raise tries.pop()
        return True

    monkeypatch.setattr("delve_ray.store.actor.time.sleep", lambda seconds: None)
    store = object.__new__(actor.StoreActor)
    store._run, store._ready = "r", threading.Event()
    store._core = SimpleNamespace(restore=restore, config=stores.config())  # type: ignore[assignment]
    store._restore()
    assert store._ready.is_set()
    assert store._core.config.resume
    said = [record for record in caplog.records if "run r: the store cannot be restored: " in record.message]
    assert [bool(record.exc_info) for record in said] == [traced] * 2


@pytest.mark.parametrize(("alive", "shards"), [(0, 1), (1, 1), (5, 5), (20, 8)])
def test_auto_is_a_shard_for_each_node_that_is_alive(monkeypatch: pytest.MonkeyPatch, alive: int, shards: int) -> None:
    monkeypatch.setattr("ray.nodes", lambda: [{"Alive": True}] * alive + [{"Alive": False}] * 3)
    assert actor._auto_shards() == shards


def test_the_last_of_two_that_say_goodbye_at_once_releases_the_store() -> None:
    """Whichever of the two comes back first: otherwise the store lingers."""
    asked, go_on = threading.Event(), threading.Event()

    def goodbye(source: Source) -> bool:
        if source.rank == 0:
            asked.set()
            assert go_on.wait(30)
        return source.rank == 1

    store = actor.StoreActor.__new__(actor.StoreActor)
    store._ready, store._released = threading.Event(), False
    store._ready.set()
    store._core = SimpleNamespace(goodbye=goodbye, config=SimpleNamespace(lingers=0.0))  # type: ignore[assignment]
    answers: list[bool] = []
    first = threading.Thread(target=lambda: answers.append(store.goodbye(stores.source(0))), daemon=True)
    first.start()
    assert asked.wait(30)
    assert store.goodbye(stores.source(1))
    go_on.set()
    first.join(30)
    assert answers == [False]
    assert store._released


def test_what_ray_does_not_say_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """While its control plane is restarted. A shard's writer gives up what fails otherwise."""

    def away(*_: object, **__: object) -> None:
        raise RuntimeError("the control plane is away")

    monkeypatch.setattr("ray.get_actor", away)
    assert remote.exists("r", 0), "nobody knows"
    with pytest.raises(StoreError, match="the control plane is away"):
        remote.find("r")
    writer = PartWriter(0, lambda: remote.RemoteStore(remote.find("r")))
    with pytest.raises(OSError, match="the control plane is away") as caught:
        writer.write(window([layer_row()]))
    assert may_pass(caught.value), "it is tried for as long as it takes"
