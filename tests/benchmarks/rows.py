"""The rows of the table: what is measured becomes a ratio with its target and a sentence about it."""

from __future__ import annotations

import itertools
from argparse import Namespace
from collections.abc import Iterator

from tests.benchmarks import timing
from tests.benchmarks.closing import RANKS, local_ray, measure_closing
from tests.benchmarks.intake import (
    SENDERS,
    SIZES,
    growth_table,
    intake_ratio,
    intake_ray,
    measure_intake,
)
from tests.benchmarks.intake import TARGET as INTAKE_TARGET
from tests.benchmarks.models import WORKLOADS, Workload
from tests.benchmarks.overhead import SHARE, measure_overhead
from tests.benchmarks.publishing import measure_publishing
from tests.benchmarks.recording import RecordingCase, measure_recording
from tests.benchmarks.report import Line, Row, Section, Unmeasured, milliseconds
from tests.benchmarks.shipping import measure_bytes, measure_sharing
from tests.benchmarks.steps import measure_steps
from tests.benchmarks.trackers import DELVE_SCALARS

STEP_TARGET = 0.35
RECORDING_TARGET = 0.9
CLOSING_TARGET = 0.05
PUBLISHING_TARGET = 0.25
OVERHEAD_TARGET = 1.03
BYTES_TARGET = 1.05

WINDOW_NOTE = """\
Seconds of one window in a store without Ray: merging all deltas that its senders flush, and publishing it. Layers of
256 to 768 features; the cost grows with flushes × Σd², never with batches or rows."""

_SHARING_STEPS = 10
"""Steps of a window while its predecessor is packed and sent."""


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


def compared(
    what: str,
    samples: dict[str, timing.Samples],
    ours: str,
    other: str,
    target: float | None = None,
    *,
    against: str | None = None,
    note: str = "",
    unit: str = "s",
) -> Row:
    """The row of two variants that took turns; `against` is what the table calls the other one."""
    return Row(
        what,
        timing.median(samples[ours]).value,
        against or other,
        timing.median(samples[other]).value,
        timing.ratio(samples[ours], samples[other]),
        target,
        note,
        {name: samples[name] for name in (ours, other)},
        unit,
    )


def spread(seconds: timing.Samples) -> str:
    """Median and quartiles in milliseconds."""
    low, middle, high = (milliseconds(value) for value in timing.quartiles(seconds))
    return f"{middle} ({low} to {high})"


def recording_rows(case: RecordingCase, options: Namespace) -> Iterator[Line]:
    """The recorder against the bare product."""
    found = measure_recording(case, options.samples, options.device)
    yield compared(f"recorder, {case.text}", found, "recorder", "gemm", RECORDING_TARGET, against="XᵀX")


def publishing_rows(workload: Workload, options: Namespace) -> Iterator[Line]:
    """Publishing a window, until it is known and until it is written."""
    samples = measure_publishing(workload, DELVE_SCALARS, options.windows)
    for name, text, target in (("ours", "published", PUBLISHING_TARGET), ("ours, on disk", "published on disk", None)):
        yield compared(f"{text}, {workload.name}", samples, name, "delve", target)


def closing_rows(options: Namespace) -> Iterator[Line]:
    """The training thread's time in add_saturations(), with several ranks; one Ray for all workloads."""
    with local_ray() as ray:
        for workload in WORKLOADS:
            samples, shares = measure_closing(ray, workload, options.windows)
            yield compared(
                f"add_saturations(), {workload.name}",
                samples,
                "ours",
                "all_reduce",
                CLOSING_TARGET,
                note=f"{RANKS} ranks. The slowest of {len(samples['ours'])} calls took "
                f"{milliseconds(samples['ours'].max())}. Beside the training, per window and rank: "
                f"{per_window(shares)}.",
            )


def per_window(shares: dict[str, float]) -> str:
    """CPU time of our threads in words.

    >>> per_window({"packer": 0.0021, "sender": 0.0004})
    'packer 2.1 ms and sender 0.4 ms of CPU time'
    """
    return " and ".join(f"{name} {milliseconds(seconds)}" for name, seconds in shares.items()) + " of CPU time"


def intake_rows(options: Namespace) -> Iterator[Line]:
    """Bytes per second into a store behind Ray, against an actor that does nothing with them."""
    with intake_ray():
        for (size, widths), senders in itertools.product(SIZES.items(), SENDERS):
            samples = measure_intake(widths, senders, 3 if options.quick else 12)
            yield Row(
                f"intake, {size} from {senders}",
                1.0 / timing.median(samples["store"]).value,
                "empty actor",
                1.0 / timing.median(samples["empty"]).value,
                intake_ratio(samples),
                INTAKE_TARGET,
                samples=samples,
                unit="B/s",
                at_least=True,
            )


def window_section(options: Namespace) -> Section:
    """What a window costs a store, by the number of senders."""
    return Section("A window in the store", WINDOW_NOTE, growth_table((256, 384, 512, 768), 4, options.windows))


def overhead_rows(workload: Workload, options: Namespace) -> Iterator[Line]:
    """Tracked steps with `max_overhead`, if it is there."""
    what = f"max_overhead={SHARE}, {workload.name}"
    try:
        samples = measure_overhead(workload, options.rounds * options.blocks)
    except NotImplementedError:
        yield Unmeasured(what, "not built")
        return
    yield compared(what, samples, "tracked", "untracked", OVERHEAD_TARGET)


def bytes_rows(workload: Workload, options: Namespace) -> Iterator[Line]:
    """Bytes that a window takes on its way to the store."""
    samples = measure_bytes(workload, 2 if options.quick else 5)
    yield compared(f"bytes per window, {workload.name}", samples, "shipped", "triangles", BYTES_TARGET, unit="B")


def sharing_rows(workload: Workload, options: Namespace) -> Iterator[Line]:
    """Steps beside threads that pack and send."""
    samples, shares = measure_sharing(workload, options.windows, _SHARING_STEPS)
    gil = shares.pop("GIL")
    yield compared(
        f"steps beside the sender, {workload.name}",
        samples,
        "closing",
        "never",
        against="none to send",
        note=f"a window is closed every {_SHARING_STEPS} steps, which all cores take part in. Per window, "
        f"{per_window(shares)}; Python code beside them goes without the interpreter for {milliseconds(gil)}.",
    )
