"""A run whose workers' processes have ended: seen by their machine, and told from what only looks like it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from delve_ray.errors import OptionError
from delve_ray.store.core import CovarianceStore
from delve_ray.store.processes import started
from delve_ray.store.protocol import Delta, LayerInfo, Source, StoreConfig

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")

LAYERS = [LayerInfo("fc", "Linear", 1)]


def source_of(pid: int, rank: int = 0, host: str | None = None) -> Source:
    return Source("run", "token", rank, f"source-{rank}", host or socket.gethostname(), pid)


@pytest.fixture
def process():
    found = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield found
    found.kill()
    found.wait()


def end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


def test_when_a_process_was_started(process: subprocess.Popen[bytes]) -> None:
    found = started(source_of(process.pid))
    assert found is not None
    assert found.isdecimal()
    assert started(source_of(os.getpid())) == Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
    assert started(source_of(process.pid, host="elsewhere")) is None
    process.kill()
    deadline = time.monotonic() + 60
    while started(source_of(process.pid)) is not None:  # a zombie, which nobody has waited for, is gone as well
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.wait()
    assert started(source_of(process.pid)) is None


def store_of(savefile: str, world_size: int, **changes: float) -> CovarianceStore:
    config = StoreConfig("run", savefile, world_size, silent_after=0.0, late_after=0.0, publish_every=0.0)
    return CovarianceStore(replace(config, **changes))


def offer(store: CovarianceStore, source: Source) -> None:
    delta = Delta(source, 0, 0, 0, step=3, closes=False, labelled=False, entries=((0, 0, 4, 0),))
    moments = np.array([1.5, 8.0])
    assert store.take(delta.sealed(moments), moments).merged


def test_the_run_of_a_process_that_has_ended_is_ended(savefile: str, process: subprocess.Popen[bytes]) -> None:
    store = store_of(savefile, 1, gone_after=0.2)
    source = source_of(process.pid)
    store.register(source, store.config, LAYERS)
    offer(store, source)
    time.sleep(0.5)
    store.poll()
    assert not store.finished, "silent, but there"
    assert not store.deserted
    end(process)
    assert store.deserted
    store.poll()
    assert store.wait_finished(30)
    assert json.loads(Path(savefile, "run.json").read_text())["end"]["why"] == (
        "the processes of all its workers have ended"
    )
    from delve_ray import read_spectra

    (row,) = read_spectra(savefile).to_pylist()
    assert (row["samples"], row["workers"], row["final"]) == (4, 0, True)


@pytest.mark.parametrize("other", ["there", "elsewhere", "left"])
def test_one_process_of_two(savefile: str, process: subprocess.Popen[bytes], other: str) -> None:
    store = store_of(savefile, 2, gone_after=0.2)
    first, second = source_of(process.pid), source_of(os.getpid(), 1, "far away" if other == "elsewhere" else None)
    for source in (first, second):
        store.register(source, store.config, LAYERS)
    offer(store, first)
    if other == "left":
        store.leave(second, completed=True, sent=0)
    end(process)
    time.sleep(0.5)
    store.poll()
    assert (store.ending is not None) is (other == "left")
    store.finish("test")
    assert store.wait_finished(30)


def test_without_the_option_only_silence_counts(savefile: str, process: subprocess.Popen[bytes]) -> None:
    store = store_of(savefile, 1)
    store.register(source_of(process.pid), store.config, LAYERS)
    end(process)
    time.sleep(0.3)
    store.poll()
    assert store.ending is None
    store.finish("test")
    assert store.wait_finished(30)


@pytest.mark.parametrize("name", ["gone_after", "lingers"])
def test_bad_values(name: str) -> None:
    with pytest.raises(OptionError, match=f"{name}=-1"):
        StoreConfig("run", "x", 1, **{name: -1})
