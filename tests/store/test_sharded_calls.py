"""How a store with shards calls them: all side by side, or one after the other where no thread can be started."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from delve_ray import read_spectra
from delve_ray.errors import StoreError
from delve_ray.store.sharded import LocalShards, ShardedStore
from tests.leftovers import running
from tests.stores import LAYERS, Worker, config, rows, until


class Shard:
    """A store of which only signs of life are asked; it answers once all have been asked, or never."""

    def __init__(self, asked: threading.Barrier, fails: bool = False) -> None:
        self.asked, self.fails, self.calls = asked, fails, 0

    def status(self) -> dict[str, Any]:
        self.calls += 1
        self.asked.wait(60)
        if self.fails:
            raise StoreError("it is gone")
        return {}


def test_shards_are_called_side_by_side_and_leave_no_thread() -> None:
    before, asked = running(), threading.Barrier(3)
    shards = [Shard(asked) for _ in range(3)]
    store = ShardedStore(Shard(threading.Barrier(1)), shards)  # type: ignore[arg-type]
    assert store.status() == {"shards": [{}] * 3}
    until(lambda: running() <= before)
    shards[1].fails = True
    with pytest.raises(StoreError, match="it is gone"):
        store.status()
    assert [shard.calls for shard in shards] == [2, 2, 2]


def test_where_no_thread_can_be_started_one_shard_is_asked_after_the_other(
    savefile: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a script that ends without having closed its tracker."""
    own = config(savefile=savefile, save_to=("parquet",), num_shards=2, world_size=1)
    store: Any = LocalShards(own, lambda _: None)
    worker = Worker(store, 0, own)
    sent = [{(index, 0): rows(9 + index, layer.features or 0) for index, layer in enumerate(LAYERS)} for _ in range(2)]
    worker.send(sent[0])

    def refuse(*_: object) -> None:
        raise RuntimeError("cannot schedule new futures after interpreter shutdown")

    with monkeypatch.context() as ending:
        ending.setattr("concurrent.futures.ThreadPoolExecutor.submit", refuse)
        worker.send(sent[1], closes=True)
        front, away = Shard(threading.Barrier(1)), Shard(threading.Barrier(1), fails=True)
        with pytest.raises(StoreError, match="it is gone"):
            ShardedStore(front, [away, away]).status()  # type: ignore[arg-type, list-item]
        assert away.calls == 2, "the other is asked though the first has failed"
        worker.leave()
    assert store.wait_finished(60)
    found = {row["layer"]: row for row in read_spectra(Path(savefile)).to_pylist()}
    for index, layer in enumerate(LAYERS):
        every = np.concatenate([part[index, 0] for part in sent])
        row = found[layer.name]
        assert (row["samples"], row["workers"], row["final"]) == (len(every), 1, True)
        assert row["trace"] == pytest.approx(every.var(0).sum(), rel=1e-9)


AT_THE_END = """
import atexit, sys
import numpy as np
from tests import stores
from tests.store.six_layers import LAYERS, local_shards, some_rows, with_widths

def send(step):
    rows = some_rows(np.random.default_rng(step), share=1.0)
    parts.take(*with_widths(worker, rows, step, closes=True))

def end():  # as a tracker's that nobody closed
    send(1)
    worker.leave()
    print(parts.wait_finished(60))

stores.LAYERS = LAYERS
parts = local_shards(sys.argv[1], 2, world_size=1)
worker = stores.Worker(parts, 0, parts.config)
send(0)
atexit.register(end)
"""


def test_shards_take_what_is_left_when_the_interpreter_ends(tmp_path: Path) -> None:
    """Thread pools are over by then: before anything of atexit runs."""
    command = [sys.executable, "-c", AT_THE_END, str(tmp_path)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert found.stdout == "True\n", found.stderr
    steps = read_spectra(str(tmp_path)).column("step").to_pylist()
    assert sorted(steps) == [0] * 2 * 6 + [1] * 2 * 6
