"""`delve-ray recover`: what was not delivered is merged."""

from __future__ import annotations

from delve_ray.analysis.table import printable
from delve_ray.cli.output import FAILED, fail, show_json
from delve_ray.recovery import recover
from delve_ray.storage import masked


def recover_run(run: str, paths: list[str], as_json: bool, force: bool) -> int:
    """Merge, and print what became of each file."""
    outcomes = recover(run, paths, force=force)
    if as_json:
        show_json([outcome.as_dict() for outcome in outcomes])
    else:
        merged = [outcome for outcome in outcomes if outcome.merged]
        steps = sorted({outcome.step for outcome in merged})
        ranks = sorted({outcome.rank for outcome in merged})
        what = f"merged {len(merged)} deltas of ranks {ranks}, steps {steps}" if merged else "nothing to merge"
        print(f"{printable(masked(run))}: {what}")
    for outcome in outcomes:
        if not outcome.merged:
            fail(f"{outcome.file} is not merged: {outcome.problem}")
    return FAILED if any(not outcome.merged for outcome in outcomes) else 0
