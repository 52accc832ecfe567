"""`delve-ray report`: an HTML page."""

from __future__ import annotations

from delve_ray.analysis.report import write_report
from delve_ray.analysis.table import printable
from delve_ray.cli.output import fail, found_runs, progress_bar, show_json


def report_runs(paths: list[str], output: str, as_json: bool) -> int:
    """Write the page about the runs that can be read, and say what cannot."""
    failures: list[int] = []
    runs = found_runs(paths, failures)
    if not runs:
        if as_json:
            show_json([])
        return max(failures, default=0)
    with progress_bar("writing the report"):
        problems = write_report(runs, output)
    failures += [fail(problem) for problem in problems]
    if as_json:
        show_json([{"output": output, "runs": [run.uri for run in runs], "problems": problems}])
    else:
        print(printable(output))
    return max(failures, default=0)
