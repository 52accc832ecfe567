"""`delve-ray diagnose`: findings that change a network."""

from __future__ import annotations

import textwrap
from typing import Any

from delve_ray.analysis.diagnosis import diagnose
from delve_ray.analysis.reading import read_spectra
from delve_ray.analysis.table import printable
from delve_ray.cli.output import described, fail_run, found_runs, progress_bar, show, show_json, text_width
from delve_ray.errors import ReadError
from delve_ray.storage import Storage

_MOST_LAYERS = 6
_STYLES = {
    r"^(tail|bottleneck|over-wide|gap|too-few-observations|too-few-columns): .*": "bold yellow",
    r"^(dead|collapse): .*": "bold red",
}


def diagnose_runs(paths: list[str], as_json: bool) -> int:
    """Print what is found in each run."""
    failures: list[int] = []
    found: list[dict[str, Any]] = []
    separator = ""
    runs = found_runs(paths, failures)
    with progress_bar("diagnosing") as progress:
        for done, run in enumerate(runs, start=1):
            try:
                findings = [finding.as_dict() for finding in diagnose(read_spectra(run), described(run) or None)]
            except ReadError as error:
                failures.append(fail_run(run, error))
            else:
                found += findings
                if not as_json:
                    show(separator + _text(run, findings), _STYLES)
                    separator = "\n"
            if progress is not None:
                progress(done, len(runs))
    if as_json:
        show_json(found)
    return max(failures, default=0)


def _text(run: Storage, findings: list[dict[str, Any]]) -> str:
    lines = [printable(run.uri)]
    if not findings:
        lines.append("nothing found")
    for finding in findings:
        layers = [printable(layer) for layer in finding["layers"]]
        more = f" and {len(layers) - _MOST_LAYERS} more" if len(layers) > _MOST_LAYERS else ""
        where = f"{printable(finding['run'])}, {finding['phase']}, step {finding['step']}"
        lines.append(f"{finding['kind']}: {', '.join(layers[:_MOST_LAYERS])}{more} ({where})")
        for said in (finding["evidence"], finding["advice"]):
            indented = {"initial_indent": "  ", "subsequent_indent": "  "}
            lines += textwrap.wrap(printable(said), text_width(), break_on_hyphens=False, **indented)  # type: ignore[arg-type]
    return "\n".join(lines)
