"""`make bench`: one table of ratios, each between things that took turns in one process or one run.

Nothing here fails because something is slow; a target that is missed is shown as missed.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib.util
import logging
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch

from tests.benchmarks import report
from tests.benchmarks.footprint import footprint_section
from tests.benchmarks.growth import growth_section
from tests.benchmarks.memory import memory_section
from tests.benchmarks.models import WORKLOADS
from tests.benchmarks.notes import NOTES
from tests.benchmarks.overhead import SHARE
from tests.benchmarks.recording import CASES
from tests.benchmarks.report import Line, Section
from tests.benchmarks.rows import (
    bytes_rows,
    closing_rows,
    intake_rows,
    overhead_rows,
    publishing_rows,
    recording_rows,
    sharing_rows,
    step_rows,
    window_section,
)

RESULTS = Path(__file__).with_name("RESULTS.md")

DEFAULTS = {"rounds": (1, 3), "blocks": (3, 10), "samples": (10, 60), "windows": (3, 15)}
"""Amounts with --quick and without."""
BESIDE = ("MLP", "transformer")
"""Workloads whose steps are measured beside the sender: the shortest steps, and the most to send."""


@dataclass(frozen=True, slots=True)
class Entry:
    """Something that --only can choose: rows of the table, or a section below it.

    `anywhere` says that it is measured on a GPU as well; `slow`, that --quick leaves it out unless --only names it.
    """

    name: str
    measure: Callable[[argparse.Namespace], Iterable[Line | Section]]
    anywhere: bool = False
    slow: bool = False


def entries() -> list[Entry]:
    """Everything, in the order of the table."""
    return [
        *(Entry(f"extra step time, {w.name}", partial(step_rows, w), anywhere=True) for w in WORKLOADS),
        *(Entry(f"recorder, {case.text}", partial(recording_rows, case), anywhere=True) for case in CASES),
        Entry("add_saturations()", closing_rows),
        *(Entry(f"bytes per window, {w.name}", partial(bytes_rows, w)) for w in WORKLOADS),
        Entry("intake", intake_rows),
        *(Entry(f"published, {w.name}", partial(publishing_rows, w)) for w in WORKLOADS),
        *(Entry(f"max_overhead={SHARE}, {w.name}", partial(overhead_rows, w)) for w in WORKLOADS),
        *(Entry(f"steps beside the sender, {w.name}", partial(sharing_rows, w)) for w in WORKLOADS if w.name in BESIDE),
        Entry("growth", lambda options: [growth_section(min(options.samples, 5))], slow=True),
        Entry("a window in the store", lambda options: [window_section(options)], slow=True),
        Entry("memory of a hook", lambda _: [memory_section()], slow=True),
        Entry("memory of a worker and a store", lambda _: [footprint_section()], slow=True),
    ]


def chosen(names: Sequence[Entry], options: argparse.Namespace) -> list[Entry]:
    """The entries that the options ask for: whose name has one of the patterns in it, in whatever case."""
    patterns = [f"*{pattern.lower()}*" for pattern in options.only]
    return [
        entry
        for entry in names
        if (
            any(fnmatch.fnmatchcase(entry.name.lower(), p) for p in patterns)
            if patterns
            else not (options.quick and entry.slow)
        )
        and (entry.anywhere or options.device == "cpu")
    ]


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.run", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few samples: shows that it runs, its ratios are rough")
    parser.add_argument(
        "--only", action="append", default=[], metavar="PATTERN", help="rows with this in their name; may be repeated"
    )
    parser.add_argument("--list", action="store_true", help="show what there is to choose from")
    parser.add_argument("--repeat", type=int, default=1, metavar="N", help="measure the whole table N times in a row")
    parser.add_argument(
        "--device", default="cpu", help="where the recording rows are measured: cpu, cuda, cuda:1; the others need cpu"
    )
    parser.add_argument("--rounds", type=int, help="rounds of steps, each with new models and trackers (3)")
    parser.add_argument("--blocks", type=int, help="samples of steps per round and model, after warm-up (10)")
    parser.add_argument("--steps", type=int, help="the same in steps; a sample has 32 of the MLP, 8 of the others")
    parser.add_argument("--samples", type=int, help="samples of each recorder row (60)")
    parser.add_argument("--windows", type=int, help="windows of each row that closes some (15)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the table and every sample to this file")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name} beside this file")
    options = parser.parse_args(arguments)
    for name, (quick, thorough) in DEFAULTS.items():
        if getattr(options, name) is None:
            setattr(options, name, quick if options.quick else thorough)
    for name in (*DEFAULTS, "repeat", "steps"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1")
    options.entries = chosen(entries(), options)
    if not options.entries:
        parser.error(f"--only {options.only} fits no row on {options.device}; --list shows all")
    return options


def missing(device: str) -> str | None:
    """What the measurements need and this environment lacks, in a sentence."""
    if torch.device(device).type != "cpu" and not torch.cuda.is_available():
        return f"--device {device} needs a GPU that torch can use: torch.cuda.is_available() is False here."
    if importlib.util.find_spec("delve") is None:
        return "delve 0.1.50 is not installed: `make bench` makes an environment that has it."
    return None


def measure(options: argparse.Namespace, *, sections: bool) -> tuple[list[Line], list[Section]]:
    """All rows once, each printed when it is there; and the sections, if they are asked for."""
    lines: list[Line] = []
    parts: list[Section] = []
    for entry in options.entries:
        if entry.slow and not sections:
            continue
        for found in entry.measure(options):
            if isinstance(found, Section):
                parts.append(found)
            else:
                lines.append(found)
                print("  ".join(cell for cell in found.cells() if cell), flush=True)
    return lines, parts


def main() -> None:
    """Measure, print, and write what is asked for."""
    options = parse_options()
    if options.list:
        print("\n".join(entry.name for entry in options.entries))
        return
    if lack := missing(options.device):
        print(lack, file=sys.stderr)
        raise SystemExit(2)
    logging.disable(logging.INFO)  # delve names every layer
    about = report.machine(options.device)
    load_before = os.getloadavg()[0]
    runs: list[list[Line]] = []
    sections: list[Section] = []
    for number in range(options.repeat):
        if options.repeat > 1:
            print(f"run {number + 1} of {options.repeat}", flush=True)
        lines, parts = measure(options, sections=number == 0)
        runs.append(lines)
        sections += parts
    about["load average"] = f"{load_before:.2f} before the run, {os.getloadavg()[0]:.2f} after it"
    about["date"] = f"{datetime.now(UTC):%Y-%m-%d}"
    show(runs, sections, about)
    if options.json:
        options.json.write_text(report.as_json(runs, about), encoding="utf-8")
    if options.write:
        RESULTS.write_text(report.markdown(runs, about, NOTES, sections), encoding="utf-8")


def show(runs: Sequence[Sequence[Line]], sections: Sequence[Section], about: dict[str, object]) -> None:
    """Print everything once more, together."""
    if runs[-1]:
        print(f"\n{report.text_table(runs[-1])}\n\n{report.footnotes(runs[-1])}\n")
    print("\n".join(map(str, sections)))
    print(f"{NOTES}\n" + "\n".join(f"{name}: {value}" for name, value in about.items()))
    if runs[-1]:
        print(f"\n{report.aligned(report.in_short(runs[-1]))}")
    if len(runs) > 1:
        print(f"\n{report.aligned(report.repeats(runs))}")


if __name__ == "__main__":
    main()
