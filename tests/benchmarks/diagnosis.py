"""How often the diagnosis finds a flaw that was built in, and how often it finds one where there is none.

    python -m tests.benchmarks.diagnosis            # both parts, half an hour or more on one core
    python -m tests.benchmarks.diagnosis --write    # and into docs/diagnosis.md

Each network of `diagnosis_cases` is trained for real, three times, tracked without Ray, and diagnosed from its files. A
flaw is compared with the same training without it, and what a finding advises (leave out the tail, narrow a layer) is
done and the accuracy compared: a flaw that costs nothing is none, and advice that costs accuracy is bad.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from delve_ray.analysis.diagnosis import KINDS, Finding, diagnose
from tests.benchmarks.diagnosis_cases import CHOSEN_ON, HELD_OUT
from tests.benchmarks.diagnosis_networks import CHOSEN_SEEDS, HELD_OUT_SEEDS, Case, train

PAGE = Path(__file__).parents[2] / "docs" / "diagnosis.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
SOUND = "none"
FLAWS = tuple(kind for kind in KINDS if kind != "too-few-columns")  # nothing here is wide enough for a sketch
PARTS = {"chosen": (CHOSEN_ON, CHOSEN_SEEDS), "held-out": (HELD_OUT, HELD_OUT_SEEDS)}
ADVISED = re.compile(r"^Try (\d+) features")


@dataclass(frozen=True)
class Result:
    """What one training of one case gave; `advised` has (kind, accuracy with the advice followed)."""

    case: Case
    seed: int
    accuracy: float
    findings: Sequence[Finding]
    mended: float | None = None
    advised: Sequence[tuple[str, float]] = field(default=())

    @property
    def kinds(self) -> set[str]:
        """The kinds that were found."""
        return {finding.kind for finding in self.findings}


def evaluate(case: Case, seed: int, *, compare: bool = True) -> Result:
    """Train, diagnose, and with `compare` train again without the flaw and as the findings advise."""
    trained = train(case, seed)
    assert trained.spectra is not None
    findings = diagnose(trained.spectra, trained.described)
    if not compare:
        return Result(case, seed, trained.accuracy, findings)
    repaired = case.repaired()
    mended = None if repaired is None else train(repaired, seed, tracked=False).accuracy
    layers = [layer["name"] for layer in trained.described["layers"]]
    advised = []
    for kind in ("tail", "over-wide"):
        widths = follow(kind, findings, layers, case.widths)
        if widths is not None:
            advised.append((kind, train(replace(case, widths=widths), seed, tracked=False).accuracy))
    return Result(case, seed, trained.accuracy, findings, mended, advised)


def follow(
    kind: str, findings: Iterable[Finding], layers: Sequence[str], widths: Sequence[int]
) -> tuple[int, ...] | None:
    """The hidden layers' widths when all findings of a kind are followed; None without any, or for other networks.

    >>> found = Finding("tail", ("4", "6"), "", "Train without them", "", "", "run", "eval", 0)
    >>> follow("tail", [found], ["0", "2", "4", "6", "8"], (64, 32, 16, 16))
    (64, 32)
    """
    followed: list[int | None] = list(widths)
    if len(layers) != len(widths) + 1:  # not one recorded layer for each width, and the output
        return None
    for finding in findings:
        if finding.kind == kind:
            advised = ADVISED.match(finding.advice)
            for layer in finding.layers:
                followed[layers.index(layer)] = int(advised[1]) if advised else None
    left = tuple(width for width in followed if width is not None)
    return left if left != tuple(widths) else None


def confusion(results: Sequence[Result]) -> list[str]:
    """Flaw × kinds found, in runs, as a table."""
    lines = [f"| built in | runs | {' | '.join(FLAWS)} | nothing |", "|---|" + "---:|" * (len(FLAWS) + 2)]
    for flaw in (None, *FLAWS):
        runs = [result for result in results if result.case.flaw == flaw]
        if runs:
            counts = [sum(kind in result.kinds for result in runs) for kind in FLAWS]
            cells = [
                f"**{count}**" if kind == flaw else str(count or "·") for kind, count in zip(FLAWS, counts, strict=True)
            ]
            nothing = sum(not result.kinds for result in runs)
            cells.append(f"**{nothing}**" if flaw is None else str(nothing or "·"))
            lines.append(f"| {flaw or SOUND} | {len(runs)} | {' | '.join(cells)} |")
    return lines


def misses(results: Sequence[Result]) -> list[str]:
    """What was missed, and what was found in sound networks, by case."""
    lines = []
    missed = Counter(
        (one.case.flaw, one.case.name) for one in results if one.case.flaw and one.case.flaw not in one.kinds
    )
    alarms = Counter((kind, one.case.name) for one in results if one.case.flaw is None for kind in one.kinds)
    runs = Counter(one.case.name for one in results)
    for said, counted in (("missed", missed), ("found in a sound network", alarms)):
        listed = [f"{kind} ({name}, {count} of {runs[name]})" for (kind, name), count in counted.items()]
        lines.append(f"- {said}: {'; '.join(listed) or 'nothing'}")
    return lines


def comparisons(results: Sequence[Result]) -> list[str]:
    """What each flaw costs, and what following the advice does, in points of accuracy: mean, and its standard error."""
    lines = [
        "| compared | runs | accuracy as it was | accuracy then | difference in points |",
        "|---|---:|---:|---:|---:|",
    ]
    for flaw in FLAWS:
        flawed = [one for one in results if one.case.flaw == flaw]
        mended = [(one.accuracy, one.mended, flaw in one.kinds) for one in flawed if one.mended is not None]
        lines += _compared(f"{flaw}: without the flaw", [(was, then) for was, then, _ in mended])
        missed = [(was, then) for was, then, found in mended if not found]
        lines += _compared(f"{flaw}: without the flaw, of those missed", missed)
    for kind in ("tail", "over-wide"):
        for where, built_in in (("where it was built in", True), ("elsewhere", False)):
            followed = [
                (one.accuracy, accuracy)
                for one in results
                for what, accuracy in one.advised
                if what == kind and (one.case.flaw == kind) == built_in
            ]
            lines += _compared(f"{kind}: as the findings advise, {where}", followed)
    return lines


def _compared(what: str, pairs: Sequence[tuple[float, float]]) -> list[str]:
    if not pairs:
        return []
    before, after = np.array(pairs).T * 100
    error = f" ± {np.std(after - before, ddof=1) / np.sqrt(len(pairs)):.1f}" if len(pairs) > 1 else ""
    return [
        f"| {what} | {len(pairs)} | {before.mean():.1f} % | {after.mean():.1f} % | "
        f"{(after - before).mean():+.1f}{error} |"
    ]


def render(part: str, results: Sequence[Result]) -> str:
    """One part's tables."""
    cases, seeds = len({one.case.name + str(one.case.flaw) for one in results}), len({one.seed for one in results})
    head = {
        "chosen": f"The {cases} networks, with {seeds} seeds, on which the bounds were chosen:",
        "held-out": f"Held out, {cases} other networks with {seeds} other seeds, looked at after the bounds stood:",
    }[part]
    return "\n".join([head, "", *confusion(results), "", *misses(results), "", *comparisons(results)])


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.diagnosis", description=__doc__.split("\n")[0])
    parser.add_argument("--part", choices=PARTS, action="append", help="only this part")
    parser.add_argument("--only", default="", help="only cases whose name or flaw contains this")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each case, 3 at most")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/diagnosis.md")
    return parser.parse_args(arguments)


def write(tables: str, page: Path = PAGE) -> None:
    """Replace what stands between the marks of a page."""
    head, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, _, foot = rest.partition(END)
    page.write_text(f"{head}{BEGIN}\n\n{tables}\n\n{END}{foot}", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, diagnose, print."""
    options = parse_options(arguments)
    torch.set_num_threads(1)
    began = time.perf_counter()
    parts = []
    for part in options.part or ("held-out", "chosen"):
        cases, seeds = PARTS[part]
        results = []
        for case in cases:
            for seed in seeds[: options.seeds]:
                if options.only in case.name or options.only in str(case.flaw):
                    results.append(evaluate(case, seed))
                    print(_progress(results[-1]), file=sys.stderr, flush=True)
        parts.append(render(part, results))
    tables = "\n\n".join(parts)
    print(tables)
    print(f"{time.perf_counter() - began:.0f} s, {os.cpu_count()} cores", file=sys.stderr)
    if options.write:
        write(tables)


def _progress(result: Result) -> str:
    found = ", ".join(f"{finding.kind} {'/'.join(finding.layers)}" for finding in result.findings) or "nothing"
    others = [f"mended {result.mended:.3f}"] if result.mended is not None else []
    others += [f"{kind} followed {accuracy:.3f}" for kind, accuracy in result.advised]
    head = f"{result.case.flaw or SOUND:12} {result.case.name:32} {result.seed:3} {result.accuracy:.3f}"
    return f"{head} {found}  {', '.join(others)}"


if __name__ == "__main__":
    main()
