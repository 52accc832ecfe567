"""`make bench`: one table of ratios, each between things that took turns in this process.

Nothing here fails because something is slow; a target that is missed is shown as missed.
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from tests.benchmarks import report, timing
from tests.benchmarks.memory import memory_table
from tests.benchmarks.models import WORKLOADS, Workload
from tests.benchmarks.publishing import measure_publishing
from tests.benchmarks.recording import CASES, RecordingCase, measure_recording
from tests.benchmarks.report import Row, milliseconds
from tests.benchmarks.steps import measure_steps
from tests.benchmarks.trackers import DELVE_SCALARS

RESULTS = Path(__file__).with_name("RESULTS.md")

STEP_TARGET = 0.35
RECORDING_TARGET = 0.9
PUBLISHING_TARGET = 0.25

NOTES = """\
Extra step time: median step of a tracked copy of the model minus that of an untracked copy; a step is forward, loss,
backward and optimizer. Every batch and every layer is recorded, stats=["lsat"], and no window is published meanwhile.
The copies take turns step by step, and all must end with the same loss to the bit. One sample is the mean of a block
of steps, so that work done only every few steps counts; intervals are bootstrapped over samples.

delve 0.1.50 replaces its accumulator at each batch: it never adds one batch to another, and publishes the covariance
of the last batch. So it does less than its options promise; it is measured as it is.

Recorder: all that a forward hook does with a layer's output, against one float32 product XᵀX of the same rows,
contiguous, into memory that exists. A convolution's rows are its positions; the bare product gets them gathered.

Published: from add_saturations() until the window's metrics are there, with every scalar that delve computes; "on
disk", until the Parquet file is written as well. delve's add_saturations() computes and writes its CSV files before it
returns, in the training thread; ours works on threads of its own, and is waited for here.
"""


def step_row(workload: Workload, rounds: int, blocks: int) -> Row:
    """Extra step time of ours against delve's."""
    samples = measure_steps(workload, rounds, blocks)
    base, theirs, ours = samples["untracked"], samples["delve"], samples["ours"]
    slower = {name: timing.ratio(samples[name], base).value for name in ("ours", "delve")}
    return Row(
        f"extra step time, {workload.name}",
        timing.extra(ours, base).value,
        "delve",
        timing.extra(theirs, base).value,
        timing.ratio_of_extras(ours, theirs, base),
        STEP_TARGET,
        f"{workload.text}. The untracked step takes {milliseconds(timing.median(base).value)}, "
        f"{slower['ours']:.2f} times that with ours, {slower['delve']:.2f} times with delve. Paired differences, "
        f"median and quartiles of {len(base)} samples: ours {spread(ours - base)}, delve {spread(theirs - base)}.",
        samples,
    )


def spread(seconds: timing.Samples) -> str:
    """Median and quartiles in milliseconds."""
    low, middle, high = (milliseconds(value) for value in timing.quartiles(seconds))
    return f"{middle} ({low} to {high})"


def recording_row(case: RecordingCase, samples: int) -> Row:
    """The recorder against the bare product."""
    found = measure_recording(case, samples)
    return Row(
        f"recorder, {case.text}",
        timing.median(found["recorder"]).value,
        "XᵀX",
        timing.median(found["gemm"]).value,
        timing.ratio(found["recorder"], found["gemm"]),
        RECORDING_TARGET,
        samples=found,
    )


def publishing_rows(workload: Workload, windows: int) -> Iterator[Row]:
    """Publishing a window, until it is known and until it is written."""
    samples = measure_publishing(workload, DELVE_SCALARS, windows)
    theirs = samples["delve"]
    for name, text, target in (("ours", "published", PUBLISHING_TARGET), ("ours, on disk", "published, on disk", None)):
        yield Row(
            f"{text}, {workload.name}",
            timing.median(samples[name]).value,
            "delve",
            timing.median(theirs).value,
            timing.ratio(samples[name], theirs),
            target,
            samples={name: samples[name], "delve": theirs},
        )


def all_rows(options: argparse.Namespace) -> Iterator[Row]:
    """Everything, in the order of the table."""
    for workload in WORKLOADS:
        blocks = options.blocks if options.steps is None else max(1, options.steps // workload.block)
        yield step_row(workload, options.rounds, blocks)
    for case in CASES:
        yield recording_row(case, options.samples)
    for workload in WORKLOADS:
        yield from publishing_rows(workload, options.windows)


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.run", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few samples: shows that it runs, its ratios are rough")
    parser.add_argument("--rounds", type=int, help="rounds of steps, each with new models and trackers (3)")
    parser.add_argument("--blocks", type=int, help="samples of steps per round and model, after warm-up (20)")
    parser.add_argument("--steps", type=int, help="the same in steps; a sample has 32 of the MLP, 8 of the ResNet")
    parser.add_argument("--samples", type=int, help="samples of each recorder row (60)")
    parser.add_argument("--windows", type=int, help="windows of each publishing row (15)")
    parser.add_argument("--no-memory", action="store_true", help="leave out the table of a hook's peak memory")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the table and every sample to this file")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name} beside this file")
    options = parser.parse_args()
    defaults = {"rounds": (1, 3), "blocks": (4, 20), "steps": (None, None), "samples": (10, 60), "windows": (3, 15)}
    for name, (quick, thorough) in defaults.items():
        given = getattr(options, name)
        if given is None:
            setattr(options, name, quick if options.quick else thorough)
        elif given < 1:
            parser.error(f"--{name} must be at least 1")
    return options


def main() -> None:
    """Measure, print, and write what is asked for."""
    options = parse_options()
    logging.disable(logging.INFO)  # delve names every layer
    about = report.machine()
    load_before = os.getloadavg()[0]
    rows: list[Row] = []
    for row in all_rows(options):
        rows.append(row)
        print("  ".join(row.cells()), flush=True)
    memory = "" if options.no_memory or options.quick else memory_table()
    about["load average"] = f"{load_before:.2f} before the run, {os.getloadavg()[0]:.2f} after it"
    about["date"] = f"{datetime.now(UTC):%Y-%m-%d}"
    print(f"\n{report.text_table(rows)}\n\n{report.footnotes(rows)}\n\n{NOTES}\n{memory}")
    print("\n".join(f"{name}: {value}" for name, value in about.items()))
    if options.json:
        options.json.write_text(report.as_json(rows, about), encoding="utf-8")
    if options.write:
        RESULTS.write_text(report.markdown(rows, about, NOTES, memory), encoding="utf-8")


if __name__ == "__main__":
    main()
