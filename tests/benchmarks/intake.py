"""What the store takes in: bytes per second against an actor that does nothing, and what a window costs it.

`python -m tests.benchmarks.intake` prints all tables. The senders push the same arrays through the same calls, once to
the store's actor and once to an actor with the same threads whose `take` answers at once; they take turns round by
round, so that only the ratio is read.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray

from delve_ray.moments import F64, triangle_size
from delve_ray.store import actor
from delve_ray.store.core import CovarianceStore
from delve_ray.store.protocol import Ack, Delta, LayerInfo, Source, StoreConfig, moments_size
from tests.benchmarks.memory import mib, reset_peak, status
from tests.benchmarks.timing import Estimate, Samples, alternate, median, ratio

ROOT = Path(__file__).resolve().parent.parent.parent
TARGET = 0.8
"""Bytes per second into the store, as a share of those into the empty actor: at least."""
SENDERS = (1, 2)
SIZES = {"0.5 MB": (358,), "4 MB": (512,) * 4, "34 MB": (256, 384, 512, 768, 1024) * 4}
"""Widths of the layers of one delta, by the size of its buffer."""
ROUND_BYTES = 256 << 20
"""What one round pushes to one actor, all senders together: some tenths of a second."""
SIMULATED = (1, 4, 16, 64, 256)
"""Senders of the windows whose cost is measured."""


class EmptyActor:
    """What the store is measured against: it is given the same and does nothing with it."""

    @ray.method(concurrency_group="intake")
    def take(self, delta: Delta, buffer: F64) -> Ack:
        """A small answer."""
        return Ack(0, next_seq=delta.seq + 1)


class Sender:
    """A process with one buffer, which it offers to either actor as a worker's transport does."""

    def __init__(self, rank: int, widths: Sequence[int], config: StoreConfig, handles: dict[str, Any]) -> None:
        self.source = source_of(rank)
        self.buffer = buffer_of(widths, rank)
        self.entries = entries_of(widths)
        self.remotes = {name: actor.RemoteStore(handle) for name, handle in handles.items()}
        self.remotes["store"].register(self.source, config, layers_of(widths))
        self.next_seq = dict.fromkeys(handles, 0)
        self.sealed: list[Delta] = []

    def prepare(self, name: str, count: int) -> None:
        """Seal the next deltas for one of the actors, as the outbox does before anything is sent."""
        numbers = range(self.next_seq[name], self.next_seq[name] + count)
        self.sealed = [delta_of(self.source, seq, self.entries).sealed(self.buffer) for seq in numbers]
        self.next_seq[name] += count

    def push(self, name: str) -> None:
        """Send them, one after the other; to the store as the transport does, to the other by put, call and wait."""
        if name == "store":
            behind = {delta.seq - 1: (delta, self.buffer) for delta in self.sealed}
            self.remotes[name].following = behind.get
        for delta in self.sealed:
            ack = self.remotes[name].take(delta, self.buffer)
            if ack.next_seq != delta.seq + 1:
                raise RuntimeError(f"{name} has not taken delta {delta.seq}: {ack}")


# --- deltas --------------------------------------------------------------------------------------------


def source_of(rank: int) -> Source:
    """A worker of the run."""
    return Source("intake", "token", rank, f"sender-{rank}", "host", 1 + rank)


def layers_of(widths: Sequence[int]) -> list[LayerInfo]:
    """Layers of these widths."""
    return [LayerInfo(f"layer{index}", "Linear", features) for index, features in enumerate(widths)]


def entries_of(widths: Sequence[int]) -> tuple[tuple[int, int, int, int], ...]:
    """An entry of each layer, of 4096 rows."""
    return tuple((index, 0, 4096, 0) for index in range(len(widths)))


def buffer_of(widths: Sequence[int], seed: int) -> F64:
    """Means and packed scatters: any finite numbers do, if no diagonal is negative."""
    return np.abs(np.random.default_rng(seed).normal(size=sum(map(moments_size, widths))))


def delta_of(
    source: Source, seq: int, entries: tuple[tuple[int, int, int, int], ...], *, closes: bool = False, window: int = 0
) -> Delta:
    """A header that has yet to be sealed."""
    return Delta(source, 0, seq, window, window, closes, closes, entries)


def quiet_config(world_size: int, **more: Any) -> StoreConfig:
    """A run that writes nothing and does nothing by itself."""
    return StoreConfig(
        "intake", "/nowhere", world_size, save_to=(), publish_every=0.0, silent_after=0.0, late_after=0.0, **more
    )


# --- through Ray ---------------------------------------------------------------------------------------


def measure_intake(
    widths: Sequence[int], senders: int, rounds: int, round_bytes: int = ROUND_BYTES
) -> dict[str, Samples]:
    """Seconds per byte into "store" and into "empty"; one sample is a round, `round_bytes` from all senders together.

    Ray must be running, with at least as many CPUs as are wanted for all processes; the actors ask for none.
    """
    config = quiet_config(senders)
    remote_sender: Any = ray.remote(num_cpus=0)(Sender)
    remote_empty: Any = ray.remote  # its type knows no concurrency groups
    handles = {
        "store": actor.start(config),
        "empty": remote_empty(num_cpus=0, concurrency_groups=actor._GROUP_THREADS)(EmptyActor).remote(),
    }
    workers: list[Any] = []
    try:
        workers += [remote_sender.remote(rank, widths, config, handles) for rank in range(senders)]
        nbytes = 8 * sum(map(moments_size, widths))
        count = max(1, round_bytes // (nbytes * senders))

        def prepare(name: str, _: int) -> None:
            ray.get([worker.prepare.remote(name, count) for worker in workers])

        def push(name: str) -> Callable[[int], object]:
            return lambda _: ray.get([worker.push.remote(name) for worker in workers])

        found = alternate({name: push(name) for name in handles}, calls=rounds, block=1, warmup=2, before=prepare)
    finally:
        for handle in (*workers, *handles.values()):
            ray.kill(handle, no_restart=True)
    return {name: samples / (count * senders * nbytes) for name, samples in found.items()}


@contextmanager
def intake_ray() -> Iterator[None]:
    """A Ray of this machine, with room for the deltas of all senders."""
    ray.init(
        address="local",
        num_cpus=2,
        num_gpus=0,
        include_dashboard=False,
        object_store_memory=1 << 30,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}},
    )
    try:
        yield
    finally:
        ray.shutdown()


def intake_ratio(samples: dict[str, Samples]) -> Estimate:
    """Bytes per second into the store over those into the empty actor."""
    return ratio(samples["empty"], samples["store"])


def intake_table(rounds: int, round_bytes: int = ROUND_BYTES) -> str:
    """All sizes and numbers of senders, as Markdown; starts Ray, and ends it."""
    lines = ["| delta | senders | empty actor | store | ratio | 95 % | target |", "| --- " * 7 + "|"]
    with intake_ray():
        for (size, widths), senders in itertools.product(SIZES.items(), SENDERS):
            samples = measure_intake(widths, senders, rounds, round_bytes)
            rates = {name: 1e-9 / median(seconds).value for name, seconds in samples.items()}
            share = intake_ratio(samples)
            lines.append(
                f"| {size} | {senders} | {rates['empty']:.2f} GB/s | {rates['store']:.2f} GB/s | {share.value:.2f} | "
                f"{share.low:.2f} … {share.high:.2f} | ≥ {TARGET:g} |"
            )
            print(lines[-1], flush=True)
    return "\n".join(lines)


# --- in one process ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class WindowCost:
    """What one window costs a store: seconds of all `take` together, seconds until it is published, and bytes.

    `nbytes` is what the store says that it holds at most, `resident` how far the process has grown.
    """

    senders: int
    flushes: int
    take_s: float
    publish_s: float
    nbytes: int
    resident: int

    @property
    def per_delta_s(self) -> float:
        """Seconds of one `take`."""
        return self.take_s / (self.senders * self.flushes)


def measure_window(senders: int, widths: Sequence[int], flushes: int, windows: int) -> WindowCost:
    """The cost of a window, the median of several after the first, in a store without Ray and without writers."""
    config = quiet_config(senders, stats=("saturation",))
    before = reset_peak()
    store = CovarianceStore(config, writers=[])
    sources = [source_of(rank) for rank in range(senders)]
    for source in sources:
        store.register(source, config, layers_of(widths))
    buffer, entries = buffer_of(widths, 0), entries_of(widths)
    taken, published, nbytes = [], [], 0
    for window in range(windows + 1):
        deltas = [
            delta_of(source, flushes * window + flush, entries, closes=flush == flushes - 1, window=window).sealed(
                buffer
            )
            for flush in range(flushes)
            for source in sources
        ]
        start = time.perf_counter()
        for delta in deltas:
            store.take(delta, buffer)
        taken.append(time.perf_counter() - start)
        nbytes = max(nbytes, store.status()["bytes"])
        while store.progress().published <= window:
            time.sleep(1e-4)
        published.append(time.perf_counter() - start - taken[-1])
    store.finish("measured")
    store.wait_finished(60)
    return WindowCost(
        senders,
        flushes,
        statistics.median(taken[1:]),
        statistics.median(published[1:]),
        nbytes,
        status("VmHWM") - before,
    )


def growth_table(widths: Sequence[int], flushes: int, windows: int) -> str:
    """What a window costs by the number of senders, as Markdown; the memory does not depend on it."""
    packed = 8 * sum(map(triangle_size, widths))
    lines = [
        f"{len(widths)} layers, {mib(packed)} MiB packed, {flushes} flushes of each sender per window. The store "
        "should hold the open window and the last published one, 2 × packed, whatever the number of senders.",
        "",
        "| senders | take, per delta | take, per window | until published | in the store | process grew by |",
        "| --- " * 6 + "|",
    ]
    for senders in SIMULATED:
        cost = measure_window(senders, widths, flushes, windows)
        cells = (
            str(senders),
            f"{1e3 * cost.per_delta_s:.3f} ms",
            f"{1e3 * cost.take_s:.1f} ms",
            f"{1e3 * cost.publish_s:.1f} ms",
            f"{mib(cost.nbytes)} MiB, {cost.nbytes / packed:.2f} × packed",
            f"{mib(cost.resident)} MiB",
        )
        lines.append(f"| {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    return "\n".join(lines)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.intake", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few rounds: shows that it runs, its ratios are rough")
    parser.add_argument("--rounds", type=int, help="rounds of each size and number of senders (30)")
    parser.add_argument("--only", choices=("ray", "growth"), help="leave out the other table")
    options = parser.parse_args()
    rounds = options.rounds or (4 if options.quick else 30)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    tables = []
    if options.only != "growth":
        tables.append(intake_table(rounds, ROUND_BYTES // 4 if options.quick else ROUND_BYTES))
    if options.only != "ray":
        widths = (64, 128) if options.quick else (128, 256, 512)
        tables.append(growth_table(widths, flushes=4, windows=3 if options.quick else 5))
    print("\n" + "\n\n".join(tables))


if __name__ == "__main__":
    main()
