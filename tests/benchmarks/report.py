"""The table, the machine it was measured on, and the forms in which both are kept."""

from __future__ import annotations

import contextlib
import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch

from tests.benchmarks.timing import Estimate, Samples

_HEADINGS = ("what", "ours", "against", "ratio", "95 %", "target", "met")
_UNITS = {"s": (1e3, "ms"), "B": (1e-6, "MB"), "B/s": (1e-6, "MB/s")}
"""What a quantity is shown in, by its unit."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: two quantities and their ratio, with a target where there is one.

    `target` is the largest ratio that is good enough, the smallest with `at_least`. `unit` is that of both quantities:
    s, B or B/s. `note` is a sentence below the table, `samples` are the measurements behind it, for the JSON file.
    """

    what: str
    ours: float
    against: str
    other: float
    ratio: Estimate
    target: float | None = None
    note: str = ""
    samples: Mapping[str, Samples] = field(default_factory=dict)
    unit: str = "s"
    at_least: bool = False

    @property
    def good(self) -> bool | None:
        """Whether the target is met; None without one."""
        if self.target is None:
            return None
        return self.ratio.value >= self.target if self.at_least else self.ratio.value <= self.target

    @property
    def met(self) -> str:
        """Whether the target is met, and whether this run can tell."""
        if self.target is None:
            return ""
        # No cost is negative: where one seems to be, the run was disturbed by more than it measures.
        certain = self.ratio.low > 0 and not self.ratio.low <= self.target <= self.ratio.high
        return ("yes" if self.good else "no") + (
            "" if certain or self.ratio.low == self.ratio.high else ", within noise"
        )

    @property
    def goal(self) -> str:
        """The target in words."""
        return "" if self.target is None else f"{'≥' if self.at_least else '≤'} {self.target:g}"

    def cells(self) -> tuple[str, ...]:
        """The line, under `_HEADINGS`."""
        return (
            self.what,
            quantity(self.ours, self.unit),
            f"{self.against}: {quantity(self.other, self.unit)}",
            decimals(self.ratio.value),
            f"{decimals(self.ratio.low)} … {decimals(self.ratio.high)}",
            self.goal,
            self.met,
        )


@dataclass(frozen=True, slots=True)
class Unmeasured:
    """A line of the table that says why it has no figures."""

    what: str
    why: str

    def cells(self) -> tuple[str, ...]:
        """The line, under `_HEADINGS`."""
        return (self.what, *[""] * (len(_HEADINGS) - 2), self.why)


Line = Row | Unmeasured


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the results below the table: what its own table says, in Markdown."""

    title: str
    text: str
    table: str

    def __str__(self) -> str:
        return f"## {self.title}\n\n{self.text.strip()}\n\n{self.table}\n"


def decimals(ratio: float) -> str:
    """Two decimals; two significant digits of what is smaller.

    >>> decimals(0.834), decimals(0.000512), decimals(0.0)
    ('0.83', '0.00051', '0.00')
    """
    return f"{float(f'{ratio:.2g}'):g}" if 0 < abs(ratio) < 0.1 else f"{ratio:.2f}"


def quantity(value: float, unit: str) -> str:
    """Three significant digits, in milliseconds, MB or MB/s.

    >>> quantity(0.0123456, "s"), quantity(1234567, "B")
    ('12.3 ms', '1.23 MB')
    """
    factor, name = _UNITS[unit]
    return f"{float(f'{value * factor:.3g}'):g} {name}"


def milliseconds(seconds: float) -> str:
    """Three significant digits.

    >>> milliseconds(0.0123456), milliseconds(0.0000123456)
    ('12.3 ms', '0.0123 ms')
    """
    return quantity(seconds, "s")


def machine(device: str = "cpu") -> dict[str, object]:
    """What the times depend on."""
    gpu = {} if torch.device(device).type == "cpu" else {"GPU": torch.cuda.get_device_name(device)}
    return {
        **gpu,
        "CPU": f"{_cpu_model()}, {torch.backends.cpu.get_cpu_capability()}",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch threads": torch.get_num_threads(),
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        **_versions("delve", "ray"),
        "system": f"{platform.system()} {platform.machine()}",
    }


def _versions(*packages: str) -> dict[str, str]:
    """Of those that are installed."""
    found = {}
    for package in packages:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _cpu_model() -> str:
    """Name of the processor, with family and model where Linux tells them: a virtual machine's name is vague."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    found: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(":")
        found.setdefault(key.strip(), value.strip())
    name = found.get("model name", platform.processor() or platform.machine())
    family = [f"{key} {found[key]}" for key in ("cpu family", "model") if key in found]
    return " ".join([name, f"({', '.join(family)})"] if family else [name])


def text_table(lines: Sequence[Line]) -> str:
    """The table for a terminal."""
    return aligned([_HEADINGS, *(line.cells() for line in lines)])


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Cells in columns."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def markdown_cells(headings: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(line) + " |" for line in (headings, ["---"] * len(headings), *lines))


def markdown_table(lines: Sequence[Line]) -> str:
    """The table for a Markdown file."""
    return markdown_cells(_HEADINGS, (line.cells() for line in lines))


def footnotes(lines: Sequence[Line]) -> str:
    """The rows' own sentences, as a list."""
    return "\n".join(f"- {line.what}: {line.note}" for line in lines if isinstance(line, Row) and line.note)


# --- several rows, several runs ------------------------------------------------------------------------


def in_short(lines: Sequence[Line]) -> list[tuple[str, ...]]:
    """Of the rows that measure the same (their names are equal up to the comma): how many meet the target, and the
    best and the worst ratio. Headings first.
    """
    kinds: dict[str, list[Row]] = {}
    for line in lines:
        if isinstance(line, Row) and line.target is not None:
            kinds.setdefault(line.what.partition(",")[0], []).append(line)
    cells: list[tuple[str, ...]] = [("what", "target", "ratios", "met")]
    for kind, rows in kinds.items():
        ratios = sorted(row.ratio.value for row in rows)
        span = decimals(ratios[0]) + (f" … {decimals(ratios[-1])}" if len(rows) > 1 else "")
        cells.append((kind, rows[0].goal, span, f"{sum(bool(row.good) for row in rows)} of {len(rows)}"))
    return cells


def repeats(runs: Sequence[Sequence[Line]]) -> list[tuple[str, ...]]:
    """The ratios of several runs in a row, and in how many of them each target is met. Headings first."""
    cells: list[tuple[str, ...]] = [("what", *(f"run {number + 1}" for number in range(len(runs))), "target", "met in")]
    for name in dict.fromkeys(line.what for run in runs for line in run):
        found = [next((line for line in run if line.what == name), None) for run in runs]
        rows = [line for line in found if isinstance(line, Row)]
        ratios = [decimals(line.ratio.value) if isinstance(line, Row) else "" for line in found]
        goal = rows[0].goal if rows else ""
        good = sum(bool(row.good) for row in rows)
        answer = "all" if good == len(runs) else f"{good} of {len(runs)}"
        cells.append((name, *ratios, goal, answer if goal else ""))
    return cells


# --- the forms in which it is kept ---------------------------------------------------------------------


def markdown(
    runs: Sequence[Sequence[Line]], about: Mapping[str, object], notes: str, sections: Sequence[Section]
) -> str:
    """A whole RESULTS.md: the last run's table, and all runs' ratios where there are several."""
    short, (headings, *lines) = in_short(runs[-1]), repeats(runs)
    parts = ["# Results\n", "One run of `make bench`, in short:\n", markdown_cells(short[0], short[1:])]
    if len(runs) > 1:
        parts[1] = f"{len(runs)} runs of `make bench` in a row; the last one in short:\n"
        parts += ["\n## Run by run\n", markdown_cells(headings, lines)]
    parts += ["\n## Every row\n", markdown_table(runs[-1]), "", footnotes(runs[-1]), ""]
    parts += [str(section) for section in sections]
    parts += [f"## What is measured\n\n{notes}", "## Machine\n"]
    parts += [f"- {name}: {value}" for name, value in about.items()]
    return "\n".join(parts) + "\n"


def as_json(runs: Sequence[Sequence[Line]], about: Mapping[str, object]) -> str:
    """Everything, with all samples."""
    return json.dumps({"machine": about, "runs": [[_entry(line) for line in run] for run in runs]}, indent=1)


def _entry(line: Line) -> dict[str, object]:
    if isinstance(line, Unmeasured):
        return asdict(line)
    samples = {name: values.tolist() for name, values in line.samples.items()}
    return asdict(replace(line, samples={})) | {"met": line.met, "samples": samples}
