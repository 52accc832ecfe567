"""The rows of the table: what is measured becomes a ratio with its target and a sentence about it."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator

from tests.benchmarks import timing
from tests.benchmarks.models import Workload
from tests.benchmarks.publishing import measure_publishing
from tests.benchmarks.recording import RecordingCase, measure_recording
from tests.benchmarks.report import Line, Row, milliseconds
from tests.benchmarks.steps import measure_steps
from tests.benchmarks.trackers import DELVE_SCALARS

STEP_TARGET = 0.35
RECORDING_TARGET = 0.9
PUBLISHING_TARGET = 0.25


def step_rows(workload: Workload, options: Namespace) -> Iterator[Line]:
    """Extra step time of ours against delve's."""
    blocks = options.blocks if options.steps is None else max(1, options.steps // workload.block)
    samples = measure_steps(workload, options.rounds, blocks, options.device)
    base, theirs, ours = samples["untracked"], samples["delve"], samples["ours"]
    slower = {name: timing.ratio(samples[name], base).value for name in ("ours", "delve")}
    yield Row(
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


def recording_rows(case: RecordingCase, options: Namespace) -> Iterator[Line]:
    """The recorder against the bare product."""
    found = measure_recording(case, options.samples, options.device)
    yield Row(
        f"recorder, {case.text}",
        timing.median(found["recorder"]).value,
        "XᵀX",
        timing.median(found["gemm"]).value,
        timing.ratio(found["recorder"], found["gemm"]),
        RECORDING_TARGET,
        samples=found,
    )


def publishing_rows(workload: Workload, options: Namespace) -> Iterator[Line]:
    """Publishing a window, until it is known and until it is written."""
    samples = measure_publishing(workload, DELVE_SCALARS, options.windows)
    theirs = samples["delve"]
    for name, text, target in (("ours", "published", PUBLISHING_TARGET), ("ours, on disk", "published on disk", None)):
        yield Row(
            f"{text}, {workload.name}",
            timing.median(samples[name]).value,
            "delve",
            timing.median(theirs).value,
            timing.ratio(samples[name], theirs),
            target,
            samples={name: samples[name], "delve": theirs},
        )
