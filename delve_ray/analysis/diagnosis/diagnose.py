"""All rules over all runs of a table of spectra."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from delve_ray.analysis.diagnosis.broken import broken_findings
from delve_ray.analysis.diagnosis.finding import CONSEQUENCE, Finding, Ranked
from delve_ray.analysis.diagnosis.sampling import gap_findings, scarce_findings, sketch_findings
from delve_ray.analysis.diagnosis.shape import shape_findings
from delve_ray.analysis.diagnosis.windows import COLUMNS, read_run
from delve_ray.analysis.windows import distinct, require_columns


def diagnose(spectra: pa.Table, described: Mapping[str, Any] | None = None) -> list[Finding]:
    """What the spectra of one or several runs say about their networks, most consequential first, run by run.

    The last complete window counts, that of all workers; for collapse, those before it as well. A network without a
    finding is one in which none of the rules found anything, no more: docs/diagnosis.md has what they miss.

    Args:
        spectra: What `read_spectra` returned, eigenvalues included. Layers come in its order, that of the network.
        described: The content of run.json, from which the parameters that a narrower layer saves can be told. Of
            several runs, it is used for the one that it names.

    Returns:
        Findings, none for a run that has not written anything.

    Raises:
        ReadError: a column is missing.

    >>> from delve_ray.schema import SPECTRA_SCHEMA
    >>> diagnose(SPECTRA_SCHEMA.empty_table())
    []
    """
    require_columns(spectra, COLUMNS)
    runs = distinct(spectra.column("run"))
    findings: list[Finding] = []
    for name in runs:
        of_run = (spectra.filter(pc.field("run") == name) if len(runs) > 1 else spectra).select(COLUMNS)
        mine = described is not None and (described.get("run") == name or (len(runs) == 1 and "run" not in described))
        findings += _diagnose_run(of_run, described if described is not None and mine else {})
    return findings


def _diagnose_run(spectra: pa.Table, described: Mapping[str, Any]) -> list[Finding]:
    run = read_run(spectra, described)
    if not run.windows:
        return []
    ranked = broken_findings(run) + scarce_findings(run) + sketch_findings(run)
    if not any(one.breaks for one in ranked):  # the widths of a broken training say nothing about the network
        ranked += gap_findings(run) + shape_findings(run)
    ranked = [one for one in ranked if not any(_says(other.finding, one) for other in ranked)]
    ranked.sort(key=lambda one: (CONSEQUENCE.index(one.finding.kind), -one.weight))
    return [one.finding for one in ranked]


def _says(finding: Finding, ranked: Ranked) -> bool:
    """Whether a finding makes another one needless: what is to be left out need not be mended."""
    return finding.kind == ranked.said_by and set(ranked.finding.layers) <= set(finding.layers)
