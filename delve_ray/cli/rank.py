"""`delve-ray rank`: the trials of a sweep from their files, best first."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from delve_ray.analysis.ranking import TrialResult, rank_trials
from delve_ray.analysis.ranking_table import ranking_table
from delve_ray.analysis.trials import read_trials
from delve_ray.cli.output import fail_run, found_runs, progress_bar, show, show_json, text_width
from delve_ray.errors import ReadError
from delve_ray.storage import Storage

_STYLES = {r"^(about as|less) accurate.*": "bold", r"^  1  .*": "green"}


def rank_runs(paths: list[str], as_json: bool, by: str, accuracy: str, within: float, mode: str, by_mode: str) -> int:
    """Print the ranking of the trials that can be read."""
    failures: list[int] = []
    trials: list[TrialResult] = []
    runs = found_runs(paths, failures)
    with progress_bar("reading trials") as progress:
        for done, run in enumerate(runs, start=1):
            try:
                trials += read_trials(run, (by, accuracy))
            except ReadError as error:
                failures.append(fail_run(run, error))
            if progress is not None:
                progress(done, len(runs))
    if not trials:
        if as_json:
            show_json([])
        return max(failures, default=0)
    try:
        ranking = rank_trials(_told_apart(trials), by, accuracy, within, mode=str(mode), by_mode=str(by_mode))
    except ReadError as error:
        if as_json:
            show_json([])
        hint = "" if any(accuracy in trial.metrics for trial in trials) else _HINT.format(accuracy)
        raise ReadError(f"{error}{hint}") from error
    if as_json:
        show_json(ranking.to_pylist())
    else:
        show(ranking_table(ranking, width=text_width()), _STYLES)
    return max(failures, default=0)


_HINT = "; tracker.add_scalar({!r}, value, step) in the training puts it among the files, and --accuracy names another"


def _told_apart(trials: list[TrialResult]) -> list[TrialResult]:
    """Trials of one name get their place beside it."""
    count = Counter(trial.trial for trial in trials)
    return [trial if count[trial.trial] == 1 else replace(trial, trial=_placed(trial)) for trial in trials]


def _placed(trial: TrialResult) -> str:
    return f"{trial.trial} {trial.path.uri if isinstance(trial.path, Storage) else trial.path}"
