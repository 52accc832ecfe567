"""The table, the machine it was measured on, and the forms in which both are kept."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from tests.benchmarks.timing import Estimate, Samples

_HEADINGS = ("what", "ours", "against", "ratio", "95 %", "target", "met")


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: two times and their ratio, with a target where there is one.

    `note` is a sentence below the table, `samples` are the seconds behind it, for the JSON file.
    """

    what: str
    ours_s: float
    against: str
    against_s: float
    ratio: Estimate
    target: float | None = None
    note: str = ""
    samples: Mapping[str, Samples] = field(default_factory=dict)

    @property
    def met(self) -> str:
        """Whether the target is met, and whether this run can tell."""
        if self.target is None:
            return ""
        answer = "yes" if self.ratio.value <= self.target else "no"
        certain = self.ratio.high <= self.target or self.ratio.low > self.target
        return answer if certain else f"{answer}, within noise"

    def cells(self) -> tuple[str, ...]:
        """The line, under `_HEADINGS`."""
        return (
            self.what,
            milliseconds(self.ours_s),
            f"{self.against}: {milliseconds(self.against_s)}",
            f"{self.ratio.value:.2f}",
            f"{self.ratio.low:.2f} … {self.ratio.high:.2f}",
            "" if self.target is None else f"≤ {self.target:g}",
            self.met,
        )


def milliseconds(seconds: float) -> str:
    """Three significant digits.

    >>> milliseconds(0.0123456), milliseconds(0.0000123456)
    ('12.3 ms', '0.0123 ms')
    """
    return f"{float(f'{seconds * 1e3:.3g}'):g} ms"


def machine() -> dict[str, object]:
    """What the times depend on."""
    return {
        "CPU": f"{_cpu_model()}, {torch.backends.cpu.get_cpu_capability()}",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch threads": torch.get_num_threads(),
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "delve": version("delve"),
        "system": f"{platform.system()} {platform.machine()}",
    }


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


def text_table(rows: Sequence[Row]) -> str:
    """The table for a terminal."""
    lines = [_HEADINGS, *(row.cells() for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_HEADINGS))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def markdown_table(rows: Sequence[Row]) -> str:
    """The table for a Markdown file."""
    lines = [_HEADINGS, tuple("---" for _ in _HEADINGS), *(row.cells() for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def footnotes(rows: Sequence[Row]) -> str:
    """The rows' own sentences, as a list."""
    return "\n".join(f"- {row.what}: {row.note}" for row in rows if row.note)


MEMORY = """\
How far the process's peak resident memory rises, in MiB, while one output is recorded: by the first hook, which also
makes the accumulator and scratch memory, and by later ones. At most one copy of the output and d² floats are meant to
be needed; what is below comes from reducing the output piece by piece.
"""


def markdown(rows: Sequence[Row], about: Mapping[str, object], notes: str, memory: str) -> str:
    """A whole RESULTS.md."""
    facts = "\n".join(f"- {name}: {value}" for name, value in about.items())
    peaks = f"## Memory of a hook\n\n{MEMORY}\n{memory}\n\n" if memory else ""
    return (
        f"# Results\n\nOne run of `make bench`.\n\n{markdown_table(rows)}\n\n{footnotes(rows)}\n\n{peaks}"
        f"## What is measured\n\n{notes}\n## Machine\n\n{facts}\n"
    )


def as_json(rows: Sequence[Row], about: Mapping[str, object]) -> str:
    """Everything, with all samples."""
    entries = [
        {
            "what": row.what,
            "ours_s": row.ours_s,
            "against": row.against,
            "against_s": row.against_s,
            "ratio": asdict(row.ratio),
            "target": row.target,
            "met": row.met,
            "note": row.note,
            "samples_s": {name: samples.tolist() for name, samples in row.samples.items()},
        }
        for row in rows
    ]
    return json.dumps({"machine": about, "rows": entries}, indent=1)
