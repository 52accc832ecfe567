"""The first registration opens the writers, which may take long: the store answers meanwhile."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from delve_ray.errors import OptionError, StoreError
from delve_ray.store.core import CovarianceStore
from delve_ray.store.protocol import StoreConfig, Welcome
from tests.stores import LAYERS, Keeper, config, rows, source
from tests.stores import Worker as Sender


class Slow(Keeper):
    """A writer that is opened when it may be; `fails` is how often that ends with an error."""

    def __init__(self, fails: int = 0) -> None:
        super().__init__("slow")
        self.fails = fails
        self.begun, self.go_on = threading.Semaphore(0), threading.Semaphore(0)
        self.opened = 0

    def open(self, run: Any) -> None:
        self.begun.release()
        assert self.go_on.acquire(timeout=60)
        self.fails -= 1
        if self.fails >= 0:
            raise RuntimeError("no such project")
        self.opened += 1


class Registering:
    """A registration on a thread of its own."""

    def __init__(self, store: CovarianceStore, rank: int) -> None:
        self.answer: Welcome | Exception | None = None
        self._work = lambda: store.register(source(rank), store.config, LAYERS)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.answer = self._work()
        except Exception as error:
            self.answer = error

    def wait(self) -> Welcome | Exception | None:
        self._thread.join(30)
        return self.answer


def asked(question: Any) -> Any:
    """An answer that has to come while the writers are opened."""
    found: list[Any] = []

    def ask() -> None:
        try:
            found.append(question())
        except StoreError as error:
            found.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(60)
    assert found, "it waits for the writers"
    return found[0]


def slow(savefile: str, writer: Slow) -> StoreConfig:
    return config(savefile=savefile, save_to=("slow",), writers=(writer,))


def test_questions_are_answered_while_writers_are_opened(savefile: str) -> None:
    writer = Slow()
    store = CovarianceStore(slow(savefile, writer))
    first = Registering(store, 0)
    assert writer.begun.acquire(timeout=60)
    second = Registering(store, 1)
    assert asked(store.status)["ranks"] == {}
    assert isinstance(asked(store.progress), StoreError), "there is no worker yet"
    assert asked(store.abandon) is False, "somebody is about to join"
    assert first.answer is second.answer is None
    writer.go_on.release()
    assert first.wait() == second.wait() == Welcome(attempt=0, window=0)
    assert writer.opened == 1
    assert sorted(store.status()["ranks"]) == [0, 1]
    senders = [Sender(store, rank) for rank in range(2)]
    for sender in senders:
        sender.send({(1, 0): rows(20, 5)}, closes=True)
        sender.leave()
    assert store.wait_finished(60)
    assert [window.workers for window in writer.windows] == [2]


def test_a_writer_that_cannot_be_opened_leaves_the_store_to_the_next(savefile: str) -> None:
    writer = Slow(fails=1)
    store = CovarianceStore(slow(savefile, writer))
    first = Registering(store, 0)
    assert writer.begun.acquire(timeout=60)
    second = Registering(store, 1)
    writer.go_on.release()
    error = first.wait()
    assert isinstance(error, OptionError)
    with pytest.raises(OptionError, match="no such project"):
        raise error
    assert writer.begun.acquire(timeout=60), "the other one opens them anew"
    writer.go_on.release()
    assert second.wait() == Welcome(attempt=0, window=0)
    assert (writer.opened, sorted(store.status()["ranks"])) == (1, [1])
    store.finish("test")
    assert store.wait_finished(60)
