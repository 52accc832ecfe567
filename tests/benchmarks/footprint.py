"""Resident memory of a worker and of a store, against what is promised; each case in a process of its own."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict, dataclass

from tests.benchmarks.memory import ROOT, mib, reset_peak, status
from tests.benchmarks.report import Section, decimals, markdown_cells

TEXT = """\
Resident memory in MiB, of a process that does only this. A worker: its highest rise while batches of training and
evaluation are recorded and windows are closed, against `delve_ray.memory.worker_bytes`, the bound that `max_memory` is
checked with. A store: its rise with a window of both phases open, against 4d² bytes per layer and phase; "peak" is the
highest one until the window is published.
"""
_WINDOWS = 4
_ROWS = 256


@dataclass(frozen=True, slots=True)
class Case:
    """Layers of one width in a worker, or in a store with so many senders."""

    of: str
    layers: int
    width: int
    senders: int = 1

    @property
    def text(self) -> str:
        """In words."""
        senders = f", {self.senders} senders" if self.senders > 1 else ""
        return f"{self.of}, {self.layers} layers of width {self.width}{senders}"


CASES = (
    Case("worker", 16, 256),
    Case("worker", 4, 1024),
    Case("worker", 2, 2048),
    Case("store", 64, 256),
    Case("store", 4, 1024),
    Case("store", 4, 2048),
    Case("store", 4, 1024, senders=16),
)


def measure(case: Case) -> dict[str, int]:
    """What `run` starts a process for: bytes "promised", "rest" and "peak"."""
    return worker(case) if case.of == "worker" else store(case)


def worker(case: Case) -> dict[str, int]:
    """Peak of recording with a store that drops the rows."""
    import torch
    from torch import nn

    from delve_ray.memory import worker_bytes
    from tests.benchmarks.recording import Replay
    from tests.benchmarks.sinks import Sink, attach_to

    def record(width: int, layers: int, windows: int) -> int:
        model = nn.Sequential(*(Replay(1, width) for _ in range(layers)))
        output = torch.randn(_ROWS, width)
        before = reset_peak()
        with attach_to(Sink(keeps=False), model) as tracker:
            for _ in range(windows):
                for training in (True, False):
                    model.train(training)(output)
                tracker.add_saturations()
                tracker.metrics(wait=True)  # closed windows may wait to be packed, up to max_memory
        return status("VmHWM") - before

    record(32, 1, 1)  # loads and starts what is loaded and started lazily
    for dtype in (torch.float32, torch.float64):  # the linear algebra library's own memory
        rows = torch.randn(_ROWS, case.width, dtype=dtype)
        torch.mm(rows.t(), rows)
    peak = record(case.width, case.layers, _WINDOWS)
    return {"promised": worker_bytes([case.width] * case.layers), "rest": peak, "peak": peak}


def store(case: Case) -> dict[str, int]:
    """Rise with the window open, and its peak until it is published."""
    from tests.benchmarks.feeder import Feeder, Load

    small = Feeder(Load(1, 32))
    small.send(small.buffer())
    feeder = Feeder(Load(case.layers, case.width, senders=case.senders, phases=2))
    buffer = feeder.buffer()
    before = reset_peak()
    feeder.send(buffer, close=False)
    rest = status("VmRSS") - before
    feeder.send(buffer)
    return {"promised": 4 * case.width**2 * case.layers * 2, "rest": rest, "peak": status("VmHWM") - before}


def run(case: Case) -> dict[str, int]:
    """The figures of a case, from a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.footprint", json.dumps(asdict(case))]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=300)
    found: dict[str, int] = json.loads(result.stdout.splitlines()[-1])
    return found


def footprint_section() -> Section:
    """The table of all cases."""
    lines = []
    for case in CASES:
        found = run(case)
        figures = (mib(found["promised"]), mib(found["rest"]), decimals(found["rest"] / found["promised"]))
        lines.append((case.text, *figures, "" if case.of == "worker" else mib(found["peak"])))
    return Section("Memory", TEXT, markdown_cells(("what", "promised", "resident", "ratio", "peak"), lines))


def main() -> None:
    """Print the table, or, in a process of its own, one case."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.footprint", description=__doc__)
    parser.add_argument("case", nargs="?", type=json.loads, help="measure this case in this process, as JSON")
    given = parser.parse_args().case
    print(footprint_section() if given is None else json.dumps(measure(Case(**given))))


if __name__ == "__main__":
    main()
