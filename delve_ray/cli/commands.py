"""What each command takes. What it does is in the module of its name, so that only that one is imported."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from delve_ray.cli.complete import complete_path
from delve_ray.cli.output import FAILED, answering, fail

app = typer.Typer(
    name="delve-ray",
    help="How much of each layer's width a network uses: questions to the files of runs.",
    epilog="The exit code is 2 for what cannot be read; what else there is is shown.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Phase(StrEnum):
    """Phases of a training."""

    train = "train"
    eval = "eval"


class Best(StrEnum):
    """Which end of a metric is the better one."""

    max = "max"
    min = "min"


class Format(StrEnum):
    """What `export` writes."""

    csv = "csv"
    json = "json"
    npy = "npy"
    delve = "delve"


def _runs(text: str) -> typer.models.ArgumentInfo:
    info: typer.models.ArgumentInfo = typer.Argument(
        metavar="RUN", help=text, show_default=False, autocompletion=complete_path
    )
    return info


_SEVERAL = "Savefile of a run, or a directory or URI above runs."
Runs = Annotated[list[str], _runs(_SEVERAL)]
Json = Annotated[bool, typer.Option("--json", help="A list of objects instead of text.")]
OnePhase = Annotated[Phase | None, typer.Option("--phase", help="One phase; by default both.", show_default=False)]
OneStep = Annotated[
    int | None,
    typer.Option("--step", metavar="N", help="This step; by default the last one of each phase.", show_default=False),
]
Thresholds = Annotated[
    list[float] | None,
    typer.Option(
        "--threshold", "-t", metavar="δ", help="Share of variance, such as 0.9; may be repeated.", show_default=False
    ),
]
Output = Annotated[
    str | None, typer.Option("--output", "-o", metavar="PATH", help="Write to this path or URI.", show_default=False)
]


def _show_version(asked: bool) -> None:
    if not asked:
        return
    from importlib.metadata import PackageNotFoundError, version

    try:
        print(f"delve-ray {version('delve_ray')}")
    except PackageNotFoundError:
        fail("the package is not installed, so it has no version.")
        raise typer.Exit(FAILED) from None
    raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@app.command(short_help="A table of layers.")
@answering
def summary(runs: Runs, json: Json = False, step: OneStep = None, phase: OnePhase = None) -> int:
    """Show where each run is, what it has published, and its layers.

    Of each layer: samples, samples per feature (n/d) where there is room, intrinsic dimensionality, saturation, and its
    course over the steps. Layers with fewer samples than features are named below. With --json: the rows of these
    windows under the names of the Parquet columns; what is null, NaN or infinite is null, times are ISO 8601.
    """
    from delve_ray.cli.summary import summarize

    return summarize(runs, json, step, phase)


@app.command(short_help="The layers of two or more runs beside each other.")
@answering
def compare(
    runs: Annotated[list[str], _runs("Savefiles of two or more runs, the first being what others are compared with.")],
    json: Json = False,
    stat: Annotated[str, typer.Option(metavar="NAME", help="The statistic to compare.")] = "saturation",
    threshold: Annotated[
        float | None, typer.Option("--threshold", "-t", metavar="δ", help="Recompute all at this share of variance.")
    ] = None,
    step: OneStep = None,
    phase: OnePhase = None,
) -> int:
    """Put the layers of two or more runs beside each other, with the differences from the first one.

    Layers belong together by their names; those that only some runs have are shown and named. With --json: a row per
    run, phase and layer, with `label` and `difference` beside the names of the Parquet columns.
    """
    from delve_ray.cli.compare import compare_runs

    return compare_runs(runs, json, stat, threshold, step, phase)


@app.command(short_help="The trials of a sweep, best first.")
@answering
def rank(
    runs: Annotated[list[str], _runs("Directories or URIs of a sweep, whose trials lie below.")],
    json: Json = False,
    by: Annotated[str, typer.Option(help="Metric that orders the contenders: <statistic>/<phase>/<layer or mean>.")] = (
        "saturation/eval/mean"
    ),
    accuracy: Annotated[
        str, typer.Option(help="What makes a contender: a scalar of add_scalar, or a metric.")
    ] = "accuracy",
    within: Annotated[float, typer.Option(help="How far from the best accuracy a contender may be.")] = 0.01,
    mode: Annotated[Best, typer.Option(help="Whether more or less of the accuracy is better.")] = Best.max,
    by_mode: Annotated[Best, typer.Option(help="Whether more or less of --by is better.")] = Best.max,
) -> int:
    """Rank trials: of those about as accurate as the best, the one that uses its width best comes first.

    All is taken from the files: metrics from each trial's last windows, the accuracy from the last value that its
    training recorded with tracker.add_scalar("accuracy", …), the config from run.json.
    """
    from delve_ray.cli.rank import rank_runs

    return rank_runs(runs, json, by, accuracy, within, mode, by_mode)


@app.command(short_help="Spectra as CSV, JSON, numpy arrays or in Delve's layout.")
@answering
def export(
    runs: Runs,
    format: Annotated[Format, typer.Option("--format", "-f", help="What to write.")] = Format.csv,
    output: Output = None,
    phase: OnePhase = None,
    json: Annotated[bool, typer.Option("--json", help="The same as --format json.")] = False,
) -> int:
    """Export the rows of runs, to stdout or where -o says.

    csv: the columns that are no lists. json: all of them. npy: eigenvalues, and covariances where there are any, as
    arrays over steps, with an index.json, into the new folder that -o names. delve: the CSV of Delve 0.1.50, a line per
    step and a column per layer and statistic, of one run.
    """
    from delve_ray.cli.export import export_runs

    return export_runs(runs, "json" if json else format, output, phase)


@app.command(short_help="Other thresholds and statistics, from what is on disk.")
@answering
def recompute(
    runs: Runs,
    json: Json = False,
    threshold: Thresholds = None,
    stat: Annotated[
        list[str] | None,
        typer.Option("--stat", "-s", metavar="NAME", help="A statistic; may be repeated. By default every scalar."),
    ] = None,
    output: Output = None,
    step: OneStep = None,
    phase: OnePhase = None,
) -> int:
    """Compute thresholds and statistics anew from the eigenvalues and covariances on disk, which stay as they are.

    Shows the last window of each phase, or with --json its rows. With -o: writes the rows of all steps to a Parquet
    file with the columns of the spectra. correlation_… and rankme need covariances (stats=[…, "cov"]).
    """
    from delve_ray.cli.recompute import recompute_runs

    return recompute_runs(runs, json, threshold, stat, output, step, phase)


@app.command(short_help="Findings such as bottlenecks, tails and dead layers.")
@answering
def diagnose(runs: Runs, json: Json = False) -> int:
    """Look for what would change the network: tails, bottlenecks, layers that are too wide, dead or collapsed.

    With --json: a list of findings {kind, layers, evidence, advice, rule, source, run, phase, step}.
    """
    from delve_ray.cli.diagnose import diagnose_runs

    return diagnose_runs(runs, json)


@app.command(short_help="An HTML page of one or several runs.")
@answering
def report(
    runs: Runs,
    output: Annotated[str, typer.Option("--output", "-o", metavar="FILE", help="The page.")] = "report.html",
    json: Json = False,
) -> int:
    """Write one self-contained HTML page: findings, layers, charts."""
    from delve_ray.cli.report import report_runs

    return report_runs(runs, output, json)


@app.command(short_help="How a running store is, or how its run has ended.")
@answering
def status(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Savefile of a run, or its name.", show_default=False)],
    address: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS", envvar="RAY_ADDRESS", help="The Ray cluster with its store.", show_default=False
        ),
    ] = None,
    json: Json = False,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Refresh until the run ends, or Ctrl-C.")] = False,
    interval: Annotated[
        float, typer.Option("--interval", "-n", metavar="SECONDS", help="Time between two refreshes, with --watch.")
    ] = 2.0,
) -> int:
    """Ask the store of a run in a Ray cluster how it is: ranks, windows, writers, what is wrong.

    Without a cluster, or a store in it, say what run.json says: whether the run has ended, when, and why. With --watch,
    in place on a terminal; elsewhere a line per refresh; with --json an object per line. A store that is being started
    anew is waited for. The exit code is 0 once the run has ended.
    """
    if watch:
        from delve_ray.cli.watch import watch_status

        return watch_status(run, address, json, interval)
    from delve_ray.cli.status import show_status

    return show_status(run, address, json)


@app.command(short_help="Merge what was not delivered.")
@answering
def recover(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Savefile of a run that has ended.", show_default=False)],
    paths: Annotated[
        list[str] | None,
        typer.Argument(metavar="PATH", help="Further files, or folders of files, to merge.", show_default=False),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="A list of objects, one per file.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Also where the run does not seem to have ended.")] = False,
) -> int:
    """Merge into a run what its workers could not deliver and its writers could not write.

    That is the files in RUN/undelivered, and those that are named. What the run has already counts once; the corrected
    rows are published as a new revision, and the merged files are deleted. The exit code is 2 if a file could not be
    merged.
    """
    from delve_ray.cli.recover import recover_run

    return recover_run(run, paths or [], json, force)
