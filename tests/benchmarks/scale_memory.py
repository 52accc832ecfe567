"""How far a store's process grows against `delve_ray.store.memory.store_bytes`, each case in a process of its own."""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace

import numpy as np

from delve_ray.store.core import CovarianceStore
from delve_ray.store.memory import store_bytes
from tests.benchmarks.memory import ROOT, mib, reset_peak, status
from tests.benchmarks.report import Section, decimals, markdown_cells
from tests.benchmarks.scale_local import config_of
from tests.benchmarks.scale_shapes import SHAPES, Deltas, source_of

TEXT = """\
Resident memory in MiB by which a process grows that has a store and nothing else, after `malloc_trim`, against
`delve_ray.store.memory.store_bytes`. "open": all sources but one have closed so many windows, and nothing is
published. "published": the last source has come, these windows are published and gone, and one more is open. "peak":
the highest in between, against `StoreBytes.peak` without snapshots, which is a bound. Measured with
MALLOC_MMAP_THRESHOLD_=131072: by default glibc keeps 7 to 25 MiB of freed matrices in its heap after the first
publications, `malloc_trim` or not.
"""
_ENVIRONMENT = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072"}


@dataclass(frozen=True, slots=True)
class Case:
    """So many sources and open windows, with the layers of a network whose widths are scaled."""

    shape: str
    scale: float
    sources: int
    windows: int

    @property
    def text(self) -> str:
        """In words."""
        return f"{self.shape} × {self.scale:g}, {self.sources} sources, {self.windows} open"


CASES = tuple(
    Case(shape, scale, sources, windows)
    for shape, scale, sources, windows in (
        ("resnet50", 0.5, 64, 1),
        ("resnet50", 0.5, 64, 4),
        ("resnet50", 0.5, 256, 1),
        ("resnet50", 0.5, 1024, 1),
        ("resnet50", 0.25, 1024, 4),
        ("vit-l", 0.25, 64, 1),
        ("vit-l", 0.25, 64, 4),
    )
)


def measure(case: Case) -> dict[str, int]:
    """What `run` starts a process for: bytes "open", "published" and "peak"."""
    _feed(
        replace(case, shape="resnet50", scale=1 / 64, sources=3)
    )  # loads and starts what is loaded and started lazily
    width = max(SHAPES[case.shape].scaled(case.scale))
    with ThreadPoolExecutor(1) as pool:  # the linear algebra library's own memory
        pool.submit(np.linalg.eigvalsh, np.eye(width) + 1.0).result()
    return _feed(case)


def _feed(case: Case) -> dict[str, int]:
    deltas = Deltas(SHAPES[case.shape].scaled(case.scale), 1)
    (piece,) = deltas.pieces
    config = replace(config_of("/nowhere", case.sources, 1), save_to=())
    _trim()
    before = reset_peak()
    store = CovarianceStore(config, writers=[])
    for rank in range(case.sources):
        store.register(source_of(rank), config, deltas.layers)

    def send(ranks: Sequence[int], windows: Sequence[int]) -> None:
        for window in windows:
            for rank in ranks:
                store.take(piece.header(source_of(rank), window), piece.buffer)

    send(range(1, case.sources), range(case.windows))
    _trim()
    found = {"open": status("VmRSS") - before}
    send(range(1), range(case.windows))
    send(range(1, case.sources), range(case.windows, case.windows + 1))
    while store.progress().published < case.windows or len(store.attempts[-1].windows) > 1:
        time.sleep(0.005)
    _trim()
    found |= {"published": status("VmRSS") - before, "peak": status("VmHWM") - before}
    store.finish("measured")
    store.wait_finished(60.0)
    return found


def predicted(case: Case) -> dict[str, int]:
    """What the formula says of the same."""
    widths, deltas = SHAPES[case.shape].scaled(case.scale), case.sources - 1
    first = store_bytes(widths, windows=case.windows, sources=case.sources, deltas=deltas, published=False)
    last = store_bytes(widths, sources=case.sources, deltas=deltas)
    most = store_bytes(widths, windows=case.windows + 1, sources=case.sources, saved=False)
    return {"open": first.resting, "published": last.resting, "peak": most.peak}


def _trim() -> None:
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def run(case: Case) -> dict[str, int]:
    """The figures of a case, from a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.scale_memory", json.dumps(asdict(case))]
    result = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=600, env=_ENVIRONMENT
    )
    found: dict[str, int] = json.loads(result.stdout.splitlines()[-1])
    return found


def scale_memory_section(cases: Sequence[Case] = CASES) -> Section:
    """The table of all cases."""
    lines = []
    for case in cases:
        found, formula = run(case), predicted(case)
        cells = [
            f"{mib(found[key])} / {mib(formula[key])} = {decimals(found[key] / formula[key])}"
            for key in ("open", "published", "peak")
        ]
        lines.append((case.text, *cells))
        print("  ".join(lines[-1]), flush=True)
    headings = ("what", "open: grew / formula", "published: grew / formula", "peak: grew / bound")
    return Section("Memory of a store", TEXT, markdown_cells(headings, lines))


def main() -> None:
    """Print the table, or, in a process of its own, one case."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.scale_memory", description=__doc__)
    parser.add_argument("case", nargs="?", type=json.loads, help="measure this case in this process, as JSON")
    given = parser.parse_args().case
    print(scale_memory_section() if given is None else json.dumps(measure(Case(**given))))


if __name__ == "__main__":
    main()
